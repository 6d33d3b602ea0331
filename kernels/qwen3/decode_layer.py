"""One decoder layer on contiguous caches."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("qwen3/decode_layer", name="decode_layer", toolchain="pypto", capabilities=("host_loop",))
def decode_layer(dims: Dims) -> Any:
    """One decoder layer for one new token a sequence, from bf16 hidden states to bf16 hidden states.

    The stages are those of the kernels beside this one, joined in ``fragments.decode_layer``, with their tile shapes; only the
    probabilities take an optional rounding (to bf16). Keys and values of the current position are written to the caches first,
    and attention then reads them from there.

    A host drives a deeper model with it layer by layer: each call gets the row slices of that layer's weights and caches, and
    the ``out`` of the layer before as ``hidden_states``. Any dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, D, I, S = dims.B, dims.H, dims.D, dims.I, dims.S  # noqa: E741  the contract's symbol
    NKV, Q, KV = dims.NKV, dims.NH * dims.D, dims.NKV * dims.D

    @pypto.frontend.jit()
    def decode_layer(
        hidden_states: pypto.Tensor([B, H], pypto.DT_BF16),
        input_rms_weight: pypto.Tensor([1, H], pypto.DT_FP32),
        wq: pypto.Tensor([H, Q], pypto.DT_BF16),
        wk: pypto.Tensor([H, KV], pypto.DT_BF16),
        wv: pypto.Tensor([H, KV], pypto.DT_BF16),
        q_norm_weight: pypto.Tensor([1, D], pypto.DT_FP32),
        k_norm_weight: pypto.Tensor([1, D], pypto.DT_FP32),
        wo: pypto.Tensor([Q, H], pypto.DT_BF16),
        w_gate: pypto.Tensor([H, I], pypto.DT_BF16),
        w_up: pypto.Tensor([H, I], pypto.DT_BF16),
        w_down: pypto.Tensor([I, H], pypto.DT_BF16),
        post_rms_weight: pypto.Tensor([1, H], pypto.DT_FP32),
        seq_lens: pypto.Tensor([B], pypto.DT_INT32),
        rope_cos: pypto.Tensor([S, D], pypto.DT_FP32),
        rope_sin: pypto.Tensor([S, D], pypto.DT_FP32),
        k_cache: pypto.Tensor([B * NKV * S, D], pypto.DT_BF16),
        v_cache: pypto.Tensor([B * NKV * S, D], pypto.DT_BF16),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        weights = fragments.LayerWeights(
            input_rms_weight, wq, wk, wv, q_norm_weight, k_norm_weight, wo, w_gate, w_up, w_down, post_rms_weight
        )
        out[:] = fragments.decode_layer(hidden_states, weights, seq_lens, rope_cos, rope_sin, k_cache, v_cache, dims)

    return decode_layer
