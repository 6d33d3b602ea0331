"""The outputs of a run as the tests look at them, and what the tests under one profile found."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch

from conformance.cases.case import Case
from conformance.contract.arguments import Argument
from conformance.judge import limits
from conformance.judge.verdict import FilterResponse, Finding
from conformance.lanes.base import Outcome
from conformance.numerics.bounds import Bounds, Profile


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """``[rows, columns]`` of any tensor: the first axis, and all others; one row of a vector."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.reshape(1, -1)


def blocks_of(matrix: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of pieces of at most ``BLOCK`` elements that cover a matrix."""
    rows, columns = matrix.shape
    width = max(1, min(columns, limits.BLOCK))
    height = max(1, limits.BLOCK // width)
    for row, column in itertools.product(range(0, rows, height), range(0, columns, width)):
        yield slice(row, min(rows, row + height)), slice(column, min(columns, column + width))


@dataclasses.dataclass(frozen=True)
class OutputPart:
    """The judged rows of one output, and where they stand in the argument."""

    argument: Argument
    raw: torch.Tensor
    rows: torch.Tensor | None

    @property
    def found(self) -> torch.Tensor:
        """As a matrix, in the output's own dtype."""
        return as_matrix(self.raw)

    @functools.cached_property
    def value(self) -> torch.Tensor:
        """As a matrix of float64: four times an output in bf16, so only for tests that look at it as a whole."""
        return self.found.to(torch.float64)

    def index(self, flat: int) -> tuple[int, ...]:
        """Where an element of the matrix, counted row by row, stands in the argument."""
        row, column = divmod(flat, self.found.shape[1])
        if self.raw.dim() == 1:
            return (column,)
        return (row if self.rows is None else int(self.rows[row]), column)


def part_of(case: Case, outcome: Outcome, name: str, estimate: Bounds) -> OutputPart:
    """The judged rows of one output of a run."""
    found = outcome.outputs[name]
    raw = found if estimate.rows is None else found[estimate.rows]
    return OutputPart(case.stage.argument(name), raw, estimate.rows)


@dataclasses.dataclass(frozen=True)
class WorstElement:
    """The element of an output that is furthest off under one profile: where in the judged matrix, what the profile allows there,
    and how many elements are off, in what shape."""

    argument: str
    row: int
    column: int
    share: float
    pattern: str
    count: int
    total: int
    near: Bounds


@dataclasses.dataclass
class NumericFindings:
    """The numeric tests of all outputs under one profile."""

    profile: Profile
    findings: list[Finding]
    shares: dict[str, float]
    responses: dict[str, FilterResponse] = dataclasses.field(default_factory=dict)
    wrong: int = 0
    #: By argument, where elements are off.
    elements: dict[str, WorstElement] = dataclasses.field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """The worst share of the allowance by any output."""
        return max(self.shares.values(), default=None)

    @property
    def badness(self) -> tuple[int, int, float]:
        """For ordering: the number of findings, of wrong elements and areas, then the share."""
        return (len(self.findings), self.wrong, self.share or 0.0)


def count_true(mask: torch.Tensor) -> int:
    """How many elements of a mask are set."""
    return int(mask.count_nonzero())  # a sum would widen the mask to int64 first
