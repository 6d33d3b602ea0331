"""Decode attention over a paged cache."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel(
    "qwen3/paged_attention",
    name="paged_attention",
    toolchain="pypto",
    capabilities=("paged_kv", "variable_batch"),
    profile="probabilities",
)
def paged_attention(dims: Dims) -> Any:
    """Softmax attention of one new token a sequence over the pages that ``block_table`` names, page by page.

    Roundings are those of ``attention``: scores, their maximum and the sums are fp32; the probabilities are cast to bf16 for the
    second product, before they are divided by the sum, which adds up what they were in fp32. The block is one page, with a valid
    shape that ends where the sequence does; entries of ``block_table`` past its last page are never read. Vector tiles are as
    wide as a page, cube tiles as in ``set_cube_tiles``. The batch is that of the tensors. Any
    dimensions.
    """
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
        cache = fragments.PagedCache(seq_lens, block_table, k_cache, v_cache)
        for b in pypto.loop(q.shape[0], name="SEQUENCE", idx_name="b"):
            pypto.assemble(fragments.attend_pages(pypto.view(q, [1, Q], [b, 0]), b, cache, dims), [b, 0], out)

    return paged_attention
