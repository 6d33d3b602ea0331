"""RMSNorm of the heads of queries and keys."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("qwen3/qk_norm", name="qk_norm", toolchain="pypto")
def qk_norm(dims: Dims) -> Any:
    """RMSNorm of every query head and every key head by itself, in fp32 throughout.

    Heads become rows, ``[B*heads, D]``, so that it is the ordinary norm of rows of ``D``; a vector tile holds 8192 elements of
    whole heads (64 heads of Qwen3-14B). Any dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, D, Q, KV = dims.B, dims.D, dims.NH * dims.D, dims.NKV * dims.D

    @pypto.frontend.jit()
    def qk_norm(
        q: pypto.Tensor([B, Q], pypto.DT_FP32),
        k: pypto.Tensor([B, KV], pypto.DT_FP32),
        q_norm_weight: pypto.Tensor([1, D], pypto.DT_FP32),
        k_norm_weight: pypto.Tensor([1, D], pypto.DT_FP32),
        q_out: pypto.Tensor([B, Q], pypto.DT_FP32),
        k_out: pypto.Tensor([B, KV], pypto.DT_FP32),
    ):
        q_out[:] = fragments.norm_heads(q, q_norm_weight, dims)
        k_out[:] = fragments.norm_heads(k, k_norm_weight, dims)

    return qk_norm
