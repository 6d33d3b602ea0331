"""The query, key and value projections."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("qwen3/qkv_proj", name="qkv_proj", toolchain="pypto")
def qkv_proj(dims: Dims) -> Any:
    """Three products of the same B rows; bf16 operands, fp32 accumulation, no rounding of the results.

    The cube tile takes all rows and 256 columns of a weight; the keys' and values' weights are narrower (``NKV*D``), so their
    products set a tile of their own. Any dimensions: PyPTO pads the last tile in each direction.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, Q, KV = dims.B, dims.H, dims.NH * dims.D, dims.NKV * dims.D

    @pypto.frontend.jit()
    def qkv_proj(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        wq: pypto.Tensor([H, Q], pypto.DT_BF16),
        wk: pypto.Tensor([H, KV], pypto.DT_BF16),
        wv: pypto.Tensor([H, KV], pypto.DT_BF16),
        q: pypto.Tensor([B, Q], pypto.DT_FP32),
        k: pypto.Tensor([B, KV], pypto.DT_FP32),
        v: pypto.Tensor([B, KV], pypto.DT_FP32),
    ):
        fragments.set_cube_tiles(B, H, Q)
        q[:] = pypto.matmul(x, wq, pypto.DT_FP32)
        fragments.set_cube_tiles(B, H, KV)
        k[:] = pypto.matmul(x, wk, pypto.DT_FP32)
        v[:] = pypto.matmul(x, wv, pypto.DT_FP32)

    return qkv_proj
