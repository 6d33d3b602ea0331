"""What can run on this machine, line by line, and what to do about what cannot."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
import shutil
import sys

from conformance.toolchains.calculator import calculator_path, find_cmake, is_whole
from conformance.toolchains.detection import Toolchain, detect
from conformance.toolchains.machine import DoctorLine, Machine, this_machine
from conformance.toolchains.npu import find_npu


def doctor(machine: Machine | None = None) -> tuple[DoctorLine, ...]:
    """Look at everything that the lanes need; nothing is built or downloaded, and no toolchain is imported.

    What the device lane needs comes last: ``npu``, and a line for each of its parts.
    """
    toolchain = detect()
    npu = find_npu(machine or this_machine())
    return (
        _python(),
        _torch(),
        *_pypto(toolchain),
        _tool("g++", shutil.which("g++"), "install g++ 9.4 or newer (Debian: apt install g++)"),
        _tool("make", shutil.which("make"), "install make (Debian: apt install make)"),
        _tool("cmake", find_cmake(), "pip install cmake"),
        _calculator(toolchain.supported),
        DoctorLine(
            "npu", npu.usable, "usable" if npu.usable else "not usable", "" if npu.usable else "only the device lane needs one"
        ),
        *(dataclasses.replace(line, name=f"- {line.name}") for line in npu.lines),
    )


def _python() -> DoctorLine:
    version = platform.python_version()
    ok = (3, 10) <= sys.version_info[:2] <= (3, 12) and sys.platform == "linux"
    return DoctorLine(
        "python", ok, f"{version} on {sys.platform}", "" if ok else "pypto has wheels for Python 3.10 to 3.12 on Linux"
    )


def _torch() -> DoctorLine:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return DoctorLine("torch", False, "not found", "pip install torch (2.6 or newer; a CPU build will do)")
    ok = tuple(int(number) for number in re.findall(r"\d+", version)[:2]) >= (2, 6)
    return DoctorLine("torch", ok, version, "" if ok else "2.6 or newer is needed, and where there are cards its torch_npu")


def _pypto(toolchain: Toolchain) -> tuple[DoctorLine, ...]:
    shown = f"{toolchain.version or 'no version'} ({toolchain.flavour})" if toolchain.flavour else "not found"
    line = DoctorLine("pypto", toolchain.supported, shown, "" if toolchain.supported else toolchain.message)
    if toolchain.supported or toolchain.capabilities is None:
        return (line,)
    lanes = [lane for lane in toolchain.capabilities.lacks if not toolchain.why_not(lane)]
    line = dataclasses.replace(line, found=f"{shown}, for {' and '.join(lanes) or 'no lane'}")
    return (line, *(DoctorLine("- pypto", True, remark) for remark in toolchain.capabilities.remarks))


def _tool(name: str, path: str | None, advice: str) -> DoctorLine:
    return DoctorLine(name, path is not None, path or "not found", "" if path else advice)


def _calculator(supported: bool) -> DoctorLine:
    if not supported:
        return DoctorLine("calculator", False, "not applicable", "needs a supported pypto first")
    path = calculator_path()
    if is_whole(path):
        return DoctorLine("calculator", True, str(path))
    return DoctorLine(
        "calculator", True, "not built yet", "the first interpreted kernel builds it (20 to 90 s, once per machine)"
    )
