"""What every lane answers. A lane never raises for what a kernel does: it says so in its outcome."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

Status = Literal["ok", "raised", "crashed", "timed_out", "unavailable"]
#: How far a kernel that is not executed was compiled, or was to be where that failed: without the kernels of the cores, or with
#: them, by the device's compiler.
Compiled = Literal["", "host compile", "device compile"]


@dataclasses.dataclass(frozen=True)
class PassDifference:
    """A compiler pass after which one function of the program computes something else from the same inputs."""

    compiler_pass: str
    function: str
    #: What the function's result is called in the kernel's text, if known; loop indices as the interpreter prints them.
    result: str
    loop: str
    #: Worst absolute difference, how many elements differ beyond what reordering explains, and out of how many.
    worst: float
    count: int
    total: int
    message: str


@dataclasses.dataclass(frozen=True)
class UnwrittenRead:
    """A read of memory that nothing wrote, on which what the kernel leaves in an argument depends."""

    argument: str
    message: str
    #: ``file:line`` of the read in the kernel's text, where the toolchain tells.
    location: str | None
    #: How many of the elements that are read nothing wrote, and out of how many.
    count: int
    total: int


@dataclasses.dataclass
class Outcome:
    """What one run of one kernel on one case left behind.

    ``message`` says what went wrong, and of a run that is ``"ok"`` what could not be looked at.
    ``outputs`` holds every argument that the stage may write, as it was afterwards; it is empty unless ``status`` is ``"ok"``
    and the kernel was executed rather than only compiled. ``changed_inputs`` and ``guard_damage`` name arguments; the latter says
    where.
    """

    status: Status
    outputs: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    message: str = ""
    #: ``file:line`` in the kernel's text, where the toolchain tells.
    location: str | None = None
    changed_inputs: dict[str, int] = dataclasses.field(default_factory=dict)
    guard_damage: dict[str, str] = dataclasses.field(default_factory=dict)
    pass_differences: tuple[PassDifference, ...] = ()
    #: How many (pass, function, loop trip, result) comparisons were made, so that none is not mistaken for agreement.
    passes_compared: int = 0
    unwritten_reads: tuple[UnwrittenRead, ...] = ()
    #: Whether the kernel was run on data: then a run that is ``"ok"`` without all of its outputs is no pass.
    executed: bool = True
    compiled: Compiled = ""
    #: Seconds the lane took, without generating or judging the case, and the worker's peak resident memory in bytes.
    seconds: float = 0.0
    peak_memory: int | None = None
    #: On a card: which one, how often the kernel was compiled for the run, seconds from the launch to its end by the card's
    #: clock, and the code of the error that the card reported.
    card: int | None = None
    compiles: int = 0
    device_seconds: float | None = None
    device_error: int | None = None
    #: Runs that this outcome stands for, and by number the cards that were given up on the way to it, each with the reason.
    launches: int = 1
    given_up: dict[int, str] = dataclasses.field(default_factory=dict)
