"""What a lane is: where kernels are run, what that takes, and what its results are worth. Light: nothing of it imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Lane:
    """One place where kernels are run. ``docs/adding-a-lane.md`` says what else a new one needs: a line in the registry.

    A subclass says what the lane needs of a machine by overriding ``require``, and ``missing`` where machines without it are the
    rule. Fields:

    - ``name``: as the command, records and reports know it; ``summary``: one line for help texts.
    - ``toolchains``: whose kernels it takes; ``default`` where these run unless a lane is named.
    - ``worker``: the module whose ``open_lane(kernel, start)`` gives, inside a worker, the function that runs a request.
    - ``preload``: the module whose ``preload(folder)`` imports what a worker needs, in a fork server; ``None``: never forked.
    - ``executes``: whether kernels are run on data; otherwise they are only compiled, and results say nothing about values.
    - ``in_process``: whether kernels can also run in the calling process.
    - ``repeats_every_case``: runs are cheap, so each case is repeated and rows are checked again and again; otherwise all extra
      runs come once for each kernel and dimensions.
    - ``compares_passes``: whether what the compiler's passes make of a kernel is compared.
    - ``survives_failure``: whether a worker in which a kernel failed can run another case.
    - ``repeats``: how often a case that is repeated is run again, and how often at night.
    - ``marker``: what selects it in the suites, as in ``pytest -m interpret``; its own name unless given.
    - ``presets``: how many of a model's presets the suites run, from the first; all of them where it is ``None``.
    """

    name: str
    summary: str
    toolchains: tuple[str, ...]
    worker: str
    preload: str | None = None
    default: bool = False
    executes: bool = True
    in_process: bool = False
    repeats_every_case: bool = False
    compares_passes: bool = False
    survives_failure: bool = False
    repeats: tuple[int, int] = (1, 1)
    marker: str = ""
    presets: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "marker", self.marker or self.name)

    def require(self, device_executor: str, progress: Callable[[str], None] | None = None) -> Path | None:
        """The calculator, if the lane computes with it; ``progress`` is told of a wait.

        Raises ``ToolchainUnavailableError`` for what is not on this machine. ``device_executor`` is ``npu``, or ``interpret``
        where PyPTO's interpreter stands in for the card.
        """
        return None

    def missing(self, device_executor: str) -> str:
        """Why the lane cannot run on this machine, where that is usual and a skip rather than an error; empty if it can."""
        return ""

    def takes_card(self, device_executor: str) -> bool:
        """Whether kernels run on a card, of which each process takes one (``conformance.lanes.cards``) once they are compiled."""
        return False

    def preloads(self, device_executor: str) -> str | None:
        """The module that a fork server imports for the lane's workers; ``None`` if they must not be forked."""
        return self.preload
