"""The log of a run: one JSON line per event, flushed as it happens, from which every report is built.

A run's folder holds one ``records-*.jsonl`` file per process that judged. A line is never changed or removed, and a process
that is killed loses at most the line it was writing. Events:

``start``    once per process: when, versions, machine, options, and what was planned (kernel, lane, dims)
``case``     one judged run of a kernel on a case: verdict, case key, seconds
``skip``     something that was planned and did not run, with the reason
``error``    something that had to run and could not (no compiler, a file that does not import, ...)
``expected`` a failure that the user's list expects, and whether it still happens
``end``      once per process: exit code; a file without it belongs to a run that was cut short
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conformance.errors import UsageError
from conformance.judge.verdict import Finding

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """One event. Fields that do not apply to an event are empty and left out of its line."""

    event: str
    kernel: str = ""
    stage: str = ""
    lane: str = ""
    toolchain: str = ""
    #: The preset's name, and the file the kernel is from, relative to where the run began.
    preset: str = ""
    source: str = ""
    #: What was checked: ``example``, ``repeat``, ``permuted_rows``, ``lone_row``, ``all_passes``, ``compile``,
    #: or ``pooled``: all cases together, of which ``case`` is the one that tells most.
    check: str = ""
    case: str = ""
    status: str = ""  # "passed" or "failed" for a case; the lane's status otherwise
    findings: tuple[Finding, ...] = ()
    share: float | None = None
    profile: str | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    reason: str = ""
    #: Everything else of an event: versions, machine, options, plan, exit code.
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: Seconds since the epoch.
    time: float = 0.0
    #: The process whose file holds the record; ``read_run`` fills it in.
    process: str = ""

    def to_json(self) -> str:
        """One line of JSON."""
        fields: dict[str, Any] = {"schema": SCHEMA}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "process":
                continue  # the file's name says it
            if field.name == "findings":
                value = [finding.to_json() for finding in value]
            elif isinstance(value, float) and value - value != 0.0:
                value = str(value)
            if value not in ("", None, [], {}):
                fields[field.name] = value
        return json.dumps(fields, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The inverse of ``to_json``; raises ``ValueError`` for a line that is not a record of a known schema."""
        data = json.loads(line)
        if not isinstance(data, dict) or "event" not in data:
            raise ValueError("not a record")
        if data.get("schema") != SCHEMA:
            raise ValueError(f"record schema {data.get('schema')!r}, this version reads {SCHEMA}")
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in data.items() if name in known}
        fields["findings"] = tuple(Finding.from_json(item) for item in fields.get("findings", ()))
        for name in ("share", "seconds", "time"):
            if name in fields:
                fields[name] = float(fields[name])
        return cls(**fields)


class RecordWriter:
    """Appends records to one file of a run's folder, each flushed before the next step begins."""

    def __init__(self, folder: Path, process: str = "main") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"records-{process}.jsonl"
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record, stamped with the time if it has none."""
        stamped = record if record.time else dataclasses.replace(record, time=round(time.time(), 3))
        self._file.write(stamped.to_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()


class RunFollower:
    """Counts what the processes of a run record, while they do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        #: Judged runs, and the findings of all of them.
        self.runs = 0
        self.findings = 0

    def follow(self) -> None:
        """Read what has been written since the last time. A line that is not whole yet, or no record, is left alone."""
        for path in self._folder.glob("records-*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                whole, end, _ = file.read().rpartition(b"\n")
            self._read[path] = self._read.get(path, 0) + len(whole) + len(end)
            for line in whole.splitlines():
                try:
                    record = Record.from_json(line.decode("utf-8", "replace"))
                except (ValueError, TypeError, AttributeError, RecursionError):
                    continue  # the report names it
                if record.event == "case":
                    self.runs += 1
                    self.findings += len(record.findings)


@dataclasses.dataclass(frozen=True)
class Log:
    """Every record of a run, the lines that could not be read (file name, line number, why), and the processes cut short.

    ``unfinished`` names the processes whose file lacks an ``end`` for a ``start``: killed, or still at work.
    """

    records: tuple[Record, ...]
    unreadable: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()

    def of(self, event: str) -> Iterator[Record]:
        """Records of one event."""
        return (record for record in self.records if record.event == event)


def read_run(folder: Path) -> Log:
    """Read a run's folder, in the order of time; raises ``UsageError`` if there is no record in it."""
    files = sorted(folder.glob("records-*.jsonl")) if folder.is_dir() else []
    if not files:
        raise UsageError(f"no run in {folder}: expected records-*.jsonl files")
    records: list[Record] = []
    unreadable: list[str] = []
    unfinished: list[str] = []
    for file in files:
        process = file.stem.removeprefix("records-")
        events: list[str] = []
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            try:
                record = dataclasses.replace(Record.from_json(line), process=process)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                unreadable.append(f"{file.name}:{number}: {error}")
                continue
            records.append(record)
            events.append(record.event)
        # A file that two sessions appended to holds two starts; one whose first line is torn holds none.
        if events.count("end") < max(1, events.count("start")):
            unfinished.append(process)
    records.sort(key=lambda record: record.time)
    return Log(tuple(records), tuple(unreadable), tuple(unfinished))
