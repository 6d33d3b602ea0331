"""What the steps of a run cost on a card, by the card's own clock: launches only, neither compiling nor copies to and from it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Sequence

from conformance.reports import text

#: The stage that ends a step.
LAST_STAGE = "greedy_sample"


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """One call of a stage's kernel. ``card`` and ``seconds`` are ``None`` where it ran on none, or its clock did not tell.

    ``remark`` is what a person should know of it, such as that it was run again on another card.
    """

    stage: str
    card: int | None
    seconds: float | None
    compiles: int
    remark: str = ""


@dataclasses.dataclass(frozen=True)
class StageCost:
    """The launches of one stage's kernel, and their seconds on the card."""

    stage: str
    launches: int
    compiles: int
    median_seconds: float | None
    worst_seconds: float | None


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Whole steps, each with all of its dispatches and its sampling: ``kind`` is ``prefill`` or ``decode``."""

    kind: str
    steps: int
    median_seconds: float
    worst_seconds: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one driver's run cost. ``untimed`` are stages that no card's clock tells of: steps are without them."""

    cards: tuple[int, ...]
    steps: tuple[StepCost, ...]
    stages: tuple[StageCost, ...]
    untimed: tuple[str, ...]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        where = f"on card{'' if len(self.cards) == 1 else 's'} {' and '.join(map(str, self.cards))}"
        without = f", without {' and '.join(self.untimed)}" if self.untimed else ""
        for step in self.steps:
            times = _times(step.median_seconds, step.worst_seconds)
            yield f"  {step.kind}: {text.number(step.steps, 'step')}, {times} {where}{without}"
        for one in self.stages:
            times = "" if one.median_seconds is None else f", {_times(one.median_seconds, one.worst_seconds)}"
            launches = text.number(one.launches, "launch", "launches")
            yield f"    {one.stage}: {launches}, {text.number(one.compiles, 'compile')}{times}"
        for remark in self.remarks:
            yield f"  {text.one_line(remark)}"


def cost_of(dispatches: Sequence[Dispatch], prefill: str) -> Cost | None:
    """What these dispatches of one driver cost, whose prefill is that stage; ``None`` if none of them ran on a card."""
    cards = sorted({one.card for one in dispatches if one.card is not None})
    if not cards:
        return None
    by_kind: dict[str, list[float]] = {}
    for step in _steps(dispatches):
        kind = "prefill" if step[0].stage == prefill else "decode"
        by_kind.setdefault(kind, []).append(sum(one.seconds or 0.0 for one in step))
    by_stage: dict[str, list[Dispatch]] = {}
    for one in dispatches:
        by_stage.setdefault(one.stage, []).append(one)
    return Cost(
        tuple(cards),
        tuple(StepCost(kind, len(found), statistics.median(found), max(found)) for kind, found in by_kind.items()),
        tuple(_of_stage(stage, found) for stage, found in by_stage.items()),
        tuple(stage for stage, found in by_stage.items() if any(one.seconds is None for one in found)),
        tuple(dict.fromkeys(one.remark for one in dispatches if one.remark)),
    )


def _steps(dispatches: Iterable[Dispatch]) -> Iterator[list[Dispatch]]:
    """The dispatches of each step that came to its end."""
    step: list[Dispatch] = []
    for one in dispatches:
        step.append(one)
        if one.stage == LAST_STAGE:
            yield step
            step = []


def _of_stage(stage: str, dispatches: Sequence[Dispatch]) -> StageCost:
    seconds = [one.seconds for one in dispatches if one.seconds is not None]
    median = statistics.median(seconds) if seconds else None
    return StageCost(stage, len(dispatches), sum(one.compiles for one in dispatches), median, max(seconds, default=None))


def _times(median: float, worst: float | None) -> str:
    return f"median {text.device_time(median)}, worst {text.device_time(worst)}"
