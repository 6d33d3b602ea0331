"""The output projection and its residual."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("qwen3/o_proj", name="o_proj", toolchain="pypto")
def o_proj(dims: Dims) -> Any:
    """``attn @ wo + residual``: the product accumulates in fp32 and stays there for the sum.

    The cube tile takes all rows and 256 columns of the weight; the vector tile of the sum, whole rows. Any dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, Q = dims.B, dims.H, dims.NH * dims.D

    @pypto.frontend.jit()
    def o_proj(
        attn: pypto.Tensor([B, Q], pypto.DT_BF16),
        wo: pypto.Tensor([Q, H], pypto.DT_BF16),
        residual: pypto.Tensor([B, H], pypto.DT_BF16),
        out: pypto.Tensor([B, H], pypto.DT_FP32),
    ):
        fragments.set_cube_tiles(B, Q, H)
        fragments.set_vector_tiles(B, H)
        projected = pypto.matmul(attn, wo, pypto.DT_FP32)
        out[:] = pypto.add(projected, pypto.cast(residual, pypto.DT_FP32))

    return o_proj
