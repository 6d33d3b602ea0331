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

import contextlib
import dataclasses
import errno
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conformance.errors import UsageError
from conformance.judge.verdict import Finding
from conformance.outside import Fields, plain, require_path

SCHEMA = 1
#: Longest text of a record; a kernel may raise an error with any message.
LONGEST_TEXT = 20_000
#: Longest line that is read, in bytes: many times what is written.
LONGEST_LINE = 16 << 20


@dataclasses.dataclass(frozen=True)
class Record:
    """One event. Fields that do not apply to an event are empty and left out of its line."""

    event: str
    kernel: str = ""
    stage: str = ""
    lane: str = ""
    toolchain: str = ""
    #: The preset's name, of a case that of its key, and the file the kernel is from, relative to where the run began.
    preset: str = ""
    source: str = ""
    #: What was checked: ``example``, ``repeat``, ``permuted_rows``, ``lone_row``, ``all_passes``, ``compile``, ``step``
    #: (one that goes on from the case), or ``pooled``: all cases together, of which ``case`` is the one that tells most.
    check: str = ""
    case: str = ""
    status: str = ""  # "passed" or "failed" for a case; the lane's status otherwise
    findings: tuple[Finding, ...] = ()
    share: float | None = None
    profile: str | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    reason: str = ""
    #: Everything else of an event: versions, machine, options, plan, exit code; of a case that was compiled and not executed
    #: ``compile``, which is ``host compile`` without the kernels of the cores, or ``device compile``; of a case on a card which
    #: one, compiles, seconds by its clock (of repeats the median), ``launches`` of repeats, and ``given_up``: by number the cards
    #: that were used no more from then on, each with the reason.
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
                value = [{**finding.to_json(), "message": plain(finding.message, LONGEST_TEXT)} for finding in value]
            elif field.name == "reason":
                value = plain(value, LONGEST_TEXT)
            elif isinstance(value, float) and value - value != 0.0:
                value = str(value)
            if value not in ("", None, [], {}):
                fields[field.name] = value
        return json.dumps(fields, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The inverse of ``to_json``, but for characters that nobody should be shown.

        Every field is of its type, and the ``details`` of a ``start`` hold what it planned, so that whoever reads a record can
        rely on them. Raises ``ValueError`` for a line that is not a record of a known schema.
        """
        data = json.loads(line)
        fields = Fields(data, "a record")
        schema = fields.count("schema")
        if schema != SCHEMA:
            raise ValueError(f"record schema {schema!r}, this version reads {SCHEMA}")
        event = fields.text("event")
        if not event:
            raise ValueError("not a record: it has no event")
        return cls(
            event,
            **{name: fields.text(name) for name in _TEXTS},
            findings=tuple(Finding.from_json(item) for item in fields.items("findings")),
            share=fields.measure("share"),
            profile=fields.optional_text("profile"),
            seconds=fields.duration("seconds"),
            peak_memory=fields.count("peak_memory"),
            details=_details(event, fields.tree("details")),
            time=fields.moment("time"),
        )


#: The number of a card, as it stands in a record.
_CARD = re.compile(r"[0-9]{1,4}")
_TEXTS = ("kernel", "stage", "lane", "toolchain", "preset", "source", "check", "case", "status", "reason")


def _details(event: str, found: dict[str, Any]) -> dict[str, Any]:
    """The details of an event, with what the reports look at in them checked."""
    fields = Fields(found, "an object")
    if event == "start":
        plan = []
        for entry in fields.items("plan"):
            planned = Fields(entry, "a kernel that is planned")
            names = {name: planned.text(name) for name in ("kernel", "stage", "lane", "preset")}
            plan.append({**names, "capabilities": planned.texts("capabilities"), "capacity": planned.count("capacity")})
        return {**found, "plan": plan, "options": fields.tree("options")}
    if event == "case":  # of a run on a card
        fields.count("card"), fields.count("compiles"), fields.duration("device_seconds"), fields.count("launches")
        given_up = Fields(fields.tree("given_up"), "the cards that were given up")
        if "given_up" in found:
            found = {**found, "given_up": {name: given_up.text(name) for name in found["given_up"] if _CARD.fullmatch(name)}}
    if event == "end":
        return {**found, "exit_code": fields.count("exit_code")}
    return found


class RecordWriter:
    """Appends records to one file of a run's folder, each written before the next step begins.

    Raises ``UsageError`` if there can be no such file. What cannot be written later, on a full disk, is kept and tried again with
    the next record: judging goes on, and ``failure`` says why something is still missing.
    """

    def __init__(self, folder: Path, process: str = "main") -> None:
        self.path = folder / f"records-{process}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"cannot keep a run in {folder}: {error.strerror or error}") from error
        self._left = b""
        self._closed = False
        #: Whether another run has its records here by now: the file was removed, and made again by somebody else.
        self.taken = False
        #: Why records are missing in the file, or an empty string.
        self.failure = ""

    def write(self, record: Record) -> None:
        """Append one record, stamped with the time if it has none."""
        stamped = record if record.time else dataclasses.replace(record, time=round(time.time(), 3))
        self._left += (stamped.to_json() + "\n").encode()
        self._try(self._descriptor)

    def close(self) -> None:
        """Close the file; closing twice is harmless. A file that was removed meanwhile is written again."""
        if self._closed:
            return
        self._closed = True
        self._try(self._descriptor)
        try:
            self._restore()
        except OSError as error:
            self.taken = isinstance(error, FileExistsError)
            self.failure = f"they were removed, and cannot be written again: {error.strerror or error}"
        os.close(self._descriptor)

    def _try(self, descriptor: int) -> None:
        try:
            while self._left:
                self._left = self._left[os.write(descriptor, self._left) :]
            self.failure = ""
        except OSError as error:
            self.failure = error.strerror or str(error)

    def _restore(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self.path.stat(), os.fstat(self._descriptor)):
                return
            raise FileExistsError(errno.EEXIST, "another run is kept there")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not over a file that another run has made here.
        with open(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as again:
            size = os.fstat(self._descriptor).st_size
            again.write(os.pread(self._descriptor, size, 0) + self._left)


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
            try:
                with path.open("rb") as file:
                    file.seek(self._read.get(path, 0))
                    whole, end, _ = file.read().rpartition(b"\n")
            except OSError:  # removed meanwhile
                continue
            self._read[path] = self._read.get(path, 0) + len(whole) + len(end)
            for line in whole.split(b"\n") if whole else ():
                try:
                    record = Record.from_json(line.decode("utf-8", "replace"))
                except (ValueError, RecursionError):
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
    """Read a run's folder, in the order of time; raises ``UsageError`` if there is no record in it.

    Lines that are no records of this version are left out, and named in ``unreadable``.
    """
    require_path(folder)
    files = sorted(folder.glob("records-*.jsonl")) if folder.is_dir() else []
    if not files:
        raise UsageError(f"no run in {folder}: expected records-*.jsonl files")
    records: list[Record] = []
    unreadable: list[str] = []
    unfinished: list[str] = []
    for file in files:
        process = plain(file.stem.removeprefix("records-"))
        events: list[str] = []
        try:
            for number, line in enumerate(_lines(file), start=1):
                try:
                    record = dataclasses.replace(Record.from_json(line), process=process)
                except (ValueError, RecursionError) as error:
                    unreadable.append(plain(f"{file.name}:{number}: {error}", 300))
                    continue
                records.append(record)
                events.append(record.event)
        except OSError as error:
            unreadable.append(plain(f"{file.name}: {error.strerror or error}"))
        # A file that two sessions appended to holds two starts; one whose first line is torn holds none.
        if events.count("end") < max(1, events.count("start")):
            unfinished.append(process)
    records.sort(key=lambda record: record.time)
    return Log(tuple(records), tuple(unreadable), tuple(unfinished))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, of those that are too long only the beginning; raises ``OSError`` if it is no regular file."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is no regular file")
        while line := file.readline(LONGEST_LINE):
            whole = line.endswith(b"\n") or len(line) < LONGEST_LINE
            while not whole:
                more = file.readline(LONGEST_LINE)
                whole = more.endswith(b"\n") or len(more) < LONGEST_LINE
                line = line[:100]
            yield line.decode("utf-8", "replace").rstrip("\r\n")
