"""What runs a kernel on cases: in this process, or in a worker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from conformance.cases.case import Case
from conformance.contract.kernel import Declaration, Kernel
from conformance.lanes import lane_named
from conformance.lanes.base import Outcome
from conformance.lanes.cards import CardChoice
from conformance.lanes.messages import Passes
from conformance.running.runs import Runner


@contextlib.contextmanager
def eager_runner(kernel: Kernel) -> Iterator[Runner]:
    """Runs cases of a torch kernel in this process."""
    from conformance.lanes.eager import run_eager

    def run(case: Case, passes: Passes = "none") -> Outcome:
        return run_eager(kernel, case)

    yield run


@contextlib.contextmanager
def worker_runner(
    kernel: Declaration,
    lane: str,
    timeout: float | None = None,
    cards: CardChoice | None = None,
    folder: Path | None = None,
) -> Iterator[Runner]:
    """Runs cases in a worker process of the kernel's own, each within ``timeout`` seconds, in a lane of cards on one of these.

    ``folder`` takes the worker's logs.
    """
    from conformance.lanes.process import KernelProcess, Limits

    with KernelProcess(kernel, lane, limits=Limits.of_runs(timeout), cards=cards, folder=folder) as process:

        def compiled(case: Case, passes: Passes = "none") -> Outcome:
            return process.compile(case.dims)

        yield process.run if lane_named(lane).executes else compiled
