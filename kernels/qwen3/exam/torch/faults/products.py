"""Faults of matrix products: wrong operands, lost parts of a sum over K, narrower formats."""

from __future__ import annotations

import itertools

import torch

from conformance.kernels.qwen3.exam.torch.helpers import FP8, FP16, TILE, changed, rounded, total_of
from conformance.kernels.qwen3.exam.torch.hooks import ATTENTIONS, CONTIGUOUS_LAYERS, PRODUCTS, fault
from conformance.kernels.qwen3.exam.torch.operations import BF16, truncated

Tensor = torch.Tensor


# Products: operands


@fault("operands", "dependency", *PRODUCTS)
def first_k_tile_missing(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The first tile of a sum over K is missing: the loop starts at the second."""
    return x[:, TILE:], weight[TILE:]


@fault("operands", "dependency", *PRODUCTS)
def k_tile_read_twice(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The second tile of activations is still the first one: the copy was not waited for."""
    return (changed(x, (slice(None), slice(TILE, 2 * TILE)), x[:, :TILE]) if x.shape[1] >= 2 * TILE else x), weight


@fault("operands", "dependency", *PRODUCTS)
def weight_tile_read_twice(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The second tile of weights is still the first one: one buffer where two are needed."""
    return x, (changed(weight, (slice(TILE, 2 * TILE),), weight[:TILE]) if len(weight) >= 2 * TILE else weight)


@fault("operands", "value", *PRODUCTS)
def last_k_tile_twice(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The last tile of a sum over K is added twice."""
    return torch.cat([x, x[:, -TILE:]], 1), torch.cat([weight, weight[-TILE:]])


@fault("operands", "dependency", *PRODUCTS)
def k_tail_dropped(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over K ends with the last whole tile of 48, as if K were a multiple of it."""
    whole = x.shape[1] // 48 * 48
    return x[:, :whole], weight[:whole]


@fault("operands", "dependency", *PRODUCTS)
def last_k_missing(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The loop over K ends one too early."""
    return x[:, :-1], weight[:-1]


@fault("operands", "dependency", *PRODUCTS)
def k_beyond_half_dropped(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where K is long only its first half is summed."""
    half = x.shape[1] // 2
    return (x[:, :half], weight[:half]) if half >= 128 else (x, weight)


@fault("operands", "indexing", *PRODUCTS)
def weight_rows_shifted(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight is read one row off."""
    return x, weight.roll(1, 0)


@fault("operands", "indexing", *PRODUCTS)
def k_tiles_of_weight_exchanged(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The first two tiles of the weight's rows are exchanged."""
    return x, torch.cat([weight[TILE : 2 * TILE], weight[:TILE], weight[2 * TILE :]])


@fault("operands", "indexing", *PRODUCTS)
def n_tiles_of_weight_exchanged(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The first two tiles of the weight's columns are exchanged."""
    return x, torch.cat([weight[:, TILE : 2 * TILE], weight[:, :TILE], weight[:, 2 * TILE :]], 1)


@fault("operands", "indexing", *PRODUCTS)
def weight_column_repeated(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight's last column is a copy of the one before."""
    return x, changed(weight, (slice(None), slice(-1, None)), weight[:, -2:][:, :1])


@fault("operands", "indexing", *PRODUCTS)
def last_row_of_activations_repeated(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The last row of activations is loaded from the row before it."""
    return (torch.cat([x[:-1], x[-2:-1]]), weight) if x.shape[0] > 1 else (x, weight)


@fault("operands", "precision", *PRODUCTS)
def weights_in_fp8(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights were quantised to fp8."""
    return x, rounded(weight, FP8)


@fault("operands", "precision", *PRODUCTS)
def weights_in_int8(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights were quantised to int8, one scale for all of them."""
    step = weight.abs().max() / 127
    return x, (weight / step).round() * step


@fault("operands", "precision", *PRODUCTS)
def activations_in_fp8(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Activations are quantised to fp8 with a scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
    return rounded(x / scale, FP8) * scale, weight


@fault("operands", "precision", "qkv_proj", "o_proj", "mlp", detectors=("not_finite", "element"))
def activations_in_fp16(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Activations are converted from bf16 to fp16, which overflows at 65504."""
    return rounded(x, FP16), weight


# Products: the sum


@fault("sum", "precision", *PRODUCTS[:4])
def fp16_accumulation(x: Tensor, weight: Tensor) -> Tensor:
    """Partial sums are kept in fp16."""
    total = torch.zeros(x.shape[0], weight.shape[1], dtype=FP16)
    for low in range(0, x.shape[1], TILE):
        total = (total.float() + x[:, low : low + TILE] @ weight[low : low + TILE]).to(FP16)
    return total.float()


def _parts(x: Tensor, weight: Tensor, count: int) -> list[Tensor]:
    bounds = [x.shape[1] * part // count for part in range(count + 1)]
    return [x[:, low:high] @ weight[low:high] for low, high in itertools.pairwise(bounds)]


@fault("sum", "precision", *PRODUCTS[:4])
def splits_in_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """Split-K stores its four partial sums in bf16."""
    return total_of([rounded(part, BF16) for part in _parts(x, weight, 4)])


@fault("sum", "precision", *PRODUCTS[:4])
def half_sum_in_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """The accumulator is spilled to bf16 once, half way through K."""
    first, second = _parts(x, weight, 2)
    return rounded(first, BF16) + second


@fault("sum", "dependency", *PRODUCTS)
def one_split_missing(x: Tensor, weight: Tensor) -> Tensor:
    """One of four parts of split-K is not waited for."""
    parts = _parts(x, weight, 4)
    return total_of([*parts[:2], parts[3]])


@fault("sum", "dependency", *PRODUCTS)
def only_last_split_kept(x: Tensor, weight: Tensor) -> Tensor:
    """The parts of split-K overwrite each other instead of being added."""
    return _parts(x, weight, 4)[-1]


@fault("sum", "dependency", *PRODUCTS)
def only_last_k_tile_kept(x: Tensor, weight: Tensor) -> Tensor:
    """The loop over K does not carry its accumulator: only the last tile remains."""
    return x[:, -TILE:] @ weight[-TILE:]


@fault("sum", "dependency", *PRODUCTS)
def accumulator_not_reset(x: Tensor, weight: Tensor) -> Tensor:
    """The accumulator is not cleared between two tiles of columns."""
    product = x @ weight
    half = product.shape[1] // 2
    return torch.cat([product[:, :half], product[:, half : 2 * half] + product[:, :half], product[:, 2 * half :]], 1)


@fault("sum", "dependency", *PRODUCTS)
def accumulator_carried_to_the_next_row(x: Tensor, weight: Tensor) -> Tensor:
    """The accumulator is not cleared between rows."""
    return (x @ weight).cumsum(0)


@fault("sum", "value", *PRODUCTS)
def partial_sums_averaged(x: Tensor, weight: Tensor) -> Tensor:
    """The parts of split-K are averaged."""
    return total_of(_parts(x, weight, 2)) / 2


@fault("sum", "precision", *PRODUCTS[:4])
def products_truncated(x: Tensor, weight: Tensor) -> Tensor:
    """The accumulator drops its low bits when it is moved, as a cast to bf16 by shifting does."""
    return truncated(x @ weight)


@fault(
    "sum", "precision", "qkv_proj", *ATTENTIONS, "o_proj", "mlp", "lm_head", *CONTIGUOUS_LAYERS, detectors=("element", "spread")
)
def bf16_accumulation(x: Tensor, weight: Tensor) -> Tensor:
    """Partial sums are kept in bf16."""
    total = torch.zeros(x.shape[0], weight.shape[1], dtype=BF16)
    for low in range(0, x.shape[1], TILE):
        total = (total.float() + x[:, low : low + TILE] @ weight[low : low + TILE]).to(BF16)
    return total.float()


@fault("sum", "dependency", *PRODUCTS, "decode_fwd_layers")
def last_k_tile_missing(x: Tensor, weight: Tensor) -> Tensor:
    """The last tile of a sum over K is not waited for and missing."""
    return x[:, : x.shape[1] - TILE] @ weight[: x.shape[1] - TILE]
