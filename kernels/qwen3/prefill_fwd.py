"""A whole prefill step in one program: all layers for the new tokens, then logits of each sequence's last one."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel(
    "qwen3/prefill_fwd",
    name="prefill_fwd",
    toolchain="pypto",
    capabilities=("paged_kv", "variable_batch", "stacked_weights", "fused_layers", "fused_lm_head"),
    accepts=lambda dims: (
        (dims.D % 16 == 0 and dims.NKV * dims.D > 16)
        or "prefill_fwd takes D in multiples of 16, not 16 itself where NKV = 1: see fragments.write_rows"
    ),
)
def prefill_fwd(dims: Dims) -> Any:
    """L decoder layers for a packed chunk of new tokens, then final norm and vocabulary projection of each sequence's last token.

    The tiles are those of ``prefill_layer``. Since no token attends to a later tile, a tile goes through all layers before the
    next one begins; only its own hidden states are kept meanwhile, so the workspace does not grow with the number of tokens.
    The last token's row is noted after every tile, and that of a sequence's last tile stays. Any number of tokens, and of
    sequences up to ``dims.B``. Cache rows are written in whole blocks of 32 bytes (see ``fragments.write_rows``), so ``D`` is a
    multiple of 16, and more than 16 where ``NKV`` is 1; otherwise any dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, D, I, S, L, V = dims.B, dims.H, dims.D, dims.I, dims.S, dims.L, dims.V  # noqa: E741  the contract's symbol
    Q, KV, ROWS = dims.NH * dims.D, dims.NKV * dims.D, dims.L * dims.NB * dims.NKV * dims.BS

    @pypto.frontend.jit()
    def prefill_fwd(
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
        chunk_lens: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        chunk_offsets: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
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
        chunks = fragments.Chunks(chunk_lens, chunk_offsets, slot_mapping)
        mask = fragments.causal_mask(dims)
        last = pypto.tensor([B, H], pypto.DT_BF16, "last")
        for tile in fragments.tiles_of(chunks, cache, dims):
            hidden = pypto.tensor([fragments.tile_tokens(dims), H], pypto.DT_BF16, "hidden")
            hidden[:] = fragments.read_tile(hidden_states, tile, dims)
            for layer in pypto.loop(L, name="LAYER", idx_name="layer"):
                hidden[:] = fragments.prefill_tile(
                    hidden, tile, mask, weights, slot_mapping, rope_cos, rope_sin, cache, dims, layer
                )
            fragments.set_vector_tiles(1, H)
            pypto.assemble(pypto.mul(pypto.view(hidden, [1, H], [tile.count - 1, 0]), 1.0), [tile.sequence, 0], last)
        result = fragments.lm_head(fragments.first_rows(last, seq_lens.shape[0], B), final_norm_weight, lm_head_weight, dims)
        pypto.assemble(result, [0, 0], logits)

    return prefill_fwd
