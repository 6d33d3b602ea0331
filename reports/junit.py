"""The report as JUnit XML, for CI systems that show test results: a suite per lane, a test case per kernel and preset.

``failure`` is a finding; ``error`` is what had to run and did not, was cut short, or left no record; ``skipped`` is what was
skipped or failed as expected. A run without a single case holds an error, since an empty file would count as a success.
"""

from __future__ import annotations

import datetime
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from conformance.reports import text
from conformance.reports.summary import Cell, Problem, Reason, RunSummary

#: The suite of what concerns the run as a whole.
RUN_SUITE = "run"

_NAME = 300
_MESSAGE = 1000
_PROBLEMS_PER_CASE = 20


def render(summary: RunSummary) -> str:
    """JUnit XML that is valid against the schema of Jenkins's xUnit plugin (``junit-10.xsd``); times are in seconds."""
    root = ElementTree.Element("testsuites", name="conformance")
    problems: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in (*summary.problems, *summary.expected_problems):
        problems.setdefault((problem.stage, problem.kernel, problem.lane), []).append(problem)
    times = summary.cards.times if summary.cards is not None else ()
    on_cards: dict[tuple[str, str, str, str], list[str]] = {}
    for one in times:
        on_cards.setdefault((one.stage, one.kernel, one.lane, one.preset), []).append(one.shown)
    cells = summary.cells
    for lane in summary.lanes:
        members = [cell for cell in cells if cell.lane == lane]
        suite = _suite(root, lane or "(no lane)", summary)
        for cell in members:
            of_cell = problems.get((cell.stage, cell.kernel, cell.lane), ())
            _test_case(suite, cell, of_cell, on_cards.get((cell.stage, cell.kernel, cell.lane, cell.preset), ()))
        suite.set("time", _time(sum(cell.seconds for cell in members)))
        _count(suite)
    _run_suite(root, summary)
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    root.set("time", _time(summary.totals.seconds))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(root: ElementTree.Element, name: str, summary: RunSummary) -> ElementTree.Element:
    suite = ElementTree.SubElement(root, "testsuite", name=text.one_line(name, _NAME))
    if summary.started and 0 < summary.started < 2**36:
        moment = datetime.datetime.fromtimestamp(summary.started, datetime.timezone.utc)
        suite.set("timestamp", moment.strftime("%Y-%m-%dT%H:%M:%S"))
    if summary.machine_count == 1:
        suite.set("hostname", summary.machines[0].label)
    return suite


def _count(suite: ElementTree.Element) -> None:
    suite.set("tests", str(len(suite.findall("testcase"))))
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(len(suite.findall(f"testcase/{tag}"))))


def _test_case(suite: ElementTree.Element, cell: Cell, problems: Sequence[Problem], on_cards: Sequence[str]) -> None:
    name = f"{cell.kernel or '(no kernel)'}[{cell.preset}]" if cell.preset else cell.kernel or "(no kernel)"
    test = ElementTree.SubElement(
        suite,
        "testcase",
        classname=text.one_line(f"{cell.lane or 'run'}.{cell.stage or 'no_stage'}", _NAME),
        name=text.one_line(name, _NAME),
        time=_time(cell.seconds),
    )
    mine = [problem for problem in problems if cell.preset in problem.presets or not cell.preset]
    if cell.status == "failed":
        message = f"{cell.failed_cases:,} of {text.number(cell.cases, 'case')} failed"
        if mine:
            message += f"; {mine[0].detector}: {text.one_line(mine[0].example.message if mine[0].example else '', 300)}"
        body = "\n\n".join(_describe(problem) for problem in mine[:_PROBLEMS_PER_CASE])
        if len(mine) > _PROBLEMS_PER_CASE:
            body += f"\n\n... and {len(mine) - _PROBLEMS_PER_CASE:,} more problems"
        _say(test, "failure", mine[0].detector if mine else "failed", message, body)
    elif cell.status in ("could not run", "nothing ran", "cut short"):
        _say(test, "error", cell.status, f"{cell.status}: {'; '.join(cell.stopped_because)}")
    elif cell.status == "failed as expected":
        _say(test, "skipped", cell.status, f"failed as expected: {cell.expected_because}")
    elif cell.status == "skipped":
        _say(test, "skipped", cell.status, "; ".join(cell.skipped_because))

    remarks = []
    if cell.cases:
        worst = text.share_in_words(cell.shares.worst)
        remarks.append(f"{text.number(cell.cases, 'case')}, {text.number(cell.findings, 'finding')}, worst: {worst}")
    remarks += [*cell.compiles, *on_cards[:_PROBLEMS_PER_CASE]]
    if cell.fixed:
        remarks.append("fixed: no longer fails; take it off the list of expected failures")
    if cell.cases and cell.skipped_because:
        remarks.append(f"partly skipped: {'; '.join(cell.skipped_because)}")
    if cell.status == "failed" and cell.stopped_because:
        remarks.append(f"also: {'; '.join(cell.stopped_because)}")
    if remarks:
        ElementTree.SubElement(test, "system-out").text = text.plain("\n".join(remarks), 4 * _MESSAGE)


def _say(test: ElementTree.Element, tag: str, kind: str, message: str, body: str = "") -> None:
    element = ElementTree.SubElement(test, tag, type=kind, message=text.one_line(message, _MESSAGE))
    element.text = text.plain(body, 20 * _MESSAGE) or None


def _describe(problem: Problem) -> str:
    lines = [
        f"{problem.detector}: {problem.meaning}",
        f"{problem.failed_cases:,} of {text.number(problem.cases, 'case')} on {problem.lane}",
    ]
    lines += problem.measures
    if problem.example:
        lines.append(text.plain(problem.example.message, 2 * _MESSAGE))
    lines.append(problem.replay or f"case key: {problem.example_case or 'none'}")
    return "\n".join(lines)


def _run_suite(root: ElementTree.Element, summary: RunSummary) -> None:
    """Errors that belong to no kernel, and what makes the run incomplete, as a suite of its own; none if there are none."""
    problems = [(f"error {number}", error.reason) for number, error in enumerate(_of_no_cell(summary), start=1)]
    problems += [(f"gap {number}", gap) for number, gap in enumerate(summary.gaps, start=1)]
    if not problems:
        return
    suite = _suite(root, RUN_SUITE, summary)
    for name, message in problems:
        test = ElementTree.SubElement(suite, "testcase", classname=RUN_SUITE, name=name, time=_time(0.0))
        _say(test, "error", "could not run" if name.startswith("error") else "incomplete", message)
    suite.set("time", _time(0.0))
    _count(suite)


def _of_no_cell(summary: RunSummary) -> list[Reason]:
    told = {reason for cell in summary.cells for reason in cell.stopped_because}
    return [error for error in summary.errors if error.reason not in told]


def _time(value: float) -> str:
    return f"{value:.3f}"
