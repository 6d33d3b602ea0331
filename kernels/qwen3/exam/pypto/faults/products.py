"""PyPTO kernels with a fault of a matrix product, or of the MLP."""

from __future__ import annotations

import functools
from typing import Any

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.pypto.softmax import rounded
from conformance.kernels.qwen3.exam.pypto.weaving import faulty

Tensor = Any


# Projections


def _by_k_tiles(fragments: Any, x: Tensor, weight: Tensor, tiles: list[int], after_sum: Any = None) -> Tensor:
    """``x @ weight`` in fp32 as the sum of the products of 32-wide tiles of K; ``after_sum`` follows each addition."""
    pypto, total = fragments.pypto, None
    for tile in tiles:
        part = pypto.matmul(
            pypto.view(x, [x.shape[0], 32], [0, tile * 32]),
            pypto.view(weight, [32, weight.shape[1]], [tile * 32, 0]),
            pypto.DT_FP32,
        )
        total = part if total is None else pypto.add(total, part)
        total = total if after_sum is None else after_sum(total)
    return total


@faulty.computes("qkv_proj")
def k_and_v_exchanged(
    fragments: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, q: Tensor, k: Tensor, v: Tensor, dims: Dims
) -> None:
    """The keys are made with the values' weight and the other way round."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.H, dims.NKV * dims.D)
    for weight, out in ((wq, q), (wv, k), (wk, v)):
        out[:] = pypto.matmul(x, weight, pypto.DT_FP32)


def _project(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims, product: Any) -> None:
    """The right output projection but for its ``product(attn, wo)``."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.NH * dims.D, dims.H)
    fragments.set_vector_tiles(dims.B, dims.H)
    out[:] = pypto.add(product(attn, wo), pypto.cast(residual, pypto.DT_FP32))


@faulty.computes("o_proj")
def weight_transposed(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The weight is used transposed."""
    pypto = fragments.pypto
    _project(fragments, attn, wo, residual, out, dims, lambda a, w: pypto.matmul(a, w, pypto.DT_FP32, b_trans=True))


@faulty.computes("o_proj", name="bf16_accumulation")
def bf16_sums(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The sum over K is kept in bf16 from tile to tile."""
    tiles = list(range(dims.NH * dims.D // 32))
    _project(
        fragments,
        attn,
        wo,
        residual,
        out,
        dims,
        lambda a, w: _by_k_tiles(fragments, a, w, tiles, functools.partial(rounded, fragments)),
    )


@faulty.computes("o_proj")
def last_k_tile_missing(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The last 32 of the products over K are left out."""
    tiles = list(range(dims.NH * dims.D // 32 - 1))
    _project(fragments, attn, wo, residual, out, dims, lambda a, w: _by_k_tiles(fragments, a, w, tiles))


@faulty.computes("o_proj")
def bf16_result(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The sum with the residual is rounded to bf16, as if the residual stream were."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.NH * dims.D, dims.H)
    fragments.set_vector_tiles(dims.B, dims.H)
    summed = pypto.add(pypto.matmul(attn, wo, pypto.DT_FP32), pypto.cast(residual, pypto.DT_FP32))
    out[:] = rounded(fragments, summed)


@faulty.computes("o_proj")
def residual_missing(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The residual is not added."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.NH * dims.D, dims.H)
    out[:] = pypto.matmul(attn, wo, pypto.DT_FP32)


@faulty.computes("o_proj")
def column_tile_unwritten(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The last 16 columns are not written."""
    pypto, used = fragments.pypto, dims.H - 16
    fragments.set_cube_tiles(dims.B, dims.NH * dims.D, dims.H)
    fragments.set_vector_tiles(dims.B, dims.H)
    summed = pypto.add(pypto.matmul(attn, wo, pypto.DT_FP32), pypto.cast(residual, pypto.DT_FP32))
    pypto.assemble(pypto.view(summed, [dims.B, used], [0, 0]), [0, 0], out)


@faulty.computes("qkv_proj", kind="unwritten", detectors=("unwritten",))
def output_never_written(
    fragments: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, q: Tensor, k: Tensor, v: Tensor, dims: Dims
) -> None:
    """The name ``v`` is bound to the values' product; the output itself stays as it was."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.H, dims.NKV * dims.D)
    q[:] = pypto.matmul(x, wq, pypto.DT_FP32)
    k[:] = pypto.matmul(x, wk, pypto.DT_FP32)
    v = pypto.matmul(x, wv, pypto.DT_FP32)  # noqa: F841  the fault


# The MLP


@faulty.edits("mlp", "decode_layer")
def relu(fragments: Any) -> None:
    """The gate goes through relu, not silu."""
    pypto = fragments.pypto

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return pypto.cast(pypto.mul(pypto.maximum(gate, 0.0), up), pypto.DT_BF16)

    fragments.gated = gated


@faulty.edits("mlp", "decode_layer")
def gate_and_up_exchanged(fragments: Any) -> None:
    """Gate and up are exchanged."""
    right = fragments.gated

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return right(up, gate)

    fragments.gated = gated
