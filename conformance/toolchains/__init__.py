"""Which toolchain is installed, what it can do on this machine, and what to do where it cannot."""

from conformance.toolchains.calculator import calculator
from conformance.toolchains.detection import Toolchain, ToolchainUnavailableError, detect
from conformance.toolchains.doctor import DoctorLine, doctor
from conformance.toolchains.npu import NpuStatus, find_npu

__all__ = [
    "DoctorLine",
    "NpuStatus",
    "Toolchain",
    "ToolchainUnavailableError",
    "calculator",
    "detect",
    "doctor",
    "find_npu",
]
