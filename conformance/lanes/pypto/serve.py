"""What the lanes of PyPTO have in common, inside a worker: building a kernel, and explaining its failures."""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel
from conformance.contract.stage import Stage
from conformance.errors import UsageError
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import Guarded
from conformance.lanes.messages import Passes, RunRequest
from conformance.lanes.pypto.runtime import KEPT_BUILDS, Builds, FirstCause, Runtime, explain, prepare
from conformance.lanes.worker import Start
from conformance.toolchains.detection import ToolchainUnavailableError


def preload(folder: Path) -> None:
    """Import what a PyPTO kernel's worker needs, in a fork server; the logs of all its workers go below ``folder``."""
    torch.set_num_threads(1)  # a thread pool would not survive the fork
    prepare(folder)
    import pypto  # noqa: F401


@dataclasses.dataclass(frozen=True)
class Build:
    """A kernel's program for the dimensions of a request, and what compiles it."""

    runtime: Runtime
    jit: Any
    stage: Stage
    dims: Dims


class Server:
    """A kernel in a lane of PyPTO: builds it, lets the lane do its own part, and explains what goes wrong."""

    def __init__(self, kernel: Kernel, start: Start, most_builds: int = KEPT_BUILDS) -> None:
        self.runtime = Runtime(start.folder, start.scratch, start.calculator)
        self._kernel = kernel
        self._builds = Builds(self.runtime, kernel, most_builds)

    def run(self, dims: Dims, part: Callable[[Build], Outcome]) -> Outcome:
        """What ``part`` makes of the kernel's build for these dimensions."""
        logging.getLogger().setLevel(logging.ERROR)
        began = datetime.datetime.now()
        jit = None
        with FirstCause().listening() as first:
            try:
                jit = self._builds[dims]
                return part(Build(self.runtime, jit, self._kernel.stage, dims))
            except (UsageError, ToolchainUnavailableError, KeyboardInterrupt):
                raise
            except BaseException as error:
                # SystemExit too: a kernel that calls sys.exit has not done its work.
                self.runtime.require_space()
                explanation = explain(
                    error, jit if jit is not None else _Builder(self._kernel), first.error, self.runtime.logged_errors(began)
                )
                return Outcome("raised", message=explanation.message, location=explanation.location)


def serve(kernel: Kernel, start: Start, run: Callable[[Build, Passes, dict[str, Guarded]], Outcome]) -> RunRequest:
    """What a lane of PyPTO does with a request.

    ``run`` gets the build, which compiler passes to compare, and the arguments of the case by name.
    """
    server = Server(kernel, start)

    def run_request(dims: Dims, passes: Passes, arguments: dict[str, Guarded]) -> Outcome:
        return server.run(dims, lambda build: run(build, passes, arguments))

    return run_request


class _Builder:
    """Stands for the jit object where the builder itself failed, so that the failure is located in its text."""

    def __init__(self, kernel: Kernel) -> None:
        self._original_func = kernel.function
