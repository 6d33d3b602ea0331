"""Kernels on a paged cache that read or write the wrong page, in PyPTO: each differs from the bundled one in a single step."""

# The annotations of a jit function describe tensors; they are not types.

from collections.abc import Callable
from typing import Any

from conformance.contract import Dims
from conformance.declaration import Kernel, kernel

#: Which physical page is read as the ``page``-th of ``pages`` of a sequence: ``(table, dims, sequence, page, pages)``.
PageOf = Callable[[Any, Dims, Any, Any, Any], Any]


def right_page(table: Any, dims: Dims, sequence: Any, page: Any, pages: Any) -> Any:
    return table[sequence * dims.MB + page]


def identity_page(table: Any, dims: Dims, sequence: Any, page: Any, pages: Any) -> Any:
    return (sequence * dims.MB + page) % (dims.NB - 1)


def stale_page(table: Any, dims: Dims, sequence: Any, page: Any, pages: Any) -> Any:
    """As if the table were a step old when the sequence has just begun its last page."""
    return table[sequence * dims.MB + page.min((pages - 2).max(0))]


def freed_page(table: Any, dims: Dims, sequence: Any, page: Any, pages: Any) -> Any:
    """The page before the one that the table names: of another sequence, or of one that has given it back."""
    return (table[sequence * dims.MB + page] + dims.NB - 1) % dims.NB


def _attention(dims: Dims, page_of: PageOf, more_pages: int = 0, whole_pages: bool = False) -> Any:
    import pypto

    from kernels.qwen3 import fragments

    H, D, BS, ROWS = dims.H, dims.D, dims.BS, dims.NB * dims.NKV * dims.BS

    def attend(query: Any, sequence: Any, length: Any, table: Any, k_cache: Any, v_cache: Any) -> Any:
        pages = (length + BS - 1) // BS

        def rows_of(page: Any) -> list[Any]:
            physical = page_of(table, dims, sequence, page, pages)
            return [fragments.page_row(dims, 0, physical, kv_head) for kv_head in range(dims.NKV)]

        read = (pages + more_pages) * BS if whole_pages or more_pages else length
        return fragments.attend_sequence(query, read, BS, rows_of, k_cache, v_cache, dims)

    @pypto.frontend.jit()
    def paged_attention(
        q: pypto.Tensor([pypto.DYNAMIC, H], pypto.DT_BF16),
        seq_lens: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        block_table: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        k_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        v_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        out: pypto.Tensor([pypto.DYNAMIC, H], pypto.DT_BF16),
    ):
        for b in pypto.loop(q.shape[0], name="SEQUENCE", idx_name="b"):
            attended = attend(pypto.view(q, [1, H], [b, 0]), b, seq_lens[b], block_table, k_cache, v_cache)
            pypto.assemble(attended, [b, 0], out)

    return paged_attention


def _reading(name: str, page_of: PageOf, **keywords: Any) -> Kernel:
    def build(dims: Dims) -> Any:
        return _attention(dims, page_of, **keywords)

    return kernel("paged_attention", name=name, toolchain="pypto", capabilities=("paged_kv", "variable_batch"))(build)


right = _reading("right", right_page)
identity_block_table = _reading("identity_block_table", identity_page)
page_not_yet_in_the_table = _reading("page_not_yet_in_the_table", stale_page)
page_of_a_freed_sequence = _reading("page_of_a_freed_sequence", freed_page)
unused_entry_dereferenced = _reading("unused_entry_dereferenced", right_page, more_pages=1)
last_page_read_past_the_end = _reading("last_page_read_past_the_end", right_page, whole_pages=True)


@kernel("paged_attention", name="batch_baked_in", toolchain="pypto", capabilities=("paged_kv", "variable_batch"))
def batch_baked_in(dims: Dims) -> Any:
    """Right for a batch of ``dims.B`` and for no other: the batch is in its annotations and in its loop."""
    import pypto

    from kernels.qwen3 import fragments

    B, H, D, ROWS = dims.B, dims.H, dims.D, dims.NB * dims.NKV * dims.BS

    @pypto.frontend.jit()
    def paged_attention(
        q: pypto.Tensor([B, H], pypto.DT_BF16),
        seq_lens: pypto.Tensor([B], pypto.DT_INT32),
        block_table: pypto.Tensor([B * dims.MB], pypto.DT_INT32),
        k_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        v_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        cache = fragments.PagedCache(seq_lens, block_table, k_cache, v_cache)
        for b in pypto.loop(B, name="SEQUENCE", idx_name="b"):
            pypto.assemble(fragments.attend_pages(pypto.view(q, [1, H], [b, 0]), b, cache, dims), [b, 0], out)

    return paged_attention


@kernel("paged_attention", name="batch_in_the_loop", toolchain="pypto", capabilities=("paged_kv", "variable_batch"))
def batch_in_the_loop(dims: Dims) -> Any:
    """Takes any batch, and goes round its loop as often as the batch that it was built for."""
    import pypto

    from kernels.qwen3 import fragments

    B, H, D, ROWS = dims.B, dims.H, dims.D, dims.NB * dims.NKV * dims.BS

    @pypto.frontend.jit()
    def paged_attention(
        q: pypto.Tensor([pypto.DYNAMIC, H], pypto.DT_BF16),
        seq_lens: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        block_table: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
        k_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        v_cache: pypto.Tensor([ROWS, D], pypto.DT_BF16),
        out: pypto.Tensor([pypto.DYNAMIC, H], pypto.DT_BF16),
    ):
        cache = fragments.PagedCache(seq_lens, block_table, k_cache, v_cache)
        for b in pypto.loop(B, name="SEQUENCE", idx_name="b"):
            pypto.assemble(fragments.attend_pages(pypto.view(q, [1, H], [b, 0]), b, cache, dims), [b, 0], out)

    return paged_attention


def _writing(name: str, slot_of: Callable[[Any, int], Any]) -> Kernel:
    def build(dims: Dims) -> Any:
        import pypto

        from kernels.qwen3 import fragments

        B, D, NKV, ROWS = dims.B, dims.D, dims.NKV, dims.NB * dims.NKV * dims.BS

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
                slot = slot_of(slot_mapping, b)
                value = pypto.cast(pypto.view(v, [1, NKV * D], [b, 0]), pypto.DT_BF16)
                for kv_head in range(NKV):
                    row = fragments.page_row(dims, 0, slot // dims.BS, kv_head) + slot % dims.BS
                    pypto.assemble(pypto.view(k, [1, D], [b, kv_head * D]), [row, 0], k_cache)
                    pypto.assemble(pypto.view(value, [1, D], [0, kv_head * D]), [row, 0], v_cache)

        return kv_write

    return kernel("kv_write", name=name, toolchain="pypto", capabilities=("paged_kv",))(build)


def slot_before(slot_mapping: Any, b: int) -> Any:
    return (slot_mapping[b] - 1).max(0)


def slot_of_the_first_sequence(slot_mapping: Any, b: int) -> Any:
    return slot_mapping[0]


slot_one_too_low = _writing("slot_one_too_low", slot_before)
slot_of_another_sequence = _writing("slot_of_another_sequence", slot_of_the_first_sequence)
