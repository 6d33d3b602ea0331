"""A kernel that gives right results for every batch, by another program for each: what ``variable_batch`` is not."""

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("rms_norm", toolchain="pypto", capabilities=["variable_batch"], capacity=4)
def static_batch(dims: Dims) -> Any:
    """The batch is an extent that PyPTO knows when it compiles, and the loop over it is unrolled in Python."""
    import pypto

    H, eps = dims.H, dims.eps

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([pypto.STATIC, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([pypto.STATIC, H], pypto.DT_BF16),
    ):
        pypto.set_vec_tile_shapes(4, H)
        for b in range(x.shape[0]):
            wide = pypto.cast(pypto.view(x, [1, H], [b, 0]), pypto.DT_FP32)
            mean_square = pypto.sum(pypto.mul(pypto.mul(wide, wide), 1.0 / H), -1, True)
            normalised = pypto.div(wide, pypto.sqrt(pypto.add(mean_square, eps)))
            pypto.assemble(pypto.cast(pypto.mul(normalised, weight), pypto.DT_BF16), [b, 0], out)

    return rms_norm
