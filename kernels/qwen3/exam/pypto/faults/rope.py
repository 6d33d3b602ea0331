"""PyPTO kernels with a fault of the rotation."""

from __future__ import annotations

from typing import Any

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.pypto.weaving import faulty

Tensor = Any
Scalar = Any


@faulty.edits("rope", "decode_layer")
def wrong_sign(fragments: Any) -> None:
    """The rotation goes the other way: the sign of the sine is lost."""
    pypto, right = fragments.pypto, fragments.rotate

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
        fragments.set_vector_tiles(dims.B, 1, dims.D)
        return right(x, cos, pypto.mul(sin, -1.0), dims)

    fragments.rotate = rotate


@faulty.edits("rope", "decode_layer")
def interleaved_pairs(fragments: Any) -> None:
    """Neighbouring elements are rotated, another model's way, instead of the two halves."""
    pypto, right = fragments.pypto, fragments.rotate

    def swapped(x: Tensor, heads: int, rows: int, columns: int, dims: Dims) -> Tensor:
        x = pypto.reshape(x, [dims.B * heads, rows, columns])
        fragments.set_vector_tiles(dims.B * heads, rows, columns)
        return pypto.reshape(pypto.transpose(x, 1, 2), [dims.B, heads * dims.D])

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
        heads, half = x.shape[1] // dims.D, dims.D // 2
        rotated = right(swapped(x, heads, half, 2, dims), cos, sin, dims)
        return pypto.cast(swapped(pypto.cast(rotated, pypto.DT_FP32), heads, 2, half, dims), pypto.DT_BF16)

    fragments.rotate = rotate


@faulty.edits("rope", "decode_layer")
def position_off_by_one(fragments: Any) -> None:
    """The position is taken to be ``seq_lens``, not one less; at the tables' end it is one too low instead."""
    pypto, right = fragments.pypto, fragments.rope_rows

    def rope_rows(
        rope_cos: Tensor, rope_sin: Tensor, seq_lens: Tensor, dims: Dims, batch: Scalar | None = None
    ) -> tuple[Tensor, Tensor]:
        fragments.set_vector_tiles(dims.B)
        past = pypto.add(seq_lens, 1)
        distance = pypto.maximum(pypto.sub(past, dims.S), 0)  # 1 for the longest
        cos, sin = right(rope_cos, rope_sin, pypto.sub(past, pypto.mul(distance, 2)), dims, batch)
        return cos, sin

    fragments.rope_rows = rope_rows


@faulty.edits("rope")
def row0_length(fragments: Any) -> None:
    """Every sequence is rotated by the first one's position."""
    pypto, right = fragments.pypto, fragments.rotate

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
        fragments.set_vector_tiles(dims.B, 1, dims.D)
        shape = [dims.B, 1, dims.D // 2]
        first_cos, first_sin = (pypto.view(table, [1, *shape[1:]], [0, 0, 0]) for table in (cos, sin))
        return right(x, pypto.expand_clone(first_cos, shape), pypto.expand_clone(first_sin, shape), dims)

    fragments.rotate = rotate


@faulty.edits("rope")
def k_not_rotated(fragments: Any) -> None:
    """Keys are cast and not rotated."""
    pypto, right = fragments.pypto, fragments.rotate

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
        if x.shape[1] == dims.NH * dims.D:
            return right(x, cos, sin, dims)
        fragments.set_vector_tiles(dims.B, x.shape[1])
        return pypto.cast(x, pypto.DT_BF16)

    fragments.rotate = rotate


@faulty.edits("rope")
def bf16_tables(fragments: Any) -> None:
    """The tables' rows are rounded to bf16."""
    pypto, right = fragments.pypto, fragments.rope_rows

    def rope_rows(
        rope_cos: Tensor, rope_sin: Tensor, seq_lens: Tensor, dims: Dims, batch: Scalar | None = None
    ) -> tuple[Tensor, Tensor]:
        cos, sin = right(rope_cos, rope_sin, seq_lens, dims, batch)
        fragments.set_vector_tiles(dims.B, 1, dims.D)
        cos, sin = (pypto.cast(pypto.cast(table, pypto.DT_BF16), pypto.DT_FP32) for table in (cos, sin))
        return cos, sin

    fragments.rope_rows = rope_rows
