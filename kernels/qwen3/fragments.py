"""Pieces that several Qwen3 kernels share: tile shapes, the norm, the rotation, attention by blocks, a whole layer.

These are ordinary Python functions. A kernel calls them while PyPTO traces it, so whatever they compute becomes part of that
kernel's program; integers, ``range`` and lists are gone by then, and only tensors, ``pypto.loop`` and symbolic scalars stay.

Importing this module imports PyPTO, so kernels do it inside their builders: they can then be listed where PyPTO is missing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pypto

from conformance.contract import Dims

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


def rope_rows(rope_cos: Tensor, rope_sin: Tensor, seq_lens: Tensor, dims: Dims) -> tuple[Tensor, Tensor]:
    """The table rows of every sequence's current position, ``seq_lens - 1``: two ``[B, 1, D/2]`` fp32.

    The two halves of a table row are equal, so the first is enough.
    """
    set_vector_tiles(dims.B)
    position = pypto.sub(seq_lens, 1)
    half = dims.D // 2
    set_vector_tiles(dims.B, dims.D)
    cos = pypto.view(pypto.index_select(rope_cos, 0, position), [dims.B, half], [0, 0])
    sin = pypto.view(pypto.index_select(rope_sin, 0, position), [dims.B, half], [0, 0])
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
    """``silu(gate) * up`` in fp32, then one cast to bf16: ``[B, I]``."""
    return pypto.cast(pypto.mul(pypto.mul(gate, pypto.sigmoid(gate)), up), pypto.DT_BF16)


# Attention


def block_rows(dims: Dims) -> int:
    """Cache rows that attention reads at a time: four pages' worth, at most 512 (of Qwen3-14B, 128 KB each of keys and values).

    A vector tile spans a block's scores, so more rows would not fit the unified buffer.
    """
    return min(4 * dims.BS, 512, dims.S)


def first_row(dims: Dims, layer: Scalar, sequence: Scalar, kv_head: int) -> Scalar:
    """Row of position 0 in a contiguous cache ``[L*B*NKV*S, D]``."""
    return ((layer * dims.B + sequence) * dims.NKV + kv_head) * dims.S


def stack_rows(parts: list[Tensor]) -> Tensor:
    """The parts one below the other."""
    return parts[0] if len(parts) == 1 else pypto.concat(parts, 0)


def attend_block(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    maximum: Tensor,
    total: Tensor,
    weighted: Tensor,
    dims: Dims,
) -> None:
    """Extend the running softmax of one sequence's heads by one block of cache rows.

    ``query [1, NH*D]`` bf16 is the sequence's; ``keys`` and ``values`` hold the block's ``[rows, D]`` bf16 of each KV head, whose
    valid shape ends where the sequence does. ``maximum [NH, 1]``, ``total [NH, 1]`` and ``weighted [NH, D]`` fp32 are
    what the blocks before left, and are updated: the largest score, and relative to it the sum of the exponentials and of the
    values weighted by them.

    The products are made for each KV head and the ``G`` query heads that share it; what combines them with earlier blocks is
    done for all heads at once. Only there are heads put together: ``concat`` forgets a valid shape, and the scores have one.
    """
    group, head_dim = dims.G, dims.D
    maxima, totals, weighteds = [], [], []
    for kv_head in range(dims.NKV):
        grouped = pypto.reshape(pypto.view(query, [1, group * head_dim], [0, kv_head * group * head_dim]), [group, head_dim])
        scores = pypto.mul(pypto.matmul(grouped, keys[kv_head], pypto.DT_FP32, b_trans=True), dims.scale)
        before = pypto.view(maximum, [group, 1], [kv_head * group, 0])
        largest = pypto.maximum(before, pypto.amax(scores, -1, True))
        exponentials = pypto.exp(pypto.sub(scores, largest))
        maxima.append(largest)
        totals.append(pypto.sum(exponentials, -1, True))
        probabilities = pypto.cast(exponentials, pypto.DT_BF16)
        weighteds.append(pypto.matmul(probabilities, values[kv_head], pypto.DT_FP32))
    largest = stack_rows(maxima)
    shrink = pypto.exp(pypto.sub(maximum, largest))  # 0 at the first block, whose maximum so far is NO_SCORE
    total[:] = pypto.add(pypto.mul(total, shrink), stack_rows(totals))
    weighted[:] = pypto.add(pypto.mul(weighted, shrink), stack_rows(weighteds))
    maximum[:] = largest


def attend(query: Tensor, seq_lens: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, dims: Dims, layer: Scalar = 0) -> None:
    """Attention of every sequence over its rows of ``layer`` in contiguous caches; ``query`` and ``out`` are ``[B, NH*D]`` bf16.

    Blocks of ``block_rows`` rows, as many as the sequence needs, joined by a running softmax in fp32. Rows past the length are
    never part of a valid shape, whatever they hold.
    """
    width, rows = dims.NH * dims.D, block_rows(dims)
    set_cube_tiles(dims.G, max(dims.D, rows), max(dims.D, rows))
    for b in pypto.loop(dims.B, name="SEQUENCE", idx_name="b"):
        # As wide as a block's scores: a valid shape must not end inside one of several tiles.
        pypto.set_vec_tile_shapes(FRACTAL, round_up(max(rows, dims.D), FRACTAL))
        length = seq_lens[b]
        maximum = pypto.tensor([dims.NH, 1], pypto.DT_FP32, "maximum")
        total = pypto.tensor([dims.NH, 1], pypto.DT_FP32, "total")
        weighted = pypto.tensor([dims.NH, dims.D], pypto.DT_FP32, "weighted")
        maximum[:] = pypto.full([dims.NH, 1], NO_SCORE, pypto.DT_FP32)
        total[:] = pypto.full([dims.NH, 1], 0.0, pypto.DT_FP32)
        weighted[:] = pypto.full([dims.NH, dims.D], 0.0, pypto.DT_FP32)
        for block in pypto.loop((length + rows - 1) // rows, name="BLOCK", idx_name="block"):
            start = block * rows
            valid = (length - start).min(rows)
            keys, values = (
                [
                    pypto.view(
                        cache, [rows, dims.D], [first_row(dims, layer, b, kv_head) + start, 0], valid_shape=[valid, dims.D]
                    )
                    for kv_head in range(dims.NKV)
                ]
                for cache in (k_cache, v_cache)
            )
            attend_block(pypto.view(query, [1, width], [b, 0]), keys, values, maximum, total, weighted, dims)
        attended = pypto.cast(pypto.div(weighted, total), pypto.DT_BF16)
        pypto.assemble(pypto.reshape(attended, [1, width]), [b, 0], out)


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
    wo: Tensor  # [L*H, H] bf16
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
    B, H, I, KV = dims.B, dims.H, dims.I, dims.NKV * dims.D  # noqa: E741  the contract's symbol

    set_vector_tiles(B, H)
    hidden = pypto.cast(hidden_states, pypto.DT_FP32)
    x = pypto.cast(rms_norm(hidden, layer_rows(weights.input_rms_weight, layer), dims.eps), pypto.DT_BF16)
    set_cube_tiles(B, H, H)
    q = pypto.matmul(x, layer_rows(weights.wq, layer, H), pypto.DT_FP32)
    set_cube_tiles(B, H, KV)
    k = pypto.matmul(x, layer_rows(weights.wk, layer, H), pypto.DT_FP32)
    v = pypto.matmul(x, layer_rows(weights.wv, layer, H), pypto.DT_FP32)

    q = norm_heads(q, layer_rows(weights.q_norm_weight, layer), dims)
    k = norm_heads(k, layer_rows(weights.k_norm_weight, layer), dims)
    cos, sin = rope_rows(rope_cos, rope_sin, seq_lens, dims)
    q, k = rotate(q, cos, sin, dims), rotate(k, cos, sin, dims)
    set_vector_tiles(B, KV)
    write_current_rows(k, pypto.cast(v, pypto.DT_BF16), seq_lens, k_cache, v_cache, dims, layer)

    # Loops run after what stands before them, so every new row is in the cache when attention reads it.
    attended = pypto.tensor([B, H], pypto.DT_BF16, "attended")
    attend(q, seq_lens, k_cache, v_cache, attended, dims, layer)

    set_vector_tiles(B, H)
    set_cube_tiles(B, H, H)
    projected = pypto.matmul(attended, layer_rows(weights.wo, layer, H), pypto.DT_FP32)
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
