"""Cases: concrete inputs that follow from a small key alone, the same on every machine.

A key is text that a person can copy: ``attention:tiny:B=3,seq_lens=1+16+17:needle:7`` is stage, preset, what the case varies,
data regime and seed. Hypothesis draws keys, not tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from conformance.contract import Dims, Stage, preset_named, stage_named
from conformance.data import Source
from conformance.errors import UsageError

if TYPE_CHECKING:
    from hypothesis import strategies as st

#: Dimensions that a case may vary besides overriding what the preset fixes.
DRAWN = ("B", "L", "NB")
#: Layers of most stratified cases of a chain; one in so many has all of them.
MOST_LAYERS = 4
DEEPEST_PERIOD = 10
DEEPEST_BATCH = 2


@dataclasses.dataclass(frozen=True)
class CaseKey:
    """Everything that a case's tensors follow from.

    ``overrides`` are dimensions that differ from the preset; ``seq_lens`` has one length per sequence for the stages that take
    any, and ``chunk_lens`` how many of those are new for a prefill; ``rows`` selects and orders sequences of the case (a permuted
    batch, or one row alone), all of them if empty.
    """

    stage: str
    preset: str
    regime: str
    seed: int
    overrides: tuple[tuple[str, int], ...] = ()
    seq_lens: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    chunk_lens: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [f"{name}={value}" for name, value in self.overrides]
        for name in _LISTS:
            values = getattr(self, name)
            if values:
                parts.append(f"{name}=" + "+".join(str(value) for value in values))
        return ":".join([self.stage, self.preset, ",".join(parts), self.regime, str(self.seed)])

    @classmethod
    def parse(cls, text: str) -> CaseKey:
        """The inverse of ``str``; raises ``UsageError`` that says what a key looks like."""
        example = "a case key looks like attention:tiny:B=3,seq_lens=1+16+17:needle:7"
        if not isinstance(text, str):
            raise UsageError(f"a case key is text, found {text!r}; {example}")
        parts = text.strip().split(":")
        if len(parts) != 5 or not re.fullmatch(r"[0-9]+", parts[4]):
            raise UsageError(f"cannot read case key {text!r}; {example}")
        stage, preset, varied, regime, seed = parts
        overrides: list[tuple[str, int]] = []
        lists: dict[str, tuple[int, ...]] = dict.fromkeys(_LISTS, ())
        for item in filter(None, varied.split(",")):
            match = re.fullmatch(r"(\w+)=([0-9]+(?:\+[0-9]+)*)", item)
            if match is None:
                raise UsageError(f"cannot read {item!r} in case key {text!r}; {example}")
            values = tuple(int(value) for value in match[2].split("+"))
            if match[1] in dict(overrides) or lists.get(match[1]):
                raise UsageError(f"{match[1]} stands twice in case key {text!r}; {example}")
            if match[1] in lists:
                lists[match[1]] = values
            elif len(values) == 1:
                overrides.append((match[1], values[0]))
            else:
                raise UsageError(f"{match[1]} takes one number in case key {text!r}; {example}")
        return cls(stage, preset, regime, int(seed), tuple(overrides), **lists)

    @property
    def dims(self) -> Dims:
        """The dimensions of the case, before ``rows`` selects any."""
        dims = _of_stage(stage_named(self.stage), preset_named(self.preset).replace(**dict(self.overrides)))
        tokens = sum(self.chunk_lens)
        return dims.replace(T=tokens) if tokens else dims  # a chunk of none is for make_case to refuse


#: The lists of a key, in the order of its text.
_LISTS = ("seq_lens", "chunk_lens", "rows")


def _of_stage(stage: Stage, dims: Dims) -> Dims:
    # A stage of one layer has no use for the preset's depth, nor one that takes a token a sequence for a number of tokens.
    return dims.replace(L=dims.L if "L" in stage.drawn else 1, T=dims.T if stage.has_chunks else 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One concrete input set. ``inputs`` are contiguous CPU tensors by argument name: what is read and what is updated."""

    key: CaseKey
    stage: Stage
    dims: Dims
    inputs: dict[str, torch.Tensor]


def make_case(key: CaseKey) -> Case:
    """The case of a key; raises ``UsageError`` for a key that does not fit its stage."""
    stage, dims = stage_named(key.stage), key.dims
    if key.regime not in stage.regimes:
        raise UsageError(f"stage {stage.name} has no regime {key.regime!r}; it has {', '.join(stage.regimes)}")
    if stage.has_lengths != bool(key.seq_lens) or (stage.has_lengths and len(key.seq_lens) != dims.B):
        expected = f"{dims.B} sequence lengths" if stage.has_lengths else "no sequence lengths"
        raise UsageError(f"case key {key}: stage {stage.name} with B={dims.B} takes {expected}, found {len(key.seq_lens)}")
    for length in key.seq_lens:
        if not 1 <= length <= dims.S:
            raise UsageError(f"case key {key}: sequence length {length} is outside 1..{dims.S}")
    if stage.has_chunks != bool(key.chunk_lens) or (stage.has_chunks and len(key.chunk_lens) != dims.B):
        expected = f"{dims.B} chunk lengths" if stage.has_chunks else "no chunk lengths"
        raise UsageError(f"case key {key}: stage {stage.name} with B={dims.B} takes {expected}, found {len(key.chunk_lens)}")
    for length, chunk in zip(key.seq_lens, key.chunk_lens, strict=False):
        if not 1 <= chunk <= length:
            raise UsageError(f"case key {key}: chunk length {chunk} is outside 1..{length}, the length of its sequence")
    if "NB" in stage.drawn:
        needed = 1 + sum(-(-length // dims.BS) for length in key.seq_lens)
        if needed > dims.NB:
            raise UsageError(f"case key {key}: {needed} pages are needed (one more than are in use), found NB={dims.NB}")
    case = Case(key, stage, dims, make_inputs(stage, key, dims))
    return _with_rows(case, key.rows) if key.rows else case


def make_inputs(stage: Stage, key: CaseKey, dims: Dims) -> dict[str, torch.Tensor]:
    """The inputs of a stage for a key, at dimensions that may be other than the key's (more layers)."""
    with torch.inference_mode(False):  # whatever mode the caller is in: tensors made in it can never be differentiated
        chunks = {"chunk_lens": key.chunk_lens} if stage.has_chunks else {}
        source = Source(f"{stage.name}/{key.regime}/{key.seed}")
        inputs = stage.make_inputs(dims, key.seq_lens, key.regime, source, **chunks)
    return {argument.name: inputs[argument.name].contiguous() for argument in stage.inputs}


def _with_rows(case: Case, rows: tuple[int, ...]) -> Case:
    """The same case with its sequences selected and reordered: wherever ``B`` is a factor of an axis, that factor is indexed.

    What follows the sequences in another way, the stage rearranges itself.
    """
    if any(row >= case.dims.B for row in rows):
        raise UsageError(f"case key {case.key}: rows must be below B={case.dims.B}")
    chosen = torch.tensor(rows)
    dims = case.dims.replace(B=len(rows))
    own: dict[str, torch.Tensor] = {}
    if case.stage.rearrange is not None:
        own = case.stage.rearrange(case.inputs, case.dims, rows)
        dims = dims.replace(T=sum(case.key.chunk_lens[row] for row in rows))
    inputs = {}
    for argument in case.stage.inputs:
        if argument.name in own:
            inputs[argument.name] = own[argument.name].contiguous()
            continue
        tensor = case.inputs[argument.name]
        shape = tensor.shape
        for axis, symbols in enumerate(argument.shape.split()):
            factors = symbols.split("*")
            if "B" in factors:
                sizes = [1 if factor == "1" else getattr(case.dims, factor) for factor in factors]
                split = tensor.reshape(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :])
                kept = split.index_select(axis + factors.index("B"), chosen)
                tensor = kept.reshape(*shape[:axis], -1, *shape[axis + 1 :])
        inputs[argument.name] = tensor.contiguous()
    return dataclasses.replace(case, dims=dims, inputs=inputs)


def take_rows(key: CaseKey, rows: tuple[int, ...]) -> CaseKey:
    """The key of the same case with its sequences selected and reordered."""
    base = key.rows or tuple(range(key.dims.B))
    return dataclasses.replace(key, rows=tuple(base[row] for row in rows))


def smallest(key: CaseKey) -> CaseKey:
    """A case like this one with one layer and at most two sequences of a page and a token: what is dear is done on it."""
    limits = {"B": 2, "L": 1}
    overrides = tuple((name, min(value, limits.get(name, value))) for name, value in key.overrides)
    batch, longest = dict(overrides).get("B", key.dims.B), key.dims.BS + 1
    seq_lens, chunk_lens = (tuple(min(n, longest) for n in lens[:batch]) for lens in (key.seq_lens, key.chunk_lens))
    return dataclasses.replace(key, overrides=overrides, rows=(), seq_lens=seq_lens, chunk_lens=chunk_lens)


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
        return _of_stage(self.stage, preset_named(self.preset).replace(**dict(self.pinned)))

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


def keys(space: Space) -> st.SearchStrategy[CaseKey]:
    """A Hypothesis strategy for keys: batch, layers, lengths with their boundaries, regime and seed; shrinks to one short row."""
    from hypothesis import strategies as st

    limit = space.limit

    @st.composite
    def draw_key(draw: st.DrawFn) -> CaseKey:
        regime = draw(st.sampled_from(space.stage.regimes))
        batch = draw(st.integers(1, limit.B)) if "B" in space.drawn else limit.B
        layers = draw(st.integers(1, limit.L)) if "L" in space.drawn else 1
        lengths: tuple[int, ...] = ()
        if space.stage.has_lengths:
            low, high = space.lengths_for(regime)
            usable = [length for length in space.length_boundaries() if low <= length <= high] or [high]
            one = st.sampled_from(usable) | st.integers(low, high)
            lengths = tuple(draw(st.lists(one, min_size=batch, max_size=batch)))
        chunks: tuple[int, ...] = ()
        if space.stage.has_chunks:
            chunks = space.chunks([draw(st.integers(1, length)) for length in lengths], lengths)
        spare = draw(st.integers(0, 3)) if "NB" in space.drawn else 0
        seed = draw(st.integers(0, 2**31 - 1))
        return space.key(regime, seed, B=batch, L=layers, spare_pages=spare, seq_lens=lengths, chunk_lens=chunks)

    return draw_key()
