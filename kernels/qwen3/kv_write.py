"""Writing the new keys and values into a paged cache."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("qwen3/kv_write", name="kv_write", toolchain="pypto", capabilities=("paged_kv",))
def kv_write(dims: Dims) -> Any:
    """Put each sequence's new key and value into its slot, for every KV head; the values are cast to bf16 once.

    A page holds the rows of KV head 0, then those of head 1, and so on: the rows of one slot lie ``BS`` apart, and each is
    assembled into the cache by itself. Nothing else of the cache is read or written. The rows do not depend on each other, so
    the loops are Python's, unrolled into one step. A vector tile is one sequence's heads. Any
    dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, NKV, D, BS, ROWS = dims.B, dims.NKV, dims.D, dims.BS, dims.NB * dims.NKV * dims.BS

    @pypto.frontend.jit()
    def kv_write(
        k: pypto.Tensor([B, NKV * D], pypto.DT_BF16),
        v: pypto.Tensor([B, NKV * D], pypto.DT_FP32),
        slot_mapping: pypto.Tensor([B], pypto.DT_INT32),
        k_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        v_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
    ):
        fragments.set_vector_tiles(1, NKV * D)
        for b in range(B):
            page = slot_mapping[b] // BS
            offset = slot_mapping[b] % BS
            value = pypto.cast(pypto.view(v, [1, NKV * D], [b, 0]), pypto.DT_BF16)
            for kv_head in range(NKV):
                row = (page * NKV + kv_head) * BS + offset
                pypto.assemble(pypto.view(k, [1, D], [b, kv_head * D]), [row, 0], k_cache)
                pypto.assemble(pypto.view(value, [1, D], [0, kv_head * D]), [row, 0], v_cache)

    return kv_write
