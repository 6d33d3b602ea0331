"""The compile_only lane: front end, compiler passes and control-flow code generation; nothing is executed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from conformance.lanes.lane import Lane

if TYPE_CHECKING:
    from conformance.lanes.base import Compiled


class CompileOnlyLane(Lane):
    """PyPTO's compiler, which needs neither a calculator nor a card; with CANN it compiles the cores' kernels too."""

    def require(self, device_executor: str, progress: Callable[[str], None] | None = None) -> Path | None:
        """Raise ``ToolchainUnavailableError`` without a PyPTO, or where it would look for a device compiler that is not there."""
        from conformance.toolchains.detection import ToolchainUnavailableError, detect
        from conformance.toolchains.npu import device_compiler_problem

        detect().require("compile_only")
        problem = device_compiler_problem()
        if problem:
            raise ToolchainUnavailableError(problem)
        return None


def attempted() -> Compiled:
    """How far a compile on this machine goes, if nothing fails."""
    from conformance.toolchains.machine import this_machine

    return "device compile" if this_machine().variable("ASCEND_HOME_PATH") else "host compile"


COMPILE_ONLY = CompileOnlyLane(
    name="compile_only",
    summary="compiles kernels with PyPTO's own compiler; nothing is executed, no NPU needed",
    toolchains=("pypto",),
    worker="conformance.lanes.pypto.compile_only",
    preload="conformance.lanes.pypto.serve",
    executes=False,
    # Compiling is about the text more than the sizes: one preset keeps the lane that every commit runs under a minute.
    presets=1,
)
