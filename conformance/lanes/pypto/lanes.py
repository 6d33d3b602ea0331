"""The lanes of a PyPTO kernel, inside its worker: compile_only, interpret and device."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from conformance.contract.kernel import Kernel
from conformance.errors import UsageError
from conformance.lanes.base import Outcome
from conformance.lanes.compile_only import compile_only
from conformance.lanes.device import InterpreterCard, NpuCard, run_on_card
from conformance.lanes.interpret import interpret
from conformance.lanes.messages import Run, Start
from conformance.lanes.pypto.runtime import Builds, FirstCause, Runtime, explain, prepare
from conformance.lanes.pypto.unwritten import look_at_graph
from conformance.toolchains.detection import ToolchainUnavailableError

Lane = Callable[[Run, dict[str, torch.Tensor]], Outcome]


def preload(folder: Path) -> None:
    """Import what a PyPTO kernel's worker needs, in a fork server; the logs of all its workers go below ``folder``."""
    torch.set_num_threads(1)  # a thread pool would not survive the fork
    prepare(folder)
    import pypto  # noqa: F401


def open_lane(kernel: Kernel, start: Start) -> Lane:
    """The lane that a worker was started for; raises ``UsageError`` for one that there is not."""
    runtime = Runtime(start.folder, start.scratch, start.calculator)
    builds = Builds(runtime, kernel)

    def run(request: Run, tensors: dict[str, torch.Tensor]) -> Outcome:
        logging.getLogger().setLevel(logging.ERROR)
        began = datetime.datetime.now()
        jit = None
        with FirstCause().listening() as first:
            try:
                jit = builds[request.dims]
                if request.key is None:
                    return compile_only(runtime, jit, kernel.stage, request.dims)
                if start.lane == "interpret":
                    outcome = interpret(runtime, jit, kernel.stage, request.dims, tensors, request.passes)
                    if request.passes == "all":
                        # It takes another compile: made where everything is looked at, not for every case.
                        look_at_graph(outcome, runtime, jit, kernel.stage, request.dims)
                    return outcome
                card = NpuCard(runtime) if start.device_executor == "npu" else InterpreterCard(runtime)
                return run_on_card(card, jit, kernel.stage, request.dims, tensors)
            except (UsageError, ToolchainUnavailableError, KeyboardInterrupt):
                raise
            except BaseException as error:
                # SystemExit too: a kernel that calls sys.exit has not done its work.
                explanation = explain(
                    error, jit if jit is not None else _Builder(kernel), first.error, runtime.logged_errors(began)
                )
                return Outcome("raised", message=explanation.message, location=explanation.location)

    return run


class _Builder:
    """Stands for the jit object where the builder itself failed, so that the failure is located in its text."""

    def __init__(self, kernel: Kernel) -> None:
        self._original_func = kernel.function
