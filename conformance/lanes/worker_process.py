"""A worker process as its owner sees it: started on first use, asked, limited, killed, started anew; never left behind."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import msgspec

from conformance.contract.registry import models
from conformance.errors import UnavailableError, UsageError
from conformance.lanes.arena import Arena
from conformance.lanes.base import Outcome
from conformance.lanes.channel import Channel, ChannelError
from conformance.lanes.forking import fork_server
from conformance.lanes.keeper import UNKNOWN_EXIT, KeptProcess, python_command
from conformance.lanes.messages import MOST_TEXT, Answer, Message, Opening, Refused, decode_answer, encode
from conformance.lanes.scratch import ScratchFolder
from conformance.outside import one_line, plain, tail_of
from conformance.toolchains.detection import ToolchainUnavailableError

#: Set in a worker's environment: a kernel's file that itself judges kernels would start workers without end.
INSIDE_WORKER = "CONFORMANCE_INSIDE_WORKER"
#: How often limits are looked at, in seconds. A kernel that allocates as fast as memory allows gains some 100 MB in between.
POLL_SECONDS = 0.05
#: How long a worker that is to be killed may take to say where it is, in seconds.
STACK_SECONDS = 1.0
#: How long a keeper may take to end what its worker has left, in seconds: longer than it tries.
_END_SECONDS = 15.0
#: How much of what a dead worker printed is shown.
TAIL_LINES = 12
#: A worker's log is emptied when it is larger than this, in bytes: after a run, and while a run goes on.
LOG_LIMIT, RUNNING_LOG_LIMIT = 1 << 20, 64 << 20

#: A frame as a traceback prints it, with its text and the marks below that; most are of this package.
_FRAME = re.compile(r'^  File ".*\n?(?:    .*\n?)*', re.MULTILINE)
#: What else the fault handler prints, which is reduced to the kernel's own line.
_FAULT_HANDLER = re.compile(r"Traceback \(most recent|  <.*>$|Extension modules:|(Current thread|Thread) 0x")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a kernel may use: wall-clock seconds of one run, of starting its process, and resident memory in bytes.

    The memory is that of the kernel's process and of all that it starts. On a card a run has limits of its own:
    ``compile_seconds`` and ``launch_seconds``. The latter is above the longest of the
    card's own watchdogs (of PyPTO 0.2.0: a task 600 s, the handshake of its processors 960 s, an AICPU kernel 1080 s), so that
    the card's error is read before anything is killed. ``probe_seconds`` is what the kernel that tells whether a card is well may
    take.
    """

    seconds: float = 120.0
    start_seconds: float = 120.0
    memory_bytes: int = 8 << 30
    compile_seconds: float = 600.0
    launch_seconds: float = 1200.0
    probe_seconds: float = 180.0

    @classmethod
    def of_runs(cls, seconds: float | None) -> Limits:
        """The usual limits, but for that of one run if ``seconds`` are given; on a card that is the limit of a launch."""
        return cls() if seconds is None else cls(seconds=seconds, launch_seconds=seconds)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise UsageError(f"limit {field.name} must be a positive number, found {one_line(repr(value), 60)}")


class WorkerError(Exception):
    """The worker was killed, died or answered nonsense; ``outcome`` says how."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


class UnknownEndError(Exception):
    """The worker has ended, and so had its keeper: nobody knows how it ended."""


class WorkerProcess:
    """One worker at a time, and what it shares with its owner: a folder of logs, a scratch folder, an arena.

    ``folder`` takes the worker's logs; without one they go to a temporary folder that ``close`` removes. ``source`` is the file
    that a crash is located in.
    """

    def __init__(self, *, limits: Limits, folder: Path | None = None, source: Path | None = None) -> None:
        if os.environ.get(INSIDE_WORKER):
            raise UsageError("this file judges kernels when it is imported: put that below if __name__ == '__main__':")
        self.limits = limits
        self._owner = os.getpid()
        #: How many processes were started so far, and whether they may be forked from a server.
        self.starts = 0
        self.may_fork = True
        self.arena: Arena | None = None
        self._source = source
        self._folder = folder
        self._temporary: ScratchFolder | None = None
        self._scratch: ScratchFolder | None = None
        self._process: KeptProcess | None = None
        self._channel: Channel | None = None
        self._lifeline: int | None = None
        _ALL.add(self)

    def __del__(self) -> None:
        # A forgotten process must not outlive its owner's interest in it, nor the folders of one that has ended.
        if hasattr(self, "_lifeline"):  # else it was not made to its end
            self._close_if_own()

    def _close_if_own(self) -> None:
        if self._owner == os.getpid():  # else this is a copy, in a process that was forked from the owner
            self.close()

    @property
    def pid(self) -> int | None:
        """The number of the worker process; ``None`` while there is none."""
        return None if self._process is None else self._process.pid

    def start(self, preload: str | None) -> None:
        """Start a worker, forked from a process that has done ``preload`` where that is possible. None must be running.

        Raises ``UnavailableError`` if this machine has no place or no process for it.
        """
        try:
            folder, scratch = self._folders()
            if self.arena is None:
                self.arena = Arena()
            with contextlib.ExitStack() as stack:
                ours, theirs = socket.socketpair()
                stack.enter_context(theirs)
                reading, self._lifeline = os.pipe()
                stack.callback(os.close, reading)
                self._channel = Channel(ours)
                out, errors = (stack.enter_context((folder / name).open("ab")) for name in ("stdout.log", "stderr.log"))
                out.truncate(0)
                errors.truncate(0)
                self.starts += 1
                descriptors = (reading, theirs.fileno(), self.arena.descriptor)
                self._process = self._forked(preload, descriptors, out.fileno(), errors.fileno())
                if self._process is None:
                    self._process = self._spawned(descriptors, out.fileno(), errors.fileno())
        except OSError as error:
            self.stop()
            where = f" ({error.filename})" if error.filename else ""
            raise UnavailableError(f"cannot start a kernel's process: {error.strerror or error}{where}") from error
        self.ask(Opening(_search_path(), str(folder.resolve()), str(scratch)), self.limits.start_seconds, "starting its process")

    def _folders(self) -> tuple[Path, Path]:
        """Where logs and scratch files go, made if they are not there (any more)."""
        if self._folder is None:
            self._temporary = ScratchFolder(Path(tempfile.gettempdir()))
            self._folder = self._temporary.path
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._scratch is None or not self._scratch.path.is_dir():
            memory = Path("/dev/shm")
            self._scratch = ScratchFolder(memory if os.access(memory, os.W_OK) else self._folder)
        return self._folder, self._scratch.path

    def _environment(self) -> dict[str, str]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
        return {**os.environ, "PYTHONPATH": path, INSIDE_WORKER: "1"}

    def _log_paths(self) -> dict[str, str]:
        """Where CANN keeps its logs, and what it dumps of an exception: read once, when torch loads its driver."""
        assert self._folder is not None
        folder = self._folder.resolve()
        return {"ASCEND_PROCESS_LOG_PATH": str(folder / "plog"), "ASCEND_WORK_PATH": str(folder / "ascend")}

    def _forked(self, preload: str | None, descriptors: tuple[int, int, int], out: int, errors: int) -> KeptProcess | None:
        if preload is None or not self.may_fork:
            return None
        environment = self._environment()
        server = fork_server(preload, environment, _search_path(), [model.name for model in models()])
        return server.fork(*descriptors, out, errors, environment) if server is not None else None

    def _spawned(self, descriptors: tuple[int, int, int], out: int, errors: int) -> KeptProcess:
        """A new interpreter, which imports everything anew."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            inherited = (theirs.fileno(), *descriptors)
            keeper = subprocess.Popen(
                [*python_command("keeper"), *map(str, inherited)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                pass_fds=inherited,
                # A group of its own: Ctrl-C is left to the owner.
                start_new_session=True,
                env={**self._environment(), **self._log_paths()},
            )
        try:
            return KeptProcess(ours, ended=keeper.wait)
        except OSError:
            ours.close()
            keeper.kill()
            keeper.wait()
            raise

    def ask(self, request: Message, seconds: float, what: str) -> Answer:
        """Send a request and wait for its answer, within the limits; ``what`` says in a message what went on.

        Raises ``WorkerError`` if the worker died, was killed or answered nonsense, ``UnknownEndError``, and for a refusal
        ``UsageError`` or ``ToolchainUnavailableError``.
        """
        assert self._channel is not None
        assert self._process is not None
        deadline = time.monotonic() + seconds
        # An answer counts for this request alone: not one that was sent before it was asked for, nor a copy's.
        number = secrets.randbits(64)
        try:
            if self._channel.has_more:
                self._answer_nobody_asked_for()
            self._channel.send(number, encode(request))
            while (received := self._channel.receive(POLL_SECONDS)) is None:
                if self._process.poll() is not None and not self._channel.has_more:
                    raise EOFError
                self._require_within_limits(what, deadline, seconds)
            if received[0] != number:
                raise ChannelError("it answers another request")
            answer: Answer = decode_answer(received[1])
        except (ChannelError, msgspec.DecodeError) as error:
            raise WorkerError(self._nonsense(str(error), what)) from error
        except (EOFError, OSError) as error:
            raise WorkerError(self._post_mortem(what)) from error
        if isinstance(answer, Refused):
            if answer.unavailable:
                raise ToolchainUnavailableError(one_line(answer.message, MOST_TEXT))
            raise UsageError(one_line(answer.message, MOST_TEXT))
        return answer

    def printed(self) -> list[str]:
        """The end of what the worker that ran last printed: its errors, then its output."""
        return [] if self._folder is None else [tail_of(self._folder / name) for name in ("stderr.log", "stdout.log")]

    def _answer_nobody_asked_for(self) -> None:
        assert self._channel is not None
        assert self._process is not None
        if self._process.poll() is not None:
            raise EOFError
        if self._channel.receive(0) is not None:
            raise ChannelError("nobody had asked for it")

    def _nonsense(self, why: str, what: str) -> Outcome:
        self._kill()
        return Outcome("crashed", message=f"its process sent something during {what} that is no answer: {one_line(why, 200)}")

    def _require_within_limits(self, what: str, deadline: float, seconds: float) -> None:
        assert self._process is not None
        resident = self._process.resident_bytes(self.limits.memory_bytes)
        if resident > self.limits.memory_bytes:
            self._kill()
            limit = f"its limit of {self.limits.memory_bytes >> 20} MiB"
            message = f"its process used {resident >> 20} MiB of memory during {what}, more than {limit}, and was killed"
            raise WorkerError(Outcome("crashed", message=message))
        if time.monotonic() > deadline:
            where = self._location_in(self._stack())
            self._kill()
            message = f"{what} did not end within its limit of {seconds:g} s"
            raise WorkerError(Outcome("timed_out", message=message, location=where))
        self.trim_logs(RUNNING_LOG_LIMIT)

    def _stack(self) -> str:
        """Where the worker is, as its fault handler says when it is asked: also kept in ``stack.log``."""
        assert self._process is not None
        assert self._folder is not None
        log = self._folder / "stderr.log"
        with contextlib.suppress(OSError):
            size = before = log.stat().st_size
            os.kill(self._process.pid, signal.SIGUSR1)
            deadline = time.monotonic() + STACK_SECONDS
            while time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                last, size = size, log.stat().st_size
                if before < size == last:
                    break
        text = tail_of(log)
        begins = re.search(r"^(?:Current thread|Thread) 0x", text, re.MULTILINE)
        stack = text[begins.start() :] if begins else ""
        with contextlib.suppress(OSError):
            (self._folder / "stack.log").write_text(stack)
        return stack

    def _post_mortem(self, what: str) -> Outcome:
        assert self._process is not None
        assert self._folder is not None
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._kill()
            return Outcome("crashed", message=f"its process closed the connection during {what} and was killed")
        if code == UNKNOWN_EXIT:
            raise UnknownEndError
        text = tail_of(self._folder / "stderr.log")
        how = f"died of {_signal_name(-code)}" if code < 0 else f"ended itself with exit code {code}"
        lines = _FRAME.sub("", text).splitlines()
        said = [line for line in lines if line.strip() and not _FAULT_HANDLER.match(line)]
        printed = "; it printed:\n" + plain("\n".join(said[-TAIL_LINES:]), 4000) if said else ""
        return Outcome("crashed", message=f"its process {how} during {what}{printed}", location=self._location_in(text))

    def _location_in(self, text: str) -> str | None:
        # The fault handler prints the Python stack, innermost frame first.
        match = re.search(rf'File "({re.escape(str(self._source))})", line (\d+)', text)
        return f"{match[1]}:{match[2]}" if match else None

    def _kill(self) -> None:
        if self._process is None or self._process.poll() not in (None, UNKNOWN_EXIT):
            return  # its number may be another's by now, and its keeper has ended what it started
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # its keeper does nothing any more: the kernel may have stopped it
            self._process.kill_with_keeper()

    def stop(self) -> None:
        """Kill the worker, if any, and all that it started."""
        try:
            self._kill()
        finally:
            if self._process is not None:
                self.trim_logs(RUNNING_LOG_LIMIT)  # what it printed between the last look and its end
            self._process = None
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            if self._lifeline is not None:
                os.close(self._lifeline)
                self._lifeline = None
            if self._scratch is not None:
                self._scratch.clear()

    def close(self) -> None:
        """End the worker and remove its temporary files; closing twice is harmless."""
        self.stop()
        if self.arena is not None:
            self.arena.close()
            self.arena = None
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
        if self._temporary is not None:
            self._temporary.close()
            self._temporary = self._folder = None

    def trim_logs(self, most: int = LOG_LIMIT) -> None:
        """Empty the worker's logs where they are larger than so many bytes."""
        # The worker appends, so that a file that is emptied here stays small.
        assert self._folder is not None
        for name in ("stdout.log", "stderr.log"):
            path = self._folder / name
            with contextlib.suppress(OSError):
                if path.stat().st_size > most:
                    os.truncate(path, 0)


_ALL: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """End all workers of this process and remove their folders: what is still referred to when Python ends is not deleted."""
    for worker in list(_ALL):
        worker._close_if_own()


def _search_path() -> tuple[str, ...]:
    """Where this process looks for modules; a worker looks there last."""
    return tuple(os.path.abspath(entry) for entry in sys.path if entry)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
