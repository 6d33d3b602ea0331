"""A run as it is kept: its folder, its plan and its records. The command and the pytest plugin both write through this."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import platform
import secrets
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import conformance
from conformance.contract.kernel import Declaration
from conformance.contract.registry import names_in_short, short_name
from conformance.errors import UsageError
from conformance.lanes import LANES
from conformance.lanes.base import Outcome
from conformance.outside import one_line, read_text, require_path
from conformance.running.records import Record, RecordWriter
from conformance.running.runs import Judged

#: Longest list of expected failures, in bytes.
LONGEST_LIST = 1 << 20
#: Packages whose versions a report has to name.
_PACKAGES = ("torch", "torch_npu", "pypto", "numpy", "hypothesis", "pytest")


def new_run_folder(root: Path) -> Path:
    """A folder for a new run below ``root``, named by the time; not made yet."""
    return root / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class ClaimedFolder:
    """A run's folder, made if need be; until ``release`` no other run can be kept there, also one that starts at this moment.

    Raises ``UsageError`` if it holds a run, belongs to one, or cannot be written to: two runs in one folder would be reported as
    one. A folder that was made for nothing is removed again.
    """

    def __init__(self, folder: Path) -> None:
        require_path(folder)
        self.folder = folder
        try:
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"a run is kept in a folder, {folder} is a file")
            self._made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"cannot keep a run in {folder}: {error.strerror or error}") from error
        try:
            self._claim()
        except UsageError:
            os.close(self._descriptor)
            raise

    def _claim(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{self.folder} belongs to a run that is not over: name another folder") from error
        except OSError:
            pass  # a file system without locks
        if any(self.folder.glob("records-*.jsonl")):
            raise UsageError(f"{self.folder} already holds a run: name another folder, or remove it")
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise UsageError(f"cannot keep a run in {self.folder}: it is not writable")

    def release(self) -> None:
        """Let others have the folder; releasing twice is harmless."""
        if self._descriptor >= 0:
            if self._made:
                with contextlib.suppress(OSError):  # unless a run was kept there
                    self.folder.rmdir()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> ClaimedFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Of the harness, Python and the packages that matter."""
    return {
        "conformance": conformance.__version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
    }


def machine_details() -> dict[str, Any]:
    """What a record says of this machine."""
    return {
        "hostname": platform.node(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 0,
    }


@dataclasses.dataclass(frozen=True)
class Subject:
    """One kernel at one preset on one lane: what a line of the summary is about; at every preset of a run if it is empty.

    At a model's real size ``overrides`` are dimensions other than the preset's, ``memory`` the bytes that a machine must have.
    """

    kernel: Declaration
    preset: str
    lane: str
    overrides: tuple[tuple[str, int], ...] = ()
    memory: int = 0
    #: What the kernel is called, if its own name would not do: kernels of two models may have one.
    called: str = ""

    @property
    def name(self) -> str:
        """What the kernel is called in records and reports."""
        return self.called or self.kernel.name

    @property
    def id(self) -> str:
        """``kernel-preset``, as it stands in a test's name, and the dimensions that are overridden."""
        return "-".join([self.name, self.preset, *(f"{name}={size}" for name, size in self.overrides)])


class RunLog:
    """Writes the records of one process of a run."""

    def __init__(self, folder: Path, process: str = "main") -> None:
        self.folder = folder
        self._writer = RecordWriter(folder, process)

    def start(self, plan: Iterable[Subject], options: Mapping[str, Any]) -> None:
        """The first record: what is planned, with which versions, where and how."""
        planned = [
            {
                "kernel": subject.name,
                "stage": short_name(subject.kernel.stage),
                "lane": subject.lane,
                "preset": subject.preset,
                "capabilities": list(subject.kernel.capabilities),
                "capacity": subject.kernel.capacity,
                "sha256": subject.kernel.digest,
            }
            for subject in plan
        ]
        details = {"plan": planned, "versions": versions(), "machine": machine_details(), "options": dict(options)}
        self._writer.write(Record("start", details=details))

    def judged(self, subject: Subject, run: Judged) -> None:
        """One judged run, at the preset of its case."""
        subject = dataclasses.replace(subject, preset=run.case.preset)
        self._writer.write(
            dataclasses.replace(
                self._about("case", subject),
                check=run.check,
                case=str(run.case),
                status="passed" if run.verdict.ok else "failed",
                findings=run.verdict.findings,
                share=run.verdict.share,
                profile=run.verdict.profile,
                seconds=round(run.outcome.seconds, 4),
                peak_memory=run.outcome.peak_memory,
                details=_details(run.outcome),
            )
        )
        if run.outcome.status == "ok" and run.outcome.message:
            self.skipped(subject, run.outcome.message)

    def skipped(self, subject: Subject, reason: str) -> None:
        """Something planned that did not run."""
        self._writer.write(dataclasses.replace(self._about("skip", subject), reason=reason))

    def could_not_run(self, subject: Subject, reason: str) -> None:
        """Something that had to run and could not."""
        self._writer.write(dataclasses.replace(self._about("error", subject), reason=reason))

    def expected(self, subject: Subject, reason: str, fixed: bool) -> None:
        """A failure that the user's list expects, and whether it still happens."""
        status = "fixed" if fixed else "failed as expected"
        self._writer.write(dataclasses.replace(self._about("expected", subject), reason=reason, status=status))

    @property
    def failure(self) -> str:
        """Why records could not be kept, in a line; an empty string if all are."""
        why = self._writer.failure
        return f"cannot keep all records in {self.folder}: {why}" if why else ""

    @property
    def taken(self) -> bool:
        """Whether another run is kept in the folder by now, of which reports are not for this one to build."""
        return self._writer.taken

    def end(self, exit_code: int) -> list[str]:
        """The last record of a process that ended by itself. Returns a line if records are lost, else none."""
        self._writer.write(Record("end", details={"exit_code": exit_code}))
        self._writer.close()
        return [self.failure] if self.failure else []

    def _about(self, event: str, subject: Subject) -> Record:
        kernel = subject.kernel
        return Record(
            event,
            kernel=subject.name,
            stage=short_name(kernel.stage),
            lane=subject.lane,
            toolchain=kernel.toolchain,
            preset=subject.preset,
            source=relative_source(kernel),
        )


def _details(outcome: Outcome) -> dict[str, Any]:
    """What a record keeps of how far a kernel was compiled, or of a run on a card."""
    if outcome.card is None:
        return {"compile": outcome.compiled} if outcome.compiled else {}
    found: dict[str, Any] = {"card": outcome.card, "compiles": outcome.compiles, "device_seconds": outcome.device_seconds}
    if outcome.launches > 1:
        found["launches"] = outcome.launches
    if outcome.given_up:
        found["given_up"] = {str(number): reason for number, reason in outcome.given_up.items()}
    return {name: value for name, value in found.items() if value is not None}


def relative_source(kernel: Declaration) -> str:
    """The kernel's file, relative to the current folder where it lies below it."""
    path = kernel.source.resolve()
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@dataclasses.dataclass(frozen=True)
class ExpectedFailures:
    """Kernels of a user's that are known to fail: name (and lane, if only one) to reason."""

    reasons: Mapping[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def read(cls, path: Path) -> ExpectedFailures:
        """From a file of lines ``KERNEL[@LANE] REASON``; ``#`` starts a comment.

        Raises ``UsageError`` for a file that cannot be read and for a line without reason.
        """
        text = read_text(path, "the list of expected failures", LONGEST_LIST)
        reasons = {}
        for number, line in enumerate(text.splitlines(), start=1):
            content = line.split("#", 1)[0].strip()
            if not content:
                continue
            name, _, reason = content.partition(" ")
            if not reason.strip():
                raise UsageError(f"{path}:{number}: expected KERNEL[@LANE] and a reason, found {one_line(content, 60)!r}")
            kernel, _, lane = name.partition("@")
            reasons[kernel, lane] = reason.strip()
        return cls(reasons, path)

    def reason(self, subject: Subject) -> str | None:
        """Why this subject is expected to fail, or ``None`` if it is not."""
        names = (subject.name, subject.kernel.id)
        keys = [(name, lane) for lane in (subject.lane, "") for name in names]
        return next((self.reasons[key] for key in keys if key in self.reasons), None)

    def require_known(self, kernels: Iterable[Declaration]) -> None:
        """Raise ``UsageError`` for an entry that matches no kernel: a typing error would otherwise hide."""
        short = names_in_short(kernel.id for kernel in kernels)
        names = set(short.values())
        for kernel, lane in self.reasons:
            known = [one.name for one in LANES]
            if lane and lane not in known:
                raise UsageError(f"{self.path}: unknown lane {lane!r} of {kernel}; known are {', '.join(known)}")
            if kernel not in names and kernel not in short:
                raise UsageError(f"{self.path}: no kernel {kernel!r} is judged here; known are {', '.join(sorted(names))}")
