"""The device lane: the same kernel on an NPU, or on the interpreter standing in for one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from conformance.lanes.interpret import INTERPRET
from conformance.lanes.lane import Lane

NPU = "npu"
#: What may stand in for the card: PyPTO's interpreter.
STAND_INS = (INTERPRET.name,)
#: What the lane may run on.
DEVICE_EXECUTORS = (NPU, *STAND_INS)
#: Names a class, ``module:Class``, that drives something else in place of a card. Only tests set it.
CARD_VARIABLE = "CONFORMANCE_TEST_CARD"


class DeviceLane(Lane):
    """A card, which most machines do not have."""

    def require(self, device_executor: str, progress: Callable[[str], None] | None = None) -> Path | None:
        """The stand-in's calculator; raises ``ToolchainUnavailableError`` for a card that is not there."""
        from conformance.toolchains.detection import ToolchainUnavailableError, detect

        if device_executor in STAND_INS:
            return INTERPRET.require(device_executor, progress)
        detect().require("device")
        if CARD_VARIABLE in os.environ:
            return None
        reason = self.missing(device_executor)
        if reason:
            raise ToolchainUnavailableError(reason)
        return None

    def missing(self, device_executor: str) -> str:
        """Why no card is usable; empty if one is, or if the interpreter stands in for it."""
        return "" if device_executor in STAND_INS or CARD_VARIABLE in os.environ else _missing(tuple(sorted(os.environ.items())))

    def takes_card(self, device_executor: str) -> bool:
        """Unless the interpreter stands in for the card."""
        return device_executor not in STAND_INS

    def preloads(self, device_executor: str) -> str | None:
        """Only the stand-in is forked: what a driver sets up in a process is not known to outlive a fork."""
        return INTERPRET.preload if device_executor in STAND_INS or CARD_VARIABLE in os.environ else None


@functools.lru_cache(maxsize=4)
def _missing(environment: tuple[tuple[str, str], ...]) -> str:
    """Why no NPU is usable; looked for once in a process and environment, since every test asks."""
    from conformance.toolchains.detection import detect
    from conformance.toolchains.npu import find_npu

    npu = find_npu()
    if not npu.usable:
        return npu.reason
    return detect().why_not("device")


DEVICE = DeviceLane(
    name="device",
    summary="runs kernels on an NPU; skipped where none is usable, unless --conformance-require-device",
    toolchains=("pypto",),
    worker="conformance.lanes.pypto.device",
    # Users of PyPTO saw races in 1 of 50 to 7 of 10 runs, and took them for mended when 20 of 20 agreed.
    repeats=(20, 100),
)
