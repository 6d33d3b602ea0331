"""Mistakes inside a layer that a correct kernel would make with other inputs: what the outputs of layers are searched for."""

from __future__ import annotations

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import Tensors


def _in_bf16(inputs: Tensors, *names: str) -> Tensors:
    return {**inputs, **{name: inputs[name].to(torch.bfloat16).float() for name in names if name in inputs}}


def tables_in_bf16(inputs: Tensors, dims: Dims) -> tuple[Tensors, Dims]:
    """cos and sin are rounded before they are used, as Hugging Face's implementation does; the contract keeps them fp32."""
    return _in_bf16(inputs, "rope_cos", "rope_sin"), dims


def norm_weights_in_bf16(inputs: Tensors, dims: Dims) -> tuple[Tensors, Dims]:
    """The weights of all norms are kept in bf16."""
    names = ("input_rms_weight", "q_norm_weight", "k_norm_weight", "post_rms_weight", "final_norm_weight")
    return _in_bf16(inputs, *names), dims


def other_eps(inputs: Tensors, dims: Dims) -> tuple[Tensors, Dims]:
    """The usual eps of other models."""
    return inputs, dims.replace(eps=1e-5)


#: By what they are, as a clause that follows "a kernel where".
MISTAKES = {
    "the RoPE tables are rounded to bf16": tables_in_bf16,
    "the norms' weights are rounded to bf16": norm_weights_in_bf16,
    "eps is 1e-5": other_eps,
}
