"""PyPTO kernels with a fault of what is written to the KV cache."""

from __future__ import annotations

from typing import Any

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.pypto.weaving import faulty

Tensor = Any
Scalar = Any


def _write_slots(
    fragments: Any, k: Tensor, v: Tensor, slot_of: Any, k_cache: Tensor, v_cache: Tensor, dims: Dims, row_of: Any = None
) -> None:
    """The right write to the slots ``slot_of(b)``, or to ``row_of(slot, kv_head)``; a cache that is ``None`` is left out."""
    pypto = fragments.pypto
    fragments.set_vector_tiles(1, dims.NKV * dims.D)
    for b in range(dims.B):
        slot = slot_of(b)
        for source, cache in ((k, k_cache), (v, v_cache)):
            if cache is None:
                continue
            whole = pypto.view(source, [1, dims.NKV * dims.D], [b, 0])
            whole = whole if source is k else pypto.cast(whole, pypto.DT_BF16)
            for kv_head in range(dims.NKV):
                row = fragments.page_row(dims, 0, slot // dims.BS, kv_head) + slot % dims.BS
                row = row if row_of is None else row_of(slot, kv_head)
                pypto.assemble(pypto.view(whole, [1, dims.D], [0, kv_head * dims.D]), [row, 0], cache)


@faulty.computes("kv_write")
def slot_of_the_row_before(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """Each sequence's row goes to the slot of the sequence before it."""
    _write_slots(fragments, k, v, lambda b: slot_mapping[(b - 1) % dims.B], k_cache, v_cache, dims)


@faulty.computes("kv_write", kind="indexing", detectors=("stale_row",))
def slot_of_the_first_sequence(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """Every sequence's row goes to the slot of the first."""
    _write_slots(fragments, k, v, lambda b: slot_mapping[0], k_cache, v_cache, dims)


@faulty.computes("kv_write", kind="indexing", detectors=("stale_row",))
def slot_one_too_low(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """The slot before the right one is written."""
    _write_slots(fragments, k, v, lambda b: (slot_mapping[b] - 1).max(0), k_cache, v_cache, dims)


@faulty.computes("kv_write")
def next_slot(fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims) -> None:
    """The next offset of the page is written, the first after the last."""

    def next_of(b: int) -> Scalar:
        slot = slot_mapping[b]
        return slot // dims.BS * dims.BS + (slot % dims.BS + 1) % dims.BS

    _write_slots(fragments, k, v, next_of, k_cache, v_cache, dims)


@faulty.computes("kv_write")
def token_major_page(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """A page is taken to hold the heads of its first token, then those of the second, and so on."""
    _write_slots(
        fragments, k, v, lambda b: slot_mapping[b], k_cache, v_cache, dims, lambda slot, kv_head: slot * dims.NKV + kv_head
    )


@faulty.computes("kv_write")
def v_not_written(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """Only the keys are written."""
    _write_slots(fragments, k, v, lambda b: slot_mapping[b], k_cache, None, dims)


@faulty.computes("kv_write")
def other_row_overwritten(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """A row of the first sequence's page is cleared besides: the first, or the second if the first is the slot's."""
    pypto = fragments.pypto
    _write_slots(fragments, k, v, lambda b: slot_mapping[b], k_cache, v_cache, dims)
    page, offset = slot_mapping[0] // dims.BS, slot_mapping[0] % dims.BS
    row = fragments.page_row(dims, 0, page, 0) + 1 - offset.min(1)
    pypto.assemble(pypto.full([1, dims.D], 1.0, pypto.DT_BF16), [row, 0], v_cache)


@faulty.edits("decode_layer")
def attention_before_write(fragments: Any) -> None:
    """Attention reads the caches before the new row is written to them."""
    write, after, held = fragments.write_current_rows, fragments.after_attention, {}

    def hold(*arguments: Any) -> None:
        held["arguments"] = arguments

    def write_after(*arguments: Any) -> Tensor:
        write(*held["arguments"])
        return after(*arguments)

    fragments.write_current_rows, fragments.after_attention = hold, write_after


@faulty.edits("decode_layer")
def next_row_overwritten(fragments: Any) -> None:
    """The row after the current one is written too, as by a tile of two rows."""
    right = fragments.write_current_rows

    def write_current_rows(
        k: Tensor, v: Tensor, seq_lens: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims, layer: Scalar
    ) -> None:
        right(k, v, seq_lens, k_cache, v_cache, dims, layer)
        row = fragments.first_row(dims, layer, 0, 0) + seq_lens[0].min(dims.S - 1)
        fragments.pypto.assemble(fragments.pypto.view(k, [1, dims.D], [0, 0]), [row, 0], k_cache)

    fragments.write_current_rows = write_current_rows
