"""The eager lane: a torch callable, run here on guarded and poisoned buffers.

What takes long to import is imported where it is used: whoever asks which lanes there are needs none of it.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from conformance.lanes.lane import Lane

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from conformance.cases.case import Case
    from conformance.contract.dims import Dims
    from conformance.contract.kernel import Kernel
    from conformance.lanes.base import Outcome
    from conformance.lanes.buffers import Guarded
    from conformance.lanes.messages import Passes, RunRequest
    from conformance.lanes.worker import Start

EAGER = Lane(
    name="eager",
    summary="calls torch kernels directly, on guarded buffers",
    toolchains=("torch",),
    worker="conformance.lanes.eager",
    preload="conformance.lanes.eager",
    default=True,
    in_process=True,
    repeats_every_case=True,
    survives_failure=True,
    # A torch callable has one lane, where it is: it runs with those that are interpreted.
    marker="interpret",
)


def preload(folder: Path) -> None:
    """Import what a torch kernel's worker needs, in a fork server; ``folder`` is not used."""
    import torch

    torch.set_num_threads(1)  # a thread pool would not survive the fork


def open_lane(kernel: Kernel, start: Start) -> RunRequest:
    """What a worker of the lane does with a request."""

    def run(dims: Dims, passes: Passes, arguments: dict[str, Guarded]) -> Outcome:
        return call(kernel, dims, {name: guarded.tensor for name, guarded in arguments.items()})

    return run


def run_eager(kernel: Kernel, case: Case) -> Outcome:
    """Run a torch kernel on a case, in this process and thread.

    It gets copies, each argument between guard regions; inputs are compared bit for bit afterwards.
    """
    from conformance.lanes.arena import Arena
    from conformance.lanes.buffers import case_bytes, contents, fill, lay_out

    arena = Arena()
    try:
        arena.reach(case_bytes(case.stage, case.dims))
        arguments = lay_out(arena, case.stage, case.dims)
        fill(arguments, case.stage, case.inputs)
        outcome = call(kernel, case.dims, {name: guarded.tensor for name, guarded in arguments.items()})
        if outcome.status == "ok":
            left = contents(arguments, case.stage, case.inputs)
            outcome.outputs, outcome.changed_inputs, outcome.guard_damage = left.outputs, left.changed_inputs, left.guard_damage
        return outcome
    finally:
        arena.close()


def call(kernel: Kernel, dims: Dims, tensors: Mapping[str, torch.Tensor]) -> Outcome:
    """Call a torch kernel on its arguments in order.

    The kernel is given other tensor objects on the same memory, so that rebinding one (``x.t_()``) changes nothing that is
    judged; one to write that is no longer what was passed (``out.resize_``, ``out.data = ...``) counts as raised. An exception of
    the kernel is an outcome, ``SystemExit`` too; ``KeyboardInterrupt`` passes.
    """
    from conformance.contract.kernel import call_of
    from conformance.lanes.base import Outcome
    from conformance.outside import told

    passed = {name: tensor.view(tensor.shape) for name, tensor in tensors.items()}
    arguments, keywords = call_of(kernel.function, kernel.stage, passed, dims)
    before = {argument.name: _form(passed[argument.name]) for argument in kernel.stage.outputs}
    began = time.perf_counter()
    try:
        returned = kernel.function(*arguments, **keywords)
    except (Exception, SystemExit) as error:
        message = told(error).split("\n", 1)[0]
        return Outcome("raised", message=message, location=_location(error), seconds=time.perf_counter() - began)
    seconds = time.perf_counter() - began
    if returned is not None:
        return Outcome(
            "raised",
            message=f"a kernel writes its outputs in place and returns nothing; {kernel.name} returned {type(returned).__name__}",
            seconds=seconds,
        )
    for name, form in before.items():
        if _form(passed[name]) != form:
            return Outcome("raised", message=_rebound(kernel, name, form, _form(passed[name])), seconds=seconds)
    return Outcome("ok", seconds=seconds)


def _form(tensor: torch.Tensor) -> tuple[str, list[int], int]:
    """What a tensor object is besides its values: dtype, shape, and where its memory begins."""
    return str(tensor.dtype), list(tensor.shape), tensor.data_ptr()


def _rebound(kernel: Kernel, name: str, before: tuple[str, list[int], int], after: tuple[str, list[int], int]) -> str:
    old, new = (f"{form[0]} {form[1]}" for form in (before, after))
    how = f"made {name} {new}, which is {old}" if old != new else f"gave {name} other memory"
    return f"a kernel writes its outputs in the memory that it is given; {kernel.name} {how} (resize_, set_ or .data)"


def _location(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)[1:]
    if not frames:
        return None
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
