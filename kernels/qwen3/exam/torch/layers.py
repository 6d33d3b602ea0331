"""Layers of the torch kernels: where the tokens of a dispatch stand, which cache rows they read and write, and what follows.

Contiguous or paged, one token a sequence or several: the same code, with the contract's row formulas in ``Step``.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable

import torch

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.torch.operations import BF16, Operations

Tensor = torch.Tensor
Arguments = dict[str, Tensor]

#: Layer weights in the order of the contract.
LAYER_WEIGHTS = (
    "input_rms_weight",
    "wq",
    "wk",
    "wv",
    "q_norm_weight",
    "k_norm_weight",
    "wo",
    "w_gate",
    "w_up",
    "w_down",
    "post_rms_weight",
)


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a dispatch: its row in the hidden states, its sequence, its position, and what a kernel makes of that.

    ``rope_row`` is the row of the RoPE tables, ``length`` how many rows of its history it attends to, ``past`` how many there
    were before this dispatch, ``total`` how many there are after it.
    """

    row: int
    sequence: int
    position: int
    rope_row: int
    length: int
    past: int
    total: int


class Step:
    """The tokens of one dispatch by sequence, and the addresses of cache rows, from the contract's arguments."""

    def __init__(self, ops: Operations, t: Arguments, dims: Dims) -> None:
        self.ops, self.dims = ops, dims
        self.page_size = ops.at("page_size", _own_page_size)(dims)
        self.page_dims = dims.replace(BS=self.page_size)
        self.seq_lens: list[int] = t["seq_lens"].tolist()
        self.table: list[int] | None = t["block_table"].tolist() if "block_table" in t else None
        self.slots: list[int] = t["slot_mapping"].tolist() if "slot_mapping" in t else []
        counts = t["chunk_lens"].tolist() if "chunk_lens" in t else [1] * dims.B
        starts = t["chunk_offsets"].tolist() if "chunk_offsets" in t else list(range(dims.B))
        self.chunks = [self._chunk(b, start, count) for b, (start, count) in enumerate(zip(starts, counts, strict=True))]
        self.tokens = [token for chunk in self.chunks for token in chunk]
        self.cache_rows = t["k_cache"].shape[0]
        self._rows: dict[tuple[int, int, int], list[int]] = {}

    def _chunk(self, b: int, start: int, count: int) -> list[Token]:
        ops, total = self.ops, self.seq_lens[b]
        past, length = total - count, ops.at("length", own_length)(self.seq_lens, b)
        tokens = []
        for index in range(ops.at("tokens_computed", _all_tokens)(count)):
            newest = length - count + index
            rope_row = ops.rope_row(newest, b, past, self.dims)
            tokens.append(Token(start + index, b, past + index, rope_row, newest + 1, past, total))
        return tokens

    # -- addresses ----------------------------------------------------------------------------------------------------------

    def _paged_row(self, layer: int, page: int, offset: int, kv_head: int) -> int:
        page += layer * self.ops.at("layer_stride", _all_pages)(self.table, self.dims)
        row = self.ops.at("cache_row", cache_row)(page, offset, kv_head, self.page_dims)
        # Where a device would read or write somewhere else, stay in the tensor. Page -1 is the last one.
        return row % self.cache_rows

    def right_page(self, sequence: int, index: int) -> int:
        """The physical page of the ``index``-th page of a sequence, as the block table has it."""
        assert self.table is not None
        return self.table[min(sequence * self.dims.MB + index, len(self.table) - 1)]

    def row(self, layer: int, sequence: int, position: int, kv_head: int) -> int:
        """Where the key or value of a position is read."""
        ops, dims = self.ops, self.dims
        layer = ops.at("layer_read", _own_layer)(ops.at("cache_layer", _own_layer)(layer, dims), dims)
        if self.table is None:
            return ((layer * dims.B + sequence) * dims.NKV + kv_head) * dims.S + position
        index, offset = divmod(position, self.page_size)
        page = ops.at("page", Step.right_page)(self, sequence, index)
        return self._paged_row(layer, page, offset, kv_head)

    def rows(self, layer: int, sequence: int, positions: list[int], kv_head: int) -> list[int]:
        """The same of many positions. Each token of a chunk sees those of the one before: they are worked out once."""
        known = self._rows.setdefault((layer, sequence, kv_head), [])
        known += [self.row(layer, sequence, position, kv_head) for position in range(len(known), max(positions) + 1)]
        return [known[position] for position in positions]

    def written_row(self, layer: int, token: Token, kv_head: int) -> int:
        """Where the key and value of a token are written."""
        if self.table is None:
            return self.row(layer, token.sequence, token.position, kv_head)
        layer = self.ops.at("cache_layer", _own_layer)(layer, self.dims)
        slot = self.ops.at("slot", own_slot)(self.slots, token.row, self.dims)
        return self._paged_row(layer, *divmod(slot, self.page_size), kv_head)

    # -- what a token sees --------------------------------------------------------------------------------------------------

    def attended(self, token: Token) -> list[int]:
        """The positions that a token attends to."""
        return self.ops.at("positions", _all_positions)(list(range(token.length)), token, self)

    def read(self, sequence: int, attended: list[int]) -> list[int]:
        """The positions whose rows are read for those that are attended to, in the order in which they are visited."""
        ops, dims = self.ops, self.dims
        positions = attended
        if ops.choices.whole_page != "no":
            end = -(-(attended[-1] + 1) // dims.BS) * dims.BS
            positions = list(range(min(end, dims.S) if self.table is None else end))
        positions = ops.at("positions_read", _same_positions)(positions, dims)
        if ops.choices.visit == "forward":
            return positions
        pages_in_order = sorted({position // dims.BS for position in positions}, reverse=True)
        if ops.choices.visit == "shuffled":
            random.Random(f"{sequence}/{len(positions)}").shuffle(pages_in_order)
        return [position for page in pages_in_order for position in positions if position // dims.BS == page]


def attention(ops: Operations, q: Tensor, step: Step, layer: int, k_cache: Tensor, v_cache: Tensor, dims: Dims) -> Tensor:
    """``q[N, NH*D]``, the tokens of a step by sequence, over the caches of all layers."""
    result = torch.empty_like(q)
    first = 0
    for sequence, chunk in enumerate(step.chunks):
        together = ops.choices.queries or max(len(chunk), 1)
        for start in range(0, len(chunk), together):
            block = chunk[start : start + together]
            index = torch.arange(first, first + len(block))
            first += len(block)
            attended = [set(step.attended(token)) for token in block]
            read = step.read(sequence, sorted(set().union(*attended)))
            hidden = torch.zeros(len(block), len(read), dtype=torch.bool)
            if any(len(positions) < len(read) for positions in attended):
                hidden = torch.tensor([[position not in positions for position in read] for positions in attended])
            for kv_head in range(dims.NKV):
                rows = step.rows(layer, sequence, read, ops.at("kv_head", _own_kv_head)(kv_head, dims))
                keys, values = ops.at("keys_and_values", both)(k_cache[rows].float(), v_cache[rows].float())
                heads = ops.at("query_heads", _own_group)(kv_head, dims)
                place = (index.view(-1, 1), heads)
                queries = q.view(-1, dims.NH, dims.D)[place].reshape(-1, dims.D)  # by token, then head
                out = ops.attend(queries, keys, values, hidden.repeat_interleave(len(heads), 0), dims)
                result.view(-1, dims.NH, dims.D)[place] = out.view(len(block), len(heads), dims.D)
    return result


def _write(ops: Operations, k: Tensor, v: Tensor, step: Step, layer: int, k_cache: Tensor, v_cache: Tensor, dims: Dims) -> None:
    """The tokens' rows of ``k`` and ``v [N, NKV*D]`` into the caches."""
    for index, token in enumerate(step.tokens):
        if not ops.at("token_written", _every_token)(token, dims):
            continue
        for head in range(dims.NKV):
            if not ops.at("head_written", every_head)(head, dims):
                continue
            row, columns = step.written_row(layer, token, head), slice(head * dims.D, (head + 1) * dims.D)
            new_k, new_v = ops.at("new_rows", both)(k[index, columns], ops.at("value_cast", ops.cast)(v[index, columns]))
            k_cache[row], v_cache[row] = new_k.to(BF16), new_v.to(BF16)
    ops.at("after_write", _nothing_more)(step, layer, k_cache, v_cache)


def normalised_and_rotated(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, rope_rows: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k normalised by head and rotated, in bf16; v as it is."""
    q = ops.heads_normalised(q, weights["q_norm_weight"][0], dims.replace(eps=ops.eps_of("q", dims)))
    k = ops.heads_normalised(k, weights["k_norm_weight"][0], dims.replace(eps=ops.eps_of("k", dims)))
    q, k = (ops.rotated(tensor, rope_rows, t["rope_cos"], t["rope_sin"], dims) for tensor in (q, k))
    return ops.at("query_cast", ops.cast)(q), ops.at("key_cast", ops.cast)(k), v


def _layer(ops: Operations, hidden: Tensor, weights: Arguments, t: Arguments, step: Step, layer: int, dims: Dims) -> Tensor:
    """One layer, which updates its rows of the caches; ``hidden [N, H]`` and the result are fp32 before the last cast."""
    q, k, v = ops.normalised_projections(
        hidden,
        weights["input_rms_weight"][0],
        [weights["wq"], weights["wk"], weights["wv"]],
        ops.eps_of("input", dims),
        ops.choices.deferred_input_norm,
    )
    q, k, v = (ops.maybe(ops.choices.projection, tensor) for tensor in (q, k, v))
    rope_rows = [token.rope_row for token in step.tokens]
    q, k, v = ops.at("queries_keys_values", normalised_and_rotated)(ops, q, k, v, weights, rope_rows, t, dims)
    caches = t["k_cache"], t["v_cache"]
    attended = ops.at("attended_caches", both)(*caches)
    _write(ops, k, v, step, layer, *caches, dims)
    attn = ops.at("attention_cast", ops.cast)(attention(ops, q, step, layer, *attended, dims))
    state = ops.maybe(ops.choices.residual, ops.with_residual(attn, weights["wo"], hidden, "attention_sum"))
    gate, up = ops.normalised_projections(
        ops.at("mlp_input", _state)(state, hidden),
        weights["post_rms_weight"][0],
        [weights["w_gate"], weights["w_up"]],
        ops.eps_of("post", dims),
        ops.choices.deferred_post_norm,
    )
    residual = ops.at("mlp_residual", _state)(state, hidden)
    return ops.with_residual(ops.gated(gate, up), weights["w_down"], residual, "mlp_sum")


def layers(ops: Operations, t: Arguments, dims: Dims) -> Arguments:
    """Any stage of one layer or more: ``out`` after the last layer, or ``logits``, where there is an LM head."""
    step = Step(ops, t, dims)
    rows = [token.row for token in step.tokens]
    given = t["hidden_states"].float()
    first = before = hidden = result = given[rows]
    for layer in ops.at("layers_run", _all_layers)(dims):
        weights = {name: ops.at("weight", own_weight)(name, layer, t, dims) for name in LAYER_WEIGHTS}
        before = ops.at("layer_input", _state)(hidden, first)
        result = _layer(ops, before, weights, t, step, layer, dims)
        hidden = ops.at("carried_cast", ops.cast)(result)
    if "logits" not in t:
        out = given.clone()
        out[rows] = result
        return {"out": out}
    last = [rows.index(row) for row in ops.at("last_tokens", _last_tokens)(step)]
    return {"logits": lm_head(ops, hidden[last], before[last], t["final_norm_weight"], t["lm_head_weight"], dims)}


def lm_head(ops: Operations, hidden: Tensor, before: Tensor, gamma: Tensor, weight: Tensor, dims: Dims) -> Tensor:
    """Final norm and vocabulary projection of ``hidden [B, H]``: the logits ``[B, V]``.

    ``before`` is the input of the last layer, if there are layers; no right kernel looks at it.
    """
    hidden = ops.at("head_input", _state)(hidden, before)
    eps, deferred = ops.eps_of("final", dims), ops.choices.deferred_final_norm
    return ops.at("final_projection", _final_projection)(ops, hidden, gamma[0], weight.T, eps, deferred)


def _final_projection(ops: Operations, hidden: Tensor, gamma: Tensor, weight: Tensor, eps: float, deferred: bool) -> Tensor:
    (logits,) = ops.normalised_projections(hidden, gamma, [weight], eps, deferred)
    return logits


# What stands at a hook by default


def cache_row(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """The row of a KV head at an offset of a page, pages of all layers counted."""
    return (page * dims.NKV + kv_head) * dims.BS + offset


def own_length(seq_lens: list[int], sequence: int) -> int:
    """The length of a sequence."""
    return seq_lens[sequence]


def own_slot(slots: list[int], row: int, dims: Dims) -> int:
    """The slot that the key and value of a row of the batch are written to."""
    return slots[row]


def every_head(head: int, dims: Dims) -> bool:
    """Every KV head's row is written to the cache."""
    return True


def both(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as they are."""
    return keys, values


def own_weight(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """The rows of a layer, of a weight of all layers."""
    return t[name].chunk(dims.L)[layer]


def _own_page_size(dims: Dims) -> int:
    return dims.BS


def _all_tokens(count: int) -> int:
    return count


def _all_pages(table: list[int] | None, dims: Dims) -> int:
    return dims.NB


def _own_layer(layer: int, dims: Dims) -> int:
    return layer


def _own_group(kv_head: int, dims: Dims) -> Tensor:
    return torch.arange(kv_head * dims.G, (kv_head + 1) * dims.G)


def _own_kv_head(kv_head: int, dims: Dims) -> int:
    return kv_head


def _every_token(token: Token, dims: Dims) -> bool:
    return True


def _nothing_more(step: Step, layer: int, k_cache: Tensor, v_cache: Tensor) -> None:
    return None


def _all_positions(positions: list[int], token: Token, step: Step) -> list[int]:
    return positions


def _same_positions(positions: list[int], dims: Dims) -> list[int]:
    return positions


def _all_layers(dims: Dims) -> Iterable[int]:
    return range(dims.L)


def _last_tokens(step: Step) -> list[int]:
    return [chunk[-1].row for chunk in step.chunks]


def _state(state: Tensor, earlier: Tensor) -> Tensor:
    return state
