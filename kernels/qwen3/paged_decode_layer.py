"""One decoder layer on paged caches."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel(
    "qwen3/paged_decode_layer",
    name="paged_decode_layer",
    toolchain="pypto",
    capabilities=("paged_kv", "variable_batch", "host_loop"),
)
def paged_decode_layer(dims: Dims) -> Any:
    """One decoder layer for one new token a sequence, on a paged cache, for any batch up to ``dims.B``.

    Everything is made for the whole batch in one tile of ``dims.B`` rows, of which only the rows of the batch are valid, but for
    two things that go sequence by sequence: the rows written to the cache, and attention. Roundings and tile shapes are those of
    ``decode_layer`` and ``paged_attention``. One layer a call: the host can run layer after layer, each with its own weights and
    caches. Any dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    H, D, I, S = dims.H, dims.D, dims.I, dims.S  # noqa: E741  the contract's symbol
    Q, KV, ROWS = dims.NH * dims.D, dims.NKV * dims.D, dims.NB * dims.NKV * dims.BS

    @pypto.frontend.jit()
    def paged_decode_layer(
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
        batch = hidden_states.shape[0]
        result = fragments.paged_decode_layer(hidden_states, batch, weights, slot_mapping, rope_cos, rope_sin, cache, dims)
        pypto.assemble(result, [0, 0], out)

    return paged_decode_layer
