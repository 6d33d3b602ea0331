"""The report as one HTML page that needs nothing else: no network, no file beside it, and no script for its content.

Everything that comes from records is escaped by the template engine; the page's content security policy names its own style
and script by their hashes, so that nothing else would run even if an escape were missed.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import math
import re

import jinja2
from markupsafe import Markup

from conformance.reports import text
from conformance.reports.summary import STATUSES, Cell, Problem, Row, RunSummary, Shares

#: What one page shows; the rest is counted on it. Together they keep a page of any run near a megabyte at most.
MOST_CELLS = 600
MOST_PROBLEMS = 60
MOST_REASONS = 60
MOST_CHART_ROWS = 150
MOST_CARD_ROWS = 150
MOST_FACTS = 150

#: A sign before the word, so that a status is never told by colour alone.
SIGNS: dict[str, str] = {
    "failed": "✗",
    "could not run": "⊘",
    "cut short": "✂",
    "nothing ran": "?",
    "incomplete": "?",
    "failed as expected": "≈",
    "passed": "✓",
    "skipped": "↷",
}

#: Geometry of a histogram of shares: width of a bin, where the allowance ends, where the bin beyond it begins, and the height.
_BIN, _ALLOWANCE, _BEYOND, _HEIGHT = 5.0, 100.0, 103.0, 24.0


@dataclasses.dataclass(frozen=True)
class KernelLine:
    """A line of the matrix: a kernel, and its row for each lane of the page (``None`` where none was planned)."""

    kernel: str
    stage: str
    source: str
    rows: tuple[Row | None, ...]


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of a histogram, in the coordinates of its drawing."""

    x: float
    y: float
    width: float
    height: float
    beyond: bool


def render(summary: RunSummary) -> str:
    """The whole page."""
    style, script = part("report.css"), part("report.js")
    lines, hidden_kernels = _matrix(summary)
    chart = [row for row in summary.rows if row.shares.count]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            style=style,
            script=script,
            style_hash=policy_hash(style),
            script_hash=policy_hash(script),
            lines=lines,
            hidden_kernels=hidden_kernels,
            chart=chart[:MOST_CHART_ROWS],
            hidden_chart_rows=max(0, len(chart) - MOST_CHART_ROWS),
            problem_of=_first_problem(summary.problems[:MOST_PROBLEMS]),
            limits={"problems": MOST_PROBLEMS, "reasons": MOST_REASONS, "facts": MOST_FACTS, "card_rows": MOST_CARD_ROWS},
        )
    )


@functools.lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The templates of every page; what they print is escaped and cleaned."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("conformance.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalise,
    )
    made.tests["worth_naming"] = text.worth_naming
    made.filters.update(
        line=text.one_line,
        breakable=_breakable,
        clean=text.plain,
        number=text.number,
        share=text.share,
        share_in_words=text.share_in_words,
        seconds=text.seconds,
        device_time=text.device_time,
        memory=text.memory,
        moment=text.moment,
        slug=lambda status: status.replace(" ", "-"),
    )
    made.globals.update(STATUSES=STATUSES, SIGNS=SIGNS, bar_width=_bar_width, bars=_bars, remarks=_remarks)
    return made


def _finalise(value: object) -> object:
    # Whatever a template prints is free of characters that HTML forbids, whether its author thought of it or not.
    return value if isinstance(value, Markup) or not isinstance(value, str) else text.plain(value)


def _breakable(name: str) -> Markup:
    """A name that a narrow column may break after a stroke, an underscore or a full stop rather than anywhere."""
    return Markup("<wbr>").join(re.findall(r"[^/_.]*[/_.]|[^/_.]+", text.plain(name)))


def part(name: str) -> Markup:
    """A file of ours that goes into a page as it is: a style or a script."""
    loader = environment().loader
    assert loader is not None
    return Markup(loader.get_source(environment(), name)[0])  # our own file, not a record's text


def policy_hash(content: str) -> str:
    """How a content security policy names a style or a script that may be used."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _matrix(summary: RunSummary) -> tuple[list[KernelLine], int]:
    """The lines of the matrix, and how many kernels it leaves out: only what passed or was skipped, unless that is not enough."""
    kernels: dict[tuple[str, str], dict[str, Row]] = {}
    for row in summary.rows:
        kernels.setdefault((row.stage, row.kernel), {})[row.lane] = row
    order = list(STATUSES)
    # Python's sort keeps the order of equals: the plan's.
    important = sorted(kernels, key=lambda kernel: min(order.index(row.status) for row in kernels[kernel].values()))
    shown: set[tuple[str, str]] = set()
    cells = 0
    for kernel in important:
        cells += sum(len(row.cells) for row in kernels[kernel].values())
        if cells > MOST_CELLS and shown:
            break
        shown.add(kernel)
    lines = [
        KernelLine(
            kernel=kernel,
            stage=stage,
            source=", ".join(dict.fromkeys(source for row in rows.values() for cell in row.cells for source in cell.sources)),
            rows=tuple(rows.get(lane) for lane in summary.lanes),
        )
        for (stage, kernel), rows in kernels.items()
        if (stage, kernel) in shown
    ]
    return lines, len(kernels) - len(lines)


def _first_problem(problems: tuple[Problem, ...]) -> dict[tuple[str, str, str], int]:
    numbers: dict[tuple[str, str, str], int] = {}
    for number, problem in enumerate(problems, start=1):
        numbers.setdefault((problem.stage, problem.kernel, problem.lane), number)
    return numbers


def _bar_width(share: float | None) -> float:
    """Percent of the bar that a share fills; whatever is beyond the allowance, or no number, fills it."""
    if share is None:
        return 0.0
    return 100.0 if math.isnan(share) else round(100.0 * min(max(share, 0.0), 1.0), 1)


def _bars(shares: Shares) -> list[Bar]:
    # Heights follow the square root, so that one case beside a thousand can still be seen.
    most = max(shares.histogram)
    bars = []
    last = len(shares.histogram) - 1
    for place, count in enumerate(shares.histogram):
        if count:
            height = round(max(2.0, (_HEIGHT - 2) * math.sqrt(count / most)), 1)
            beyond = place == last
            x = _BEYOND if beyond else place * _BIN
            bars.append(Bar(x=x, y=round(_HEIGHT - height, 1), width=6.0 if beyond else _BIN - 0.6, height=height, beyond=beyond))
    return bars


def _remarks(cell: Cell) -> list[str]:
    """What else there is to say of a cell, for those who ask."""
    remarks = [f"{text.number(count, 'case')}: {text.one_line(check, 60).replace('_', ' ')}" for check, count in cell.checks[:8]]
    remarks += [f"profile {text.one_line(profile, 60)}: {count:,}" for profile, count in cell.profiles[:4]]
    if cell.cases:
        remarks.append(f"took {text.seconds(cell.seconds)}")
    if cell.cases and not cell.shares.count:
        remarks.append("no error was measured")
    if cell.peak_memory is not None:
        remarks.append(f"peak memory {text.memory(cell.peak_memory)}")
    return remarks
