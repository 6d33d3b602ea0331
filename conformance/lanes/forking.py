"""Workers forked from a process that has imported torch and PyPTO.

``python -m conformance.lanes.forking CONTROL PRELOAD FOLDER`` (a descriptor, a module, a path).

Importing them takes 1.5 s of processor time, and every kernel, preset and lane has a worker of its own. So each process that
judges keeps one *fork server* for each set of libraries: it imports them, runs nothing, and forks a worker whenever it is asked.
A forked worker shares nothing with other workers but memory pages that neither has written to.

The server reports how each worker ended, because only a parent can know. It ends when its owner does.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from conformance.lanes.scratch import ScratchFolder

#: The largest request, in bytes: the environment of a worker is most of it.
REQUEST_BYTES = 1 << 20
#: How long a server may take to import what it preloads, in seconds, before workers are started without it.
PRELOAD_SECONDS = 120.0

#: What ``poll`` and ``wait`` return for a process that has ended when its server had, so that nobody knows how: no exit code.
UNKNOWN_EXIT = 256
#: What libraries read once, when they are loaded: workers whose variables of these names differ need servers of their own.
READ_ONCE = (
    "ASCEND_",
    "ATEN_",
    "DNNL_",
    "GLIBC_",
    "GOMP_",
    "KMP_",
    "LD_",
    "MALLOC_",
    "MKL_",
    "OMP_",
    "ONEDNN_",
    "PYTHON",
    "TILE_FWK_",
    "TORCH_",
)

_READY = b"ready"
#: What the server answers if it could not fork.
_NOT_FORKED = b"0"
#: Without it a worker that was forked ends: its owner does not know of it, and may have started another in its place.
_BEGIN = b"b"


class ForkedProcess:
    """A process that a fork server started, with the part of ``subprocess.Popen`` that its owner needs.

    The server says on ``status`` how it ended. If the server is gone, the process is watched itself.
    """

    def __init__(self, pid: int, status: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status
        self._started = _start_time(pid)

    def poll(self) -> int | None:
        """The exit code if the process has ended, negative for a signal, or ``UNKNOWN_EXIT``; ``None`` while it runs."""
        if self.returncode is None and self._has_server and select.select([self._status], [], [], 0)[0]:
            try:
                said = self._status.recv(16)
            except ConnectionResetError:
                said = b""
            self._status.close()
            if said:
                self.returncode = int(said)
        if self.returncode is None and not self._has_server:
            started = _start_time(self.pid)
            if started is None or started != self._started:  # another process may have got its number
                self.returncode = UNKNOWN_EXIT
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the process has ended; raises ``subprocess.TimeoutExpired``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout or 0.0)
            if self._has_server:
                select.select([self._status], [], [], left)
            else:
                time.sleep(0.02)
        return code

    def kill(self) -> None:
        """Kill the process, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    @property
    def _has_server(self) -> bool:
        return self._status.fileno() >= 0


def _start_time(pid: int) -> str | None:
    """When a running process began, in the system's ticks; ``None`` if it has ended."""
    try:
        # proc(5): the name in parentheses, then the state (field 3) and so on; field 22 is the start time.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


class ForkServer:
    """The owner's side of a fork server. ``usable`` says whether it has imported ``preload`` and can fork."""

    def __init__(self, preload: str, environment: dict[str, str]) -> None:
        self.usable = False
        self._owner = os.getpid()
        self._folder = ScratchFolder(Path(tempfile.gettempdir()))
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_BYTES)
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "conformance.lanes.forking", str(theirs.fileno()), preload, str(self._folder.path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=environment,
            )
        atexit.register(self.close)
        self._control.settimeout(PRELOAD_SECONDS)
        try:
            self.usable = self._control.recv(len(_READY)) == _READY
        except OSError:
            pass
        except BaseException:
            self.close()
            raise

    def fork(self, descriptors: tuple[int, ...], out: int, errors: int, environment: dict[str, str]) -> ForkedProcess | None:
        """A worker with these descriptors, output and environment, in the current folder; ``None`` if the server cannot."""
        request = json.dumps({"environment": environment, "folder": str(Path.cwd())}).encode()
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._lock:
                socket.send_fds(self._control, [request], [theirs.fileno(), out, errors, *descriptors])
                answer = self._control.recv(16)
            if answer == _NOT_FORKED:
                ours.close()
                return None
            if not answer:
                raise ConnectionResetError
            process = ForkedProcess(int(answer), ours)
            ours.send(_BEGIN)
            return process
        except BaseException as error:
            # An answer that comes later would be taken for that to the next request.
            ours.close()
            self._end()
            if isinstance(error, OSError):
                return None
            raise

    def close(self) -> None:
        """End the server and remove its folder; workers that still run end with their owner."""
        atexit.unregister(self.close)
        if os.getpid() != self._owner:
            return  # a copy in a process that was forked from the owner, which needs its server still
        self._end()
        self._folder.close()

    def _end(self) -> None:
        # The folder stays: workers that run write their logs there.
        self.usable = False
        self._control.close()
        self._process.kill()
        self._process.wait()


#: The servers of this process, by its number (a forked process has none yet), what they preload, and what that reads once.
_SERVERS: dict[tuple[int, str, tuple[tuple[str, str], ...]], ForkServer] = {}
_SERVERS_LOCK = threading.Lock()


def fork_server(preload: str, environment: dict[str, str]) -> ForkServer | None:
    """This process's server for a module whose ``preload()`` imports what workers need; ``None`` if there can be none."""
    if not hasattr(socket, "SOCK_SEQPACKET") or not sys.platform.startswith("linux") or _start_time(os.getpid()) is None:
        return None
    key = os.getpid(), preload, tuple(sorted(pair for pair in environment.items() if pair[0].startswith(READ_ONCE)))
    with _SERVERS_LOCK:
        if key not in _SERVERS:
            _SERVERS[key] = ForkServer(preload, environment)
        server = _SERVERS[key]
    return server if server.usable else None


@dataclasses.dataclass
class _Children:
    """The server's workers that still run, with where the end of each is reported; ``folder`` takes their logs."""

    folder: Path
    reports: dict[int, int] = dataclasses.field(default_factory=dict)

    def report_ended(self) -> None:
        while self.reports:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            report = self.reports.pop(pid, None)
            if report is None:
                continue  # no worker: what was preloaded started it
            for log in self.folder.glob(f"**/*-{pid}_*.log"):  # PyPTO's, which nobody reads any more
                log.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # its owner does not ask any more
                os.write(report, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(report)


def main(arguments: list[str]) -> int:
    """Import, then fork a worker for every request, until the owner closes its side."""
    control = socket.socket(fileno=int(arguments[0]))
    before, start_folder = dict(os.environ), str(Path.cwd())
    try:
        importlib.import_module(arguments[1]).preload(Path(arguments[2]))
    except Exception:
        return 1  # a worker that imports the same by itself says what is wrong
    # What the libraries read when they were imported stays as it was then.
    kept = {name: value for name, value in os.environ.items() if before.get(name) != value}
    gc.collect()
    gc.freeze()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    children = _Children(Path(arguments[2]))
    control.send(_READY)
    control_descriptor = control.fileno()
    while True:
        ready = select.select([control_descriptor, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            children.report_ended()
        if control_descriptor in ready:
            request, descriptors, flags, _ = socket.recv_fds(control, REQUEST_BYTES, 16)
            if not request:
                return 0
            pid = -1
            if not flags & socket.MSG_CTRUNC:  # else this process may open no more files
                with contextlib.suppress(OSError):  # no process is to be had now
                    pid = os.fork()
            if pid == 0:
                inherited = [control_descriptor, woken, wake, *children.reports.values()]
                _become_worker(request, descriptors, inherited, kept, start_folder)
            kept_open = 0
            if pid > 0:
                children.reports[pid], kept_open = descriptors[0], 1
            for descriptor in descriptors[kept_open:]:
                os.close(descriptor)
            control.send(str(pid).encode() if pid > 0 else _NOT_FORKED)


def _become_worker(text: bytes, descriptors: list[int], inherited: list[int], kept: dict[str, str], start_folder: str) -> None:
    """What a forked process does; it never returns, whatever happens: its caller is the server's code."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for descriptor in inherited:
            os.close(descriptor)
        report, out, errors, *rest = descriptors
        for source, target in ((out, 1), (errors, 2)):
            os.dup2(source, target)
            os.close(source)
        begins = os.read(report, len(_BEGIN)) == _BEGIN
        os.close(report)
        if begins:
            code = _work(json.loads(text), rest, kept, start_folder)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _work(request: dict[str, object], descriptors: list[int], kept: dict[str, str], start_folder: str) -> int:
    """Run a worker's program as a new interpreter would in the folder and environment of the request."""
    environment, folder = request["environment"], str(request["folder"])
    assert isinstance(environment, dict)
    os.environ.clear()
    os.environ.update({**environment, **kept})
    os.chdir(folder)
    # ``python -m`` looks for modules in the current folder first.
    if not getattr(sys.flags, "safe_path", False) and start_folder in sys.path:
        sys.path[sys.path.index(start_folder)] = folder
    faulthandler.enable()
    from conformance.lanes import worker

    return worker.main([str(descriptor) for descriptor in descriptors])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
