"""Programs of single stages whose whole text an edit supplies, as ``fragments.compute``: see ``weaving.py``."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator,attr-defined"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("qwen3/rms_norm", toolchain="pypto")
def rms_norm(dims: Dims) -> Any:
    """RMSNorm by ``compute(x, weight, out, dims)``."""
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H = dims.B, dims.H

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        fragments.compute(x, weight, out, dims)

    return rms_norm


@kernel("qwen3/qkv_proj", toolchain="pypto")
def qkv_proj(dims: Dims) -> Any:
    """The projections by ``compute(x, wq, wk, wv, q, k, v, dims)``."""
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, Q, KV = dims.B, dims.H, dims.NH * dims.D, dims.NKV * dims.D

    @pypto.frontend.jit()
    def qkv_proj(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        wq: pypto.Tensor([H, Q], pypto.DT_BF16),
        wk: pypto.Tensor([H, KV], pypto.DT_BF16),
        wv: pypto.Tensor([H, KV], pypto.DT_BF16),
        q: pypto.Tensor([B, Q], pypto.DT_FP32),
        k: pypto.Tensor([B, KV], pypto.DT_FP32),
        v: pypto.Tensor([B, KV], pypto.DT_FP32),
    ):
        fragments.compute(x, wq, wk, wv, q, k, v, dims)

    return qkv_proj


@kernel("qwen3/kv_write", toolchain="pypto")
def kv_write(dims: Dims) -> Any:
    """The write to the cache by ``compute(k, v, slot_mapping, k_cache, v_cache, dims)``."""
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, D, KV, ROWS = dims.B, dims.D, dims.NKV * dims.D, dims.NB * dims.NKV * dims.BS

    @pypto.frontend.jit()
    def kv_write(
        k: pypto.Tensor([B, KV], pypto.DT_BF16),
        v: pypto.Tensor([B, KV], pypto.DT_FP32),
        slot_mapping: pypto.Tensor([B], pypto.DT_INT32),
        k_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        v_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
    ):
        fragments.compute(k, v, slot_mapping, k_cache, v_cache, dims)

    return kv_write


@kernel("qwen3/o_proj", toolchain="pypto")
def o_proj(dims: Dims) -> Any:
    """The output projection by ``compute(attn, wo, residual, out, dims)``."""
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, Q = dims.B, dims.H, dims.NH * dims.D

    @pypto.frontend.jit()
    def o_proj(
        attn: pypto.Tensor([B, Q], pypto.DT_BF16),
        wo: pypto.Tensor([Q, H], pypto.DT_BF16),
        residual: pypto.Tensor([B, H], pypto.DT_BF16),
        out: pypto.Tensor([B, H], pypto.DT_FP32),
    ):
        fragments.compute(attn, wo, residual, out, dims)

    return o_proj


@kernel("qwen3/mlp", toolchain="pypto")
def mlp(dims: Dims) -> Any:
    """The MLP by ``compute(x, w_gate, w_up, w_down, out, dims)``."""
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, I = dims.B, dims.H, dims.I  # noqa: E741  the contract's symbol

    @pypto.frontend.jit()
    def mlp(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        w_gate: pypto.Tensor([H, I], pypto.DT_BF16),
        w_up: pypto.Tensor([H, I], pypto.DT_BF16),
        w_down: pypto.Tensor([I, H], pypto.DT_BF16),
        out: pypto.Tensor([B, H], pypto.DT_FP32),
    ):
        fragments.compute(x, w_gate, w_up, w_down, out, dims)

    return mlp


@kernel("qwen3/paged_attention", toolchain="pypto")
def paged_attention(dims: Dims) -> Any:
    """Paged attention of any batch by ``compute(q, cache, out, dims)``."""
    import pypto

    from conformance.kernels.qwen3 import fragments

    Q, D, ROWS = dims.NH * dims.D, dims.D, dims.NB * dims.NKV * dims.BS

    @pypto.frontend.jit()
    def paged_attention(
        q: pypto.Tensor([pypto.DYNAMIC, Q], pypto.DT_BF16),
        seq_lens: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        block_table: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        k_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        v_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        out: pypto.Tensor([pypto.DYNAMIC, Q], pypto.DT_BF16),
    ):
        fragments.compute(q, fragments.PagedCache(seq_lens, block_table, k_cache, v_cache), out, dims)

    return paged_attention


@kernel("qwen3/lm_head", toolchain="pypto")
def lm_head(dims: Dims) -> Any:
    """The LM head of ``dims.B`` rows by ``compute(hidden, final_norm_weight, lm_head_weight, logits, dims)``."""
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, V = dims.B, dims.H, dims.V

    @pypto.frontend.jit()
    def lm_head(
        hidden: pypto.Tensor([B, H], pypto.DT_BF16),
        final_norm_weight: pypto.Tensor([1, H], pypto.DT_FP32),
        lm_head_weight: pypto.Tensor([V, H], pypto.DT_BF16),
        logits: pypto.Tensor([B, V], pypto.DT_FP32),
    ):
        fragments.compute(hidden, final_norm_weight, lm_head_weight, logits, dims)

    return lm_head
