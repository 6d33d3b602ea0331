"""Which toolchain is installed, what it can do on this machine, and what to do where it cannot."""

from conformance.toolchains.calculator import calculator
from conformance.toolchains.detection import Toolchain, ToolchainUnavailableError, detect
from conformance.toolchains.doctor import doctor
from conformance.toolchains.machine import DoctorLine, Machine, this_machine
from conformance.toolchains.npu import NpuStatus, find_npu

__all__ = [
    "DoctorLine",
    "Machine",
    "NpuStatus",
    "Toolchain",
    "ToolchainUnavailableError",
    "calculator",
    "detect",
    "doctor",
    "find_npu",
    "this_machine",
]
