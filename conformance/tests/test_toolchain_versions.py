"""What a version of PyPTO lacks is told from its text: the lanes that can use it, and what the others miss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conformance.toolchains import ToolchainUnavailableError, detect
from conformance.toolchains.capabilities import look_at
from conformance.toolchains.detection import Toolchain, inspect_package

#: The names of a version that has all of them, as a module of a few lines.
ENTRY = """
import torch
from pypto.runtime import _pto_verify_datas

class DebugMode:
    CHECKATTR = 3

def _pto_to_tensor_data(tensors):
    pass

class JitCallableWrapper:
    _kernel_module_cache: dict = {}

    def __init__(self, function):
        self._runtime_options = self._host_options = self._verify_options = self._debug_options = None
        self._cached_signature, self._original_func = (), function
        self._cached_non_tensor_defaults: dict = {}

    @staticmethod
    def alloc(size):
        pass

    def compile(self, tensors, tensor_defs=None):
        pass

    @staticmethod
    def _setup_verify_data(tensors):
        pass

    def _run_with_cpu(self, inputs, outputs):
        pass

def jit(func=None, *, host_options=None, use_cache: bool = True):
    pass
"""
#: What CANN 9.2 made of it: renamed, moved, another default, a check at every call.
NEWER = (
    ENTRY.replace("_setup_verify_data", "_elsewhere")
    .replace("    CHECKATTR = 3", "    DUMP = 3")
    .replace("use_cache: bool = True", "new_ir: bool = True")
    + "\ndef _validate(tensors):\n    return all(tensor.is_contiguous() for tensor in tensors)\n"
)
BUILT = "class BuildOnlinePyptoImplManager:\n    pass\n"


def package(folder: Path, entry: str, version: str | None, utils: str = "class BuildOnlineManager:\n    pass\n") -> Toolchain:
    (folder / "frontend" / "parser").mkdir(parents=True)
    (folder / "frontend" / "parser" / "entry.py").write_text(entry)
    (folder / "runtime.py").write_text("class RunMode:\n    pass\n\n_pto_verify_datas = object()\n")
    (folder / "_utils.py").write_text(utils)
    return inspect_package(folder, version)


def test_the_installed_version_has_every_name_that_the_lanes_use() -> None:
    found = detect()
    if found.flavour != "cann":
        pytest.skip(found.message)
    assert found.capabilities is not None
    assert found.capabilities.remarks == ()


def test_the_known_version_serves_every_lane(tmp_path: Path) -> None:
    found = package(tmp_path, ENTRY, "0.2.0")
    assert found.supported
    assert [found.why_not(lane) for lane in ("compile_only", "interpret", "device")] == ["", "", ""]


def test_a_version_of_the_known_number_that_lacks_names_is_not_the_known_one(tmp_path: Path) -> None:
    found = package(tmp_path, NEWER, "0.2.0")
    assert not found.supported
    with pytest.raises(ToolchainUnavailableError, match=r"lacks frontend/parser/entry.py: JitCallableWrapper._setup_verify_data"):
        found.require("interpret")
    assert found.require("device") == tmp_path


@pytest.mark.parametrize("version", ["0.2.1", "0.3.0", None])
def test_another_version_compiles_and_runs_on_a_card_but_is_not_interpreted(tmp_path: Path, version: str | None) -> None:
    found = package(tmp_path, NEWER, version, utils="")
    assert not found.supported
    assert found.require("compile_only") == found.require("device") == tmp_path
    with pytest.raises(ToolchainUnavailableError, match=r"interpret lane needs pypto 0\.2\.0, found pypto .*reads intermediate"):
        found.require("interpret")


def test_what_differs_is_said(tmp_path: Path) -> None:
    (tmp_path / "_build_online.py").write_text(BUILT)
    package(tmp_path, NEWER, "0.2.1", utils="")
    found = look_at(tmp_path)
    assert (found.new_ir, found.checks_attributes, found.checks_contiguity, found.builds_on_import) == (True, False, True, True)
    assert len(found.remarks) == 5
    assert found.remarks[0].startswith("interpret lacks")


#: What later versions do: refuse a kernel that names no mode where CANN is and no card, and read only once where to write.
LATER = """
import os
import sys
from pathlib import Path
from pypto.frontend.parser import entry
from conformance.lanes.pypto.probe import build, probe_arguments
from conformance.lanes.pypto.runtime import Runtime


def refuse(jit):
    if jit._runtime_options.get("run_mode") is None:
        raise RuntimeError("NPU is not available.")


entry.JitCallableWrapper._set_run_mode = refuse
folder = Path(sys.argv[1])
os.environ["ASCEND_PROCESS_LOG_PATH"] = str(folder / "plog")
runtime = Runtime(folder, folder / "scratch", None)
kernel, read_once = build(runtime.pypto), os.environ["TILE_FWK_OUTPUT_DIR"]
for _ in range(2):
    with runtime.output_folder(1) as written:
        os.environ["TILE_FWK_OUTPUT_DIR"] = read_once
        runtime.call(kernel, probe_arguments(), stage="EXECUTE_GRAPH")
        assert len(list(written.glob("output/output_*"))) == 1
with runtime.kept_folder(folder / "builds" / "one"):
    os.environ["TILE_FWK_OUTPUT_DIR"] = read_once
    runtime.call(kernel, probe_arguments(), stage="EXECUTE_GRAPH")
"""


@pytest.mark.skipif(not detect().supported, reason=detect().message)
def test_a_version_that_needs_a_card_to_build_and_reads_once_where_to_write_compiles(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LATER, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "builds" / "one" / "output").glob("output_*"))) == 1
    assert list((tmp_path / "scratch").glob("run-*")) == []


def test_a_version_that_moved_what_every_lane_uses_is_named_with_it(tmp_path: Path) -> None:
    found = package(tmp_path, ENTRY.replace("_host_options", "_options_of_host"), "0.4.0")
    for lane in ("compile_only", "device"):
        with pytest.raises(ToolchainUnavailableError, match=rf"pypto 0\.4\.0 lacks what the {lane} lane uses .*_host_options"):
            found.require(lane)


def test_a_version_that_asks_for_no_workspace_cannot_be_stopped_before_a_launch(tmp_path: Path) -> None:
    found = package(tmp_path, ENTRY.replace("def alloc", "def allocate"), "0.4.0")
    assert found.require("compile_only") == tmp_path
    with pytest.raises(ToolchainUnavailableError, match=r"device lane uses .*JitCallableWrapper\.alloc"):
        found.require("device")


def test_a_package_whose_text_cannot_be_read_serves_no_lane(tmp_path: Path) -> None:
    found = package(tmp_path, "def broken(:\n", "0.2.1")
    with pytest.raises(ToolchainUnavailableError, match="lacks what the device lane uses"):
        found.require("device")
