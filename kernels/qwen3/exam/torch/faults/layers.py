"""Faults of layers and chains of them: which layer's weights and caches, and what the parts of a layer are given."""

from __future__ import annotations

import torch

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.torch.hooks import CHAINS, CONTIGUOUS_LAYERS, DECODE_LAYERS, fault
from conformance.kernels.qwen3.exam.torch.layers import Arguments, normalised_and_rotated, own_weight
from conformance.kernels.qwen3.exam.torch.operations import Operations

Tensor = torch.Tensor


# Layers


@fault("layer_read", "indexing", *CHAINS)
def history_of_layer_0(layer: int, dims: Dims) -> int:
    """Every layer attends to the first layer's history, and writes its own."""
    return 0


@fault("layer_read", "indexing", *CHAINS)
def history_of_the_next_layer(layer: int, dims: Dims) -> int:
    """Layers are counted from one where the cache is read."""
    return (layer + 1) % dims.L


@fault("weight", "indexing", *CHAINS)
def weights_of_the_next_layer(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """Layers are counted from one where weights are read."""
    return own_weight(name, (layer + 1) % dims.L, t, dims)


@fault("weight", "indexing", *CHAINS)
def layers_in_reverse(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """The layers' weights are stacked from the last."""
    return own_weight(name, dims.L - 1 - layer, t, dims)


@fault("weight", "indexing", *CHAINS)
def norm_weights_of_layer_0(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """Every layer uses the first layer's norm weights."""
    return own_weight(name, 0 if name.endswith(("rms_weight", "norm_weight")) else layer, t, dims)


@fault("weight", "indexing", *CHAINS)
def head_norm_weights_of_layer_0(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """Every layer uses the first layer's Q/K norm weights."""
    return own_weight(name, 0 if name in ("q_norm_weight", "k_norm_weight") else layer, t, dims)


@fault("weight", "indexing", *CHAINS)
def down_projection_of_layer_0(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """Every layer uses the first layer's down projection: its rows were counted by H, not I."""
    return own_weight(name, 0 if name == "w_down" else layer, t, dims)


def _exchanged(one: str, other: str, name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    names = {one: other, other: one}
    return own_weight(names.get(name, name), layer, t, dims)


@fault("weight", "indexing", *DECODE_LAYERS, "decode_fwd_layers", "prefill_layer")
def norm_weights_exchanged(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """The input norm's weight and the second norm's are exchanged."""
    return _exchanged("input_rms_weight", "post_rms_weight", name, layer, t, dims)


@fault("weight", "indexing", *DECODE_LAYERS, "decode_fwd_layers", "prefill_layer")
def head_norm_weights_exchanged(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """The weights of Q norm and K norm are exchanged."""
    return _exchanged("q_norm_weight", "k_norm_weight", name, layer, t, dims)


@fault("weight", "indexing", *DECODE_LAYERS, "prefill_layer")
def k_and_v_weights_exchanged(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """The projections of k and v are exchanged."""
    return _exchanged("wk", "wv", name, layer, t, dims)


@fault("weight", "indexing", *DECODE_LAYERS)
def output_weight_transposed(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """The output projection's weight is used transposed."""
    weight = own_weight(name, layer, t, dims)
    return weight.T.reshape(weight.shape) if name == "wo" else weight


@fault("attention_sum", "value", *DECODE_LAYERS)
def first_residual_twice(product: Tensor, residual: Tensor) -> Tensor:
    """The residual is added twice after attention."""
    return product + residual + residual


@fault("attention_sum", "value", *DECODE_LAYERS, "decode_fwd_layers")
def attention_skipped(product: Tensor, residual: Tensor) -> Tensor:
    """The result of attention is not added."""
    return residual


@fault("attention_sum", "indexing", *DECODE_LAYERS)
def residual_of_the_row_before(product: Tensor, residual: Tensor) -> Tensor:
    """The residual added after attention is that of the row before."""
    return product + residual - residual + residual.roll(1, 0)


@fault("mlp_sum", "value", *DECODE_LAYERS, "decode_fwd_layers")
def mlp_skipped(product: Tensor, residual: Tensor) -> Tensor:
    """The MLP's result is not added."""
    return residual


@fault("mlp_sum", "value", *DECODE_LAYERS, "decode_fwd_layers")
def second_residual_missing(product: Tensor, residual: Tensor) -> Tensor:
    """The residual is not added to the MLP's result."""
    return product + residual - residual


@fault("mlp_sum", "value", *DECODE_LAYERS)
def second_residual_twice(product: Tensor, residual: Tensor) -> Tensor:
    """The residual is added twice to the MLP's result."""
    return product + residual + residual


@fault("mlp_input", "dependency", *DECODE_LAYERS, "decode_fwd_layers")
def mlp_of_the_layers_input(state: Tensor, hidden: Tensor) -> Tensor:
    """The MLP reads the layer's input, not the state after attention."""
    return hidden


@fault("mlp_input", "dependency", *DECODE_LAYERS)
def mlp_of_the_branch(state: Tensor, hidden: Tensor) -> Tensor:
    """The MLP reads the attention's result without the residual."""
    return state - hidden


# q, k and v of a layer


@fault("queries_keys_values", "value", *DECODE_LAYERS, "prefill_layer")
def values_rotated(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, rope_rows: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """Values are rotated like keys."""
    q, k, v = normalised_and_rotated(ops, q, k, v, weights, rope_rows, t, dims)
    return q, k, ops.rotated(v, rope_rows, t["rope_cos"], t["rope_sin"], dims)


@fault("queries_keys_values", "value", *DECODE_LAYERS, "prefill_layer")
def values_normalised(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, rope_rows: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """Values are normalised by head like keys."""
    normalised = ops.heads_normalised(v, weights["k_norm_weight"][0], dims)
    return normalised_and_rotated(ops, q, k, normalised, weights, rope_rows, t, dims)


@fault("queries_keys_values", "value", *DECODE_LAYERS, "prefill_layer")
def normalised_after_rope(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, rope_rows: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """Q and K norm come after RoPE instead of before."""
    q, k = (ops.rotated(tensor, rope_rows, t["rope_cos"], t["rope_sin"], dims) for tensor in (q, k))
    q, k = (ops.heads_normalised(x, weights[name][0], dims) for x, name in ((q, "q_norm_weight"), (k, "k_norm_weight")))
    return ops.cast(q), ops.cast(k), v


@fault("queries_keys_values", "value", *DECODE_LAYERS, "prefill_layer")
def queries_not_rotated(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, rope_rows: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """RoPE is applied to keys only."""
    _, k, v = normalised_and_rotated(ops, q, k, v, weights, rope_rows, t, dims)
    return ops.cast(ops.heads_normalised(q, weights["q_norm_weight"][0], dims)), k, v


@fault("queries_keys_values", "value", *DECODE_LAYERS, "prefill_layer")
def keys_not_rotated(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, rope_rows: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """RoPE is applied to queries only."""
    q, _, v = normalised_and_rotated(ops, q, k, v, weights, rope_rows, t, dims)
    return q, ops.cast(ops.heads_normalised(k, weights["k_norm_weight"][0], dims)), v


@fault("queries_keys_values", "indexing", *DECODE_LAYERS, "prefill_layer")
def keys_of_the_row_before(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, rope_rows: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """The key of every token is that of the row before it."""
    return normalised_and_rotated(ops, q, k.roll(1, 0), v, weights, rope_rows, t, dims)


@fault("layers_run", "dependency", *CHAINS, detectors=("stale_row",))
def layer_dropped(dims: Dims) -> list[int]:
    """The second layer is skipped."""
    return [layer for layer in range(dims.L) if layer != 1]


@fault("layers_run", "dependency", *CHAINS, detectors=("stale_row",))
def last_layer_dropped(dims: Dims) -> list[int]:
    """The loop over layers ends one too early."""
    return list(range(max(dims.L - 1, 1)))


@fault("layer_input", "dependency", *CHAINS)
def carried_state_ignored(hidden: Tensor, first: Tensor) -> Tensor:
    """Every layer reads the chain's initial value instead of the layer before it."""
    return first


@fault("weight", "indexing", *CHAINS)
def weights_of_layer_0(name: str, layer: int, t: Arguments, dims: Dims) -> Tensor:
    """Every layer uses the first layer's weights."""
    return own_weight(name, 0, t, dims)


@fault("cache_layer", "indexing", *CHAINS, detectors=("stale_row",))
def caches_of_layer_0(layer: int, dims: Dims) -> int:
    """Every layer reads and writes the first layer's rows of the cache."""
    return 0


@fault("layer_stride", "indexing", "paged_decode_fwd", "prefill_fwd", detectors=("out_of_bounds",))
def layer_stride_of_pages_in_use(table: list[int] | None, dims: Dims) -> int:
    """A layer's pages start after the pages in use, not after NB."""
    assert table is not None
    return max(table) + 1


@fault("attention_sum", "value", "o_proj", *CONTIGUOUS_LAYERS)
def residual_missing(product: Tensor, residual: Tensor) -> Tensor:
    """The residual is not added."""
    return product


@fault("mlp_residual", "value", *CONTIGUOUS_LAYERS)
def second_residual_wrong(state: Tensor, hidden: Tensor) -> Tensor:
    """The layer's input, not the state after attention, is added to the MLP's result."""
    return hidden


@fault("queries_keys_values", "value", *CONTIGUOUS_LAYERS)
def q_norm_missing(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, rope_rows: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries are not normalised by head."""
    _, k, v = normalised_and_rotated(ops, q, k, v, weights, rope_rows, t, dims)
    return ops.cast(ops.rotated(q, rope_rows, t["rope_cos"], t["rope_sin"], dims)), k, v


@fault("queries_keys_values", "value", *CONTIGUOUS_LAYERS)
def k_norm_missing(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, weights: Arguments, rope_rows: list[int], t: Arguments, dims: Dims
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys are not normalised by head."""
    q, _, v = normalised_and_rotated(ops, q, k, v, weights, rope_rows, t, dims)
    return q, ops.cast(ops.rotated(k, rope_rows, t["rope_cos"], t["rope_sin"], dims)), v
