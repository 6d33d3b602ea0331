"""What came of the harness's exam as text, for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from conformance.contract.precision import CONTRACT
from conformance.contract.registry import stages
from conformance.exam.results import CONFIDENCE, OURS, Exam, KernelResult
from conformance.reports import text
from conformance.reports.exam_figures import (
    YARDSTICK,
    caught_elsewhere,
    examples_in_words,
    fair_comparison,
    headline,
    in_order,
    lines_of,
    milliseconds,
    naming_in_words,
    percent,
    relative,
    subjects_in_words,
    trial_count,
    trials_caught,
    verdict,
)
from conformance.reports.text_page import TextPage

#: Rejected cases, hidden or unjudged kernels, and missed faults that are listed; the page has them all.
MOST_LISTED = 40

_STYLES = {"passed": "bold green", "failed": "bold red"}
_NARROWEST = 60
#: From this width on a rule's line has all columns; below, the two that few ask for are left out.
_WIDE = 86


def render(exam: Exam, width: int = 100, *, colour: bool = False) -> str:
    """What came of the exam as text, ``width`` columns wide, with ANSI colours if asked for; the verdict is its last line."""
    page = TextPage(max(width, _NARROWEST))
    page.line(("The harness judged: ", "bold"), subjects_in_words(exam))
    precision = "" if exam.precision == CONTRACT else f", precision {text.one_line(exam.precision, 40)}"
    page.wrapped(
        f"effort {text.one_line(exam.effort.name, 40)}{precision}, seed {exam.seed}, "
        f"{text.number(trial_count(exam), 'trial')} in {text.seconds(exam.seconds)}. {examples_in_words(exam)}"
    )
    page.blank()
    _rules(page, exam)
    if exam.faults:
        page.wrapped(naming_in_words(exam))
    _listed_missed(page, exam)
    rejected = [one for one in in_order(exam, exam.variants) if one.caught_by(OURS)]
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
        f"Faults that precision {exam.precision} makes legal",
        in_order(exam, exam.made_legal),
        lambda one: (f"{one.made_legal}: {one.summary}",),
    )
    _listed(
        page,
        "Faults that their lane cannot show by its nature, not counted",
        in_order(exam, exam.hidden),
        lambda one: (f"{one.hidden}; rejected in {trials_caught(one):,} of {text.number(one.trials, 'trial')}",),
    )
    _listed(page, "Could not be judged", in_order(exam, exam.errors), lambda one: (one.error,))
    _examples_needed(page, exam)
    outcome, reasons = verdict(exam)
    page.blank()
    page.line((outcome.upper(), _STYLES[outcome]), f": {'; '.join(reasons) or headline(exam)}")
    return page.finish(colour).rstrip("\n")


def _rules(page: TextPage, exam: Exam) -> None:
    wide = page.width >= _WIDE
    columns = ["faults\ncaught", "of single\ntrials", "legal kernels\nrejected", "legal runs\nrejected", "", "cost\nof a run", ""]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\nrule", no_wrap=True)
    kept = [wide or number not in (1, 6) for number in range(len(columns))]
    for title in (title for title, keep in zip(columns, kept, strict=True) if keep):
        table.add_column(title, justify="right", no_wrap=True)
    lines = lines_of(exam)
    for line in lines:
        score = line.score
        values = (
            f"{score.caught:,}/{score.faults:,}",
            percent(score.caught_trials, score.fault_trials),
            f"{score.rejected_variants:,}/{score.variants:,}",
            f"{score.rejected_trials:,}/{score.legal_trials:,}",
            percent(score.rejected_trials, score.legal_trials),
            milliseconds(score.milliseconds),
            relative(line.relative),
        )
        shown = [value for value, keep in zip(values, kept, strict=True) if keep]
        table.add_row(Text(line.name, "bold" if line.ours else ""), *shown)
    page.table(table)
    page.wrapped(
        f"A fault is caught, or a legal kernel rejected, if any trial is. Cost: to judge one run, bounds and goldens given, "
        f"and as a multiple of {YARDSTICK}'s.",
    )
    fair = fair_comparison(exam, lines)
    if fair:
        page.wrapped(fair)
    unmeasured = [name for name in exam.rules if name not in {line.name for line in lines}]
    if unmeasured:
        page.wrapped(f"Not measured in this exam: {', '.join(unmeasured)}.")


def _listed_missed(page: TextPage, exam: Exam) -> None:
    def told(one: KernelResult) -> tuple[str, ...]:
        elsewhere = caught_elsewhere(one, exam)
        also = f"; the same fault is caught in {elsewhere}" if elsewhere else ""
        return (f"{one.kind}: {one.summary}; {text.number(one.trials, 'trial')}{also}",)

    _listed(page, f"Faults that {OURS} missed", in_order(exam, exam.missed()), told)


def _listed(
    page: TextPage, title: str, standings: Sequence[KernelResult], told: Callable[[KernelResult], tuple[str, ...]]
) -> None:
    if not standings:
        return
    page.section(f"{title}: {len(standings):,}")
    for one in standings[:MOST_LISTED]:
        lane = f" ({text.one_line(one.lane, 40)})" if text.worth_naming(one.lane) else ""
        first, *more = told(one)
        page.wrapped(
            f"{text.one_line(one.stage, 60)} {text.one_line(one.name, 120)}{lane}: {text.one_line(first, 600)}", indent=2
        )
        for line in more:
            page.wrapped(line, indent=4)
    if len(standings) > MOST_LISTED:
        page.wrapped(f"... and {len(standings) - MOST_LISTED:,} more; the page has them", indent=2)


def _examples_needed(page: TextPage, exam: Exam) -> None:
    needed = exam.examples_needed()
    if not needed:
        return
    # At most: the fewer trials a share was measured in, the lower it is taken.
    page.section(f"At most so many examples show every caught fault with {100 * CONFIDENCE:g}%")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    for title, justify in (("stage", "left"), ("needed", "right"), ("a check has", "right"), ("for the fault", "left")):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for stage, contract in stages().items():
        if stage in needed:
            count, name = needed[stage]
            table.add_row(stage, f"{count:,}", f"{contract.examples:,}", Text(text.one_line(name, 40)))
    page.table(table, indent=2)
