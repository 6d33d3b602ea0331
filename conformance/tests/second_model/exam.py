"""Faults of the second model, and a legal variant, in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

import conformance
from conformance.contract.kernel import Kernel
from conformance.exam.known_kernels import Fault, Faults, KnownKernel

Tensor = torch.Tensor
FAULTS = Faults()


@FAULTS.declare("statistic", "value", "layer_norm", detectors=("element", "spread", "bias"))
def variance_of_n_minus_1(centred: Tensor) -> Tensor:
    """The variance is the unbiased one."""
    return centred.square().sum(-1, keepdim=True) / (centred.shape[-1] - 1)


@FAULTS.declare("statistic", "value", "layer_norm", detectors=("element", "spread", "bias"))
def mean_is_not_subtracted(centred: Tensor) -> Tensor:
    """The variance is that of values whose mean was subtracted twice."""
    return (centred - centred.mean(-1, keepdim=True) * 2 + 0.05).square().mean(-1, keepdim=True)


@FAULTS.declare("activation", "value", "mlp")
def gelu_by_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return torch.nn.functional.gelu(x, approximate="tanh")


@FAULTS.declare("activation", "precision", "mlp")
def gelu_in_bf16(x: Tensor) -> Tensor:
    """GELU of values rounded to bf16."""
    return torch.nn.functional.gelu(x.to(torch.bfloat16)).float()


def _mean_square(centred: Tensor) -> Tensor:
    return centred.square().mean(-1, keepdim=True)


def layer_norm(statistic: Callable[[Tensor], Tensor] = _mean_square) -> Kernel:
    """A kernel with one statistic in the place of the right one."""

    @conformance.kernel("gelu/layer_norm")
    def run(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
        centred = x.float() - x.float().mean(-1, keepdim=True)
        out.copy_(centred / torch.sqrt(statistic(centred) + 1e-5) * weight + bias)

    return run


def mlp(activation: Callable[[Tensor], Tensor] = torch.nn.functional.gelu) -> Kernel:
    """A kernel with one activation in the place of the right one."""

    @conformance.kernel("gelu/mlp")
    def run(x: Tensor, w_in: Tensor, w_out: Tensor, out: Tensor) -> None:
        out.copy_(activation(x.float() @ w_in.float()).to(torch.bfloat16).float() @ w_out.float())

    return run


MAKE = {"layer_norm": layer_norm, "mlp": mlp}


def _known(stage: str, fault: Fault) -> KnownKernel:
    def make() -> Kernel:
        return MAKE[stage](fault.function)

    return KnownKernel(stage, fault.name, fault.kind, fault.summary, make, detectors=fault.detectors)


KNOWN_KERNELS = [
    *(KnownKernel(stage, "contract", None, "the contract's own roundings", make) for stage, make in MAKE.items()),
    *(_known(stage, fault) for stage in MAKE for fault in FAULTS.of(stage)),
]
