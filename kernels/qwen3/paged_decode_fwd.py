"""A whole decode step on paged caches in one program."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel(
    "qwen3/paged_decode_fwd",
    name="paged_decode_fwd",
    toolchain="pypto",
    capabilities=("paged_kv", "variable_batch", "stacked_weights", "fused_layers", "fused_lm_head"),
)
def paged_decode_fwd(dims: Dims) -> Any:
    """A whole decode step, from hidden states to logits, on paged caches, for any batch up to ``dims.B``.

    The loop over the layers is that of ``decode_fwd_layers``, its body that of ``paged_decode_layer``, and the end that of
    ``lm_head``. Hidden states go from one trip to the next in ``hidden``, a tile of ``dims.B`` rows of which those of the batch
    are ever written or read. Any
    dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, D, I, S, L, V = dims.B, dims.H, dims.D, dims.I, dims.S, dims.L, dims.V  # noqa: E741  the contract's symbol
    Q, KV, ROWS = dims.NH * dims.D, dims.NKV * dims.D, dims.L * dims.NB * dims.NKV * dims.BS

    @pypto.frontend.jit()
    def paged_decode_fwd(
        hidden_states: pypto.Tensor([pypto.DYNAMIC, H], pypto.DT_BF16),
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
        seq_lens: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        block_table: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        slot_mapping: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        rope_cos: pypto.Tensor([S, D], pypto.DT_FP32),
        rope_sin: pypto.Tensor([S, D], pypto.DT_FP32),
        k_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        v_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        final_norm_weight: pypto.Tensor([1, H], pypto.DT_FP32),
        lm_head_weight: pypto.Tensor([V, H], pypto.DT_BF16),
        logits: pypto.Tensor([pypto.DYNAMIC, V], pypto.DT_FP32),
    ):
        weights = fragments.LayerWeights(
            input_rms_weight, wq, wk, wv, q_norm_weight, k_norm_weight, wo, w_gate, w_up, w_down, post_rms_weight
        )
        cache = fragments.PagedCache(seq_lens, block_table, k_cache, v_cache)
        batch = hidden_states.shape[0]
        fragments.set_vector_tiles(B, H)
        hidden = pypto.tensor([B, H], pypto.DT_BF16, "hidden")
        pypto.assemble(pypto.mul(fragments.first_rows(hidden_states, batch, B), 1.0), [0, 0], hidden)
        for layer in pypto.loop(L, name="LAYER", idx_name="layer"):
            result = fragments.paged_decode_layer(hidden, batch, weights, slot_mapping, rope_cos, rope_sin, cache, dims, layer)
            pypto.assemble(result, [0, 0], hidden)
        result = fragments.lm_head(fragments.first_rows(hidden, batch, B), final_norm_weight, lm_head_weight, dims)
        pypto.assemble(result, [0, 0], logits)

    return paged_decode_fwd
