"""The second model's kernels, in torch."""

from __future__ import annotations

import torch

import conformance

Tensor = torch.Tensor


@conformance.kernel("gelu/layer_norm")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """torch's own."""
    out.copy_(torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight[0], bias[0], 1e-5))


@conformance.kernel("gelu/mlp")
def mlp(x: Tensor, w_in: Tensor, w_out: Tensor, out: Tensor) -> None:
    """Two products in fp32, the activation in bf16."""
    hidden = torch.nn.functional.gelu(x.float() @ w_in.float()).to(torch.bfloat16)
    out.copy_(hidden.float() @ w_out.float())
