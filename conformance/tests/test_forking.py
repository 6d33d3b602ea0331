"""Workers forked from a server behave as processes of their own."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from conformance.cases.case import make_case
from conformance.cases.key import CaseKey
from conformance.contract.kernel import Kernel
from conformance.contract.loading import load_module
from conformance.lanes import forking
from conformance.lanes.base import Outcome
from conformance.lanes.process import KernelProcess
from conformance.toolchains.text_dumps import without_text_dumps

KERNEL = """
import os

import conformance


@conformance.kernel("rms_norm")
def tells(x, weight, out):
    raise ValueError(f"{os.environ.get('TOLD')} in {os.getcwd()}, {len(os.listdir('/proc/self/task'))} thread")
"""


def run(folder: Path) -> Outcome:
    (folder / "tells.py").write_text(KERNEL)
    kernel = vars(load_module(str(folder / "tells.py")))["tells"]
    assert isinstance(kernel, Kernel)
    with KernelProcess(kernel, "eager") as process:
        return process.run(make_case(CaseKey("rms_norm", "tiny", "normal", 7, (("B", 1),), ())))


def test_each_worker_has_the_environment_and_the_folder_its_owner_has_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for told in ("first", "second"):
        monkeypatch.setenv("TOLD", told)
        assert run(tmp_path).message == f"ValueError: {told} in {tmp_path}, 1 thread"


def test_without_its_server_a_worker_starts_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLD", "alone")
    server = forking.ForkServer("conformance.lanes.eager", dict(os.environ))
    monkeypatch.setitem(forking._SERVERS, (os.getpid(), "conformance.lanes.eager"), server)
    assert server.usable
    server._process.kill()
    server._process.wait()
    assert run(tmp_path).message.startswith("ValueError: alone in")
    assert not server.usable
    server.close()


def test_text_dumps_are_replaced_by_functions_that_return_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFORMANCE_CACHE_DIR", str(tmp_path))
    path = without_text_dumps()
    assert path is not None
    library = ctypes.CDLL(str(path))
    for name in (
        "_ZN3npu8tile_fwk19FunctionInterpreter13DumpOperationEPNS0_9OperationE",
        "_ZN3npu8tile_fwk19FunctionInterpreter16DumpFunctionHeadEPNS0_8FunctionE",
    ):
        assert hasattr(library, name)


def test_where_nothing_can_be_built_text_dumps_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFORMANCE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert without_text_dumps() is None
