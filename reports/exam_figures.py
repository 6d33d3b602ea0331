"""What came of the harness's exam, in figures and words: each rule's catches, misses, false alarms and cost.

Both reports of it (``exam_table``, ``exam_page``) are built from this. Whatever it says of the rules is computed from the
numbers of an ``Exam`` (``conformance.exam.results``), so a rule from elsewhere that does as well as ours is named as such.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Iterable, Sequence

from conformance.contract.precision import CONTRACT
from conformance.contract.registry import stage_named, stages
from conformance.exam.known_kernels import KINDS
from conformance.exam.results import COMPOSITE_TARGET, OURS, Exam, KernelResult, Score
from conformance.exam.rules import RULES
from conformance.judge.verdict import DETECTORS
from conformance.reports import text

#: The rule whose cost the others' are told in.
YARDSTICK = "assert_close"
#: Faults that came closest to being missed, as many as a page lists.
MOST_NARROW = 15
#: Rules that saw a missed fault, or stages that show it, that are named one by one.
MOST_SEEING = 4

OUR_DEFINITION = (
    "every element within the error that the contract's own arithmetic allows it; errors of a row, a tile and the whole neither "
    "larger than rounding explains nor leaning one way, in a layer or in all its cases not those of a known mistake; nothing "
    "unwritten, nothing else written, no input changed; repeats and single rows agree; declared capabilities hold"
)
OUR_SOURCE = "conformance/numerics, conformance/judge, conformance/running/check.py"


@dataclasses.dataclass(frozen=True)
class RuleLine:
    """One rule: what it says, where that is published, and how it did."""

    name: str
    system: str
    definition: str
    source: str
    score: Score
    relative: float
    #: Faults caught of those that show in outputs.
    in_outputs: int

    @property
    def ours(self) -> bool:
        """Whether it is our own rule."""
        return self.name == OURS

    @property
    def caught_share(self) -> float:
        """Percent of the faults."""
        return 100 * self.score.caught / self.score.faults if self.score.faults else math.nan

    @property
    def rejected_share(self) -> float:
        """Percent of the runs of legal kernels."""
        return 100 * self.score.rejected_trials / self.score.legal_trials if self.score.legal_trials else math.nan


@dataclasses.dataclass(frozen=True)
class ResultGroup:
    """Standings of one kind or one stage."""

    name: str
    meaning: str
    members: tuple[KernelResult, ...]

    def caught(self, rule: str = OURS) -> int:
        """How many of them the rule caught."""
        return sum(one.caught_by(rule) for one in self.members)


def percent(count: float, whole: float) -> str:
    """A share that says 0% only of none and 100% only of all, ``-`` of nothing."""
    if not whole:
        return "-"
    if count <= 0 or count >= whole:
        return "0%" if count <= 0 else "100%"
    value = 100 * count / whole
    if value < 1:
        return f"{value:.2f}%" if value >= 0.01 else "<0.01%"
    return f"{math.floor(value * 10) / 10:.1f}%"


def milliseconds(value: float) -> str:
    """``1.23 ms``, or ``-`` where nothing was measured."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f} ms" if value < 10 else f"{value:,.0f} ms"


def relative(value: float) -> str:
    """``8.1x``, or ``-`` where nothing was measured."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.1f}x" if value < 100 else f"{value:,.0f}x"


def command(exam: Exam) -> str:
    """The command that takes the same exam again."""
    words = ["conformance", "exam"]
    if exam.effort.name == "full":
        words.append("--full")
    for option, found in (
        ("--stage", {one.stage for one in exam.standings}),
        ("--lane", {one.lane for one in exam.standings}),
    ):
        if len(found) == 1:
            words += [option, text.one_line(found.pop(), 80)]
    if exam.precision != CONTRACT:
        words += ["--precision", exam.precision]
    return shlex.join([*words, "--seed", str(exam.seed), "--out", "exam"])


def verdict(exam: Exam) -> tuple[str, list[str]]:
    """``passed`` or ``failed``, and every reason against it."""
    faults, missed = exam.faults, exam.missed()
    missed_layers = sum(one.composite for one in missed)
    rejected = [one for one in exam.variants if one.caught_by(OURS)]
    reasons = []
    if not faults:
        reasons.append("no faulty kernel was judged")
    if not exam.variants:
        reasons.append("no legal kernel was judged")
    if exam.errors:
        reasons.append(f"{text.number(len(exam.errors), 'kernel')} could not be judged")
    if rejected:
        reasons.append(f"{text.number(len(rejected), 'legal kernel')} rejected")
    if len(missed) > missed_layers:
        reasons.append(f"{text.number(len(missed) - missed_layers, 'fault')} of single stages missed")
    if exam.unnamed():
        reasons.append(f"{text.number(len(exam.unnamed()), 'fault')} caught and never named")
    for stage, name in exam.too_few_examples().items():
        reasons.append(f"the {stage_named(stage).examples} examples of {stage} are too few for {text.one_line(name, 60)}")
    if missed_layers > (1 - COMPOSITE_TARGET) * exam.layer_faults:
        reasons.append(
            f"{missed_layers:,} of {text.number(exam.layer_faults, 'fault')} of layers and chains missed, "
            f"more than {100 * (1 - COMPOSITE_TARGET):.0f}%"
        )
    return ("passed" if exam.passed else "failed"), reasons


def headline(exam: Exam) -> str:
    """What was caught and what was rejected, in one line."""
    score = exam.score(OURS)
    return (
        f"{score.caught:,} of {text.number(score.faults, 'faulty kernel')} caught, "
        f"{score.rejected_trials:,} of {text.number(score.legal_trials, 'run')} of legal kernels rejected"
    )


def subjects_in_words(exam: Exam) -> str:
    """How many faulty and legal kernels of how many stages there were."""
    stages = len({one.stage for one in exam.standings})
    return (
        f"{text.number(len(exam.faults), 'known fault')} and {text.number(len(exam.variants), 'legal kernel')} "
        f"in {text.number(stages, 'stage')}"
    )


def trial_count(exam: Exam) -> int:
    """Trials of all kernels together."""
    return sum(one.trials for one in exam.standings)


def examples_in_words(exam: Exam) -> str:
    """How many cases a kernel was judged on, by kind of stage."""
    effort = exam.effort
    kinds = {"of single stages": effort.single, "of layers and chains": effort.composite, "interpreted": effort.interpreted}
    faulty = ", ".join(f"{_range(one.faulty, one.most)} {kind}" for kind, one in kinds.items())
    legal = ", ".join(f"{one.legal:,} {kind}" for kind, one in kinds.items())
    reason = "the less often it shows the fault" if effort.measures else "where our rule has not found the fault yet"
    growing = f", the more {reason}" if any(one.faulty < one.most for one in kinds.values()) else ""
    return (
        f"Examples of a faulty kernel: {faulty}{growing}. Of a legal one: {legal}. Legal choices combined at random: "
        f"{effort.random_single:,} a single stage, {effort.random_composite:,} a layer or chain."
        + (" Shares of single trials lean to the faults that show seldom, which have more of them." if growing else "")
    )


def _range(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def lines_of(exam: Exam) -> list[RuleLine]:
    """A line for each rule that the exam measured, ours first: of a rule that came later it says nothing, rather than 0."""
    known = {rule.name: rule for rule in RULES}
    measured = {OURS, *exam.costs, *(name for one in exam.standings for name in one.rejected)}
    yardstick = exam.score(YARDSTICK).milliseconds
    comparable = showing_in_outputs(exam)
    lines = []
    for name in exam.rules:
        if name in measured:
            score = exam.score(name)
            told = (
                ("this harness", OUR_DEFINITION, OUR_SOURCE)
                if name == OURS
                else (known[name].system, known[name].definition, known[name].source)
            )
            in_outputs = sum(one.caught_by(name) for one in comparable)
            lines.append(RuleLine(name, *told, score, score.milliseconds / yardstick if yardstick else math.nan, in_outputs))
    return lines


def showing_in_outputs(exam: Exam) -> list[KernelResult]:
    """The faults without those that only a look beyond the outputs shows: what any rule could have caught."""
    rules = [name for name in exam.rules if name != OURS]
    return [one for one in exam.faults if one.in_outputs or not one.caught_by(OURS) or any(map(one.caught_by, rules))]


def fair_comparison(exam: Exam, lines: Sequence[RuleLine]) -> str:
    """How ours did without what it alone looks at; empty if it saw nothing there."""
    comparable = len(showing_in_outputs(exam))
    beyond = len(exam.faults) - comparable
    if not beyond or len(lines) < 2:
        return ""
    ours, *others = lines
    best = max(others, key=lambda line: line.in_outputs)
    return (
        f"{text.number(beyond, 'fault')} showed only in repeats, in inputs or in memory around the outputs, where no comparison "
        f"of outputs looks; of the other {comparable:,}, ours caught {ours.in_outputs:,} and the best elsewhere ({best.name}) "
        f"{best.in_outputs:,}."
    )


def comparison_in_words(lines: Sequence[RuleLine]) -> list[str]:
    """How the others did, in words that hold for any numbers."""
    ours, *others = lines
    if not others or not ours.score.faults or not ours.score.legal_trials:
        return []

    def told(line: RuleLine) -> str:
        return (
            f"{line.name} ({line.system}) catches {line.score.caught:,} and rejects "
            f"{percent(line.score.rejected_trials, line.score.legal_trials)} of the legal runs"
        )

    keenest = max(others, key=lambda line: (line.score.caught, -line.score.rejected_trials))
    mildest = min(others, key=lambda line: (line.score.rejected_trials, -line.score.caught))
    as_good = [
        line.name
        for line in others
        if line.score.caught >= ours.score.caught and line.score.rejected_trials <= ours.score.rejected_trials
    ]
    first = (
        f"Of {text.number(len(others), 'rule')} in use elsewhere, {', '.join(as_good)} did as well on both counts."
        if as_good
        else f"None of the {text.number(len(others), 'rule')} in use elsewhere did as well on both counts."
    )
    sentences = [first, f"The one that catches most: {told(keenest)}."]
    if mildest is not keenest:
        sentences.append(f"The one that rejects fewest legal runs: {told(mildest)}.")
    return sentences


def _stage_order(exam: Exam) -> Callable[[KernelResult], tuple[object, ...]]:
    """Torch kernels before interpreted ones, stages as the model has them, kinds as they are defined, then names.

    The order of an exam's standings is that in which processes ended.
    """
    order_of_stages = {name: place for place, name in enumerate(stages())}
    kinds = {name: place for place, name in enumerate(KINDS)}

    def order(one: KernelResult) -> tuple[object, ...]:
        place = order_of_stages.get(one.stage, len(order_of_stages))
        return text.worth_naming(one.lane), one.lane, place, one.stage, kinds.get(one.kind or "", len(kinds)), one.name

    return order


def in_order(exam: Exam, standings: Iterable[KernelResult]) -> list[KernelResult]:
    """Results in the order of the contract's stages."""
    return sorted(standings, key=_stage_order(exam))


def by_stage(ordered: Iterable[KernelResult]) -> list[ResultGroup]:
    """Results in groups, one for each lane and stage."""
    found: dict[tuple[str, str], list[KernelResult]] = {}
    for one in ordered:
        found.setdefault((one.lane, one.stage), []).append(one)
    return [
        ResultGroup(stage, f"lane {text.one_line(lane, 40)}" if text.worth_naming(lane) else "", tuple(members))
        for (lane, stage), members in found.items()
    ]


def by_kind(ordered: Iterable[KernelResult]) -> list[ResultGroup]:
    """Results in groups, one for each class of faults."""
    found: dict[str, list[KernelResult]] = {}
    for one in ordered:
        found.setdefault(one.kind or "", []).append(one)
    order = [*KINDS, *(kind for kind in found if kind not in KINDS)]
    return [ResultGroup(kind, KINDS.get(kind, ""), tuple(found[kind])) for kind in order if kind in found]


def trials_caught(one: KernelResult) -> int:
    """How many of a kernel's trials our rule rejected."""
    return min(one.rejected.get(OURS, 0), one.trials)


def naming_in_words(exam: Exam) -> str:
    """How many trials caught a fault by no detector that its declaration expects, and which faults were never named by one."""
    caught = sum(trials_caught(one) for one in exam.faults)
    unnamed = sum(one.unnamed for one in exam.faults)
    never = [text.one_line(one.id, 80) for one in exam.unnamed()]
    listed = f"; never named: {', '.join(never[:MOST_SEEING])}" if never else ""
    more = f" and {len(never) - MOST_SEEING:,} more" if len(never) > MOST_SEEING else ""
    trials = text.number(caught, "trial")
    return f"Of {trials} that caught a fault, {unnamed:,} did so by no detector that names it{listed}{more}."


def narrowly_caught(faults: Iterable[KernelResult]) -> list[KernelResult]:
    """The faults that were caught on the smallest share of their trials."""
    partly = [one for one in faults if 0 < trials_caught(one) < one.trials]
    return sorted(partly, key=lambda one: trials_caught(one) / one.trials)[:MOST_NARROW]


def regimes_that_showed(one: KernelResult) -> str:
    """The regimes that showed a fault, with counts."""
    shown = [f"{text.one_line(name, 40)} {caught}/{trials}" for name, (trials, caught) in one.regimes.items() if caught]
    return ", ".join(shown) or "none"


def seen_by(one: KernelResult, lines: Sequence[RuleLine]) -> str:
    """The rules of others that caught what ours missed, each with what it costs in legal runs; the mildest of them first."""
    seen = sorted(
        (line for line in lines if not line.ours and one.caught_by(line.name)), key=lambda line: line.score.rejected_trials
    )
    told = [
        f"{line.name} (rejects {percent(line.score.rejected_trials, line.score.legal_trials)} of the legal runs)"
        for line in seen[:MOST_SEEING]
    ]
    more = f" and {len(seen) - MOST_SEEING} more" if len(seen) > MOST_SEEING else ""
    return ", ".join(told) + more or "no rule"


def caught_elsewhere(one: KernelResult, exam: Exam) -> str:
    """Stages in which ours caught the fault of the same name, which is the same fault there; empty if there is none."""
    stages = list(
        dict.fromkeys(other.stage for other in in_order(exam, exam.faults) if other.name == one.name and other.caught_by(OURS))
    )
    more = f" and {len(stages) - MOST_SEEING} more" if len(stages) > MOST_SEEING else ""
    return ", ".join(stages[:MOST_SEEING]) + more


def detectors_that_fired(faults: Iterable[KernelResult]) -> list[tuple[str, str, int, int]]:
    """Each detector, what it means, the faults on which it fired, and those on which no other did."""
    caught = [one for one in faults if one.detectors]
    rows = [
        (
            name,
            meaning,
            sum(name in one.detectors for one in caught),
            sum([name] == one.detectors for one in caught),
        )
        for name, meaning in DETECTORS.items()
    ]
    return sorted((row for row in rows if row[2]), key=lambda row: -row[2])


def regimes_tried(faults: Iterable[KernelResult]) -> list[tuple[str, int, int, int]]:
    """Each data regime, its trials of faults, those caught, and the faults tried in every regime that only this one showed."""
    rows: dict[str, list[int]] = {}
    for one in faults:
        showing = [name for name, (_, caught) in one.regimes.items() if caught]
        for name, (trials, caught) in one.regimes.items():
            row = rows.setdefault(name, [0, 0, 0])
            row[0] += trials
            row[1] += caught
            row[2] += showing == [name] and len(one.regimes) == len(stage_named(one.stage).regimes) > 1
    return sorted(((name, *row) for name, row in rows.items()), key=lambda row: -row[2] / row[1])  # type: ignore[misc]


def rejecting_rules(one: KernelResult, lines: Sequence[RuleLine]) -> list[str]:
    """The names of other rules that rejected a kernel."""
    return [line.name for line in lines if not line.ours and one.caught_by(line.name)]


def bound_on_false_alarms(score: Score) -> str:
    """What the true share of rejected legal runs is below with 95%, where none was rejected and if runs were independent."""
    if score.rejected_trials or not score.legal_trials:
        return ""
    return percent(1 - 0.05 ** (1 / score.legal_trials), 1)
