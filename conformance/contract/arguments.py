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


#: What one step along a factor of a symbolic shape means to a person.
FACTOR_LABELS: dict[str, str] = {
    "B": "row",
    "L": "layer",
    "NH": "head",
    "NKV": "kv_head",
    "D": "lane",
    "S": "position",
    "NB": "page",
    "BS": "offset",
    "MB": "page_index",
    "H": "column",
    "I": "column",
    "V": "column",
    "T": "token",
    "1": "row",
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

    def size(self, dims: Dims) -> tuple[int, ...]:
        """The concrete shape at ``dims``."""
        return tuple(math.prod(_symbol(symbol, dims) for symbol in axis) for axis in _factors(self.shape))

    def where(self, index: Sequence[int], dims: Dims) -> dict[str, int]:
        """Names for the coordinates of an element, such as ``{"row": 3, "head": 1, "lane": 17}``."""
        named: dict[str, int] = {}
        for position, axis in zip(index, _factors(self.shape), strict=True):
            coordinates: list[tuple[str, int]] = []
            for symbol in reversed(axis):
                position, coordinate = divmod(position, _symbol(symbol, dims))
                coordinates.append((FACTOR_LABELS[symbol], coordinate))
            if axis != ("1",):
                named.update(reversed(coordinates))
        return named

    def describe(self) -> str:
        """The declaration as the contract writes it, such as ``out out[B,H] bf16``."""
        prefix = "" if self.access == "in" else f"{self.access} "
        return f"{prefix}{self.name}[{','.join(self.shape.split())}] {DTYPE_NAMES[self.dtype]}"


def _symbol(symbol: str, dims: Dims) -> int:
    return int(symbol) if symbol.isdigit() else int(getattr(dims, symbol))


def read(name: str, shape: str, dtype: torch.dtype) -> Argument:
    """An input that a kernel reads and must not change."""
    return Argument(name, shape, dtype, "in")


def write(name: str, shape: str, dtype: torch.dtype) -> Argument:
    """An output that a kernel fills."""
    return Argument(name, shape, dtype, "out")


def update(name: str, shape: str, dtype: torch.dtype) -> Argument:
    """A tensor that a kernel reads and changes in part; every element it may not change must keep its bits."""
    return Argument(name, shape, dtype, "io")
