"""LayerNorm and a GELU MLP: axes, references, error models, data, kernels and faults of a model that is no Qwen3.

``mlp`` and ``tiny`` are names that another model has too.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from conformance.cases.source import Source
from conformance.contract.arguments import read, write
from conformance.contract.dims import Dims, axis
from conformance.contract.registry import Model
from conformance.contract.stage import Stage, Tensors
from conformance.numerics import bounds
from conformance.numerics.arithmetic import Arithmetic
from conformance.numerics.bounds import Bounds, Profile

bf16, f32 = torch.bfloat16, torch.float32
NAME = "gelu"


@dataclasses.dataclass(frozen=True)
class GeluDims(Dims):
    """``N`` rows of ``C`` channels, and ``F`` of the MLP between."""

    N: int = axis("row", "batch")
    C: int = axis("channel")
    F: int = axis("channel")
    eps: float = 1e-5


TINY = GeluDims(N=8, C=96, F=160)
ODD = GeluDims(N=5, C=50, F=75)


def _layer_norm_inputs(dims: Dims, lengths: tuple[int, ...], regime: str, source: Source) -> dict[str, torch.Tensor]:
    size = {"normal": 1.0, "large": 64.0}[regime]
    return {
        "x": (size * source.normal("x", (dims.N, dims.C))).to(bf16),
        "weight": (1 + 0.3 * source.normal("weight", (1, dims.C))).float(),
        "bias": (0.3 * source.normal("bias", (1, dims.C))).float(),
    }


def _layer_norm(inputs: Tensors, dims: Dims, a: Arithmetic) -> dict[str, torch.Tensor]:
    x = a.wide(inputs["x"])
    centred = x - x.mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + dims.eps)
    return {"out": a.round(normalised * a.wide(inputs["weight"]) + a.wide(inputs["bias"]))}


def _layer_norm_errors(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """Every operation rounds once, at the size of what it rounds: the mean, the difference, the variance and its root, the
    product, gamma, beta. A sum of n terms strays by ``sqrt(n)`` roundings, and at most by n."""
    x, weight, bias = (inputs[name].double() for name in ("x", "weight", "bias"))
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    inverse = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + dims.eps)
    value = centred * inverse * weight + bias
    size = (x.abs().mean(-1, keepdim=True) + x.abs() + mean.abs()) * inverse * weight.abs()
    count = math.sqrt(dims.C)
    typical = bounds.U * (count * size + 8 * centred.abs() * inverse * weight.abs() + value.abs())
    return {"out": Bounds(value, typical**2 / 3, (dims.C + 8) * bounds.U * (size + value.abs()))}


def _mlp_inputs(dims: Dims, lengths: tuple[int, ...], regime: str, source: Source) -> dict[str, torch.Tensor]:
    size = {"normal": 1.0, "large": 64.0}[regime]
    return {
        "x": (size * source.normal("x", (dims.N, dims.C))).to(bf16),
        "w_in": (source.normal("w_in", (dims.C, dims.F)) / math.sqrt(dims.C)).to(bf16),
        "w_out": (source.normal("w_out", (dims.F, dims.C)) / math.sqrt(dims.F)).to(bf16),
    }


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _mlp(inputs: Tensors, dims: Dims, a: Arithmetic) -> dict[str, torch.Tensor]:
    hidden = a.round(_gelu(a.matmul(a.wide(inputs["x"]), inputs["w_in"])), "activation")
    return {"out": a.matmul(hidden, inputs["w_out"])}


def _mlp_errors(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    before = bounds.projection(bounds.exact(inputs["x"]), inputs["w_in"])
    x = before.value
    slope = 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    size = 4 * bounds.U * x.abs()  # erf is right to fp32's spacing at 1, not to that of 1 + erf
    activation = Bounds(_gelu(x), before.variance * slope**2 + size**2 / 3, before.worst * (slope.abs() + before.worst) + size)
    return {"out": bounds.projection(bounds.rounding(activation, profile), inputs["w_out"])}


_PROFILES = (Profile("contract"), Profile("half_away", cast="half_away"))
LAYER_NORM = Stage(
    model=NAME,
    name="layer_norm",
    summary="bf16((x - mean) / sqrt(variance + eps) * weight + bias)",
    arguments=(read("x", "N C", bf16), read("weight", "1 C", f32), read("bias", "1 C", f32), write("out", "N C", bf16)),
    reference=_layer_norm,
    error_model=_layer_norm_errors,
    make_inputs=_layer_norm_inputs,
    regimes=("normal", "large"),
    profiles=_PROFILES,
    drawn=("N",),
)
MLP = Stage(
    model=NAME,
    name="mlp",
    summary="bf16(gelu(x @ w_in)) @ w_out",
    arguments=(read("x", "N C", bf16), read("w_in", "C F", bf16), read("w_out", "F C", bf16), write("out", "N C", f32)),
    reference=_mlp,
    error_model=_mlp_errors,
    make_inputs=_mlp_inputs,
    regimes=("normal", "large"),
    profiles=_PROFILES,
    drawn=("N",),
)
MODEL = Model(
    NAME,
    (LAYER_NORM, MLP),
    {"tiny": TINY, "odd": ODD},
    kernel_modules=("conformance.tests.second_model.kernels",),
    exam_modules=("conformance.tests.second_model.exam",),
    suite_presets=("tiny", "odd"),
)
