"""What a kernel's process and its owner tell each other. Tensors are named by their place in the arena."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from conformance.contract.dims import Dims
from conformance.lanes.arena import Slot
from conformance.lanes.base import Outcome

if TYPE_CHECKING:
    from conformance.cases.key import CaseKey

#: Which compiler passes are compared with the tensor graph: the last one, every one, or none.
Passes = Literal["last", "all", "none"]


@dataclasses.dataclass(frozen=True)
class KernelAddress:
    """How another process finds a kernel: a module (a file's path or a dotted name) and an attribute of it."""

    module: str
    attribute: str
    stage_name: str


@dataclasses.dataclass(frozen=True)
class Start:
    """The first message to a worker. ``folder`` takes logs; ``scratch`` what PyPTO writes, deleted after every run."""

    kernel: KernelAddress
    lane: str
    search_path: tuple[str, ...]
    folder: Path
    scratch: Path
    calculator: Path | None
    device_executor: str


@dataclasses.dataclass(frozen=True)
class Run:
    """Run the kernel on one case, or only compile it: then ``slots`` is empty and there is no ``key``."""

    dims: Dims
    passes: Passes
    key: CaseKey | None = None
    slots: tuple[Slot, ...] = ()


#: Runs one request with the tensors of a case by name.
RunRequest = Callable[[Run, dict[str, torch.Tensor]], Outcome]


@dataclasses.dataclass(frozen=True)
class Ready:
    """The worker has imported what it needs and found the kernel."""


@dataclasses.dataclass(frozen=True)
class Done:
    """A run's outcome; its outputs lie in the arena. ``healthy`` says whether the worker can run another case."""

    outcome: Outcome
    slots: tuple[Slot, ...]
    healthy: bool


@dataclasses.dataclass(frozen=True)
class Refused:
    """Not the kernel's result but its declaration is wrong, or the worker cannot do what was asked: one line for a person."""

    message: str
    #: Whether something is missing on the machine (the outcome is ``unavailable``) rather than wrong with the kernel.
    unavailable: bool = False
