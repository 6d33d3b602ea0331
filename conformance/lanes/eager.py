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
    import torch

    from conformance.cases.case import Case
    from conformance.contract.kernel import Kernel
    from conformance.lanes.base import Outcome
    from conformance.lanes.messages import Run, RunRequest, Start

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

    import conformance.lanes.buffers  # noqa: F401

    torch.set_num_threads(1)  # a thread pool would not survive the fork


def open_lane(kernel: Kernel, start: Start) -> RunRequest:
    """What a worker of the lane does with a request."""
    from conformance.cases.case import Case

    def run(request: Run, tensors: dict[str, torch.Tensor]) -> Outcome:
        assert request.key is not None
        return run_eager(kernel, Case(request.key, kernel.stage, request.dims, tensors))

    return run


def run_eager(kernel: Kernel, case: Case) -> Outcome:
    """Run a torch kernel on a case, in this process and thread.

    The kernel gets copies: every output and every updated tensor lies between guard regions, inputs are compared bit for bit
    afterwards. It is given other tensor objects on the same memory, so that rebinding one (``out.data = ...``, ``x.t_()``)
    changes nothing that is judged. An exception of the kernel is an outcome, ``SystemExit`` too; ``KeyboardInterrupt`` passes.
    """
    from conformance.contract.kernel import takes_dims
    from conformance.lanes.base import Outcome
    from conformance.lanes.buffers import Guarded, bits

    tensors: dict[str, torch.Tensor] = {}
    guards: dict[str, Guarded] = {}
    for argument in case.stage.arguments:
        if argument.access == "in":
            tensors[argument.name] = case.inputs[argument.name].clone()
            continue
        guarded = Guarded.of(argument.size(case.dims), argument.dtype)
        if argument.access == "io":
            guarded.tensor.copy_(case.inputs[argument.name])
        guards[argument.name] = guarded
        tensors[argument.name] = guarded.tensor
    keywords = {"dims": case.dims} if takes_dims(kernel.function) else {}
    began = time.perf_counter()
    try:
        returned = kernel.function(*(tensor.view(tensor.shape) for tensor in tensors.values()), **keywords)
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        return Outcome("raised", message=message, location=_location(error), seconds=time.perf_counter() - began)
    seconds = time.perf_counter() - began
    if returned is not None:
        return Outcome(
            "raised",
            message=f"a kernel writes its outputs in place and returns nothing; {kernel.name} returned {type(returned).__name__}",
            seconds=seconds,
        )
    changed = {}
    for argument in case.stage.arguments:
        if argument.access == "in":
            differing = bits(tensors[argument.name]) != bits(case.inputs[argument.name])
            if bool(differing.any()):
                changed[argument.name] = int(differing.sum())
    damage = {name: where for name, guarded in guards.items() if (where := guarded.damage()) is not None}
    outputs = {name: guarded.tensor for name, guarded in guards.items()}
    return Outcome("ok", outputs=outputs, changed_inputs=changed, guard_damage=damage, seconds=seconds)


def _location(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)[1:]
    if not frames:
        return None
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
