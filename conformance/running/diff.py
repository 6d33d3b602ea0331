"""What a replacement changes: capabilities lost or gained, verdicts, and how much of the allowance is used before and after.

A kernel that serves less than the one it replaces is a finding of its own, however right its numbers are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from conformance.contract.kernel import VARIABLE_BATCH, Declaration
from conformance.contract.registry import capability_meanings, model_named, short_name, stages
from conformance.errors import UsageError
from conformance.lanes import find_lane
from conformance.reports import diff_report, text
from conformance.running.capabilities import proven
from conformance.running.check import Report
from conformance.running.records import Record, read_run

#: Exit codes of a comparison besides the command's own: something that was served before is not any more.
SERVES_LESS = 4

#: ``yes``: declared and shown; ``fails``: declared and refuted; ``not shown``: declared, and no run put it to the test.
ClaimStatus = Literal["yes", "fails", "not shown", "no"]


@dataclasses.dataclass(frozen=True)
class KernelSummary:
    """What is known of one kernel. ``refuted`` and ``shown`` are capabilities that were put to the test."""

    kernel: str
    stage: str
    declared: tuple[str, ...]
    shown: frozenset[str]
    refuted: Mapping[str, str]
    #: Judged runs besides those of capabilities, how many of them failed, by which detectors, and the worst share used.
    runs: int
    failed: int
    detectors: tuple[str, ...]
    share: float | None
    #: Why the kernel was not judged as it should have been, if so.
    errors: tuple[str, ...] = ()
    #: The largest batch of one build; it says something of a kernel with ``variable_batch``.
    capacity: int = 1

    def status(self, capability: str) -> ClaimStatus:
        """Whether the kernel has a capability."""
        if capability not in self.declared:
            return "no"
        if capability in self.refuted:
            return "fails"
        return "yes" if capability in self.shown else "not shown"


def of_report(kernel: Declaration, report: Report) -> KernelSummary:
    """The summary of a kernel that was just checked."""
    shown: set[str] = set()
    refuted: dict[str, str] = {}
    cases = [run for run in report.runs if not proven(run.check)]
    for run in report.runs:
        for capability in proven(run.check):
            shown.add(capability)
            if not run.verdict.ok:
                refuted.setdefault(capability, run.verdict.findings[0].message)
    found = {finding.detector for run in cases for finding in run.verdict.findings}
    shares = [run.verdict.share for run in cases if run.verdict.share is not None]
    return KernelSummary(
        kernel.name,
        short_name(kernel.stage),
        kernel.capabilities,
        frozenset(shown - refuted.keys()),
        refuted,
        len(cases),
        sum(not run.verdict.ok for run in cases),
        tuple(sorted(found)),
        max(shares, default=None),
        capacity=kernel.capacity,
    )


def of_run(folder: Path) -> dict[str, KernelSummary]:
    """The summary of every kernel of a kept run, by name; raises ``UsageError`` if there is no run in the folder."""
    log = read_run(folder)
    plans: dict[str, Mapping[str, Any]] = {}
    for record in log.of("start"):
        plans |= {planned["kernel"]: planned for planned in record.details["plan"] if planned["kernel"]}
    by_kernel: dict[str, list[Record]] = {name: [] for name in plans}
    for record in log.records:
        if record.kernel:
            by_kernel.setdefault(record.kernel, []).append(record)
    gaps = ["the run was cut short: it has no end"] if log.unfinished else []
    if log.unreadable:
        gaps.append(f"{text.number(len(log.unreadable), 'line')} of its log cannot be read; the first is {log.unreadable[0]}")
    return {name: _of_records(name, plans.get(name, {}), found, tuple(gaps)) for name, found in by_kernel.items()}


def _of_records(name: str, plan: Mapping[str, Any], records: list[Record], errors: tuple[str, ...]) -> KernelSummary:
    shown: set[str] = set()
    refuted: dict[str, str] = {}
    cases = []
    for record in records:
        lane = find_lane(record.lane)
        if record.event != "case" or (lane is not None and not lane.executes):
            continue  # compiling shows nothing of what a kernel computes
        capabilities = proven(record.check)
        if not capabilities:
            cases.append(record)
        for capability in capabilities:
            shown.add(capability)
            if record.findings:
                refuted.setdefault(capability, record.findings[0].message)
    shares = [record.share for record in cases if record.share is not None]
    # A lane that this machine lacks is skipped, and no error where another one judged the kernel.
    unjudged = ("error",) if cases else ("error", "skip")
    stage = plan.get("stage") or next((record.stage for record in records), "")
    known = stages().get(stage)
    return KernelSummary(
        name,
        stage,
        tuple(plan.get("capabilities", ())),
        frozenset(shown - refuted.keys()),
        refuted,
        len(cases),
        sum(bool(record.findings) for record in cases),
        tuple(sorted({finding.detector for record in cases for finding in record.findings})),
        max(shares, default=None),
        (*(record.reason for record in records if record.event in unjudged), *errors),
        plan.get("capacity") or (model_named(known.model).largest_batch if known else 1),
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two summaries side by side: what ``new`` is to take the place of ``old``."""

    old: KernelSummary
    new: KernelSummary

    @property
    def capabilities(self) -> tuple[str, ...]:
        """All capabilities that either kernel may have: those of the installed models, and what the records name besides."""
        return tuple(dict.fromkeys([*capability_meanings(), *self.old.declared, *self.new.declared]))

    @property
    def lost(self) -> tuple[str, ...]:
        """Capabilities that the old kernel has, or declares without a run that says otherwise, and the new one has not.

        Of a variable batch also a part: a smaller capacity.
        """
        had = [name for name in self.capabilities if self.old.status(name) in ("yes", "not shown")]
        return tuple(name for name in had if self.new.status(name) in ("no", "fails") or self._smaller(name))

    def _smaller(self, name: str) -> bool:
        return name == VARIABLE_BATCH and self.new.capacity < self.old.capacity

    @property
    def gained(self) -> tuple[str, ...]:
        """Capabilities that only the new kernel has."""
        return tuple(
            name for name in self.capabilities if self.old.status(name) in ("no", "fails") and self.new.status(name) == "yes"
        )

    @property
    def open(self) -> tuple[str, ...]:
        """Capabilities that the new kernel declares and that no run put to the test."""
        return tuple(name for name in self.capabilities if self.new.status(name) == "not shown")

    @property
    def exit_code(self) -> int:
        """4 if something is lost, 1 if the new kernel has findings, 3 if it was not judged or a claim not tested, else 0."""
        if self.lost:
            return SERVES_LESS
        if self.new.failed or self.new.refuted:
            return 1
        return 3 if self.open or not self.new.runs or self.new.errors else 0

    def __str__(self) -> str:
        return diff_report.render(self)


def for_kernel(kernel: Declaration, run: dict[str, KernelSummary], folder: str) -> dict[str, KernelSummary]:
    """What a kept run says of the kernel of that name, or of its only one; raises ``UsageError`` if it has several others."""
    for name in (kernel.name, kernel.id):
        if name in run:
            return {kernel.name: run[name]}
    if len(run) != 1:
        raise UsageError(f"no kernel {kernel.name!r} in the run {folder}; found {', '.join(run) or 'none'}")
    return run


def compare_runs(old: Mapping[str, KernelSummary], new: Mapping[str, KernelSummary]) -> list[Comparison]:
    """Pair the kernels of two runs by name, or the only one of each.

    A kernel that is judged in the old run alone is compared with nothing, which serves nothing. Raises ``UsageError`` if no
    kernel of the old run can be paired and both hold several.
    """
    if len(old) == len(new) == 1:
        return [Comparison(next(iter(old.values())), next(iter(new.values())))]
    # A run that was kept when another set of models was installed may call the same kernel with its model's name, or without.
    other = {name: name if name in new else _alike(name, new) for name in old}
    if not any(other.values()):
        raise UsageError(f"no kernel is in both runs: OLD has {', '.join(old) or 'none'}, NEW has {', '.join(new) or 'none'}")
    return [Comparison(summary, new.get(other[name]) or _nothing(summary)) for name, summary in old.items()]


def _alike(name: str, others: Iterable[str]) -> str:
    """The one of ``others`` that is called so but for its model, or an empty string if none or several are."""
    bare = name.rpartition("/")[2]
    found = [one for one in others if one.rpartition("/")[2] == bare]
    return found[0] if len(found) == 1 and ("/" in name) != ("/" in found[0]) else ""


def _nothing(old: KernelSummary) -> KernelSummary:
    return KernelSummary("no kernel", old.stage, (), frozenset(), {}, 0, 0, (), None, (f"{old.kernel} is not judged any more",))


def exit_code(comparisons: Iterable[Comparison]) -> int:
    """The gravest of several: something lost, then findings, then what could not be judged."""
    codes = {comparison.exit_code for comparison in comparisons}
    return next((code for code in (SERVES_LESS, 1, 3) if code in codes), 0)
