"""The block step of attention once more, with the decisions that a kernel can get wrong, or is free to take, as parameters.

The defaults are what ``fragments.attend_block`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conformance.contract.dims import Dims

Tensor = Any


def block_step(
    fragments: Any,
    *,
    scale: Callable[[Dims], float] = lambda dims: dims.scale,
    of_scores: Callable[[Tensor], Tensor] = lambda scores: scores,
    of_largest: Callable[[Tensor], Tensor] = lambda largest: largest,
    of_shrink: Callable[[Tensor], Tensor] = lambda shrink: shrink,
    of_product: Callable[[Tensor], Tensor] = lambda product: product,
    rounded: bool = True,
    sums_rounded: bool = False,
    normalised_first: bool = False,
    modulo_heads: bool = False,
) -> Callable[..., None]:
    """A function in the place of ``fragments.attend_block``.

    The ``of_`` functions stand between a value and its use: scores after scaling, the new maximum, the factor by which the older
    sums shrink, and the product with the values. ``rounded`` probabilities are cast to bf16, and ``sums_rounded`` adds up those;
    ``normalised_first`` divides them by the block's sum before they are rounded, and multiplies by it afterwards: for one block
    only, since that sum is 0 where a later block's scores lie far below the maximum.
    ``modulo_heads`` gives query head ``h`` the KV head ``h % NKV``.
    """
    pypto = fragments.pypto

    def groups(kv_head: int, dims: Dims) -> list[tuple[int, int]]:
        """The query heads that read a KV head, as runs: first head and how many."""
        if modulo_heads:
            return [(head, 1) for head in range(kv_head, dims.NH, dims.NKV)]
        return [(kv_head * dims.G, dims.G)]

    def attend_block(
        query: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        valid: Any,
        maximum: Tensor,
        total: Tensor,
        weighted: Tensor,
        dims: Dims,
    ) -> None:
        rows = keys[0].shape[0]
        products = pypto.tensor([dims.NH, rows], pypto.DT_FP32, "products")
        for kv_head in range(dims.NKV):
            for first, count in groups(kv_head, dims):
                grouped = pypto.view(query, [count, dims.D], [first, 0])
                pypto.assemble(pypto.matmul(grouped, keys[kv_head], pypto.DT_FP32, b_trans=True), [first, 0], products)
        scores = pypto.mul(pypto.view(products, [dims.NH, rows], [0, 0], valid_shape=[dims.NH, valid]), scale(dims))
        scores = of_scores(scores)
        largest = of_largest(pypto.maximum(maximum, pypto.amax(scores, -1, True)))
        exponentials = pypto.exp(pypto.sub(scores, largest))
        summed = pypto.sum(exponentials, -1, True)
        probabilities = pypto.div(exponentials, summed) if normalised_first else exponentials
        probabilities = pypto.cast(probabilities, pypto.DT_BF16) if rounded else probabilities
        if sums_rounded:
            summed = pypto.sum(pypto.cast(probabilities, pypto.DT_FP32), -1, True)
        added = pypto.tensor([dims.NH, dims.D], pypto.DT_FP32, "added")
        for kv_head in range(dims.NKV):
            used = values[kv_head] if rounded else pypto.cast(values[kv_head], pypto.DT_FP32)
            for first, count in groups(kv_head, dims):
                grouped = pypto.view(probabilities, [count, rows], [first, 0], valid_shape=[count, valid])
                pypto.assemble(pypto.matmul(grouped, used, pypto.DT_FP32), [first, 0], added)
        if normalised_first:
            added = pypto.mul(added, summed)
        shrink = of_shrink(pypto.exp(pypto.sub(maximum, largest)))
        total[:] = pypto.add(pypto.mul(total, shrink), summed)
        weighted[:] = of_product(pypto.add(pypto.mul(weighted, shrink), added))
        maximum[:] = largest

    return attend_block


def rounded(fragments: Any, x: Tensor) -> Tensor:
    """fp32 values rounded to bf16 and back."""
    pypto = fragments.pypto
    return pypto.cast(pypto.cast(x, pypto.DT_BF16), pypto.DT_FP32)


def read_whole_blocks(fragments: Any, hide: Callable[[Tensor, Tensor], Tensor], backwards: bool = False) -> None:
    """Read every block to its end, and hide what lies past the sequence's by ``hide(scores, seen)``.

    ``seen [NH, rows]`` fp32 is 1 where a score is the sequence's and 0 where it is not. Blocks must end within the cache. They
    are visited from the first to the last, or ``backwards``.
    """
    pypto, attend_sequence = fragments.pypto, fragments.attend_sequence
    current: dict[str, Any] = {}

    def hidden(scores: Tensor) -> Tensor:
        shape, valid = list(scores.shape), current["valid"]
        ones = pypto.full(shape, 1.0, pypto.DT_FP32, valid_shape=[shape[0], valid])
        return hide(scores, pypto.fillpad(ones, "constant", 0.0))

    def attend_whole_blocks(
        query: Tensor, length: Any, rows: int, rows_of: Any, k_cache: Tensor, v_cache: Tensor, dims: Dims
    ) -> Tensor:
        blocks = (length + rows - 1) // rows

        def remembering(block: Any) -> Any:
            block = blocks - 1 - block if backwards else block
            current["valid"] = (length - block * rows).min(rows)
            return rows_of(block)

        return attend_sequence(query, blocks * rows, rows, remembering, k_cache, v_cache, dims)

    fragments.attend_block = block_step(fragments, of_scores=hidden)
    fragments.attend_sequence = attend_whole_blocks
