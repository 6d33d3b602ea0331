"""Workers forked from a server behave as processes of their own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from conformance.cases.case import make_case
from conformance.cases.key import CaseKey
from conformance.contract.kernel import Kernel
from conformance.contract.loading import load_module
from conformance.lanes import forking
from conformance.lanes.keeper import UNKNOWN_EXIT, KeptProcess
from conformance.lanes.process import KernelProcess
from conformance.toolchains.dumps import fewer_dumps

KERNEL = """
import os
import time

import conformance


@conformance.kernel("rms_norm")
def tells(x, weight, out):
    time.sleep(0.2)
    raise ValueError(f"{os.environ.get('TOLD')} in {os.getcwd()}, {len(os.listdir('/proc/self/task'))} thread")
"""


CASE = make_case(CaseKey("rms_norm", "tiny", "normal", 7, (("B", 1),), ()))


def kernel_in(folder: Path) -> Kernel:
    (folder / "tells.py").write_text(KERNEL)
    kernel = vars(load_module(str(folder / "tells.py")))["tells"]
    assert isinstance(kernel, Kernel)
    return kernel


def test_each_worker_has_the_environment_and_the_folder_its_owner_has_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for told in ("first", "second"):
        monkeypatch.setenv("TOLD", told)
        with KernelProcess(kernel_in(tmp_path), "eager") as process:
            assert process.run(CASE).message == f"ValueError: {told} in {tmp_path}, 1 thread"


def test_a_server_or_a_keeper_that_dies_is_no_finding_about_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_SERVERS", {})
    monkeypatch.setenv("TOLD", "on")
    with KernelProcess(kernel_in(tmp_path), "eager") as process:
        assert process.run(CASE).message.startswith("ValueError: on")
        (server,) = forking._SERVERS.values()
        server._process.kill()
        server._process.wait()
        # The worker lives, and its kernel takes longer than its owner waits before it looks whether it does.
        assert process.run(CASE).message.startswith("ValueError: on")
        worker = process._worker._process
        assert worker is not None
        os.kill(worker.keeper, signal.SIGKILL)
        assert process.run(CASE).message.startswith("ValueError: on")
        assert process.starts == 1
        os.kill(worker.pid, signal.SIGKILL)
        # Nobody saw how it ended: the case is run again, by a process that needs no server.
        assert process.run(CASE).message.startswith("ValueError: on")
        assert process.starts == 2
    server.close()


# The server alone, with workers that run a program from their environment and need no torch

PRELOADED = """
import os, sys, types

def preload(folder):
    worker = types.ModuleType("conformance.lanes.worker")
    worker.prepare = lambda: None
    worker.main = lambda arguments: exec(os.environ["PROGRAM"], {})
    sys.modules[worker.__name__] = worker
"""
LEAVES_A_CHILD = """
    import subprocess
    subprocess.Popen(["sleep", "0.1"])
"""
FORKS_EVERY_OTHER_TIME = """
    forks, calls, server = os.fork, [], os.getpid()

    def fork():
        calls.append(None)
        if os.getpid() == server and len(calls) % 2 == 0:
            raise BlockingIOError(11, "no process to be had")
        return forks()

    os.fork = fork
"""


class Server:
    """A fork server of a module of its own in ``folder``, where its workers' output goes too."""

    def __init__(self, folder: Path, preloaded: str = "") -> None:
        (folder / "preloaded.py").write_text(PRELOADED + preloaded)
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parents[2])])}
        self.server = forking.ForkServer("preloaded", self.environment)
        self.output = folder / "output.txt"
        assert self.server.usable

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.close()

    def fork(self, program: str) -> KeptProcess | None:
        lifeline, self.lifeline = os.pipe()
        with self.output.open("wb") as file, open(os.devnull, "rb") as nothing:
            descriptors = (lifeline, nothing.fileno(), nothing.fileno(), file.fileno(), file.fileno())
            try:
                return self.server.fork(*descriptors, {**self.environment, "PROGRAM": program})
            finally:
                os.close(lifeline)

    def start(self, program: str) -> KeptProcess:
        process = self.fork(program)
        assert process is not None
        return process


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_a_request_that_is_given_up_ends_the_server_and_its_late_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    class GivenUp:
        def __init__(self, control: socket.socket) -> None:
            self.fileno, self.sendmsg, self.close = control.fileno, control.sendmsg, control.close

        def recv(self, size: int) -> bytes:
            raise error

    reading, writing = os.pipe()
    with Server(tmp_path) as started:
        server = started.server
        monkeypatch.setattr(server, "_control", GivenUp(server._control))
        environment = {**started.environment, "PROGRAM": "print('ran', flush=True)"}
        with pytest.raises(KeyboardInterrupt) if error is KeyboardInterrupt else contextlib.nullcontext():
            assert server.fork(reading, writing, writing, writing, writing, environment) is None
        assert not server.usable
        assert server._process.poll() is not None
        assert started.fork("") is None
    os.close(writing)
    with open(reading, "rb") as file:
        assert file.read() == b""  # at its end: the worker, if any, has ended without running anything


def test_a_worker_is_watched_when_its_keeper_is_gone(tmp_path: Path) -> None:
    with Server(tmp_path) as started:
        process = started.start("import time; time.sleep(60)")
        os.kill(process.keeper, signal.SIGKILL)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.kill()
        assert process.wait(10.0) == UNKNOWN_EXIT
        started.server._process.kill()
        started.server._process.wait()
        assert started.fork("") is None
        assert not started.server.usable


def test_a_server_that_cannot_fork_now_can_later(tmp_path: Path) -> None:
    with Server(tmp_path, FORKS_EVERY_OTHER_TIME) as started:
        first = started.start("import time; time.sleep(0.2); sys = __import__('sys'); sys.exit(3)")
        assert started.fork("") is None
        assert started.start("").wait(10.0) == 1  # a program that returns nothing
        assert first.wait(10.0) == 3


def test_a_child_of_what_was_preloaded_does_not_end_the_server(tmp_path: Path) -> None:
    with Server(tmp_path, LEAVES_A_CHILD) as started:
        assert started.start("import sys, time; time.sleep(0.3); sys.exit(0)").wait(10.0) == 0
        assert started.start("import sys; sys.exit(4)").wait(10.0) == 4


def test_a_request_that_cannot_be_read_ends_its_worker_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(tmp_path) as started:
        with monkeypatch.context() as patched:
            patched.setattr("conformance.lanes.forking.json.dumps", lambda request: "{")
            assert started.start("").wait(10.0) == 1
        assert "JSONDecodeError" in started.output.read_text()
        assert started.start("import sys; sys.exit(0)").wait(10.0) == 0


def test_a_worker_leaves_no_logs(tmp_path: Path) -> None:
    with Server(tmp_path) as started:
        logs = started.server._folder.path / "plog"
        logs.mkdir()
        write = f"open({str(logs)!r} + f'/pypto-{{os.getpid()}}_1.log', 'w').close()"
        program = f"import os; print(len(os.listdir({str(logs)!r}))); {write}; print(os.listdir({str(logs)!r}))"
        process = started.start(program)
        process.wait(10.0)
        assert started.output.read_text().split("\n")[:2] == ["0", f"['pypto-{process.pid}_1.log']"]
        assert not list(logs.iterdir())


def test_what_libraries_read_once_decides_which_server_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_SERVERS", {})
    (tmp_path / "preloaded.py").write_text(PRELOADED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    first = forking.fork_server("preloaded", environment)
    assert first is not None
    assert forking.fork_server("preloaded", {**environment, "TOLD": "else"}) is first
    second = forking.fork_server("preloaded", {**environment, "ATEN_CPU_CAPABILITY": "default"})
    assert second not in (None, first)
    for server in forking._SERVERS.values():
        server.close()


def test_a_copy_of_the_owner_leaves_the_server_alone(tmp_path: Path) -> None:
    with Server(tmp_path) as started:
        copy = os.fork()
        if copy == 0:
            try:
                started.server.close()
            finally:
                os._exit(0)
        os.waitpid(copy, 0)
        assert started.server._folder.path.is_dir()
        assert started.start("import sys; sys.exit(0)").wait(10.0) == 0


def test_functions_that_write_dumps_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFORMANCE_CACHE_DIR", str(tmp_path))
    path = fewer_dumps()
    assert path is not None
    library = ctypes.CDLL(str(path))
    for name in (
        "_ZN3npu8tile_fwk19FunctionInterpreter13DumpOperationEPNS0_9OperationE",
        "_ZN3npu8tile_fwk19FunctionInterpreter16DumpFunctionHeadEPNS0_8FunctionE",
        "_ZN3npu8tile_fwk19FunctionInterpreter16DumpTensorBinaryERKSt10shared_ptrINS0_17LogicalTensorDataEESs",
    ):
        assert hasattr(library, name)


def test_where_nothing_can_be_built_all_dumps_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFORMANCE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert fewer_dumps() is None
