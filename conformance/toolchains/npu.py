"""Whether this machine has an NPU that kernels can run on, found without risking a crash of the calling process.

What is looked at here costs next to nothing, but for one import of torch_npu in a process of its own, which is made where all
else is there. No card is used: whether one computes is found out by who runs kernels on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import msgspec

from conformance.toolchains.machine import DoctorLine, Machine, this_machine
from conformance.toolchains.npu_smi import card_states

#: Starting torch_npu takes several seconds; a driver that hangs must not take the harness with it.
PROBE_SECONDS = 120
DEVICE_VARIABLE = "TILE_FWK_DEVICE_ID"
#: Set where torch must not load torch_npu by itself: a broken one would keep everything from starting.
AUTOLOAD_VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"

#: What PyPTO's documentation asks for: an older driver or CANN fails when a kernel is launched (507018).
LEAST_CANN = (8, 5)
LEAST_DRIVER = (25, 2)
#: Where CANN says its version, below its folder, and what names it in a file.
_CANN_FILES = (
    "opp/version.info",
    "compiler/version.info",
    "runtime/version.info",
    "share/info/*/version.info",
    "*-linux/ascend_toolkit_install.info",
)
_ADVICE = "source CANN's set_env.sh"
#: What a process that runs kernels opens besides a card: the driver's own node, and those that a container is given beside it.
_DRIVER_NODE, _OTHER_NODES = "/dev/davinci_manager", ("/dev/devmm_svm", "/dev/hisi_hdc")

_PROBE = """
import json
import torch
try:
    import torch_npu
except BaseException as error:
    print(json.dumps({"problem": f"does not import: {type(error).__name__}: {error}"}))
    raise SystemExit(0)
told = {"count": torch.npu.device_count() if torch.npu.is_available() else 0}
try:
    told["soc"] = torch.npu.get_device_name(0)
except Exception:
    pass
print(json.dumps(told))
"""


@dataclasses.dataclass(frozen=True)
class NpuStatus:
    """Whether an NPU is usable, and what was looked at."""

    usable: bool
    lines: tuple[DoctorLine, ...]

    @property
    def reason(self) -> str:
        """One line that says why the device lane can or cannot run: what is wrong, then what is there."""
        there = "; ".join(f"{line.name} {line.found}" for line in self.lines if line.ok)
        if self.usable:
            return f"NPU found: {there}"
        wrong = "; ".join(line.problem for line in self.lines if not line.ok)
        return f"no usable NPU: {wrong}" + (f". Found: {there}" if there else "")


def device_index() -> int:
    """What torch calls the card that a worker was told to use; 0 if it was told nothing."""
    text = os.environ.get(DEVICE_VARIABLE, "")
    return int(text) if text else 0


def find_npu(machine: Machine | None = None) -> NpuStatus:
    """Look for CANN, its device compiler, the driver, cards and torch_npu; only if all are there, import it in a subprocess."""
    machine = machine or this_machine()
    lines = [*compiler_lines(machine), _hcc(machine), _driver(machine), _cards(machine), _torch_npu(machine)]
    if all(line.ok for line in lines):
        lines[-1] = _imported(machine, lines[-1])
    told = [line for line in (_firmware(machine), _memory(machine)) if line is not None]
    return NpuStatus(all(line.ok for line in lines), (*lines, *told))


def compiler_lines(machine: Machine) -> tuple[DoctorLine, DoctorLine, DoctorLine]:
    """What it takes to compile the kernels of the cores: CANN, its compiler, and the headers that generated code includes."""
    return _cann(machine), _bisheng(machine), _pto_isa(machine)


def device_compiler_problem(machine: Machine | None = None) -> str:
    """Why kernels cannot be compiled for the device, where that is asked for by ``ASCEND_HOME_PATH``; empty otherwise."""
    machine = machine or this_machine()
    if not machine.variable("ASCEND_HOME_PATH"):
        return ""
    problems = "; ".join(line.problem for line in compiler_lines(machine) if not line.ok)
    return f"no device compiler: {problems}; without ASCEND_HOME_PATH kernels are compiled for the host alone" if problems else ""


def _cann(machine: Machine) -> DoctorLine:
    home = machine.variable("ASCEND_HOME_PATH")
    if not home:
        return DoctorLine("CANN", False, "not found: ASCEND_HOME_PATH is not set", _ADVICE)
    if not Path(home).is_dir():
        return DoctorLine("CANN", False, f"not found: ASCEND_HOME_PATH is {home}, which is no folder", _ADVICE)
    version = _cann_version(Path(home))
    if version and _numbers(version) < LEAST_CANN:
        return DoctorLine("CANN", False, f"{version} in {home} is too old", f"{_dotted(LEAST_CANN)} or newer is needed")
    return DoctorLine("CANN", True, f"{version or 'of unknown version'} in {home}")


def _cann_version(home: Path) -> str:
    for pattern in _CANN_FILES:
        for path in sorted(home.glob(pattern)):
            version = _version_in(path)
            if version:
                return version
    named = re.search(r"(?:cann|toolkit)[-/](\d+\.\d[\w.]*)", str(home.resolve()))
    return named[1] if named else ""


def _bisheng(machine: Machine) -> DoctorLine:
    path = machine.program("bisheng")
    if path:
        return DoctorLine("bisheng", True, path)
    home = machine.variable("ASCEND_HOME_PATH")
    beside = (
        []
        if not home
        else [
            path
            for pattern in ("bin", "ccec_compiler/bin", "*/ccec_compiler/bin")
            for path in Path(home).glob(f"{pattern}/bisheng")
        ]
    )
    if beside:
        return DoctorLine("bisheng", False, f"not found on PATH, but as {beside[0]}", _ADVICE)
    return DoctorLine("bisheng", False, "not found on PATH", f"CANN's device compiler: {_ADVICE}, or install the toolkit")


def _pto_isa(machine: Machine) -> DoctorLine:
    variable = next((name for name in ("PTO_TILE_LIB_CODE_PATH", "ASCEND_HOME_PATH") if machine.variable(name)), "")
    if not variable:
        return DoctorLine("pto-isa", False, "not found: ASCEND_HOME_PATH is not set", _ADVICE)
    headers = Path(machine.variable(variable)) / "include" / "pto"
    if headers.is_dir():
        return DoctorLine("pto-isa", True, str(headers))
    advice = "set PTO_TILE_LIB_CODE_PATH to a copy of pto-isa, or use a CANN that has it"
    return DoctorLine("pto-isa", False, f"not found: {variable} has no {headers}", advice)


def _hcc(machine: Machine) -> DoctorLine:
    """The compiler of the AICPU: without it PyPTO warns, and puts a trap in the place of a kernel's control flow."""
    path = Path(machine.variable("ASCEND_HOME_PATH") or "/") / "toolkit/toolchain/hcc/bin/aarch64-target-linux-gnu-g++"
    if path.exists():
        return DoctorLine("hcc", True, str(path))
    return DoctorLine("hcc", False, f"not found: {path}", "the compiler of the AICPU, which CANN's toolkit has")


def _driver(machine: Machine) -> DoctorLine:
    if not machine.path(_DRIVER_NODE).exists():
        nodes = f"{_DRIVER_NODE}, {', '.join(_OTHER_NODES)}"
        return DoctorLine("driver", False, f"not found: {_DRIVER_NODE}", f"install it, or give the container {nodes}")
    version = _version_in(_installed(machine, "Driver") / "driver" / "version.info")
    if version and _numbers(version) < LEAST_DRIVER:
        return DoctorLine("driver", False, f"{version} is too old", f"{_dotted(LEAST_DRIVER)} or newer is needed")
    missing = [node for node in _OTHER_NODES if not machine.path(node).exists()]
    without = f", without {', '.join(missing)}, which it needs as a rule" if missing else ""
    return DoctorLine("driver", True, f"{version or 'of unknown version'}{without}")


def _firmware(machine: Machine) -> DoctorLine | None:
    # Often on the host alone, out of a container's sight.
    version = _version_in(_installed(machine, "Firmware") / "firmware" / "version.info")
    return DoctorLine("firmware", True, version) if version else None


def _installed(machine: Machine, what: str) -> Path:
    """The folder that a part of the driver was installed to."""
    try:
        table = machine.path("/etc/ascend_install.info").read_text(encoding="utf-8", errors="replace")
    except OSError:
        table = ""
    match = re.search(rf"^{what}_Install_Path_Param=(\S+)", table, re.MULTILINE)
    return machine.path(match[1] if match else "/usr/local/Ascend")


def _cards(machine: Machine) -> DoctorLine:
    nodes = machine.card_nodes()
    if not nodes:
        visible = machine.environment.get("ASCEND_RT_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" by ASCEND_RT_VISIBLE_DEVICES={visible}"
        advice = "install the driver, or give the container a card's node"
        return DoctorLine("cards", False, f"not found: /dev/davinci0, ...{hidden}", advice)
    shown = ", ".join(f"/dev/davinci{node.number} (mode {stat.S_IMODE(node.path.stat().st_mode):03o})" for node in nodes)
    if not any(machine.may_use(node.path) for node in nodes):
        return DoctorLine("cards", False, f"may not be used: {shown}", "join the group that owns them, as a rule HwHiAiUser")
    return DoctorLine("cards", True, shown)


def _torch_npu(machine: Machine) -> DoctorLine:
    if not machine.has_package("torch_npu"):
        return DoctorLine("torch_npu", False, "not found", "install the harness into the Python that has it")
    versions = f"{machine.version_of('torch_npu', 'torch-npu') or 'of unknown version'}, torch {machine.version_of('torch')}"
    return DoctorLine("torch_npu", True, versions)


def _imported(machine: Machine, line: DoctorLine) -> DoctorLine:
    """What becomes of torch_npu's line when it is imported."""
    told = _probe(tuple(sorted(machine.environment.items())))
    if told.problem:
        return DoctorLine("torch_npu", False, f"{line.found} {told.problem}", "it must match torch and CANN")
    count, nodes = told.count, len(machine.card_nodes())
    if not count:
        return DoctorLine("torch_npu", False, f"{line.found} sees no card", "npu-smi info says what state they are in")
    return dataclasses.replace(line, found=f"{line.found}, {told.soc or 'unknown SoC'}, {count} of {nodes} cards")


class _Told(msgspec.Struct):
    """What importing torch_npu showed."""

    problem: str = ""
    count: int = 0
    soc: str = ""


@functools.lru_cache(maxsize=4)
def _probe(environment: tuple[tuple[str, str], ...]) -> _Told:
    """Import torch_npu; once for a process and an environment, since it takes seconds."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env={**dict(environment), AUTOLOAD_VARIABLE: "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return _Told(f"does not start within {PROBE_SECONDS} s")
    except OSError as error:
        return _Told(f"cannot be tried: {error.strerror or error}")
    # Libraries print as well: ours is the last line that is an answer.
    for line in reversed(done.stdout.splitlines()):
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(line, type=_Told)
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return _Told(f"does not start: {said}")


def _memory(machine: Machine) -> DoctorLine | None:
    """The free memory of each card, where ``npu-smi`` tells."""
    states = card_states(machine)
    free = [
        f"card {node.number}: {states[node.number].free / 2**30:.1f} of {states[node.number].total / 2**30:.1f} GiB"
        + ("" if not (users := len(states[node.number].processes)) else f", {users} process{'es' * (users > 1)}")
        for node in machine.card_nodes()
        if node.number in states
    ]
    return DoctorLine("free memory", True, "; ".join(free)) if free else None


def _version_in(path: Path) -> str:
    """The version that a file of CANN or of the driver names; empty where it does not."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    match = re.search(r"^\s*version\s*=\s*\"?([\w.\-]+)", text, re.IGNORECASE | re.MULTILINE)
    return match[1] if match else ""


def _numbers(version: str) -> tuple[int, ...]:
    """The leading two numbers of a version, to compare by."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
