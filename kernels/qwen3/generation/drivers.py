"""Drivers, which generate tokens step by step: prefill, then greedy decode, layer by layer or fused, contiguous or paged.

A driver keeps what lies between two dispatches (caches, pages, which sequences are running) and computes nothing that a kernel
computes; an executor (``executors.py``) computes a stage and keeps nothing. So every driver runs on every executor.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch

from conformance.cases.case import require_room
from conformance.contract.dims import Dims
from conformance.contract.stage import Tensors, layer_of
from conformance.errors import UsageError
from conformance.kernels.qwen3 import reference
from conformance.kernels.qwen3.generation.executors import Executor, StageError
from conformance.kernels.qwen3.generation.model import LoadedModel
from conformance.kernels.qwen3.generation.paging import PagePool
from conformance.kernels.qwen3.generation.requests import Request, requests_for
from conformance.kernels.qwen3.inputs import GARBAGE_KEY, GARBAGE_VALUE
from conformance.numerics.arithmetic import EXACT

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages that a driver's steps are made of; where a stage does not end in logits, ``lm_head`` follows."""

    summary: str
    prefill: str
    decode: str
    #: Whether each dispatch, of a prefill too, is one layer.
    layer_by_layer: bool = False
    #: Whether decode works on the paged cache too, with continuous batching.
    paged: bool = False


DRIVERS: dict[str, Plan] = {
    "host_loop": Plan("one layer a dispatch", "prefill_layer", "decode_layer", layer_by_layer=True),
    "fused": Plan("the whole step in one dispatch", "prefill_fwd", "decode_fwd"),
    "chunked": Plan("some layers a dispatch", "prefill_fwd", "decode_fwd_layers"),
    "paged": Plan("the whole step on a paged cache, with continuous batching", "prefill_fwd", "paged_decode_fwd", paged=True),
}


@dataclasses.dataclass
class _LayerCaches:
    """The caches of consecutive layers, ``first_layer`` and on, that one dispatch runs."""

    first_layer: int
    layers: int
    k_cache: Tensor
    v_cache: Tensor


@dataclasses.dataclass(frozen=True)
class _PagedCache:
    """The paged caches of all layers, the pool of their pages, and each request's sequence in the pool, by its number."""

    dims: Dims
    pool: PagePool
    caches: list[_LayerCaches]
    sequence_of: dict[int, int] = dataclasses.field(default_factory=dict)

    def sequences(self, requests: Iterable[Request]) -> list[int]:
        """The sequences of these requests in the pool."""
        return [self.sequence_of[request.number] for request in requests]

    def slot_mapping(self, requests: Iterable[Request], counts: Iterable[int]) -> Tensor:
        """The slots of the last ``counts`` positions of each request, ``[sum(counts)]`` int32."""
        slots = []
        for sequence, count in zip(self.sequences(requests), counts, strict=True):
            length = self.pool.length(sequence)
            slots += self.pool.slots(sequence, length - count, length)
        return _int32(slots)

    def block_table(self, requests: Iterable[Request]) -> Tensor:
        """The pages of each request, ``[len(requests) * MB]`` int32."""
        return self.pool.block_table(self.sequences(requests), self.dims.MB)


class Driver:
    """Serves prompts in one of the ways of ``DRIVERS``.

    ``layers_per_dispatch`` is for the chunked driver, by default half of the layers; ``prefill_chunk`` is how many tokens of a
    prompt go into one prefill, by default all; ``progress`` is called with the number of new tokens after each. Raises
    ``UsageError`` for an unknown driver and for sizes that are not positive or too large.

    All drivers prefill into pages. Those that decode on a contiguous cache then copy the pages into one, and serve
    ``model.dims.B`` prompts at a time from the first to the last token; a sequence that has finished repeats its last step until
    the others have. The paged driver batches continuously: at most ``model.dims.B`` sequences run, the next prompt is admitted as
    soon as one has finished and the pool has pages for all that it can become, and finished ones give their pages back.
    """

    def __init__(
        self,
        name: str,
        model: LoadedModel,
        executor: Executor,
        *,
        layers_per_dispatch: int | None = None,
        prefill_chunk: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        if name not in DRIVERS:
            raise UsageError(f"unknown driver {name!r}; known are {', '.join(DRIVERS)}")
        layers = model.dims.L
        if layers_per_dispatch is not None and not 1 <= layers_per_dispatch <= layers:
            raise UsageError(f"a chunk is 1 to {layers} of the model's layers, found {layers_per_dispatch}")
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
        #: The requests of the latest call of ``generate``, as far as they came.
        self.requests: list[Request] = []
        self._decode_layers = {"host_loop": 1, "chunked": layers_per_dispatch or -(-layers // 2)}.get(name, layers)
        self._prefill_chunk = prefill_chunk
        self._progress = progress or (lambda count: None)

    def generate(self, prompts: Iterable[Sequence[int]], max_new_tokens: int, end_token: int | None = None) -> list[Request]:
        """Prefill and greedy decode; a sequence ends early with ``end_token``.

        Raises ``UsageError`` for what the model cannot serve, ``StageError`` if a kernel fails, or leaves logits that are not
        finite or a token outside the vocabulary.
        """
        requests = self.requests = requests_for(prompts, max_new_tokens, self.model.dims, end_token)
        if self.plan.paged:
            self._serve_paged(requests)
        else:
            for start in range(0, len(requests), self.model.dims.B):
                self._serve_contiguous(requests[start : start + self.model.dims.B])
        return requests

    def _serve_contiguous(self, batch: list[Request]) -> None:
        """Serve prompts together, on a contiguous cache of their own."""
        dims = self.model.dims.replace(B=len(batch), NB=len(batch) * self.model.dims.MB + 1)
        paged = self._empty_cache(dims)
        self._sample(self._prefill(batch, paged), batch)
        caches = _contiguous_caches(paged, batch, self._decode_layers)
        del paged
        while not all(request.finished for request in batch):
            tokens = [request.tokens[-1] for request in batch]
            metadata = {"seq_lens": _int32(request.length for request in batch)}
            self._sample(self._forward(self.plan.decode, dims, caches, tokens, metadata), batch)

    def _serve_paged(self, requests: list[Request]) -> None:
        """Serve prompts as sequences finish and pages become free: the batch changes from step to step."""
        dims = self.model.dims
        cache = self._empty_cache(dims)
        pool = self.pool = cache.pool
        for request in requests:
            if not self._fits(request, [], pool):
                needed = pool.pages_for(request.max_cache_rows)
                raise UsageError(f"prompt {request.number} may need {needed} pages, the pool can hand out {pool.pages - 1}")
        waiting, running = collections.deque(requests), list[Request]()

        def release_finished() -> None:
            for request in running:
                if request.finished:
                    pool.finish(cache.sequence_of.pop(request.number))
            running[:] = [request for request in running if not request.finished]

        while waiting or running:
            admitted: list[Request] = []
            while waiting and len(running) + len(admitted) < dims.B and self._fits(waiting[0], running + admitted, pool):
                admitted.append(waiting.popleft())
            if admitted:
                self._sample(self._prefill(admitted, cache), admitted)
                running += admitted
                release_finished()
            if running:
                for sequence in cache.sequences(running):
                    pool.append(sequence)
                metadata = {
                    "seq_lens": _int32(request.length for request in running),
                    "block_table": cache.block_table(running),
                    "slot_mapping": cache.slot_mapping(running, [1] * len(running)),
                }
                tokens = [request.tokens[-1] for request in running]
                step = dims.replace(B=len(running))
                self._sample(self._forward(self.plan.decode, step, cache.caches, tokens, metadata), running)
                release_finished()

    def _fits(self, request: Request, running: list[Request], pool: PagePool) -> bool:
        """Whether the pool has pages for a request and all that are running at their longest, so that none is preempted."""
        return sum(pool.pages_for(one.max_cache_rows) for one in [*running, request]) < pool.pages

    def _empty_cache(self, dims: Dims) -> _PagedCache:
        """A paged cache that holds what must not be read: garbage, and NaN in the last page, which is never handed out."""
        count = 1 if self.plan.layer_by_layer else dims.L
        require_room(4 * dims.L * dims.NB * dims.NKV * dims.BS * dims.D, f"a cache of {dims.NB:,} pages")
        dtype = torch.float64 if self.executor.exact else torch.bfloat16
        caches = []
        for first_layer in range(0, dims.L, count):
            pair = []
            for garbage in (GARBAGE_KEY, GARBAGE_VALUE):
                try:
                    cache = torch.full((count, dims.NB, dims.NKV * dims.BS, dims.D), garbage, dtype=dtype)
                except (RuntimeError, TypeError) as error:  # too large for memory, or for an int64
                    raise UsageError(f"a cache of {dims.NB} pages does not fit in memory: serve fewer at a time") from error
                cache[:, -1] = float("nan")
                pair.append(cache.view(-1, dims.D))
            caches.append(_LayerCaches(first_layer, count, *pair))
        return _PagedCache(dims, PagePool(dims.NB, dims.BS), caches)

    def _prefill(self, requests: list[Request], cache: _PagedCache) -> Tensor:
        """Bring prompts into the cache, ``prefill_chunk`` tokens of each at a time.

        Returns the logits ``[len(requests), V]`` after their last tokens.
        """
        longest = max(len(request.prompt) for request in requests)
        size = self._prefill_chunk or longest
        logits_of: dict[int, Tensor] = {}
        for start in range(0, longest, size):
            batch = [request for request in requests if len(request.prompt) > start]
            chunks = [request.prompt[start : start + size] for request in batch]
            counts = [len(chunk) for chunk in chunks]
            for request, count in zip(batch, counts, strict=True):
                if start:
                    cache.pool.append(cache.sequence_of[request.number], count)
                else:
                    cache.sequence_of[request.number] = cache.pool.admit(count)
            # Packed with the last prompt first, as chunk_offsets say: a kernel that goes by the order of the sequences is wrong.
            tokens = [token for chunk in reversed(chunks) for token in chunk]
            offsets = [sum(counts[b + 1 :]) for b in range(len(counts))]
            metadata = {
                "seq_lens": _int32(start + count for count in counts),
                "chunk_lens": _int32(counts),
                "chunk_offsets": _int32(offsets),
                "block_table": cache.block_table(batch),
                "slot_mapping": cache.slot_mapping(batch[::-1], counts[::-1]),
            }
            dims = cache.dims.replace(B=len(batch), T=len(tokens))
            last_tokens = [offset + count - 1 for offset, count in zip(offsets, counts, strict=True)]
            logits = self._forward(self.plan.prefill, dims, cache.caches, tokens, metadata, last_tokens)
            logits_of.update(zip((request.number for request in batch), logits, strict=True))
        return torch.stack([logits_of[request.number] for request in requests])

    def _forward(
        self,
        stage: str,
        dims: Dims,
        caches: list[_LayerCaches],
        tokens: list[int],
        metadata: Tensors,
        last_tokens: list[int] | None = None,
    ) -> Tensor:
        """One forward pass, dispatch by dispatch: the logits ``[B, V]`` of each sequence's last token.

        ``metadata`` says where the ``tokens`` stand: lengths, pages and slots, by the contract's names. ``last_tokens`` are the
        indices of the sequences' last tokens; ``None`` where each has one token. Updates ``caches``.
        """
        hidden = self.model.embedding[tokens]
        for part in caches:
            pair = {"k_cache": part.k_cache, "v_cache": part.v_cache}
            inputs = {**self.model.layers(part.first_layer, part.layers), **metadata, **pair, "hidden_states": hidden}
            results = self.executor.run(stage, dims.replace(L=part.layers), inputs)
            part.k_cache, part.v_cache = results["k_cache"], results["v_cache"]
            if "logits" in results:
                return _require_finite(results["logits"], stage)
            hidden = results["out"]
        inputs = {**self.model.weights, "hidden": hidden if last_tokens is None else hidden[last_tokens]}
        return _require_finite(self.executor.run("lm_head", dims.replace(L=1, T=1), inputs)["logits"], "lm_head")

    def _sample(self, logits: Tensor, requests: list[Request]) -> None:
        """Choose the next token of every sequence that has not finished, from ``logits [len(requests), V]``."""
        dims = self.model.dims.replace(B=len(requests), L=1, T=1)
        sampled = self.executor.run("greedy_sample", dims, {"logits": logits})["token_ids"].tolist()
        (expected,) = reference.greedy_sample(logits, dims=dims, a=EXACT)
        for request, token, right in zip(requests, sampled, expected.tolist(), strict=True):
            if request.finished:
                continue
            if not 0 <= token < dims.V:
                raise StageError(f"greedy_sample: gave {token} for prompt {request.number}, which is no token of {dims.V}")
            if token != right:
                request.missampled[len(request.tokens)] = int(right)
            request.tokens.append(token)
            self._progress(1)


def _require_finite(logits: Tensor, stage: str) -> Tensor:
    broken = int((~torch.isfinite(logits)).sum())
    if broken:
        raise StageError(f"{stage}: {broken} of {logits.numel()} logits are not finite")
    return logits


def _contiguous_caches(paged: _PagedCache, requests: list[Request], layers_per_dispatch: int) -> list[_LayerCaches]:
    """The rows of these requests in contiguous caches of ``layers_per_dispatch`` layers each; garbage past their lengths."""
    dims = paged.dims
    pages_of = [paged.pool.pages_of(sequence) for sequence in paged.sequences(requests)]

    def contiguous(cache: Tensor, layers: int, garbage: float) -> Tensor:
        by_page = cache.view(layers, dims.NB, dims.NKV, dims.BS, dims.D)
        rows = torch.full((layers, dims.B, dims.NKV, dims.S, dims.D), garbage, dtype=cache.dtype)
        for b, pages in enumerate(pages_of):
            history = by_page[:, pages].transpose(1, 2).reshape(layers, dims.NKV, -1, dims.D)[:, :, : dims.S]
            rows[:, b, :, : history.shape[2]] = history
        return rows.view(-1, dims.D)

    caches = []
    for part in paged.caches:
        k_cache = contiguous(part.k_cache, part.layers, GARBAGE_KEY)
        v_cache = contiguous(part.v_cache, part.layers, GARBAGE_VALUE)
        for start in range(0, part.layers, layers_per_dispatch):
            count = min(layers_per_dispatch, part.layers - start)
            pair = (layer_of(cache, start, part.layers, count) for cache in (k_cache, v_cache))
            caches.append(_LayerCaches(part.first_layer + start, count, *pair))
    return caches


def _int32(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)
