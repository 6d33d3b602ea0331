"""PyPTO kernels that read what nothing wrote.

The compiled graph shows it and the interpreter cannot: it reads what nothing wrote of a buffer as 0.0, which is right here; a
device has garbage there.
"""

from __future__ import annotations

from typing import Any

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.pypto.weaving import faulty
from conformance.lanes.compile_only import COMPILE_ONLY

Tensor = Any


@faulty.computes("rms_norm", kind="unwritten", detectors=("unwritten_read",), lane=COMPILE_ONLY.name)
def padding_not_cleared(fragments: Any, x: Tensor, weight: Tensor, out: Tensor, dims: Dims) -> None:
    """The squares are added up over rows padded to a wider tile, and nothing clears the padding."""
    pypto, width = fragments.pypto, dims.H + 64
    fragments.set_vector_tiles(dims.B, width)
    wide = pypto.cast(x, pypto.DT_FP32)
    squares = pypto.tensor([dims.B, width], pypto.DT_FP32, "squares")
    pypto.assemble(pypto.mul(wide, wide), [0, 0], squares)
    mean_square = pypto.mul(pypto.sum(squares, -1, True), 1.0 / dims.H)
    normalised = pypto.div(wide, pypto.sqrt(pypto.add(mean_square, dims.eps)))
    out[:] = pypto.cast(pypto.mul(normalised, weight), pypto.DT_BF16)


@faulty.computes("o_proj", lane=COMPILE_ONLY.name, name="padding_not_cleared")
def k_not_cleared(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """K is padded to twice its depth, and nothing clears the activations' padding."""
    pypto, width = fragments.pypto, dims.NH * dims.D
    fragments.set_vector_tiles(2 * width, dims.H)
    padded = pypto.tensor([dims.B, 2 * width], pypto.DT_BF16, "padded")
    pypto.assemble(pypto.mul(attn, 1.0), [0, 0], padded)
    deep = pypto.concat([wo, wo], 0)
    fragments.set_cube_tiles(dims.B, 2 * width, dims.H)
    product = pypto.matmul(padded, deep, pypto.DT_FP32)
    fragments.set_vector_tiles(dims.B, dims.H)
    out[:] = pypto.add(product, pypto.cast(residual, pypto.DT_FP32))


@faulty.computes("o_proj", kind="unwritten", detectors=("unwritten_read",), lane=COMPILE_ONLY.name)
def accumulator_half_cleared(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """A loop over K adds to a buffer of which only the left half was cleared."""
    pypto, depth = fragments.pypto, 64
    fragments.set_cube_tiles(dims.B, depth, dims.H)
    fragments.set_vector_tiles(dims.B, dims.H)
    total = pypto.tensor([dims.B, dims.H], pypto.DT_FP32, "total")
    pypto.assemble(pypto.full([dims.B, dims.H // 2], 0.0, pypto.DT_FP32), [0, 0], total)
    for tile in pypto.loop(dims.NH * dims.D // depth, name="DEPTH", idx_name="tile"):
        part = pypto.view(attn, [dims.B, depth], [0, tile * depth])
        total[:] = pypto.add(total, pypto.matmul(part, pypto.view(wo, [depth, dims.H], [tile * depth, 0]), pypto.DT_FP32))
    out[:] = pypto.add(total, pypto.cast(residual, pypto.DT_FP32))
