"""What ``check`` found, for a person: one line that says how it went, then each kind of finding by its worst case."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from conformance.cases.key import CaseKey
from conformance.judge.verdict import Finding, Verdict
from conformance.reports import text

#: Longest message that is shown, in characters.
LONGEST_MESSAGE = 4000
#: Statuses of a run that took the kernel's process with it.
_LOST = ("crashed", "timed_out")
#: What is found once, of all cases or at one preset, says nothing of the others.
_OF_ONE_PRESET = ("capability", "pooled_signature", *_LOST)


class _RunOutcome(Protocol):
    @property
    def status(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def compiled(self) -> str: ...


class _JudgedRun(Protocol):
    @property
    def case(self) -> CaseKey: ...
    @property
    def verdict(self) -> Verdict: ...
    @property
    def outcome(self) -> _RunOutcome: ...


class _LocatedFinding(Protocol):
    @property
    def finding(self) -> Finding: ...
    @property
    def case(self) -> CaseKey: ...


class CheckResult(Protocol):
    """What has to be known of a check: ``conformance.Report`` has it."""

    @property
    def stage(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    @property
    def lane(self) -> str: ...
    @property
    def planned(self) -> int: ...
    @property
    def refused(self) -> Mapping[str, str]: ...
    @property
    def ok(self) -> bool: ...
    @property
    def examples(self) -> int: ...
    @property
    def share(self) -> float | None: ...
    @property
    def runs(self) -> Sequence[_JudgedRun]: ...
    @property
    def findings(self) -> Sequence[_LocatedFinding]: ...


def render(report: CheckResult, width: int = 80, most: int = 6) -> str:
    """The result as text without colour, at most ``width`` columns wide but for words that are longer; no line end behind it.

    At most ``most`` kinds of findings are told, each by its worst case: what is wrong, where, and the case's key.
    """
    title = text.one_line(f"{report.kernel} ({report.stage}, {report.lane})")
    cases = text.number(report.examples, "case")
    presets = list(dict.fromkeys(run.case.preset for run in report.runs))
    if len(presets) > 1:
        cases += f" of {' and '.join(presets)}"
    refused = [f"  no case of {preset}: {text.one_line(reason)}" for preset, reason in report.refused.items()]
    cases += "".join(f", {kind}" for kind in sorted({run.outcome.compiled for run in report.runs if run.outcome.compiled}))
    if report.ok:
        used = "" if report.share is None else f", at most {report.share:.2f} of the allowance used"
        remarks = dict.fromkeys(run.outcome.message for run in report.runs if run.outcome.status == "ok" and run.outcome.message)
        passed = textwrap.wrap(f"{title}: passed {cases}{used}", width, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join([*passed, *refused, *(f"  {text.one_line(remark)}" for remark in remarks)])
    failed = sum(not run.verdict.ok for run in report.runs)
    lines = [f"{title}: FAILED {failed} of {text.number(len(report.runs), 'run')} of {cases}", *refused]
    if report.examples < report.planned:
        lost = sum(run.outcome.status in _LOST for run in report.runs)
        left = text.number(report.planned - report.examples, "case")
        lines.append(f"  {left} not tried" + (f" after {text.number(lost, 'run')} that crashed or timed out" if lost else ""))
    groups: dict[tuple[str, str | None, str], list[_LocatedFinding]] = {}
    for entry in report.findings:
        # Each capability that does not hold is told by itself.
        what = entry.finding.message if entry.finding.detector == "capability" else ""
        groups.setdefault((entry.finding.detector, entry.finding.argument, what), []).append(entry)
    for position, ((detector, argument, _), entries) in enumerate(groups.items()):
        if position == most:
            lines.append(f"  and {text.number(len(groups) - most, 'more kind')} of findings")
            break
        seen = report.examples if detector == "pooled_signature" else len({str(entry.case) for entry in entries})
        where = {entry.case.preset for entry in entries}
        # Of a check of several geometries: what shows at one of them alone is told by that.
        only = f", only of {where.pop()}" if len(presets) > 1 and len(where) == 1 and detector not in _OF_ONE_PRESET else ""
        lines.append(f"  {detector}{f' in {argument}' if argument else ''}, {text.number(seen, 'case')}{only}")
        worst = entries[0].finding
        lines += _wrapped(worst.message, width)
        if worst.where:
            lines += _wrapped(f"at {text.place(worst.where)}", width)
        lines += _wrapped(f"case {entries[0].case}", width, indent_more="  ")
    return "\n".join(lines)


def _wrapped(content: str, width: int, indent_more: str = "") -> list[str]:
    return textwrap.wrap(
        text.one_line(content, LONGEST_MESSAGE),
        width,
        initial_indent=" " * 4,
        subsequent_indent=" " * 4 + indent_more,
        break_on_hyphens=False,
        break_long_words=False,
    )


def replay_line(report: CheckResult, source: str, options: Mapping[str, Any]) -> str:
    """``again: `` and the command that runs the worst case again; empty if there is none.

    ``source`` is the kernel's file, ``options`` are those of the check, as a run records them.
    """
    if not report.findings:
        return ""
    worst = report.findings[0]
    command = text.replay_command(
        report.stage, source, report.kernel, str(worst.case), report.lane, worst.finding.detector, options
    )
    return f"again: {command}" if command else ""
