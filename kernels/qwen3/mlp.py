"""The gated MLP."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("qwen3/mlp", name="mlp", toolchain="pypto")
def mlp(dims: Dims) -> Any:
    """``bf16(silu(x @ w_gate) * (x @ w_up)) @ w_down``; gate and up stay fp32 until their product is cast.

    Cube tiles take all rows and 256 columns of a weight, vector tiles as much of a row as fits 8192 elements. ``I`` need not
    be a multiple of either: PyPTO pads the last tile.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, I = dims.B, dims.H, dims.I  # noqa: E741  the contract's symbol

    @pypto.frontend.jit()
    def mlp(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        w_gate: pypto.Tensor([H, I], pypto.DT_BF16),
        w_up: pypto.Tensor([H, I], pypto.DT_BF16),
        w_down: pypto.Tensor([I, H], pypto.DT_BF16),
        out: pypto.Tensor([B, H], pypto.DT_FP32),
    ):
        fragments.set_cube_tiles(B, H, I)
        gate = pypto.matmul(x, w_gate, pypto.DT_FP32)
        up = pypto.matmul(x, w_up, pypto.DT_FP32)
        fragments.set_vector_tiles(B, I)
        activation = fragments.gated(gate, up)
        fragments.set_cube_tiles(B, I, H)
        out[:] = pypto.matmul(activation, w_down, pypto.DT_FP32)

    return mlp
