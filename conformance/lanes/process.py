"""One kernel in one lane, run in a worker process of its own."""

from __future__ import annotations

import functools
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import Declaration, Kernel, unbound
from conformance.errors import UsageError
from conformance.lanes import lane_named, lanes_of
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import case_bytes, contents, fill, lay_out, places
from conformance.lanes.card_pool import CardPool, card_pool
from conformance.lanes.cards import Card, CardChoice
from conformance.lanes.compile_only import attempted
from conformance.lanes.device import DEVICE_EXECUTORS, NPU
from conformance.lanes.device_compiler import CompilerUnavailableError, compiler_failure, no_kernel_compiles
from conformance.lanes.listing import ListedKernel
from conformance.lanes.messages import Compile, OpenLane, Passes, Probe, Result, Run, outcome_of
from conformance.lanes.on_card import CardRuns
from conformance.lanes.worker_process import Limits, UnknownEndError, WorkerError, WorkerProcess
from conformance.outside import one_line
from conformance.toolchains.detection import ToolchainUnavailableError
from conformance.toolchains.progress import Progress

if TYPE_CHECKING:
    import torch

    from conformance.cases.case import Case

__all__ = ["KernelProcess", "Limits"]


class KernelProcess:
    """Runs one kernel in one lane, in a process of its own.

    ``lane`` is the name of one that takes the kernel's toolchain (``conformance.lanes.LANES``). ``folder`` takes the worker's
    logs; without one they go to a temporary folder that ``close`` removes. ``device_executor="interpret"`` lets the interpreter
    stand in for the card in the device lane; otherwise ``cards`` says on which one it runs, of ``pool`` if that is given.
    ``progress`` is told of a wait (the calculator's first build).

    What a kernel does is an ``Outcome``, whatever it does. ``UsageError`` is raised for what is wrong with the question: a lane
    that the toolchain does not have, a kernel that another process cannot import, annotations that are not the contract's.
    """

    def __init__(
        self,
        kernel: Declaration,
        lane: str,
        *,
        limits: Limits | None = None,
        folder: Path | None = None,
        device_executor: str = "npu",
        cards: CardChoice | None = None,
        progress: Progress | None = None,
        pool: CardPool | None = None,
    ) -> None:
        self._lane = lane_named(lane)
        if kernel.toolchain not in self._lane.toolchains:
            known = ", ".join(one.name for one in lanes_of(kernel.toolchain))
            raise UsageError(f"kernel {kernel.name} is a {kernel.toolchain} kernel, whose lanes are {known}; found {lane!r}")
        if device_executor not in DEVICE_EXECUTORS:
            raise UsageError(f"device_executor is {' or '.join(map(repr, DEVICE_EXECUTORS))}, found {device_executor!r}")
        self.kernel = kernel
        self.lane = lane
        self._worker = WorkerProcess(limits=limits or Limits(), folder=folder, source=kernel.source)
        self._module, self._attribute = address_of(kernel)
        self._device_executor = device_executor
        self._cards = cards or CardChoice()
        self._progress = progress
        self._unavailable: str | None = None
        self._has_lane = False
        self._folder = folder
        self._on_card: CardRuns | None = None
        if self._lane.takes_card(device_executor):
            self._on_card = CardRuns(
                lambda: pool or card_pool(self._cards),
                kernel.id,
                begin=self._worker.stop,
                is_set_up=lambda: self.pid is not None and bool(self._compiled),
                probe=self._probe,
            )
        #: What the worker has compiled for, and the inputs that it had last, each with the count of its changes.
        self._compiled: set[Dims] = set()
        self._last: dict[str, tuple[weakref.ref[torch.Tensor], int]] = {}
        #: Where in the arena the arguments of the run before lie, of those that were found to be as they were put there.
        self._intact: dict[str, int] = {}

    def __enter__(self) -> KernelProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def limits(self) -> Limits:
        """What the kernel may use."""
        return self._worker.limits

    @property
    def pid(self) -> int | None:
        """The number of the worker process; ``None`` while there is none."""
        return self._worker.pid

    @property
    def starts(self) -> int:
        """How many worker processes were started so far."""
        return self._worker.starts

    def run(self, case: Case, passes: Passes = "last") -> Outcome:
        """Run the kernel on a case; ``passes`` says which compiler passes the interpret lane compares with the tensor graph.

        What the kernel left is read, and compared with what it was given, on this side of the memory that is shared with it.
        """
        if not self._lane.executes:
            raise UsageError(f"the {self.lane} lane executes nothing: use compile(dims)")
        if passes not in ("last", "all", "none"):
            raise UsageError(f"passes is 'last', 'all' or 'none', found {passes!r}")

        def request() -> Run:
            arena = self._worker.arena
            assert arena is not None
            arena.reach(case_bytes(case.stage, case.dims))
            unchanged = self._unchanged(case) if self._on_card is not None else ()
            where = places(case.stage, case.dims)
            held = [name for name in unchanged if self._intact.get(name) == where[name]]
            self._intact = {}
            fill(lay_out(arena, case.stage, case.dims), case.stage, case.inputs, held)
            return Run(case.dims.sizes, passes, unchanged)

        if self._on_card is None or self._lacks_lane():
            outcome = self._ask(request, self.limits.seconds, "the run")
        else:
            launched = functools.partial(self._ask, request, self.limits.launch_seconds, "the launch")
            outcome = self._on_card.run(lambda: self._compile_for(case.dims), launched)
        if outcome.status == "ok":
            assert self._worker.arena is not None
            left = contents(lay_out(self._worker.arena, case.stage, case.dims), case.stage, case.inputs)
            outcome.outputs, outcome.changed_inputs, outcome.guard_damage = left.outputs, left.changed_inputs, left.guard_damage
            damaged = left.changed_inputs.keys() | left.guard_damage.keys()
            self._intact = {name: at for name, at in places(case.stage, case.dims).items() if name not in damaged}
        return outcome

    def compile(self, dims: Dims) -> Outcome:
        """Compile the kernel for these dimensions; no input is needed and nothing is executed."""
        if self._lane.executes:
            raise UsageError(f"the {self.lane} lane runs cases: use run(case)")
        outcome = self._ask(lambda: Run(dims.sizes, "none"), self.limits.seconds, "the run")
        if self._says_compiler(outcome):
            problem = compiler_problem(self.lane, self.limits)
            if problem:
                self._unavailable = problem
                return Outcome("unavailable", message=problem)
        if outcome.status not in ("ok", "unavailable"):
            # Which compiler it was is a part of the verdict, and a process that is lost cannot say: PyPTO ends it where the
            # device's compiler fails.
            outcome.compiled = attempted()
        return outcome

    def _says_compiler(self, outcome: Outcome) -> bool:
        """Whether it was the device's compiler that failed; the outcome then says what that printed."""
        if outcome.status not in ("raised", "crashed"):
            return False
        said = compiler_failure([*self._worker.printed(), outcome.message])
        if said and said not in outcome.message:
            outcome.message = f"the device's compiler failed: {said}; {outcome.message}"
        return bool(said)

    def _unchanged(self, case: Case) -> tuple[str, ...]:
        """The inputs that are the very tensors of the run before, which nobody has changed since."""
        before, self._last = self._last, {}
        found = []
        for argument in case.stage.arguments:
            if argument.access == "in":
                tensor = case.inputs[argument.name]
                last, changes = before.get(argument.name, (None, -1))
                if last is not None and last() is tensor and changes == tensor._version:
                    found.append(argument.name)
                self._last[argument.name] = weakref.ref(tensor), tensor._version
        return tuple(found)

    def _lacks_lane(self) -> bool:
        """Whether the machine lacks what the lane needs: seen before a card is looked for."""
        if self._unavailable is None and not self._has_lane:
            try:
                self._lane.require(self._device_executor, self._progress)
                self._has_lane = True
            except ToolchainUnavailableError as error:
                self._unavailable = str(error)
        return self._unavailable is not None

    def _compile_for(self, dims: Dims) -> Outcome:
        """Compile for runs on a card that follow, unless this worker has done so."""
        build = self.kernel.built_for(dims)
        if self.pid is not None and build in self._compiled:
            return Outcome("ok")
        outcome = self._ask(lambda: Compile(dims.sizes), self.limits.compile_seconds, "compiling")
        if outcome.status == "ok":
            self._compiled.add(build)
        self._says_compiler(outcome)
        return outcome

    def _probe(self, card: Card) -> str:
        """Why a card cannot be used; an empty string if it is well. Raises ``CompilerUnavailableError`` where no card can."""
        folder = None if self._folder is None else self._folder / "probe"
        asked = Probe(self.lane, self._device_executor, card)
        try:
            return _probed(asked, self.limits, self.limits.probe_seconds, folder)
        except CompilerUnavailableError:
            raise
        except ToolchainUnavailableError as error:
            return one_line(error, 500)

    def close(self) -> None:
        """End the worker and remove its temporary files; closing twice is harmless, and a later run starts anew."""
        self._worker.close()

    def _ask(self, request: Callable[[], Run | Compile], seconds: float, what: str) -> Outcome:
        """Ask the worker, started first if there is none; ``request`` writes what it needs into the arena.

        ``seconds`` is the limit of the request, ``what`` says what goes on.
        """
        if self._unavailable is not None:
            return Outcome("unavailable", message=self._unavailable)
        began = time.monotonic()
        try:
            if self.pid is None:
                self._start()
            asked = request()
            began = time.monotonic()
            answer = self._worker.ask(asked, seconds, what)
        except ToolchainUnavailableError as error:
            # What a machine lacks it will lack for the next case too.
            self._unavailable = str(error)
            self._worker.stop()
            return Outcome("unavailable", message=self._unavailable)
        except WorkerError as failure:
            self._worker.stop()
            failure.outcome.seconds = time.monotonic() - began
            return failure.outcome
        except UnknownEndError:
            # It may have nothing to do with the kernel: ask once more, in a process whose end is seen here.
            self._worker.stop()
            if not self._worker.may_fork:
                return Outcome("crashed", message="its process ended, and so did the one that watches it: nobody knows how")
            self._worker.may_fork = False
            return self._ask(request, seconds, what)
        except UsageError:
            raise
        except BaseException:
            # An interrupt: the worker may be in the middle of anything.
            self._worker.stop()
            raise
        if not isinstance(answer, Result) or answer.executed is not self._lane.executes or answer.status not in _STATUSES:
            self._worker.stop()
            return Outcome("crashed", message=f"its process sent a {type(answer).__name__} that does not answer the run")
        if answer.healthy:
            self._worker.trim_logs()
        else:
            self._worker.stop()
        return outcome_of(answer, time.monotonic() - began)

    def _start(self) -> None:
        library = self._lane.require(self._device_executor, self._progress)
        self._worker.start(self._lane.preloads(self._device_executor))
        self._compiled.clear()
        self._last = {}
        request = OpenLane(
            self._module,
            self._attribute,
            self.kernel.stage_name,
            self.kernel.digest,
            self.lane,
            None if library is None else str(library),
            self._device_executor,
            None if self._on_card is None else self._on_card.card,
        )
        try:
            self._worker.ask(request, self.limits.start_seconds, "starting its process")
        except UsageError:
            self._worker.stop()
            raise


def _probed(asked: Probe, limits: Limits, seconds: float, folder: Path | None) -> str:
    """What goes wrong when a kernel that is known to be right is asked for, in a process of its own; empty if nothing does.

    Raises ``CompilerUnavailableError`` where it is the device's compiler, and ``ToolchainUnavailableError``.
    """
    worker = WorkerProcess(limits=limits, folder=folder)
    try:
        worker.start(lane_named(asked.lane).preloads(asked.device_executor))
        answer = worker.ask(asked, seconds, "the probe")
        if isinstance(answer, Result) and answer.status == "ok":
            return ""
        reason = str(getattr(answer, "message", "?"))
    except WorkerError as failure:
        reason = failure.outcome.message
    except UnknownEndError:
        reason = "the probe's process ended, and nobody knows how"
    finally:
        printed = worker.printed()
        worker.close()
    said = compiler_failure([*printed, reason])
    if said:
        raise CompilerUnavailableError(no_kernel_compiles(said))
    return one_line(reason, 500)


def compiler_problem(lane: str, limits: Limits) -> str:
    """Why the device's compiler compiles nothing for a lane without a card; empty if it does."""
    return _compiler_problem(lane, limits, tuple(sorted(os.environ.items())))


@functools.lru_cache(maxsize=4)
def _compiler_problem(lane: str, limits: Limits, environment: tuple[tuple[str, str], ...]) -> str:
    """Tried once in a process and environment: what a machine lacks it lacks for every kernel."""
    try:
        reason = _probed(Probe(lane, NPU), limits, limits.compile_seconds, None)
    except ToolchainUnavailableError as error:
        return str(error)
    # A kernel that is known to be right did not compile, whatever the reason.
    return no_kernel_compiles(reason) if reason else ""


#: What a worker may say of a run; that it crashed, timed out or is unavailable is for its owner to say.
_STATUSES = ("ok", "raised")


def address_of(kernel: Declaration) -> tuple[str, str]:
    """The module and the attribute by which a worker finds the kernel.

    Raises ``UsageError`` if it is not an attribute of a module.
    """
    if isinstance(kernel, ListedKernel):
        return kernel.module, kernel.attribute
    assert isinstance(kernel, Kernel)
    module = sys.modules.get(getattr(unbound(kernel.function), "__module__", ""))
    attributes: dict[str, Any] = vars(module) if module is not None else {}
    names = [name for name, value in attributes.items() if isinstance(value, Kernel) and value == kernel]
    # A torch callable may be judged as it is, without the decorator.
    names = names or [name for name, value in attributes.items() if value is kernel.function and kernel.toolchain == "torch"]
    if module is None or not names:
        inside = getattr(kernel.function, "__qualname__", type(kernel.function).__name__).rsplit(".<locals>", 1)[0]
        raise UsageError(
            f"kernel {kernel.name} cannot be run in a process of its own: expected an attribute of a module, found one that is "
            f"defined inside {inside}; define it at module level"
        )
    spec = getattr(module, "__spec__", None)
    if spec is not None and spec.parent and spec.name == module.__name__:
        return module.__name__, names[0]
    file = getattr(module, "__file__", None)
    if not file:
        raise UsageError(f"kernel {kernel.name} is defined in {module.__name__}, which has no file: put it into a .py file")
    return str(Path(file).resolve()), names[0]
