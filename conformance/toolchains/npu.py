"""Whether this machine has an NPU that kernels can run on, found without risking a crash of the calling process."""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

#: Starting torch_npu takes several seconds; a driver that hangs must not take the harness with it.
PROBE_SECONDS = 120
DEVICE_VARIABLE = "TILE_FWK_DEVICE_ID"

_PROBE = """
import torch, torch_npu
assert torch.npu.is_available()
torch.npu.set_device({device})
assert (torch.ones(1, device="npu:{device}") + 1).item() == 2
"""


@dataclasses.dataclass(frozen=True)
class NpuStatus:
    """Whether an NPU is usable, and what was looked for: (what, whether it was found), up to the first that was missing."""

    usable: bool
    looked_for: tuple[tuple[str, bool], ...]

    @property
    def reason(self) -> str:
        """One line that says why the device lane can or cannot run."""
        missing = [what for what, found in self.looked_for if not found]
        if self.usable:
            return "NPU found"
        return "no usable NPU: not found: " + "; ".join(missing)


def device_index() -> int:
    """The card to use, from ``TILE_FWK_DEVICE_ID``, or 0."""
    text = os.environ.get(DEVICE_VARIABLE, "")
    return int(text) if text.isdigit() else 0


def find_npu() -> NpuStatus:
    """Look for CANN, the driver's device files and torch_npu, and only if all are there run one addition in a subprocess."""
    home = os.environ.get("ASCEND_HOME_PATH", "")
    looked = [
        ("CANN (ASCEND_HOME_PATH naming a folder)", bool(home) and Path(home).is_dir()),
        ("driver (/dev/davinci_manager)", Path("/dev/davinci_manager").exists()),
        ("card (/dev/davinci0, ...)", bool(glob.glob("/dev/davinci[0-9]*"))),
        ("torch_npu", importlib.util.find_spec("torch_npu") is not None),
    ]
    if not all(found for _, found in looked):
        return NpuStatus(False, tuple(looked))
    device = device_index()
    works = _probe(device)
    looked.append((f"one addition on npu:{device} within {PROBE_SECONDS} s", works))
    return NpuStatus(works, tuple(looked))


def _probe(device: int) -> bool:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE.format(device=device)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
