"""The device lane, in its worker: the same kernel on an NPU, or on the interpreter standing in for one.

What differs is behind ``Device``: where tensors are placed, how the kernel is launched, and how memory is read back. Guards,
poison, limits and verdicts are the same, so that all of it is tested where there is no card.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from conformance.contract.arguments import Argument
from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel
from conformance.contract.stage import Stage
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import Guarded, poison, same_bits
from conformance.lanes.card_files import CARD_FILE, build_folder
from conformance.lanes.cards import Card
from conformance.lanes.device import CARD_VARIABLE, STAND_INS
from conformance.lanes.device_errors import device_error, exception_lines, of_another_version
from conformance.lanes.messages import CompilingRun, Passes, RunRequest
from conformance.lanes.pypto.interpret import expected_nothing, read_results
from conformance.lanes.pypto.probe import probe_card
from conformance.lanes.pypto.runtime import Runtime, clean
from conformance.lanes.pypto.serve import Build, Server, serve
from conformance.lanes.worker import Start
from conformance.outside import tail_of
from conformance.toolchains.detection import ToolchainUnavailableError

#: Builds that are kept on a card's side: each is compiled once, for all cases of its dimensions.
KEPT_BUILDS = 256
#: From so many bytes on, an argument that is only read is read back only if its checksum has changed: weights, and large caches.
LEAST_SUMMED = 1 << 20
#: Words of a row of a checksum, and rows that are summed at a time: 64 MiB.
SUMMED_COLUMNS, SUMMED_ROWS = 4096, 4096
#: What a workspace holds before a launch: NaN as bf16 and as fp32, and no index as an integer.
WORKSPACE_STAMP = 0x7FD57FD5


class Device(Protocol):
    """Something that runs a kernel on memory of its own."""

    #: Seconds that the last launch took by the card's own clock, where it tells.
    device_seconds: float | None

    def place(self, storage: torch.Tensor) -> torch.Tensor:
        """A copy of a one-dimensional tensor in the card's memory, aligned to 512 bytes at least."""

    def launch(self, jit: Any, arguments: Sequence[torch.Tensor]) -> None:
        """Run the kernel on placed tensors and wait until it has ended."""

    def read_back(self, storage: torch.Tensor) -> torch.Tensor:
        """A copy of placed memory on the host."""


class _CompiledError(BaseException):
    """Stops PyPTO where it asks for a launch's workspace: by then the kernel is compiled and kept, and nothing is launched."""


class NpuCard:
    """An NPU, driven through torch_npu."""

    def __init__(self, runtime: Runtime, card: Card, folder: Path) -> None:
        self.device_seconds: float | None = None
        self._runtime = runtime
        self._npu: Any = self.driver()
        self._npu.set_device(card.position)
        self._device = self.device(card.position)
        self._compiling = False
        #: Workspaces of the launch that goes on: they must live until it has ended.
        self._workspaces: list[torch.Tensor] = []
        self._begin: Any = None
        runtime.take_workspace_from(self._workspace)
        about = {"card": card.number, "chip": self._npu.get_device_name(card.position), "torch_npu": self.version()}
        (folder / CARD_FILE).write_text(json.dumps(about))

    def driver(self) -> Any:
        """``torch.npu``."""
        import torch_npu  # noqa: F401  registers the device

        return torch.npu  # type: ignore[attr-defined]

    def version(self) -> str:
        """The version of torch_npu."""
        return str(vars(sys.modules["torch_npu"]).get("__version__", "unknown"))

    def device(self, index: int) -> torch.device:
        """Where tensors are placed."""
        return torch.device("npu", index)

    def place(self, storage: torch.Tensor) -> torch.Tensor:
        """Copy to the card; its allocator aligns to 512 bytes."""
        return storage.to(self._device, copy=True)

    def compile(self, build: Build, kept: Path) -> None:
        """Compile for arguments of the build's dimensions, whose memory is not touched; nothing is launched.

        What PyPTO writes stays in the folder ``kept``.
        """
        sizes = [(argument.size(build.dims), argument.dtype) for argument in build.stage.arguments]
        arguments = [torch.empty(size, dtype=dtype, device=self._device) for size, dtype in sizes]
        self._compiling = True
        try:
            with self._runtime.kept_folder(kept):
                self._call(build.jit, arguments)
        except _CompiledError:
            pass
        finally:
            self._compiling = False
        self._npu.synchronize()

    def launch(self, jit: Any, arguments: Sequence[torch.Tensor]) -> None:
        """Run on the current stream, with what was compiled before, and wait: PyPTO uses streams of its own besides."""
        self._begin, end = (self._npu.Event(enable_timing=True) for _ in range(2))
        self.device_seconds = None
        try:
            self._begin.record()
            with self._runtime.output_folder(sum(argument.nbytes for argument in arguments)):
                self._call(jit, arguments)
            end.record()
            self._npu.synchronize()
            self.device_seconds = self._begin.elapsed_time(end) / 1000
        finally:
            self._workspaces.clear()

    def _call(self, jit: Any, arguments: Sequence[torch.Tensor]) -> None:
        self._runtime.call(jit, arguments, stage="ALL_COMPLETE", run_mode="NPU", keep=True)

    def _workspace(self, size: int) -> int:
        """The address of a launch's workspace, stamped: what a kernel reads there and has not written must not look right."""
        if self._compiling:
            raise _CompiledError
        workspace = torch.empty(-(-size // 4), dtype=torch.int32, device=self._device).fill_(WORKSPACE_STAMP)
        self._npu.synchronize()
        self._workspaces.append(workspace)
        self._begin.record()  # stamping is no part of the launch
        return workspace.data_ptr()

    def read_back(self, storage: torch.Tensor) -> torch.Tensor:
        """Copy to the host."""
        return storage.cpu()


class InterpreterCard:
    """The interpreter standing in for a card: results are written to the placed tensors, as a card would."""

    device_seconds: float | None = None

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def place(self, storage: torch.Tensor) -> torch.Tensor:
        """Copy."""
        return storage.clone()

    def launch(self, jit: Any, arguments: Sequence[torch.Tensor]) -> None:
        """Interpret, then write every argument's result to where the argument was placed."""
        with self._runtime.output_folder(sum(argument.nbytes for argument in arguments)) as folder:
            golden = [expected_nothing(argument) for argument in arguments]
            verify = {"pass_verify_save_tensor": False, "pass_verify_pass_filter": []}
            self._runtime.call(jit, arguments, stage="EXECUTE_GRAPH", golden=golden, verify=verify)
            (results,) = folder.glob("output/output_*/verify_*")
            for index, result in read_results(results, arguments).items():
                arguments[index].copy_(result)

    def read_back(self, storage: torch.Tensor) -> torch.Tensor:
        """Copy."""
        return storage.clone()


@dataclasses.dataclass(frozen=True)
class Placed:
    """An argument on a card; of a large one that a kernel only reads, the checksum that it had before any launch."""

    guarded: Guarded
    checksum: torch.Tensor | None

    @classmethod
    def on(cls, card: Device, host: Guarded, argument: Argument) -> Placed:
        """A copy of an argument and its guards."""
        guarded = Guarded.over(card.place(host.storage), tuple(host.tensor.shape))
        summed = argument.access == "in" and guarded.storage.nbytes >= LEAST_SUMMED
        return cls(guarded, checksum(guarded.storage) if summed else None)

    @property
    def unchanged(self) -> bool:
        """Whether its memory, guards included, is known to hold what it held: no byte of it need be read back."""
        return self.checksum is not None and torch.equal(self.checksum, checksum(self.guarded.storage))


def checksum(storage: torch.Tensor) -> torch.Tensor:
    """Sums of one-dimensional memory of whole words, computed where it lies: int32 words as rows, by row and by column, in int64.

    One word that differs changes two of the sums; two that change places change sums of columns or of rows. Unseen is what keeps
    all of them, such as one difference added and taken away at the corners of a rectangle.
    """
    words = storage.view(torch.int32)
    whole = words.numel() // SUMMED_COLUMNS * SUMMED_COLUMNS
    columns = torch.zeros(SUMMED_COLUMNS, dtype=torch.int64, device=storage.device)
    sums = []
    # In parts: a sum may make a copy of what it sums as int64.
    for part in torch.split(words[:whole].view(-1, SUMMED_COLUMNS), SUMMED_ROWS):
        sums.append(part.sum(1, dtype=torch.int64))
        columns += part.sum(0, dtype=torch.int64)
    return torch.cat([columns, *sums, words[whole:].to(torch.int64)])


def run_on_card(
    card: Device, stage: Stage, jit: Any, arguments: Mapping[str, Guarded], placed: dict[str, Placed] | None = None
) -> Outcome:
    """Place the arguments of a case in the order of the contract, launch, and read back what the launch may have changed.

    What ``placed`` has lies on the card already; what this places is added to it, and what the kernel must not change and did is
    taken out. An argument that is only read, and whose checksum is what it was, is not read back: the host's copy of it stands.
    """
    placed = {} if placed is None else placed
    for name, host in arguments.items():
        if name not in placed:
            placed[name] = Placed.on(card, host, stage.argument(name))
    card.launch(jit, [placed[name].guarded.tensor for name in arguments])
    for name, host in arguments.items():
        if placed[name].unchanged:
            continue
        found = card.read_back(placed[name].guarded.storage)
        if stage.argument(name).access == "in" and not same_bits(found, host.storage):
            del placed[name]
        host.storage.copy_(found)
    return Outcome("ok", device_seconds=card.device_seconds)


def open_lane(kernel: Kernel, start: Start) -> RunRequest | CompilingRun:
    """What a worker of the lane does with a request: on the card, or on the interpreter standing in for it."""
    if start.device_executor not in STAND_INS:
        return CardRun(kernel, start)

    def run(build: Build, passes: Passes, arguments: dict[str, Guarded]) -> Outcome:
        return run_on_card(InterpreterCard(build.runtime), build.stage, build.jit, arguments)

    return serve(kernel, start, run)


def probe(start: Start) -> Outcome:
    """Whether the worker's card is well: a kernel of known result runs on it."""
    runtime = Runtime(start.folder, start.scratch, None)
    try:
        return _probed(runtime, start)
    except Exception as error:
        if isinstance(error, ToolchainUnavailableError):
            raise
        return Outcome("raised", message=clean(error))


def _probed(runtime: Runtime, start: Start) -> Outcome:
    return told_by_card(runtime, start.folder, lambda: probe_card(card_of(runtime, start), runtime.pypto))


def card_of(runtime: Runtime, start: Start) -> NpuCard:
    """The worker's card, or what a test puts in its place."""
    named = os.environ.get(CARD_VARIABLE, "")
    module, _, name = named.partition(":")
    kind = vars(importlib.import_module(module))[name] if named else NpuCard
    assert start.card is not None
    found: NpuCard = kind(runtime, start.card, start.folder)
    return found


class CardRun:
    """The runs of one kernel on one card. What was built, and what the last case placed there, is kept."""

    def __init__(self, kernel: Kernel, start: Start) -> None:
        self._start = start
        self._server = Server(kernel, start, KEPT_BUILDS)
        self._kernel = kernel
        self._card: NpuCard | None = None
        #: Where the arguments of the case before lie.
        self._placed: dict[str, Placed] = {}
        #: Whether that case ended well: otherwise nobody has looked at what its arguments hold.
        self._known = False

    @property
    def _runtime(self) -> Runtime:
        return self._server.runtime

    def compile(self, dims: Dims) -> Outcome:
        """Compile for runs that follow; the card's memory is used, and none of its cores."""

        def part(build: Build) -> Outcome:
            self._on_card().compile(build, build_folder(self._start.folder, self._kernel.built_for(dims)))
            return Outcome("ok")

        return self._counted(dims, part)

    def __call__(self, dims: Dims, passes: Passes, arguments: dict[str, Guarded], unchanged: tuple[str, ...] = ()) -> Outcome:
        """Run; ``unchanged`` arguments are those of the run before, which lie on the card."""
        before, self._placed = self._placed, {}
        kept = unchanged if self._known else ()

        def part(build: Build) -> Outcome:
            # A card that failed since then may say so here.
            self._take_over(before, arguments, kept)
            return run_on_card(self._on_card(), build.stage, build.jit, arguments, self._placed)

        outcome = self._counted(dims, part)
        self._known = outcome.status == "ok"
        self._placed |= before  # where nothing came to be run
        return outcome

    def _take_over(self, before: dict[str, Placed], arguments: Mapping[str, Guarded], unchanged: Collection[str]) -> None:
        """Keep what this case has too. The rest is poisoned, and nothing is left in ``before``: its memory is free."""
        while before:
            name, old = before.popitem()
            if name in unchanged and old.guarded.storage.shape == arguments[name].storage.shape:
                self._placed[name] = old
            else:
                # The memory is given out again: what this case finds there must not be what the one before left.
                poison(old.guarded.storage)

    def _on_card(self) -> NpuCard:
        if self._card is None:
            self._card = card_of(self._runtime, self._start)
        return self._card

    def _counted(self, dims: Dims, part: Callable[[Build], Outcome]) -> Outcome:
        compiles = self._runtime.compiles
        outcome = self._server.run(dims, lambda build: told_by_card(self._runtime, self._start.folder, lambda: part(build)))
        outcome.compiles = self._runtime.compiles - compiles
        return outcome


def told_by_card(runtime: Runtime, folder: Path, work: Callable[[], Outcome]) -> Outcome:
    """What ``work`` returns; where it fails with an error of the card, an outcome that says which.

    Raises ``ToolchainUnavailableError`` where driver and CANN do not fit together, and any error that is not the card's.
    """
    began = datetime.datetime.now()
    try:
        return work()
    except Exception as error:
        text = clean(error)
        logged = runtime.logged_errors(began)
        # CANN's own callback prints the code of a failed launch.
        printed = printed_by_driver(folder)
        mismatch = of_another_version([str(error), *logged, *printed])
        if mismatch is not None:
            raise ToolchainUnavailableError(f"driver and CANN do not fit together: {mismatch}") from error
        found = device_error([str(error), *printed, *logged])
        if found is None:
            raise
        details = [line for line in exception_lines([*logged, *printed]) if line not in text]
        return Outcome("raised", message=": ".join([f"the card reported {found}", *(details or [text])]), device_error=found.code)


def printed_by_driver(folder: Path) -> list[str]:
    """The last lines that were printed in this process, which has CANN's messages among them."""
    return [line for line in tail_of(folder / "stdout.log").splitlines() if "retcode" in line or "ERROR" in line]
