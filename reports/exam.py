"""What came of the harness's exam, for a terminal and as one HTML page: each rule's catches, misses, false alarms and cost.

Both are built from an ``Exam`` (``conformance.exam.results``) alone. Whatever they say in words about the rules is computed from
its numbers, so a rule from elsewhere that does as well as ours is named as such.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup

import conformance
from conformance.contract.registry import stage_named
from conformance.exam.results import COMPOSITE_TARGET, CONFIDENCE, OURS, Exam, Score, Standing
from conformance.exam.rules import RULES
from conformance.faults.subject import KINDS
from conformance.judge.verdict import DETECTORS
from reports import text
from reports.page import environment, part, policy_hash
from reports.terminal import Page

#: The rule whose cost the others' are told in.
YARDSTICK = "assert_close"
#: Faults that came closest to being missed, as many as a page lists.
MOST_NARROW = 15
#: Rejected cases, hidden or unjudged kernels, and missed faults that the terminal lists; the page has them all.
MOST_LISTED = 40
#: Rules that saw a missed fault, or stages that show it, that are named one by one.
MOST_SEEING = 4

OUR_DEFINITION = (
    "every element within the error that the contract's own arithmetic allows it; errors of a row, a tile and the whole neither "
    "larger than rounding explains nor leaning one way, in a layer or in all its cases not those of a known mistake; nothing "
    "unwritten, nothing else written, no input changed; repeats and single rows agree; declared capabilities hold"
)
OUR_SOURCE = "conformance/bounds.py, conformance/judge.py, conformance/checking.py"

#: Signs of a cell beside its shade: no trial caught, every trial caught. In between stands the percentage.
NEVER, ALWAYS, NOTHING = "✗", "✓", "–"


@dataclasses.dataclass(frozen=True)
class Line:
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
class Group:
    """Standings of one kind or one stage."""

    name: str
    meaning: str
    members: tuple[Standing, ...]

    def caught(self, rule: str = OURS) -> int:
        """How many of them the rule caught."""
        return sum(one.caught_by(rule) for one in self.members)

    def cells(self, rules: Iterable[str]) -> Markup:
        """A cell for each rule: how many of these faults it caught."""
        return _cells((self.caught(rule), len(self.members)) for rule in rules)


@dataclasses.dataclass(frozen=True)
class Dot:
    """A rule in the picture, and its name beside it; ``leader`` if the name stands so far off that a line has to lead to it."""

    line: Line
    x: float
    y: float
    label_x: float
    label_y: float
    anchor: str
    leader: bool


@dataclasses.dataclass(frozen=True)
class Picture:
    """Rules by legal runs rejected (across) and faults caught (up), in the coordinates of a drawing."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    #: Where the logarithmic part of the axis begins; left of it is the lane of the rules that rejected none.
    seam: float
    zero: float
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    dots: tuple[Dot, ...]


# Words and numbers


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
    for stage, name in exam.too_few_examples().items():
        reasons.append(f"the {stage_named(stage).examples} examples of {stage} are too few for {text.one_line(name, 60)}")
    if missed_layers > (1 - COMPOSITE_TARGET) * exam.layer_faults:
        reasons.append(
            f"{missed_layers:,} of {text.number(exam.layer_faults, 'fault')} of layers and chains missed, "
            f"more than {100 * (1 - COMPOSITE_TARGET):.0f}%"
        )
    return ("passed" if exam.passed else "failed"), reasons


def _headline(exam: Exam) -> str:
    score = exam.score(OURS)
    return (
        f"{score.caught:,} of {text.number(score.faults, 'faulty kernel')} caught, "
        f"{score.rejected_trials:,} of {text.number(score.legal_trials, 'run')} of legal kernels rejected"
    )


def _subjects(exam: Exam) -> str:
    stages = len({one.stage for one in exam.standings})
    return (
        f"{text.number(len(exam.faults), 'known fault')} and {text.number(len(exam.variants), 'legal kernel')} "
        f"in {text.number(stages, 'stage')}"
    )


def _trials(exam: Exam) -> int:
    return sum(one.trials for one in exam.standings)


def _examples(exam: Exam) -> str:
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


def lines_of(exam: Exam) -> list[Line]:
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
            lines.append(Line(name, *told, score, score.milliseconds / yardstick if yardstick else math.nan, in_outputs))
    return lines


def showing_in_outputs(exam: Exam) -> list[Standing]:
    """The faults without those that only a look beyond the outputs shows: what any rule could have caught."""
    rules = [name for name in exam.rules if name != OURS]
    return [one for one in exam.faults if one.in_outputs or not one.caught_by(OURS) or any(map(one.caught_by, rules))]


def _fair_comparison(exam: Exam, lines: Sequence[Line]) -> str:
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


def _comparison(lines: Sequence[Line]) -> list[str]:
    """How the others did, in words that hold for any numbers."""
    ours, *others = lines
    if not others or not ours.score.faults or not ours.score.legal_trials:
        return []

    def told(line: Line) -> str:
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


# Groups


def _stage_order(exam: Exam) -> Callable[[Standing], tuple[object, ...]]:
    """Torch kernels before interpreted ones, stages as the model has them, kinds as they are defined, then names.

    The order of an exam's standings is that in which processes ended.
    """
    stages = {name: place for place, name in enumerate(conformance.stages())}
    kinds = {name: place for place, name in enumerate(KINDS)}

    def order(one: Standing) -> tuple[object, ...]:
        place = stages.get(one.stage, len(stages))
        return one.lane != "eager", one.lane, place, one.stage, kinds.get(one.kind or "", len(kinds)), one.name

    return order


def _in_order(exam: Exam, standings: Iterable[Standing]) -> list[Standing]:
    return sorted(standings, key=_stage_order(exam))


def _by_stage(ordered: Iterable[Standing]) -> list[Group]:
    found: dict[tuple[str, str], list[Standing]] = {}
    for one in ordered:
        found.setdefault((one.lane, one.stage), []).append(one)
    return [
        Group(stage, "" if lane == "eager" else f"lane {text.one_line(lane, 40)}", tuple(members))
        for (lane, stage), members in found.items()
    ]


def _by_kind(ordered: Iterable[Standing]) -> list[Group]:
    found: dict[str, list[Standing]] = {}
    for one in ordered:
        found.setdefault(one.kind or "", []).append(one)
    order = [*KINDS, *(kind for kind in found if kind not in KINDS)]
    return [Group(kind, KINDS.get(kind, ""), tuple(found[kind])) for kind in order if kind in found]


def _cells(counts: Iterable[tuple[int, int]]) -> Markup:
    # By hand: a page has ten thousand of them, and nothing in them comes from outside.
    cells = []
    for count, whole in counts:
        if not whole:
            cells.append(f"<td>{NOTHING}</td>")
        elif count <= 0:
            cells.append(f'<td class="never">{NEVER}</td>')
        elif count >= whole:
            cells.append(f'<td class="always">{ALWAYS}</td>')
        else:
            share = min(max(round(100 * count / whole), 1), 99)
            cells.append(f'<td class="s{share // 20}">{share}</td>')
    return Markup("".join(cells))


def fault_cells(one: Standing, rules: Iterable[str]) -> Markup:
    """A cell for each rule: the share of a fault's trials that it caught."""
    return _cells((min(one.rejected.get(rule, 0), one.trials), one.trials) for rule in rules)


def _trials_caught(one: Standing) -> int:
    return min(one.rejected.get(OURS, 0), one.trials)


def _narrow(faults: Iterable[Standing]) -> list[Standing]:
    """The faults that were caught on the smallest share of their trials."""
    partly = [one for one in faults if 0 < _trials_caught(one) < one.trials]
    return sorted(partly, key=lambda one: _trials_caught(one) / one.trials)[:MOST_NARROW]


def _showing(one: Standing) -> str:
    """The regimes that showed a fault, with counts."""
    shown = [f"{text.one_line(name, 40)} {caught}/{trials}" for name, (trials, caught) in one.regimes.items() if caught]
    return ", ".join(shown) or "none"


def _seen_by(one: Standing, lines: Sequence[Line]) -> str:
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


def _caught_elsewhere(one: Standing, exam: Exam) -> str:
    """Stages in which ours caught the fault of the same name, which is the same fault there; empty if there is none."""
    stages = list(
        dict.fromkeys(other.stage for other in _in_order(exam, exam.faults) if other.name == one.name and other.caught_by(OURS))
    )
    more = f" and {len(stages) - MOST_SEEING} more" if len(stages) > MOST_SEEING else ""
    return ", ".join(stages[:MOST_SEEING]) + more


def _detectors(faults: Iterable[Standing]) -> list[tuple[str, str, int, int]]:
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


def _regimes(faults: Iterable[Standing]) -> list[tuple[str, int, int, int]]:
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


def _rejecting(one: Standing, lines: Sequence[Line]) -> list[str]:
    return [line.name for line in lines if not line.ours and one.caught_by(line.name)]


# The picture


#: Geometry: the whole, its plane (names may stand to the right of it), the lane of the rules that rejected nothing, letters.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM, _LANE = 900, 480, 66.0, 800.0, 30.0, 418.0, 96.0
_LETTER, _LETTER_HEIGHT, _GAP = 7.4, 15.0, 10.0


def picture(lines: Sequence[Line]) -> Picture | None:
    """The rules in a plane; ``None`` where there is nothing to compare."""
    shown = [line for line in lines if math.isfinite(line.caught_share) and math.isfinite(line.rejected_share)]
    if not shown:
        return None
    positive = [line.rejected_share for line in shown if line.rejected_share > 0]
    first = min(math.floor(math.log10(min(positive, default=1.0))), 1)
    lowest = min(90, 10 * math.floor(min(line.caught_share for line in shown) / 10))
    seam = _LEFT + _LANE

    def across(share: float) -> float:
        if share <= 0:
            return _LEFT + _LANE / 2
        return round(seam + (_RIGHT - seam) * (math.log10(share) - first) / (2 - first), 1)

    def up(share: float) -> float:
        # Room above 100%, so that a perfect rule is not cut in half.
        return round(_BOTTOM - (_BOTTOM - _TOP) * (share - lowest) / (100 - lowest) * 0.96, 1)

    step = 5 if lowest >= 80 else 10 if lowest >= 40 else 20
    places = [(across(line.rejected_share), up(line.caught_share)) for line in shown]
    return Picture(
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_RIGHT,
        top=_TOP,
        bottom=_BOTTOM,
        seam=seam,
        zero=across(0),
        across=tuple((across(10.0**power), f"{10.0**power:g}%") for power in range(first, 3)),
        up=tuple((up(share), f"{share}%") for share in range(lowest, 101, step)),
        dots=tuple(_labelled(shown, places)),
    )


_Box = tuple[float, float, float, float]


def _labelled(lines: Sequence[Line], places: Sequence[tuple[float, float]]) -> list[Dot]:
    """Each name near its dot, where it covers neither another name nor a dot.

    Who is placed first decides who has to give way, so a few orders are tried, and the one with the nearest names is taken.
    """
    indices = range(len(lines))
    orders = [
        sorted(indices, key=key)
        for key in (
            lambda index: index,
            lambda index: places[index],
            lambda index: (-places[index][0], places[index][1]),
            lambda index: (places[index][1], places[index][0]),
            lambda index: (-places[index][1], places[index][0]),
        )
    ]
    tried = [_named_in_order(lines, places, order) for order in orders]
    return min(tried, key=lambda dots: sum(math.hypot(dot.label_x - dot.x, dot.label_y - dot.y) for dot in dots))


def _named_in_order(lines: Sequence[Line], places: Sequence[tuple[float, float]], order: Sequence[int]) -> list[Dot]:
    taken: list[_Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    dots: dict[int, Dot] = {}
    for index in order:
        line, (x, y) = lines[index], places[index]
        width = _LETTER * len(line.name) * (1.15 if line.ours else 1)
        found = (x + _GAP, y, "start")
        for label_x, label_y, anchor in _around(x, y):
            start = label_x - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            box = (start, label_y - _LETTER_HEIGHT / 2, start + width, label_y + _LETTER_HEIGHT / 2)
            inside = box[0] > _LEFT and box[1] > _TOP - 14 and box[2] < _WIDTH and box[3] < _BOTTOM - 22
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found = (label_x, label_y, anchor)
                break
        far = math.hypot(found[0] - x, found[1] - y) > 20
        dots[index] = Dot(line, x, y, round(found[0], 1), round(found[1], 1), found[2], far)
    return [dots[index] for index in range(len(lines))]


def _around(x: float, y: float) -> Iterable[tuple[float, float, str]]:
    yield from ((x + _GAP, y, "start"), (x - _GAP, y, "end"), (x, y - 15, "middle"), (x, y + 15, "middle"))
    for ring in range(1, 45):
        for drop in (ring * 8.0, -ring * 8.0):
            yield x + _GAP + ring * 1.5, y + drop, "start"
            yield x - _GAP - ring * 1.5, y + drop, "end"


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# The page


def page(exam: Exam) -> str:
    """The whole page: it needs no network, no file beside it and no script."""
    style = part("report.css") + part("exam.css")
    lines = lines_of(exam)
    rules = [line.name for line in lines]
    outcome, reasons = verdict(exam)
    faults = _in_order(exam, exam.faults)
    variants = _in_order(exam, exam.variants)
    return (
        environment()
        .get_template("exam.html.j2")
        .render(
            exam=exam,
            style=style,
            style_hash=policy_hash(style),
            outcome=outcome,
            reasons=reasons,
            headline=_headline(exam),
            comparison=_comparison(lines),
            examples=_examples(exam),
            trials=_trials(exam),
            command=command(exam),
            lines=lines,
            unmeasured=[name for name in exam.rules if name not in rules],
            rules=rules,
            picture=picture(lines),
            score=exam.score(OURS),
            faults=faults,
            kinds=_by_kind(faults),
            stages=_by_stage(faults),
            by_kind=_by_kind,
            fault_cells=fault_cells,
            missed=_in_order(exam, exam.missed()),
            narrow=_narrow(faults),
            showing=_showing,
            seen_by=lambda one: _seen_by(one, lines),
            caught_elsewhere=lambda one: _caught_elsewhere(one, exam),
            fair=_fair_comparison(exam, lines),
            comparable=len(showing_in_outputs(exam)),
            detectors=_detectors(faults),
            regimes=_regimes(faults),
            needed=exam.examples_needed(),
            given=lambda stage: stage_named(stage).examples,
            confidence=f"{100 * CONFIDENCE:g}%",
            target=f"{100 * (1 - COMPOSITE_TARGET):.0f}%",
            variants=variants,
            variant_stages=_by_stage(variants),
            rejected=[one for one in variants if one.caught_by(OURS)],
            rejecting=lambda one: _rejecting(one, lines),
            bound=_bound(exam.score(OURS)),
            hidden=_in_order(exam, exam.hidden),
            errors=_in_order(exam, exam.errors),
            percent=percent,
            milliseconds=milliseconds,
            relative=relative,
            trials_caught=_trials_caught,
            others=len(lines) - 1,
            OURS=OURS,
            YARDSTICK=YARDSTICK,
        )
    )


def _bound(score: Score) -> str:
    """What the true share of rejected legal runs is below with 95%, where none was rejected and if runs were independent."""
    if score.rejected_trials or not score.legal_trials:
        return ""
    return percent(1 - 0.05 ** (1 / score.legal_trials), 1)


# The terminal

_STYLES = {"passed": "bold green", "failed": "bold red"}
_NARROWEST = 86


def table(exam: Exam, width: int = 100, colour: bool = False) -> str:
    """What came of the exam as text, ``width`` columns wide, with ANSI colours if asked for; the verdict is its last line."""
    page = Page(max(width, _NARROWEST))
    page.line(("The harness judged: ", "bold"), _subjects(exam))
    page.wrapped(
        f"effort {text.one_line(exam.effort.name, 40)}, seed {exam.seed}, {text.number(_trials(exam), 'trial')} in "
        f"{text.seconds(exam.seconds)}. {_examples(exam)}"
    )
    page.blank()
    _rules(page, exam)
    _listed_missed(page, exam)
    rejected = [one for one in _in_order(exam, exam.variants) if one.caught_by(OURS)]
    _listed(
        page,
        f"Legal kernels that {OURS} rejected",
        rejected,
        lambda one: (
            f"{one.summary}; {one.rejected[OURS]:,} of {text.number(one.trials, 'run')}",
            *(text.one_line(found, 600) for found in one.rejections),
        ),
    )
    _listed(
        page,
        "Faults that their lane cannot show by its nature, not counted",
        _in_order(exam, exam.hidden),
        lambda one: (f"{one.hidden}; rejected in {_trials_caught(one):,} of {text.number(one.trials, 'trial')}",),
    )
    _listed(page, "Could not be judged", _in_order(exam, exam.errors), lambda one: (one.error,))
    _needed(page, exam)
    outcome, reasons = verdict(exam)
    page.blank()
    page.line((outcome.upper(), _STYLES[outcome]), f": {'; '.join(reasons) or _headline(exam)}")
    return page.finish(colour).rstrip("\n")


def _rules(page: Page, exam: Exam) -> None:
    lines = lines_of(exam)
    room = max(len(line.name) for line in lines)
    page.line((f"{'':<{room}} {'faults':>9} {'of single':>9} {'legal kernels':>13} {'legal runs':>21} {'cost':>19}", "bold"))
    page.line((f"{'rule':<{room}} {'caught':>9} {'trials':>9} {'rejected':>13} {'rejected':>21} {'of a run':>19}", "bold"))
    for line in lines:
        score = line.score
        kernels, runs = (
            f"{score.rejected_variants:,}/{score.variants:,}",
            f"{score.rejected_trials:,}/{score.legal_trials:,}",
        )
        page.line(
            (f"{line.name:<{room}}", "bold" if line.ours else ""),
            f" {f'{score.caught:,}/{score.faults:,}':>9} {percent(score.caught_trials, score.fault_trials):>9} {kernels:>13} "
            f"{runs:>14} {percent(score.rejected_trials, score.legal_trials):>6} "
            f"{milliseconds(score.milliseconds):>10} {relative(line.relative):>8}",
        )
    page.wrapped(
        f"A fault is caught, or a legal kernel rejected, if any trial is. Cost: to judge one run, bounds and goldens given, "
        f"and as a multiple of {YARDSTICK}'s.",
    )
    fair = _fair_comparison(exam, lines)
    if fair:
        page.wrapped(fair)
    unmeasured = [name for name in exam.rules if name not in {line.name for line in lines}]
    if unmeasured:
        page.wrapped(f"Not measured in this exam: {', '.join(unmeasured)}.")


def _listed_missed(page: Page, exam: Exam) -> None:
    def told(one: Standing) -> tuple[str, ...]:
        elsewhere = _caught_elsewhere(one, exam)
        also = f"; the same fault is caught in {elsewhere}" if elsewhere else ""
        return (f"{one.kind}: {one.summary}; {text.number(one.trials, 'trial')}{also}",)

    _listed(page, f"Faults that {OURS} missed", _in_order(exam, exam.missed()), told)


def _listed(page: Page, title: str, standings: Sequence[Standing], told: Callable[[Standing], tuple[str, ...]]) -> None:
    if not standings:
        return
    page.section(f"{title}: {len(standings):,}")
    for one in standings[:MOST_LISTED]:
        lane = "" if one.lane == "eager" else f" ({text.one_line(one.lane, 40)})"
        first, *more = told(one)
        page.wrapped(
            f"{text.one_line(one.stage, 60)} {text.one_line(one.name, 120)}{lane}: {text.one_line(first, 600)}", indent=2
        )
        for line in more:
            page.wrapped(line, indent=4)
    if len(standings) > MOST_LISTED:
        page.wrapped(f"... and {len(standings) - MOST_LISTED:,} more; the page has them", indent=2)


def _needed(page: Page, exam: Exam) -> None:
    needed = exam.examples_needed()
    if not needed:
        return
    # At most: the fewer trials a share was measured in, the lower it is taken.
    page.section(f"At most so many examples show every caught fault with {100 * CONFIDENCE:g}%; those of a check; for this fault")
    room = max(map(len, needed))
    for stage, contract in conformance.stages().items():
        if stage in needed:
            count, name = needed[stage]
            page.line(f"  {stage:<{room}} {count:>6,} {contract.examples:>6,}  {text.one_line(name, 40)}")
