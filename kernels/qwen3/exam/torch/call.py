"""One call of a torch kernel, as the faults around it see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import Stage
from conformance.kernels.qwen3.exam.torch.operations import Operations

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a kernel that is right by itself.

    ``number`` counts calls from 1; ``kept`` and ``operations`` are the kernel's own, from call to call; ``compute`` writes the
    results of the tensors that it is given into those of them that are outputs.
    """

    stage: Stage
    tensors: dict[str, Tensor]
    dims: Dims
    number: int
    kept: dict[str, Any]
    operations: Operations
    compute: Callable[[dict[str, Tensor], Dims], None]

    def run(self, **other: Tensor) -> None:
        """Compute and write the results, with other tensors in the place of some."""
        self.compute({**self.tensors, **other}, self.dims)

    @property
    def outputs(self) -> dict[str, Tensor]:
        """What the kernel fills: its outputs, or the caches if it has no others."""
        filled = {one.name: self.tensors[one.name] for one in self.stage.outputs if one.access == "out"}
        return filled or {one.name: self.tensors[one.name] for one in self.stage.outputs}

    @property
    def read(self) -> dict[str, Tensor]:
        """The tensors that the kernel only reads."""
        return {one.name: self.tensors[one.name] for one in self.stage.arguments if one.access == "in"}

    @property
    def first(self) -> Tensor:
        """The first input."""
        return next(iter(self.read.values()))

    def elsewhere(self) -> dict[str, Tensor]:
        """The results in buffers of the kernel's own; the caches are updated."""
        buffers = {name: torch.empty_like(tensor) for name, tensor in self.outputs.items()}
        self.run(**buffers)
        return buffers
