"""Faults of arithmetic: another formula, a lost term, a narrower format. Each stands at a hook of ``arithmetic.py``."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from conformance.cases.source import rotation_table
from conformance.contract.dims import Dims
from kernels.qwen3.exam.torch.arithmetic import BF16, Part, raised, truncated
from kernels.qwen3.exam.torch.registry import ALL_LAYERS, ATTENTIONS, CHAINS, LAYERS_OF_EACH_KIND, NORMS, PRODUCTS, fault

Tensor = torch.Tensor

FP16, FP8 = torch.float16, torch.float8_e4m3fn
#: Terms of a sum that a kernel takes together.
TILE = 32
LAYER = "decode_layer"


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    rounded: Tensor = x.to(dtype).float()
    return rounded


def _mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True)


# Norms: the statistic of a row


@fault("statistic", "value", *NORMS)
def mean_of_magnitudes(x: Tensor) -> Tensor:
    """The norm takes the mean of magnitudes instead of the mean of squares."""
    return x.abs().mean(-1, keepdim=True)


@fault("statistic", "value", *NORMS)
def variance_of_row(x: Tensor) -> Tensor:
    """The norm takes the variance, with the mean subtracted, instead of the mean of squares."""
    return x.var(-1, correction=0, keepdim=True)


@fault("statistic", "value", *NORMS)
def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of squares is not divided by the number of columns."""
    return x.square().sum(-1, keepdim=True)


@fault("statistic", "value", "rms_norm", "qk_norm", "lm_head")
def one_column_too_few(x: Tensor) -> Tensor:
    """The sum of squares is divided by n - 1, as for an unbiased variance."""
    return x.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)


@fault("statistic", "value", "rms_norm", "lm_head", dims={"preset": "awkward"})
def mean_over_padded_width(x: Tensor) -> Tensor:
    """The sum of squares is divided by the width padded to a power of two."""
    return x.square().sum(-1, keepdim=True) / (1 << (x.shape[-1] - 1).bit_length())


@fault("statistic", "dependency", *NORMS)
def half_the_row_summed(x: Tensor) -> Tensor:
    """The squares of the second half of the row are never added."""
    return x[..., : x.shape[-1] // 2].square().sum(-1, keepdim=True) / x.shape[-1]


@fault("statistic", "dependency", "rms_norm", "qk_norm", "lm_head", LAYER)
def last_squares_missing(x: Tensor) -> Tensor:
    """The squares of the last 16 columns are not added."""
    return x[..., :-16].square().sum(-1, keepdim=True) / x.shape[-1]


@fault("statistic", "value", "rms_norm", "qk_norm", "lm_head")
def first_column_twice(x: Tensor) -> Tensor:
    """The accumulator of squares starts with the first column's, which is then added again."""
    return (x.square().sum(-1, keepdim=True) + x[..., :1].square()) / x.shape[-1]


@fault("statistic", "precision", "rms_norm", "qk_norm", "lm_head")
def squares_in_bf16(x: Tensor) -> Tensor:
    """Squares are rounded to bf16 before they are summed."""
    return _rounded(x.square(), BF16).mean(-1, keepdim=True)


@fault("statistic", "precision", *NORMS)
def squares_in_fp16(x: Tensor) -> Tensor:
    """Squares are taken in fp16, where large values overflow and small ones vanish."""
    return _rounded(x, FP16).square().to(FP16).float().mean(-1, keepdim=True)


@fault("statistic", "precision", *NORMS)
def squares_summed_in_bf16(x: Tensor) -> Tensor:
    """The sum of squares is kept in bf16."""
    total = torch.zeros(*x.shape[:-1], 1, dtype=BF16)
    for start in range(0, x.shape[-1], 8):
        total = (total.float() + x[..., start : start + 8].square().sum(-1, keepdim=True)).to(BF16)
    return total.float() / x.shape[-1]


@fault("statistic", "indexing", *NORMS)
def scale_of_the_row_before(x: Tensor) -> Tensor:
    """Every row is scaled by the 1/rms of the row before it."""
    return _mean_square(x).roll(1, 0)


@fault("statistic", "dependency", *NORMS)
def squares_carried_over_rows(x: Tensor) -> Tensor:
    """The accumulator of squares is not reset between rows."""
    return _mean_square(x).cumsum(0)


# Norms: eps, root, weight

for _name, _eps in (("eps_missing", 0.0), ("eps_1e-8", 1e-8), ("eps_1e-3", 1e-3)):
    _says = "eps is left out" if not _eps else f"eps is {_eps:.0e} instead of the model's 1e-6".replace("e-0", "e-")
    fault("eps", "value", *NORMS, name=_name, summary=_says)(lambda eps, other=_eps: other)


for _norm in ("input", "q", "k", "post", "final"):
    _of = ("decode_fwd",) if _norm == "final" else LAYERS_OF_EACH_KIND
    _says = f"eps of the {_norm} norm alone is 1e-5 instead of the model's 1e-6"
    fault("eps_of", "value", *_of, name=f"eps_1e-5_in_{_norm}_norm", summary=_says)(
        lambda norm, dims, wrong=_norm: 1e-5 if norm == wrong else dims.eps
    )


@fault("root", "value", *NORMS)
def eps_outside_the_root(mean: Tensor, eps: float) -> Tensor:
    """Eps is added to the root instead of under it."""
    return 1 / (mean.sqrt() + eps)


@fault("root", "value", *NORMS)
def clamped_by_eps(mean: Tensor, eps: float) -> Tensor:
    """The mean of squares is clamped to eps instead of eps being added."""
    return torch.rsqrt(mean.clamp_min(eps))


@fault("root", "value", "rms_norm", "qk_norm", "lm_head", LAYER)
def eps_twice(mean: Tensor, eps: float) -> Tensor:
    """Eps is added twice."""
    return torch.rsqrt(mean + 2 * eps)


@fault("root", "value", *NORMS)
def root_missing(mean: Tensor, eps: float) -> Tensor:
    """The row is divided by the mean of squares, not by its root."""
    return 1 / (mean + eps)


@fault("root", "value", *NORMS)
def multiplied_by_the_root(mean: Tensor, eps: float) -> Tensor:
    """The row is multiplied by its rms instead of divided."""
    return torch.sqrt(mean + eps)


@fault("root", "precision", "rms_norm", "qk_norm", "lm_head")
def newton_step_missing(mean: Tensor, eps: float) -> Tensor:
    """The reciprocal root is a bit trick with one Newton step, where two or three are needed."""
    value = (mean + eps).contiguous()
    guess = (0x5F3759DF - (value.view(torch.int32) >> 1)).view(torch.float32)
    return guess * (1.5 - 0.5 * value * guess * guess)


@fault("root", "precision", *NORMS[:3], *LAYERS_OF_EACH_KIND)
def root_in_bf16(mean: Tensor, eps: float) -> Tensor:
    """1/rms is rounded to bf16."""
    return _rounded(torch.rsqrt(mean + eps), BF16)


@fault("root", "precision", *NORMS[:3], *LAYERS_OF_EACH_KIND)
def root_too_large(mean: Tensor, eps: float) -> Tensor:
    """1/rms is an estimate that is never refined, and 0.5% too large."""
    return torch.rsqrt(mean + eps) * 1.005


@fault("root", "precision", "qk_norm", "lm_head", "rms_norm")
def root_in_fp16(mean: Tensor, eps: float) -> Tensor:
    """1/rms is kept in fp16."""
    return _rounded(torch.rsqrt(mean + eps), FP16)


@fault("gamma", "value", *NORMS)
def one_plus_gamma(normalised: Tensor, weight: Tensor) -> Tensor:
    """The norm's weight is taken as Gemma's, which is added to one."""
    return normalised * (1 + weight)


@fault("gamma", "value", *NORMS)
def gamma_added(normalised: Tensor, weight: Tensor) -> Tensor:
    """The norm's weight is added like a bias."""
    return normalised + weight


@fault("gamma", "value", *NORMS)
def gamma_twice(normalised: Tensor, weight: Tensor) -> Tensor:
    """The norm's weight is applied twice, here and folded into the next projection."""
    return normalised * weight * weight


@fault("gamma", "precision", *NORMS[:3], *ALL_LAYERS)
def gamma_in_bf16(normalised: Tensor, weight: Tensor) -> Tensor:
    """The norm's weight was converted to bf16."""
    return normalised * _rounded(weight, BF16)


@fault("gamma", "indexing", *NORMS)
def gamma_shifted(normalised: Tensor, weight: Tensor) -> Tensor:
    """The norm's weight is read one column off."""
    return normalised * weight.roll(1, -1)


@fault("gamma", "indexing", *NORMS)
def gamma_of_the_first_tile(normalised: Tensor, weight: Tensor) -> Tensor:
    """The first 16 columns of the norm's weight are used for every tile of columns."""
    return normalised * weight[..., torch.arange(weight.shape[-1]) % 16]


@fault("gamma", "unwritten", *NORMS)
def gamma_missing_in_the_last_tile(normalised: Tensor, weight: Tensor) -> Tensor:
    """The last 16 columns are not multiplied by the norm's weight."""
    weight = weight.clone()
    weight[..., -16:] = 1
    return normalised * weight


@fault("gamma", "precision", "qk_norm")
def normalised_in_fp16(normalised: Tensor, weight: Tensor) -> Tensor:
    """The normalised head is kept in fp16 before the weight."""
    return _rounded(normalised, FP16) * weight


@fault("norm", "value", *NORMS)
def gamma_before_the_statistic(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm's weight is applied first, and the weighted row normalised."""
    weighted = x * weight
    return weighted * torch.rsqrt(_mean_square(weighted) + eps)


@fault("norm", "value", *NORMS)
def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Layer norm: the row's mean is subtracted."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.reshape(-1), None, eps)


@fault("norm", "value", *NORMS)
def eps_of_the_sum(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Eps is added to the sum of squares, before the division by n."""
    return x * torch.rsqrt((x.square().sum(-1, keepdim=True) + eps) / x.shape[-1]) * weight


@fault("norm", "precision", *NORMS)
def norm_in_fp16(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm's input is converted to fp16 on the way in."""
    x = _rounded(x, FP16)
    return x * torch.rsqrt(_mean_square(x) + eps) * weight


@fault("norm", "dependency", *NORMS)
def squares_after_scaling(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The row is scaled in place by its first half's 1/rms before the second half's squares are read."""
    half = x.shape[-1] // 2
    low = x[..., :half] * torch.rsqrt(_mean_square(x[..., :half]) + eps)
    x = torch.cat([low, x[..., half:]], -1)
    return x * torch.rsqrt(_mean_square(x) + eps) * weight


# Products: operands


def _changed(tensor: Tensor, place: tuple[slice, ...], value: Tensor | float) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


@fault("operands", "dependency", *PRODUCTS)
def first_k_tile_missing(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The first tile of a sum over K is missing: the loop starts at the second."""
    return x[:, TILE:], weight[TILE:]


@fault("operands", "dependency", *PRODUCTS)
def k_tile_read_twice(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The second tile of activations is still the first one: the copy was not waited for."""
    return (_changed(x, (slice(None), slice(TILE, 2 * TILE)), x[:, :TILE]) if x.shape[1] >= 2 * TILE else x), weight


@fault("operands", "dependency", *PRODUCTS)
def weight_tile_read_twice(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The second tile of weights is still the first one: one buffer where two are needed."""
    return x, (_changed(weight, (slice(TILE, 2 * TILE),), weight[:TILE]) if len(weight) >= 2 * TILE else weight)


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
    return x, _changed(weight, (slice(None), slice(-1, None)), weight[:, -2:][:, :1])


@fault("operands", "indexing", *PRODUCTS)
def last_row_of_activations_repeated(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The last row of activations is loaded from the row before it."""
    return (torch.cat([x[:-1], x[-2:-1]]), weight) if x.shape[0] > 1 else (x, weight)


@fault("operands", "precision", *PRODUCTS)
def weights_in_fp8(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights were quantised to fp8."""
    return x, _rounded(weight, FP8)


@fault("operands", "precision", *PRODUCTS)
def weights_in_int8(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights were quantised to int8, one scale for all of them."""
    step = weight.abs().max() / 127
    return x, (weight / step).round() * step


@fault("operands", "precision", *PRODUCTS)
def activations_in_fp8(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Activations are quantised to fp8 with a scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
    return _rounded(x / scale, FP8) * scale, weight


@fault("operands", "precision", "qkv_proj", "o_proj", "mlp")
def activations_in_fp16(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Activations are converted from bf16 to fp16, which overflows at 65504."""
    return _rounded(x, FP16), weight


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


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


@fault("sum", "precision", *PRODUCTS[:4])
def splits_in_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """Split-K stores its four partial sums in bf16."""
    return _total([_rounded(part, BF16) for part in _parts(x, weight, 4)])


@fault("sum", "precision", *PRODUCTS[:4])
def half_sum_in_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """The accumulator is spilled to bf16 once, half way through K."""
    first, second = _parts(x, weight, 2)
    return _rounded(first, BF16) + second


@fault("sum", "dependency", *PRODUCTS)
def one_split_missing(x: Tensor, weight: Tensor) -> Tensor:
    """One of four parts of split-K is not waited for."""
    parts = _parts(x, weight, 4)
    return _total([*parts[:2], parts[3]])


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
    return _total(_parts(x, weight, 2)) / 2


@fault("sum", "precision", *PRODUCTS[:4])
def products_truncated(x: Tensor, weight: Tensor) -> Tensor:
    """The accumulator drops its low bits when it is moved, as a cast to bf16 by shifting does."""
    return truncated(x @ weight)


# Activation of the MLP

_MLP = ("mlp", LAYER)


@fault("activation", "value", *_MLP)
def gelu(gate: Tensor, up: Tensor) -> Tensor:
    """GELU instead of SiLU."""
    return torch.nn.functional.gelu(gate) * up


@fault("activation", "value", *_MLP)
def gelu_by_tanh(gate: Tensor, up: Tensor) -> Tensor:
    """GELU, approximated by tanh, instead of SiLU."""
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


@fault("activation", "value", *_MLP)
def quick_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """The gate's sigmoid takes 1.702 times its argument, as in quick GELU."""
    return gate * torch.sigmoid(1.702 * gate) * up


@fault("activation", "value", *_MLP)
def sigmoid_only(gate: Tensor, up: Tensor) -> Tensor:
    """The sigmoid of the gate is not multiplied by the gate."""
    return torch.sigmoid(gate) * up


@fault("activation", "value", *_MLP)
def gate_not_activated(gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up are multiplied without an activation."""
    return gate * up


@fault("activation", "value", *_MLP)
def up_missing(gate: Tensor, up: Tensor) -> Tensor:
    """The activation is not multiplied by the up projection."""
    return gate * torch.sigmoid(gate)


@fault("activation", "value", *_MLP)
def activated_product(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU is applied to the product of gate and up."""
    return torch.nn.functional.silu(gate * up)


@fault("activation", "value", *_MLP)
def gate_plus_up(gate: Tensor, up: Tensor) -> Tensor:
    """The activated gate and the up projection are added."""
    return torch.nn.functional.silu(gate) + up


@fault("activation", "value", *_MLP)
def one_plus_up(gate: Tensor, up: Tensor) -> Tensor:
    """The up projection has one added, as another model's does."""
    return torch.nn.functional.silu(gate) * (up + 1)


@fault("activation", "value", *_MLP)
def gate_clamped(gate: Tensor, up: Tensor) -> Tensor:
    """The gate is clamped to 7, as another model's is."""
    return torch.nn.functional.silu(gate.clamp_max(7)) * up


@fault("activation", "value", *_MLP)
def both_activated(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU is applied to gate and up."""
    return torch.nn.functional.silu(gate) * torch.nn.functional.silu(up)


@fault("activation", "precision", *_MLP)
def hard_swish(gate: Tensor, up: Tensor) -> Tensor:
    """The sigmoid is replaced by a ramp."""
    return torch.nn.functional.hardswish(gate) * up


@fault("activation", "precision", "mlp", *LAYERS_OF_EACH_KIND)
def sigmoid_in_bf16(gate: Tensor, up: Tensor) -> Tensor:
    """The sigmoid is rounded to bf16."""
    return gate * _rounded(torch.sigmoid(gate), BF16) * up


@fault("activation", "precision", "mlp")
def sigmoid_by_a_rough_exp(gate: Tensor, up: Tensor) -> Tensor:
    """The sigmoid's exp is (1 + x/1024)**1024."""
    return gate / (1 + (1 - gate / 1024).clamp_min(0) ** 1024) * up


@fault("activation", "precision", "mlp", *LAYERS_OF_EACH_KIND)
def silu_in_bf16(gate: Tensor, up: Tensor) -> Tensor:
    """The activated gate is rounded to bf16 before it is multiplied."""
    return _rounded(torch.nn.functional.silu(gate), BF16) * up


@fault("activation", "robustness", "mlp")
def silu_overflows(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU is computed as x * exp(x) / (1 + exp(x)), which is NaN above 88."""
    return gate * torch.exp(gate) / (1 + torch.exp(gate)) * up


@fault("activation", "dependency", *_MLP)
def gate_overwritten_by_up(gate: Tensor, up: Tensor) -> Tensor:
    """The up projection lands in the gate's buffer before the gate is read."""
    return torch.nn.functional.silu(up) * up


@fault("activation", "dependency", *_MLP)
def second_gate_tile_stale(gate: Tensor, up: Tensor) -> Tensor:
    """The second tile of the gate is still the first one."""
    return torch.nn.functional.silu(_changed(gate, (slice(None), slice(TILE, 2 * TILE)), gate[:, :TILE])) * up


@fault("activation", "unwritten", *_MLP)
def half_the_activation_zero(gate: Tensor, up: Tensor) -> Tensor:
    """The second half of the intermediate columns is never computed and holds zeros."""
    activation = torch.nn.functional.silu(gate) * up
    return _changed(activation, (slice(None), slice(activation.shape[1] // 2, None)), 0.0)


@fault("activated", "precision", "mlp")
def activation_in_fp16(x: Tensor) -> Tensor:
    """The activation is kept in fp16 instead of bf16, and overflows."""
    return _rounded(x, FP16)


# RoPE

_TURNS = ("rope", LAYER)


@fault("tables", "indexing", *_TURNS)
def sine_and_cosine_exchanged(cos: Tensor, sin: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine are exchanged."""
    return sin[position], cos[position]


@fault("tables", "dependency", *_TURNS)
def cosine_of_the_position_before(cos: Tensor, sin: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """The cosine is still that of the step before."""
    return cos[max(position - 1, 0)], sin[position]


@fault("tables", "precision", "rope")
def tables_in_fp16(cos: Tensor, sin: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """RoPE tables are kept in fp16."""
    return _rounded(cos[position], FP16), _rounded(sin[position], FP16)


@fault("tables", "value", *_TURNS)
def sine_of_the_first_position(cos: Tensor, sin: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """The sine is left at position zero's, which is zero."""
    return cos[position], sin[0]


@fault("tables", "value", *_TURNS)
def theta_1e4(cos: Tensor, sin: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """RoPE's theta is 1e4 instead of the model's 1e6."""
    cos, sin = (table.float() for table in rotation_table(len(cos), cos.shape[1], 1e4))
    return cos[position], sin[position]


@fault("tables", "value", *_TURNS)
def frequencies_interleaved(cos: Tensor, sin: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """A table row repeats every frequency side by side instead of holding two equal halves."""
    half = cos.shape[1] // 2
    return cos[position, :half].repeat_interleave(2), sin[position, :half].repeat_interleave(2)


@fault("angle", "indexing", *_TURNS)
def position_is_the_row(position: int, row: int, dims: Dims) -> int:
    """The position is taken to be the row of the batch."""
    return row % dims.S


@fault("angle", "value", *_TURNS)
def position_zero(position: int, row: int, dims: Dims) -> int:
    """Every token is rotated to position zero."""
    return 0


@fault("angle", "indexing", *_TURNS)
def position_one_too_small(position: int, row: int, dims: Dims) -> int:
    """RoPE is taken at position seq_len - 2."""
    return max(position - 1, 0)


@fault("angle", "indexing", *_TURNS)
def position_within_the_page(position: int, row: int, dims: Dims) -> int:
    """The position is taken within its page."""
    return position % dims.BS


@fault("angle", "value", *_TURNS)
def positions_interpolated(position: int, row: int, dims: Dims) -> int:
    """Positions are divided by two, as for a model whose context was stretched."""
    return position // 2


@fault("angle", "indexing", *_TURNS)
def positions_wrap(position: int, row: int, dims: Dims) -> int:
    """Only half of the RoPE table was loaded, and later positions start over."""
    return position % (dims.S // 2)


@fault("angle", "indexing", *_TURNS)
def positions_stop(position: int, row: int, dims: Dims) -> int:
    """Positions in the second half of the table are clamped to its first half."""
    return min(position, dims.S // 2)


@fault("turn", "dependency", *_TURNS)
def low_half_overwritten(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The low half is rotated in place before the high half reads it."""
    half = low.shape[-1]
    low = low * c[..., :half] - high * s[..., :half]
    return low, high * c[..., half:] + low * s[..., half:]


@fault("turn", "indexing", *_TURNS)
def halves_exchanged(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The two rotated halves of a head are stored in each other's place."""
    half = low.shape[-1]
    return high * c[..., half:] + low * s[..., half:], low * c[..., :half] - high * s[..., :half]


@fault("turn", "value", *_TURNS)
def high_half_not_rotated(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Only the low half of a head is rotated."""
    half = low.shape[-1]
    return low * c[..., :half] - high * s[..., :half], high


@fault("turn", "value", *_TURNS)
def partial_rotation(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Only the first half of a head's pairs is rotated, as in models with partial RoPE."""
    half, kept = low.shape[-1], low.shape[-1] // 2
    c, s = c.clone(), s.clone()
    for start in (0, half):
        c[..., start + kept : start + half], s[..., start + kept : start + half] = 1, 0
    return low * c[..., :half] - high * s[..., :half], high * c[..., half:] + low * s[..., half:]


@fault("turn", "value", *_TURNS)
def sine_added_in_both(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The sine's term is added in both halves."""
    half = low.shape[-1]
    return low * c[..., :half] + high * s[..., :half], high * c[..., half:] + low * s[..., half:]


@fault("turn", "precision", "rope")
def rotation_in_bf16(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The four products of the rotation are rounded to bf16."""
    half = low.shape[-1]
    a, b, d, e = (
        _rounded(term, BF16) for term in (low * c[..., :half], high * s[..., :half], high * c[..., half:], low * s[..., half:])
    )
    return a - b, d + e


@fault("rotated_head", "indexing", *_TURNS)
def first_head_only_rotated(head: int, count: int) -> bool:
    """Only the first head is rotated."""
    return head == 0


@fault("rotated_head", "indexing", *_TURNS)
def last_head_not_rotated(head: int, count: int) -> bool:
    """The loop over heads ends one too early: the last head is not rotated."""
    return head < count - 1


@fault("rotated_head", "indexing", *_TURNS)
def odd_heads_not_rotated(head: int, count: int) -> bool:
    """Every second head is not rotated."""
    return head % 2 == 0


# Attention: scale, scores, softmax

_SCORES = (*ATTENTIONS, LAYER)


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


@fault("scores", "value", *ATTENTIONS)
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
    return _rounded(z, FP16)


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
    return torch.exp(_rounded(x, BF16))


@fault("exponential", "value", *_SCORES)
def exp_clamped_from_below(x: Tensor) -> Tensor:
    """The argument of exp is clamped to -4, so that nothing vanishes."""
    return torch.exp(x.clamp_min(-4))


@fault("probabilities", "precision", *_SCORES)
def probabilities_in_fp8(p: Tensor) -> Tensor:
    """Probabilities are kept in fp8."""
    return _rounded(p, FP8)


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


@fault("mask", "robustness", *ATTENTIONS, whole_page="replace", block=8)
def masked_block_is_nan(z: Tensor, hidden: Tensor, masked: Tensor) -> Tensor:
    """Masked scores are minus infinity, and a block that is wholly masked subtracts two infinities."""
    # In such a block the running maximum is that of the blocks before; visited first it would be minus infinity.
    whole = hidden.unfold(1, 8, 8).all(-1) if hidden.shape[1] >= 8 else hidden[:, :0]
    return torch.where(whole.any(1, keepdim=True) & hidden, torch.nan, masked)


# Attention: online softmax and its parts

_ONLINE: dict[str, Any] = {"block": 16}


@fault("carry", "dependency", *_SCORES, **_ONLINE)
def denominator_not_rescaled(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the denominator is not rescaled when the maximum grows."""
    return (torch.ones_like(shrink) if start else shrink), shrink


@fault("carry", "dependency", *_SCORES, **_ONLINE)
def result_not_rescaled(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the result is not rescaled when the maximum grows."""
    return shrink, (torch.ones_like(shrink) if start else shrink)


@fault("carry", "dependency", *_SCORES, **_ONLINE)
def denominator_of_the_last_block(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the denominator is not carried from block to block."""
    return torch.zeros_like(shrink), shrink


@fault("carry", "dependency", *_SCORES, **_ONLINE)
def only_the_last_block_kept(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the loop over blocks reads its initial value, and only the last block remains."""
    return torch.zeros_like(shrink), torch.zeros_like(shrink)


@fault("carry", "dependency", *_SCORES, **_ONLINE)
def first_block_lost(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the second block clears the accumulators."""
    kept = torch.zeros_like(shrink) if start == _ONLINE["block"] else shrink
    return kept, kept


@fault("carry", "value", *_SCORES, **_ONLINE)
def rescaled_twice(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the result is rescaled twice."""
    return shrink, shrink * shrink


@fault("carry", "dependency", *_SCORES, **_ONLINE)
def rescaled_from_the_third_block(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Online softmax: the first block is not rescaled by the second one's maximum."""
    kept = torch.ones_like(shrink) if start == _ONLINE["block"] else shrink
    return kept, kept


@fault("merge", "value", *_SCORES, splits=2)
def parts_averaged(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """The results of parts of the keys are averaged, whatever their denominators."""
    return torch.stack([part[0] / part[1] for part in parts]).mean(0), torch.ones(1)


@fault("merge", "value", *_SCORES, splits=2)
def parts_not_brought_together(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Parts of the keys are added without being brought to a common maximum."""
    return _total([part[0] for part in parts]), _total([part[1] for part in parts])


@fault("merge", "dependency", *_SCORES, splits=2)
def last_part_only(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Of two parts of the keys the later one overwrites the earlier."""
    return parts[-1][0], parts[-1][1]


@fault("merge", "dependency", *_SCORES, splits=4)
def last_part_not_merged(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """The last of four parts of the keys is not waited for."""
    kept = parts[:-1] or parts
    top = torch.stack([part[2] for part in kept]).amax(0)
    return _total([part[0] * (part[2] - top).exp() for part in kept]), _total([part[1] * (part[2] - top).exp() for part in kept])


@fault("quotient", "value", *_SCORES)
def denominator_missing(result: Tensor, denominator: Tensor) -> Tensor:
    """The result is not divided by the sum of the probabilities."""
    return result


@fault("quotient", "value", *_SCORES)
def one_in_the_denominator(result: Tensor, denominator: Tensor) -> Tensor:
    """One is added to the denominator, as for a model with attention sinks."""
    return result / (denominator + 1)


@fault("quotient", "indexing", *_SCORES)
def denominator_of_the_first_query(result: Tensor, denominator: Tensor) -> Tensor:
    """Every query of a group is divided by the first one's denominator."""
    return result / denominator[:1]


@fault("quotient", "precision", *ATTENTIONS, *LAYERS_OF_EACH_KIND)
def denominator_in_bf16(result: Tensor, denominator: Tensor) -> Tensor:
    """The denominator is rounded to bf16."""
    return result / _rounded(denominator, BF16)


@fault("quotient", "precision", *ATTENTIONS, *LAYERS_OF_EACH_KIND)
def inverse_too_large(result: Tensor, denominator: Tensor) -> Tensor:
    """The denominator's inverse is an estimate that is never refined, and 0.5% too large."""
    return result * (1.005 / denominator)


@fault("quotient", "precision", *ATTENTIONS)
def inverse_in_bf16(result: Tensor, denominator: Tensor) -> Tensor:
    """The result in bf16 is multiplied by the denominator's inverse in bf16."""
    return _rounded(result, BF16) * _rounded(1 / denominator, BF16)


@fault("quotient", "dependency", *_SCORES)
def accumulator_of_the_query_before(result: Tensor, denominator: Tensor) -> Tensor:
    """The accumulator is not cleared between the queries of a group."""
    return result.cumsum(0) / denominator


@fault("attend", "value", *_SCORES)
def softmax_over_the_group(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
    """Softmax runs over the queries of a group instead of the keys."""
    return torch.softmax(q @ keys.T / math.sqrt(dims.D), 0) @ values


@fault("attend", "value", *_SCORES)
def softmax_left_out(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
    """Scores are used as probabilities."""
    return (q @ keys.T / math.sqrt(dims.D)) @ values


@fault("attend", "value", *_SCORES)
def uniform_attention(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
    """Values are averaged with equal weights."""
    return values.mean(0).expand_as(q)


@fault("attend", "value", *_SCORES)
def largest_score_only(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
    """The value of the largest score is taken alone."""
    return values[(q @ keys.T).argmax(1)]


@fault("attend", "value", *_SCORES)
def sigmoid_attention(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
    """A sigmoid of each score instead of the softmax over them."""
    return torch.sigmoid(q @ keys.T / math.sqrt(dims.D)) @ values / len(keys)


@fault("history", "indexing", *_SCORES)
def values_of_the_row_before(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities are multiplied by the values of the row before."""
    return keys, values.roll(1, 0)


@fault("history", "indexing", *_SCORES)
def keys_and_values_exchanged(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys are read from the cache of values, and values from that of keys."""
    return values, keys


@fault("history", "value", *_SCORES)
def half_the_lanes_scored(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Scores are sums over the first half of the head's lanes."""
    return _changed(keys, (slice(None), slice(keys.shape[1] // 2, None)), 0.0), values


@fault("history", "precision", *_SCORES)
def cache_in_fp8(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values are kept in fp8."""
    return _rounded(keys, FP8), _rounded(values, FP8)


@fault("history", "precision", *ATTENTIONS)
def cache_in_fp16(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values are converted to fp16, where large ones overflow."""
    return _rounded(keys, FP16), _rounded(values, FP16)


@fault("history", "precision", *ATTENTIONS)
def cache_in_int8(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values are kept in int8 with a scale for each row."""
    steps = [x.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127 for x in (keys, values)]
    keys, values = ((x / step).round() * step for x, step in zip((keys, values), steps, strict=True))
    return keys, values


@fault("history", "dependency", *_SCORES)
def second_block_of_values_stale(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The second block of values is still the first one."""
    count = min(TILE, max(len(values) - TILE, 0))
    return keys, _changed(values, (slice(TILE, TILE + count),), values[:count])


# Greedy sampling


def _first_of_the_largest(logits: Tensor) -> int:
    return int((logits == logits.max()).nonzero()[0])


@fault("winner", "precision", "greedy_sample")
def index_in_8_bits(logits: Tensor) -> int:
    """The index is carried in eight bits."""
    return _first_of_the_largest(logits) % 256


@fault("winner", "precision", "greedy_sample")
def index_in_bf16(logits: Tensor) -> int:
    """The index is carried as a bf16 number, which has no odd ones above 256."""
    return int(torch.tensor(float(_first_of_the_largest(logits))).to(BF16))


@fault("winner", "precision", "greedy_sample")
def logits_in_fp16(logits: Tensor) -> int:
    """Logits are compared in fp16."""
    return _first_of_the_largest(logits.to(FP16))


@fault("winner", "value", "greedy_sample")
def smallest_logit(logits: Tensor) -> int:
    """The index of the smallest logit."""
    return _first_of_the_largest(-logits)


@fault("winner", "value", "greedy_sample")
def largest_magnitude(logits: Tensor) -> int:
    """The index of the largest magnitude."""
    return _first_of_the_largest(logits.abs())


@fault("winner", "value", "greedy_sample")
def second_largest(logits: Tensor) -> int:
    """The index of the second largest logit."""
    return int(logits.topk(2).indices[1])


@fault("winner", "unwritten", "greedy_sample")
def last_column_ignored(logits: Tensor) -> int:
    """The last column does not take part."""
    return _first_of_the_largest(logits[:-1])


@fault("winner", "unwritten", "greedy_sample")
def first_column_ignored(logits: Tensor) -> int:
    """The first column does not take part."""
    return _first_of_the_largest(logits[1:]) + 1


@fault("winner", "unwritten", "greedy_sample")
def second_half_ignored(logits: Tensor) -> int:
    """Only the first half of the vocabulary takes part."""
    return _first_of_the_largest(logits[: len(logits) // 2])


@fault("winner", "dependency", "greedy_sample")
def winner_of_the_last_tile(logits: Tensor) -> int:
    """The running maximum is not carried from tile to tile."""
    start = (len(logits) - 1) // 64 * 64
    return start + _first_of_the_largest(logits[start:])


@fault("winner", "indexing", "greedy_sample")
def tile_counted_as_64(logits: Tensor) -> int:
    """Tiles of 48 columns are counted as 64."""
    index = _first_of_the_largest(logits)
    return index // 48 * 64 + index % 48


@fault("winner", "value", "greedy_sample")
def winner_of_probabilities(logits: Tensor) -> int:
    """The largest probability is looked for, where several round to the same."""
    return _first_of_the_largest(torch.softmax(logits, 0))


@fault("winner", "dependency", "greedy_sample")
def any_of_equal_logits(logits: Tensor) -> int:
    """Of equal logits whichever thread is last wins."""
    places = (logits == logits.max()).nonzero().flatten().tolist()
    return int(places[len(places) // 2])


@fault("winner", "robustness", "greedy_sample")
def winner_above_zero_only(logits: Tensor) -> int:
    """Negative logits are taken for padding."""
    return _first_of_the_largest(torch.where(logits < 0, -torch.inf, logits)) if bool((logits >= 0).any()) else 0


# Casts: inside a layer what is cut off, or added, is within every element's allowance

for _name, _hook, _what, _stages in (
    ("casts", "cast", "every cast", ALL_LAYERS),
    ("normalised", "normalised_cast", "the cast of a norm's output", ("lm_head", *ALL_LAYERS)),
    ("queries", "query_cast", "the cast of the rotated queries", ALL_LAYERS),
    ("keys", "key_cast", "the cast of the rotated keys", ALL_LAYERS),
    ("values", "value_cast", "the cast of values", ALL_LAYERS),
    ("attention", "attention_cast", "the cast of the attention's result", ALL_LAYERS),
    ("activation", "activated", "the cast of the activation", ("mlp", *ALL_LAYERS)),
    ("carried_state", "carried_cast", "the cast of the hidden states between layers", CHAINS),
):
    _truncates = "casts_truncate" if _name == "casts" else f"{_name}_truncated"
    fault(_hook, "precision", *_stages, name=_truncates, summary=f"{_what} to bf16 truncates")(truncated)
    _few = [stage for stage in _stages if stage in LAYERS_OF_EACH_KIND]
    fault(_hook, "precision", *_few, name=f"{_name}_rounded_up", summary=f"{_what} to bf16 rounds away from zero")(raised)


# One norm's weight, where a layer has several


def _in_bf16(of: str) -> Any:
    def weight(name: str, layer: int, t: dict[str, Tensor], dims: Dims) -> Tensor:
        own = t[name].chunk(dims.L)[layer]
        return _rounded(own, BF16) if name == of else own

    return weight


for _name in ("input_rms_weight", "q_norm_weight", "k_norm_weight", "post_rms_weight"):
    fault("weight", "precision", *LAYERS_OF_EACH_KIND, name=f"{_name}_in_bf16", summary=f"{_name} was converted to bf16")(
        _in_bf16(_name)
    )
