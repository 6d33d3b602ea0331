"""Rotary position embedding of queries and keys."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("qwen3/rope", name="rope", toolchain="pypto")
def rope(dims: Dims) -> Any:
    """Rotate-half of every head at its sequence's current position, in fp32, then one cast to bf16.

    The table rows of all sequences are gathered at once, so there is no loop over the batch; a vector tile holds as many whole
    heads as fit 8192 elements. Any dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, D, S, Q, KV = dims.B, dims.D, dims.S, dims.NH * dims.D, dims.NKV * dims.D

    @pypto.frontend.jit()
    def rope(
        q: pypto.Tensor([B, Q], pypto.DT_FP32),
        k: pypto.Tensor([B, KV], pypto.DT_FP32),
        seq_lens: pypto.Tensor([B], pypto.DT_INT32),
        rope_cos: pypto.Tensor([S, D], pypto.DT_FP32),
        rope_sin: pypto.Tensor([S, D], pypto.DT_FP32),
        q_out: pypto.Tensor([B, Q], pypto.DT_BF16),
        k_out: pypto.Tensor([B, KV], pypto.DT_BF16),
    ):
        cos, sin = fragments.rope_rows(rope_cos, rope_sin, seq_lens, dims)
        q_out[:] = fragments.rotate(q, cos, sin, dims)
        k_out[:] = fragments.rotate(k, cos, sin, dims)

    return rope
