"""The cases that a stage is judged on, and a deterministic sequence of keys that goes round all of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from conformance.cases.key import CaseKey, of_stage
from conformance.cases.source import Source
from conformance.contract.dims import Dims
from conformance.contract.registry import preset_named
from conformance.contract.stage import Stage
from conformance.errors import UsageError

#: Dimensions that a case may vary besides overriding what the preset fixes.
DRAWN = ("B", "L", "NB")


#: Layers of most stratified cases of a chain; one in so many has all of them.
MOST_LAYERS = 4


DEEPEST_PERIOD = 10


DEEPEST_BATCH = 2


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
            preset_named(dims)
            return cls(stage, dims)
        if not isinstance(dims, Mapping) or not all(isinstance(name, str) for name in dims):
            raise UsageError(f"dims is a preset's name or a dict such as {{'B': 3, 'S': 64}}, found {dims!r}")
        overrides: dict[str, Any] = dict(dims)
        preset = overrides.pop("preset", "tiny")
        for name in ("eps", "theta"):
            if name in overrides:
                raise UsageError(f"{name} belongs to the contract and cannot be overridden")
        limit = preset_named(preset).replace(**overrides)
        if "NB" in overrides and "NB" in stage.drawn and limit.NB <= limit.B * limit.MB:
            needed = limit.B * limit.MB + 1
            raise UsageError(
                f"NB={limit.NB} is too few pages for B={limit.B} sequences of S={limit.S}: at least {needed} are needed"
            )
        for name in ("L", "NB", "T"):
            known = stage.has_chunks if name == "T" else name in stage.drawn
            if name in overrides and not known and (name, limit.L) != ("L", 1):
                raise UsageError(f"stage {stage.name} has no dimension {name} to set")
        if stage.has_chunks and limit.T < limit.B:
            raise UsageError(f"T={limit.T} is too few tokens for B={limit.B} sequences: each brings one at least")
        return cls(stage, preset, tuple(sorted(overrides.items())))

    @property
    def limit(self) -> Dims:
        """The model, with the largest ``B``, ``L`` and ``NB`` that a case may draw."""
        return of_stage(self.stage, preset_named(self.preset).replace(**dict(self.pinned)))

    @property
    def drawn(self) -> tuple[str, ...]:
        """The dimensions that a case draws here."""
        pinned = dict(self.pinned)
        return tuple(name for name in self.stage.drawn if name not in pinned)

    def length_boundaries(self) -> list[int]:
        """Sequence lengths at which kernels go wrong: 1, 2, a page and one to either side, two pages, the maximum."""
        page, longest = self.limit.BS, self.limit.S
        return sorted({n for n in (1, 2, page - 1, page, page + 1, 2 * page, longest - 1, longest) if 1 <= n <= longest})

    def lengths_for(self, regime: str) -> tuple[int, int]:
        """The range that a regime leaves to the sequence lengths."""
        longest = self.limit.S
        if regime == "length_one":
            return 1, 1
        if regime == "long":
            return max(1, longest - self.limit.BS), longest
        return 1, longest

    @property
    def largest(self) -> CaseKey:
        """The key of the largest case: what compiling is done for."""
        limit = self.limit
        lengths = (limit.S,) * limit.B if self.stage.has_lengths else ()
        chunks = self.chunks([limit.S] * limit.B, lengths) if self.stage.has_chunks else ()
        return self.key(self.stage.regimes[0], 0, B=limit.B, L=limit.L, spare_pages=0, seq_lens=lengths, chunk_lens=chunks)

    def with_longest(self, key: CaseKey) -> CaseKey:
        """The key with its first sequence as long as the model allows, and the others within a page and a token.

        One such sequence shows what there is to see; an interpreter copies the whole cache for every page that is read.
        """
        if not key.seq_lens:
            return key
        lengths = (self.limit.S, *(min(length, self.limit.BS + 1) for length in key.seq_lens[1:]))
        drawn = dict(key.overrides)
        return self.key(
            key.regime,
            key.seed,
            B=drawn.get("B", self.limit.B),
            L=drawn.get("L", self.limit.L),
            spare_pages=0,
            seq_lens=lengths,
            chunk_lens=tuple(min(chunk, length) for chunk, length in zip(key.chunk_lens, lengths, strict=False)),
        )

    def chunks(self, wanted: Iterable[int], seq_lens: Sequence[int]) -> tuple[int, ...]:
        """Chunk lengths as near to the wanted ones as sequences allow, and ``T`` tokens for all of them together."""
        left = self.limit.T - len(seq_lens)
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
        B: int,
        L: int,
        spare_pages: int,
        seq_lens: tuple[int, ...],
        chunk_lens: tuple[int, ...] = (),
    ) -> CaseKey:
        """The key with these choices; dimensions that the stage does not draw stay as they are."""
        chosen = dict(self.pinned)
        chosen.pop("T", None)  # a limit; a case has as many tokens as its chunks
        drawn = self.drawn
        if "B" in drawn:
            chosen["B"] = B
        if "L" in drawn:
            chosen["L"] = L
        if "NB" in drawn:
            chosen["NB"] = 1 + spare_pages + sum(-(-length // self.limit.BS) for length in seq_lens)
        order = {name: position for position, name in enumerate(("B", "L"))}
        overrides = tuple(sorted(chosen.items(), key=lambda item: (order.get(item[0], 9), item[0])))
        return CaseKey(self.stage.name, self.preset, regime, seed, overrides, seq_lens, chunk_lens=chunk_lens)


def _batches(space: Space, seed: int) -> Iterator[int]:
    """Batch sizes in random order, all of them before any comes again: some kernels fail at a single one."""
    for turn in itertools.count():
        order = Source(f"batches/{space.stage.name}/{space.preset}/{seed}/{turn}").permutation("order", space.limit.B)
        yield from (place + 1 for place in order)


def stratified_keys(space: Space, seed: int) -> Iterator[CaseKey]:
    """An endless, deterministic sequence of keys that visits every regime in turn and boundary lengths first.

    Drawing regimes at random would leave some out of a few dozen examples; going round them makes the power of a run a fact.
    """
    regimes = space.stage.regimes
    limit = space.limit
    boundaries = space.length_boundaries()
    batches = _batches(space, seed)
    index = 0
    while True:
        source = Source(f"keys/{space.stage.name}/{space.preset}/{seed}/{index}")
        regime = regimes[index % len(regimes)]
        # A deep chain takes long and shows what a few layers show, but for a loop that is too short.
        layers = source.integers("L", min(2, limit.L), min(MOST_LAYERS, limit.L), 1)[0] if index % 5 != 4 else 1
        if index % DEEPEST_PERIOD == DEEPEST_PERIOD - 2:
            layers = limit.L
        batch = limit.B
        if index == 0:
            # What is done once per kernel is done on the first case: it has rows to rearrange and a loop to go round.
            layers = min(2, limit.L)
            batch = min(3, limit.B) if "B" in space.drawn else limit.B
        elif "B" in space.drawn:
            kind = source.integers("kind", 0, 3, 1)[0]  # a batch of one and a full one come up more often than any other
            if layers > MOST_LAYERS:
                batch = min(DEEPEST_BATCH, limit.B)  # the interpreter's copies of deep caches take gigabytes
            elif kind == 1:
                batch = 1
            elif kind > 1:
                batch = next(batches)
            if regime == "mixed_rows":
                batch = max(batch, min(2, limit.B))
        lengths: tuple[int, ...] = ()
        if space.stage.has_lengths:
            low, high = space.lengths_for(regime)
            usable = [length for length in boundaries if low <= length <= high] or [high]
            free = source.integers("length", low, high, batch)
            picks = source.integers("pick", 0, 2 * len(usable) - 1, batch)
            lengths = tuple(
                usable[pick] if pick < len(usable) else any_length for pick, any_length in zip(picks, free, strict=True)
            )
        chunks: tuple[int, ...] = ()
        if space.stage.has_chunks:
            # One token, a whole prompt, up to a page's edge and past it, or anything.
            page = limit.BS
            kinds = source.integers("chunk", 0, 5, batch)
            free_chunks = source.integers("free_chunk", 1, limit.T, batch)
            wanted = [
                (1, length, page, page + 1, length % page or page, any_chunk)[kind]
                for kind, length, any_chunk in zip(kinds, lengths, free_chunks, strict=True)
            ]
            chunks = space.chunks(wanted, lengths)
        spare = source.integers("spare", 0, 3, 1)[0]
        yield space.key(
            regime,
            source.integers("seed", 0, 2**31 - 1, 1)[0],
            B=batch,
            L=layers,
            spare_pages=spare,
            seq_lens=lengths,
            chunk_lens=chunks,
        )
        index += 1
