"""The cases that a stage is judged on, and a deterministic sequence of keys that goes round all of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from conformance.cases.key import CaseKey, of_stage
from conformance.cases.source import Source
from conformance.contract.dims import Dims
from conformance.contract.registry import model_named, preset_named, short_name
from conformance.contract.stage import Stage
from conformance.errors import UsageError

#: Layers of most stratified cases of a chain; one in ``DEEPEST_PERIOD`` has all of them, and then at most ``DEEPEST_BATCH``
#: sequences: the interpreter's copies of deep caches take gigabytes.
MOST_LAYERS = 4
DEEPEST_PERIOD = 10
DEEPEST_BATCH = 2


#: Sequences of the largest case: keys list the length of each.
LARGEST_BATCH = 65_536


@dataclasses.dataclass(frozen=True)
class Space:
    """The cases that a stage is judged on: a preset, with some dimensions pinned and upper limits for those drawn."""

    stage: Stage
    preset: str
    pinned: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, stage: Stage, dims: str | Mapping[str, Any] = "tiny") -> Space:
        """From a preset's name, or overrides of it (``{"B": 3, "S": 64}``, with ``"preset"`` to name another than tiny)."""
        if isinstance(dims, str):
            preset_named(dims, stage.model)
            return cls(stage, dims.removeprefix(f"{stage.model}/"))
        if not isinstance(dims, Mapping) or not all(isinstance(name, str) for name in dims):
            raise UsageError(f"dims is a preset's name or a dict such as {{'B': 3, 'S': 64}}, found {dims!r}")
        overrides: dict[str, Any] = dict(dims)
        preset = overrides.pop("preset", "tiny")
        model = preset_named(preset, stage.model)
        preset = preset.removeprefix(f"{stage.model}/")
        for name in model.constants():
            if name in overrides:
                raise UsageError(f"{name} belongs to the contract and cannot be overridden")
        limit = model.replace(**overrides)
        batch, depth, pages, tokens = (limit.symbol(role) for role in ("batch", "depth", "pages", "tokens"))
        if limit.batch > LARGEST_BATCH:
            raise UsageError(f"{batch} is at most {LARGEST_BATCH:,} here, found {limit.batch:,}")
        most_pages = limit.batch * limit.pages_per_sequence
        if pages in overrides and pages in stage.drawn and limit.pages <= most_pages:
            raise UsageError(
                f"{pages}={limit.pages} is too few pages for {batch}={limit.batch} sequences of "
                f"{limit.symbol('length')}={limit.length}: at least {most_pages + 1} are needed"
            )
        for name, has_it in ((depth, depth in stage.drawn), (pages, pages in stage.drawn), (tokens, stage.has_chunks)):
            if name in overrides and not has_it and not (name == depth and limit.depth == 1):
                raise UsageError(f"stage {stage.name} has no dimension {name} to set")
        if stage.has_chunks and limit.tokens < limit.batch:
            raise UsageError(
                f"{tokens}={limit.tokens} is too few tokens for {batch}={limit.batch} sequences: each brings one at least"
            )
        return cls(stage, preset, tuple(sorted(overrides.items())))

    @classmethod
    def those_of(cls, stage: Stage, dims: str | Mapping[str, Any] | None = None) -> tuple[Space, ...]:
        """The one of ``dims``, or where none are given those of all presets that the model has a check look at."""
        chosen = model_named(stage.model).check_presets if dims is None else (dims,)
        return tuple(cls.of(stage, one) for one in chosen)

    @property
    def limit(self) -> Dims:
        """The model, with the largest batch, depth and pool of pages that a case may draw."""
        return of_stage(self.stage, preset_named(self.preset, self.stage.model).replace(**dict(self.pinned)))

    @property
    def drawn(self) -> tuple[str, ...]:
        """The dimensions that a case draws here."""
        pinned = dict(self.pinned)
        return tuple(name for name in self.stage.drawn if name not in pinned)

    def length_boundaries(self) -> list[int]:
        """Sequence lengths at which kernels go wrong: 1, 2, a page and one to either side, two pages, the maximum."""
        page, longest = self.limit.page_size, self.limit.length
        return sorted({n for n in (1, 2, page - 1, page, page + 1, 2 * page, longest - 1, longest) if 1 <= n <= longest})

    def lengths_for(self, regime: str) -> tuple[int, int]:
        """The range that a regime leaves to the sequence lengths."""
        longest = self.limit.length
        if regime == "length_one":
            return 1, 1
        if regime == "long":
            return max(1, longest - self.limit.page_size), longest
        return 1, longest

    @property
    def largest(self) -> CaseKey:
        """The key of the largest case: what compiling is done for."""
        limit = self.limit
        lengths = (limit.length,) * limit.batch if self.stage.has_lengths else ()
        chunks = self.chunks(lengths, lengths) if self.stage.has_chunks else ()
        regime = self.stage.regimes[0]
        return self.key(regime, 0, batch=limit.batch, depth=limit.depth, spare_pages=0, seq_lens=lengths, chunk_lens=chunks)

    def with_longest(self, key: CaseKey) -> CaseKey:
        """The key with its first sequence as long as the model allows, and the others within a page and a token.

        One such sequence shows what there is to see; an interpreter copies the whole cache for every page that is read.
        """
        if not key.seq_lens:
            return key
        limit, drawn = self.limit, dict(key.overrides)
        lengths = (limit.length, *(min(length, limit.page_size + 1) for length in key.seq_lens[1:]))
        return self.key(
            key.regime,
            key.seed,
            batch=drawn.get(limit.symbol("batch"), limit.batch),
            depth=drawn.get(limit.symbol("depth"), limit.depth),
            spare_pages=0,
            seq_lens=lengths,
            chunk_lens=tuple(min(chunk, length) for chunk, length in zip(key.chunk_lens, lengths, strict=False)),
        )

    def chunks(self, wanted: Iterable[int], seq_lens: Sequence[int]) -> tuple[int, ...]:
        """Chunk lengths as near to the wanted ones as sequences, and the model's number of tokens for all of them, allow."""
        left = self.limit.tokens - len(seq_lens)
        found = []
        for want, length in zip(wanted, seq_lens, strict=True):
            found.append(max(1, min(want, length, 1 + left)))
            left -= found[-1] - 1
        return tuple(found)

    def key(
        self,
        regime: str,
        seed: int,
        *,
        batch: int,
        depth: int,
        spare_pages: int,
        seq_lens: tuple[int, ...],
        chunk_lens: tuple[int, ...] = (),
    ) -> CaseKey:
        """The key with these choices; dimensions that the stage does not draw stay as they are."""
        limit, chosen = self.limit, dict(self.pinned)
        chosen.pop(limit.symbol("tokens"), None)  # a limit; a case has as many tokens as its chunks
        pages = 1 + spare_pages + sum(-(-length // limit.page_size) for length in seq_lens)
        drawn = {limit.symbol("batch"): batch, limit.symbol("depth"): depth, limit.symbol("pages"): pages}
        chosen |= {symbol: size for symbol, size in drawn.items() if symbol in self.drawn}
        first = limit.symbol("batch"), limit.symbol("depth")
        overrides = tuple(sorted(chosen.items(), key=lambda item: (item[0] != first[0], item[0] != first[1], item[0])))
        return CaseKey(short_name(self.stage), self.preset, regime, seed, overrides, seq_lens, chunk_lens=chunk_lens)


def _batches(space: Space, seed: int) -> Iterator[int]:
    """Batch sizes in random order, all of them before any comes again: some kernels fail at a single one."""
    for turn in itertools.count():
        order = Source(f"batches/{space.stage.name}/{space.preset}/{seed}/{turn}").permutation("order", space.limit.batch)
        yield from (place + 1 for place in order)


def stratified_keys(space: Space, seed: int) -> Iterator[CaseKey]:
    """An endless, deterministic sequence of keys that visits every regime in turn and boundary lengths first.

    Drawing regimes at random would leave some out of a few dozen examples; going round them makes the power of a run a fact.
    """
    return interleaved_keys((space,), seed)


def interleaved_keys(spaces: Sequence[Space], seed: int) -> Iterator[CaseKey]:
    """The same from several spaces of one stage in turn, so that few keys are of all of them.

    Each goes round the regimes, from another one on, so that few keys visit every regime, too; all take their batches from one
    order.
    """
    regimes = spaces[0].stage.regimes
    batches = _batches(spaces[0], seed)
    for index in itertools.count():
        for place, space in enumerate(spaces):
            first = -(-place * len(regimes) // len(spaces))
            yield _stratified_key(space, seed, index, regimes[(first + index) % len(regimes)], batches)


def _stratified_key(space: Space, seed: int, index: int, regime: str, batches: Iterator[int]) -> CaseKey:
    limit = space.limit
    draws_batch = limit.symbol("batch") in space.drawn
    boundaries = space.length_boundaries()
    source = Source(f"keys/{space.stage.name}/{space.preset}/{seed}/{index}")
    # A deep chain takes long and shows what a few layers show, but for a loop that is too short.
    # (The name of the draw is part of what the number follows from.)
    depth = source.integers("L", min(2, limit.depth), min(MOST_LAYERS, limit.depth), 1)[0] if index % 5 != 4 else 1
    if index % DEEPEST_PERIOD == DEEPEST_PERIOD - 2:
        depth = limit.depth
    batch = limit.batch
    if index == 0:
        # What is done once per kernel is done on the first case: it has rows to rearrange and a loop to go round.
        depth = min(2, limit.depth)
        batch = min(3, limit.batch) if draws_batch else limit.batch
    elif draws_batch:
        kind = source.integers("kind", 0, 3, 1)[0]  # a batch of one and a full one come up more often than any other
        if depth > MOST_LAYERS:
            batch = min(DEEPEST_BATCH, limit.batch)
        elif kind == 1:
            batch = 1
        elif kind > 1:
            batch = next(batches)
        if regime == "mixed_rows":
            batch = max(batch, min(2, limit.batch))
    lengths: tuple[int, ...] = ()
    if space.stage.has_lengths:
        low, high = space.lengths_for(regime)
        usable = [length for length in boundaries if low <= length <= high] or [high]
        free = source.integers("length", low, high, batch)
        picks = source.integers("pick", 0, 2 * len(usable) - 1, batch)
        lengths = tuple(usable[pick] if pick < len(usable) else any_length for pick, any_length in zip(picks, free, strict=True))
    chunks: tuple[int, ...] = ()
    if space.stage.has_chunks:
        # One token, a whole prompt, up to a page's edge and past it, or anything.
        page = limit.page_size
        kinds = source.integers("chunk", 0, 5, batch)
        free_chunks = source.integers("free_chunk", 1, limit.tokens, batch)
        wanted = [
            (1, length, page, page + 1, length % page or page, any_chunk)[kind]
            for kind, length, any_chunk in zip(kinds, lengths, free_chunks, strict=True)
        ]
        chunks = space.chunks(wanted, lengths)
    spare = source.integers("spare", 0, 3, 1)[0]
    return space.key(
        regime,
        source.integers("seed", 0, 2**31 - 1, 1)[0],
        batch=batch,
        depth=depth,
        spare_pages=spare,
        seq_lens=lengths,
        chunk_lens=chunks,
    )
