"""Faults of place: which rows, pages, heads, slots and layers are read and written. Each stands at a hook of ``layers.py``."""

from __future__ import annotations

import torch

from conformance.contract.dims import Dims
from kernels.qwen3.exam.torch.arithmetic import Maker
from kernels.qwen3.exam.torch.layers import Arguments, Step, Token, prepared
from kernels.qwen3.exam.torch.registry import ATTENTIONS, CHAINS, DECODE_LAYERS, PREFILLS, fault

Tensor = torch.Tensor

# Heads


# In ``tiny`` G is NKV, and this is no fault.
@fault("heads", "indexing", *ATTENTIONS, "decode_layer", dims={"preset": "awkward"})
def heads_over_nkv(kv_head: int, dims: Dims) -> Tensor:
    """Query head h reads KV head h // NKV instead of h // G."""
    readers = [min(head // dims.NKV, dims.NKV - 1) for head in range(dims.NH)]
    return torch.tensor([head for head, reader in enumerate(readers) if reader == kv_head])


@fault("kv_head", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def first_kv_head_for_all(kv_head: int, dims: Dims) -> int:
    """Every query reads the first KV head."""
    return 0


@fault("kv_head", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def next_kv_head(kv_head: int, dims: Dims) -> int:
    """Every query reads the KV head after its own."""
    return (kv_head + 1) % dims.NKV


@fault("head_written", "unwritten", "kv_write", *DECODE_LAYERS)
def first_kv_head_written_only(head: int, dims: Dims) -> bool:
    """Only the first KV head's row is written to the cache."""
    return head == 0


@fault("head_written", "unwritten", "kv_write", *DECODE_LAYERS, "prefill_layer")
def last_kv_head_not_written(head: int, dims: Dims) -> bool:
    """The last KV head's row is not written to the cache."""
    return head < dims.NKV - 1


# Positions that are attended to


@fault("seen", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def sliding_window(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """Only the last S/2 positions are attended to, as with a sliding window."""
    return positions[-(dims.S // 2) :]


@fault("seen", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def second_half_of_a_long_history_dropped(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """Positions in the second half of the longest history are never reached."""
    return positions[: dims.S // 2]


@fault("seen", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def history_in_whole_eights(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """A rest of less than 8 positions is dropped."""
    return positions[: len(positions) // 8 * 8] or positions


@fault("seen", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def first_row_of_each_page_dropped(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """The loop within a page starts at its second row."""
    return [position for position in positions if position % dims.BS] or positions


@fault("seen", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def last_row_of_each_page_dropped(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """The loop within a page ends before its last row."""
    return [position for position in positions if position % dims.BS != dims.BS - 1] or positions


@fault("seen", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def first_page_only(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """The loop over pages runs once."""
    return positions[: dims.BS]


@fault("seen", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def last_page_only(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """Only the page of the newest position is attended to: the loop over pages does not carry its accumulators."""
    return [position for position in positions if position // dims.BS == positions[-1] // dims.BS]


@fault("seen", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def last_whole_page_skipped(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """Where the length is a multiple of the page, the last page is skipped."""
    return positions[: -dims.BS] or positions if len(positions) % dims.BS == 0 else positions


@fault("seen", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def odd_pages_skipped(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """Of two pages that are loaded together only the first is used."""
    return [position for position in positions if position // dims.BS % 2 == 0]


@fault("seen", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def first_page_skipped(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """The loop over pages starts at the second."""
    return positions[dims.BS :] or positions


@fault("length", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def length_of_the_next_row(seq_lens: list[int], sequence: int) -> int:
    """Every sequence is given the length of the one after it."""
    return min(seq_lens[(sequence + 1) % len(seq_lens)], seq_lens[sequence])


@fault("length", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def shortest_length_for_all(seq_lens: list[int], sequence: int) -> int:
    """The shortest length is used for every sequence."""
    return min(seq_lens)


@fault("length", "indexing", *ATTENTIONS)
def longest_length_for_all(seq_lens: list[int], sequence: int) -> int:
    """Every sequence is padded to the longest length, and the padding is not masked."""
    return max(seq_lens)


@fault("length", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def length_in_6_bits(seq_lens: list[int], sequence: int) -> int:
    """Lengths are carried in a type too narrow for them, and the longest start over."""
    return (seq_lens[sequence] - 1) % 40 + 1


@fault("seen", "indexing", "prefill_layer", "prefill_fwd")
def next_token_seen(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """The causal mask is one off: a token sees the one after it."""
    return list(range(min(len(positions) + 1, token.total)))


@fault("seen", "indexing", *PREFILLS)
def own_row_not_seen(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """The causal mask is one off: a token does not see itself."""
    return positions[:-1] or positions


@fault("seen", "indexing", *PREFILLS)
def causal_by_pages(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """The causal mask goes by whole pages: a token sees those after it in its page."""
    return list(range(min((token.position // dims.BS + 1) * dims.BS, token.total)))


@fault("seen", "indexing", *PREFILLS)
def first_row_of_the_chunk_not_seen(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """The first row of a chunk is seen neither as history nor as part of the chunk."""
    return [position for position in positions if position != token.past] or positions


@fault("seen", "indexing", *PREFILLS)
def partial_page_of_history_not_seen(positions: list[int], token: Token, dims: Dims) -> list[int]:
    """Of the history before the chunk only whole pages are seen."""
    whole = token.past // dims.BS * dims.BS
    return [position for position in positions if position < whole or position >= token.past]


# Pages

_PAGED = ("paged_attention", "paged_decode_layer")


def _pages_of(step: Step, sequence: int) -> int:
    return -(-step.seq_lens[sequence] // step.dims.BS)


@fault("page", "indexing", *_PAGED)
def table_of_the_next_sequence(step: Step, sequence: int, index: int) -> int:
    """The block table's row of the next sequence is used."""
    other = (sequence + 1) % step.dims.B
    return step.right_page(other, min(index, _pages_of(step, other) - 1))


@fault("page", "indexing", *_PAGED)
def table_of_the_first_sequence(step: Step, sequence: int, index: int) -> int:
    """The block table's first row is used for every sequence."""
    return step.right_page(0, min(index, _pages_of(step, 0) - 1))


@fault("page", "indexing", *_PAGED)
def table_rows_as_long_as_needed(step: Step, sequence: int, index: int) -> int:
    """A row of the block table is taken to be as long as the longest sequence needs, not MB."""
    assert step.table is not None
    return step.table[sequence * max(_pages_of(step, b) for b in range(step.dims.B)) + index]


@fault("page", "indexing", *_PAGED)
def pages_sorted(step: Step, sequence: int, index: int) -> int:
    """Pages are taken to be in ascending order."""
    pages = sorted(step.right_page(sequence, other) for other in range(_pages_of(step, sequence)))
    return pages[min(index, len(pages) - 1)]


@fault("page", "indexing", *_PAGED)
def pages_consecutive(step: Step, sequence: int, index: int) -> int:
    """Pages after a sequence's first are taken to follow it."""
    return (step.right_page(sequence, 0) + index) % step.dims.NB


@fault("page", "indexing", *_PAGED)
def first_page_repeated(step: Step, sequence: int, index: int) -> int:
    """The page number is read once, before the loop."""
    return step.right_page(sequence, 0)


@fault("page", "dependency", *_PAGED)
def page_of_the_round_before(step: Step, sequence: int, index: int) -> int:
    """The page number that a round of the loop uses is the one of the round before."""
    return step.right_page(sequence, max(index - 1, 0))


@fault("page", "indexing", *_PAGED)
def last_page_repeats_the_one_before(step: Step, sequence: int, index: int) -> int:
    """The last page's number is read one entry too early."""
    last = _pages_of(step, sequence) - 1
    return step.right_page(sequence, max(index - 1, 0) if index == last else index)


@fault("page", "indexing", *_PAGED)
def page_numbers_in_4_bits(step: Step, sequence: int, index: int) -> int:
    """Page numbers are carried in a type too narrow for them, and the largest start over."""
    return step.right_page(sequence, index) % 16


# Rows of a page


@fault("cell", "indexing", "paged_attention", "kv_write")
def page_stride_without_heads(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """The stride from page to page leaves the KV heads out."""
    return (page + kv_head) * dims.BS + offset


@fault("cell", "indexing", "paged_attention", "kv_write")
def head_stride_of_the_pool(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """The cache is addressed by KV head, then page."""
    return (kv_head * dims.NB + page) * dims.BS + offset


@fault("cell", "indexing", "paged_attention", "kv_write")
def kv_heads_in_reverse(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """The KV heads of a page are addressed from the last."""
    return (page * dims.NKV + dims.NKV - 1 - kv_head) * dims.BS + offset


@fault("cell", "indexing", "kv_write", "paged_attention")
def all_heads_in_one_row(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """The KV head is left out of a row's address."""
    return page * dims.NKV * dims.BS + offset


@fault("cell", "indexing", "kv_write")
def rows_of_a_page_in_reverse(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """The rows of a page are counted from its end."""
    return (page * dims.NKV + kv_head) * dims.BS + dims.BS - 1 - offset


@fault("cell", "indexing", "kv_write")
def start_of_a_page_in_the_one_before(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """A slot at a page's start is taken for the end of the page before."""
    if offset == 0 and page > 0:
        page, offset = page - 1, dims.BS - 1
    return (page * dims.NKV + kv_head) * dims.BS + offset


# Slots, and what is written there

_WRITERS = ("kv_write", "paged_decode_layer")


@fault("slot", "indexing", *_WRITERS)
def slot_of_the_first_row(slots: list[int], row: int) -> int:
    """Every row is written to the first one's slot."""
    return slots[0]


@fault("slot", "indexing", *_WRITERS)
def slot_one_too_small(slots: list[int], row: int) -> int:
    """Rows are written one slot too early: slots are taken to count from one."""
    return max(slots[row] - 1, 0)


@fault("slot", "indexing", *_WRITERS, "prefill_layer")
def slots_in_reverse(slots: list[int], row: int) -> int:
    """Slots are read from the end."""
    return slots[len(slots) - 1 - row]


@fault("slot", "indexing", *_WRITERS)
def slots_ignored(slots: list[int], row: int) -> int:
    """The slot is taken to be the row's number."""
    return row


@fault("slot", "indexing", "kv_write", "prefill_layer")
def slots_of_the_first_eight_rows(slots: list[int], row: int) -> int:
    """Only eight slots were loaded, and later rows use them again."""
    return slots[row % 8]


_WRITES = ("kv_write", *DECODE_LAYERS)


@fault("written", "indexing", *_WRITES)
def caches_exchanged(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys are written to the cache of values, and values to that of keys."""
    return v, k


@fault("written", "indexing", *_WRITES)
def keys_written_to_both(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys are written to both caches."""
    return k, k


@fault("written", "precision", *_WRITES)
def cache_written_in_fp8(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """New rows go through fp8 on their way to the cache."""
    return k.to(torch.float8_e4m3fn).float(), v.to(torch.float8_e4m3fn).float()


@fault("written", "precision", "kv_write")
def cache_written_in_fp16(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """New rows go through fp16 on their way to the cache, where large values overflow."""
    return k.half().float(), v.half().float()


@fault("written", "indexing", *_WRITES)
def halves_of_a_row_exchanged(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of a new row are exchanged."""
    return k.roll(len(k) // 2), v.roll(len(v) // 2)


@fault("written", "indexing", *_WRITES)
def lanes_interleaved(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """New keys are stored with the lanes of their two halves side by side."""
    return k.view(2, -1).T.flatten(), v


@fault("written", "unwritten", *_WRITES)
def second_half_of_a_row_cleared(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The second half of a new row's lanes is cleared instead of written."""
    kept = torch.arange(len(k)) < len(k) // 2
    return k * kept, v * kept


# Layers


@fault("depth", "indexing", *CHAINS)
def history_of_layer_0(layer: int, dims: Dims) -> int:
    """Every layer attends to the first layer's history, and writes its own."""
    return 0


@fault("depth", "indexing", *CHAINS)
def history_of_the_next_layer(layer: int, dims: Dims) -> int:
    """Layers are counted from one where the cache is read."""
    return (layer + 1) % dims.L


@fault("weight", "indexing", *CHAINS)
def weights_of_the_next_layer(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """Layers are counted from one where weights are read."""
    return t[name].chunk(dims.L)[(layer + 1) % dims.L]


@fault("weight", "indexing", *CHAINS)
def layers_in_reverse(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """The layers' weights are stacked from the last."""
    return t[name].chunk(dims.L)[dims.L - 1 - layer]


@fault("weight", "indexing", *CHAINS)
def norm_weights_of_layer_0(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """Every layer uses the first layer's norm weights."""
    return t[name].chunk(dims.L)[0 if name.endswith(("rms_weight", "norm_weight")) else layer]


@fault("weight", "indexing", *CHAINS)
def head_norm_weights_of_layer_0(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """Every layer uses the first layer's Q/K norm weights."""
    return t[name].chunk(dims.L)[0 if name in ("q_norm_weight", "k_norm_weight") else layer]


@fault("weight", "indexing", *CHAINS)
def down_projection_of_layer_0(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """Every layer uses the first layer's down projection: its rows were counted by H, not I."""
    return t[name].chunk(dims.L)[0 if name == "w_down" else layer]


def _exchanged(one: str, other: str, name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    names = {one: other, other: one}
    return t[names.get(name, name)].chunk(dims.L)[layer]


@fault("weight", "indexing", *DECODE_LAYERS, "decode_fwd_layers", "prefill_layer")
def norm_weights_exchanged(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """The input norm's weight and the second norm's are exchanged."""
    return _exchanged("input_rms_weight", "post_rms_weight", name, layer, t, dims)


@fault("weight", "indexing", *DECODE_LAYERS, "decode_fwd_layers", "prefill_layer")
def head_norm_weights_exchanged(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """The weights of Q norm and K norm are exchanged."""
    return _exchanged("q_norm_weight", "k_norm_weight", name, layer, t, dims)


@fault("weight", "indexing", *DECODE_LAYERS, "prefill_layer")
def k_and_v_weights_exchanged(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """The projections of k and v are exchanged."""
    return _exchanged("wk", "wv", name, layer, t, dims)


@fault("weight", "indexing", *DECODE_LAYERS)
def output_weight_transposed(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """The output projection's weight is used transposed."""
    weight = t[name].chunk(dims.L)[layer]
    return weight.T if name == "wo" else weight


@fault("first_sum", "value", *DECODE_LAYERS)
def first_residual_twice(total: Tensor, residual: Tensor) -> Tensor:
    """The residual is added twice after attention."""
    return total + residual


@fault("first_sum", "value", *DECODE_LAYERS, "decode_fwd_layers")
def attention_skipped(total: Tensor, residual: Tensor) -> Tensor:
    """The result of attention is not added."""
    return residual


@fault("first_sum", "indexing", *DECODE_LAYERS)
def residual_of_the_row_before(total: Tensor, residual: Tensor) -> Tensor:
    """The residual added after attention is that of the row before."""
    return total - residual + residual.roll(1, 0)


@fault("second_sum", "value", *DECODE_LAYERS, "decode_fwd_layers")
def mlp_skipped(total: Tensor, residual: Tensor) -> Tensor:
    """The MLP's result is not added."""
    return residual


@fault("second_sum", "value", *DECODE_LAYERS, "decode_fwd_layers")
def second_residual_missing(total: Tensor, residual: Tensor) -> Tensor:
    """The residual is not added to the MLP's result."""
    return total - residual


@fault("second_sum", "value", *DECODE_LAYERS)
def second_residual_twice(total: Tensor, residual: Tensor) -> Tensor:
    """The residual is added twice to the MLP's result."""
    return total + residual


@fault("second_input", "dependency", *DECODE_LAYERS, "decode_fwd_layers")
def mlp_of_the_layers_input(residual: Tensor, hidden: Tensor) -> Tensor:
    """The MLP reads the layer's input, not the state after attention."""
    return hidden


@fault("second_input", "dependency", *DECODE_LAYERS)
def mlp_of_the_branch(residual: Tensor, hidden: Tensor) -> Tensor:
    """The MLP reads the attention's result without the residual."""
    return residual - hidden


# q, k and v of a layer


@fault("prepared", "value", *DECODE_LAYERS, "prefill_layer")
def values_rotated(
    m: Maker, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, angles: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """Values are rotated like keys."""
    q, k, v = prepared(m, q, k, v, weights, angles, t, dims)
    return q, k, m.rotated(v, angles, t["rope_cos"], t["rope_sin"], dims)


@fault("prepared", "value", *DECODE_LAYERS, "prefill_layer")
def values_normalised(
    m: Maker, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, angles: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """Values are normalised by head like keys."""
    normalised = m.heads_normalised(v, weights["k_norm_weight"][0], dims)
    return prepared(m, q, k, normalised, weights, angles, t, dims)


@fault("prepared", "value", *DECODE_LAYERS, "prefill_layer")
def normalised_after_rope(
    m: Maker, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, angles: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """Q and K norm come after RoPE instead of before."""
    q, k = (m.rotated(tensor, angles, t["rope_cos"], t["rope_sin"], dims) for tensor in (q, k))
    q, k = (m.heads_normalised(x, weights[name][0], dims) for x, name in ((q, "q_norm_weight"), (k, "k_norm_weight")))
    return m.cast(q), m.cast(k), v


@fault("prepared", "value", *DECODE_LAYERS, "prefill_layer")
def queries_not_rotated(
    m: Maker, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, angles: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """RoPE is applied to keys only."""
    _, k, v = prepared(m, q, k, v, weights, angles, t, dims)
    return m.cast(m.heads_normalised(q, weights["q_norm_weight"][0], dims)), k, v


@fault("prepared", "value", *DECODE_LAYERS, "prefill_layer")
def keys_not_rotated(
    m: Maker, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, angles: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """RoPE is applied to queries only."""
    q, _, v = prepared(m, q, k, v, weights, angles, t, dims)
    return q, m.cast(m.heads_normalised(k, weights["k_norm_weight"][0], dims)), v


@fault("prepared", "indexing", *DECODE_LAYERS, "prefill_layer")
def keys_of_the_row_before(
    m: Maker, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, angles: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """The key of every token is that of the row before it."""
    return prepared(m, q, k.roll(1, 0), v, weights, angles, t, dims)
