"""Faults of the KV cache: pages, rows, slots, and what is written there."""

from __future__ import annotations

import torch

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.torch.hooks import (
    BLOCK_TABLES,
    CONTIGUOUS_LAYERS,
    DECODE_LAYERS,
    PAGED_LAYERS,
    PREFILLS,
    fault,
)
from conformance.kernels.qwen3.exam.torch.layers import Step, Token

Tensor = torch.Tensor


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


@fault("page", "indexing", *_PAGED, detectors=("not_finite",))
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


@fault("cache_row", "indexing", "paged_attention", "kv_write")
def page_stride_without_heads(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """The stride from page to page leaves the KV heads out."""
    return (page + kv_head) * dims.BS + offset


@fault("cache_row", "indexing", "paged_attention", "kv_write")
def head_stride_of_the_pool(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """The cache is addressed by KV head, then page."""
    return (kv_head * dims.NB + page) * dims.BS + offset


@fault("cache_row", "indexing", "paged_attention", "kv_write")
def kv_heads_in_reverse(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """The KV heads of a page are addressed from the last."""
    return (page * dims.NKV + dims.NKV - 1 - kv_head) * dims.BS + offset


@fault("cache_row", "indexing", "kv_write", "paged_attention")
def all_heads_in_one_row(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """The KV head is left out of a row's address."""
    return page * dims.NKV * dims.BS + offset


@fault("cache_row", "indexing", "kv_write", detectors=("out_of_bounds",))
def rows_of_a_page_in_reverse(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """The rows of a page are counted from its end."""
    return (page * dims.NKV + kv_head) * dims.BS + dims.BS - 1 - offset


@fault("cache_row", "indexing", "kv_write", detectors=("out_of_bounds",))
def start_of_a_page_in_the_one_before(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """A slot at a page's start is taken for the end of the page before."""
    if offset == 0 and page > 0:
        page, offset = page - 1, dims.BS - 1
    return (page * dims.NKV + kv_head) * dims.BS + offset


# Slots, and what is written there

_WRITERS = ("kv_write", "paged_decode_layer")


@fault("slot", "indexing", *_WRITERS)
def slot_of_the_first_row(slots: list[int], row: int, dims: Dims) -> int:
    """Every row is written to the first one's slot."""
    return slots[0]


@fault("slot", "indexing", *_WRITERS, detectors=("out_of_bounds",))
def slot_one_too_small(slots: list[int], row: int, dims: Dims) -> int:
    """Rows are written one slot too early: slots are taken to count from one."""
    return max(slots[row] - 1, 0)


@fault("slot", "indexing", *_WRITERS, "prefill_layer")
def slots_in_reverse(slots: list[int], row: int, dims: Dims) -> int:
    """Slots are read from the end."""
    return slots[len(slots) - 1 - row]


@fault("slot", "indexing", *_WRITERS, detectors=("out_of_bounds",))
def slots_ignored(slots: list[int], row: int, dims: Dims) -> int:
    """The slot is taken to be the row's number."""
    return row


@fault("slot", "indexing", "kv_write", "prefill_layer")
def slots_of_the_first_eight_rows(slots: list[int], row: int, dims: Dims) -> int:
    """Only eight slots were loaded, and later rows use them again."""
    return slots[row % 8]


_WRITES = ("kv_write", *DECODE_LAYERS)


@fault("new_rows", "indexing", *_WRITES)
def caches_exchanged(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys are written to the cache of values, and values to that of keys."""
    return v, k


@fault("new_rows", "indexing", *_WRITES)
def keys_written_to_both(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys are written to both caches."""
    return k, k


@fault("new_rows", "precision", *_WRITES)
def cache_written_in_fp8(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """New rows go through fp8 on their way to the cache."""
    return k.to(torch.float8_e4m3fn).float(), v.to(torch.float8_e4m3fn).float()


@fault("new_rows", "precision", "kv_write")
def cache_written_in_fp16(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """New rows go through fp16 on their way to the cache, where large values overflow."""
    return k.half().float(), v.half().float()


@fault("new_rows", "indexing", *_WRITES)
def halves_of_a_row_exchanged(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of a new row are exchanged."""
    return k.roll(len(k) // 2), v.roll(len(v) // 2)


@fault("new_rows", "indexing", *_WRITES)
def lanes_interleaved(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """New keys are stored with the lanes of their two halves side by side."""
    return k.view(2, -1).T.flatten(), v


@fault("new_rows", "unwritten", *_WRITES)
def second_half_of_a_row_cleared(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The second half of a new row's lanes is cleared instead of written."""
    kept = torch.arange(len(k)) < len(k) // 2
    return k * kept, v * kept


@fault("head_written", "unwritten", "kv_write", *DECODE_LAYERS, detectors=("stale_row",))
def first_kv_head_written_only(head: int, dims: Dims) -> bool:
    """Only the first KV head's row is written to the cache."""
    return head == 0


@fault("head_written", "unwritten", "kv_write", *DECODE_LAYERS, "prefill_layer", detectors=("stale_row",))
def last_kv_head_not_written(head: int, dims: Dims) -> bool:
    """The last KV head's row is not written to the cache."""
    return head < dims.NKV - 1


@fault("page", "indexing", *BLOCK_TABLES, detectors=("not_finite",))
def identity_block_table(step: Step, sequence: int, index: int) -> int:
    """The block table is ignored: page j of sequence b is taken to be b * MB + j."""
    return sequence * step.dims.MB + index


@fault("page", "indexing", *BLOCK_TABLES, detectors=("not_finite",))
def transposed_block_table(step: Step, sequence: int, index: int) -> int:
    """The block table is read as [MB, B]."""
    assert step.table is not None
    return step.table[index % step.dims.MB * step.dims.B + sequence]


@fault("page", "indexing", *BLOCK_TABLES, detectors=("not_finite",))
def page_off_by_one(step: Step, sequence: int, index: int) -> int:
    """Page j + 1 is read for page j."""
    return step.right_page(sequence, index + 1)


@fault("page", "indexing", *BLOCK_TABLES)
def page_of_the_next_sequence(step: Step, sequence: int, index: int) -> int:
    """The first page is the next sequence's."""
    return step.right_page(sequence if index else (sequence + 1) % step.dims.B, index)


@fault("page", "indexing", *BLOCK_TABLES, detectors=("not_finite",))
def unowned_page(step: Step, sequence: int, index: int) -> int:
    """The last page is read from one that nobody owns."""
    is_last = index == (step.seq_lens[sequence] - 1) // step.dims.BS
    return step.dims.NB - 1 if is_last else step.right_page(sequence, index)


@fault("positions_read", "memory", *BLOCK_TABLES, detectors=("not_finite",))
def minus_one_dereferenced(positions: list[int], dims: Dims) -> list[int]:
    """Entries -1 of the block table are read as pages."""
    pages = -(-(positions[-1] + 1) // dims.BS)
    return list(range(min(pages + 1, dims.MB) * dims.BS))


@fault("page_size", "indexing", *BLOCK_TABLES, dims={"preset": "awkward"}, detectors=("out_of_bounds", "not_finite"))
def page_size_16(dims: Dims) -> int:
    """The page size is a constant, 16."""
    return 16


@fault("cache_row", "indexing", "kv_write", *BLOCK_TABLES, detectors=("out_of_bounds", "element"))
def token_major_page(page: int, offset: int, kv_head: int, dims: Dims) -> int:
    """Pages are addressed by token, then head, instead of head, then token."""
    return (page * dims.BS + offset) * dims.NKV + kv_head


@fault("slot", "indexing", "kv_write", *PAGED_LAYERS)
def slot_of_the_row_before(slots: list[int], row: int, dims: Dims) -> int:
    """A row is written to the slot of the row before it."""
    return slots[row - 1]


@fault("slot", "indexing", "kv_write", *PAGED_LAYERS, detectors=("out_of_bounds",))
def next_slot(slots: list[int], row: int, dims: Dims) -> int:
    """Rows are written one slot too far."""
    page, offset = divmod(slots[row], dims.BS)
    return page * dims.BS + (offset + 1) % dims.BS


@fault("token_written", "unwritten", *PREFILLS, detectors=("stale_row",))
def rows_of_the_last_token_only(token: Token, dims: Dims) -> bool:
    """Of a chunk only the last token's key and value are written."""
    return token.position == token.total - 1


@fault("token_written", "unwritten", *PREFILLS, detectors=("stale_row",))
def one_too_few_at_a_page_edge(token: Token, dims: Dims) -> bool:
    """A chunk that ends with a page loses its last row in the cache."""
    return token.position != token.total - 1 or token.total % dims.BS != 0


@fault("attended_caches", "dependency", *CONTIGUOUS_LAYERS, "paged_decode_layer", "prefill_layer")
def attention_before_write(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Attention reads the cache before the new row is in it."""
    return k_cache.clone(), v_cache.clone()
