"""Decode attention over a contiguous cache."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("qwen3/attention", name="attention", toolchain="pypto", profile="probabilities")
def attention(dims: Dims) -> Any:
    """Softmax attention of one new token a sequence over its first ``seq_lens[b]`` cache rows, by blocks.

    Scores, their maximum and the sums are fp32; the probabilities are cast to bf16 for the second product, before they are
    divided by the sum, which adds up what they were in fp32. Blocks are four pages' worth of rows (see ``block_rows``), with a
    valid shape that ends where the sequence does; vector tiles are as wide as a block, cube tiles as in ``set_cube_tiles``. Any
    dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, Q, D, S, NKV = dims.B, dims.NH * dims.D, dims.D, dims.S, dims.NKV

    @pypto.frontend.jit()
    def attention(
        q: pypto.Tensor([B, Q], pypto.DT_BF16),
        seq_lens: pypto.Tensor([B], pypto.DT_INT32),
        k_cache: pypto.Tensor([B * NKV * S, D], pypto.DT_BF16),
        v_cache: pypto.Tensor([B * NKV * S, D], pypto.DT_BF16),
        out: pypto.Tensor([B, Q], pypto.DT_BF16),
    ):
        fragments.attend(q, seq_lens, k_cache, v_cache, out, dims)

    return attention
