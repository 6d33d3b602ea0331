"""PyPTO kernels with a fault of attention: its softmax, the rows and pages that it reads, the sequences that it serves."""

from __future__ import annotations

from typing import Any

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.pypto.softmax import block_step, read_whole_blocks
from conformance.kernels.qwen3.exam.pypto.weaving import faulty

Tensor = Any
Scalar = Any


# Attention: the softmax


@faulty.edits("attention", "paged_attention", "decode_layer")
def scale_missing(fragments: Any) -> None:
    """Scores are not multiplied by ``D ** -0.5``."""
    fragments.attend_block = block_step(fragments, scale=lambda dims: 1.0)


@faulty.edits("attention", "paged_attention", detectors=("not_finite", "element"))
def no_maximum(fragments: Any) -> None:
    """The exponentials are taken of the scores as they are, without their maximum: those over 88 are infinite."""
    fragments.attend_block = block_step(fragments, of_largest=lambda largest: fragments.pypto.mul(largest, 0.0))


@faulty.edits("attention", "paged_attention", name="maximum_starts_at_zero")
def maximum_of_scores_starts_at_zero(fragments: Any) -> None:
    """The running maximum starts at 0: where all scores lie far below it, every probability vanishes."""
    fragments.NO_SCORE = 0.0


@faulty.edits("attention", "paged_attention")
def no_rescale(fragments: Any) -> None:
    """What earlier blocks left is not scaled down when a later block has a larger maximum."""
    pypto = fragments.pypto
    fragments.attend_block = block_step(fragments, of_shrink=lambda shrink: pypto.add(pypto.mul(shrink, 0.0), 1.0))


@faulty.edits("attention")
def bf16_scores(fragments: Any) -> None:
    """Scores are rounded to bf16."""
    pypto = fragments.pypto
    fragments.attend_block = block_step(
        fragments, of_scores=lambda scores: pypto.cast(pypto.cast(scores, pypto.DT_BF16), pypto.DT_FP32)
    )


@faulty.edits("paged_attention", dims={"B": 3, "BS": 8, "D": 16, "S": 128})
def bf16_accumulation(fragments: Any) -> None:
    """The weighted values are kept in bf16 from block to block."""
    pypto = fragments.pypto
    fragments.attend_block = block_step(
        fragments, of_product=lambda product: pypto.cast(pypto.cast(product, pypto.DT_BF16), pypto.DT_FP32)
    )


@faulty.edits("attention", "decode_layer", "paged_attention")
def modulo_heads(fragments: Any) -> None:
    """Query head ``h`` reads KV head ``h % NKV`` instead of ``h // G``."""
    fragments.attend_block = block_step(fragments, modulo_heads=True)


@faulty.edits("paged_attention")
def masked_scores_are_zero(fragments: Any) -> None:
    """The rows of the last page past the sequence's end get the score 0, not a very low one."""
    pypto = fragments.pypto
    read_whole_blocks(fragments, lambda scores, seen: pypto.mul(scores, seen))


# Attention: which rows are read


def _attends(fragments: Any, length_of: Any = None, values: str = "v_cache") -> None:
    """Attention of each sequence over ``length_of(length, rows)`` rows instead of ``length``."""
    right = fragments.attend_sequence

    def attend_sequence(
        query: Tensor, length: Scalar, rows: int, rows_of: Any, k_cache: Tensor, v_cache: Tensor, dims: Dims
    ) -> Tensor:
        length = length if length_of is None else length_of(length, rows, dims)
        return right(query, length, rows, rows_of, k_cache, k_cache if values == "k_cache" else v_cache, dims)

    fragments.attend_sequence = attend_sequence


@faulty.edits("attention", "decode_layer", "paged_attention", detectors=("element", "raised"))
def one_row_too_many(fragments: Any) -> None:
    """Attention reads one row past the sequence's end."""
    _attends(fragments, lambda length, rows, dims: (length + 1).min(dims.S))


@faulty.edits("attention", "decode_layer", "paged_attention")
def newest_row_dropped(fragments: Any) -> None:
    """Attention does not read the newest row."""
    _attends(fragments, lambda length, rows, dims: (length - 1).max(1))


@faulty.edits("attention", "paged_attention")
def whole_pages(fragments: Any) -> None:
    """Blocks are read to their end: right where the length is divisible by them."""
    _attends(fragments, lambda length, rows, dims: ((length + rows - 1) // rows * rows).min(dims.S))


@faulty.edits("attention", "paged_attention")
def partial_page_dropped(fragments: Any) -> None:
    """A last block that is not full is left out."""
    _attends(fragments, lambda length, rows, dims: (length // rows * rows).max(length.min(rows)))


@faulty.edits("paged_attention")
def newest_row_dropped_at_a_page_edge(fragments: Any) -> None:
    """The newest row is not read if it is the last of a page."""
    _attends(fragments, lambda length, rows, dims: (length - 1 + (length % rows).min(1)).max(1))


@faulty.edits("attention", "paged_attention")
def keys_as_values(fragments: Any) -> None:
    """The keys are read in the place of the values."""
    _attends(fragments, values="k_cache")


@faulty.edits("attention", "decode_layer")
def oldest_row_dropped(fragments: Any) -> None:
    """Attention begins at the second row."""
    right = fragments.attend_sequence

    def attend_sequence(
        query: Tensor, length: Scalar, rows: int, rows_of: Any, k_cache: Tensor, v_cache: Tensor, dims: Dims
    ) -> Tensor:
        dropped = (length - 1).min(1)  # none if there is only one

        def later_rows(block: Scalar) -> list[Scalar]:
            return [row + dropped for row in rows_of(block)]

        return right(query, length - dropped, rows, later_rows, k_cache, v_cache, dims)

    fragments.attend_sequence = attend_sequence


# Pages


def _reads_page(fragments: Any, page_of: Any) -> None:
    """The ``page``-th page of a sequence is ``page_of(cache, dims, sequence, page)``, whatever the block table says."""

    def attend_pages(query: Tensor, sequence: Scalar, cache: Any, dims: Dims, layer: Scalar = 0) -> Tensor:
        def rows_of(page: Scalar) -> list[Scalar]:
            physical = page_of(cache, dims, sequence, page)
            return [fragments.page_row(dims, layer, physical, kv_head) for kv_head in range(dims.NKV)]

        length = cache.seq_lens[sequence]
        return fragments.attend_sequence(query, length, dims.BS, rows_of, cache.k_cache, cache.v_cache, dims)

    fragments.attend_pages = attend_pages


@faulty.edits("paged_attention", "paged_decode_layer", detectors=("not_finite", "element"))
def identity_block_table(fragments: Any) -> None:
    """The block table is ignored: a sequence's pages are taken to follow one another."""
    _reads_page(fragments, lambda cache, dims, sequence, page: (sequence * dims.MB + page) % (dims.NB - 1))


@faulty.edits("paged_attention", "paged_decode_layer", kind="indexing")
def page_of_a_freed_sequence(fragments: Any) -> None:
    """The page before the one that the table names is read: another sequence's, or one given back."""
    _reads_page(
        fragments,
        lambda cache, dims, sequence, page: (cache.block_table[sequence * dims.MB + page] + dims.NB - 1) % dims.NB,
    )


@faulty.edits("paged_attention")
def page_of_the_next_sequence(fragments: Any) -> None:
    """The first page is read from the next sequence's row of the table."""

    def page_of(cache: Any, dims: Dims, sequence: Scalar, page: Scalar) -> Scalar:
        row = (sequence + 1 - page.min(1)) % cache.seq_lens.shape[0]
        return cache.block_table[row * dims.MB + page]

    _reads_page(fragments, page_of)


@faulty.edits("paged_attention", detectors=("raised",))
def transposed_block_table(fragments: Any) -> None:
    """The block table is read as ``[MB, B]``."""
    _reads_page(fragments, lambda cache, dims, sequence, page: cache.block_table[page * cache.seq_lens.shape[0] + sequence])


@faulty.edits("paged_attention")
def stale_page(fragments: Any) -> None:
    """The table is a step old: a sequence that has just begun a page reads the page before it once more."""

    def page_of(cache: Any, dims: Dims, sequence: Scalar, page: Scalar) -> Scalar:
        pages = (cache.seq_lens[sequence] + dims.BS - 1) // dims.BS
        return cache.block_table[sequence * dims.MB + page.min((pages - 2).max(0))]

    _reads_page(fragments, page_of)


@faulty.edits("paged_attention", detectors=("raised",))
def minus_one_dereferenced(fragments: Any) -> None:
    """One page more than there are is read: its entry of the table is -1."""
    _attends(fragments, lambda length, rows, dims: (length + rows - 1) // rows * rows + rows)


# Batches


@faulty.edits(
    "attention",
    kind="robustness",
    detectors=("capability",),
    capabilities=("variable_batch",),
    capacity=3,
    dims={"B": 3, "BS": 8, "S": 48},
)
def batch_baked_in(fragments: Any) -> None:
    """Declares to serve any batch, and has that of its build in its annotations and its loop."""


@faulty.computes(
    "paged_attention", kind="robustness", detectors=("capability",), capabilities=("paged_kv", "variable_batch"), capacity=3
)
def batch_in_the_loop(fragments: Any, q: Tensor, cache: Any, out: Tensor, dims: Dims) -> None:
    """Takes any batch, and goes round its loop as often as the batch that it was built for."""
    attend_sequences(fragments, q, cache, out, dims, dims.B)


@faulty.computes("paged_attention")
def row_unwritten(fragments: Any, q: Tensor, cache: Any, out: Tensor, dims: Dims) -> None:
    """The last sequence is left out."""
    attend_sequences(fragments, q, cache, out, dims, q.shape[0] - 1)


def attend_sequences(fragments: Any, q: Tensor, cache: Any, out: Tensor, dims: Dims, sequences: Scalar) -> None:
    """The right attention of so many sequences."""
    pypto = fragments.pypto
    for b in pypto.loop(sequences, name="SEQUENCE", idx_name="b"):
        queried = pypto.view(q, [1, dims.NH * dims.D], [b, 0])
        pypto.assemble(fragments.attend_pages(queried, b, cache, dims), [b, 0], out)
