"""Drivers, which generate tokens step by step: prefill, then greedy decode, layer by layer or fused, contiguous or paged.

A driver keeps what lies between two dispatches (caches, pages, which sequences are running) and computes nothing that a kernel
computes; an executor (``executors.py``) computes a stage and keeps nothing. So every driver runs on every executor.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch

from conformance.numerics.arithmetic import EXACT
from conformance.contract.dims import Dims
from conformance.contract.stage import Tensors
from conformance.contract.stage import layer_of
from conformance.errors import UsageError
from kernels.qwen3 import reference
from kernels.qwen3.generation.executors import Executor, StageError
from kernels.qwen3.generation.model import LoadedModel
from kernels.qwen3.generation.paging import PagePool
from kernels.qwen3.generation.requests import Request, requests_for
from kernels.qwen3.inputs import GARBAGE_KEY, GARBAGE_VALUE

Tensor = torch.Tensor


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
        model: LoadedModel,
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
