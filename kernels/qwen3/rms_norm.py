"""RMSNorm of a batch of hidden states."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("qwen3/rms_norm", name="rms_norm", toolchain="pypto")
def rms_norm(dims: Dims) -> Any:
    """RMSNorm of B rows of H bf16 values; everything is fp32 until one cast at the end.

    A vector tile holds whole rows, so that a row's mean needs no second step. Any ``B`` and ``H``.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, eps = dims.B, dims.H, dims.eps

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        fragments.set_vector_tiles(B, H)
        normalised = fragments.rms_norm(pypto.cast(x, pypto.DT_FP32), weight, eps)
        out[:] = pypto.cast(normalised, pypto.DT_BF16)

    return rms_norm
