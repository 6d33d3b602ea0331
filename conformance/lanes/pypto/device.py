"""The device lane, in its worker: the same kernel on an NPU, or on the interpreter standing in for one.

What differs is behind ``Card``: where tensors are placed, how the kernel is launched, and how memory is read back. Guards,
poison, limits and verdicts are the same, so that all of it is tested where there is no card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from conformance.contract.kernel import Kernel
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import Guarded
from conformance.lanes.device import STAND_INS
from conformance.lanes.messages import Passes, RunRequest
from conformance.lanes.pypto.interpret import expected_nothing, read_results
from conformance.lanes.pypto.runtime import Runtime
from conformance.lanes.pypto.serve import Build, serve
from conformance.lanes.worker import Start
from conformance.toolchains.npu import device_index


def open_lane(kernel: Kernel, start: Start) -> RunRequest:
    """What a worker of the lane does with a request: on the card, or on the interpreter standing in for it."""
    card_class = InterpreterCard if start.device_executor in STAND_INS else NpuCard

    def run(build: Build, passes: Passes, arguments: dict[str, Guarded]) -> Outcome:
        return run_on_card(card_class(build.runtime), build.jit, arguments)

    return serve(kernel, start, run)


class Card(Protocol):
    """Something that runs a kernel on memory of its own."""

    def place(self, storage: torch.Tensor) -> torch.Tensor:
        """A copy of a one-dimensional tensor in the card's memory, aligned to 512 bytes at least."""

    def launch(self, jit: Any, arguments: Sequence[torch.Tensor]) -> None:
        """Run the kernel on placed tensors and wait until it has ended."""

    def read_back(self, storage: torch.Tensor) -> torch.Tensor:
        """A copy of placed memory on the host."""


class NpuCard:
    """An NPU, driven through torch_npu."""

    def __init__(self, runtime: Runtime) -> None:
        import torch_npu  # noqa: F401  registers the device

        self._runtime = runtime
        self._npu: Any = torch.npu  # type: ignore[attr-defined]
        self._device = f"npu:{device_index()}"
        self._npu.set_device(device_index())

    def place(self, storage: torch.Tensor) -> torch.Tensor:
        """Copy to the card; its allocator aligns to 512 bytes."""
        return storage.to(self._device)

    def launch(self, jit: Any, arguments: Sequence[torch.Tensor]) -> None:
        """Compile, run on the current stream, and wait."""
        with self._runtime.output_folder(sum(argument.nbytes for argument in arguments)):
            self._runtime.call(jit, arguments, stage="ALL_COMPLETE", run_mode="NPU")
            self._npu.synchronize()

    def read_back(self, storage: torch.Tensor) -> torch.Tensor:
        """Copy to the host."""
        return storage.cpu()


class InterpreterCard:
    """The interpreter standing in for a card: results are written to the placed tensors, as a card would."""

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


def run_on_card(card: Card, jit: Any, arguments: Mapping[str, Guarded]) -> Outcome:
    """Place the arguments of a case in the order of the contract, launch, and read every one back with its guards."""
    placed = {name: Guarded.over(card.place(host.storage), tuple(host.tensor.shape)) for name, host in arguments.items()}
    card.launch(jit, [on_card.tensor for on_card in placed.values()])
    for name, host in arguments.items():
        host.storage.copy_(card.read_back(placed[name].storage))
    return Outcome("ok")
