"""PyPTO kernels of layers with a fault between their parts."""

from __future__ import annotations

from typing import Any

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.pypto.weaving import faulty

Tensor = Any
Scalar = Any


@faulty.edits("decode_layer", name="residual_missing")
def layer_without_residual(fragments: Any) -> None:
    """The residual after attention is not added."""
    pypto, right = fragments.pypto, fragments.after_attention

    def after_attention(attended: Tensor, hidden_states: Tensor, weights: Any, dims: Dims, layer: Scalar = 0) -> Tensor:
        fragments.set_vector_tiles(dims.B, dims.H)
        return right(attended, pypto.mul(hidden_states, 0.0), weights, dims, layer)

    fragments.after_attention = after_attention


@faulty.edits("decode_layer")
def second_residual_wrong(fragments: Any) -> None:
    """The layer's input is added after the MLP, not what attention made of it."""
    pypto, right_norm, right = fragments.pypto, fragments.rms_norm, fragments.after_attention

    def after_attention(attended: Tensor, hidden_states: Tensor, weights: Any, dims: Dims, layer: Scalar = 0) -> Tensor:
        residual = []

        def remembering(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            residual.append(x)
            return right_norm(x, weight, eps)

        fragments.rms_norm = remembering
        result = pypto.cast(right(attended, hidden_states, weights, dims, layer), pypto.DT_FP32)
        fragments.rms_norm = right_norm
        change = pypto.sub(pypto.cast(hidden_states, pypto.DT_FP32), residual[0])
        return pypto.cast(pypto.add(result, change), pypto.DT_BF16)

    fragments.after_attention = after_attention


@faulty.edits("decode_fwd_layers", "decode_fwd")
def weights_of_layer_0(fragments: Any) -> None:
    """Every layer uses the first one's weights."""
    right = fragments.layer_rows

    def layer_rows(stacked: Tensor, layer: Scalar, rows: int = 1) -> Tensor:
        return right(stacked, 0, rows)

    fragments.layer_rows = layer_rows


@faulty.edits("decode_fwd_layers")
def caches_of_layer_0(fragments: Any) -> None:
    """Every layer reads and writes the first one's caches."""
    right = fragments.first_row

    def first_row(dims: Dims, layer: Scalar, sequence: Scalar, kv_head: int) -> Scalar:
        return right(dims, 0, sequence, kv_head)

    fragments.first_row = first_row
