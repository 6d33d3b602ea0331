"""One decoder layer for the new tokens of a prefill, on paged caches."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel(
    "qwen3/prefill_layer",
    name="prefill_layer",
    toolchain="pypto",
    capabilities=("paged_kv", "variable_batch", "host_loop"),
    accepts=lambda dims: (
        (dims.D % 16 == 0 and dims.NKV * dims.D > 16)
        or "prefill_layer takes D in multiples of 16, not 16 itself where NKV = 1: see fragments.write_rows"
    ),
)
def prefill_layer(dims: Dims) -> Any:
    """One decoder layer for a packed chunk of new tokens, of any number of sequences and tokens.

    The chunk of every sequence is cut into tiles of ``fragments.tile_tokens`` tokens, each on one page of the cache, and one tile
    after another goes through the layer: its keys and values are written to its page, and its attention then reads the pages up
    to that one, with a causal mask. Roundings and tile shapes are those of ``decode_layer``. Rows are written in blocks of
    32 bytes (see ``fragments.write_rows``), so ``D`` is a multiple of 16, and more than 16 where ``NKV`` is 1; any dimensions
    otherwise.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    H, D, I, S = dims.H, dims.D, dims.I, dims.S  # noqa: E741  the contract's symbol
    Q, KV, ROWS = dims.NH * dims.D, dims.NKV * dims.D, dims.NB * dims.NKV * dims.BS

    @pypto.frontend.jit()
    def prefill_layer(
        hidden_states: pypto.Tensor([pypto.DYNAMIC, H], pypto.DT_BF16),
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
        seq_lens: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        chunk_lens: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        chunk_offsets: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        block_table: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        slot_mapping: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        rope_cos: pypto.Tensor([S, D], pypto.DT_FP32),
        rope_sin: pypto.Tensor([S, D], pypto.DT_FP32),
        k_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        v_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        out: pypto.Tensor([pypto.DYNAMIC, H], pypto.DT_BF16),
    ):
        weights = fragments.LayerWeights(
            input_rms_weight, wq, wk, wv, q_norm_weight, k_norm_weight, wo, w_gate, w_up, w_down, post_rms_weight
        )
        cache = fragments.PagedCache(seq_lens, block_table, k_cache, v_cache)
        chunks = fragments.Chunks(chunk_lens, chunk_offsets, slot_mapping)
        mask = fragments.causal_mask(dims)
        for tile in fragments.tiles_of(chunks, cache, dims):
            hidden = pypto.tensor([fragments.tile_tokens(dims), H], pypto.DT_BF16, "hidden")
            hidden[:] = fragments.read_tile(hidden_states, tile, dims)
            result = fragments.prefill_tile(hidden, tile, mask, weights, slot_mapping, rope_cos, rope_sin, cache, dims)
            fragments.write_rows(result, tile.count, [tile.row], out)

    return prefill_layer
