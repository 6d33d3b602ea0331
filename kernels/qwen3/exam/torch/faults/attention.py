"""Faults of attention's arithmetic: scale, scores, mask, softmax and its parts."""

from __future__ import annotations

import math
from typing import Any

import torch

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.torch.helpers import FP8, FP16, TILE, changed, rounded, total_of
from conformance.kernels.qwen3.exam.torch.hooks import (
    ALL_LAYERS,
    ATTENTIONS,
    CONTIGUOUS_LAYERS,
    LAYERS_OF_EACH_KIND,
    SIGNATURES,
    fault,
)
from conformance.kernels.qwen3.exam.torch.operations import BF16, Part, truncated

Tensor = torch.Tensor

_ONLINE: dict[str, Any] = {"block": 16}


# Scale, scores, softmax

_SCORES = (*ATTENTIONS, "decode_layer")


@fault("scale", "value", *_SCORES)
def scale_twice(dims: Dims) -> float:
    """Scores are scaled twice, once in q and once again: by 1/D."""
    return 1 / dims.D


@fault("scale", "value", *_SCORES)
def scale_of_the_hidden_size(dims: Dims) -> float:
    """Scores are scaled by the root of the hidden size instead of the head dim."""
    return 1 / math.sqrt(dims.H)


@fault("scale", "value", *_SCORES)
def scale_inverted(dims: Dims) -> float:
    """Scores are multiplied by the root of D instead of divided."""
    return math.sqrt(dims.D)


@fault("scale", "value", *_SCORES, dims={"preset": "awkward"})
def scale_of_128(dims: Dims) -> float:
    """The scale is a constant, that of a head dim of 128."""
    return 1 / math.sqrt(128)


@fault("scale", "value", *_SCORES)
def scale_negative(dims: Dims) -> float:
    """Scores have the wrong sign."""
    return -1 / math.sqrt(dims.D)


@fault("scores", "value", *ATTENTIONS, detectors=("bias",))
def scores_capped(z: Tensor) -> Tensor:
    """Scores are capped softly at 50, as another model's are."""
    return 50 * torch.tanh(z / 50)


@fault("scores", "value", *ATTENTIONS)
def scores_clamped(z: Tensor) -> Tensor:
    """Scores are clamped to 60 so that exp does not overflow."""
    return z.clamp_max(60)


@fault("scores", "value", *_SCORES)
def scores_biased_by_position(z: Tensor) -> Tensor:
    """Scores grow with the position, as ALiBi's do."""
    return z + 0.05 * torch.arange(z.shape[1])


@fault("scores", "precision", *ATTENTIONS)
def scores_in_fp16(z: Tensor) -> Tensor:
    """Scores are kept in fp16."""
    return rounded(z, FP16)


@fault("exponential", "value", *_SCORES)
def exp_of_base_2(x: Tensor) -> Tensor:
    """exp2 is used without log2(e) in the scale."""
    return torch.exp2(x)


@fault("exponential", "precision", *_SCORES)
def exp_by_squaring(x: Tensor) -> Tensor:
    """exp(x) is (1 + x/64)**64."""
    return (1 + x / 64).clamp_min(0) ** 64


@fault("exponential", "precision", *_SCORES)
def exp_by_bits(x: Tensor) -> Tensor:
    """exp(x) is a bit trick, linear between powers of two."""
    scaled = (x * math.log2(math.e)).clamp_min(-126)
    whole = scaled.floor()
    return torch.exp2(whole) * (1 + scaled - whole)


@fault("exponential", "precision", *ATTENTIONS)
def exp_of_rounded_argument(x: Tensor) -> Tensor:
    """The argument of exp is rounded to bf16."""
    return torch.exp(rounded(x, BF16))


@fault("exponential", "value", *_SCORES)
def exp_clamped_from_below(x: Tensor) -> Tensor:
    """The argument of exp is clamped to -4, so that nothing vanishes."""
    return torch.exp(x.clamp_min(-4))


@fault("probabilities", "precision", *_SCORES, detectors=("element", "spread"))
def probabilities_in_fp8(p: Tensor) -> Tensor:
    """Probabilities are kept in fp8."""
    return rounded(p, FP8)


@fault("probabilities", "precision", *ATTENTIONS)
def probabilities_truncated(p: Tensor) -> Tensor:
    """The cast of probabilities to bf16 truncates."""
    return truncated(p)


@fault("probabilities", "value", *_SCORES)
def dropout_left_on(p: Tensor) -> Tensor:
    """Dropout is left on: every tenth probability is zero and the others larger."""
    return p * (torch.arange(p.shape[1]) % 10 != 3) / 0.9


@fault("probabilities", "value", *_SCORES)
def small_probabilities_dropped(p: Tensor) -> Tensor:
    """Probabilities below a hundredth of the largest are dropped."""
    return torch.where(p < 0.01, 0.0, p)


@fault("mask", "value", *_SCORES, whole_page="replace")
def masked_by_minus_100(z: Tensor, hidden: Tensor, masked: Tensor) -> Tensor:
    """The mask subtracts 100, which a large score survives."""
    return z - 100 * hidden


@fault("mask", "indexing", *_SCORES, whole_page="replace")
def mask_one_too_late(z: Tensor, hidden: Tensor, masked: Tensor) -> Tensor:
    """The mask starts one key too late."""
    return torch.where(hidden & hidden.roll(1, 1), masked, z)


@fault("mask", "indexing", *_SCORES, whole_page="replace")
def mask_one_too_early(z: Tensor, hidden: Tensor, masked: Tensor) -> Tensor:
    """The mask starts one key too early."""
    early = hidden | hidden.roll(-1, 1)
    return torch.where(early & ~early.all(1, keepdim=True), masked.amin(), masked)


@fault("mask", "indexing", *_SCORES, whole_page="replace")
def mask_by_blocks_of_8(z: Tensor, hidden: Tensor, masked: Tensor) -> Tensor:
    """Masked keys are those of a whole block of 8: the rest of a partial block is seen."""
    whole = hidden.view(hidden.shape[0], -1, hidden.shape[1] // 8, 8) if hidden.shape[1] % 8 == 0 else hidden[..., None, None]
    kept = whole.all(-1, keepdim=True).expand(whole.shape).reshape(hidden.shape)
    return torch.where(kept, masked, z)


@fault("mask", "robustness", *ATTENTIONS, whole_page="replace", block=8, detectors=("not_finite",))
def masked_block_is_nan(z: Tensor, hidden: Tensor, masked: Tensor) -> Tensor:
    """Masked scores are minus infinity, and a block that is wholly masked subtracts two infinities."""
    # In such a block the running maximum is that of the blocks before; visited first it would be minus infinity.
    whole = hidden.unfold(1, 8, 8).all(-1) if hidden.shape[1] >= 8 else hidden[:, :0]
    return torch.where(whole.any(1, keepdim=True) & hidden, torch.nan, masked)


# Online softmax and its parts


@fault("rescale", "dependency", *_SCORES, **_ONLINE)
def denominator_not_rescaled(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the denominator is not rescaled when the maximum grows."""
    return (torch.ones_like(shrink) if start else shrink), shrink


@fault("rescale", "dependency", *_SCORES, **_ONLINE)
def result_not_rescaled(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the result is not rescaled when the maximum grows."""
    return shrink, (torch.ones_like(shrink) if start else shrink)


@fault("rescale", "dependency", *_SCORES, **_ONLINE)
def denominator_of_the_last_block(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the denominator is not carried from block to block."""
    return torch.zeros_like(shrink), shrink


@fault("rescale", "dependency", *_SCORES, **_ONLINE)
def only_the_last_block_kept(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the loop over blocks reads its initial value, and only the last block remains."""
    return torch.zeros_like(shrink), torch.zeros_like(shrink)


@fault("rescale", "dependency", *_SCORES, **_ONLINE)
def first_block_lost(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the second block clears the accumulators."""
    kept = torch.zeros_like(shrink) if start == _ONLINE["block"] else shrink
    return kept, kept


@fault("rescale", "value", *_SCORES, **_ONLINE)
def rescaled_twice(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the result is rescaled twice."""
    return shrink, shrink * shrink


@fault("rescale", "dependency", *_SCORES, **_ONLINE)
def rescaled_from_the_third_block(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the first block is not rescaled by the second one's maximum."""
    kept = torch.ones_like(shrink) if start == _ONLINE["block"] else shrink
    return kept, kept


@fault("merge_of_splits", "value", *_SCORES, splits=2)
def parts_averaged(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """The results of parts of the keys are averaged, whatever their denominators."""
    return torch.stack([part[0] / part[1] for part in parts]).mean(0), torch.ones(1)


@fault("merge_of_splits", "value", *_SCORES, splits=2)
def parts_not_brought_together(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Parts of the keys are added without being brought to a common maximum."""
    return total_of([part[0] for part in parts]), total_of([part[1] for part in parts])


@fault("merge_of_splits", "dependency", *_SCORES, splits=2)
def last_part_only(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Of two parts of the keys the later one overwrites the earlier."""
    return parts[-1][0], parts[-1][1]


@fault("merge_of_splits", "dependency", *_SCORES, splits=4)
def last_part_not_merged(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """The last of four parts of the keys is not waited for."""
    kept = parts[:-1] or parts
    top = torch.stack([part[2] for part in kept]).amax(0)
    factors = [(part[2] - top).exp() for part in kept]
    result = total_of([part[0] * factor for part, factor in zip(kept, factors, strict=True)])
    return result, total_of([part[1] * factor for part, factor in zip(kept, factors, strict=True)])


@fault("denominator", "value", *_SCORES)
def denominator_missing(result: Tensor, denominator: Tensor) -> Tensor:
    """The result is not divided by the sum of the probabilities."""
    return result


@fault("denominator", "value", *_SCORES)
def one_in_the_denominator(result: Tensor, denominator: Tensor) -> Tensor:
    """One is added to the denominator, as for a model with attention sinks."""
    return result / (denominator + 1)


@fault("denominator", "indexing", *_SCORES)
def denominator_of_the_first_query(result: Tensor, denominator: Tensor) -> Tensor:
    """Every query of a group is divided by the first one's denominator."""
    return result / denominator[:1]


@fault("denominator", "precision", *ATTENTIONS, *LAYERS_OF_EACH_KIND, detectors=(*SIGNATURES, "bias"))
def denominator_in_bf16(result: Tensor, denominator: Tensor) -> Tensor:
    """The denominator is rounded to bf16."""
    return result / rounded(denominator, BF16)


@fault("denominator", "precision", *ATTENTIONS, *LAYERS_OF_EACH_KIND, detectors=("element", *SIGNATURES))
def inverse_too_large(result: Tensor, denominator: Tensor) -> Tensor:
    """The denominator's inverse is an estimate that is never refined, and 0.5% too large."""
    return result * (1.005 / denominator)


@fault("denominator", "precision", *ATTENTIONS, detectors=("bias",))
def inverse_in_bf16(result: Tensor, denominator: Tensor) -> Tensor:
    """The result in bf16 is multiplied by the denominator's inverse in bf16."""
    return rounded(result, BF16) * rounded(1 / denominator, BF16)


@fault("denominator", "dependency", *_SCORES)
def accumulator_of_the_query_before(result: Tensor, denominator: Tensor) -> Tensor:
    """The accumulator is not cleared between the queries of a group."""
    return result.cumsum(0) / denominator


@fault("softmax_attention", "value", *_SCORES)
def softmax_over_the_group(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
    """Softmax runs over the queries of a group instead of the keys."""
    return torch.softmax(q @ keys.T / math.sqrt(dims.D), 0) @ values


@fault("softmax_attention", "value", *_SCORES)
def softmax_left_out(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
    """Scores are used as probabilities."""
    return (q @ keys.T / math.sqrt(dims.D)) @ values


@fault("softmax_attention", "value", *_SCORES)
def uniform_attention(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
    """Values are averaged with equal weights."""
    return values.mean(0).expand_as(q)


@fault("softmax_attention", "value", *_SCORES)
def largest_score_only(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
    """The value of the largest score is taken alone."""
    return values[(q @ keys.T).argmax(1)]


@fault("softmax_attention", "value", *_SCORES)
def sigmoid_attention(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
    """A sigmoid of each score instead of the softmax over them."""
    return torch.sigmoid(q @ keys.T / math.sqrt(dims.D)) @ values / len(keys)


@fault("keys_and_values", "indexing", *_SCORES)
def values_of_the_row_before(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities are multiplied by the values of the row before."""
    return keys, values.roll(1, 0)


@fault("keys_and_values", "indexing", *_SCORES)
def keys_and_values_exchanged(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys are read from the cache of values, and values from that of keys."""
    return values, keys


@fault("keys_and_values", "value", *_SCORES)
def half_the_lanes_scored(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Scores are sums over the first half of the head's lanes."""
    return changed(keys, (slice(None), slice(keys.shape[1] // 2, None)), 0.0), values


@fault("keys_and_values", "precision", *_SCORES)
def cache_in_fp8(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values are kept in fp8."""
    return rounded(keys, FP8), rounded(values, FP8)


@fault("keys_and_values", "precision", *ATTENTIONS, detectors=("not_finite",))
def cache_in_fp16(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values are converted to fp16, where large ones overflow."""
    return rounded(keys, FP16), rounded(values, FP16)


@fault("keys_and_values", "precision", *ATTENTIONS)
def cache_in_int8(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values are kept in int8 with a scale for each row."""
    steps = [x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127 for x in (keys, values)]
    keys, values = ((x / step).round() * step for x, step in zip((keys, values), steps, strict=True))
    return keys, values


@fault("keys_and_values", "dependency", *_SCORES)
def second_block_of_values_stale(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The second block of values is still the first one."""
    count = min(TILE, max(len(values) - TILE, 0))
    return keys, changed(values, (slice(TILE, TILE + count),), values[:count])


@fault("scale", "value", *ATTENTIONS, *CONTIGUOUS_LAYERS)
def scale_missing(dims: Dims) -> float:
    """Scores are not multiplied by D**-0.5."""
    return 1.0


@fault("scores", "precision", "attention", *ALL_LAYERS, detectors=("element", *SIGNATURES), rounds=("scores",))
def bf16_scores(z: Tensor) -> Tensor:
    """Attention scores are rounded to bf16."""
    return rounded(z, BF16)


@fault("mask", "value", "paged_attention", whole_page="replace")
def masked_scores_are_zero(z: Tensor, hidden: Tensor, masked: Tensor) -> Tensor:
    """Masked scores are set to zero instead of minus infinity, and so get a weight."""
    return torch.where(hidden, 0.0, z)


@fault("running_maximum", "robustness", *ATTENTIONS, *CONTIGUOUS_LAYERS, detectors=("not_finite",))
def no_maximum(top: Tensor, part: Tensor) -> Tensor:
    """Softmax without subtracting the maximum, which overflows."""
    return torch.zeros_like(top)


@fault("running_maximum", "robustness", "paged_attention", detectors=("not_finite", "element"))
def maximum_starts_at_zero(top: Tensor, part: Tensor) -> Tensor:
    """The running maximum starts at zero: below it everything vanishes."""
    return torch.maximum(top, part.amax(1, keepdim=True)).clamp_min(0)


@fault("rescale", "value", *ATTENTIONS, **_ONLINE)
def no_rescale(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: what was summed before is not rescaled when the maximum grows."""
    kept = torch.ones_like(shrink) if start else shrink
    return kept, kept


@fault("keys_and_values", "value", *ATTENTIONS)
def keys_as_values(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities are multiplied by the keys instead of the values."""
    return keys, keys
