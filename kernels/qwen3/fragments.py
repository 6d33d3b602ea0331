"""Pieces that several Qwen3 kernels share: tile shapes, the norm, the rotation, attention by blocks, a whole layer.

These are ordinary Python functions. A kernel calls them while PyPTO traces it, so whatever they compute becomes part of that
kernel's program; integers, ``range`` and lists are gone by then, and only tensors, ``pypto.loop`` and symbolic scalars stay.

Importing this module imports PyPTO, so kernels do it inside their builders: they can then be listed where PyPTO is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pypto

from conformance.contract.dims import Dims

Tensor = Any  # pypto.Tensor, which is untyped
Scalar = Any  # int, or pypto.SymbolicScalar, known only when the program runs

BLOCK_BYTES = 32  # the unit that vector cores move; the last axis of a tile must be a multiple of it
VECTOR_TILE_ELEMENTS = 8192  # 32 KB of fp32: five operands and results fit the 192 KB unified buffer
FRACTAL = 16  # cube tiles are multiples of this in every direction

#: A finite stand-in for the maximum of no scores. It is far below any score, and minus itself it is 0, not NaN.
NO_SCORE = -1e30


# Tile shapes


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def set_vector_tiles(*shape: int) -> None:
    """Tile what follows for the vector cores, a tensor of ``shape`` at a time.

    A tile spans the last axis if it can, so that a row is reduced at once, and then as many of the axes before it, from the
    right, as fit ``VECTOR_TILE_ELEMENTS``.
    """
    columns = round_up(shape[-1], BLOCK_BYTES // 2)  # whole blocks in bf16, and so in fp32 too
    left = VECTOR_TILE_ELEMENTS
    tile: list[int] = []
    for extent in (columns, *reversed(shape[:-1])):
        tile.insert(0, max(1, min(extent, left)))
        left //= tile[0]
    pypto.set_vec_tile_shapes(*tile)


def set_cube_tiles(rows: int, inner: int, columns: int) -> None:
    """Tile the products ``[rows, inner] @ [inner, columns]`` that follow, for the cube cores.

    The L0 tile of the weights is 128 x 256 bf16 at most, all of the 64 KB L0B; the L1 tile is four of them deep, 256 KB of
    512 KB. Wide tiles matter at decode: few rows, so time goes by the weights' reading, and 256 columns read half as often as
    128 do. The activations' tile takes all rows, up to 128.
    """
    m = min(round_up(rows, FRACTAL), 128)
    k = min(round_up(inner, FRACTAL), 128)
    n = min(round_up(columns, FRACTAL), 256)
    deep = min(round_up(inner, k), 4 * k)
    pypto.set_cube_tile_shapes([m, m], [k, deep], [n, n])


# Arithmetic


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * rsqrt(mean(x * x) + eps) * weight`` over the last axis, all fp32: ``x [..., n]``, ``weight [1, n]``."""
    count = x.shape[-1]
    mean_square = pypto.sum(pypto.mul(pypto.mul(x, x), 1.0 / count), -1, True)
    return pypto.mul(pypto.div(x, pypto.sqrt(pypto.add(mean_square, eps))), weight)


def norm_heads(x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
    """``rms_norm`` of every head of ``x [B, heads*D]`` by itself, with one ``weight [1, D]`` for all; fp32."""
    heads = x.shape[1] // dims.D
    set_vector_tiles(dims.B * heads, dims.D)
    normalised = rms_norm(pypto.reshape(x, [dims.B * heads, dims.D]), weight, dims.eps)
    return pypto.reshape(normalised, [dims.B, heads * dims.D])


def rope_rows(
    rope_cos: Tensor, rope_sin: Tensor, seq_lens: Tensor, dims: Dims, batch: Scalar | None = None
) -> tuple[Tensor, Tensor]:
    """The table rows of every sequence's current position, ``seq_lens - 1``: two ``[B, 1, D/2]`` fp32.

    The two halves of a table row are equal, so the first is enough. Of a ``batch`` smaller than ``dims.B`` the rows past it are
    zeros.
    """
    if batch is not None:
        seq_lens = pypto.view(seq_lens, [dims.B], [0], valid_shape=[batch])
    set_vector_tiles(dims.B)
    position = pypto.sub(seq_lens, 1)
    half = dims.D // 2
    set_vector_tiles(dims.B, dims.D)
    cos = pypto.view(pypto.index_select(rope_cos, 0, position), [dims.B, half], [0, 0])
    sin = pypto.view(pypto.index_select(rope_sin, 0, position), [dims.B, half], [0, 0])
    if batch is not None:
        cos, sin = pypto.fillpad(cos), pypto.fillpad(sin)
    return pypto.reshape(cos, [dims.B, 1, half]), pypto.reshape(sin, [dims.B, 1, half])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
    """Rotate the two halves of every head of ``x [B, heads*D]`` fp32; the result is bf16."""
    heads, half = x.shape[1] // dims.D, dims.D // 2
    set_vector_tiles(dims.B, heads, dims.D)
    x = pypto.reshape(x, [dims.B, heads, dims.D])
    low = pypto.view(x, [dims.B, heads, half], [0, 0, 0])
    high = pypto.view(x, [dims.B, heads, half], [0, 0, half])
    rotated_low = pypto.sub(pypto.mul(low, cos), pypto.mul(high, sin))
    rotated_high = pypto.add(pypto.mul(high, cos), pypto.mul(low, sin))
    rotated = pypto.cast(pypto.concat([rotated_low, rotated_high], -1), pypto.DT_BF16)
    return pypto.reshape(rotated, [dims.B, heads * dims.D])


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` in fp32, then one cast to bf16: ``[B, I]``. (``pypto.sigmoid`` cannot take a valid shape.)"""
    silu = pypto.div(gate, pypto.add(pypto.exp(pypto.mul(gate, -1.0)), 1.0))
    return pypto.cast(pypto.mul(silu, up), pypto.DT_BF16)


# Attention


def block_rows(dims: Dims) -> int:
    """Cache rows that attention reads at a time: four pages' worth, at most 512 (of Qwen3-14B, 128 KB each of keys and values).

    A vector tile spans a block's scores, so more rows would not fit the unified buffer.
    """
    return min(4 * dims.BS, 512, dims.S)


def first_row(dims: Dims, layer: Scalar, sequence: Scalar, kv_head: int) -> Scalar:
    """Row of position 0 in a contiguous cache ``[L*B*NKV*S, D]``."""
    return ((layer * dims.B + sequence) * dims.NKV + kv_head) * dims.S


def attend_block(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    valid: Scalar,
    maximum: Tensor,
    total: Tensor,
    weighted: Tensor,
    dims: Dims,
    mask: Tensor | None = None,
) -> None:
    """Extend the running softmax of one sequence's heads by one block of cache rows.

    ``query [NH, D]`` bf16 is the sequence's; ``keys`` and ``values`` hold the block's ``[rows, D]`` bf16 of each KV head, whose
    valid shape is the first ``valid`` rows. ``maximum [NH, 1]``, ``total [NH, 1]`` and ``weighted [NH, D]`` fp32 are
    what the blocks before left, and are updated: the largest score, and relative to it the sum of the exponentials and of the
    values weighted by them. ``mask [NH, rows]`` fp32 is added to the scores: ``NO_SCORE`` where a head must not look.

    The products are made for each KV head and the ``G`` query heads that share it, all else for all heads at once. They are put
    together by ``assemble``, since ``concat`` forgets a valid shape, and the scores have one.
    """
    group, rows = dims.G, keys[0].shape[0]
    products = pypto.tensor([dims.NH, rows], pypto.DT_FP32, "products")
    for kv_head in range(dims.NKV):
        grouped = pypto.view(query, [group, dims.D], [kv_head * group, 0])
        product = pypto.matmul(grouped, keys[kv_head], pypto.DT_FP32, b_trans=True)
        pypto.assemble(product, [kv_head * group, 0], products)
    scores = pypto.mul(pypto.view(products, [dims.NH, rows], [0, 0], valid_shape=[dims.NH, valid]), dims.scale)
    if mask is not None:
        scores = pypto.add(scores, mask)
    largest = pypto.maximum(maximum, pypto.amax(scores, -1, True))
    exponentials = pypto.exp(pypto.sub(scores, largest))
    probabilities = pypto.cast(exponentials, pypto.DT_BF16)
    added = pypto.tensor([dims.NH, dims.D], pypto.DT_FP32, "added")
    for kv_head in range(dims.NKV):
        grouped = pypto.view(probabilities, [group, rows], [kv_head * group, 0], valid_shape=[group, valid])
        pypto.assemble(pypto.matmul(grouped, values[kv_head], pypto.DT_FP32), [kv_head * group, 0], added)
    shrink = pypto.exp(pypto.sub(maximum, largest))  # 0 at the first block, whose maximum so far is NO_SCORE
    total[:] = pypto.add(pypto.mul(total, shrink), pypto.sum(exponentials, -1, True))
    weighted[:] = pypto.add(pypto.mul(weighted, shrink), added)
    maximum[:] = largest


def attend_sequence(
    query: Tensor,
    length: Scalar,
    rows: int,
    rows_of: Callable[[Scalar], list[Scalar]],
    k_cache: Tensor,
    v_cache: Tensor,
    dims: Dims,
) -> Tensor:
    """Attention of one sequence, ``query [1, NH*D]`` bf16, over ``length`` rows of its own: ``[1, NH*D]`` bf16.

    They lie in blocks of ``rows``; ``rows_of(block)`` gives the cache row at which a block begins, for each KV head. As many
    blocks as the length needs are joined by a running softmax in fp32. Rows past the length are never part of a valid shape,
    whatever they hold.
    """
    set_cube_tiles(dims.G, max(dims.D, rows), max(dims.D, rows))
    # As wide as a block's scores: a valid shape must not end inside one of several tiles.
    pypto.set_vec_tile_shapes(FRACTAL, round_up(max(rows, dims.D), FRACTAL))
    query = pypto.reshape(query, [dims.NH, dims.D])
    maximum = pypto.tensor([dims.NH, 1], pypto.DT_FP32, "maximum")
    total = pypto.tensor([dims.NH, 1], pypto.DT_FP32, "total")
    weighted = pypto.tensor([dims.NH, dims.D], pypto.DT_FP32, "weighted")
    maximum[:] = pypto.full([dims.NH, 1], NO_SCORE, pypto.DT_FP32)
    total[:] = pypto.full([dims.NH, 1], 0.0, pypto.DT_FP32)
    weighted[:] = pypto.full([dims.NH, dims.D], 0.0, pypto.DT_FP32)
    for block in pypto.loop((length + rows - 1) // rows, name="BLOCK", idx_name="block"):
        valid = (length - block * rows).min(rows)
        starts = rows_of(block)
        keys, values = (
            [pypto.view(cache, [rows, dims.D], [start, 0], valid_shape=[valid, dims.D]) for start in starts]
            for cache in (k_cache, v_cache)
        )
        attend_block(query, keys, values, valid, maximum, total, weighted, dims)
    return pypto.reshape(pypto.cast(pypto.div(weighted, total), pypto.DT_BF16), [1, dims.NH * dims.D])


def attend(query: Tensor, seq_lens: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, dims: Dims, layer: Scalar = 0) -> None:
    """Attention of every sequence over its rows of ``layer`` in contiguous caches; ``query`` and ``out``: ``[B, NH*D]`` bf16."""
    rows = block_rows(dims)
    for b in pypto.loop(dims.B, name="SEQUENCE", idx_name="b"):

        def rows_of(block: Scalar, sequence: Scalar = b) -> list[Scalar]:
            return [first_row(dims, layer, sequence, kv_head) + block * rows for kv_head in range(dims.NKV)]

        queried = pypto.view(query, [1, dims.NH * dims.D], [b, 0])
        pypto.assemble(attend_sequence(queried, seq_lens[b], rows, rows_of, k_cache, v_cache, dims), [b, 0], out)


# One layer


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """The weights of ``L`` layers, stacked along the first axis, in the order of the contract's arguments."""

    input_rms_weight: Tensor  # [L, H] fp32
    wq: Tensor  # [L*H, NH*D] bf16
    wk: Tensor  # [L*H, NKV*D] bf16
    wv: Tensor  # [L*H, NKV*D] bf16
    q_norm_weight: Tensor  # [L, D] fp32
    k_norm_weight: Tensor  # [L, D] fp32
    wo: Tensor  # [L*NH*D, H] bf16
    w_gate: Tensor  # [L*H, I] bf16
    w_up: Tensor  # [L*H, I] bf16
    w_down: Tensor  # [L*I, H] bf16
    post_rms_weight: Tensor  # [L, H] fp32


def layer_rows(stacked: Tensor, layer: Scalar, rows: int = 1) -> Tensor:
    """The ``rows`` rows of one layer in a stacked weight.

    To be called where the slice is used. A slice that is taken before a loop and used after it is copied to the workspace,
    weights and all.
    """
    return pypto.view(stacked, [rows, stacked.shape[1]], [layer * rows, 0])


def write_current_rows(
    k: Tensor, v: Tensor, seq_lens: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims, layer: Scalar
) -> None:
    """Put ``k`` and ``v``, both ``[B, NKV*D]`` bf16, into the rows of the current positions of ``layer`` in contiguous caches.

    The rows do not depend on each other, so the loops are Python's, unrolled into one step.
    """
    head_dim = dims.D
    set_vector_tiles(1, dims.NKV * head_dim)
    for b in range(dims.B):
        for kv_head in range(dims.NKV):
            row = first_row(dims, layer, b, kv_head) + seq_lens[b] - 1
            pypto.assemble(pypto.view(k, [1, head_dim], [b, kv_head * head_dim]), [row, 0], k_cache)
            pypto.assemble(pypto.view(v, [1, head_dim], [b, kv_head * head_dim]), [row, 0], v_cache)


def before_attention(
    hidden_states: Tensor, weights: LayerWeights, dims: Dims, layer: Scalar = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer up to its projections: ``hidden_states [B, H]`` bf16 to q, k and v, ``[B, heads*D]`` fp32.

    A valid shape of fewer rows than ``dims.B`` passes on to them.
    """
    B, H, Q, KV = dims.B, dims.H, dims.NH * dims.D, dims.NKV * dims.D
    set_vector_tiles(B, H)
    hidden = pypto.cast(hidden_states, pypto.DT_FP32)
    x = pypto.cast(rms_norm(hidden, layer_rows(weights.input_rms_weight, layer), dims.eps), pypto.DT_BF16)
    set_cube_tiles(B, H, Q)
    q = pypto.matmul(x, layer_rows(weights.wq, layer, H), pypto.DT_FP32)
    set_cube_tiles(B, H, KV)
    k = pypto.matmul(x, layer_rows(weights.wk, layer, H), pypto.DT_FP32)
    v = pypto.matmul(x, layer_rows(weights.wv, layer, H), pypto.DT_FP32)
    return q, k, v


def after_attention(attended: Tensor, hidden_states: Tensor, weights: LayerWeights, dims: Dims, layer: Scalar = 0) -> Tensor:
    """A layer from its output projection on: ``attended [B, NH*D]`` and ``hidden_states [B, H]`` bf16 to the next ones, bf16.

    A valid shape of fewer rows than ``dims.B`` passes on to it.
    """
    B, H, I, Q = dims.B, dims.H, dims.I, dims.NH * dims.D  # noqa: E741  the contract's symbol
    set_vector_tiles(B, H)
    set_cube_tiles(B, Q, H)
    projected = pypto.matmul(attended, layer_rows(weights.wo, layer, Q), pypto.DT_FP32)
    residual = pypto.add(projected, pypto.cast(hidden_states, pypto.DT_FP32))
    y = pypto.cast(rms_norm(residual, layer_rows(weights.post_rms_weight, layer), dims.eps), pypto.DT_BF16)
    set_cube_tiles(B, H, I)
    gate = pypto.matmul(y, layer_rows(weights.w_gate, layer, H), pypto.DT_FP32)
    up = pypto.matmul(y, layer_rows(weights.w_up, layer, H), pypto.DT_FP32)
    set_vector_tiles(B, I)
    activation = gated(gate, up)
    set_cube_tiles(B, I, H)
    set_vector_tiles(B, H)
    branch = pypto.matmul(activation, layer_rows(weights.w_down, layer, I), pypto.DT_FP32)
    return pypto.cast(pypto.add(branch, residual), pypto.DT_BF16)


def decode_layer(
    hidden_states: Tensor,
    weights: LayerWeights,
    seq_lens: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    dims: Dims,
    layer: Scalar = 0,
) -> Tensor:
    """One layer: ``hidden_states [B, H]`` bf16 to the next ones, bf16; the caches get the row of the current position.

    bf16 where the contract rounds (both norms' results, q and k after the rotation, v, attention, the MLP's activation, the
    result) and in the probabilities; all else, the residual too, is fp32.
    """
    q, k, v = before_attention(hidden_states, weights, dims, layer)

    q = norm_heads(q, layer_rows(weights.q_norm_weight, layer), dims)
    k = norm_heads(k, layer_rows(weights.k_norm_weight, layer), dims)
    cos, sin = rope_rows(rope_cos, rope_sin, seq_lens, dims)
    q, k = rotate(q, cos, sin, dims), rotate(k, cos, sin, dims)
    set_vector_tiles(dims.B, dims.NKV * dims.D)
    write_current_rows(k, pypto.cast(v, pypto.DT_BF16), seq_lens, k_cache, v_cache, dims, layer)

    # Loops run after what stands before them, so every new row is in the cache when attention reads it.
    attended = pypto.tensor([dims.B, dims.NH * dims.D], pypto.DT_BF16, "attended")
    attend(q, seq_lens, k_cache, v_cache, attended, dims, layer)
    return after_attention(attended, hidden_states, weights, dims, layer)


# The vocabulary projection


def lm_head(hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, dims: Dims) -> Tensor:
    """Final norm and vocabulary projection: ``hidden [B, H]`` bf16 to logits ``[B, V]`` fp32.

    The norm is fp32 and its result rounded to bf16; the product with ``lm_head_weight [V, H]``, transposed as it is read,
    accumulates in fp32. One product for the whole vocabulary: its tiles are PyPTO's affair, and the last may be short. A valid
    shape of fewer rows than ``dims.B`` passes on to the logits.
    """
    set_vector_tiles(dims.B, dims.H)
    normalised = rms_norm(pypto.cast(hidden, pypto.DT_FP32), final_norm_weight, dims.eps)
    set_cube_tiles(dims.B, dims.H, dims.V)
    return pypto.matmul(pypto.cast(normalised, pypto.DT_BF16), lm_head_weight, pypto.DT_FP32, b_trans=True)


def column_numbers(count: int) -> Tensor:
    """``0, 1, ... count - 1`` as ``[1, count]`` fp32, which holds whole numbers exactly up to 2**24.

    One ``arange`` for each tile: if one spans several, PyPTO 0.2.0's pass ``InferParamIndex`` has every tile begin at the start.
    """
    parts = []
    for start in range(0, count, VECTOR_TILE_ELEMENTS):
        width = min(VECTOR_TILE_ELEMENTS, count - start)
        set_vector_tiles(width)
        numbers = pypto.cast(pypto.arange(start, start + width), pypto.DT_FP32)
        set_vector_tiles(1, width)
        parts.append(pypto.reshape(numbers, [1, width]))
    set_vector_tiles(1, count)
    return parts[0] if len(parts) == 1 else pypto.concat(parts, -1)


def first_largest(x: Tensor) -> Tensor:
    """The column of the largest value in every row of ``x [rows, columns]`` fp32, the lowest on a tie: ``[rows, 1]`` int32.

    The least of the numbers of those columns that equal the row's largest value. (``topk`` keeps no order among equal values.)
    """
    rows, columns = x.shape
    numbers = column_numbers(columns)
    set_vector_tiles(rows, columns)
    is_largest = pypto.eq(x, pypto.amax(x, -1, True))
    first = pypto.amin(pypto.where(is_largest, numbers, float(columns)), -1, True)
    set_vector_tiles(rows, 1)
    return pypto.cast(first, pypto.DT_INT32)


# Paged caches, and batches of a size known only when the program runs


def first_rows(x: Tensor, count: Scalar, capacity: int) -> Tensor:
    """``x [rows, columns]`` as a tile of ``capacity`` rows whose valid shape is the first ``count``.

    To be called where the rows are used: a slice that is taken before a loop and used after it is copied.
    """
    return pypto.view(x, [capacity, x.shape[1]], [0, 0], valid_shape=[count, x.shape[1]])


def page_row(dims: Dims, layer: Scalar, page: Scalar, kv_head: int) -> Scalar:
    """Row of offset 0 of a page in a paged cache ``[L*NB*NKV*BS, D]``."""
    return ((layer * dims.NB + page) * dims.NKV + kv_head) * dims.BS


@dataclasses.dataclass(frozen=True)
class PagedCache:
    """The paged caches of ``L`` layers, and where the sequences of a batch lie in them."""

    seq_lens: Tensor  # [batch] int32
    block_table: Tensor  # [batch*MB] int32
    k_cache: Tensor  # [L*NB*NKV*BS, D] bf16
    v_cache: Tensor


def write_slots(
    k: Tensor, v: Tensor, slot_mapping: Tensor, batch: Scalar, cache: PagedCache, dims: Dims, layer: Scalar = 0
) -> None:
    """Put the first ``batch`` rows of ``k`` and ``v``, both ``[B, NKV*D]`` bf16, into their slots of ``layer``.

    Several rows a trip, as they do not depend on each other: eight, then four, two and one of what is left.
    """
    for first, rows in pypto.loop_unroll(0, batch, 1, name="WRITE", idx_name="first", unroll_list=[8, 4, 2, 1]):
        set_vector_tiles(1, dims.NKV * dims.D)
        for index in range(rows):
            b = first + index
            page, offset = slot_mapping[b] // dims.BS, slot_mapping[b] % dims.BS
            for kv_head in range(dims.NKV):
                row = page_row(dims, layer, page, kv_head) + offset
                pypto.assemble(pypto.view(k, [1, dims.D], [b, kv_head * dims.D]), [row, 0], cache.k_cache)
                pypto.assemble(pypto.view(v, [1, dims.D], [b, kv_head * dims.D]), [row, 0], cache.v_cache)


def attend_pages(query: Tensor, sequence: Scalar, cache: PagedCache, dims: Dims, layer: Scalar = 0) -> Tensor:
    """Attention of one sequence, ``query [1, NH*D]`` bf16, over its pages of ``layer``: ``[1, NH*D]`` bf16.

    A page at a time: ``block_table`` is read once for each page that holds a row of the sequence, and nowhere else, since what
    follows there is no page. (Several pages a step would need them side by side, and so a copy of what attention reads.)
    """

    def rows_of(page: Scalar) -> list[Scalar]:
        physical = cache.block_table[sequence * dims.MB + page]
        return [page_row(dims, layer, physical, kv_head) for kv_head in range(dims.NKV)]

    length = cache.seq_lens[sequence]
    return attend_sequence(query, length, dims.BS, rows_of, cache.k_cache, cache.v_cache, dims)


def paged_decode_layer(
    hidden_states: Tensor,
    batch: Scalar,
    weights: LayerWeights,
    slot_mapping: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    cache: PagedCache,
    dims: Dims,
    layer: Scalar = 0,
) -> Tensor:
    """One layer for ``batch`` sequences, ``dims.B`` at most, on paged caches, which get the row of each one's slot.

    ``hidden_states`` has ``batch`` rows at least, bf16; the result is ``[B, H]`` bf16 with a valid shape of ``batch`` rows.
    Roundings are those of ``decode_layer``.

    Norms, rotation and casts run on the whole tile, the rows past the batch cleared. What has a place or a length of its own, the
    cache rows and attention, is done in loops over the sequences. Sequences may share pages, but no one writes where another
    reads.
    """
    q, k, v = before_attention(first_rows(hidden_states, batch, dims.B), weights, dims, layer)
    set_vector_tiles(dims.B, dims.NH * dims.D)
    q, k = pypto.fillpad(q), pypto.fillpad(k)
    q = norm_heads(q, layer_rows(weights.q_norm_weight, layer), dims)
    k = norm_heads(k, layer_rows(weights.k_norm_weight, layer), dims)
    cos, sin = rope_rows(rope_cos, rope_sin, cache.seq_lens, dims, batch)
    q, k = rotate(q, cos, sin, dims), rotate(k, cos, sin, dims)
    set_vector_tiles(dims.B, dims.NKV * dims.D)
    v = pypto.cast(v, pypto.DT_BF16)

    write_slots(k, v, slot_mapping, batch, cache, dims, layer)

    # Loops run one after another, so every new row is in the cache when attention reads it.
    attended = pypto.tensor([dims.B, dims.NH * dims.D], pypto.DT_BF16, "attended")
    for b in pypto.loop(batch, name="SEQUENCE", idx_name="b"):
        queried = pypto.view(q, [1, dims.NH * dims.D], [b, 0])
        pypto.assemble(attend_pages(queried, b, cache, dims, layer), [b, 0], attended)
    return after_attention(first_rows(attended, batch, dims.B), first_rows(hidden_states, batch, dims.B), weights, dims, layer)


# Prefill: several new tokens of a sequence at a time


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The new tokens of a batch, packed: the chunks of its sequences one after another, in any order."""

    chunk_lens: Tensor  # [batch] int32
    chunk_offsets: Tensor  # [batch] int32, the row of each chunk's first token
    slot_mapping: Tensor  # [T] int32


@dataclasses.dataclass(frozen=True)
class Tile:
    """``tile_tokens`` tokens at most of one sequence's chunk, all on one page of its cache."""

    sequence: Scalar
    row: Scalar  # where its first token is among the packed ones
    position: Scalar  # and in its sequence
    count: Scalar


def tile_tokens(dims: Dims) -> int:
    """Tokens that a prefill takes through a layer at a time: a cube tile's least rows, or fewer so that they divide a page."""
    return max(tokens for tokens in range(1, FRACTAL + 1) if dims.BS % tokens == 0)


def tiles_of(chunks: Chunks, cache: PagedCache, dims: Dims) -> Iterator[Tile]:
    """Loop over the tiles of every sequence's chunk, in order.

    Tiles begin and end at multiples of ``tile_tokens`` in their sequence, or with the chunk, so each lies on one page. A token
    attends to none of a later tile, so a tile can go through all layers before the next begins.
    """
    tokens = tile_tokens(dims)
    for b in pypto.loop(cache.seq_lens.shape[0], name="SEQUENCE", idx_name="b"):
        end = cache.seq_lens[b]
        start = end - chunks.chunk_lens[b]
        for index in pypto.loop(start // tokens, (end + tokens - 1) // tokens, name="TILE", idx_name="tile"):
            position = (index * tokens).max(start)
            count = (index * tokens + tokens).min(end) - position
            yield Tile(b, chunks.chunk_offsets[b] + position - start, position, count)


def read_tile(hidden_states: Tensor, tile: Tile, dims: Dims) -> Tensor:
    """A tile's rows of ``hidden_states [T, H]``, and zeros up to ``tile_tokens`` rows.

    Whatever is computed of the zeros stays in their rows, so all that follows has full shapes; ``write_rows`` leaves them out.
    """
    tokens = tile_tokens(dims)
    set_vector_tiles(tokens, dims.H)
    rows = pypto.view(hidden_states, [tokens, dims.H], [tile.row, 0], valid_shape=[tile.count, dims.H])
    return pypto.fillpad(rows, "constant", 0.0)


def write_rows(x: Tensor, count: Scalar, starts: list[Scalar], target: Tensor) -> None:
    """Put the first ``count`` rows of ``x [rows, n*width]`` into ``target [..., width]``: each of ``n`` blocks of columns at its
    row of ``starts``.

    A single block is cut into equal parts, as few as can be. Of a view as wide as the tensor it is cut from, PyPTO 0.2.0 forgets
    the valid shape (and writes all rows) or the offset, according to the tiles (passes ``InferParamIndex`` and
    ``RemoveRedundantOp``). Blocks, and the parts of a single one, must be multiples of ``BLOCK_BYTES`` wide, and as wide as one
    another: of others, values are lost when code is generated.
    """
    rows, width = x.shape[0], x.shape[1] // len(starts)
    units = width // (BLOCK_BYTES // 2)
    parts = 1 if len(starts) > 1 else next(parts for parts in range(2, units + 1) if units % parts == 0)
    columns = width // parts
    for block in range(len(starts) * parts):
        used = pypto.view(x, [rows, columns], [0, block * columns], valid_shape=[count, columns])
        pypto.assemble(used, [starts[block // parts], block % parts * columns], target)


def causal_mask(dims: Dims) -> Tensor:
    """A mask ``[NH * tile_tokens, 2 * BS]`` fp32 that serves every tile and page: head by head, a row for each token of a tile.

    Columns ``BS - 1 - d`` and on are the mask of a page that begins ``d`` positions before the tile does: token ``t`` may look at
    the page's offsets up to ``t + d``. It is made once and cut at an offset known only when the program runs, because
    ``pypto.tril`` with such a diagonal cannot be interpreted after pass ``InferParamIndex``.
    """
    tokens, columns = tile_tokens(dims), 2 * dims.BS
    set_vector_tiles(tokens)
    token = pypto.cast(pypto.arange(tokens), pypto.DT_FP32)
    column = column_numbers(columns)
    set_vector_tiles(tokens, columns)
    ahead = pypto.sub(column, pypto.add(pypto.reshape(token, [tokens, 1]), float(dims.BS - 1)))
    one_head = pypto.mul(pypto.minimum(pypto.maximum(ahead, 0.0), 1.0), NO_SCORE)
    mask = pypto.tensor([dims.NH * tokens, columns], pypto.DT_FP32, "mask")
    for head in range(dims.NH):
        pypto.assemble(one_head, [head * tokens, 0], mask)
    return mask


def attend_tile(query: Tensor, tile: Tile, mask: Tensor, cache: PagedCache, dims: Dims, layer: Scalar = 0) -> Tensor:
    """Causal attention of a tile over its sequence's pages of ``layer``: ``query [tile_tokens, NH*D]`` bf16, the result likewise.

    The tokens of a head count as heads of their own that share its KV head, so that a page is one product for each KV head. Pages
    up to the tile's own, one at a time; of the last, the rows up to the tile's last token are its valid shape.
    """
    tokens = tile_tokens(dims)
    many = dims.replace(NH=dims.NH * tokens)
    set_vector_tiles(tokens, dims.D)
    queries = pypto.tensor([many.NH, dims.D], pypto.DT_BF16, "queries")
    for head in range(dims.NH):
        pypto.assemble(pypto.view(query, [tokens, dims.D], [0, head * dims.D]), [head * tokens, 0], queries)

    widest = max(dims.BS, dims.D)
    set_cube_tiles(many.G, widest, widest)
    set_vector_tiles(many.NH, widest)  # as wide as a page's scores: a valid shape must not end inside one of several tiles
    maximum = pypto.tensor([many.NH, 1], pypto.DT_FP32, "maximum")
    total = pypto.tensor([many.NH, 1], pypto.DT_FP32, "total")
    weighted = pypto.tensor([many.NH, dims.D], pypto.DT_FP32, "weighted")
    maximum[:] = pypto.full([many.NH, 1], NO_SCORE, pypto.DT_FP32)
    total[:] = pypto.full([many.NH, 1], 0.0, pypto.DT_FP32)
    weighted[:] = pypto.full([many.NH, dims.D], 0.0, pypto.DT_FP32)
    for page in pypto.loop(tile.position // dims.BS + 1, name="PAGE", idx_name="page"):
        before = tile.position - page * dims.BS
        valid = (before + tile.count).min(dims.BS)
        physical = cache.block_table[tile.sequence * dims.MB + page]
        keys, values = (
            [
                pypto.view(pages, [dims.BS, dims.D], [page_row(dims, layer, physical, head), 0], valid_shape=[valid, dims.D])
                for head in range(dims.NKV)
            ]
            for pages in (cache.k_cache, cache.v_cache)
        )
        visible = pypto.view(mask, [many.NH, dims.BS], [0, (dims.BS - 1 - before).max(0)], valid_shape=[many.NH, valid])
        attend_block(queries, keys, values, valid, maximum, total, weighted, many, visible)

    result = pypto.cast(pypto.div(weighted, total), pypto.DT_BF16)
    attended = pypto.tensor([tokens, dims.NH * dims.D], pypto.DT_BF16, "attended")
    set_vector_tiles(tokens, dims.D)
    for head in range(dims.NH):
        pypto.assemble(pypto.view(result, [tokens, dims.D], [head * tokens, 0]), [0, head * dims.D], attended)
    return attended


def prefill_tile(
    hidden: Tensor,
    tile: Tile,
    mask: Tensor,
    weights: LayerWeights,
    slot_mapping: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    cache: PagedCache,
    dims: Dims,
    layer: Scalar = 0,
) -> Tensor:
    """One layer for a tile: ``hidden [tile_tokens, H]`` bf16 to the next ones, bf16; past ``tile.count`` rows they mean nothing.

    The caches get the rows of the tile's slots. Roundings are those of ``decode_layer``.
    """
    tokens, half = tile_tokens(dims), dims.D // 2
    shape = dims.replace(B=tokens)
    q, k, v = before_attention(hidden, weights, shape, layer)
    q = norm_heads(q, layer_rows(weights.q_norm_weight, layer), shape)
    k = norm_heads(k, layer_rows(weights.k_norm_weight, layer), shape)
    set_vector_tiles(tokens, half)
    cos, sin = (
        pypto.fillpad(pypto.view(table, [tokens, half], [tile.position, 0], valid_shape=[tile.count, half]), "constant", 0.0)
        for table in (rope_cos, rope_sin)
    )
    cos, sin = pypto.reshape(cos, [tokens, 1, half]), pypto.reshape(sin, [tokens, 1, half])
    q, k = rotate(q, cos, sin, shape), rotate(k, cos, sin, shape)
    set_vector_tiles(tokens, dims.NKV * dims.D)
    v = pypto.cast(v, pypto.DT_BF16)
    # Slots on one page follow one another.
    slot = slot_mapping[tile.row]
    starts = [page_row(dims, layer, slot // dims.BS, kv_head) + slot % dims.BS for kv_head in range(dims.NKV)]
    write_rows(k, tile.count, starts, cache.k_cache)
    write_rows(v, tile.count, starts, cache.v_cache)
    # The loop over pages runs after what stands before it, so the new rows are there to be read.
    attended = attend_tile(q, tile, mask, cache, dims, layer)
    return after_attention(attended, hidden, weights, shape, layer)
