"""The report for a terminal: one line per kernel and lane, then what is wrong, worst first, then what did not run and why.

The report's own words are ASCII, so that a terminal with any encoding shows them; names and messages keep their letters.
"""

from __future__ import annotations

import io
import textwrap

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from reports import text
from reports.summary import Fault, Reason, Row, RunSummary

#: Faults that are told one by one; the rest is counted.
MOST_FAULTS = 20
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
    page = Page(max(width, _NARROWEST))
    page.heading(summary.outcome.upper(), f": {summary.headline}", _STYLES[summary.outcome])
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
    if summary.faults:
        cases = text.number(sum(fault.failed_cases for fault in summary.faults), "case")
        page.section(f"{text.number(len(summary.faults), 'fault')} in {cases}, worst first")
        for number, fault in enumerate(summary.faults[:MOST_FAULTS], start=1):
            _fault(page, number, fault)
        if len(summary.faults) > MOST_FAULTS:
            page.wrapped(f"... and {text.number(len(summary.faults) - MOST_FAULTS, 'more fault')}; the HTML report has them.")
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


class Page:
    def __init__(self, width: int) -> None:
        self.width = width
        self._lines: list[Text] = []

    def line(self, *parts: str | tuple[str, str]) -> None:
        self._lines.append(Text.assemble(*parts))

    def blank(self) -> None:
        self._lines.append(Text())

    def wrapped(self, content: str, *, indent: int = 0, style: str = "") -> None:
        blanks = " " * indent
        lines = textwrap.wrap(
            content, self.width, initial_indent=blanks, subsequent_indent=blanks, break_on_hyphens=False
        )  # counts characters: a line of wide letters may be longer than the width, and is still readable
        for line in lines:
            self.line((line, style))

    def heading(self, word: str, rest: str, style: str) -> None:
        first, *more = textwrap.wrap(word + rest, self.width)
        self.line((first[: len(word)], style), first[len(word) :])
        for line in more:
            self.line(line)

    def section(self, title: str, style: str = "bold") -> None:
        self.blank()
        self.line((title, style))

    def command(self, command: str, indent: int) -> None:
        """A command over as many lines as it needs, each but the last ended so that a shell reads on."""
        blanks = " " * indent
        if cell_len(blanks + command) <= self.width:
            self.line((blanks + command, "bold"))
            return
        head, option, case = command.partition(" --case ")
        self.line((f"{blanks}{head}{' ' + chr(92) if option else ''}", "bold"))
        if option:
            self.line((f"{blanks}    --case {case}", "bold"))

    def finish(self, colour: bool) -> str:
        if not colour:
            return "\n".join(line.plain.rstrip() for line in self._lines) + "\n"
        output = io.StringIO()
        console = Console(
            file=output,
            force_terminal=True,
            color_system="standard",
            width=self.width,
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        for line in self._lines:
            console.print(line, emoji=False)
        return output.getvalue()


def _table(page: Page, summary: RunSummary) -> None:
    lane_width = min(max([len("lane"), *(cell_len(_short(row.lane)) for row in summary.rows)]), 12)
    wanted = max(len("kernel"), *(cell_len(_name(row)) for row in summary.rows))
    # What the numbers and the status leave: 7 for cases, 9 for findings, 7 for the share, 20 for the status, gaps.
    name_width = min(wanted, max(page.width - lane_width - 46, 14))
    page.line((f"{'kernel':<{name_width}} {'lane':<{lane_width}} {'cases':>7} {'findings':>8} {'worst':>7}  status", "bold"))
    for row in summary.rows[:MOST_ROWS]:
        room = page.width - name_width - lane_width - 29 - len(row.status)
        page.line(
            f"{_fit(_name(row), name_width)} {_fit(_short(row.lane), lane_width)} "
            f"{row.cases:>7,} {row.findings:>8,} {text.share(row.shares.worst):>7}  ",
            (row.status, _STYLES[row.status]),
            row.remark if len(row.remark) <= room else ", ...",
        )
    if len(summary.rows) > MOST_ROWS:
        page.line(f"... and {len(summary.rows) - MOST_ROWS:,} more rows; the counts above include them")
    page.wrapped(
        "worst: the largest share of its allowance that an error, or errors together, used; findings: all detectors together"
    )


def _name(row: Row) -> str:
    return text.one_line(row.kernel or "(no kernel)")


def _short(lane: str) -> str:
    return text.one_line(lane or "(no lane)", 40)


def _fit(content: str, width: int) -> str:
    if cell_len(content) > width:
        content = set_cell_size(content, width - 2) + ".."
    return set_cell_size(content, width)


def _fault(page: Page, number: int, fault: Fault) -> None:
    page.blank()
    lead = f"{number}. {fault.detector}"
    first, *more = textwrap.wrap(f"{lead}: {fault.meaning}", page.width, subsequent_indent="   ")
    page.line((first[: len(lead)], _STYLES["failed"]), first[len(lead) :])
    for line in more:
        page.line(line)
    indent = 3
    presets = f", {', '.join(text.one_line(preset, 40) for preset in fault.presets)}" if fault.presets else ""
    stage = f" (stage {text.one_line(fault.stage, 120)})" if fault.stage != fault.kernel else ""
    page.wrapped(f"{text.one_line(fault.kernel, 120)}{stage} on {_short(fault.lane)}{presets}", indent=indent)
    extent = f"{fault.failed_cases:,} of {text.number(fault.cases, 'case')}"
    page.wrapped("; ".join((extent, *fault.measures)), indent=indent)
    if fault.example:
        page.wrapped(text.one_line(fault.example.message, 600), indent=indent)
    if fault.also:
        page.wrapped("in the same cases: " + ", ".join(f"{name} in {count:,}" for name, count in fault.also), indent=indent)
    if fault.machines:
        page.wrapped("seen on " + ", ".join(fault.machines), indent=indent)
    if fault.replay:
        page.command(fault.replay, indent)
    else:
        page.wrapped(
            f"no command replays it from here; case key: {text.one_line(fault.example_case or 'none', 200)}", indent=indent
        )


def _reasons(page: Page, title: str, reasons: tuple[Reason, ...], style: str) -> None:
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
