"""A folder that stands for a machine with cards: nodes, CANN, driver, torch_npu; each part can be missing or wrong."""

from __future__ import annotations

import os
from pathlib import Path

from conformance.toolchains.machine import Machine

#: As ``npu-smi info`` of an Atlas A3 prints it, shortened.
SMI_HEAD = """
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.0                   Version: 25.5.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 178.5       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3416 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          3195 / 65536         |
+===========================+===============+====================================================+
| 1     Ascend910           | OK            | 186.3       36                0    / 0             |
| 0     2                   | 0000:99:00.0  | 0           0    / 0          3415/ 65536          |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
"""
SMI_IDLE = SMI_HEAD + "| No running processes found in NPU 0                            |\n"
SMI_BUSY = SMI_HEAD + "| 0       1                 | 632268        | python3.1                | 197                     |\n"
#: The same of an Atlas A2, whose cards have one chip.
SMI_A2 = """
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
| 6     910B3               | OK            | 97.5        41                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3379 / 65536         |
| 7     910B3               | OK            | 93.9        40                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          61000/ 65536         |
| NPU     Chip              | Process id    | Process name       | Process memory(MB)    | Process id in container |
| 7       0                 | 4242          | vllm               | 57000                 | 17                      |
"""


def torch_npu_of(cards: int) -> str:
    """The text of a torch_npu that sees so many cards, and has something to say at the end."""
    return _TORCH_NPU.format(cards=cards)


_TORCH_NPU = """
import atexit
import types
import torch
atexit.register(print, "[INFO] {{bye}}\\n{{")
torch.npu = types.SimpleNamespace(
    is_available=lambda: True, device_count=lambda: {cards}, get_device_name=lambda index: "Ascend910B3"
)
"""


class FakeMachine:
    """What a test makes of a folder; ``machine`` looks at it, and ``environment`` is what a process on it would have.

    ``torch`` puts a torch of three lines beside torch_npu, for what only imports both.
    """

    def __init__(self, folder: Path, *, cards: int = 2, torch: bool = True) -> None:
        self.root, self.cann, self.packages = folder / "root", folder / "cann", folder / "packages"
        self.environment = {
            "ASCEND_HOME_PATH": str(self.cann),
            "PATH": os.pathsep.join([str(self.cann / "bin"), "/usr/bin", "/bin"]),
            "PYTHONPATH": str(self.packages),
        }
        for name in ("davinci_manager", "devmm_svm", "hisi_hdc", *(f"davinci{number}" for number in range(cards))):
            self.write(self.root / "dev" / name)
        (self.root / "tmp").mkdir()
        self.write(self.root / "etc" / "ascend_install.info", "Driver_Install_Path_Param=/opt/Ascend\n")
        self.driver_says("25.5.0")
        self.write(self.root / "usr/local/Ascend/firmware/version.info", "Version=7.8.0.5.216\n")
        self.cann_says("9.1.0")
        self.write(self.cann / "include" / "pto" / "pto-inst.hpp")
        self.hcc = self.cann / "toolkit/toolchain/hcc/bin/aarch64-target-linux-gnu-g++"
        self.write(self.hcc)
        self.program("bisheng", "exit 1")
        self.torch_npu(torch_npu_of(cards))
        self.write(self.packages / "torch_npu-2.7.1.dist-info" / "METADATA", "Name: torch_npu\nVersion: 2.7.1\n")
        if torch:
            self.write(self.packages / "torch.py")
            self.write(self.packages / "torch-2.7.1.dist-info" / "METADATA", "Name: torch\nVersion: 2.7.1\n")

    @staticmethod
    def write(path: Path, text: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def driver_says(self, version: str) -> None:
        self.write(self.root / "opt/Ascend/driver/version.info", f"Version={version}\nascendhal_version=7.35.23\n")

    def cann_says(self, version: str) -> None:
        self.write(self.cann / "opp" / "version.info", f"Version={version}\nversion_dir=cann\n")

    def torch_npu(self, text: str) -> None:
        self.write(self.packages / "torch_npu" / "__init__.py", text)

    def program(self, name: str, script: str) -> None:
        self.write(self.cann / "bin" / name, f"#!/bin/sh\n{script}\n")
        (self.cann / "bin" / name).chmod(0o755)

    def smi(self, text: str) -> None:
        self.write(self.cann / "smi.txt", text)
        self.program("npu-smi", f"cat {self.cann / 'smi.txt'}")

    @property
    def machine(self) -> Machine:
        return Machine(self.root, self.environment, search_path=(str(self.packages),))
