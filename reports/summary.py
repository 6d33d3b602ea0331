"""What a run amounts to, from its records alone: one frozen ``RunSummary`` that every report is rendered from.

The rule behind every status: a check that did not run is not a pass. A planned cell without a record says "nothing ran", a cell
that a killed process was judging says "cut short", and a line that cannot be read makes the run incomplete.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from conformance.judge.verdict import DETECTORS, Finding, worst_first
from conformance.running.records import Log, Record
from reports import text

Status = Literal["failed", "could not run", "cut short", "nothing ran", "failed as expected", "passed", "skipped"]

#: Every status of a cell, and what it means; a row of several cells shows the first one in this order that any of them has.
STATUSES: dict[Status, str] = {
    "failed": "at least one case has a finding",
    "could not run": "it had to run and could not",
    "cut short": "passed so far, but the process that judged it did not end",
    "nothing ran": "planned, and no record of it",
    "failed as expected": "fails, and is listed as an expected failure",
    "passed": "every case that ran passed",
    "skipped": "not run, for the reason given",
}

Outcome = Literal["failed", "incomplete", "nothing ran", "passed"]

#: Bins of a histogram of shares: ``BINS`` equal ones from 0 to the whole allowance, then one for everything beyond it.
BINS = 20

#: Detectors whose message tells one fault from another; elsewhere the argument does.
_TOLD_APART_BY_MESSAGE = ("crashed", "timed_out", "raised", "compiler_pass")

_NO_FINDING = "failed"


@dataclasses.dataclass(frozen=True)
class Shares:
    """How much of their allowance the cases used, as multiples of what is allowed; NaN counts as the worst there is."""

    count: int = 0
    median: float | None = None
    worst: float | None = None
    #: Cases in each of ``BINS`` equal bins from 0 to 1, and at last the cases beyond 1.
    histogram: tuple[int, ...] = (0,) * (BINS + 1)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One kernel of one stage, on one lane, at one preset."""

    kernel: str
    stage: str
    lane: str
    preset: str
    status: Status
    cases: int
    failed_cases: int
    findings: int
    shares: Shares
    #: Seconds that the lane took for all cases, and the highest peak memory of a worker in bytes.
    seconds: float
    peak_memory: int | None
    toolchain: str
    sources: tuple[str, ...]
    #: Cases by what was checked, such as ``(("example", 48), ("repeat", 1))``.
    checks: tuple[tuple[str, int], ...]
    #: Passed cases by the profile of legal roundings that explains them best.
    profiles: tuple[tuple[str, int], ...]
    #: Why it, or a part of it, was skipped; why it could not run or was cut short.
    skipped_because: tuple[str, ...]
    stopped_because: tuple[str, ...]
    #: Why the failure is expected, and whether an expected failure no longer happens.
    expected_because: str
    fixed: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel of one stage on one lane: its cells, one per preset, and their sum."""

    kernel: str
    stage: str
    lane: str
    status: Status
    cells: tuple[Cell, ...]
    cases: int
    failed_cases: int
    findings: int
    shares: Shares
    seconds: float

    @property
    def skipped(self) -> int:
        """How many of the cells were skipped, wholly or in part."""
        return sum(bool(cell.skipped_because) for cell in self.cells)

    @property
    def fixed(self) -> bool:
        """Whether an expected failure of one of the cells no longer happens."""
        return any(cell.fixed for cell in self.cells)

    @property
    def remark(self) -> str:
        """What the status does not say about the cells, to be put behind it: ``", 1 nothing ran, 2 skipped"``."""
        others = [cell.status for cell in self.cells if cell.status not in (self.status, "passed", "skipped")]
        remarks = [f"{others.count(status)} {status}" for status in STATUSES if status in others]
        if self.skipped and self.status != "skipped":
            remarks.append(f"{self.skipped} skipped")
        if self.fixed:
            remarks.append("fixed")
        return "".join(f", {remark}" for remark in remarks)


@dataclasses.dataclass(frozen=True)
class Fault:
    """Cases of one kernel on one lane that fail alike: the same first detector, on the same argument."""

    kernel: str
    stage: str
    lane: str
    presets: tuple[str, ...]
    #: A detector's id, or ``failed`` for a failed case that holds no finding.
    detector: str
    argument: str | None
    #: How many cases fail so, out of how many of the kernel on this lane.
    failed_cases: int
    cases: int
    #: The worst of them.
    example: Finding | None
    example_case: str
    example_preset: str
    example_check: str
    #: The command that runs the worst case again; ``None`` if the record does not say enough.
    replay: str | None
    #: Other detectors that fired in the same cases, and in how many.
    also: tuple[tuple[str, int], ...]
    machines: tuple[str, ...]
    expected: bool

    @property
    def meaning(self) -> str:
        """What the detector says, in a sentence."""
        return DETECTORS.get(self.detector, "the case failed, and its record holds no finding")

    @property
    def magnitude(self) -> float:
        """How bad the worst case is, for sorting."""
        return _orderable(self.example.magnitude) if self.example else math.inf

    @property
    def measures(self) -> tuple[str, ...]:
        """Where the worst case is wrong and by how much, in a few words each."""
        example = self.example
        if example is None:
            return ()
        place = text.position(example.argument, example.index, example.where)
        measures = [
            f"worst at {text.one_line(place, 200)}" if place else "",
            text.share_in_words(example.share) if example.share is not None else "",
            text.ulps(example.ulps),
        ]
        if example.count is not None:
            measures.append(f"{example.count:,}{f' of {example.total:,}' if example.total is not None else ''} elements")
        return tuple(measure for measure in measures if measure)


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why something did not run, and everything that it applies to."""

    reason: str
    lane: str
    kernels: tuple[str, ...]
    presets: tuple[str, ...]
    count: int


@dataclasses.dataclass(frozen=True)
class Expected:
    """A failure that the user's list expects, and whether it still happens."""

    kernel: str
    stage: str
    lane: str
    reason: str
    status: str
    #: Faults that this entry accounts for.
    cases: int

    @property
    def fixed(self) -> bool:
        """Whether the failure no longer happens, so that the entry should go."""
        return self.status == "fixed"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and how a part of the run ran: versions, machine and options of its ``start`` records, flattened to text."""

    label: str
    processes: tuple[str, ...]
    started: float
    facts: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Totals:
    """Counts over the whole run. A kernel counts once per stage; cells are (kernel, lane, preset)."""

    kernels: int
    kernels_failed: int
    cells: dict[Status, int]
    cases: int
    failed_cases: int
    findings: int
    #: Seconds the lanes took, summed over all processes.
    seconds: float


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """A run. ``rows`` and ``cells`` keep the order of the plan; ``faults`` are worst first."""

    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    expected_faults: tuple[Fault, ...]
    expected: tuple[Expected, ...]
    skips: tuple[Reason, ...]
    errors: tuple[Reason, ...]
    #: Sentences on what makes the run incomplete as a whole.
    gaps: tuple[str, ...]
    unreadable: tuple[str, ...]
    unfinished: tuple[str, ...]
    machines: tuple[Machine, ...]
    #: Seconds since the epoch of the first record, and seconds from it to the last one; ``None`` without records.
    started: float | None
    duration: float | None
    totals: Totals

    @property
    def machine_count(self) -> int:
        """Distinct machines; processes of one machine with different options count once."""
        return len(_labels(self.machines))

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell of every row."""
        return tuple(cell for row in self.rows for cell in row.cells)

    @property
    def unrun(self) -> tuple[Reason, ...]:
        """Cells that nothing was recorded for or that were cut short, with the reason, gathered by it."""
        return _gathered(
            (_Key.of(vars(cell)), f"{cell.status}: {'; '.join(cell.stopped_because)}")
            for cell in self.cells
            if cell.status in ("nothing ran", "cut short")
        )

    @property
    def lanes(self) -> tuple[str, ...]:
        """The lanes that were planned or ran, in the order of ``LANE_ORDER``."""
        return tuple(sorted(dict.fromkeys(row.lane for row in self.rows), key=_lane_order))

    @property
    def outcome(self) -> Outcome:
        """``passed`` only if something ran, all that ran passed, and all that had to run did."""
        counts = self.totals.cells
        if counts["failed"]:
            return "failed"
        if self.errors or self.gaps or any(counts[status] for status in _INCOMPLETE):
            return "incomplete" if self.totals.cases or self.errors else "nothing ran"
        return "passed" if self.totals.cases else "nothing ran"

    @property
    def headline(self) -> str:
        """The outcome in one sentence, with everything that did not run."""
        parts = []
        if self.faults:
            faults = text.number(len(self.faults), "fault")
            parts.append(f"{faults} in {self.totals.kernels_failed:,} of {text.number(self.totals.kernels, 'kernel')}")
        else:
            parts.append(f"{text.number(self.totals.cases, 'case')} of {text.number(self.totals.kernels, 'kernel')}")
        parts += [f"{count:,} {status}" for status, count in self.totals.cells.items() if count and status in _WORTH_SAYING]
        fixed = sum(entry.fixed for entry in self.expected)
        if fixed:
            parts.append(f"{fixed:,} expected failure{'s' if fixed > 1 else ''} fixed")
        return ", ".join(parts)


_INCOMPLETE: tuple[Status, ...] = ("could not run", "cut short", "nothing ran")
_WORTH_SAYING: tuple[Status, ...] = (*_INCOMPLETE, "failed as expected", "skipped")

#: Lanes from the cheapest to the dearest; unknown ones come after, by name.
LANE_ORDER = ("eager", "compile_only", "interpret", "simulate", "device")


def _lane_order(lane: str) -> tuple[int, str]:
    return (LANE_ORDER.index(lane) if lane in LANE_ORDER else len(LANE_ORDER), lane)


def _orderable(value: float) -> float:
    return math.inf if math.isnan(value) else value


@dataclasses.dataclass(frozen=True)
class _Key:
    """What names a cell. Blank fields of a skip, an error or an expectation stand for every value."""

    kernel: str
    stage: str
    lane: str
    preset: str

    @classmethod
    def of(cls, fields: Record | Mapping[str, Any]) -> _Key:
        values = fields if isinstance(fields, Mapping) else vars(fields)
        return cls(*(str(values.get(name) or "") for name in ("kernel", "stage", "lane", "preset")))

    def covers(self, other: _Key) -> bool:
        return (
            self.kernel in ("", other.kernel)
            and self.stage in ("", other.stage)
            and self.lane in ("", other.lane)
            and self.preset in ("", other.preset)
        )


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
    # Dictionaries keep what they have seen in order, each once.
    sources: dict[str, None] = dataclasses.field(default_factory=dict)
    processes: dict[str, None] = dataclasses.field(default_factory=dict)
    skipped: dict[str, None] = dataclasses.field(default_factory=dict)
    errors: dict[str, None] = dataclasses.field(default_factory=dict)
    expected: str = ""
    fixed: bool = False

    def add(self, record: Record) -> None:
        self.cases += 1
        self.failed_cases += _failed(record)
        self.findings += len(record.findings)
        self.checks[record.check or "unnamed"] += 1
        if record.profile and not _failed(record):
            self.profiles[record.profile] += 1
        if record.share is not None:
            self.shares.append(record.share)
        if record.seconds is not None and math.isfinite(record.seconds):
            self.seconds += record.seconds
        if isinstance(record.peak_memory, int):
            self.peak_memory = max(self.peak_memory or 0, record.peak_memory)
        self.processes[record.process] = None
        self.toolchain = self.toolchain or str(record.toolchain)
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
    tally_of_row: dict[_Key, list[tuple[_Key, _Tally]]] = {}
    for key, tally in tallies.items():
        tally_of_row.setdefault(dataclasses.replace(key, preset=""), []).append((key, tally))
    unfinished = frozenset(log.unfinished)
    rows = tuple(_row(key, members, unfinished) for key, members in tally_of_row.items())
    cells = [cell for row in rows for cell in row.cells]
    rows = _in_order(rows)

    known = _faults(
        log, {key for key, tally in tallies.items() if tally.expected}, machine_of if len(_labels(machines)) > 1 else {}
    )
    times = [record.time for record in log.records if record.time and math.isfinite(record.time)]
    summary = RunSummary(
        rows=rows,
        faults=tuple(fault for fault in known if not fault.expected),
        expected_faults=tuple(fault for fault in known if fault.expected),
        expected=_expected(log, tallies),
        skips=_gathered((_Key.of(record), str(record.reason)) for record in log.of("skip")),
        errors=_gathered((_Key.of(record), str(record.reason)) for record in log.of("error")),
        gaps=(),
        unreadable=log.unreadable,
        unfinished=log.unfinished,
        machines=machines,
        started=min(times) if times else None,
        duration=max(times) - min(times) if times else None,
        totals=_totals(cells),
    )
    return dataclasses.replace(summary, gaps=_gaps(log, summary))


def _failed(record: Record) -> bool:
    # Anything but a clean pass fails: a record that says "passed" and holds a finding is not believed.
    return bool(record.findings) or record.status != "passed"


def _tallies(log: Log) -> dict[_Key, _Tally]:
    tallies: dict[_Key, _Tally] = {}
    for record in log.of("start"):
        for entry in _plan(record):
            tallies.setdefault(_Key.of(entry), _Tally())
    for record in log.of("case"):
        tallies.setdefault(_Key.of(record), _Tally()).add(record)

    # Distinct ones only: a run that skips the same thing a thousand times says it once.
    notes = dict.fromkeys(
        (record.event, _Key.of(record), str(record.reason), str(record.status), str(record.process))
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


def _row(key: _Key, members: Sequence[tuple[_Key, _Tally]], unfinished: frozenset[str]) -> Row:
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


def _cell(key: _Key, tally: _Tally, unfinished: frozenset[str]) -> Cell:
    cut_short = [process for process in tally.processes if process in unfinished]
    stopped = list(tally.errors)
    status: Status
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
        profiles=tuple(tally.profiles.most_common()),
        skipped_because=tuple(tally.skipped),
        stopped_because=tuple(stopped),
        expected_because=tally.expected if tally.failed_cases else "",
        fixed=tally.fixed,
    )


def _shares(values: Sequence[float]) -> Shares:
    if not values:
        return Shares()
    ordered = sorted(values, key=_orderable)
    histogram = [0] * (BINS + 1)
    for value in ordered:
        within = value <= 1  # false for NaN
        histogram[min(max(int(value * BINS), 0), BINS - 1) if within else BINS] += 1
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
    return tuple(sorted(rows, key=lambda row: (stages[row.stage], kernels[row.stage, row.kernel], _lane_order(row.lane))))


def _faults(log: Log, expected: set[_Key], machine_of: Mapping[str, str]) -> list[Fault]:
    cases: Counter[_Key] = Counter()
    groups: dict[tuple[object, ...], list[tuple[Record, Finding | None]]] = {}
    for record in log.of("case"):
        key = _Key.of(record)
        row = dataclasses.replace(key, preset="")
        cases[row] += 1
        if _failed(record):
            first = worst_first(list(record.findings))[0] if record.findings else None
            identity = (first.detector, first.argument) if first else (_NO_FINDING, None)
            message = _alike(first.message) if first and first.detector in _TOLD_APART_BY_MESSAGE else ""
            groups.setdefault((row, *identity, message, key in expected), []).append((record, first))

    options_of = {record.process: _options(record) for record in log.of("start")}
    faults = []
    for group in groups.values():
        # The first of the equally bad ones, so that the same records always give the same example.
        record, first = max(group, key=lambda member: _badness(member[1]))
        also = Counter(
            name
            for other, cause in group
            for name in {found.detector for found in other.findings}
            if cause and name != cause.detector
        )
        row = dataclasses.replace(_Key.of(record), preset="")
        faults.append(
            Fault(
                kernel=row.kernel,
                stage=row.stage,
                lane=row.lane,
                presets=_distinct(str(other.preset) for other, _ in group),
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
                machines=_distinct(machine_of.get(other.process, "") for other, _ in group),
                expected=_Key.of(record) in expected,
            )
        )
    order = {name: place for place, name in enumerate(DETECTORS)}
    return sorted(faults, key=lambda fault: (order.get(fault.detector, len(order)), -fault.magnitude, -fault.failed_cases))


def _options(start: Record) -> Mapping[str, object]:
    options = start.details.get("options") if isinstance(start.details, Mapping) else None
    return options if isinstance(options, Mapping) else {}


def _alike(message: object) -> str:
    """A message without what differs from case to case: numbers, and everything after its first line."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", text.one_line(str(message).strip().split("\n", 1)[0], 200))


def _badness(finding: Finding | None) -> tuple[float, float]:
    if finding is None:
        return (math.inf, 0.0)
    return (_orderable(finding.magnitude), _orderable(finding.ulps or 0.0))


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value))


def _gathered(reasons_of: Iterable[tuple[_Key, str]]) -> tuple[Reason, ...]:
    """What did not run, one entry per reason and lane."""
    grouped: dict[tuple[str, str], dict[_Key, int]] = {}
    for key, reason in reasons_of:
        members = grouped.setdefault((reason or "no reason given", key.lane), {})
        members[key] = members.get(key, 0) + 1
    reasons = [
        Reason(
            reason=reason,
            lane=lane,
            kernels=_distinct(key.kernel for key in members),
            presets=_distinct(key.preset for key in members),
            count=sum(members.values()),
        )
        for (reason, lane), members in grouped.items()
    ]
    return tuple(sorted(reasons, key=lambda reason: (_lane_order(reason.lane), -len(reason.kernels))))


def _expected(log: Log, tallies: Mapping[_Key, _Tally]) -> tuple[Expected, ...]:
    entries: dict[tuple[_Key, str, str], None] = {}
    for record in log.of("expected"):
        key = dataclasses.replace(_Key.of(record), preset="")
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
        found[facts] = dataclasses.replace(known, processes=_distinct((*known.processes, str(record.process))))
        machine_of[record.process] = known.label
    return tuple(found.values()), machine_of


def _labels(machines: Iterable[Machine]) -> frozenset[str]:
    return frozenset(machine.label for machine in machines)


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
