"""The interpret lane: PyPTO compiles the kernel and executes the compiled graph on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conformance.lanes.lane import Lane


class InterpretLane(Lane):
    """PyPTO's interpreter, with the calculator that is built once per machine."""

    def require(self, device_executor: str, progress: Callable[[str], None] | None = None) -> Path | None:
        """The calculator, built if this is its first use; raises ``ToolchainUnavailableError``."""
        from conformance.toolchains.calculator import calculator
        from conformance.toolchains.detection import detect

        detect().require()
        return calculator(progress)


INTERPRET = InterpretLane(
    name="interpret",
    summary="runs kernels through PyPTO's CPU interpreter and judges the results; no NPU needed",
    toolchains=("pypto",),
    worker="conformance.lanes.pypto.interpret",
    preload="conformance.lanes.pypto.serve",
    default=True,
    compares_passes=True,
)
