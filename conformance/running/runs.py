"""One judged run of a kernel, and what runs a kernel on a case."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch

from conformance.cases.case import Case
from conformance.cases.key import CaseKey
from conformance.judge.verdict import Verdict
from conformance.lanes.base import Outcome
from conformance.lanes.messages import Passes

#: After so many runs that crashed or timed out the rest is not tried: each costs a process, or the whole time limit.
MOST_LOST = 2


class Runner(Protocol):
    """Runs a kernel on a case; ``passes`` says which compiler passes are compared: the last, all or none."""

    def __call__(self, case: Case, passes: Passes = "last") -> Outcome: ...


@dataclasses.dataclass(frozen=True)
class Judged:
    """One judged run: which check it was, of which case, and the verdict."""

    check: str
    case: CaseKey
    verdict: Verdict
    outcome: Outcome


class Keep(Protocol):
    """Keeps what a judged run with findings left behind, before it is forgotten: tensors by name."""

    def __call__(self, run: Judged, tensors: Mapping[str, torch.Tensor]) -> object: ...


def is_lost(run: Judged) -> bool:
    """Whether a run took its process with it."""
    return run.outcome.status in ("crashed", "timed_out")
