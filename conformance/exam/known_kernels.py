"""Kernels whose verdict is known before they are judged, and the faults that they have: what an exam is made of.

A model brings its own (``Model.exam_modules``), in whatever toolchain its kernels are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from conformance.contract.kernel import Kernel
from conformance.contract.precision import CONTRACT, declared_names
from conformance.contract.registry import stage_named
from conformance.lanes import lane_named
from conformance.lanes.eager import EAGER

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


Function = TypeVar("Function", bound=Callable[..., Any])

#: What names a fault that computes a wrong value, if its declaration does not say otherwise.
WRONG_VALUE = ("element",)


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that an engineer did wrong, in the kernels of some stages.

    ``hook`` is where it is woven into a right kernel, and ``function`` what stands there in the place of the right thing; what
    hooks there are is the model's affair. ``detectors`` are those that name the fault: where any of them fires, a finding says
    what is wrong. ``dims`` overrides the dimensions, and ``choices`` a right kernel's choices, where the fault shows at
    others only. ``rounds`` names the roundings that it is: it is none where the kernel declares one of them.
    """

    name: str
    kind: Kind
    summary: str
    stages: tuple[str, ...]
    hook: str
    function: Callable[..., Any]
    detectors: tuple[str, ...] = WRONG_VALUE
    dims: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rounds: tuple[str, ...] = ()


class Faults:
    """The faults of a model's kernels in one toolchain, as ``declare`` collects them."""

    def __init__(self, like: Faults | None = None) -> None:
        #: By stage and name, in the order of their declaration.
        self.by_stage: dict[str, dict[str, Fault]] = {}
        self._by_name: dict[str, Fault] = {}
        self._like = like

    def declare(
        self,
        hook: str,
        kind: Kind | None,
        *stages: str,
        name: str = "",
        summary: str = "",
        detectors: tuple[str, ...] = (),
        dims: Mapping[str, Any] | None = None,
        rounds: tuple[str, ...] = (),
        **choices: Any,
    ) -> Callable[[Function], Function]:
        """Make the function below a fault of these stages.

        Its name is the fault's, and its docstring, one line, the summary, unless they are given. A fault that is woven in at
        another place in other stages is declared once more, without a kind: it is the same fault, and has the kind, the summary
        and, unless given, the detectors and roundings of the first. So has one that was declared, under the same name, in the
        faults that these are ``like``.

        Raises ``ValueError`` for a fault that a stage has already, of an unknown kind or of no stage, or that does not say in one
        line what the engineer did.
        """

        def register(function: Function) -> Function:
            called = name or function.__name__
            if not stages or any(called in self.by_stage.get(stage, ()) for stage in stages):
                raise ValueError(
                    f"fault {called!r}: expected stages that do not have it yet, found {', '.join(stages) or 'none'}"
                )
            if kind is None:
                known = self.named(called)
                about = known.kind, known.summary
                named_by, made = detectors or known.detectors, rounds or known.rounds
            else:
                if kind not in KINDS:
                    raise ValueError(f"fault {called!r}: expected a kind of {', '.join(KINDS)}, found {kind!r}")
                if called in self._by_name:
                    raise ValueError(f"fault {called!r} is declared already: its kind is given once")
                about = kind, summary or as_clause(function.__doc__ or "")
                named_by, made = detectors or WRONG_VALUE, rounds
            if not about[1] or "\n" in about[1]:
                raise ValueError(f"fault {called!r} must say in one line what the engineer did, found {about[1]!r}")
            found = Fault(called, *about, stages, hook, function, named_by, dict(dims or {}), choices, made)
            self._by_name.setdefault(called, found)
            for stage in stages:
                self.by_stage.setdefault(stage, {})[called] = found
            return function

        return register

    def named(self, name: str) -> Fault:
        """The first declaration of a fault; raises ``ValueError`` if there is none."""
        if name in self._by_name:
            return self._by_name[name]
        if self._like is None:
            raise ValueError(f"fault {name!r} is not declared: give its kind, or the name of one that is")
        return self._like.named(name)

    def of(self, stage: str) -> tuple[Fault, ...]:
        """The faults of a stage, in the order of their declaration."""
        return tuple(self.by_stage.get(stage, {}).values())


def as_clause(sentence: str) -> str:
    """A docstring as one clause among others: without its full stop, and small where it is no name that begins it."""
    word = sentence.split(" ", 1)[0]
    is_name = not word[1:].islower() and word != "A"
    return (sentence if is_name else sentence[:1].lower() + sentence[1:]).rstrip(".")


@dataclasses.dataclass(frozen=True)
class KnownKernel:
    """One kernel of the exam.

    ``kind`` is the class of its fault, ``None`` for a legal variant; ``summary`` is one line that says what an engineer did.
    ``make`` gives the kernel anew, since one may remember its calls. ``dims`` overrides the exam's dimensions where the kernel
    shows at others only. ``hidden`` says why a lane cannot show the fault by its nature, if so; the kernel is then listed and
    not counted as missed. ``detectors`` are those that name the fault; a legal variant has none. ``rounds`` names roundings that
    are the whole fault; ``precision`` is the policy under which the kernel is judged, and ``made_legal`` the kind of a fault that
    is none under it.
    """

    stage: str
    name: str
    kind: Kind | None
    summary: str
    make: Callable[[], Kernel]
    lane: str = EAGER.name
    dims: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hidden: str = ""
    detectors: tuple[str, ...] = ()
    rounds: tuple[str, ...] = ()
    precision: str = CONTRACT
    made_legal: Kind | None = None

    def under(self, precision: str) -> KnownKernel:
        """The same kernel as a policy has it: with another verdict, where the policy declares what the fault rounds."""
        declared = declared_names(stage_named(self.stage), (), precision)
        if self.kind is None or set(self.rounds).isdisjoint(declared):
            return dataclasses.replace(self, precision=precision)
        return dataclasses.replace(self, precision=precision, kind=None, made_legal=self.kind, detectors=(), hidden="")

    @property
    def id(self) -> str:
        """Unique in the exam: stage and name, and the lane for other than torch kernels."""
        prefix = "" if lane_named(self.lane).in_process else f"{self.lane}:"
        return f"{prefix}{self.stage}/{self.name}"

    @property
    def legal(self) -> bool:
        """Whether the kernel must pass."""
        return self.kind is None
