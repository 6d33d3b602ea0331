"""The whole decode step in one program."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel(
    "qwen3/decode_fwd", name="decode_fwd", toolchain="pypto", capabilities=("stacked_weights", "fused_layers", "fused_lm_head")
)
def decode_fwd(dims: Dims) -> Any:
    """L decoder layers, the final norm and the vocabulary projection: one dispatch from hidden states to logits.

    The loop is that of ``decode_fwd_layers``, whose docstring says how hidden states go from one layer to the next; the head,
    ``fragments.lm_head``, reads what the last layer left, rounded to bf16 as after every layer. Logits are fp32, unrounded.
    Tiles are those of the pieces.

    Any dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, D, I, S, L, V = dims.B, dims.H, dims.D, dims.I, dims.S, dims.L, dims.V  # noqa: E741  the contract's symbol
    NKV, Q, KV = dims.NKV, dims.NH * dims.D, dims.NKV * dims.D

    @pypto.frontend.jit()
    def decode_fwd(
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
        final_norm_weight: pypto.Tensor([1, H], pypto.DT_FP32),
        lm_head_weight: pypto.Tensor([V, H], pypto.DT_BF16),
        logits: pypto.Tensor([B, V], pypto.DT_FP32),
    ):
        weights = fragments.LayerWeights(
            input_rms_weight, wq, wk, wv, q_norm_weight, k_norm_weight, wo, w_gate, w_up, w_down, post_rms_weight
        )
        fragments.set_vector_tiles(B, H)
        hidden = pypto.tensor([B, H], pypto.DT_BF16, "hidden")
        hidden[:] = pypto.mul(hidden_states, 1.0)
        for layer in pypto.loop(L, name="LAYER", idx_name="layer"):
            hidden[:] = fragments.decode_layer(hidden, weights, seq_lens, rope_cos, rope_sin, k_cache, v_cache, dims, layer)
        logits[:] = fragments.lm_head(hidden, final_norm_weight, lm_head_weight, dims)

    return decode_fwd
