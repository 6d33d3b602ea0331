"""Faults of what is attended to: heads, lengths and positions."""

from __future__ import annotations

import torch

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.torch.hooks import ATTENTIONS, CONTIGUOUS_LAYERS, DECODE_LAYERS, PREFILLS, fault
from conformance.kernels.qwen3.exam.torch.layers import Step, Token

Tensor = torch.Tensor

#: Chunks longer than this lose their second half to fault ``second_half_dropped``.
SHORT_CHUNK = 8


# Heads


# In ``tiny`` G is NKV, and this is no fault.
@fault("query_heads", "indexing", *ATTENTIONS, "decode_layer", dims={"preset": "awkward"})
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


# Positions that are attended to


@fault("positions", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def sliding_window(positions: list[int], token: Token, step: Step) -> list[int]:
    """Only the last S/2 positions are attended to, as with a sliding window."""
    return positions[-(step.dims.S // 2) :]


@fault("positions", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def second_half_of_a_long_history_dropped(positions: list[int], token: Token, step: Step) -> list[int]:
    """Positions in the second half of the longest history are never reached."""
    return positions[: step.dims.S // 2]


@fault("positions", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def history_in_whole_eights(positions: list[int], token: Token, step: Step) -> list[int]:
    """A rest of less than 8 positions is dropped."""
    return positions[: len(positions) // 8 * 8] or positions


@fault("positions", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def first_row_of_each_page_dropped(positions: list[int], token: Token, step: Step) -> list[int]:
    """The loop within a page starts at its second row."""
    return [position for position in positions if position % step.dims.BS] or positions


@fault("positions", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def last_row_of_each_page_dropped(positions: list[int], token: Token, step: Step) -> list[int]:
    """The loop within a page ends before its last row."""
    return [position for position in positions if position % step.dims.BS != step.dims.BS - 1] or positions


@fault("positions", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def first_page_only(positions: list[int], token: Token, step: Step) -> list[int]:
    """The loop over pages runs once."""
    return positions[: step.dims.BS]


@fault("positions", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def last_page_only(positions: list[int], token: Token, step: Step) -> list[int]:
    """Only the page of the newest position is attended to: the loop over pages does not carry its accumulators."""
    return [position for position in positions if position // step.dims.BS == positions[-1] // step.dims.BS]


@fault("positions", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def last_whole_page_skipped(positions: list[int], token: Token, step: Step) -> list[int]:
    """Where the length is a multiple of the page, the last page is skipped."""
    return positions[: -step.dims.BS] or positions if len(positions) % step.dims.BS == 0 else positions


@fault("positions", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def odd_pages_skipped(positions: list[int], token: Token, step: Step) -> list[int]:
    """Of two pages that are loaded together only the first is used."""
    return [position for position in positions if position // step.dims.BS % 2 == 0]


@fault("positions", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def first_page_skipped(positions: list[int], token: Token, step: Step) -> list[int]:
    """The loop over pages starts at the second."""
    return positions[step.dims.BS :] or positions


@fault("length", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def length_of_the_next_row(seq_lens: list[int], sequence: int) -> int:
    """Every sequence is given the length of the one after it."""
    return min(seq_lens[(sequence + 1) % len(seq_lens)], seq_lens[sequence])


@fault("length", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def shortest_length_for_all(seq_lens: list[int], sequence: int) -> int:
    """The shortest length is used for every sequence."""
    return min(seq_lens)


@fault("length", "indexing", *ATTENTIONS, detectors=("not_finite", "element"))
def longest_length_for_all(seq_lens: list[int], sequence: int) -> int:
    """Every sequence is padded to the longest length, and the padding is not masked."""
    return max(seq_lens)


@fault("length", "indexing", *ATTENTIONS, *DECODE_LAYERS)
def length_in_6_bits(seq_lens: list[int], sequence: int) -> int:
    """Lengths are carried in a type too narrow for them, and the longest start over."""
    return (seq_lens[sequence] - 1) % 40 + 1


@fault("positions", "indexing", "prefill_layer", "prefill_fwd")
def next_token_seen(positions: list[int], token: Token, step: Step) -> list[int]:
    """The causal mask is one off: a token sees the one after it."""
    return list(range(min(len(positions) + 1, token.total)))


@fault("positions", "indexing", *PREFILLS)
def own_row_not_seen(positions: list[int], token: Token, step: Step) -> list[int]:
    """The causal mask is one off: a token does not see itself."""
    return positions[:-1] or positions


@fault("positions", "indexing", *PREFILLS)
def causal_by_pages(positions: list[int], token: Token, step: Step) -> list[int]:
    """The causal mask goes by whole pages: a token sees those after it in its page."""
    return list(range(min((token.position // step.dims.BS + 1) * step.dims.BS, token.total)))


@fault("positions", "indexing", *PREFILLS)
def first_row_of_the_chunk_not_seen(positions: list[int], token: Token, step: Step) -> list[int]:
    """The first row of a chunk is seen neither as history nor as part of the chunk."""
    return [position for position in positions if position != token.past] or positions


@fault("positions", "indexing", *PREFILLS)
def partial_page_of_history_not_seen(positions: list[int], token: Token, step: Step) -> list[int]:
    """Of the history before the chunk only whole pages are seen."""
    whole = token.past // step.dims.BS * step.dims.BS
    return [position for position in positions if position < whole or position >= token.past]


@fault("query_heads", "indexing", *ATTENTIONS, *CONTIGUOUS_LAYERS)
def modulo_heads(kv_head: int, dims: Dims) -> Tensor:
    """Query head h reads KV head h % NKV instead of h // G."""
    return torch.arange(kv_head, dims.NH, dims.NKV)


@fault("length", "indexing", "rope", *ATTENTIONS, *CONTIGUOUS_LAYERS)
def row0_length(seq_lens: list[int], sequence: int) -> int:
    """The first sequence's length is used for every sequence."""
    return seq_lens[0]


@fault("positions", "indexing", *ATTENTIONS, *CONTIGUOUS_LAYERS)
def one_row_too_many(positions: list[int], token: Token, step: Step) -> list[int]:
    """Attention reads one row past the sequence's end."""
    return list(range(min(token.length + 1, step.dims.S)))


@fault("positions", "indexing", *ATTENTIONS, *CONTIGUOUS_LAYERS)
def newest_row_dropped(positions: list[int], token: Token, step: Step) -> list[int]:
    """Attention stops before the newest row."""
    return positions[:-1] or positions


@fault("positions", "indexing", *ATTENTIONS, *CONTIGUOUS_LAYERS)
def oldest_row_dropped(positions: list[int], token: Token, step: Step) -> list[int]:
    """Attention starts at the second row."""
    return positions[1:] or positions


@fault("positions", "indexing", *ATTENTIONS, "paged_decode_layer")
def second_page_skipped(positions: list[int], token: Token, step: Step) -> list[int]:
    """The loop over pages jumps from the first to the third."""
    return [position for position in positions if position // step.dims.BS != 1]


@fault("positions", "indexing", *ATTENTIONS, "paged_decode_layer", "prefill_layer")
def whole_pages(positions: list[int], token: Token, step: Step) -> list[int]:
    """The last page is read to its end and not masked."""
    return list(range(min(-(-token.length // step.dims.BS) * step.dims.BS, step.dims.S)))


@fault("positions", "indexing", "paged_attention", "paged_decode_layer")
def partial_page_dropped(positions: list[int], token: Token, step: Step) -> list[int]:
    """Only whole pages are attended to."""
    return positions[: token.length // step.dims.BS * step.dims.BS] or positions


@fault("positions", "indexing", "paged_attention", "paged_decode_layer")
def newest_row_dropped_at_a_page_edge(positions: list[int], token: Token, step: Step) -> list[int]:
    """The newest row is lost where the length is a multiple of the page."""
    return positions if token.length % step.dims.BS else positions[:-1] or positions


@fault("positions", "indexing", "paged_attention", "paged_decode_layer", "prefill_layer")
def stale_page(positions: list[int], token: Token, step: Step) -> list[int]:
    """The first row of a new page is not attended to."""
    return (positions[:-1] or positions) if token.length % step.dims.BS == 1 else positions


@fault("positions", "indexing", "paged_attention", "paged_decode_layer")
def shared_page_skipped(positions: list[int], token: Token, step: Step) -> list[int]:
    """A page that two sequences share is attended to by the later one only."""
    # A map from pages to sequences knows the last sequence only.
    assert step.table is not None
    later = set(step.table[(token.sequence + 1) * step.dims.MB :])
    return [position for position in positions if step.right_page(token.sequence, position // step.dims.BS) not in later]


@fault("positions", "value", *PREFILLS)
def not_causal(positions: list[int], token: Token, step: Step) -> list[int]:
    """Every token of a chunk sees the whole chunk."""
    return list(range(token.total))


@fault("positions", "indexing", *PREFILLS)
def causal_from_zero(positions: list[int], token: Token, step: Step) -> list[int]:
    """The causal mask counts from the chunk's start instead of the sequence's."""
    return positions[: token.length - token.past]


@fault("positions", "value", *PREFILLS)
def history_ignored(positions: list[int], token: Token, step: Step) -> list[int]:
    """A chunk attends to itself only, not to what the cache holds."""
    return positions[token.past :]


@fault("positions", "value", *PREFILLS)
def chunk_not_seen(positions: list[int], token: Token, step: Step) -> list[int]:
    """A chunk attends to the cache's history only."""
    return positions[: token.past] or positions[-1:]


@fault("positions", "value", *PREFILLS)
def only_itself_seen(positions: list[int], token: Token, step: Step) -> list[int]:
    """A token attends to itself only."""
    return positions[-1:]


@fault("tokens_computed", "unwritten", *PREFILLS, detectors=("stale_row",))
def second_half_dropped(count: int) -> int:
    """Of a long chunk only the first half is computed."""
    return count // 2 if count > SHORT_CHUNK else count
