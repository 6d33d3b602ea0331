"""The key of a case: a short text that its tensors follow from, the same on every machine.

``attention:tiny:B=3,seq_lens=1+16+17:needle:7`` is stage, preset, what the case varies, data regime and seed.
"""

from __future__ import annotations

import dataclasses
import re

from conformance.contract.dims import Dims
from conformance.contract.registry import preset_named, stage_named
from conformance.contract.stage import Stage
from conformance.errors import UsageError

#: Longest text of a key, in characters.
LONGEST = 100_000

_NAME = re.compile(r"[\w./-]+")
#: No number of a key needs 64 bits; Python reads some thousand digits, and slowly.
_NUMBER = re.compile(r"[0-9]{1,18}")
_VARIED = re.compile(r"(\w+)=([0-9]{1,18}(?:\+[0-9]{1,18})*)")


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
        if not isinstance(text, str) or len(text) > LONGEST:
            raise UsageError(f"a case key is text of at most {LONGEST:,} characters, found {str(text)[:60]!r}; {example}")
        parts = text.strip().split(":")
        if len(parts) != 5 or not all(map(_NAME.fullmatch, (parts[0], parts[1], parts[3]))) or not _NUMBER.fullmatch(parts[4]):
            raise UsageError(f"cannot read case key {text!r}; {example}")
        stage, preset, varied, regime, seed = parts
        overrides: list[tuple[str, int]] = []
        lists: dict[str, tuple[int, ...]] = dict.fromkeys(_LISTS, ())
        for item in filter(None, varied.split(",")):
            match = _VARIED.fullmatch(item)
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
        stage = stage_named(self.stage)
        dims = of_stage(stage, preset_named(self.preset, stage.model).replace(**dict(self.overrides)))
        tokens = sum(self.chunk_lens)
        return dims.resized(tokens=tokens) if tokens else dims  # a chunk of none is for make_case to refuse


#: The lists of a key, in the order of its text.
_LISTS = ("seq_lens", "chunk_lens", "rows")


def of_stage(stage: Stage, dims: Dims) -> Dims:
    """The dimensions of a model as a stage of it has them.

    A stage of one layer has no use for the preset's depth, nor one that takes a token a sequence for a number of tokens.
    """
    return dims.resized(
        depth=dims.depth if dims.symbol("depth") in stage.drawn else 1, tokens=dims.tokens if stage.has_chunks else 1
    )


def take_rows(key: CaseKey, rows: tuple[int, ...]) -> CaseKey:
    """The key of the same case with its sequences selected and reordered."""
    base = key.rows or tuple(range(key.dims.batch))
    return dataclasses.replace(key, rows=tuple(base[row] for row in rows))


def smallest(key: CaseKey) -> CaseKey:
    """A case like this one with one layer and at most two sequences of a page and a token: what is dear is done on it."""
    dims = key.dims
    limits = {dims.symbol("batch"): 2, dims.symbol("depth"): 1}
    overrides = tuple((name, min(value, limits.get(name, value))) for name, value in key.overrides)
    batch, longest = dict(overrides).get(dims.symbol("batch"), dims.batch), dims.page_size + 1
    seq_lens, chunk_lens = (tuple(min(n, longest) for n in lens[:batch]) for lens in (key.seq_lens, key.chunk_lens))
    return dataclasses.replace(key, overrides=overrides, rows=(), seq_lens=seq_lens, chunk_lens=chunk_lens)
