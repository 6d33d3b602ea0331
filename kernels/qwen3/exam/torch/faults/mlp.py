"""Faults of the MLP's activation."""

from __future__ import annotations

import torch

from conformance.kernels.qwen3.exam.torch.helpers import FP16, TILE, changed, rounded
from conformance.kernels.qwen3.exam.torch.hooks import CONTIGUOUS_LAYERS, LAYERS_OF_EACH_KIND, SIGNATURES, fault
from conformance.kernels.qwen3.exam.torch.operations import BF16

Tensor = torch.Tensor


# Activation of the MLP

_MLP = ("mlp", "decode_layer")


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


@fault("activation", "precision", "mlp", *LAYERS_OF_EACH_KIND, detectors=("element", *SIGNATURES))
def sigmoid_in_bf16(gate: Tensor, up: Tensor) -> Tensor:
    """The sigmoid is rounded to bf16."""
    return gate * rounded(torch.sigmoid(gate), BF16) * up


@fault("activation", "precision", "mlp")
def sigmoid_by_a_rough_exp(gate: Tensor, up: Tensor) -> Tensor:
    """The sigmoid's exp is (1 + x/1024)**1024."""
    return gate / (1 + (1 - gate / 1024).clamp_min(0) ** 1024) * up


@fault("activation", "robustness", "mlp", detectors=("not_finite",))
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
    return torch.nn.functional.silu(changed(gate, (slice(None), slice(TILE, 2 * TILE)), gate[:, :TILE])) * up


@fault("activation", "unwritten", *_MLP)
def half_the_activation_zero(gate: Tensor, up: Tensor) -> Tensor:
    """The second half of the intermediate columns is never computed and holds zeros."""
    activation = torch.nn.functional.silu(gate) * up
    return changed(activation, (slice(None), slice(activation.shape[1] // 2, None)), 0.0)


@fault("activation_cast", "precision", "mlp")
def activation_in_fp16(x: Tensor) -> Tensor:
    """The activation is kept in fp16 instead of bf16, and overflows."""
    return rounded(x, FP16)


@fault("activation", "value", "mlp", *CONTIGUOUS_LAYERS)
def relu(gate: Tensor, up: Tensor) -> Tensor:
    """ReLU instead of SiLU."""
    return torch.relu(gate) * up


@fault("activation", "value", "mlp", *CONTIGUOUS_LAYERS)
def gate_and_up_exchanged(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU is applied to the up projection, and the gate multiplied."""
    return up * torch.sigmoid(up) * gate
