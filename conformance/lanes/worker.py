"""The process that runs one kernel, or says what a file declares. Its arguments: ``CONNECTION ARENA LIFELINE`` (descriptors).

It owns nothing that must be tidied up: whoever started it reads its answers, kills it when it takes too long and deletes its
folders. It ends when its owner does.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import fcntl
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from conformance.contract.dims import Dims
from conformance.contract.kernel import Declaration, Kernel, as_kernel
from conformance.contract.loading import digest_of, file_of, import_anew, kernels_in, load_module
from conformance.contract.registry import model_named, stage_named
from conformance.contract.stage import Stage
from conformance.errors import UsageError
from conformance.lanes import Lane, lane_named
from conformance.lanes.arena import Arena
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import lay_out
from conformance.lanes.cards import Card
from conformance.lanes.channel import Channel, readable
from conformance.lanes.messages import (
    MOST_TEXT,
    Answer,
    AskAccepts,
    Compile,
    Declared,
    FindKernel,
    Listed,
    ListKernels,
    Opening,
    OpenLane,
    Probe,
    Ready,
    Reasons,
    Refused,
    Result,
    Run,
    Sizes,
    decode_request,
    encode,
    result_of,
)
from conformance.lanes.reference_lock import lock_references
from conformance.outside import one_line
from conformance.toolchains.detection import ToolchainUnavailableError
from conformance.toolchains.npu import DEVICE_VARIABLE


@dataclasses.dataclass(frozen=True)
class Start:
    """What a lane needs in a worker. ``folder`` takes logs; ``scratch`` what PyPTO writes, deleted after every run."""

    folder: Path
    scratch: Path
    calculator: Path | None
    device_executor: str
    #: The card to run on, held by ``CardLock`` while a kernel runs; ``None`` in a lane that uses none.
    card: Card | None = None


def main(arguments: list[str]) -> int:
    """Serve requests until the owner closes the connection."""
    connection_descriptor, arena_descriptor, lifeline = map(int, arguments)
    _end_with_owner(lifeline)
    faulthandler.enable()
    # Asked for by the owner before it kills a worker that takes too long: where it was is all that is known of it then.
    faulthandler.register(signal.SIGUSR1)
    # Two workers share two cores, and small operators only lose time in a thread pool.
    torch.set_num_threads(1)
    channel = Channel(socket.socket(fileno=connection_descriptor))
    worker = Worker(Arena(arena_descriptor))
    process = os.getpid()
    while True:
        try:
            received = channel.receive()
        except EOFError:
            return 0
        assert received is not None
        number, content = received
        answer = worker.answer(decode_request(content))
        if os.getpid() != process:
            os._exit(0)  # a copy of this process that the kernel made: it has nothing to say
        channel.send(number, encode(answer))


def prepare() -> None:
    """What a process must have done before a kernel's code runs in it, or in one that is forked from it."""
    lock_references()
    import_anew()


class Worker:
    """Answers requests; keeps the one kernel that it runs."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._opening: Opening | None = None
        self._lane: Lane | None = None
        self._kernel: Kernel | None = None
        self._run: Any = None

    def answer(self, request: object) -> Answer:
        """What a request is answered by; nothing is raised but what ends the process."""
        try:
            return self._answer(request)
        except UsageError as error:
            return Refused(one_line(error, MOST_TEXT))
        except ToolchainUnavailableError as error:
            return Refused(one_line(error, MOST_TEXT), unavailable=True)

    def _answer(self, request: object) -> Answer:
        if isinstance(request, Run | Compile):
            return self._result(request)
        if isinstance(request, Probe):
            return self._probe(request)
        if isinstance(request, Opening):
            self._opening = request
            sys.path.extend(entry for entry in request.search_path if entry not in sys.path)
            prepare()
            return Ready()
        if isinstance(request, OpenLane):
            return self._open(request)
        if isinstance(request, ListKernels):
            return Listed(tuple(declared_in(request.module)))
        if isinstance(request, FindKernel):
            return Listed((named_in(request.module, request.name, request.stage),))
        assert isinstance(request, AskAccepts)
        kernel = find(request.module, request.attribute, request.stage)
        return Reasons(tuple(_reason(kernel, dims_of(kernel.stage, sizes)) for sizes in request.sizes))

    def _open(self, request: OpenLane) -> Answer:
        assert self._opening is not None
        self._lane = lane_named(request.lane)
        kernel = find(request.module, request.attribute, request.stage)
        if request.digest and request.digest != digest_of(request.module):
            raise UsageError(
                f"{file_of(request.module).name} was changed after it had been read for this run: start the run anew"
            )
        if request.module.endswith(".py"):
            # A builder may import what lies beside its file when it is called, long after the file itself was imported.
            sys.path.append(str(Path(request.module).parent))
        calculator = None if request.calculator is None else Path(request.calculator)
        start = self._started(calculator, request.device_executor, request.card)
        # Imported here, and only in a worker: a toolchain's native libraries stay out of every other process.
        self._run = importlib.import_module(self._lane.worker).open_lane(kernel, start)
        self._kernel = kernel
        return Ready()

    def _started(self, calculator: Path | None, device_executor: str, card: Card | None) -> Start:
        assert self._opening is not None
        if card is not None:  # for kernels that ask for it, as PyPTO's examples do
            os.environ[DEVICE_VARIABLE] = str(card.position)
        return Start(Path(self._opening.folder), Path(self._opening.scratch), calculator, device_executor, card)

    def _probe(self, request: Probe) -> Result:
        module = importlib.import_module(lane_named(request.lane).worker)
        began = time.perf_counter()
        outcome: Outcome = module.probe(self._started(None, request.device_executor, request.card))
        return result_of(outcome, seconds=time.perf_counter() - began, peak_memory=_peak_memory(), healthy=False)

    def _result(self, request: Run | Compile) -> Result:
        assert self._lane is not None
        assert self._kernel is not None
        assert self._run is not None
        _reset_peak_memory()
        dims = dims_of(self._kernel.stage, request.sizes)
        began = time.perf_counter()
        outcome: Outcome
        if isinstance(request, Compile):
            outcome = self._run.compile(dims)
        else:
            arguments = lay_out(self._arena, self._kernel.stage, dims) if self._lane.executes else {}
            unchanged = {"unchanged": request.unchanged} if request.unchanged else {}  # no lane of a single step is told
            outcome = self._run(dims, request.passes, arguments, **unchanged)
        return result_of(
            outcome,
            seconds=time.perf_counter() - began,
            peak_memory=_peak_memory(),
            healthy=outcome.status == "ok" or self._lane.survives_failure,
        )


def dims_of(stage: Stage, sizes: Sizes) -> Dims:
    """The dimensions of those sizes, of the class that the stage's model has."""
    kind = type(next(iter(model_named(stage.model).presets.values())))
    return kind(**sizes)


def find(module: str, attribute: str, stage: str) -> Kernel:
    """Import the module that defines a kernel and return the kernel; raises ``UsageError``."""
    found = vars(load_module(module)).get(attribute)
    if found is None:
        raise UsageError(f"{module} defines no {attribute} when it is imported anew: define it at module level")
    return as_kernel(stage, found)


def declared_in(module: str) -> Iterable[Declared]:
    """What the kernels that a module defines declare."""
    loaded = load_module(module)
    names = {id(value): name for name, value in reversed(vars(loaded).items()) if isinstance(value, Kernel)}
    return [_declared(kernel, module, names[id(kernel)]) for kernel in kernels_in(loaded)]


def named_in(module: str, name: str, stage: str | None) -> Declared:
    """The kernel of that name in a module (of several the one of the stage), or a function that is to be a kernel of ``stage``.

    Raises ``UsageError``.
    """
    loaded = load_module(module)
    declared = kernels_in(loaded)
    named = [kernel for kernel in declared if name in (kernel.name, kernel.id)]
    if stage is not None and len(named) > 1:
        named = [kernel for kernel in named if kernel.stage.id == stage_named(stage).id] or named
    if len(named) > 1:
        raise UsageError(f"kernel {name!r} is ambiguous in {module}: {' and '.join(kernel.id for kernel in named)}; say which")
    if named:
        attribute = next(key for key, value in vars(loaded).items() if value is named[0])
        return _declared(named[0] if stage is None else as_kernel(stage, named[0]), module, attribute)
    found = vars(loaded).get(name)
    if found is None:
        known = ", ".join(kernel.name for kernel in declared) or "none"
        raise UsageError(f"{module} has no kernel or function {name!r}; its kernels: {known}")
    if isinstance(found, Kernel):  # one that another module defines
        return _declared(found if stage is None else as_kernel(stage, found), module, name)
    if stage is None:
        raise UsageError(f"{module}:{name} is a plain function: decorate it with @conformance.kernel(STAGE, capabilities=[...])")
    return _declared(as_kernel(stage, found), module, name)


def _declared(kernel: Kernel, module: str, attribute: str) -> Declared:
    fields = {field.name: getattr(kernel, field.name) for field in dataclasses.fields(Declaration)}
    fields |= {"source": one_line(kernel.source, MOST_TEXT), "digest": digest_of(module)}
    return Declared(module=module, attribute=attribute, chooses=kernel.accepts is not None, **fields)


def _reason(kernel: Kernel, dims: Dims) -> str | None:
    reason = kernel.asked(dims)
    return None if reason is None else one_line(reason, 500)


def _end_with_owner(lifeline: int) -> None:
    # The owner holds the writing end of this pipe and never writes. When it dies, however it dies, the kernel raises SIGIO
    # here, whose default action ends the process even inside a native call that never returns to Python.
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    # It may have died before this was set: then the pipe is at its end already.
    if readable([lifeline], 0):
        sys.exit(0)


def _reset_peak_memory() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def _peak_memory() -> int | None:
    """Peak resident memory since the last reset, in bytes, where the system tells."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
