"""The interpreter's calculator: a native library that PyPTO builds against the installed torch before it can compute.

The wheel builds it anew in every process and throws it away. Here it is built once per machine and kept in the platform's
cache folder, which ``CONFORMANCE_CACHE_DIR`` moves.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import filelock
import platformdirs

from conformance.toolchains.detection import ToolchainUnavailableError, detect
from conformance.toolchains.progress import Progress, print_progress

CACHE_VARIABLE = "CONFORMANCE_CACHE_DIR"
LIBRARY = "libtile_fwk_calculator.so"
CHECKSUM = ".sha256"
#: Two orders of magnitude above the slowest build seen (85 s on a busy machine).
BUILD_SECONDS = 1800


def cache_folder() -> Path:
    """Where built files are kept; it need not exist."""
    moved = os.environ.get(CACHE_VARIABLE)
    return Path(moved) if moved else platformdirs.user_cache_path("pypto-conformance")


def calculator_path() -> Path:
    """Where the calculator of the installed pypto, torch and Python is, or will be once it is built."""
    import torch

    toolchain = detect()
    abi = int(torch.compiled_with_cxx11_abi())
    key = f"pypto-{toolchain.version}-torch-{torch.__version__}-abi{abi}-{sys.implementation.cache_tag}-{platform.machine()}"
    return cache_folder() / "calculator" / key / LIBRARY


def calculator(progress: Progress | None = None) -> Path:
    """The path of the built calculator, built first if this is its first use on the machine.

    Two processes that ask at once build it once. Raises ``ToolchainUnavailableError`` if pypto is not supported, a build tool is
    missing or the build fails; the message says what to do.
    """
    package = detect().require()
    path = calculator_path()
    if is_whole(path):
        return path
    tools = build_tools()
    return build_once(path, lambda target: _build(package, tools, target), progress or print_progress)


def build_once(path: Path, build: Callable[[Path], None], progress: Progress) -> Path:
    """Make ``path`` by ``build(target)``, which writes ``target``, unless it is there; safe against concurrent callers.

    The result appears under ``path`` only when it is complete, with its checksum beside it.
    """
    if is_whole(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock")):
            if is_whole(path):
                return path
            progress("building PyPTO's calculator (20 to 90 s, once per machine)")
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                target = Path(folder) / path.name
                build(target)
                path.with_suffix(CHECKSUM).write_text(_digest(target), encoding="ascii")
                os.replace(target, path)
    except OSError as error:
        raise ToolchainUnavailableError(
            f"PyPTO's calculator cannot be kept in {path.parent}: {error}; set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    return path


def is_whole(path: Path) -> bool:
    """Whether a built library is there as it was built: a damaged one crashes what loads it, as if a kernel had."""
    try:
        return path.with_suffix(CHECKSUM).read_text(encoding="ascii") == _digest(path)
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_tools() -> dict[str, str]:
    """Paths of cmake, g++ and make; raises ``ToolchainUnavailableError`` that names all that are missing."""
    found = {"cmake": find_cmake(), "g++": shutil.which("g++"), "make": shutil.which("make")}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise ToolchainUnavailableError(
            f"PyPTO's calculator must be built once and {', '.join(missing)} is missing: install g++ 9.4 or newer and make "
            "with the system's packages (Debian: apt install g++ make), and cmake with pip install cmake"
        )
    return {name: path for name, path in found.items() if path is not None}


def find_cmake() -> str | None:
    """The binary inside pip's cmake package if it is installed (its wrapper script fails outside its environment), or PATH's."""
    try:
        spec = importlib.util.find_spec("cmake")
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder) / "data" / "bin" / "cmake"
        if binary.is_file():
            return str(binary)
    return shutil.which("cmake")


def _build(package: Path, tools: dict[str, str], target: Path) -> None:
    import torch

    # Folders of the tools first, so that what cmake starts is what was found.
    folders = [str(Path(path).parent) for path in tools.values()]
    environment = {**os.environ, "PATH": os.pathsep.join([*folders, os.environ.get("PATH", "")])}
    build, install = target.parent / "build", target.parent / "install"
    commands = (
        [
            tools["cmake"],
            *("-S", str(package / "lib" / "calculator"), "-B", str(build), "-G", "Unix Makefiles"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={install}",
            f"-DCMAKE_CXX_COMPILER={tools['g++']}",
            f"-DPY3_MOD_TORCH_VERSION={torch.__version__}",
            f"-DPY3_MOD_TORCH_ROOT_PATH={Path(torch.__file__).parent}",
            f"-DPY3_MOD_TORCH_C_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ],
        [tools["cmake"], "--build", str(build), "--parallel", str(os.cpu_count() or 1)],
        [tools["cmake"], "--install", str(build)],
    )
    for command in commands:
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise ToolchainUnavailableError(
                f"building PyPTO's calculator took more than {BUILD_SECONDS} s and was stopped"
            ) from error
        if done.returncode:
            said = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line] or ["no message"]
            raise ToolchainUnavailableError(f"building PyPTO's calculator failed at {' '.join(command[:2])}: {said[0].strip()}")
    built = install / "lib" / LIBRARY
    if not built.is_file():
        raise ToolchainUnavailableError(f"building PyPTO's calculator left no {LIBRARY}")
    os.replace(built, target)
