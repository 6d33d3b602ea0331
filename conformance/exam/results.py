"""What came of an exam, as data, from which ``reports`` makes a table and a page."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conformance.contract.precision import CONTRACT
from conformance.contract.registry import stage_named
from conformance.errors import UsageError
from conformance.exam.efforts import Cases, Effort
from conformance.exam.known_kernels import KnownKernel
from conformance.exam.rules import RULES
from conformance.lanes import find_lane
from conformance.outside import write_whole

#: What our own rule is called in tables.
OURS = "conformance"


#: Layers and chains may miss so much of their faults: what lies below their composed rounding noise.
COMPOSITE_TARGET = 0.97


#: Probability with which the stated number of examples shows a fault.
CONFIDENCE = 0.999


#: An exam that measures power fails where a stage's own number of examples shows a fault with less than this. It is less than
#: ``CONFIDENCE`` because the same power, measured on the cases of another seed, comes out a little differently.
LEAST_CONFIDENCE = 0.99


@dataclasses.dataclass
class KernelResult:
    """What came of one subject. Counts are of trials: a trial is one case, with the repeats and row checks that belong to it."""

    id: str
    stage: str
    name: str
    lane: str
    kind: str | None
    summary: str
    hidden: str = ""
    #: The detectors that name the fault: one of them says what is wrong. None of a legal kernel.
    naming: list[str] = dataclasses.field(default_factory=list)
    trials: int = 0
    #: By rule, how many trials it rejected. A capability that does not hold counts as one trial of ours.
    rejected: dict[str, int] = dataclasses.field(default_factory=dict)
    #: By regime, trials and those that our rule rejected.
    regimes: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    #: Trials whose first run, which is all that the other rules see, shows the fault in its outputs.
    in_outputs: int = 0
    #: The detectors of ours that fired.
    detectors: list[str] = dataclasses.field(default_factory=list)
    #: Trials that our rule rejected, by none of the detectors that name the fault.
    unnamed: int = 0
    #: The first trial that our rule rejected, counted from 1; 0 if none was.
    first: int = 0
    #: The largest share of the allowance that a run which passed used.
    share: float = 0.0
    #: The first rejected cases of a legal variant, or the one that tells most of a fault that all cases show together; with what
    #: was found.
    rejections: list[str] = dataclasses.field(default_factory=list)
    #: Why the subject could not be judged, if so.
    error: str = ""
    #: The kind of a fault that the exam's policy of precision makes legal, if it is one.
    made_legal: str | None = None

    @classmethod
    def of(cls, subject: KnownKernel, error: str = "") -> KernelResult:
        """That of a subject before its first trial."""
        about = subject.id, subject.stage, subject.name, subject.lane, subject.kind, subject.summary, subject.hidden
        return cls(*about, naming=list(subject.detectors), error=error, made_legal=subject.made_legal)

    @property
    def legal(self) -> bool:
        """Whether the kernel must pass."""
        return self.kind is None

    @property
    def composite(self) -> bool:
        """Whether the stage is a layer or a chain of layers."""
        return stage_named(self.stage).composite

    @property
    def has_power(self) -> bool:
        """Whether data show the fault: one that comes and goes from call to call is shown by repeats.

        Interpreted kernels are run once a case and have fewer cases: they say nothing of the number of examples.
        """
        lane = find_lane(self.lane)
        return lane is not None and lane.in_process and self.kind != "nondeterminism"

    def names(self, fired: Iterable[str]) -> bool:
        """Whether one of the detectors that fired names the fault; any does if none is declared."""
        return not self.naming or not set(self.naming).isdisjoint(fired)

    def caught_by(self, rule: str) -> bool:
        """Whether the rule rejected any trial."""
        return self.rejected.get(rule, 0) > 0


@dataclasses.dataclass
class Cost:
    """Seconds that judging took, bounds and goldens given, over ``runs`` runs of legal kernels."""

    seconds: float = 0.0
    runs: int = 0

    def add(self, other: Cost) -> None:
        """Take another's runs in."""
        self.seconds += other.seconds
        self.runs += other.runs


@dataclasses.dataclass
class Exam:
    """Everything that came of an exam."""

    effort: Effort
    seed: int
    standings: list[KernelResult]
    costs: dict[str, Cost]
    seconds: float = 0.0
    #: The policy of precision that every kernel declared.
    precision: str = CONTRACT

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules that were examined, ours first."""
        return (OURS, *(rule.name for rule in RULES))

    @property
    def faults(self) -> list[KernelResult]:
        """Faulty kernels that could be judged and that their lane can show."""
        return [one for one in self.standings if not one.legal and not one.hidden and not one.error]

    @property
    def variants(self) -> list[KernelResult]:
        """Legal kernels that were judged, if not all to their end: a rejection counts whatever came after it."""
        return [one for one in self.standings if one.legal and one.trials]

    @property
    def made_legal(self) -> list[KernelResult]:
        """Faults of the catalogue that the policy of precision makes legal: they are among the legal kernels."""
        return [one for one in self.standings if one.made_legal]

    @property
    def hidden(self) -> list[KernelResult]:
        """Faults that their lane cannot show by its nature."""
        return [one for one in self.standings if one.hidden]

    @property
    def errors(self) -> list[KernelResult]:
        """Subjects that could not be judged."""
        return [one for one in self.standings if one.error]

    def missed(self, rule: str = OURS) -> list[KernelResult]:
        """Faults that no trial showed to a rule."""
        return [one for one in self.faults if not one.caught_by(rule)]

    def unnamed(self) -> list[KernelResult]:
        """Faults that our rule caught, in no trial by a detector that names them."""
        return [one for one in self.faults if one.caught_by(OURS) and not one.names(one.detectors)]

    def score(self, rule: str) -> Score:
        """Of one rule: faults and legal runs together."""
        faults, variants = self.faults, self.variants
        cost = self.costs.get(rule, Cost())
        return Score(
            rule,
            caught=sum(one.caught_by(rule) for one in faults),
            faults=len(faults),
            caught_trials=sum(min(one.rejected.get(rule, 0), one.trials) for one in faults),
            fault_trials=sum(one.trials for one in faults),
            rejected_variants=sum(one.caught_by(rule) for one in variants),
            variants=len(variants),
            rejected_trials=sum(one.rejected.get(rule, 0) for one in variants),
            legal_trials=sum(one.trials for one in variants),
            milliseconds=1000 * cost.seconds / cost.runs if cost.runs else math.nan,
        )

    @property
    def layer_faults(self) -> int:
        """How many faults of layers and chains there are: of these a share may be missed.

        Those that could not be judged are among them: an exam with such faults has not passed anyway.
        """
        return sum(one.composite and not one.legal and not one.hidden for one in self.standings)

    @property
    def failed(self) -> bool:
        """Whether the rule is not as good as it has to be.

        A legal kernel was rejected, a fault of a single stage missed or hardly shown, too many of layers missed, or a fault never
        named.
        """
        missed = self.missed()
        of_layers = sum(one.composite for one in missed)
        too_many = len(missed) > of_layers or of_layers > (1 - COMPOSITE_TARGET) * self.layer_faults
        rejects = any(one.caught_by(OURS) for one in self.variants)
        return too_many or rejects or bool(self.too_few_examples()) or bool(self.unnamed())

    @property
    def passed(self) -> bool:
        """Whether both faults and legal kernels were judged, all of them, and rightly."""
        return bool(self.faults and self.variants) and not self.errors and not self.failed

    def examples_needed(self, confidence: float = CONFIDENCE) -> dict[str, tuple[int, str]]:
        """By stage, how many stratified examples show every fault of the catalogue with ``confidence``, and the dearest fault.

        From the measured power in each regime, since stratified examples go round the regimes. Faults that were never caught
        say nothing about a number and are left out: they are listed as missed. So are those that have no power (``has_power``).
        Empty if the exam measures no power: a few cases say next to nothing about it.
        """
        needed: dict[str, tuple[int, str]] = {}
        for one in self.faults if self.effort.measures else ():
            if one.has_power and any(caught for _, caught in one.regimes.values()):
                needed[one.stage] = max(needed.get(one.stage, (0, "")), (trials_for(one.regimes, confidence), one.name))
        return needed

    def too_few_examples(self) -> dict[str, str]:
        """The single stages whose own number of examples is too small by what this exam measured, and the fault that shows it.

        Layers and chains may miss some faults, so one that they show seldom is no reason.
        """
        needed = self.examples_needed(LEAST_CONFIDENCE)
        given = {name: stage_named(name) for name in needed}
        return {name: needed[name][1] for name, one in given.items() if not one.composite and needed[name][0] > one.examples}

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads."""
        return {
            "effort": dataclasses.asdict(self.effort),
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "precision": self.precision,
            "costs": {name: dataclasses.asdict(cost) for name, cost in self.costs.items()},
            "standings": [dataclasses.asdict(one) for one in self.standings],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Exam:
        """The inverse of ``to_json``."""
        cases = {name: Cases(**data["effort"][name]) for name in ("single", "composite", "interpreted")}
        return cls(
            Effort(**{**data["effort"], **cases}),
            data["seed"],
            [KernelResult(**one) for one in data["standings"]],
            {name: Cost(**cost) for name, cost in data["costs"].items()},
            data["seconds"],
            data.get("precision", CONTRACT),
        )


@dataclasses.dataclass(frozen=True)
class Score:
    """How one rule did. A fault is caught if any of its trials is rejected, a variant is rejected likewise."""

    rule: str
    caught: int
    faults: int
    caught_trials: int
    fault_trials: int
    rejected_variants: int
    variants: int
    rejected_trials: int
    legal_trials: int
    milliseconds: float


def trials_for(regimes: Mapping[str, Sequence[int]], confidence: float = CONFIDENCE) -> int:
    """How many trials that go round the regimes show a fault with this probability, from ``(trials, caught)`` by regime.

    A rate is taken as ``caught / (trials + 1)``: no finite number of trials proves that a regime always shows a fault, and
    none is credited where nothing was caught.
    """
    rates = [caught / (trials + 1) for trials, caught in regimes.values() if trials]
    if not rates or max(rates) == 0:
        raise ValueError("a fault that was never caught has no number of examples")
    each_round = sum(math.log1p(-rate) for rate in rates)
    return max(1, math.ceil(math.log(1 - confidence) / each_round * len(rates)))


def write_json(exam: Exam, path: Path) -> None:
    """Keep an exam; ``read_json`` reads it."""
    write_whole(path, json.dumps(exam.to_json(), indent=1) + "\n")


def read_json(path: Path) -> Exam:
    """A kept exam; raises ``UsageError`` for a file that holds none."""
    try:
        return Exam.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: expected an exam that `conformance exam --out` wrote, found none: {error}") from error
