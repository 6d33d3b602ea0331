"""Executors, which answer one stage at a time: the reference, or kernels in worker processes of their own.

An executor computes a stage and keeps nothing between two calls; what lies between them is the driver's (``drivers.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from conformance.cases.case import Case
from conformance.cases.key import CaseKey
from conformance.contract.dims import Dims
from conformance.contract.kernel import Declaration
from conformance.contract.loading import find_kernel
from conformance.contract.registry import stage_named
from conformance.contract.stage import Tensors
from conformance.errors import UnavailableError, UsageError
from conformance.kernels.qwen3.generation.costs import Dispatch
from conformance.lanes import default_lane, find_lane, lane_named
from conformance.lanes.buffers import case_bytes
from conformance.lanes.cards import CardChoice, CardUnavailableError, choice_of
from conformance.lanes.device import DEVICE, NPU
from conformance.lanes.eager import EAGER
from conformance.lanes.interpret import INTERPRET
from conformance.lanes.listing import bundled_kernels, kernels_of
from conformance.lanes.process import KernelProcess, Limits
from conformance.numerics.arithmetic import CONTRACT, EXACT

Tensor = torch.Tensor


class StageError(Exception):
    """A stage's kernel gave no answer that generation can go on with; the message is one line that begins with the stage."""


class Executor(Protocol):
    """Computes stages; what it is given it only reads."""

    #: Whether it computes in float64 without any rounding, on weights and caches in float64.
    exact: bool

    def run(self, stage: str, dims: Dims, inputs: Tensors) -> dict[str, Tensor]:
        """Every output of a stage by name, the updated caches among them; ``inputs`` may hold more than the stage takes.

        Raises ``StageError`` if its kernel fails.
        """

    def close(self) -> None:
        """Give back what the executor holds."""


class ReferenceExecutor:
    """The torch references: in float64 throughout, or (``exact=False``) with the contract's rounding points and dtypes."""

    def __init__(self, *, exact: bool) -> None:
        self.exact = exact

    def run(self, stage: str, dims: Dims, inputs: Tensors) -> dict[str, Tensor]:
        """Every output; float64 if exact, of the contract's dtypes otherwise. Token ids are int32 either way."""
        contract = stage_named(f"qwen3/{stage}")
        results = contract.reference(inputs, dims, EXACT if self.exact else CONTRACT)
        dtypes = {argument.name: argument.dtype for argument in contract.outputs}
        wide = {name for name, dtype in dtypes.items() if self.exact and dtype.is_floating_point}
        return {name: result if name in wide else result.to(dtypes[name]) for name, result in results.items()}

    def close(self) -> None:
        """Nothing is held."""


class KernelExecutor:
    """Kernels, each in a worker process of its own that is started at its stage's first call.

    ``lane`` is that of PyPTO kernels; torch kernels run in theirs, ``eager``. A stage without a kernel goes to ``rest``.
    ``seconds`` limits one call, on a card its launch; ``cards`` says which ones may be used, by all stages alike.
    """

    exact = False

    def __init__(
        self,
        kernels: Mapping[str, Declaration],
        lane: str,
        *,
        rest: Executor | None = None,
        seconds: float | None = None,
        cards: CardChoice | None = None,
    ) -> None:
        self._kernels = kernels
        self._lane = lane
        self._rest = rest
        self._limits = Limits.of_runs(seconds)
        self._cards = cards or CardChoice()
        #: What each call of a kernel came to, in their order.
        self.dispatches: list[Dispatch] = []
        self._processes: dict[str, KernelProcess] = {}

    def run(self, stage: str, dims: Dims, inputs: Tensors) -> dict[str, Tensor]:
        """What the kernel left in the stage's outputs.

        Raises ``StageError`` if it raised, crashed, took too long, or changed what is not its to change, ``UnavailableError``
        where its lane cannot run, ``UsageError`` if there is no kernel or if it does not take these dimensions.
        """
        kernel = self._kernels.get(stage)
        if kernel is None:
            if self._rest is None:
                raise UsageError(f"there is no kernel of stage {stage}: give one with --kernels FILE.py")
            return self._rest.run(stage, dims, inputs)
        refusal = kernel.refusal(dims)
        if refusal is not None:
            raise UsageError(refusal)
        if stage not in self._processes:
            lane = self._lane if kernel.toolchain in lane_named(self._lane).toolchains else default_lane(kernel.toolchain).name
            # A model's weights are none of what the kernel itself takes.
            memory = self._limits.memory_bytes + case_bytes(kernel.stage, dims)
            limits = dataclasses.replace(self._limits, memory_bytes=memory)
            self._processes[stage] = KernelProcess(kernel, lane, limits=limits, cards=self._cards)
        case = Case(CaseKey(stage, "generate", "generate", 0), kernel.stage, dims, dict(inputs))
        outcome = self._processes[stage].run(case, "none")
        if outcome.status == "unavailable":
            raise UnavailableError(f"the {self._lane} executor cannot run here: {outcome.message}")
        who = f"{stage}: kernel {kernel.name}"
        if outcome.status != "ok":
            place = f" ({outcome.location})" if outcome.location else ""
            how = {"raised": "raised", "timed_out": "took too long:"}.get(outcome.status, "crashed:")
            raise StageError(" ".join(f"{who} {how} {outcome.message}{place}".split()))
        for name, count in outcome.changed_inputs.items():
            raise StageError(f"{who} changed {count} elements of {name}, which is an input")
        for name, where in outcome.guard_damage.items():
            raise StageError(f"{who} wrote outside {name}: {where}")
        self.dispatches.append(Dispatch(stage, outcome.card, outcome.device_seconds, outcome.compiles, outcome.message))
        return outcome.outputs

    def close(self) -> None:
        """End the worker processes; closing twice is harmless."""
        for process in self._processes.values():
            process.close()
        self._processes.clear()


EXECUTORS: dict[str, str] = {
    "reference": "the fp64 reference, nothing rounded",
    "contract": "the reference with the contract's bf16 roundings",
    INTERPRET.name: "PyPTO kernels through PyPTO's interpreter",
    EAGER.name: "torch kernels of --kernels; where they have none, the contract",
    DEVICE.name: "PyPTO kernels on an NPU",
}


def open_executor(
    name: str, locations: Sequence[str] = (), seconds: float | None = None, device: str = "", device_wait: float | None = None
) -> Executor:
    """The executor of that name; its kernels are those of ``locations`` (``FILE.py`` or ``FILE.py:NAME``), then the bundled ones.

    ``seconds`` limits one call of a kernel; ``device`` names the cards to run on and ``device_wait`` how long a busy one is
    waited for. Raises ``UsageError`` for an unknown name and for what does not go with it, ``UnavailableError`` for a card that
    is not there.
    """
    if name not in EXECUTORS:
        raise UsageError(f"unknown executor {name!r}; known are {', '.join(EXECUTORS)}")
    found = find_lane(name)
    on_card = found is not None and found.takes_card(NPU)
    cards = choice_of(device, device_wait, unused="" if on_card else f"the {name} executor")
    if name in ("reference", "contract"):
        if locations:
            raise UsageError(f"the {name} executor runs no kernels: --kernels goes with interpret, eager or device")
        return ReferenceExecutor(exact=name == "reference")
    own = _kernels_of(locations)
    lane = lane_named(name)
    if lane.in_process:
        if not own:
            raise UsageError("the eager executor runs torch kernels of yours: name their file with --kernels FILE.py")
        for kernel in own.values():
            if kernel.toolchain != "torch":
                raise UsageError(f"kernel {kernel.name} is a {kernel.toolchain} one, and eager runs torch kernels: use interpret")
        return KernelExecutor(own, lane.name, rest=ReferenceExecutor(exact=False), seconds=seconds)
    # Said before a model is read, which takes a while.
    reason = lane.missing(NPU)
    if on_card and not reason:
        try:
            cards.cards()
        except CardUnavailableError as error:
            reason = str(error)
    if reason:
        raise UnavailableError(f"the {name} executor cannot run here: {reason}")
    bundled = {kernel.stage.name: kernel for kernel in bundled_kernels() if kernel.stage.model == "qwen3"}
    return KernelExecutor({**bundled, **own}, name, seconds=seconds, cards=cards)


def _kernels_of(locations: Iterable[str]) -> dict[str, Declaration]:
    """The kernels of a user's files, by stage."""
    found: dict[str, Declaration] = {}
    for location in locations:
        # A file's name may hold a colon; what follows one after ".py" is a kernel's name.
        path, separator, name = location.rpartition(".py:")
        file = path + ".py" if separator else location
        kernels = kernels_of(file)
        if separator:
            kernels = [find_kernel(kernels, name, file)]
        if not kernels:
            raise UsageError(f"{file} defines no kernel: decorate one with @conformance.kernel(STAGE)")
        for kernel in kernels:
            if kernel.stage.name in found:
                names = f"{found[kernel.stage.name].name} and {kernel.name}"
                raise UsageError(f"two kernels of stage {kernel.stage.name}, {names}: choose one with --kernels FILE.py:NAME")
            found[kernel.stage.name] = kernel
    return found
