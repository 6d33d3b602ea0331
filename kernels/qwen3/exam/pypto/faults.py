"""PyPTO kernels with a known fault, each the bundled one with one thing done wrong.

A fault of the same name as a torch kernel's in ``kernels/qwen3/exam/torch/kernels.py`` is the same fault.
"""

from __future__ import annotations

from typing import Any

from conformance.contract.dims import Dims
from kernels.qwen3.exam.pypto.replaced import Exam
from kernels.qwen3.exam.pypto.softmax import block_step, read_whole_blocks

exam = Exam()

Tensor = Any
Scalar = Any

# Norms


@exam.edits("rms_norm", "lm_head", "decode_layer", kind="value")
def missing_gamma(fragments: Any) -> None:
    """The norm is right but for its weight, which is left out."""
    pypto, right = fragments.pypto, fragments.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return right(x, pypto.add(pypto.mul(weight, 0.0), 1.0), eps)

    fragments.rms_norm = rms_norm


@exam.edits("rms_norm", "qk_norm", "lm_head", kind="value", name="eps_1e-5")
def eps_1e_5(fragments: Any) -> None:
    """eps is 1e-5, another model's."""
    right = fragments.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return right(x, weight, 1e-5)

    fragments.rms_norm = rms_norm


@exam.edits("rms_norm", kind="value")
def gain(fragments: Any) -> None:
    """Everything is half a percent too large."""
    pypto, right = fragments.pypto, fragments.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return pypto.mul(right(x, weight, eps), 1.005)

    fragments.rms_norm = rms_norm


@exam.edits("rms_norm", kind="value")
def echo(fragments: Any) -> None:
    """The input is copied to the output."""

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x

    fragments.rms_norm = rms_norm


@exam.edits("rms_norm", kind="precision")
def squares_in_bf16(fragments: Any) -> None:
    """The squares are rounded to bf16 before they are added up."""
    pypto = fragments.pypto

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        narrow = pypto.cast(pypto.cast(pypto.mul(x, x), pypto.DT_BF16), pypto.DT_FP32)
        mean_square = pypto.sum(pypto.mul(narrow, 1.0 / x.shape[-1]), -1, True)
        return pypto.mul(pypto.div(x, pypto.sqrt(pypto.add(mean_square, eps))), weight)

    fragments.rms_norm = rms_norm


@exam.edits("rms_norm", kind="precision")
def norm_in_bf16(fragments: Any) -> None:
    """The cast to fp32 is forgotten: the whole norm is computed in bf16."""
    pypto, right = fragments.pypto, fragments.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        narrow = right(pypto.cast(x, pypto.DT_BF16), pypto.cast(weight, pypto.DT_BF16), eps)
        return pypto.cast(narrow, pypto.DT_FP32)

    fragments.rms_norm = rms_norm


@exam.computes("rms_norm", kind="precision")
def cast_to_whole_numbers(fragments: Any, x: Tensor, weight: Tensor, out: Tensor, dims: Dims) -> None:
    """The last cast has mode CAST_TRUNC, which takes the fraction away."""
    pypto = fragments.pypto
    fragments.set_vector_tiles(dims.B, dims.H)
    normalised = fragments.rms_norm(pypto.cast(x, pypto.DT_FP32), weight, dims.eps)
    out[:] = pypto.cast(normalised, pypto.DT_BF16, pypto.CastMode.CAST_TRUNC)


@exam.edits("rms_norm", "lm_head", kind="value")
def row0_scale(fragments: Any) -> None:
    """Every row is divided by the first row's root mean square."""
    pypto = fragments.pypto

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = pypto.sum(pypto.mul(pypto.mul(x, x), 1.0 / x.shape[-1]), -1, True)
        root = pypto.sqrt(pypto.add(pypto.view(mean_square, [1, 1], [0, 0]), eps))
        return pypto.mul(pypto.div(x, pypto.expand_clone(root, [x.shape[0], 1])), weight)

    fragments.rms_norm = rms_norm


@exam.edits("qk_norm", kind="value")
def normalised_by_row(fragments: Any) -> None:
    """The mean is taken over all heads of a row instead of over each."""
    pypto, right = fragments.pypto, fragments.rms_norm

    def norm_heads(x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        heads = x.shape[1] // dims.D
        fragments.set_vector_tiles(dims.B, heads * dims.D)
        return right(x, pypto.concat([weight] * heads, -1), dims.eps)

    fragments.norm_heads = norm_heads


@exam.edits("qk_norm", kind="value")
def q_weight_for_k(fragments: Any) -> None:
    """Keys are normalised with the queries' weight."""
    right, of_queries = fragments.norm_heads, [None]

    def norm_heads(x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        if x.shape[1] == dims.NH * dims.D:
            of_queries[0] = weight
        return right(x, of_queries[0], dims)

    fragments.norm_heads = norm_heads


@exam.edits("decode_layer", "paged_decode_layer", kind="value")
def q_norm_missing(fragments: Any) -> None:
    """The queries' heads are not normalised."""
    right = fragments.norm_heads

    def norm_heads(x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        return x if x.shape[1] == dims.NH * dims.D else right(x, weight, dims)

    fragments.norm_heads = norm_heads


@exam.edits("decode_layer", kind="value")
def k_norm_missing(fragments: Any) -> None:
    """The keys' heads are not normalised."""
    right = fragments.norm_heads

    def norm_heads(x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        return right(x, weight, dims) if x.shape[1] == dims.NH * dims.D else x

    fragments.norm_heads = norm_heads


# Rotation


@exam.edits("rope", "decode_layer", kind="value")
def wrong_sign(fragments: Any) -> None:
    """The rotation goes the other way: the sign of the sine is lost."""
    pypto, right = fragments.pypto, fragments.rotate

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
        fragments.set_vector_tiles(dims.B, 1, dims.D)
        return right(x, cos, pypto.mul(sin, -1.0), dims)

    fragments.rotate = rotate


@exam.edits("rope", "decode_layer", kind="indexing")
def interleaved_pairs(fragments: Any) -> None:
    """Neighbouring elements are rotated, another model's way, instead of the two halves."""
    pypto, right = fragments.pypto, fragments.rotate

    def swapped(x: Tensor, heads: int, rows: int, columns: int, dims: Dims) -> Tensor:
        x = pypto.reshape(x, [dims.B * heads, rows, columns])
        fragments.set_vector_tiles(dims.B * heads, rows, columns)
        return pypto.reshape(pypto.transpose(x, 1, 2), [dims.B, heads * dims.D])

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
        heads, half = x.shape[1] // dims.D, dims.D // 2
        rotated = right(swapped(x, heads, half, 2, dims), cos, sin, dims)
        return pypto.cast(swapped(pypto.cast(rotated, pypto.DT_FP32), heads, 2, half, dims), pypto.DT_BF16)

    fragments.rotate = rotate


@exam.edits("rope", "decode_layer", kind="indexing")
def position_off_by_one(fragments: Any) -> None:
    """The position is taken to be ``seq_lens``, not one less; at the tables' end it is one too low instead."""
    pypto, right = fragments.pypto, fragments.rope_rows

    def rope_rows(
        rope_cos: Tensor, rope_sin: Tensor, seq_lens: Tensor, dims: Dims, batch: Scalar | None = None
    ) -> tuple[Tensor, Tensor]:
        fragments.set_vector_tiles(dims.B)
        past = pypto.add(seq_lens, 1)
        distance = pypto.maximum(pypto.sub(past, dims.S), 0)  # 1 for the longest
        cos, sin = right(rope_cos, rope_sin, pypto.sub(past, pypto.mul(distance, 2)), dims, batch)
        return cos, sin

    fragments.rope_rows = rope_rows


@exam.edits("rope", kind="indexing")
def row0_length(fragments: Any) -> None:
    """Every sequence is rotated by the first one's position."""
    pypto, right = fragments.pypto, fragments.rotate

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
        fragments.set_vector_tiles(dims.B, 1, dims.D)
        shape = [dims.B, 1, dims.D // 2]
        first_cos, first_sin = (pypto.view(table, [1, *shape[1:]], [0, 0, 0]) for table in (cos, sin))
        return right(x, pypto.expand_clone(first_cos, shape), pypto.expand_clone(first_sin, shape), dims)

    fragments.rotate = rotate


@exam.edits("rope", kind="value")
def k_not_rotated(fragments: Any) -> None:
    """Keys are cast and not rotated."""
    pypto, right = fragments.pypto, fragments.rotate

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
        if x.shape[1] == dims.NH * dims.D:
            return right(x, cos, sin, dims)
        fragments.set_vector_tiles(dims.B, x.shape[1])
        return pypto.cast(x, pypto.DT_BF16)

    fragments.rotate = rotate


@exam.edits("rope", kind="precision")
def bf16_tables(fragments: Any) -> None:
    """The tables' rows are rounded to bf16."""
    pypto, right = fragments.pypto, fragments.rope_rows

    def rope_rows(
        rope_cos: Tensor, rope_sin: Tensor, seq_lens: Tensor, dims: Dims, batch: Scalar | None = None
    ) -> tuple[Tensor, Tensor]:
        cos, sin = right(rope_cos, rope_sin, seq_lens, dims, batch)
        fragments.set_vector_tiles(dims.B, 1, dims.D)
        cos, sin = (pypto.cast(pypto.cast(table, pypto.DT_BF16), pypto.DT_FP32) for table in (cos, sin))
        return cos, sin

    fragments.rope_rows = rope_rows


# Attention: the softmax


@exam.edits("attention", "paged_attention", "decode_layer", kind="value")
def scale_missing(fragments: Any) -> None:
    """Scores are not multiplied by ``D ** -0.5``."""
    fragments.attend_block = block_step(fragments, scale=lambda dims: 1.0)


@exam.edits("attention", "paged_attention", kind="value")
def no_maximum(fragments: Any) -> None:
    """The exponentials are taken of the scores as they are, without their maximum: those over 88 are infinite."""
    fragments.attend_block = block_step(fragments, of_largest=lambda largest: fragments.pypto.mul(largest, 0.0))


@exam.edits("attention", "paged_attention", kind="value", name="maximum_starts_at_zero")
def maximum_of_scores_starts_at_zero(fragments: Any) -> None:
    """The running maximum starts at 0: where all scores lie far below it, every probability vanishes."""
    fragments.NO_SCORE = 0.0


@exam.edits("attention", "paged_attention", kind="value")
def no_rescale(fragments: Any) -> None:
    """What earlier blocks left is not scaled down when a later block has a larger maximum."""
    pypto = fragments.pypto
    fragments.attend_block = block_step(fragments, of_shrink=lambda shrink: pypto.add(pypto.mul(shrink, 0.0), 1.0))


@exam.edits("attention", kind="precision")
def bf16_scores(fragments: Any) -> None:
    """Scores are rounded to bf16."""
    pypto = fragments.pypto
    fragments.attend_block = block_step(
        fragments, of_scores=lambda scores: pypto.cast(pypto.cast(scores, pypto.DT_BF16), pypto.DT_FP32)
    )


@exam.edits("paged_attention", kind="precision", dims={"B": 3, "BS": 8, "D": 16, "S": 128})
def bf16_accumulation(fragments: Any) -> None:
    """The weighted values are kept in bf16 from block to block."""
    pypto = fragments.pypto
    fragments.attend_block = block_step(
        fragments, of_product=lambda product: pypto.cast(pypto.cast(product, pypto.DT_BF16), pypto.DT_FP32)
    )


@exam.edits("attention", "decode_layer", "paged_attention", kind="indexing")
def modulo_heads(fragments: Any) -> None:
    """Query head ``h`` reads KV head ``h % NKV`` instead of ``h // G``."""
    fragments.attend_block = block_step(fragments, modulo_heads=True)


@exam.edits("paged_attention", kind="value")
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


@exam.edits("attention", "decode_layer", "paged_attention", kind="indexing")
def one_row_too_many(fragments: Any) -> None:
    """Attention reads one row past the sequence's end."""
    _attends(fragments, lambda length, rows, dims: (length + 1).min(dims.S))


@exam.edits("attention", "decode_layer", "paged_attention", kind="indexing")
def newest_row_dropped(fragments: Any) -> None:
    """Attention does not read the newest row."""
    _attends(fragments, lambda length, rows, dims: (length - 1).max(1))


@exam.edits("attention", "paged_attention", kind="robustness")
def whole_pages(fragments: Any) -> None:
    """Blocks are read to their end: right where the length is divisible by them."""
    _attends(fragments, lambda length, rows, dims: ((length + rows - 1) // rows * rows).min(dims.S))


@exam.edits("attention", "paged_attention", kind="robustness")
def partial_page_dropped(fragments: Any) -> None:
    """A last block that is not full is left out."""
    _attends(fragments, lambda length, rows, dims: (length // rows * rows).max(length.min(rows)))


@exam.edits("paged_attention", kind="robustness")
def newest_row_dropped_at_a_page_edge(fragments: Any) -> None:
    """The newest row is not read if it is the last of a page."""
    _attends(fragments, lambda length, rows, dims: (length - 1 + (length % rows).min(1)).max(1))


@exam.edits("attention", "paged_attention", kind="indexing")
def keys_as_values(fragments: Any) -> None:
    """The keys are read in the place of the values."""
    _attends(fragments, values="k_cache")


@exam.edits("attention", "decode_layer", kind="indexing")
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


@exam.edits("paged_attention", "paged_decode_layer", kind="indexing")
def identity_block_table(fragments: Any) -> None:
    """The block table is ignored: a sequence's pages are taken to follow one another."""
    _reads_page(fragments, lambda cache, dims, sequence, page: (sequence * dims.MB + page) % (dims.NB - 1))


@exam.edits("paged_attention", "paged_decode_layer", kind="indexing")
def page_of_a_freed_sequence(fragments: Any) -> None:
    """The page before the one that the table names is read: another sequence's, or one given back."""
    _reads_page(
        fragments,
        lambda cache, dims, sequence, page: (cache.block_table[sequence * dims.MB + page] + dims.NB - 1) % dims.NB,
    )


@exam.edits("paged_attention", kind="indexing")
def page_of_the_next_sequence(fragments: Any) -> None:
    """The first page is read from the next sequence's row of the table."""

    def page_of(cache: Any, dims: Dims, sequence: Scalar, page: Scalar) -> Scalar:
        row = (sequence + 1 - page.min(1)) % cache.seq_lens.shape[0]
        return cache.block_table[row * dims.MB + page]

    _reads_page(fragments, page_of)


@exam.edits("paged_attention", kind="indexing")
def transposed_block_table(fragments: Any) -> None:
    """The block table is read as ``[MB, B]``."""
    _reads_page(fragments, lambda cache, dims, sequence, page: cache.block_table[page * cache.seq_lens.shape[0] + sequence])


@exam.edits("paged_attention", kind="indexing")
def stale_page(fragments: Any) -> None:
    """The table is a step old: a sequence that has just begun a page reads the page before it once more."""

    def page_of(cache: Any, dims: Dims, sequence: Scalar, page: Scalar) -> Scalar:
        pages = (cache.seq_lens[sequence] + dims.BS - 1) // dims.BS
        return cache.block_table[sequence * dims.MB + page.min((pages - 2).max(0))]

    _reads_page(fragments, page_of)


@exam.edits("paged_attention", kind="memory")
def minus_one_dereferenced(fragments: Any) -> None:
    """One page more than there are is read: its entry of the table is -1."""
    _attends(fragments, lambda length, rows, dims: (length + rows - 1) // rows * rows + rows)


# Writing to the cache


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


@exam.computes("kv_write", kind="indexing")
def slot_of_the_row_before(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """Each sequence's row goes to the slot of the sequence before it."""
    _write_slots(fragments, k, v, lambda b: slot_mapping[(b - 1) % dims.B], k_cache, v_cache, dims)


@exam.computes("kv_write", kind="indexing")
def slot_of_the_first_sequence(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """Every sequence's row goes to the slot of the first."""
    _write_slots(fragments, k, v, lambda b: slot_mapping[0], k_cache, v_cache, dims)


@exam.computes("kv_write", kind="indexing")
def slot_one_too_low(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """The slot before the right one is written."""
    _write_slots(fragments, k, v, lambda b: (slot_mapping[b] - 1).max(0), k_cache, v_cache, dims)


@exam.computes("kv_write", kind="indexing")
def next_slot(fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims) -> None:
    """The next offset of the page is written, the first after the last."""

    def next_of(b: int) -> Scalar:
        slot = slot_mapping[b]
        return slot // dims.BS * dims.BS + (slot % dims.BS + 1) % dims.BS

    _write_slots(fragments, k, v, next_of, k_cache, v_cache, dims)


@exam.computes("kv_write", kind="indexing")
def token_major_page(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """A page is taken to hold the heads of its first token, then those of the second, and so on."""
    _write_slots(
        fragments, k, v, lambda b: slot_mapping[b], k_cache, v_cache, dims, lambda slot, kv_head: slot * dims.NKV + kv_head
    )


@exam.computes("kv_write", kind="unwritten")
def v_not_written(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """Only the keys are written."""
    _write_slots(fragments, k, v, lambda b: slot_mapping[b], k_cache, None, dims)


@exam.computes("kv_write", kind="memory")
def other_row_overwritten(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """A row of the first sequence's page is cleared besides: the first, or the second if the first is the slot's."""
    pypto = fragments.pypto
    _write_slots(fragments, k, v, lambda b: slot_mapping[b], k_cache, v_cache, dims)
    page, offset = slot_mapping[0] // dims.BS, slot_mapping[0] % dims.BS
    row = fragments.page_row(dims, 0, page, 0) + 1 - offset.min(1)
    pypto.assemble(pypto.full([1, dims.D], 1.0, pypto.DT_BF16), [row, 0], v_cache)


@exam.edits("decode_layer", kind="dependency")
def attention_before_write(fragments: Any) -> None:
    """Attention reads the caches before the new row is written to them."""
    write, after, held = fragments.write_current_rows, fragments.after_attention, {}

    def hold(*arguments: Any) -> None:
        held["arguments"] = arguments

    def write_after(*arguments: Any) -> Tensor:
        write(*held["arguments"])
        return after(*arguments)

    fragments.write_current_rows, fragments.after_attention = hold, write_after


@exam.edits("decode_layer", kind="memory")
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


# Projections


def _by_k_tiles(fragments: Any, x: Tensor, weight: Tensor, tiles: list[int], of_sum: Any = None) -> Tensor:
    """``x @ weight`` in fp32 as the sum of the products of 32-wide tiles of K; ``of_sum`` follows each addition."""
    pypto, total = fragments.pypto, None
    for tile in tiles:
        part = pypto.matmul(
            pypto.view(x, [x.shape[0], 32], [0, tile * 32]),
            pypto.view(weight, [32, weight.shape[1]], [tile * 32, 0]),
            pypto.DT_FP32,
        )
        total = part if total is None else pypto.add(total, part)
        total = total if of_sum is None else of_sum(total)
    return total


def _in_bf16(fragments: Any) -> Any:
    """fp32 values rounded to bf16 and back."""
    pypto = fragments.pypto
    return lambda x: pypto.cast(pypto.cast(x, pypto.DT_BF16), pypto.DT_FP32)


@exam.computes("qkv_proj", kind="indexing")
def k_and_v_exchanged(
    fragments: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, q: Tensor, k: Tensor, v: Tensor, dims: Dims
) -> None:
    """The keys are made with the values' weight and the other way round."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.H, dims.NKV * dims.D)
    for weight, out in ((wq, q), (wv, k), (wk, v)):
        out[:] = pypto.matmul(x, weight, pypto.DT_FP32)


def _project(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims, product: Any) -> None:
    """The right output projection but for its ``product(attn, wo)``."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.NH * dims.D, dims.H)
    fragments.set_vector_tiles(dims.B, dims.H)
    out[:] = pypto.add(product(attn, wo), pypto.cast(residual, pypto.DT_FP32))


@exam.computes("o_proj", kind="value")
def weight_transposed(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The weight is used transposed."""
    pypto = fragments.pypto
    _project(fragments, attn, wo, residual, out, dims, lambda a, w: pypto.matmul(a, w, pypto.DT_FP32, b_trans=True))


@exam.computes("o_proj", kind="precision", name="bf16_accumulation")
def bf16_sums(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The sum over K is kept in bf16 from tile to tile."""
    tiles = list(range(dims.NH * dims.D // 32))
    _project(fragments, attn, wo, residual, out, dims, lambda a, w: _by_k_tiles(fragments, a, w, tiles, _in_bf16(fragments)))


@exam.computes("o_proj", kind="value")
def last_k_tile_missing(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The last 32 of the products over K are left out."""
    tiles = list(range(dims.NH * dims.D // 32 - 1))
    _project(fragments, attn, wo, residual, out, dims, lambda a, w: _by_k_tiles(fragments, a, w, tiles))


@exam.computes("o_proj", kind="precision")
def bf16_result(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The sum with the residual is rounded to bf16, as if the residual stream were."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.NH * dims.D, dims.H)
    fragments.set_vector_tiles(dims.B, dims.H)
    summed = pypto.add(pypto.matmul(attn, wo, pypto.DT_FP32), pypto.cast(residual, pypto.DT_FP32))
    out[:] = _in_bf16(fragments)(summed)


@exam.computes("o_proj", kind="value")
def residual_missing(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The residual is not added."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.NH * dims.D, dims.H)
    out[:] = pypto.matmul(attn, wo, pypto.DT_FP32)


@exam.computes("o_proj", kind="unwritten")
def column_tile_unwritten(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The last 16 columns are not written."""
    pypto, used = fragments.pypto, dims.H - 16
    fragments.set_cube_tiles(dims.B, dims.NH * dims.D, dims.H)
    fragments.set_vector_tiles(dims.B, dims.H)
    summed = pypto.add(pypto.matmul(attn, wo, pypto.DT_FP32), pypto.cast(residual, pypto.DT_FP32))
    pypto.assemble(pypto.view(summed, [dims.B, used], [0, 0]), [0, 0], out)


@exam.computes("qkv_proj", kind="unwritten")
def output_never_written(
    fragments: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, q: Tensor, k: Tensor, v: Tensor, dims: Dims
) -> None:
    """The name ``v`` is bound to the values' product; the output itself stays as it was."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.H, dims.NKV * dims.D)
    q[:] = pypto.matmul(x, wq, pypto.DT_FP32)
    k[:] = pypto.matmul(x, wk, pypto.DT_FP32)
    v = pypto.matmul(x, wv, pypto.DT_FP32)  # noqa: F841  the fault


# The MLP


@exam.edits("mlp", "decode_layer", kind="value")
def relu(fragments: Any) -> None:
    """The gate goes through relu, not silu."""
    pypto = fragments.pypto

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return pypto.cast(pypto.mul(pypto.maximum(gate, 0.0), up), pypto.DT_BF16)

    fragments.gated = gated


@exam.edits("mlp", "decode_layer", kind="value")
def gate_and_up_exchanged(fragments: Any) -> None:
    """Gate and up are exchanged."""
    right = fragments.gated

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return right(up, gate)

    fragments.gated = gated


@exam.computes("mlp", kind="precision")
def activation_not_rounded(
    fragments: Any, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, out: Tensor, dims: Dims
) -> None:
    """The activation goes into the last product in fp32."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.H, dims.I)
    gate, up = pypto.matmul(x, w_gate, pypto.DT_FP32), pypto.matmul(x, w_up, pypto.DT_FP32)
    fragments.set_vector_tiles(dims.B, dims.I)
    activation = pypto.mul(pypto.div(gate, pypto.add(pypto.exp(pypto.mul(gate, -1.0)), 1.0)), up)
    fragments.set_vector_tiles(dims.I, dims.H)
    wide = pypto.cast(w_down, pypto.DT_FP32)
    pypto.set_cube_tile_shapes([16, 16], [64, 64], [64, 64])
    out[:] = pypto.matmul(activation, wide, pypto.DT_FP32)


# Layers


@exam.edits("decode_layer", kind="value", name="residual_missing")
def layer_without_residual(fragments: Any) -> None:
    """The residual after attention is not added."""
    pypto, right = fragments.pypto, fragments.after_attention

    def after_attention(attended: Tensor, hidden_states: Tensor, weights: Any, dims: Dims, layer: Scalar = 0) -> Tensor:
        fragments.set_vector_tiles(dims.B, dims.H)
        return right(attended, pypto.mul(hidden_states, 0.0), weights, dims, layer)

    fragments.after_attention = after_attention


@exam.edits("decode_layer", kind="value")
def second_residual_wrong(fragments: Any) -> None:
    """The layer's input is added after the MLP, not what attention made of it."""
    pypto, right_norm, right = fragments.pypto, fragments.rms_norm, fragments.after_attention

    def after_attention(attended: Tensor, hidden_states: Tensor, weights: Any, dims: Dims, layer: Scalar = 0) -> Tensor:
        residual = []

        def remembering(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            residual.append(x)
            return right_norm(x, weight, eps)

        fragments.rms_norm = remembering
        result = pypto.cast(right(attended, hidden_states, weights, dims, layer), pypto.DT_FP32)
        fragments.rms_norm = right_norm
        change = pypto.sub(pypto.cast(hidden_states, pypto.DT_FP32), residual[0])
        return pypto.cast(pypto.add(result, change), pypto.DT_BF16)

    fragments.after_attention = after_attention


@exam.edits("decode_fwd_layers", "decode_fwd", kind="indexing")
def weights_of_layer_0(fragments: Any) -> None:
    """Every layer uses the first one's weights."""
    right = fragments.layer_rows

    def layer_rows(stacked: Tensor, layer: Scalar, rows: int = 1) -> Tensor:
        return right(stacked, 0, rows)

    fragments.layer_rows = layer_rows


@exam.edits("decode_fwd_layers", kind="indexing")
def caches_of_layer_0(fragments: Any) -> None:
    """Every layer reads and writes the first one's caches."""
    right = fragments.first_row

    def first_row(dims: Dims, layer: Scalar, sequence: Scalar, kv_head: int) -> Scalar:
        return right(dims, 0, sequence, kv_head)

    fragments.first_row = first_row


# The head


@exam.edits("lm_head", "decode_fwd", kind="value")
def final_norm_missing(fragments: Any) -> None:
    """The hidden states are projected as they are."""
    pypto = fragments.pypto

    def lm_head(hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, dims: Dims) -> Tensor:
        fragments.set_cube_tiles(dims.B, dims.H, dims.V)
        return pypto.matmul(hidden, lm_head_weight, pypto.DT_FP32, b_trans=True)

    fragments.lm_head = lm_head


@exam.computes("lm_head", kind="unwritten")
def last_tile_unwritten(
    fragments: Any, hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, logits: Tensor, dims: Dims
) -> None:
    """The vocabulary is projected in whole tiles of 64; the columns after the last are not written."""
    _head_by_tiles(fragments, hidden, final_norm_weight, lm_head_weight, logits, dims, dims.V // 64, lambda tile: tile)


@exam.computes("lm_head", kind="indexing", dims={"B": 3, "V": 512})
def last_tile_repeated(
    fragments: Any, hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, logits: Tensor, dims: Dims
) -> None:
    """The last tile of the vocabulary is made of the weight of the tile before."""
    tiles = dims.V // 64
    _head_by_tiles(fragments, hidden, final_norm_weight, lm_head_weight, logits, dims, tiles, lambda tile: tile.min(tiles - 2))


def _head_by_tiles(
    fragments: Any,
    hidden: Tensor,
    final_norm_weight: Tensor,
    lm_head_weight: Tensor,
    logits: Tensor,
    dims: Dims,
    tiles: int,
    source_of: Any,
) -> None:
    """The right head by a loop over tiles of 64 columns, each with the weight of ``source_of(tile)``."""
    pypto = fragments.pypto
    fragments.set_vector_tiles(dims.B, dims.H)
    normalised = pypto.tensor([dims.B, dims.H], pypto.DT_BF16, "normalised")
    normalised[:] = pypto.cast(fragments.rms_norm(pypto.cast(hidden, pypto.DT_FP32), final_norm_weight, dims.eps), pypto.DT_BF16)
    fragments.set_cube_tiles(dims.B, dims.H, 64)
    for tile in pypto.loop(tiles, name="VOCABULARY", idx_name="tile"):
        weight = pypto.view(lm_head_weight, [64, dims.H], [source_of(tile) * 64, 0])
        pypto.assemble(pypto.matmul(normalised, weight, pypto.DT_FP32, b_trans=True), [0, tile * 64], logits)


@exam.computes("lm_head", kind="precision")
def normalised_not_rounded(
    fragments: Any, hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, logits: Tensor, dims: Dims
) -> None:
    """The normalised states go into the product in fp32."""
    pypto = fragments.pypto
    fragments.set_vector_tiles(dims.B, dims.H)
    normalised = fragments.rms_norm(pypto.cast(hidden, pypto.DT_FP32), final_norm_weight, dims.eps)
    fragments.set_vector_tiles(dims.V, dims.H)
    wide = pypto.cast(lm_head_weight, pypto.DT_FP32)
    pypto.set_cube_tile_shapes([16, 16], [64, 64], [64, 64])
    logits[:] = pypto.matmul(normalised, wide, pypto.DT_FP32, b_trans=True)


@exam.edits("lm_head", kind="precision", name="bf16_result")
def logits_in_bf16(fragments: Any) -> None:
    """The logits are rounded to bf16."""
    right = fragments.lm_head

    def lm_head(hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, dims: Dims) -> Tensor:
        logits = right(hidden, final_norm_weight, lm_head_weight, dims)
        fragments.set_vector_tiles(dims.B, dims.V)
        return _in_bf16(fragments)(logits)

    fragments.lm_head = lm_head


@exam.computes("lm_head", kind="indexing")
def state_of_the_row_before(
    fragments: Any, hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, logits: Tensor, dims: Dims
) -> None:
    """The logits of a row are written to the row after it."""
    pypto = fragments.pypto
    right = fragments.lm_head(hidden, final_norm_weight, lm_head_weight, dims)
    for b in range(dims.B):
        pypto.assemble(pypto.view(right, [1, dims.V], [b, 0]), [(b + 1) % dims.B, 0], logits)


# Sampling


@exam.edits("greedy_sample", kind="robustness")
def highest_index_on_a_tie(fragments: Any) -> None:
    """Of equal logits the last one wins."""
    pypto = fragments.pypto

    def first_largest(x: Tensor) -> Tensor:
        rows, columns = x.shape
        numbers = fragments.column_numbers(columns)
        fragments.set_vector_tiles(rows, columns)
        is_largest = pypto.eq(x, pypto.amax(x, -1, True))
        last = pypto.amax(pypto.where(is_largest, numbers, -1.0), -1, True)
        fragments.set_vector_tiles(rows, 1)
        return pypto.cast(last, pypto.DT_INT32)

    fragments.first_largest = first_largest


@exam.edits("greedy_sample", kind="precision")
def compared_in_bf16(fragments: Any) -> None:
    """Logits are rounded to bf16 before they are compared."""
    right = fragments.first_largest

    def first_largest(x: Tensor) -> Tensor:
        fragments.set_vector_tiles(*x.shape)
        return right(_in_bf16(fragments)(x))

    fragments.first_largest = first_largest


@exam.edits("greedy_sample", kind="value")
def maximum_starts_at_zero(fragments: Any) -> None:
    """The largest logit is looked for from 0 on: a row of negative ones has none."""
    pypto, right = fragments.pypto, fragments.first_largest

    def first_largest(x: Tensor) -> Tensor:
        fragments.set_vector_tiles(*x.shape)
        return right(pypto.maximum(x, 0.0))

    fragments.first_largest = first_largest


@exam.edits("greedy_sample", kind="indexing")
def index_off_by_one(fragments: Any) -> None:
    """Columns are counted from 1."""
    pypto, right = fragments.pypto, fragments.column_numbers

    def column_numbers(count: int) -> Tensor:
        numbers = right(count)
        return pypto.add(numbers, 1.0)

    fragments.column_numbers = column_numbers


@exam.edits("greedy_sample", kind="indexing")
def last_tile_ignored(fragments: Any) -> None:
    """The columns after the last whole tile of 48 are not looked at."""
    pypto, right = fragments.pypto, fragments.first_largest

    def first_largest(x: Tensor) -> Tensor:
        rows, columns = x.shape
        used = columns // 48 * 48
        return right(pypto.view(x, [rows, used], [0, 0]))

    fragments.first_largest = first_largest


# Batches


@exam.edits("attention", kind="robustness", capabilities=("variable_batch",), capacity=3, dims={"B": 3, "BS": 8, "S": 48})
def batch_baked_in(fragments: Any) -> None:
    """Declares to serve any batch, and has that of its build in its annotations and its loop."""


@exam.computes("paged_attention", kind="robustness", capabilities=("paged_kv", "variable_batch"), capacity=3)
def batch_in_the_loop(fragments: Any, q: Tensor, cache: Any, out: Tensor, dims: Dims) -> None:
    """Takes any batch, and goes round its loop as often as the batch that it was built for."""
    _attend_in_turn(fragments, q, cache, out, dims, dims.B)


@exam.computes("paged_attention", kind="unwritten")
def row_unwritten(fragments: Any, q: Tensor, cache: Any, out: Tensor, dims: Dims) -> None:
    """The last sequence is left out."""
    _attend_in_turn(fragments, q, cache, out, dims, q.shape[0] - 1)


def _attend_in_turn(fragments: Any, q: Tensor, cache: Any, out: Tensor, dims: Dims, sequences: Scalar) -> None:
    """The right attention of so many sequences."""
    pypto = fragments.pypto
    for b in pypto.loop(sequences, name="SEQUENCE", idx_name="b"):
        queried = pypto.view(q, [1, dims.NH * dims.D], [b, 0])
        pypto.assemble(fragments.attend_pages(queried, b, cache, dims), [b, 0], out)


# What the compiled graph shows and the interpreter cannot: it reads what nothing wrote of a buffer as 0.0, which is right here; a
# device has garbage there.


@exam.computes("rms_norm", kind="unwritten", lane="compile_only")
def padding_not_cleared(fragments: Any, x: Tensor, weight: Tensor, out: Tensor, dims: Dims) -> None:
    """The squares are added up over rows padded to a wider tile, and nothing clears the padding."""
    pypto, width = fragments.pypto, dims.H + 64
    fragments.set_vector_tiles(dims.B, width)
    wide = pypto.cast(x, pypto.DT_FP32)
    squares = pypto.tensor([dims.B, width], pypto.DT_FP32, "squares")
    pypto.assemble(pypto.mul(wide, wide), [0, 0], squares)
    mean_square = pypto.mul(pypto.sum(squares, -1, True), 1.0 / dims.H)
    normalised = pypto.div(wide, pypto.sqrt(pypto.add(mean_square, dims.eps)))
    out[:] = pypto.cast(pypto.mul(normalised, weight), pypto.DT_BF16)


@exam.computes("o_proj", kind="unwritten", lane="compile_only", name="padding_not_cleared")
def k_not_cleared(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """K is padded to twice its depth, and nothing clears the activations' padding."""
    pypto, depth = fragments.pypto, 2 * dims.NH * dims.D
    fragments.set_vector_tiles(depth, dims.H)
    padded = pypto.tensor([dims.B, depth], pypto.DT_BF16, "padded")
    pypto.assemble(pypto.mul(attn, 1.0), [0, 0], padded)
    deep = pypto.concat([wo, wo], 0)
    fragments.set_cube_tiles(dims.B, depth, dims.H)
    product = pypto.matmul(padded, deep, pypto.DT_FP32)
    fragments.set_vector_tiles(dims.B, dims.H)
    out[:] = pypto.add(product, pypto.cast(residual, pypto.DT_FP32))


@exam.computes("o_proj", kind="unwritten", lane="compile_only")
def accumulator_half_cleared(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """A loop over K adds to a buffer of which only the left half was cleared."""
    pypto, depth = fragments.pypto, 64
    fragments.set_cube_tiles(dims.B, depth, dims.H)
    fragments.set_vector_tiles(dims.B, dims.H)
    total = pypto.tensor([dims.B, dims.H], pypto.DT_FP32, "total")
    pypto.assemble(pypto.full([dims.B, dims.H // 2], 0.0, pypto.DT_FP32), [0, 0], total)
    for tile in pypto.loop(dims.NH * dims.D // depth, name="DEPTH", idx_name="tile"):
        part = pypto.view(attn, [dims.B, depth], [0, tile * depth])
        total[:] = pypto.add(total, pypto.matmul(part, pypto.view(wo, [depth, dims.H], [tile * depth, 0]), pypto.DT_FP32))
    out[:] = pypto.add(total, pypto.cast(residual, pypto.DT_FP32))
