"""PyPTO kernels with a fault of the LM head, or of sampling."""

from __future__ import annotations

from typing import Any

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.pypto.softmax import rounded
from conformance.kernels.qwen3.exam.pypto.weaving import faulty

Tensor = Any


# The head


@faulty.edits("lm_head", "decode_fwd")
def final_norm_missing(fragments: Any) -> None:
    """The hidden states are projected as they are."""
    pypto = fragments.pypto

    def lm_head(hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, dims: Dims) -> Tensor:
        fragments.set_cube_tiles(dims.B, dims.H, dims.V)
        return pypto.matmul(hidden, lm_head_weight, pypto.DT_FP32, b_trans=True)

    fragments.lm_head = lm_head


@faulty.computes("lm_head")
def last_tile_unwritten(
    fragments: Any, hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, logits: Tensor, dims: Dims
) -> None:
    """The vocabulary is projected in whole tiles of 64; the columns after the last are not written."""
    _head_by_tiles(fragments, hidden, final_norm_weight, lm_head_weight, logits, dims, dims.V // 64, lambda tile: tile)


@faulty.computes("lm_head", dims={"B": 3, "V": 512})
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


@faulty.edits("lm_head", name="bf16_result")
def logits_in_bf16(fragments: Any) -> None:
    """The logits are rounded to bf16."""
    right = fragments.lm_head

    def lm_head(hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, dims: Dims) -> Tensor:
        logits = right(hidden, final_norm_weight, lm_head_weight, dims)
        fragments.set_vector_tiles(dims.B, dims.V)
        return rounded(fragments, logits)

    fragments.lm_head = lm_head


@faulty.computes("lm_head")
def state_of_the_row_before(
    fragments: Any, hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, logits: Tensor, dims: Dims
) -> None:
    """The logits of a row are written to the row after it."""
    pypto = fragments.pypto
    right = fragments.lm_head(hidden, final_norm_weight, lm_head_weight, dims)
    for b in range(dims.B):
        pypto.assemble(pypto.view(right, [1, dims.V], [b, 0]), [(b + 1) % dims.B, 0], logits)


# Sampling


@faulty.edits("greedy_sample")
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


@faulty.edits("greedy_sample")
def compared_in_bf16(fragments: Any) -> None:
    """Logits are rounded to bf16 before they are compared."""
    right = fragments.first_largest

    def first_largest(x: Tensor) -> Tensor:
        fragments.set_vector_tiles(*x.shape)
        return right(rounded(fragments, x))

    fragments.first_largest = first_largest


@faulty.edits("greedy_sample")
def maximum_starts_at_zero(fragments: Any) -> None:
    """The largest logit is looked for from 0 on: a row of negative ones has none."""
    pypto, right = fragments.pypto, fragments.first_largest

    def first_largest(x: Tensor) -> Tensor:
        fragments.set_vector_tiles(*x.shape)
        return right(pypto.maximum(x, 0.0))

    fragments.first_largest = first_largest


@faulty.edits("greedy_sample")
def index_off_by_one(fragments: Any) -> None:
    """Columns are counted from 1."""
    pypto, right = fragments.pypto, fragments.column_numbers

    def column_numbers(count: int) -> Tensor:
        numbers = right(count)
        return pypto.add(numbers, 1.0)

    fragments.column_numbers = column_numbers


@faulty.edits("greedy_sample")
def last_tile_ignored(fragments: Any) -> None:
    """The columns after the last whole tile of 48 are not looked at."""
    pypto, right = fragments.pypto, fragments.first_largest

    def first_largest(x: Tensor) -> Tensor:
        rows, columns = x.shape
        used = columns // 48 * 48
        return right(pypto.view(x, [rows, used], [0, 0]))

    fragments.first_largest = first_largest
