"""Workers forked from a process that has imported torch and PyPTO.

Its arguments: ``CONTROL PRELOAD FOLDER [PATH ...]`` (a descriptor, a module, a folder for logs, where modules are searched).

Importing them takes 1.5 s of processor time, and every kernel, preset and lane has a worker of its own. So each process that
judges keeps one *fork server* for each set of libraries: it imports them, runs nothing, and forks a worker whenever it is asked.
A forked worker shares nothing with other workers but memory pages that neither has written to.

What it forks is the worker's keeper (``keeper.py``), which forks the worker. The server ends when its owner does.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

from conformance.lanes.keeper import KeptProcess, can_watch, keep, python_command
from conformance.lanes.scratch import ScratchFolder

#: The largest request, in bytes: the environment of a worker is most of it.
REQUEST_BYTES = 1 << 20
#: How long a server may take to import what it preloads, in seconds, before workers are started without it.
PRELOAD_SECONDS = 120.0

#: How long a server may take to end when its owner has no more use for it, in seconds.
END_SECONDS = 2.0

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
#: What the server answers: whether it could fork.
_NOT_FORKED, _FORKED = b"0", b"1"


class ForkServer:
    """The owner's side of a fork server. ``usable`` says whether it has imported ``preload`` and can fork."""

    def __init__(self, preload: str, environment: dict[str, str], search_path: Sequence[str] = ()) -> None:
        self.usable = False
        self._owner = os.getpid()
        self._folder = ScratchFolder(Path(tempfile.gettempdir()))
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_BYTES)
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [*python_command("forking"), str(theirs.fileno()), preload, str(self._folder.path), *search_path],
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

    def fork(
        self, lifeline: int, connection: int, arena: int, out: int, errors: int, environment: dict[str, str]
    ) -> KeptProcess | None:
        """A worker with these descriptors, output and environment, in the current folder; ``None`` if the server cannot."""
        request = json.dumps({"environment": environment, "folder": str(Path.cwd())}).encode()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, self._lock:
                socket.send_fds(self._control, [request], [theirs.fileno(), out, errors, lifeline, connection, arena])
                answer = self._control.recv(16)
            if answer == _NOT_FORKED:
                ours.close()
                return None
            if not answer:
                raise ConnectionResetError
        except BaseException as error:
            # An answer that comes later would be taken for that to the next request.
            ours.close()
            self._end()
            if isinstance(error, OSError):
                return None
            raise
        try:
            return KeptProcess(ours)
        except OSError:  # the keeper could not start it: no process is to be had now
            ours.close()
            return None

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
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


#: The servers of this process, by its number (a forked process has none yet), what they preload, and what that depends on.
_SERVERS: dict[tuple[object, ...], ForkServer] = {}
_SERVERS_LOCK = threading.Lock()


def fork_server(
    preload: str, environment: dict[str, str], search_path: Sequence[str] = (), models: Sequence[str] = ()
) -> ForkServer | None:
    """This process's server for a module whose ``preload()`` imports what workers need; ``None`` if there can be none.

    ``search_path`` is where it finds the ``models`` of this process besides where a new interpreter looks.
    """
    if not can_watch():
        return None
    read_once = tuple(sorted(pair for pair in environment.items() if pair[0].startswith(READ_ONCE)))
    key = os.getpid(), preload, read_once, tuple(models)
    with _SERVERS_LOCK:
        if key not in _SERVERS:
            _SERVERS[key] = ForkServer(preload, environment, search_path)
        server = _SERVERS[key]
    return server if server.usable else None


def main(arguments: list[str]) -> int:
    """Import, then fork a worker for every request, until the owner closes its side; returns if it cannot begin."""
    control = socket.socket(fileno=int(arguments[0]))
    before = dict(os.environ)
    sys.path.extend(entry for entry in arguments[3:] if entry not in sys.path)
    try:
        importlib.import_module(arguments[1]).preload(Path(arguments[2]))
        # With it the models, which workers need without what they are judged by.
        importlib.import_module("conformance.lanes.worker").prepare()
    except Exception:
        return 1  # a worker that imports the same by itself says what is wrong
    # What the libraries read when they were imported stays as it was then.
    kept = {name: value for name, value in os.environ.items() if before.get(name) != value}
    gc.collect()
    gc.freeze()
    # Keepers are waited for only so that the processor time of workers counts as this process's, and in the end its owner's.
    signal.signal(signal.SIGCHLD, lambda number, frame: _forget_ended())
    control.send(_READY)
    while True:
        request, descriptors, flags, _ = socket.recv_fds(control, REQUEST_BYTES, 16)
        if not request:
            _forget_ended()
            os._exit(0)  # what was imported has nothing to tidy up, and takes its time to do so
        pid = -1
        if not flags & socket.MSG_CTRUNC:  # else this process may open no more files
            with contextlib.suppress(OSError):  # no process is to be had now
                pid = os.fork()
        if pid == 0:
            control.close()
            _become_keeper(request, descriptors, kept, Path(arguments[2]))
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(_FORKED if pid > 0 else _NOT_FORKED)


def _forget_ended() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become_keeper(text: bytes, descriptors: list[int], kept: dict[str, str], logs: Path) -> None:
    """What a forked process does; it never returns, whatever happens: its caller is the server's code."""
    code = 1
    try:
        os.setsid()
        report, out, errors, *rest = descriptors
        for source, target in ((out, 1), (errors, 2)):
            os.dup2(source, target)
            os.close(source)
        lifeline, connection, arena = rest
        status = socket.socket(fileno=report)

        def work() -> int:
            return _work(json.loads(text), [connection, arena, lifeline], kept)

        def tidy(worker: int) -> None:
            for log in logs.glob(f"**/*-{worker}_*.log"):  # PyPTO's, which nobody reads any more
                log.unlink(missing_ok=True)

        keep(status, lifeline, (connection, arena), work, tidy)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _work(request: dict[str, object], descriptors: list[int], kept: dict[str, str]) -> int:
    """Run a worker's program as a new interpreter would in the folder and environment of the request."""
    environment, folder = request["environment"], str(request["folder"])
    assert isinstance(environment, dict)
    os.environ.clear()
    os.environ.update({**environment, **kept})
    os.chdir(folder)
    faulthandler.enable()
    from conformance.lanes import worker

    return worker.main([str(descriptor) for descriptor in descriptors])
