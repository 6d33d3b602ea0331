"""The toolchain is told from its files, and the calculator is built once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.toolchains import ToolchainUnavailableError, calculator, detect, doctor
from conformance.toolchains.calculator import build_once, build_tools, calculator_path
from conformance.toolchains.detection import SUPPORTED_VERSION, inspect_package


def package(folder: Path, *files: str) -> Path:
    """A package folder that holds these files and folders (those that end in a slash)."""
    for name in files:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return folder


@pytest.mark.parametrize("files", [["language/"], ["pypto_core.cpython-310.so"], ["jit/decorator.py", "frontend/"]])
def test_the_other_toolchain_of_the_same_name_is_refused_whatever_its_version(tmp_path: Path, files: list[str]) -> None:
    found = inspect_package(package(tmp_path, *files), SUPPORTED_VERSION)
    assert (found.flavour, found.supported) == ("hw-native-sys", False)
    with pytest.raises(ToolchainUnavailableError, match=r"hw-native-sys.*pip install pypto==0\.2\.0"):
        found.require()


def test_an_unknown_package_of_that_name_is_not_taken_for_either(tmp_path: Path) -> None:
    found = inspect_package(package(tmp_path, "readme.txt"), SUPPORTED_VERSION)
    assert (found.flavour, found.supported) == (None, False)


def test_detection_imports_no_toolchain() -> None:
    code = "import sys; from conformance.toolchains import detect, doctor; detect(); doctor(); sys.exit('pypto' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_pypto_the_message_says_how_to_install_it(tmp_path: Path) -> None:
    # An interpreter without site-packages has no pypto; the module under test needs nothing but the standard library.
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('detection', {str(Path(detect.__code__.co_filename))!r}); "
        "module = importlib.util.module_from_spec(spec); sys.modules['detection'] = module; spec.loader.exec_module(module); "
        "found = module.detect(); assert found.flavour is None and not found.supported; print(found.message)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "pip install pypto==0.2.0" in done.stdout, done.stderr


BUILD = """
import sys, time
from pathlib import Path
from conformance.toolchains.calculator import build_once

def build(target):
    with Path(sys.argv[2]).open("a") as log:
        log.write("built\\n")
    time.sleep(1)
    target.write_text("library")

print(build_once(Path(sys.argv[1]), build, lambda message: None).read_text())
"""


def test_two_processes_that_need_the_calculator_build_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(tmp_path / "cache" / "library.so"), str(tmp_path / "log")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["library", "library"]
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_build_that_fails_leaves_nothing_that_looks_built(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "library.so"

    def half(path: Path) -> None:
        path.write_text("half a library")
        raise ToolchainUnavailableError("no compiler")

    with pytest.raises(ToolchainUnavailableError, match="no compiler"):
        build_once(target, half, lambda message: None)
    assert not target.exists()
    assert build_once(target, lambda path: Path.touch(path), lambda message: None).exists()


def test_a_build_says_that_it_takes_time_and_a_later_use_says_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        build_once(tmp_path / "library.so", Path.touch, said.append)
    assert len(said) == 1
    assert "once per machine" in said[0]


def test_a_cache_folder_that_cannot_be_made_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ToolchainUnavailableError, match="CONFORMANCE_CACHE_DIR"):
        build_once(tmp_path / "file" / "library.so", Path.touch, lambda message: None)


def test_missing_build_tools_are_all_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainUnavailableError, match=r"g\+\+, make is missing.*apt install"):
        build_tools()
    (tmp_path / "g++").touch(mode=0o755)
    with pytest.raises(ToolchainUnavailableError, match="make is missing"):
        build_tools()


def test_the_cache_can_be_moved_and_depends_on_what_the_library_is_built_against(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    monkeypatch.setenv("CONFORMANCE_CACHE_DIR", str(tmp_path))
    path = calculator_path()
    assert path.is_relative_to(tmp_path)
    for part in (torch.__version__, sys.implementation.cache_tag):
        assert part in str(path)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert calculator_path() != path


@pytest.mark.skipif(not detect().supported, reason=detect().message)
def test_a_built_calculator_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONFORMANCE_CACHE_DIR", str(tmp_path))
    path = calculator_path()
    build_once(path, Path.touch, lambda message: None)
    assert calculator(pytest.fail) == path


def test_a_damaged_library_is_built_anew(tmp_path: Path) -> None:
    path = tmp_path / "library.so"

    def whole(target: Path) -> None:
        target.write_text("library")

    build_once(path, whole, lambda message: None)
    path.write_text("libr")
    assert build_once(path, whole, lambda message: None).read_text() == "library"


def test_the_doctor_advises_on_every_line_that_is_not_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CONFORMANCE_CACHE_DIR", str(tmp_path))
    lines = {line.name: line for line in doctor()}
    assert list(lines)[:8] == ["python", "torch", "pypto", "g++", "make", "cmake", "calculator", "npu"]
    assert not lines["g++"].ok
    assert all(line.advice for line in lines.values() if not line.ok)
    assert not any(shutil.which(name) for name in ("g++", "make"))
