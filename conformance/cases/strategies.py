"""Hypothesis strategies: they draw keys, not tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conformance.cases.key import CaseKey
from conformance.cases.space import Space

if TYPE_CHECKING:
    from hypothesis import strategies as st


def keys(space: Space) -> st.SearchStrategy[CaseKey]:
    """A Hypothesis strategy for keys: batch, layers, lengths with their boundaries, regime and seed; shrinks to one short row."""
    from hypothesis import strategies as st

    limit = space.limit

    @st.composite
    def draw_key(draw: st.DrawFn) -> CaseKey:
        regime = draw(st.sampled_from(space.stage.regimes))
        batch = draw(st.integers(1, limit.batch)) if limit.symbol("batch") in space.drawn else limit.batch
        depth = draw(st.integers(1, limit.depth)) if limit.symbol("depth") in space.drawn else 1
        lengths: tuple[int, ...] = ()
        if space.stage.has_lengths:
            low, high = space.lengths_for(regime)
            usable = [length for length in space.length_boundaries() if low <= length <= high] or [high]
            one = st.sampled_from(usable) | st.integers(low, high)
            lengths = tuple(draw(st.lists(one, min_size=batch, max_size=batch)))
        chunks: tuple[int, ...] = ()
        if space.stage.has_chunks:
            chunks = space.chunks([draw(st.integers(1, length)) for length in lengths], lengths)
        spare = draw(st.integers(0, 3)) if limit.symbol("pages") in space.drawn else 0
        seed = draw(st.integers(0, 2**31 - 1))
        return space.key(regime, seed, batch=batch, depth=depth, spare_pages=spare, seq_lens=lengths, chunk_lens=chunks)

    return draw_key()
