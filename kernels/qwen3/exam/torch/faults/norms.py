"""Faults of the norms: another statistic, eps or weight, or a narrower format."""

from __future__ import annotations

from typing import Any

import torch

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.torch.helpers import FP16, mean_square, rounded
from conformance.kernels.qwen3.exam.torch.hooks import (
    ALL_LAYERS,
    CONTIGUOUS_LAYERS,
    LAYERS_OF_EACH_KIND,
    NORMS,
    SIGNATURES,
    fault,
)
from conformance.kernels.qwen3.exam.torch.layers import Arguments, own_weight
from conformance.kernels.qwen3.exam.torch.operations import BF16

Tensor = torch.Tensor


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


@fault("statistic", "dependency", "rms_norm", "qk_norm", "lm_head", "decode_layer")
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
    return rounded(x.square(), BF16).mean(-1, keepdim=True)


@fault("statistic", "precision", *NORMS)
def squares_in_fp16(x: Tensor) -> Tensor:
    """Squares are taken in fp16, where large values overflow and small ones vanish."""
    return rounded(x, FP16).square().to(FP16).float().mean(-1, keepdim=True)


@fault("statistic", "precision", *NORMS, detectors=("element", *SIGNATURES))
def squares_summed_in_bf16(x: Tensor) -> Tensor:
    """The sum of squares is kept in bf16."""
    total = torch.zeros(*x.shape[:-1], 1, dtype=BF16)
    for start in range(0, x.shape[-1], 8):
        total = (total.float() + x[..., start : start + 8].square().sum(-1, keepdim=True)).to(BF16)
    return total.float() / x.shape[-1]


@fault("statistic", "indexing", *NORMS)
def scale_of_the_row_before(x: Tensor) -> Tensor:
    """Every row is scaled by the 1/rms of the row before it."""
    return mean_square(x).roll(1, 0)


@fault("statistic", "dependency", *NORMS)
def squares_carried_over_rows(x: Tensor) -> Tensor:
    """The accumulator of squares is not reset between rows."""
    return mean_square(x).cumsum(0)


# Norms: eps, root, weight

for _name, _eps in (("eps_missing", 0.0), ("eps_1e-8", 1e-8), ("eps_1e-5", 1e-5), ("eps_1e-3", 1e-3)):
    _stages = (*NORMS, "decode_fwd_layers", "paged_decode_layer") if _name == "eps_1e-5" else NORMS
    _says = "eps is left out" if not _eps else f"eps is {_eps:.0e} instead of the model's 1e-6".replace("e-0", "e-")
    fault("eps", "value", *_stages, name=_name, summary=_says)(lambda eps, other=_eps: other)


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


@fault("root", "value", "rms_norm", "qk_norm", "lm_head", "decode_layer")
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


@fault("root", "precision", *NORMS[:3], *LAYERS_OF_EACH_KIND, detectors=("element", *SIGNATURES))
def root_in_bf16(mean: Tensor, eps: float) -> Tensor:
    """1/rms is rounded to bf16."""
    return rounded(torch.rsqrt(mean + eps), BF16)


@fault("root", "precision", *NORMS[:3], *LAYERS_OF_EACH_KIND, detectors=("element", "spread"))
def root_too_large(mean: Tensor, eps: float) -> Tensor:
    """1/rms is an estimate that is never refined, and 0.5% too large."""
    return torch.rsqrt(mean + eps) * 1.005


@fault("root", "precision", "qk_norm", "lm_head", "rms_norm")
def root_in_fp16(mean: Tensor, eps: float) -> Tensor:
    """1/rms is kept in fp16."""
    return rounded(torch.rsqrt(mean + eps), FP16)


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


@fault("gamma", "precision", *NORMS[:3], *ALL_LAYERS, detectors=("element", *SIGNATURES), rounds=("norm weights",))
def gamma_in_bf16(normalised: Tensor, weight: Tensor) -> Tensor:
    """The norm's weight was converted to bf16."""
    return normalised * rounded(weight, BF16)


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


@fault("norm", "value", *NORMS)
def gamma_before_the_statistic(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm's weight is applied first, and the weighted row normalised."""
    weighted = x * weight
    return weighted * torch.rsqrt(mean_square(weighted) + eps)


@fault("norm", "value", *NORMS)
def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Layer norm: the row's mean is subtracted."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.reshape(-1), None, eps)


@fault("norm", "value", *NORMS)
def eps_of_the_sum(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Eps is added to the sum of squares, before the division by n."""
    return x * torch.rsqrt((x.square().sum(-1, keepdim=True) + eps) / x.shape[-1]) * weight


@fault("norm", "precision", *NORMS, detectors=("not_finite", "element"))
def norm_in_fp16(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm's input is converted to fp16 on the way in."""
    x = rounded(x, FP16)
    return x * torch.rsqrt(mean_square(x) + eps) * weight


@fault("norm", "dependency", *NORMS)
def squares_after_scaling(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The row is scaled in place by its first half's 1/rms before the second half's squares are read."""
    half = x.shape[-1] // 2
    low = x[..., :half] * torch.rsqrt(mean_square(x[..., :half]) + eps)
    x = torch.cat([low, x[..., half:]], -1)
    return x * torch.rsqrt(mean_square(x) + eps) * weight


# One norm's weight, where a layer has several


def _in_bf16(of: str) -> Any:
    def weight(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
        own = own_weight(name, layer, t, dims)
        return rounded(own, BF16) if name == of else own

    return weight


for _name in ("input_rms_weight", "q_norm_weight", "k_norm_weight", "post_rms_weight"):
    _says = f"{_name} was converted to bf16"
    fault(
        "weight",
        "precision",
        *LAYERS_OF_EACH_KIND,
        name=f"{_name}_in_bf16",
        summary=_says,
        detectors=SIGNATURES,
        rounds=("norm weights",),
    )(_in_bf16(_name))


@fault("statistic", "value", *NORMS, "decode_fwd_layers")
def row0_scale(x: Tensor) -> Tensor:
    """The 1/rms of the first row is used for every row."""
    mean = mean_square(x)
    return mean[:1].expand_as(mean)


@fault("gamma", "value", *NORMS, "decode_fwd_layers")
def missing_gamma(normalised: Tensor, weight: Tensor) -> Tensor:
    """The norm's weight is not applied."""
    return normalised


@fault("head_norm", "value", "qk_norm")
def normalised_by_row(x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
    """q and k are normalised over the whole row instead of head by head."""
    return x * torch.rsqrt(mean_square(x) + dims.eps) * weight.repeat(x.shape[1] // dims.D)


@fault("deferred_scale", "value", *CONTIGUOUS_LAYERS, deferred_input_norm=True)
def deferred_norm_dropped(x: Tensor, eps: float) -> Tensor:
    """The deferred 1/rms of the input norm is never applied."""
    return torch.ones(1)
