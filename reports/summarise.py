"""Builds the summary of a run from its records (``summarise``)."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conformance.judge.verdict import DETECTORS, Finding, worst_first
from conformance.reports import text
from conformance.reports.cards import cards_of
from conformance.reports.summary import (
    BINS,
    COMPILES,
    STATUSES,
    Cell,
    CellName,
    CellStatus,
    Expected,
    Machine,
    Problem,
    Row,
    RunSummary,
    Shares,
    Totals,
    distinct,
    gathered,
    lane_order,
    machine_labels,
    orderable,
)
from conformance.running.records import Log, Record

#: Detectors whose message tells one problem from another; elsewhere the argument does.
_TOLD_APART_BY_MESSAGE = ("crashed", "timed_out", "raised", "compiler_pass")

_NO_FINDING = "failed"


@dataclasses.dataclass
class _Tally:
    """What has been counted for one cell so far."""

    shares: list[float] = dataclasses.field(default_factory=list)
    checks: Counter[str] = dataclasses.field(default_factory=Counter)
    profiles: Counter[str] = dataclasses.field(default_factory=Counter)
    cases: int = 0
    failed_cases: int = 0
    findings: int = 0
    seconds: float = 0.0
    peak_memory: int | None = None
    toolchain: str = ""
    #: Whether any of them failed, by kind.
    compiles: dict[str, bool] = dataclasses.field(default_factory=dict)
    # Dictionaries keep what they have seen in order, each once.
    sources: dict[str, None] = dataclasses.field(default_factory=dict)
    processes: dict[str, None] = dataclasses.field(default_factory=dict)
    skipped: dict[str, None] = dataclasses.field(default_factory=dict)
    errors: dict[str, None] = dataclasses.field(default_factory=dict)
    expected: str = ""
    fixed: bool = False

    def add(self, record: Record) -> None:
        self.cases += 1
        self.failed_cases += is_failed(record)
        self.findings += len(record.findings)
        self.checks[record.check or "unnamed"] += 1
        if record.profile and not is_failed(record):
            self.profiles[record.profile] += 1
        if record.share is not None:
            self.shares.append(record.share)
        if record.seconds is not None and math.isfinite(record.seconds):
            self.seconds += record.seconds
        if isinstance(record.peak_memory, int):
            self.peak_memory = max(self.peak_memory or 0, record.peak_memory)
        self.processes[record.process] = None
        self.toolchain = self.toolchain or str(record.toolchain)
        kind = record.details.get("compile")
        if kind in COMPILES:
            self.compiles[kind] = self.compiles.get(kind, False) or is_failed(record)
        if record.source:
            self.sources[str(record.source)] = None


def summarise(log: Log) -> RunSummary:
    """The summary of a run, or of several machines' runs whose record files lie in one folder.

    Cells are what was planned (``details["plan"]`` of every ``start``: objects with ``kernel``, ``stage``, ``lane`` and
    ``preset``) and what has a ``case``, merged over all processes. A ``skip``, ``error`` or ``expected`` record with blank
    fields applies to every cell that agrees in the others.
    """
    machines, machine_of = _machines(log)
    tallies = _tallies(log)
    tally_of_row: dict[CellName, list[tuple[CellName, _Tally]]] = {}
    for key, tally in tallies.items():
        tally_of_row.setdefault(dataclasses.replace(key, preset=""), []).append((key, tally))
    unfinished = frozenset(log.unfinished)
    rows = tuple(_row(key, members, unfinished) for key, members in tally_of_row.items())
    cells = [cell for row in rows for cell in row.cells]
    rows = _in_order(rows)

    named = machine_of if len(machine_labels(machines)) > 1 else {}
    known = _problems(log, {key for key, tally in tallies.items() if tally.expected}, named)
    times = [record.time for record in log.records if record.time and math.isfinite(record.time)]
    summary = RunSummary(
        rows=rows,
        problems=tuple(problem for problem in known if not problem.expected),
        expected_problems=tuple(problem for problem in known if problem.expected),
        expected=_expected(log, tallies),
        skips=gathered((CellName.of(record), str(record.reason)) for record in log.of("skip")),
        errors=gathered((CellName.of(record), str(record.reason)) for record in log.of("error")),
        gaps=(),
        unreadable=log.unreadable,
        unfinished=log.unfinished,
        machines=machines,
        started=min(times) if times else None,
        duration=max(times) - min(times) if times else None,
        totals=_totals(cells),
        cards=cards_of(log, named),
    )
    return dataclasses.replace(summary, gaps=_gaps(log, summary))


def is_failed(record: Record) -> bool:
    """Whether a case did not pass."""
    # Anything but a clean pass fails: a record that says "passed" and holds a finding is not believed.
    return bool(record.findings) or record.status != "passed"


def _tallies(log: Log) -> dict[CellName, _Tally]:
    tallies: dict[CellName, _Tally] = {}
    for record in log.of("start"):
        for entry in _plan(record):
            tallies.setdefault(CellName.of(entry), _Tally())
    for record in log.of("case"):
        tallies.setdefault(CellName.of(record), _Tally()).add(record)

    # Distinct ones only: a run that skips the same thing a thousand times says it once.
    notes = dict.fromkeys(
        (record.event, CellName.of(record), str(record.reason), str(record.status), str(record.process))
        for record in log.records
        if record.event in ("skip", "error", "expected")
    )
    planned = list(tallies)
    for event, key, reason, status, process in notes:
        covered = [tallies[key]] if key in tallies else [tallies[other] for other in planned if key.covers(other)]
        if event == "expected":
            for tally in covered:
                if status == "fixed":
                    tally.fixed = not tally.failed_cases and bool(tally.cases)
                else:
                    tally.expected = reason or "no reason given"
            continue
        if not (key.kernel or key.lane):
            continue  # of the run as a whole: told among the errors and skips, not as a cell
        if not covered and key.kernel:
            covered = [tallies.setdefault(key, _Tally())]
        for tally in covered:
            tally.processes[process] = None
            (tally.skipped if event == "skip" else tally.errors)[reason or "no reason given"] = None
    return tallies


def _plan(record: Record) -> Iterable[Mapping[str, Any]]:
    plan = record.details.get("plan") if isinstance(record.details, Mapping) else None
    return [entry for entry in plan if isinstance(entry, Mapping)] if isinstance(plan, list) else []


def _row(key: CellName, members: Sequence[tuple[CellName, _Tally]], unfinished: frozenset[str]) -> Row:
    cells = tuple(_cell(member, tally, unfinished) for member, tally in members)
    statuses = {cell.status for cell in cells}
    return Row(
        kernel=key.kernel,
        stage=key.stage,
        lane=key.lane,
        status=next(status for status in STATUSES if status in statuses),
        cells=cells,
        cases=sum(cell.cases for cell in cells),
        failed_cases=sum(cell.failed_cases for cell in cells),
        findings=sum(cell.findings for cell in cells),
        shares=_shares([share for _, tally in members for share in tally.shares]),
        seconds=sum(cell.seconds for cell in cells),
    )


def _cell(key: CellName, tally: _Tally, unfinished: frozenset[str]) -> Cell:
    cut_short = [process for process in tally.processes if process in unfinished]
    stopped = list(tally.errors)
    status: CellStatus
    if tally.failed_cases and not tally.expected:
        status = "failed"
    elif tally.errors:
        status = "could not run"
    elif tally.failed_cases:
        status = "failed as expected"
    elif tally.cases:
        status = "cut short" if cut_short else "passed"
    elif tally.skipped:
        status = "skipped"
    else:
        status = "nothing ran"
        stopped.append("the run was cut short" if unfinished else "planned, but there is no record of it")
    if tally.cases and cut_short:
        stopped.append(f"its process ({', '.join(cut_short)}) did not end")
    return Cell(
        kernel=key.kernel,
        stage=key.stage,
        lane=key.lane,
        preset=key.preset,
        status=status,
        cases=tally.cases,
        failed_cases=tally.failed_cases,
        findings=tally.findings,
        shares=_shares(tally.shares),
        seconds=tally.seconds,
        peak_memory=tally.peak_memory,
        toolchain=tally.toolchain,
        sources=tuple(tally.sources),
        checks=tuple(tally.checks.most_common()),
        compiles=tuple(f"{kind} failed" if tally.compiles[kind] else kind for kind in COMPILES if kind in tally.compiles),
        profiles=tuple(tally.profiles.most_common()),
        skipped_because=tuple(tally.skipped),
        stopped_because=tuple(stopped),
        expected_because=tally.expected if tally.failed_cases else "",
        fixed=tally.fixed,
    )


def _shares(values: Sequence[float]) -> Shares:
    if not values:
        return Shares()
    ordered = sorted(values, key=orderable)
    histogram = [0] * (BINS + 1)
    for value in ordered:
        within = value <= 1  # false for NaN
        histogram[min(int(max(value, 0.0) * BINS), BINS - 1) if within else BINS] += 1
    any_nan = any(math.isnan(value) for value in values)
    return Shares(
        count=len(ordered),
        median=ordered[(len(ordered) - 1) // 2],
        worst=math.nan if any_nan else ordered[-1],
        histogram=tuple(histogram),
    )


def _in_order(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    # Stages, and kernels in a stage, as first planned; lanes from cheap to dear.
    stages = {stage: order for order, stage in enumerate(dict.fromkeys(row.stage for row in rows))}
    kernels = {kernel: order for order, kernel in enumerate(dict.fromkeys((row.stage, row.kernel) for row in rows))}
    return tuple(sorted(rows, key=lambda row: (stages[row.stage], kernels[row.stage, row.kernel], lane_order(row.lane))))


def _problems(log: Log, expected: set[CellName], machine_of: Mapping[str, str]) -> list[Problem]:
    cases: Counter[CellName] = Counter()
    groups: dict[tuple[object, ...], list[tuple[Record, Finding | None]]] = {}
    for record in log.of("case"):
        key = CellName.of(record)
        row = dataclasses.replace(key, preset="")
        cases[row] += 1
        if is_failed(record):
            first = worst_first(list(record.findings))[0] if record.findings else None
            identity = (first.detector, first.argument) if first else (_NO_FINDING, None)
            message = _alike(first.message) if first and first.detector in _TOLD_APART_BY_MESSAGE else ""
            groups.setdefault((row, *identity, message, key in expected), []).append((record, first))

    options_of = {record.process: _options(record) for record in log.of("start")}
    problems = []
    for group in groups.values():
        # The first of the equally bad ones, so that the same records always give the same example.
        record, first = max(group, key=lambda member: _badness(member[1]))
        also = Counter(
            name
            for other, cause in group
            for name in {found.detector for found in other.findings}
            if cause and name != cause.detector
        )
        row = dataclasses.replace(CellName.of(record), preset="")
        problems.append(
            Problem(
                kernel=row.kernel,
                stage=row.stage,
                lane=row.lane,
                presets=distinct(str(other.preset) for other, _ in group),
                detector=first.detector if first else _NO_FINDING,
                argument=first.argument if first else None,
                failed_cases=len(group),
                cases=cases[row],
                example=first,
                example_case=str(record.case),
                example_preset=str(record.preset),
                example_check=str(record.check),
                replay=text.replay_command(
                    row.stage,
                    str(record.source),
                    row.kernel,
                    str(record.case),
                    row.lane,
                    first.detector if first else "",
                    options_of.get(record.process),
                ),
                also=tuple((name, also[name]) for name in DETECTORS if name in also),
                machines=distinct(machine_of.get(other.process, "") for other, _ in group),
                expected=CellName.of(record) in expected,
            )
        )
    order = {name: place for place, name in enumerate(DETECTORS)}
    return sorted(
        problems, key=lambda problem: (order.get(problem.detector, len(order)), -problem.magnitude, -problem.failed_cases)
    )


def _options(start: Record) -> Mapping[str, object]:
    options = start.details.get("options") if isinstance(start.details, Mapping) else None
    return options if isinstance(options, Mapping) else {}


def _alike(message: object) -> str:
    """A message without what differs from case to case: numbers, and everything after its first line."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", text.one_line(str(message).strip().split("\n", 1)[0], 200))


def _badness(finding: Finding | None) -> tuple[float, float]:
    if finding is None:
        return (math.inf, 0.0)
    return (orderable(finding.magnitude), orderable(finding.ulps or 0.0))


def _expected(log: Log, tallies: Mapping[CellName, _Tally]) -> tuple[Expected, ...]:
    entries: dict[tuple[CellName, str, str], None] = {}
    for record in log.of("expected"):
        key = dataclasses.replace(CellName.of(record), preset="")
        entries[key, str(record.reason), str(record.status)] = None
    return tuple(
        sorted(
            (
                Expected(
                    kernel=key.kernel,
                    stage=key.stage,
                    lane=key.lane,
                    reason=reason,
                    status=status,
                    cases=sum(tally.failed_cases for other, tally in tallies.items() if key.covers(other)),
                )
                for key, reason, status in entries
            ),
            key=lambda entry: not entry.fixed,
        )
    )


def _machines(log: Log) -> tuple[tuple[Machine, ...], dict[str, str]]:
    """The distinct machines of the ``start`` records, and the label of each process's machine."""
    found: dict[tuple[tuple[str, str], ...], Machine] = {}
    machine_of: dict[str, str] = {}
    for record in log.of("start"):
        details = record.details if isinstance(record.details, Mapping) else {}
        facts = tuple(_flatten({name: value for name, value in details.items() if name != "plan"}))
        known = found.get(facts)
        if known is None:
            label = _machine_label(details.get("machine")) or f"machine {len(found) + 1}"
            known = Machine(label=label, processes=(), started=record.time, facts=facts)
        found[facts] = dataclasses.replace(known, processes=distinct((*known.processes, str(record.process))))
        machine_of[record.process] = known.label
    return tuple(found.values()), machine_of


def _machine_label(machine: object) -> str:
    if isinstance(machine, Mapping):
        system = " ".join(str(machine[key]) for key in ("system", "architecture") if machine.get(key))
        cores = f", {machine['cores']} cores" if system and machine.get("cores") else ""
        machine = machine.get("hostname") or system + cores
    return text.one_line(machine or "", 80)


def _flatten(value: object, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str):
        yield (name, value)
    elif value is None:
        yield (name, "none")
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        yield (name, ", ".join(value) or "none")
    else:
        yield (name, json.dumps(value, default=str))


def _totals(cells: Sequence[Cell]) -> Totals:
    counts = Counter(cell.status for cell in cells)
    return Totals(
        kernels=len({(cell.stage, cell.kernel) for cell in cells}),
        kernels_failed=len({(cell.stage, cell.kernel) for cell in cells if cell.status == "failed"}),
        cells={status: counts[status] for status in STATUSES},
        cases=sum(cell.cases for cell in cells),
        failed_cases=sum(cell.failed_cases for cell in cells),
        findings=sum(cell.findings for cell in cells),
        seconds=sum(cell.seconds for cell in cells),
    )


def _gaps(log: Log, summary: RunSummary) -> tuple[str, ...]:
    gaps = []
    if log.unfinished:
        names = ", ".join(log.unfinished[:5]) + (", ..." if len(log.unfinished) > 5 else "")
        gaps.append(
            f"The run was cut short: {text.number(len(log.unfinished), 'process', 'processes')} left no end record ({names})."
        )
    if log.unreadable:
        lines = text.number(len(log.unreadable), "line")
        gaps.append(f"{lines} of the log cannot be read; what was recorded there is missing here. First: {log.unreadable[0]}")
    if not summary.totals.cases:
        gaps.append("No case ran: there is nothing to judge by.")
    # pytest fails a run for a fixed failure too, so that the list is kept true.
    explained = summary.totals.cells["failed"] or summary.errors or any(entry.fixed for entry in summary.expected)
    for record in log.of("end"):
        code = record.details.get("exit_code") if isinstance(record.details, Mapping) else None
        if code not in (None, 0) and not explained:
            gaps.append(f"Process {record.process} ended with exit code {code}, and no record says why.")
    return tuple(text.one_line(gap, 400) for gap in gaps)
