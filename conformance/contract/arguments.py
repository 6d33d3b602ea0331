"""The tensors that a stage takes: names, dtypes, symbolic shapes and what a kernel may do with them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch

from conformance.contract.dims import Dims

Access = Literal["in", "out", "io"]


DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.int32: "i32",
}


@functools.cache
def _factors(symbolic_shape: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(axis.split("*")) for axis in symbolic_shape.split())


@dataclasses.dataclass(frozen=True)
class Argument:
    """One tensor of a stage.

    ``shape`` is symbolic: axes parted by blanks, each a product of dimension symbols, as in ``"B NH*D"``. The factors also
    say where an element is: column 130 of ``NH*D`` is lane 2 of head 2 if ``D`` is 64.
    """

    name: str
    shape: str
    dtype: torch.dtype
    access: Access

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """The factors of each axis: ``(("B",), ("NH", "D"))``."""
        return _factors(self.shape)

    def size(self, dims: Dims) -> tuple[int, ...]:
        """The concrete shape at ``dims``."""
        return tuple(math.prod(map(dims.size, axis)) for axis in self.axes)

    def group_width(self, dims: Dims) -> int:
        """Columns of one group, where columns are made of equal groups: ``D`` of ``NH*D``; all of them otherwise."""
        last = self.axes[-1]
        return dims.size(last[-1] if len(last) > 1 else last[0])

    def where(self, index: Sequence[int], dims: Dims) -> dict[str, int]:
        """Names for the coordinates of an element, such as ``{"row": 3, "head": 1, "lane": 17}``."""
        named: dict[str, int] = {}
        for position, axis in zip(index, self.axes, strict=True):
            coordinates: list[tuple[str, int]] = []
            for symbol in reversed(axis):
                position, coordinate = divmod(position, dims.size(symbol))
                coordinates.append((dims.label(symbol), coordinate))
            if axis != ("1",):
                named.update(reversed(coordinates))
        return named

    def describe(self) -> str:
        """The declaration as the contract writes it, such as ``out out[B,H] bf16``."""
        prefix = "" if self.access == "in" else f"{self.access} "
        return f"{prefix}{self.name}[{','.join(self.shape.split())}] {DTYPE_NAMES[self.dtype]}"


def read(name: str, shape: str, dtype: torch.dtype) -> Argument:
    """An input that a kernel reads and must not change."""
    return Argument(name, shape, dtype, "in")


def write(name: str, shape: str, dtype: torch.dtype) -> Argument:
    """An output that a kernel fills."""
    return Argument(name, shape, dtype, "out")


def update(name: str, shape: str, dtype: torch.dtype) -> Argument:
    """A tensor that a kernel reads and changes in part; every element it may not change must keep its bits."""
    return Argument(name, shape, dtype, "io")
