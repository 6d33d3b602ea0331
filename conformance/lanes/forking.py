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
import traceback
from pathlib import Path

from conformance.lanes.scratch import ScratchFolder

#: The largest request, in bytes: the environment of a worker is most of it.
REQUEST_BYTES = 1 << 20
#: How long a server may take to import what it preloads, in seconds, before workers are started without it.
PRELOAD_SECONDS = 120.0

_READY = b"ready"


class ForkedProcess:
    """A process that a fork server started, with the part of ``subprocess.Popen`` that its owner needs."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """The exit code if the process has ended, negative for a signal; ``None`` while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            said = os.read(self._status, 16)
            # A server that is gone says nothing: what it started ends with it, or is killed by its owner.
            self.returncode = int(said) if said else -signal.SIGKILL
            os.close(self._status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the process has ended; raises ``subprocess.TimeoutExpired``."""
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        """Kill the process, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class ForkServer:
    """The owner's side of a fork server. ``usable`` says whether it has imported ``preload`` and can fork."""

    def __init__(self, preload: str, environment: dict[str, str]) -> None:
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
        self._control.settimeout(PRELOAD_SECONDS)
        try:
            self.usable = self._control.recv(len(_READY)) == _READY
        except OSError:
            self.usable = False
        atexit.register(self.close)

    def fork(self, descriptors: tuple[int, ...], out: int, errors: int, environment: dict[str, str]) -> ForkedProcess | None:
        """A worker with these descriptors, output and environment, in the current folder; ``None`` if the server is gone."""
        reading, writing = os.pipe()
        request = json.dumps({"environment": environment, "folder": str(Path.cwd())}).encode()
        try:
            with self._lock:
                socket.send_fds(self._control, [request], [writing, out, errors, *descriptors])
                answer = self._control.recv(16)
        except OSError:
            answer = b""
        finally:
            os.close(writing)
        if not answer:
            os.close(reading)
            self.usable = False
            return None
        return ForkedProcess(int(answer), reading)

    def close(self) -> None:
        """End the server and remove its folder; workers that still run end with their owner."""
        atexit.unregister(self.close)
        self.usable = False
        self._control.close()
        self._process.kill()
        self._process.wait()
        self._folder.close()


#: The servers of this process, by its number (a forked process has none yet) and what they preload.
_SERVERS: dict[tuple[int, str], ForkServer] = {}
_SERVERS_LOCK = threading.Lock()


def fork_server(preload: str, environment: dict[str, str]) -> ForkServer | None:
    """This process's server for a module whose ``preload()`` imports what workers need; ``None`` if there can be none."""
    if not hasattr(socket, "SOCK_SEQPACKET") or not sys.platform.startswith("linux"):
        return None
    key = os.getpid(), preload
    with _SERVERS_LOCK:
        if key not in _SERVERS:
            _SERVERS[key] = ForkServer(preload, environment)
        server = _SERVERS[key]
    return server if server.usable else None


@dataclasses.dataclass
class _Children:
    """The server's workers that still run, with where the end of each is reported."""

    reports: dict[int, int] = dataclasses.field(default_factory=dict)

    def report_ended(self) -> None:
        while self.reports:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            report = self.reports.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # its owner does not ask any more
                os.write(report, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(report)


def main(arguments: list[str]) -> int:
    """Import, then fork a worker for every request, until the owner closes its side."""
    control = socket.socket(fileno=int(arguments[0]))
    before = dict(os.environ)
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
    children = _Children()
    control.send(_READY)
    control_descriptor = control.fileno()
    while True:
        ready = select.select([control_descriptor, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            children.report_ended()
        if control_descriptor in ready:
            request, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES, 16)
            if not request:
                return 0
            report, *passed = descriptors
            pid = os.fork()
            if pid == 0:
                control.close()
                for descriptor in (woken, wake, report, *children.reports.values()):
                    os.close(descriptor)
                _become_worker(json.loads(request), kept, passed)
            children.reports[pid] = report
            for descriptor in passed:
                os.close(descriptor)
            control.send(str(pid).encode())


def _become_worker(request: dict[str, object], kept: dict[str, str], descriptors: list[int]) -> None:
    """What a forked process does; it never returns."""
    from conformance.lanes import worker

    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        out, errors, *rest = descriptors
        for source, target in ((out, 1), (errors, 2)):
            os.dup2(source, target)
            os.close(source)
        environment, folder = request["environment"], request["folder"]
        assert isinstance(environment, dict)
        os.environ.clear()
        os.environ.update({**environment, **kept})
        os.chdir(str(folder))
        faulthandler.enable()
        code = worker.main([str(descriptor) for descriptor in rest])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
