"""The report for a terminal: one line per kernel and lane, then what is wrong, worst first, then what did not run and why.

The report's own words are ASCII, so that a terminal with any encoding shows them; names and messages keep their letters.
"""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from conformance.reports import text
from conformance.reports.cards import Cards
from conformance.reports.summary import Problem, Reason, RunSummary
from conformance.reports.text_page import TextPage

#: Problems that are told one by one; the rest is counted.
MOST_PROBLEMS = 20
MOST_ROWS = 400
MOST_REASONS = 20
#: Kernels whose process took as much as this, at real size, are listed with what they took.
HEAVY_BYTES = 10**9

_STYLES: dict[str, str] = {
    "failed": "bold red",
    "could not run": "bold magenta",
    "cut short": "bold magenta",
    "nothing ran": "bold magenta",
    "incomplete": "bold magenta",
    "failed as expected": "yellow",
    "passed": "green",
    "skipped": "cyan",
}

_NARROWEST = 60


def render(summary: RunSummary, width: int = 80, *, colour: bool = False) -> str:
    """The report as text, ``width`` columns wide; commands stay whole, so that they can be copied. Ends with a line end.

    Without ``colour`` it is plain text; with it, the same text with ANSI colours.
    """
    page = TextPage(max(width, _NARROWEST))
    page.line((summary.outcome.upper(), _STYLES[summary.outcome]), f": {summary.headline}")
    machines = text.number(summary.machine_count, "machine")
    if summary.started is not None:
        page.wrapped(
            f"{text.number(summary.totals.cases, 'case')} in {text.seconds(summary.duration or 0)} on {machines}, "
            f"started {text.moment(summary.started)}"
        )
    for gap in summary.gaps:
        page.wrapped(gap, style=_STYLES["incomplete"])
    for entry in summary.expected:
        if entry.fixed:
            what = " ".join(part for part in (text.one_line(entry.kernel, 120), text.one_line(entry.lane, 40)) if part)
            page.wrapped(f"Fixed: {what} no longer fails; take it off the list of expected failures.", style="bold green")

    if summary.rows:
        page.blank()
        _table(page, summary)
    heavy = [cell for cell in summary.cells if (cell.peak_memory or 0) >= HEAVY_BYTES]
    if heavy:
        page.section("Time and peak memory of what took more than 1 GB")
        for cell in heavy[:MOST_ROWS]:
            name = f"{text.one_line(cell.kernel, 60)} {_short(cell.lane)} [{text.one_line(cell.preset, 40)}]"
            page.wrapped(f"{name}: {text.seconds(cell.seconds)}, {text.memory(cell.peak_memory)}", indent=2)
    if summary.cards is not None:
        _cards(page, summary.cards)
    if summary.problems:
        cases = text.number(sum(problem.failed_cases for problem in summary.problems), "case")
        page.section(f"{text.number(len(summary.problems), 'problem')} in {cases}, worst first")
        for number, problem in enumerate(summary.problems[:MOST_PROBLEMS], start=1):
            _problem(page, number, problem)
        if len(summary.problems) > MOST_PROBLEMS:
            page.wrapped(
                f"... and {text.number(len(summary.problems) - MOST_PROBLEMS, 'more problem')}; the HTML report has them."
            )
    _reasons(page, "Could not run", summary.errors, _STYLES["could not run"])
    _reasons(page, "Planned, and not run to the end (not a pass)", summary.unrun, _STYLES["nothing ran"])
    _reasons(page, "Skipped", summary.skips, _STYLES["skipped"])
    still = [entry for entry in summary.expected if not entry.fixed]
    if still:
        page.section("Failed as expected", style=_STYLES["failed as expected"])
        for entry in still[:MOST_REASONS]:
            name = " ".join(text.one_line(part, 120) for part in (entry.kernel, entry.lane) if part)
            page.wrapped(f"{name}: {text.number(entry.cases, 'case')}; {text.one_line(entry.reason, 300)}", indent=2)
        if len(still) > MOST_REASONS:
            page.wrapped(f"... and {len(still) - MOST_REASONS:,} more", indent=2)
    if summary.unreadable:
        page.section("Lines that cannot be read", style=_STYLES["incomplete"])
        for line in summary.unreadable[:5]:
            page.wrapped(text.one_line(line, 200), indent=2)
    return page.finish(colour)


def _table(page: TextPage, summary: RunSummary) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("kernel", overflow="fold", ratio=1)
    table.add_column("lane", overflow="fold", max_width=12)
    for title in ("cases", "findings", "worst"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold", min_width=20)
    for row in summary.rows[:MOST_ROWS]:
        table.add_row(
            Text(text.one_line(row.kernel or "(no kernel)", 60)),
            Text(_short(row.lane)),
            f"{row.cases:,}",
            f"{row.findings:,}",
            text.share_used(row.shares.worst),
            Text.assemble((row.status, _STYLES[row.status]), row.remark),
        )
    page.table(table)
    if len(summary.rows) > MOST_ROWS:
        page.line(f"... and {len(summary.rows) - MOST_ROWS:,} more rows; the counts above include them")
    page.wrapped(
        "worst: the largest share of its allowance that an error, or errors together, used; findings: all detectors together"
    )


def _cards(page: TextPage, cards: Cards) -> None:
    page.section("On cards")
    page.wrapped(text.one_line(cards.headline, 600), indent=2)
    for name, reason in cards.given_up:
        page.wrapped(text.one_line(f"{name} is used no more: {reason}", 400), indent=2, style=_STYLES["could not run"])
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("kernel", overflow="fold")
    table.add_column("preset", overflow="fold", max_width=28)
    for title in ("launches", "median", "worst"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in cards.times[:MOST_ROWS]:
        names = (Text(text.one_line(part, 60)) for part in (one.kernel, one.place))
        table.add_row(*names, f"{one.launches:,}", text.device_time(one.median), text.device_time(one.worst))
    page.table(table, indent=2)
    if len(cards.times) > MOST_ROWS:
        page.line(f"... and {len(cards.times) - MOST_ROWS:,} more rows", indent=2)
    page.wrapped("median, worst: seconds of a launch by the card's own clock", indent=2)


def _short(lane: str) -> str:
    return text.one_line(lane or "(no lane)", 40)


def _problem(page: TextPage, number: int, problem: Problem) -> None:
    page.blank()
    lead = f"{number}. {problem.detector}"
    page.line((lead, _STYLES["failed"]), f": {problem.meaning}")
    indent = 3
    presets = f", {', '.join(text.one_line(preset, 40) for preset in problem.presets)}" if problem.presets else ""
    stage = f" (stage {text.one_line(problem.stage, 120)})" if problem.stage != problem.kernel else ""
    page.wrapped(f"{text.one_line(problem.kernel, 120)}{stage} on {_short(problem.lane)}{presets}", indent=indent)
    extent = f"{problem.failed_cases:,} of {text.number(problem.cases, 'case')}"
    page.wrapped("; ".join((extent, *problem.measures)), indent=indent)
    if problem.example:
        page.wrapped(text.one_line(problem.example.message, 600), indent=indent)
    if problem.also:
        page.wrapped("in the same cases: " + ", ".join(f"{name} in {count:,}" for name, count in problem.also), indent=indent)
    if problem.machines:
        page.wrapped("seen on " + ", ".join(problem.machines), indent=indent)
    if problem.replay:
        page.command(problem.replay, indent)
    else:
        page.wrapped(
            f"no command replays it from here; case key: {text.one_line(problem.example_case or 'none', 200)}", indent=indent
        )


def _reasons(page: TextPage, title: str, reasons: tuple[Reason, ...], style: str) -> None:
    if not reasons:
        return
    page.section(title, style=style)
    for reason in reasons[:MOST_REASONS]:
        names = [text.one_line(kernel, 60) for kernel in reason.kernels]
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6:,} more" if len(names) > 6 else "")
        presets = f" [{', '.join(text.one_line(preset, 40) for preset in reason.presets[:6])}]" if reason.presets else ""
        lead = " ".join(part for part in (_short(reason.lane) if reason.lane else "", shown) if part)
        page.wrapped(
            f"{lead}{presets}: {text.one_line(reason.reason, 400)}" if lead else text.one_line(reason.reason, 400), indent=2
        )
    if len(reasons) > MOST_REASONS:
        page.wrapped(f"... and {len(reasons) - MOST_REASONS:,} more reasons", indent=2)
