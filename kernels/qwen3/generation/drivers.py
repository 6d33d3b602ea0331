"""Generation step by step: drivers, which turn stages into tokens, and executors, which answer one stage at a time.

A driver keeps what lies between two dispatches (caches, pages, which sequences are served) and computes nothing that a kernel
computes; an executor computes a stage and keeps nothing. So every driver runs on every executor.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from conformance.cases.case import Case
from conformance.cases.key import CaseKey
from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel
from conformance.contract.loading import bundled_kernels, find_kernel, kernels_in, load_module
from conformance.contract.registry import stage_named
from conformance.contract.stage import Tensors, layer_of
from conformance.errors import UnavailableError, UsageError
from conformance.lanes.process import KernelProcess, Limits
from conformance.numerics.arithmetic import CONTRACT, EXACT
from kernels.qwen3 import reference
from kernels.qwen3.generation.checkpoint import Checkpoint
from kernels.qwen3.generation.paging import PagePool
from kernels.qwen3.inputs import GARBAGE_KEY, GARBAGE_VALUE
from kernels.qwen3.reference import LAYER_WEIGHTS

Tensor = torch.Tensor


class StageError(Exception):
    """A stage's kernel gave no answer that generation can go on with; the message is one line that begins with the stage."""


# Executors


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
        contract = stage_named(stage)
        results = contract.reference(inputs, dims, EXACT if self.exact else CONTRACT)
        dtypes = {argument.name: argument.dtype for argument in contract.outputs}
        wide = {name for name, dtype in dtypes.items() if self.exact and dtype.is_floating_point}
        return {name: result if name in wide else result.to(dtypes[name]) for name, result in results.items()}

    def close(self) -> None:
        """Nothing is held."""


class KernelExecutor:
    """Kernels, each in a worker process of its own that is started at its stage's first call.

    ``lane`` is that of PyPTO kernels; torch kernels run in theirs, ``eager``. A stage without a kernel goes to ``rest``.
    """

    exact = False

    def __init__(
        self, kernels: Mapping[str, Kernel], lane: str, *, rest: Executor | None = None, seconds: float = Limits.seconds
    ) -> None:
        self._kernels = kernels
        self._lane = lane
        self._rest = rest
        self._limits = Limits(seconds=seconds)
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
            lane = "eager" if kernel.toolchain == "torch" else self._lane
            self._processes[stage] = KernelProcess(kernel, lane, limits=self._limits)
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
        return outcome.outputs

    def close(self) -> None:
        """End the worker processes; closing twice is harmless."""
        for process in self._processes.values():
            process.close()
        self._processes.clear()


EXECUTORS: dict[str, str] = {
    "reference": "the fp64 reference, nothing rounded",
    "contract": "the reference with the contract's bf16 roundings",
    "interpret": "PyPTO kernels through PyPTO's interpreter",
    "eager": "torch kernels of --kernels; where they have none, the contract",
    "device": "PyPTO kernels on an NPU",
}


def open_executor(name: str, locations: Sequence[str] = (), seconds: float = Limits.seconds) -> Executor:
    """The executor of that name; its kernels are those of ``locations`` (``FILE.py`` or ``FILE.py:NAME``), then the bundled ones.

    ``seconds`` limits one call of a kernel. Raises ``UsageError`` for an unknown name and for kernels that do not go with it,
    ``UnavailableError`` for a device that is not there.
    """
    if name not in EXECUTORS:
        raise UsageError(f"unknown executor {name!r}; known are {', '.join(EXECUTORS)}")
    if name in ("reference", "contract"):
        if locations:
            raise UsageError(f"the {name} executor runs no kernels: --kernels goes with interpret, eager or device")
        return ReferenceExecutor(exact=name == "reference")
    own = _kernels_of(locations)
    if name == "eager":
        if not own:
            raise UsageError("the eager executor runs torch kernels of yours: name their file with --kernels FILE.py")
        for kernel in own.values():
            if kernel.toolchain != "torch":
                raise UsageError(f"kernel {kernel.name} is a {kernel.toolchain} one, and eager runs torch kernels: use interpret")
        return KernelExecutor(own, "eager", rest=ReferenceExecutor(exact=False), seconds=seconds)
    if name == "device":
        from conformance.toolchains.npu import find_npu

        # Said before a model is read, which takes a while.
        npu = find_npu()
        if not npu.usable:
            raise UnavailableError(f"the device executor cannot run here: {npu.reason}")
    bundled = {kernel.stage_name: kernel for kernel in bundled_kernels()}
    return KernelExecutor({**bundled, **own}, name, seconds=seconds)


def _kernels_of(locations: Iterable[str]) -> dict[str, Kernel]:
    """The kernels of a user's files, by stage."""
    found: dict[str, Kernel] = {}
    for location in locations:
        # A file's name may hold a colon; what follows one after ".py" is a kernel's name.
        path, separator, name = location.rpartition(".py:")
        file = path + ".py" if separator else location
        kernels = kernels_in(load_module(Path(file) if file.endswith(".py") else file))
        if separator:
            kernels = [find_kernel(kernels, name, file)]
        if not kernels:
            raise UsageError(f"{file} defines no kernel: decorate one with @conformance.kernel(STAGE)")
        for kernel in kernels:
            if kernel.stage_name in found:
                names = f"{found[kernel.stage_name].name} and {kernel.name}"
                raise UsageError(f"two kernels of stage {kernel.stage_name}, {names}: choose one with --kernels FILE.py:NAME")
            found[kernel.stage_name] = kernel
    return found


# The model and its sequences


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to be served, read once.

    ``weights`` are those of all layers, the head's and the RoPE tables, by the contract's names; ``embedding`` is ``[V, H]``.
    ``dims.B`` is the largest batch, ``dims.NB`` the pages of the paged driver's pool.
    """

    dims: Dims
    weights: Tensors
    embedding: Tensor

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, exact: bool) -> Model:
        """Read a checkpoint: in the contract's dtypes, or, for an exact executor, all of it in float64."""
        dtype = torch.float64 if exact else None
        weights = checkpoint.weights(dtype=dtype) | checkpoint.rope_tables()
        return cls(checkpoint.dims, weights, checkpoint.embed_tokens(dtype))

    @property
    def exact(self) -> bool:
        """Whether the weights are in float64, for an exact executor."""
        return self.embedding.dtype == torch.float64

    def layers(self, first: int, count: int) -> dict[str, Tensor]:
        """The weights with those of ``count`` layers only; row slices, nothing is copied."""
        return {
            name: layer_of(tensor, first, self.dims.L, count) if name in LAYER_WEIGHTS else tensor
            for name, tensor in self.weights.items()
        }


@dataclasses.dataclass
class Request:
    """A prompt and what has been generated from it: ``new`` tokens at most, fewer if ``end`` comes up, which is then the last."""

    number: int
    prompt: tuple[int, ...]
    new: int
    end: int | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    #: Places in ``tokens`` where the one sampled was not the largest logit's, and which that was.
    missampled: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether nothing more is to be generated."""
        return len(self.tokens) == self.new or (self.end is not None and self.tokens[-1:] == [self.end])

    @property
    def length(self) -> int:
        """All its tokens so far: ``seq_lens`` of the step that takes the latest one."""
        return len(self.prompt) + len(self.tokens)

    @property
    def most_rows(self) -> int:
        """How many cache rows it may come to need; the last token is not fed back."""
        return len(self.prompt) + self.new - 1


def requests_for(prompts: Iterable[Sequence[int]], new: int, dims: Dims, end: int | None = None) -> list[Request]:
    """A request for each prompt; raises ``UsageError`` for what the model cannot serve."""
    if new < 1:
        raise UsageError(f"the number of new tokens must be positive, found {new}")
    requests = [Request(number, tuple(prompt), new, end) for number, prompt in enumerate(prompts)]
    if not requests:
        raise UsageError("there is no prompt: give at least one")
    for request in requests:
        what = f"prompt {request.number}"
        if not request.prompt:
            raise UsageError(f"{what} is empty: a prompt has at least one token")
        if len(request.prompt) + new > dims.S:
            raise UsageError(f"{what} has {len(request.prompt)} tokens, and {new} new ones go beyond the context of {dims.S}")
        for token in request.prompt:
            _require_token(what, token, dims)
    if end is not None:
        _require_token("the end token", end, dims)
    return requests


def _require_token(what: str, token: int, dims: Dims) -> None:
    if not 0 <= token < dims.V:
        raise UsageError(f"{what}: token {token} is outside the vocabulary, 0 to {dims.V - 1}")


# Drivers


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages that a driver's steps are made of; where a stage does not end in logits, ``lm_head`` follows."""

    summary: str
    prefill: str
    decode: str


DRIVERS: dict[str, Plan] = {
    "host_loop": Plan("one layer a dispatch", "prefill_layer", "decode_layer"),
    "fused": Plan("the whole step in one dispatch", "prefill_fwd", "decode_fwd"),
    "chunked": Plan("some layers a dispatch", "prefill_fwd", "decode_fwd_layers"),
    "paged": Plan("the whole step on a paged cache, with continuous batching", "prefill_fwd", "paged_decode_fwd"),
}


@dataclasses.dataclass
class _Part:
    """The caches of consecutive layers, which one dispatch serves."""

    first: int
    layers: int
    k_cache: Tensor
    v_cache: Tensor


@dataclasses.dataclass(frozen=True)
class _Pages:
    """A paged cache and its pool; ``held`` names the pool's sequence of each request by its number."""

    dims: Dims
    pool: PagePool
    parts: list[_Part]
    held: dict[int, int] = dataclasses.field(default_factory=dict)

    def of(self, requests: Iterable[Request]) -> list[int]:
        """The pool's sequences of these requests."""
        return [self.held[request.number] for request in requests]

    def slots(self, requests: Iterable[Request], counts: Iterable[int]) -> list[int]:
        """The slots of the last ``counts`` positions of each."""
        slots = []
        for sequence, count in zip(self.of(requests), counts, strict=True):
            length = self.pool.length(sequence)
            slots += self.pool.slots(sequence, length - count, length)
        return slots

    def block_table(self, requests: Iterable[Request]) -> Tensor:
        """The pages of these requests."""
        return self.pool.block_table(self.of(requests), self.dims.MB)


class Driver:
    """Serves prompts in one of the ways of ``DRIVERS``.

    ``chunk`` is how many layers the chunked driver runs a dispatch, by default half of them; ``prefill_chunk`` how many tokens of
    a prompt go into one prefill, by default all; ``progress`` is called with each number of tokens that are new. Raises
    ``UsageError`` for an unknown driver and for chunks that are none.

    All drivers prefill into pages. Those with a contiguous cache then lay them out anew and serve ``model.dims.B`` prompts at a
    time from the first to the last token; a sequence that has ended repeats its last step until the others have. The paged
    driver has ``model.dims.B`` places, admits the next prompt as soon as one is free and the pool has pages for all that it may
    become, and gives the pages back when it ends.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        executor: Executor,
        *,
        chunk: int | None = None,
        prefill_chunk: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        if name not in DRIVERS:
            raise UsageError(f"unknown driver {name!r}; known are {', '.join(DRIVERS)}")
        layers = model.dims.L
        if chunk is not None and not 1 <= chunk <= layers:
            raise UsageError(f"a chunk is 1 to {layers} of the model's layers, found {chunk}")
        if prefill_chunk is not None and prefill_chunk < 1:
            raise UsageError(f"a chunk of a prefill has at least one token, found {prefill_chunk}")
        if model.exact != executor.exact:
            raise UsageError("the weights of a model in float64 go with an exact executor, and with no other")
        self.name = name
        self.plan = DRIVERS[name]
        self.model = model
        self.executor = executor
        #: The pool of the latest call of ``generate`` by the paged driver.
        self.pool: PagePool | None = None
        self._chunk = {"host_loop": 1, "chunked": chunk or -(-layers // 2)}.get(name, layers)
        self._prefill_chunk = prefill_chunk
        self._progress = progress or (lambda count: None)

    def generate(self, prompts: Iterable[Sequence[int]], new: int, end: int | None = None) -> list[Request]:
        """Prefill and greedy decode; ``end`` ends a sequence early.

        Raises ``UsageError`` for what the model cannot serve, ``StageError`` if a kernel fails or leaves what is no logits or no
        token.
        """
        requests = requests_for(prompts, new, self.model.dims, end)
        if self.plan.decode.startswith("paged"):
            self._serve_paged(requests)
        else:
            for start in range(0, len(requests), self.model.dims.B):
                self._serve_contiguous(requests[start : start + self.model.dims.B])
        return requests

    def _serve_contiguous(self, group: list[Request]) -> None:
        """Serve prompts together, on a contiguous cache of their own."""
        dims = self.model.dims.replace(B=len(group), NB=len(group) * self.model.dims.MB + 1)
        pages = self._new_pages(dims)
        self._sample(self._prefill(group, pages), group)
        parts = _contiguous_parts(pages, group, self._chunk)
        del pages
        while not all(request.done for request in group):
            tokens = [request.tokens[-1] for request in group]
            seq_lens = _int32(request.length for request in group)
            self._sample(self._step(self.plan.decode, dims, parts, tokens, {"seq_lens": seq_lens}), group)

    def _serve_paged(self, requests: list[Request]) -> None:
        """Serve prompts as places and pages become free: the batch changes from step to step."""
        dims = self.model.dims
        pages = self._new_pages(dims)
        pool = self.pool = pages.pool
        for request in requests:
            if not self._fits(request, [], pool):
                needed = pool.pages_for(request.most_rows)
                raise UsageError(f"prompt {request.number} may need {needed} pages, the pool can hand out {pool.pages - 1}")
        waiting, live = collections.deque(requests), list[Request]()

        def retire() -> None:
            for request in live:
                if request.done:
                    pool.finish(pages.held.pop(request.number))
            live[:] = [request for request in live if not request.done]

        while waiting or live:
            admitted: list[Request] = []
            while waiting and len(live) + len(admitted) < dims.B and self._fits(waiting[0], live + admitted, pool):
                admitted.append(waiting.popleft())
            if admitted:
                self._sample(self._prefill(admitted, pages), admitted)
                live += admitted
                retire()
            if live:
                for sequence in pages.of(live):
                    pool.append(sequence)
                places = {
                    "seq_lens": _int32(request.length for request in live),
                    "block_table": pages.block_table(live),
                    "slot_mapping": _int32(pages.slots(live, [1] * len(live))),
                }
                tokens = [request.tokens[-1] for request in live]
                self._sample(self._step(self.plan.decode, dims.replace(B=len(live)), pages.parts, tokens, places), live)
                retire()

    def _fits(self, request: Request, live: list[Request], pool: PagePool) -> bool:
        """Whether the pool has pages for a request and for all that are live, however long they become: none is driven out."""
        return sum(pool.pages_for(one.most_rows) for one in [*live, request]) < pool.pages

    def _new_pages(self, dims: Dims) -> _Pages:
        """Caches that hold what must not be read: garbage, and NaN in the page that nobody owns."""
        count = 1 if self.plan.prefill == "prefill_layer" else dims.L
        dtype = torch.float64 if self.executor.exact else torch.bfloat16
        parts = []
        for first in range(0, dims.L, count):
            caches = []
            for garbage in (GARBAGE_KEY, GARBAGE_VALUE):
                try:
                    cache = torch.full((count, dims.NB, dims.NKV * dims.BS, dims.D), garbage, dtype=dtype)
                except (RuntimeError, TypeError) as error:  # too large for memory, or for an int64
                    raise UsageError(f"a cache of {dims.NB} pages does not fit in memory: serve fewer at a time") from error
                cache[:, -1] = float("nan")
                caches.append(cache.view(-1, dims.D))
            parts.append(_Part(first, count, *caches))
        return _Pages(dims, PagePool(dims.NB, dims.BS), parts)

    def _prefill(self, requests: list[Request], pages: _Pages) -> Tensor:
        """Bring prompts into the cache, ``prefill_chunk`` tokens of each at a time; the logits after their last tokens."""
        longest = max(len(request.prompt) for request in requests)
        step = self._prefill_chunk or longest
        last: dict[int, Tensor] = {}
        for start in range(0, longest, step):
            batch = [request for request in requests if len(request.prompt) > start]
            chunks = [request.prompt[start : start + step] for request in batch]
            counts = [len(chunk) for chunk in chunks]
            for request, count in zip(batch, counts, strict=True):
                if start:
                    pages.pool.append(pages.held[request.number], count)
                else:
                    pages.held[request.number] = pages.pool.admit(count)
            # Packed with the last prompt first: chunk_offsets say so, and a kernel that goes by the order of the sequences shows.
            tokens = [token for chunk in reversed(chunks) for token in chunk]
            offsets = [sum(counts[b + 1 :]) for b in range(len(counts))]
            places = {
                "seq_lens": _int32(start + count for count in counts),
                "chunk_lens": _int32(counts),
                "chunk_offsets": _int32(offsets),
                "block_table": pages.block_table(batch),
                "slot_mapping": _int32(pages.slots(batch[::-1], counts[::-1])),
            }
            dims = pages.dims.replace(B=len(batch), T=len(tokens))
            ends = [offset + count - 1 for offset, count in zip(offsets, counts, strict=True)]
            logits = self._step(self.plan.prefill, dims, pages.parts, tokens, places, ends)
            last.update(zip((request.number for request in batch), logits, strict=True))
        return torch.stack([last[request.number] for request in requests])

    def _step(
        self, stage: str, dims: Dims, parts: list[_Part], tokens: list[int], places: Tensors, last: list[int] | None = None
    ) -> Tensor:
        """Tokens through all layers: the logits ``[B, V]`` of every sequence's ``last`` token (every token, if ``None``)."""
        hidden = self.model.embedding[tokens]
        for part in parts:
            caches = {"k_cache": part.k_cache, "v_cache": part.v_cache}
            given = {**self.model.layers(part.first, part.layers), **places, **caches, "hidden_states": hidden}
            results = self.executor.run(stage, dims.replace(L=part.layers), given)
            part.k_cache, part.v_cache = results["k_cache"], results["v_cache"]
            if "logits" in results:
                return _finite(results["logits"], stage)
            hidden = results["out"]
        head = {**self.model.weights, "hidden": hidden if last is None else hidden[last]}
        return _finite(self.executor.run("lm_head", dims.replace(L=1, T=1), head)["logits"], "lm_head")

    def _sample(self, logits: Tensor, requests: list[Request]) -> None:
        """Choose the next token of every sequence that has not ended."""
        dims = self.model.dims.replace(B=len(requests), L=1, T=1)
        chosen = self.executor.run("greedy_sample", dims, {"logits": logits})["token_ids"].tolist()
        (largest,) = reference.greedy_sample(logits, dims=dims, a=EXACT)
        for request, token, right in zip(requests, chosen, largest.tolist(), strict=True):
            if request.done:
                continue
            if not 0 <= token < dims.V:
                raise StageError(f"greedy_sample: gave {token} for prompt {request.number}, which is no token of {dims.V}")
            if token != right:
                request.missampled[len(request.tokens)] = int(right)
            request.tokens.append(token)
            self._progress(1)


def _finite(logits: Tensor, stage: str) -> Tensor:
    broken = int((~torch.isfinite(logits)).sum())
    if broken:
        raise StageError(f"{stage}: {broken} of {logits.numel()} logits are not finite")
    return logits


def _contiguous_parts(pages: _Pages, requests: list[Request], chunk: int) -> list[_Part]:
    """The same rows in contiguous caches of ``chunk`` layers each."""
    dims = pages.dims
    owned = [pages.pool.pages_of(sequence) for sequence in pages.of(requests)]

    def laid_out(cache: Tensor, layers: int, garbage: float) -> Tensor:
        by_page = cache.view(layers, dims.NB, dims.NKV, dims.BS, dims.D)
        rows = torch.full((layers, dims.B, dims.NKV, dims.S, dims.D), garbage, dtype=cache.dtype)
        for b, own in enumerate(owned):
            held = by_page[:, own].transpose(1, 2).reshape(layers, dims.NKV, -1, dims.D)[:, :, : dims.S]
            rows[:, b, :, : held.shape[2]] = held
        return rows.view(-1, dims.D)

    parts = []
    for part in pages.parts:
        k_cache = laid_out(part.k_cache, part.layers, GARBAGE_KEY)
        v_cache = laid_out(part.v_cache, part.layers, GARBAGE_VALUE)
        for start in range(0, part.layers, chunk):
            count = min(chunk, part.layers - start)
            k_part, v_part = (layer_of(cache, start, part.layers, count) for cache in (k_cache, v_cache))
            parts.append(_Part(part.first + start, count, k_part, v_part))
    return parts


def _int32(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)
