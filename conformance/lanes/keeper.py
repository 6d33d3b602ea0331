"""The keeper: a small process above each kernel's process, which leaves nothing of it behind.

A kernel may start processes, and make them hard to find: in a session of their own, as children of nobody. The keeper is the
*child subreaper* of all of them (prctl(2)): whatever loses its parent becomes its child. When the kernel's process has ended, or
their owner has, it kills whatever is left below it, then says how the kernel's process ended. It imports nothing heavy and runs
no code of a kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from conformance.lanes.channel import readable

#: What ``poll`` and ``wait`` return for a process whose keeper ended first, so that nobody knows how: no exit code.
UNKNOWN_EXIT = 256
#: prctl(2).
_SET_CHILD_SUBREAPER = 36
#: Without it a worker that was started ends: its owner does not know of it, and may have started another in its place.
_BEGIN = b"b"
#: How long an owner waits for its worker's number, in seconds: nothing is imported before.
_START_SECONDS = 30.0
#: How long a keeper tries to kill what a kernel left, in seconds: processes that start others may take some rounds.
_KILL_SECONDS = 10.0


class KeptProcess:
    """A kernel's process below its keeper, with the part of ``subprocess.Popen`` that its owner needs.

    ``status`` is the socket to the keeper. If the keeper is gone, the process is watched itself. ``ended`` is called once it has
    ended.
    """

    def __init__(self, status: socket.socket, ended: Callable[[], object] | None = None) -> None:
        self._status = status
        self._ended = ended
        self.returncode: int | None = None
        status.settimeout(_START_SECONDS)
        status.send(_BEGIN)
        # A keeper that could not start its worker closes the socket: nothing is received.
        self.keeper, self.pid = map(int, status.recv(64).split() or (b"0", b"0"))
        if not self.pid:
            raise ConnectionResetError("the worker's keeper could not start it")
        self._started = _start_time(self.pid)

    def poll(self) -> int | None:
        """The exit code if the process has ended, negative for a signal, or ``UNKNOWN_EXIT``; ``None`` while it runs."""
        if self.returncode is None and self._has_keeper and readable([self._status.fileno()], 0):
            try:
                said = self._status.recv(64)
            except ConnectionResetError:
                said = b""
            self._status.close()
            if said:
                self._end(int(said))
        if self.returncode is None and not self._has_keeper:
            started = _start_time(self.pid)
            if started is None or started != self._started:  # another process may have got its number
                self._end(UNKNOWN_EXIT)
        return self.returncode

    def _end(self, code: int) -> None:
        self.returncode = code
        if self._ended is not None:
            self._ended()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the process and all below it have ended; raises ``subprocess.TimeoutExpired``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout or 0.0)
            if self._has_keeper:
                readable([self._status.fileno()], left)
            else:
                time.sleep(0.02)
        return code

    def kill(self) -> None:
        """Kill the process, if it still runs; the keeper kills what is left below it."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def kill_with_keeper(self) -> None:
        """Kill the process, all that is known below its keeper, and the keeper, where that does not do so itself."""
        for pid in (*descendants(self.keeper), self.keeper):
            _kill(pid)
        self.wait()

    def resident_bytes(self, limit: int) -> int:
        """Memory of the process and of all that it started, in bytes: exactly where it would be more than ``limit``.

        What processes share counts in each of them first, which is quick to tell; where that is too much it is shared out.
        """
        processes = [self.pid, *descendants(self.keeper)]
        rough = sum(map(_resident, dict.fromkeys(processes)))
        return rough if rough <= limit else sum(map(_proportional, dict.fromkeys(processes)))

    @property
    def _has_keeper(self) -> bool:
        return self._status.fileno() >= 0


def python_command(module: str) -> list[str]:
    """How to run ``main`` of a module of this package in a new interpreter; arguments follow.

    Unlike with ``python -m``, the current folder is not where modules are looked for: a ``random.py`` there is not Python's.
    """
    start = f"from conformance.lanes.{module} import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", f"import sys; sys.path[:] = [entry for entry in sys.path if entry]; {start}"]


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _proportional(pid: int) -> int:
    """Resident memory, of what several processes share one part only; as much as ``_resident`` where that is not told."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except (OSError, IndexError):
        pass
    return _resident(pid)


def _start_time(pid: int) -> str | None:
    """When a running process began, in the system's ticks; ``None`` if it has ended."""
    try:
        # proc(5): the name in parentheses, then the state (field 3) and so on; field 22 is the start time.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def can_watch() -> bool:
    """Whether this system tells of processes what a keeper has to know (Linux, with /proc)."""
    return hasattr(socket, "SOCK_SEQPACKET") and _start_time(os.getpid()) is not None


def descendants(pid: int) -> list[int]:
    """The processes below one, parents first."""
    found: list[int] = []
    pending = [pid]
    while pending:
        children = _children(pending.pop())
        found += children
        pending += children
    return found


def _children(pid: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    found: list[int] = []
    for task in tasks:  # a thread's children are listed with the thread
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
            found += map(int, file.read().split())
    return found


def keep(
    status: socket.socket,
    lifeline: int,
    others: Iterable[int],
    work: Callable[[], int],
    tidy: Callable[[int], object] = lambda worker: None,
) -> None:
    """Become the keeper of a new process that does ``work`` and ends with what that returns.

    ``others`` are descriptors of the worker's that the keeper must not hold. Returns when the worker and all below it have ended
    and ``tidy`` was called with its number, or if it was not to begin; in the worker it never does. The calling process must have
    no other children.
    """
    # Where it fails, a process that hides outlives its kernel; everything else works.
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if status.recv(len(_BEGIN)) != _BEGIN:
        return
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (woken, wake, status.fileno()):
            os.close(descriptor)
        _run(work)
    for descriptor in others:
        os.close(descriptor)
    status.send(f"{os.getpid()} {worker}".encode())
    code: int | None = None
    while code is None:
        # The lifeline is at its end when the owner is; nothing is ever written to it.
        ready = readable([woken, lifeline], None)
        if lifeline in ready:
            _kill(worker)
        if woken in ready:
            os.read(woken, 4096)
        code = _reap(worker) if lifeline not in ready else _wait(worker)
    _end_all()
    tidy(worker)
    with contextlib.suppress(OSError):  # its owner does not ask any more
        status.send(str(code).encode())


def _run(work: Callable[[], int]) -> None:
    """What the worker does; it never returns, whatever happens: its caller is the keeper's code."""
    import traceback

    code = 1
    try:
        # A group of its own: what the kernel starts is killed with it, and Ctrl-C is left to the owner.
        os.setsid()
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code if isinstance(code, int) else 1)


def _reap(worker: int) -> int | None:
    """Collect processes that have ended; the exit code of the worker, if it is among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == worker:
                code = os.waitstatus_to_exitcode(status)
    return code


def _wait(worker: int) -> int:
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return UNKNOWN_EXIT
        if pid == worker:
            return os.waitstatus_to_exitcode(status)


def _end_all() -> None:
    """Kill whatever is left below this process. What is killed leaves its children to this process, so none gets away."""
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline:
        left = descendants(os.getpid())
        if not left:
            return
        for pid in left:
            _kill(pid)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.002)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """A keeper that no fork server started: ``STATUS LIFELINE CONNECTION ARENA`` (descriptors)."""
    status, lifeline, connection, arena = map(int, arguments)

    def work() -> int:
        from conformance.lanes import worker

        return worker.main([str(connection), str(arena), str(lifeline)])

    keep(socket.socket(fileno=status), lifeline, (connection, arena), work)
    return 0
