"""What came of the harness's exam as one HTML page, which needs no network, no file beside it and no script."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from conformance.contract.registry import stage_named
from conformance.exam.results import COMPOSITE_TARGET, CONFIDENCE, OURS, Exam, KernelResult
from conformance.reports.exam_figures import (
    YARDSTICK,
    ResultGroup,
    bound_on_false_alarms,
    by_kind,
    by_stage,
    caught_elsewhere,
    command,
    comparison_in_words,
    detectors_that_fired,
    examples_in_words,
    fair_comparison,
    headline,
    in_order,
    lines_of,
    milliseconds,
    naming_in_words,
    narrowly_caught,
    percent,
    regimes_that_showed,
    regimes_tried,
    rejecting_rules,
    relative,
    seen_by,
    showing_in_outputs,
    trial_count,
    trials_caught,
    verdict,
)
from conformance.reports.exam_picture import picture
from conformance.reports.page import environment, part, policy_hash

#: Signs of a cell beside its shade: no trial caught, every trial caught. In between stands the percentage.
NEVER, ALWAYS, NOTHING = "✗", "✓", "–"


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


def group_cells(group: ResultGroup, rules: Iterable[str]) -> Markup:
    """A cell for each rule: how many faults of a group it caught."""
    return _cells((group.caught(rule), len(group.members)) for rule in rules)


def fault_cells(one: KernelResult, rules: Iterable[str]) -> Markup:
    """A cell for each rule: the share of a fault's trials that it caught."""
    return _cells((min(one.rejected.get(rule, 0), one.trials), one.trials) for rule in rules)


def render(exam: Exam) -> str:
    """The whole page: it needs no network, no file beside it and no script."""
    style = part("report.css") + part("exam.css")
    lines = lines_of(exam)
    rules = [line.name for line in lines]
    outcome, reasons = verdict(exam)
    faults = in_order(exam, exam.faults)
    variants = in_order(exam, exam.variants)
    return (
        environment()
        .get_template("exam.html.j2")
        .render(
            exam=exam,
            style=style,
            style_hash=policy_hash(style),
            outcome=outcome,
            reasons=reasons,
            headline=headline(exam),
            comparison=comparison_in_words(lines),
            examples=examples_in_words(exam),
            trials=trial_count(exam),
            command=command(exam),
            lines=lines,
            unmeasured=[name for name in exam.rules if name not in rules],
            rules=rules,
            picture=picture(lines),
            score=exam.score(OURS),
            faults=faults,
            kinds=by_kind(faults),
            stages=by_stage(faults),
            by_kind=by_kind,
            fault_cells=fault_cells,
            group_cells=group_cells,
            missed=in_order(exam, exam.missed()),
            narrow=narrowly_caught(faults),
            showing=regimes_that_showed,
            seen_by=lambda one: seen_by(one, lines),
            caught_elsewhere=lambda one: caught_elsewhere(one, exam),
            fair=fair_comparison(exam, lines),
            comparable=len(showing_in_outputs(exam)),
            detectors=detectors_that_fired(faults),
            naming=naming_in_words(exam),
            regimes=regimes_tried(faults),
            needed=exam.examples_needed(),
            given=lambda stage: stage_named(stage).examples,
            confidence=f"{100 * CONFIDENCE:g}%",
            target=f"{100 * (1 - COMPOSITE_TARGET):.0f}%",
            variants=variants,
            variant_stages=by_stage(variants),
            rejected=[one for one in variants if one.caught_by(OURS)],
            rejecting=lambda one: rejecting_rules(one, lines),
            bound=bound_on_false_alarms(exam.score(OURS)),
            made_legal=in_order(exam, exam.made_legal),
            hidden=in_order(exam, exam.hidden),
            errors=in_order(exam, exam.errors),
            percent=percent,
            milliseconds=milliseconds,
            relative=relative,
            trials_caught=trials_caught,
            others=len(lines) - 1,
            OURS=OURS,
            YARDSTICK=YARDSTICK,
        )
    )
