"""A kernel whose verdict is known before it is judged: what the exam is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from conformance.contract.kernel import Kernel

#: The classes of faults.
Kind = Literal["value", "indexing", "unwritten", "memory", "precision", "dependency", "nondeterminism", "robustness"]

KINDS: dict[str, str] = {
    "value": "computes another formula",
    "indexing": "reads or writes the right thing in the wrong place",
    "unwritten": "leaves a part of its result as it was",
    "memory": "touches memory that is not its to touch",
    "precision": "rounds, accumulates or truncates where it must not",
    "dependency": "reads a result before, or instead of, the one it should wait for",
    "nondeterminism": "gives another result for the same inputs, or keeps something from call to call",
    "robustness": "fails for inputs that it has to serve",
}


@dataclasses.dataclass(frozen=True)
class KnownKernel:
    """One kernel of the exam.

    ``kind`` is the class of its fault, ``None`` for a legal variant; ``summary`` is one line that says what an engineer did.
    ``make`` gives the kernel anew, since one may remember its calls. ``dims`` overrides the exam's dimensions where the subject
    shows at others only. ``hidden`` says why a lane cannot show the fault by its nature, if so; the subject is then listed and
    not counted as missed.
    """

    stage: str
    name: str
    kind: Kind | None
    summary: str
    make: Callable[[], Kernel]
    lane: str = "eager"
    dims: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hidden: str = ""

    @property
    def id(self) -> str:
        """Unique in the exam: stage and name, and the lane for other than torch kernels."""
        prefix = "" if self.lane == "eager" else f"{self.lane}:"
        return f"{prefix}{self.stage}/{self.name}"

    @property
    def legal(self) -> bool:
        """Whether the kernel must pass."""
        return self.kind is None
