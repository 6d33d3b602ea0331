"""Kernels of ``rms_norm`` for fake cards, which compute what the script says and not what these say."""

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel, kernel


def _build(dims: Dims, rows: Any = None) -> Any:
    import pypto

    B, H = rows or dims.B, dims.H

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        pypto.set_vec_tile_shapes(4, H)
        wide = pypto.cast(x, pypto.DT_FP32)
        mean_square = pypto.sum(pypto.mul(pypto.mul(wide, wide), 1.0 / H), -1, True)
        out[:] = pypto.cast(pypto.mul(pypto.div(wide, pypto.sqrt(pypto.add(mean_square, dims.eps))), weight), pypto.DT_BF16)

    return rms_norm


def _named(name: str) -> Kernel:
    def build(dims: Dims) -> Any:
        jit = _build(dims)
        jit.__name__ = name
        return jit

    return kernel("rms_norm", toolchain="pypto", name=name)(build)


NAMES = [f"k{number:02}" for number in range(18)]
globals().update({name: _named(name) for name in NAMES})


@kernel("rms_norm", toolchain="pypto", capabilities=["variable_batch"])
def any_batch(dims: Dims) -> Any:
    """One build for every batch."""
    import pypto

    return _build(dims, pypto.DYNAMIC)
