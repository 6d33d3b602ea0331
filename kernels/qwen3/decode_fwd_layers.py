"""All decoder layers in one program."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel(
    "qwen3/decode_fwd_layers",
    name="decode_fwd_layers",
    toolchain="pypto",
    capabilities=("stacked_weights", "fused_layers", "chunked_layers"),
)
def decode_fwd_layers(dims: Dims) -> Any:
    """L decoder layers in one program: a loop on the device over stacked weights and caches.

    The body is ``fragments.decode_layer``, the same as the single layer's, on slices at the layer's index. Hidden states go
    from one trip to the next in ``hidden``, in bf16, as the contract rounds them. ``hidden[:] = ...`` writes that tensor;
    ``hidden = ...`` would only name another one, and every layer would read the first layer's input again. For the same reason
    the first value is the result of an operation (times one, which keeps every bit): the bare input cannot be assigned.

    A chunk of a deeper model is the same program, built for as many layers as the chunk has and given the row slices of
    weights and caches that belong to them; ``out`` of one chunk is ``hidden_states`` of the next. Any dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, D, I, S, L = dims.B, dims.H, dims.D, dims.I, dims.S, dims.L  # noqa: E741  the contract's symbol
    NKV, Q, KV = dims.NKV, dims.NH * dims.D, dims.NKV * dims.D

    @pypto.frontend.jit()
    def decode_fwd_layers(
        hidden_states: pypto.Tensor([B, H], pypto.DT_BF16),
        input_rms_weight: pypto.Tensor([L, H], pypto.DT_FP32),
        wq: pypto.Tensor([L * H, Q], pypto.DT_BF16),
        wk: pypto.Tensor([L * H, KV], pypto.DT_BF16),
        wv: pypto.Tensor([L * H, KV], pypto.DT_BF16),
        q_norm_weight: pypto.Tensor([L, D], pypto.DT_FP32),
        k_norm_weight: pypto.Tensor([L, D], pypto.DT_FP32),
        wo: pypto.Tensor([L * Q, H], pypto.DT_BF16),
        w_gate: pypto.Tensor([L * H, I], pypto.DT_BF16),
        w_up: pypto.Tensor([L * H, I], pypto.DT_BF16),
        w_down: pypto.Tensor([L * I, H], pypto.DT_BF16),
        post_rms_weight: pypto.Tensor([L, H], pypto.DT_FP32),
        seq_lens: pypto.Tensor([B], pypto.DT_INT32),
        rope_cos: pypto.Tensor([S, D], pypto.DT_FP32),
        rope_sin: pypto.Tensor([S, D], pypto.DT_FP32),
        k_cache: pypto.Tensor([L * B * NKV * S, D], pypto.DT_BF16),
        v_cache: pypto.Tensor([L * B * NKV * S, D], pypto.DT_BF16),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        weights = fragments.LayerWeights(
            input_rms_weight, wq, wk, wv, q_norm_weight, k_norm_weight, wo, w_gate, w_up, w_down, post_rms_weight
        )
        fragments.set_vector_tiles(B, H)
        hidden = pypto.tensor([B, H], pypto.DT_BF16, "hidden")
        hidden[:] = pypto.mul(hidden_states, 1.0)
        for layer in pypto.loop(L, name="LAYER", idx_name="layer"):
            hidden[:] = fragments.decode_layer(hidden, weights, seq_lens, rope_cos, rope_sin, k_cache, v_cache, dims, layer)
        fragments.set_vector_tiles(B, H)
        out[:] = pypto.mul(hidden, 1.0)

    return decode_fwd_layers
