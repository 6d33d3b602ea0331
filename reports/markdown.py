"""The report as GitHub-flavoured Markdown, for the step summary of a CI job (which holds 1 MiB at most)."""

from __future__ import annotations

import re

from conformance.reports import text
from conformance.reports.cards import Cards
from conformance.reports.summary import CellStatus, Problem, Reason, RunSummary

MOST_ROWS = 300
MOST_PROBLEMS = 30
MOST_REASONS = 50

#: A sign beside the word, never instead of it.
SIGNS: dict[str, str] = {
    "failed": "❌",
    "could not run": "⛔",
    "cut short": "✂️",
    "nothing ran": "⚠️",
    "incomplete": "⚠️",
    "failed as expected": "🟡",
    "passed": "✅",
    "skipped": "⏭️",
}

_PUNCTUATION = re.compile(r"([\\`*_\[\]|~$])|^([#>+-]|\d+[.)])")


def render(summary: RunSummary) -> str:
    """The report in Markdown: the outcome, a table of kernels and lanes, problems worst first, and what did not run and why."""
    lines = [f"## {SIGNS[summary.outcome]} Conformance: {summary.outcome}", "", escape(summary.headline), ""]
    if summary.started is not None:
        lines += [
            escape(
                f"{text.number(summary.totals.cases, 'case')} in {text.seconds(summary.duration or 0)} "
                f"on {text.number(summary.machine_count, 'machine')}, started {text.moment(summary.started)}"
            ),
            "",
        ]
    for gap in summary.gaps:
        lines += [f"> {SIGNS['incomplete']} {escape(gap)}", ""]
    for entry in summary.expected:
        if entry.fixed:
            name = f"**{escape(entry.kernel, 120)}** on {escape(entry.lane or 'every lane', 40)}"
            lines += [f"> ✨ Fixed: {name} no longer fails; take it off the list of expected failures", ""]
    lines += _table(summary)
    if summary.problems:
        lines += [f"### {text.number(len(summary.problems), 'problem')}, worst first", ""]
        for number, problem in enumerate(summary.problems[:MOST_PROBLEMS], start=1):
            lines += _problem(number, problem)
        if len(summary.problems) > MOST_PROBLEMS:
            lines += [f"… and {len(summary.problems) - MOST_PROBLEMS:,} more problems: see the HTML report", ""]
    lines += _reasons("Could not run", "could not run", summary.errors)
    lines += _reasons("Planned, and not run to the end (not a pass)", "nothing ran", summary.unrun)
    lines += _reasons("Skipped", "skipped", summary.skips)
    still = [entry for entry in summary.expected if not entry.fixed]
    if still:
        lines += [f"### {SIGNS['failed as expected']} Failed as expected", ""]
        for entry in still[:MOST_REASONS]:
            lines.append(
                f"- **{escape(entry.kernel, 120)}** {escape(entry.lane, 40)}: {text.number(entry.cases, 'case')}; "
                f"{escape(entry.reason, 300)}"
            )
        lines.append("")
    lines += _cards(summary.cards) if summary.cards is not None else []
    return "\n".join(lines).rstrip() + "\n"


def escape(content: object, limit: int | None = None) -> str:
    """One line of text that Markdown and HTML leave as it is, also in a table cell; mentions do not notify anyone."""
    plain = text.one_line(content, limit).replace("&", "&amp;").replace("<", "&lt;")
    # Some signs mean something anywhere, and some only where a line begins.
    return _PUNCTUATION.sub(_backslash, plain).replace("@", "@\u2060").replace("://", ":\u2060//")


def _backslash(match: re.Match[str]) -> str:
    found = match.group()
    return found[:-1] + "\\" + found[-1]


def _fenced(content: str) -> list[str]:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", content)), default=0))
    return [f"{fence}sh", content, fence]


def _table(summary: RunSummary) -> list[str]:
    if not summary.rows:
        return []
    lines = ["| stage | kernel | lane | cases | findings | worst share | time | status |", "|---|---|---|--:|--:|--:|--:|---|"]
    for row in summary.rows[:MOST_ROWS]:
        fields = (
            escape(row.stage or "-", 120),
            escape(row.kernel or "-", 120),
            escape(row.lane or "-", 40),
            f"{row.cases:,}",
            f"{row.findings:,}",
            text.share(row.shares.worst),
            text.seconds(row.seconds),
            f"{SIGNS[row.status]} {row.status}{row.remark}",
        )
        lines.append(f"| {' | '.join(fields)} |")
    lines.append("")
    if len(summary.rows) > MOST_ROWS:
        lines += [f"… and {len(summary.rows) - MOST_ROWS:,} more rows, counted above", ""]
    return lines


def _cards(cards: Cards) -> list[str]:
    lines = ["### On cards", "", escape(cards.headline, 600), ""]
    for name, reason in cards.given_up:
        lines += [f"> {SIGNS['could not run']} {escape(f'{name} is used no more: {reason}', 400)}", ""]
    lines += ["| kernel | preset | launches | median on the card | worst |", "|---|---|--:|--:|--:|"]
    for one in cards.times[:MOST_ROWS]:
        times = (text.device_time(one.median), text.device_time(one.worst))
        lines.append(f"| {' | '.join((escape(one.kernel, 120), escape(one.place, 80), f'{one.launches:,}', *times))} |")
    lines.append("")
    if len(cards.times) > MOST_ROWS:
        lines += [f"… and {len(cards.times) - MOST_ROWS:,} more rows", ""]
    return lines


def _problem(number: int, problem: Problem) -> list[str]:
    presets = f", {', '.join(problem.presets)}" if problem.presets else ""
    place = escape((problem.lane or "-") + presets, 200)
    title = f"**{number}. {escape(problem.detector)}** in {escape(problem.kernel, 120)} on {place}"
    lines = [f"{title}: {problem.failed_cases:,} of {text.number(problem.cases, 'case')}", ""]
    lines += [f"- {escape(problem.meaning)}"]
    lines += [f"- {escape(measure)}" for measure in problem.measures]
    if problem.example and problem.example.message:
        lines.append(f"- {escape(problem.example.message, 600)}")
    if problem.also:
        lines.append("- in the same cases: " + ", ".join(f"{escape(name)} in {count:,}" for name, count in problem.also))
    if problem.machines:
        lines.append("- seen on " + escape(", ".join(problem.machines), 300))
    lines.append("")
    if problem.replay:
        lines += _fenced(problem.replay)
    else:
        lines.append(f"No command replays it from here; case key: {escape(problem.example_case or 'none', 200)}")
    return [*lines, ""]


def _reasons(title: str, status: CellStatus, reasons: tuple[Reason, ...]) -> list[str]:
    if not reasons:
        return []
    lines = [f"### {SIGNS[status]} {title}", ""]
    for reason in reasons[:MOST_REASONS]:
        what = ", ".join([*reason.kernels[:8], *([f"{len(reason.kernels) - 8:,} more"] if len(reason.kernels) > 8 else [])])
        lead = " ".join(part for part in (reason.lane, what) if part) or "the run"
        presets = f" [{', '.join(reason.presets[:6])}]" if reason.presets else ""
        lines.append(f"- **{escape(lead + presets, 600)}**: {escape(reason.reason, 400)}")
    if len(reasons) > MOST_REASONS:
        lines.append(f"- … and {len(reasons) - MOST_REASONS:,} more reasons")
    return [*lines, ""]
