"""What a run amounts to, from its records alone: one frozen ``RunSummary`` that every report is rendered from.

The rule behind every status: a check that did not run is not a pass. A planned cell without a record says "nothing ran", a cell
that a killed process was judging says "cut short", and a line that cannot be read makes the run incomplete.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from conformance.judge.verdict import DETECTORS, Finding
from conformance.lanes import LANES
from conformance.reports import text
from conformance.reports.cards import Cards
from conformance.running.records import Record

CellStatus = Literal["failed", "could not run", "cut short", "nothing ran", "failed as expected", "passed", "skipped"]

#: Every status of a cell, and what it means; a row of several cells shows the first one in this order that any of them has.
STATUSES: dict[CellStatus, str] = {
    "failed": "at least one case has a finding",
    "could not run": "it had to run and could not",
    "cut short": "passed so far, but the process that judged it did not end",
    "nothing ran": "planned, and no record of it",
    "failed as expected": "fails, and is listed as an expected failure",
    "passed": "every case that ran passed",
    "skipped": "not run, for the reason given",
}

RunOutcome = Literal["failed", "incomplete", "nothing ran", "passed"]

#: Bins of a histogram of shares: ``BINS`` equal ones from 0 to the whole allowance, then one for everything beyond it.
BINS = 20


#: How far a lane that executes nothing compiled: the host's part alone, or the kernels of the cores with the device's compiler
#: too. Two verdicts: what only the device's compiler refuses does not show without it.
COMPILES = ("host compile", "device compile")


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
    status: CellStatus
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
    #: Which of ``COMPILES`` were made, where nothing is executed: ``host compile``, or ``host compile failed``.
    compiles: tuple[str, ...]
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
    status: CellStatus
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
        """What the status does not say about the cells, to be put behind it: ``", host compile, 1 nothing ran, 2 skipped"``."""
        others = [cell.status for cell in self.cells if cell.status not in (self.status, "passed", "skipped")]
        compiles = {kind for cell in self.cells for kind in cell.compiles}
        remarks = [kind for one in COMPILES for kind in (f"{one} failed", one) if kind in compiles]
        remarks += [f"{others.count(status)} {status}" for status in STATUSES if status in others]
        if self.skipped and self.status != "skipped":
            remarks.append(f"{self.skipped} skipped")
        if self.fixed:
            remarks.append("fixed")
        return "".join(f", {remark}" for remark in remarks)


@dataclasses.dataclass(frozen=True)
class Problem:
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
        return orderable(self.example.magnitude) if self.example else math.inf

    @property
    def measures(self) -> tuple[str, ...]:
        """Where the worst case is wrong and by how much, in a few words each."""
        example = self.example
        if example is None:
            return ()
        place = text.position(example.argument, example.index, example.where)
        measures = [
            f"worst at {text.one_line(place, 200)}" if place else "",
            text.share_in_words(example.share) if example.share is not None and self.detector != "element" else "",
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
    #: Problems that this entry accounts for.
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
    cells: dict[CellStatus, int]
    cases: int
    failed_cases: int
    findings: int
    #: Seconds the lanes took, summed over all processes.
    seconds: float


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """A run. ``rows`` and ``cells`` keep the order of the plan; ``problems`` are worst first."""

    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    expected_problems: tuple[Problem, ...]
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
    #: What was done on cards, if anything was.
    cards: Cards | None

    @property
    def machine_count(self) -> int:
        """Distinct machines; processes of one machine with different options count once."""
        return len(machine_labels(self.machines))

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell of every row."""
        return tuple(cell for row in self.rows for cell in row.cells)

    @property
    def unrun(self) -> tuple[Reason, ...]:
        """Cells that nothing was recorded for or that were cut short, with the reason, gathered by it."""
        return gathered(
            (CellName.of(vars(cell)), f"{cell.status}: {'; '.join(cell.stopped_because)}")
            for cell in self.cells
            if cell.status in ("nothing ran", "cut short")
        )

    @property
    def lanes(self) -> tuple[str, ...]:
        """The lanes that were planned or ran, in the order of ``lane_order``."""
        return tuple(sorted(dict.fromkeys(row.lane for row in self.rows), key=lane_order))

    @property
    def outcome(self) -> RunOutcome:
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
        if self.problems:
            problems = text.number(len(self.problems), "problem")
            parts.append(f"{problems} in {self.totals.kernels_failed:,} of {text.number(self.totals.kernels, 'kernel')}")
        else:
            parts.append(f"{text.number(self.totals.cases, 'case')} of {text.number(self.totals.kernels, 'kernel')}")
        parts += [f"{count:,} {status}" for status, count in self.totals.cells.items() if count and status in _WORTH_SAYING]
        fixed = sum(entry.fixed for entry in self.expected)
        if fixed:
            parts.append(f"{fixed:,} expected failure{'s' if fixed > 1 else ''} fixed")
        return ", ".join(parts)


_INCOMPLETE: tuple[CellStatus, ...] = ("could not run", "cut short", "nothing ran")
_WORTH_SAYING: tuple[CellStatus, ...] = (*_INCOMPLETE, "failed as expected", "skipped")


def lane_order(lane: str) -> tuple[int, str]:
    """Lanes from the cheapest to the dearest; those that only another version has come after, by name."""
    known = [one.name for one in LANES]
    return (known.index(lane) if lane in known else len(known), lane)


def orderable(value: float) -> float:
    """A value that can be sorted: NaN as infinity."""
    return math.inf if math.isnan(value) else value


@dataclasses.dataclass(frozen=True)
class CellName:
    """What names a cell. Blank fields of a skip, an error or an expectation stand for every value."""

    kernel: str
    stage: str
    lane: str
    preset: str

    @classmethod
    def of(cls, fields: Record | Mapping[str, Any]) -> CellName:
        values = fields if isinstance(fields, Mapping) else vars(fields)
        return cls(*(str(values.get(name) or "") for name in ("kernel", "stage", "lane", "preset")))

    def covers(self, other: CellName) -> bool:
        return (
            self.kernel in ("", other.kernel)
            and self.stage in ("", other.stage)
            and self.lane in ("", other.lane)
            and self.preset in ("", other.preset)
        )


def distinct(values: Iterable[str]) -> tuple[str, ...]:
    """Non-empty values, each once, in their order."""
    return tuple(dict.fromkeys(value for value in values if value))


def gathered(reasons_of: Iterable[tuple[CellName, str]]) -> tuple[Reason, ...]:
    """What did not run, one entry per reason and lane."""
    grouped: dict[tuple[str, str], dict[CellName, int]] = {}
    for key, reason in reasons_of:
        members = grouped.setdefault((reason or "no reason given", key.lane), {})
        members[key] = members.get(key, 0) + 1
    reasons = [
        Reason(
            reason=reason,
            lane=lane,
            kernels=distinct(key.kernel for key in members),
            presets=distinct(key.preset for key in members),
            count=sum(members.values()),
        )
        for (reason, lane), members in grouped.items()
    ]
    return tuple(sorted(reasons, key=lambda reason: (lane_order(reason.lane), -len(reason.kernels))))


def machine_labels(machines: Iterable[Machine]) -> frozenset[str]:
    """The labels of some machines."""
    return frozenset(machine.label for machine in machines)
