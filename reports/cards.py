"""What a run did on cards, from its records alone: which were used, which were given up, compiles, and times by their clocks."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping

from conformance.cases.key import CaseKey
from conformance.contract.registry import model_named, stage_named
from conformance.errors import UsageError
from conformance.reports import text
from conformance.running.records import Log, Record

#: Of more repeats than any lane makes so many count: who knows who wrote a record.
MOST_REPEATS = 1000


@dataclasses.dataclass(frozen=True)
class CardTimes:
    """The launches of one kernel at one preset on cards, and their seconds by the card's clock: of repeats the median counts."""

    kernel: str
    stage: str
    lane: str
    preset: str
    #: Of a case at the model's real size its dimensions: what a step takes follows from them. Empty for all others.
    sizes: str
    launches: int
    median: float | None
    worst: float | None

    @property
    def shown(self) -> str:
        """In a few words."""
        times = "" if self.median is None else f", median {text.device_time(self.median)}, worst {text.device_time(self.worst)}"
        at = f" with {self.sizes}" if self.sizes else ""
        return f"{text.number(self.launches, 'launch', 'launches')} on cards{at}{times}"

    @property
    def place(self) -> str:
        """The preset, and the sizes if there are any."""
        return f"{self.preset} {self.sizes}".strip()


@dataclasses.dataclass(frozen=True)
class Cards:
    """The cards of a run: how many launches each had by name, why some were given up, and what was compiled for how many builds.

    ``builds`` counts pairs of a kernel and dimensions: more compiles than those mean that some were made anew. ``times`` are
    sorted by kernel.
    """

    used: tuple[tuple[str, int], ...]
    given_up: tuple[tuple[str, str], ...]
    compiles: int
    builds: int
    times: tuple[CardTimes, ...]

    @property
    def headline(self) -> str:
        """Cards and compiles in one line."""
        used = ", ".join(f"{name}: {text.number(launches, 'launch', 'launches')}" for name, launches in self.used)
        builds = f"{text.number(self.builds, 'pair')} of kernel and dimensions"
        return f"{used}; {text.number(self.compiles, 'compile')} for {builds}"


def cards_of(log: Log, machine_of: Mapping[str, str]) -> Cards | None:
    """What the cases on cards say; ``None`` if there are none. ``machine_of`` names a process's machine, if there are several."""
    used: Counter[tuple[str, int]] = Counter()
    compiles: Counter[tuple[str, ...]] = Counter()
    given_up: dict[tuple[str, int], str] = {}
    times: dict[tuple[str, str, str, str, str], list[float]] = {}
    launches: Counter[tuple[str, str, str, str, str]] = Counter()
    for record in log.of("case"):
        details, machine = record.details, machine_of.get(record.process, "")
        card = details.get("card")
        if card is None:
            continue
        count = details.get("launches") or 1
        used[machine, card] += count
        if details.get("compiles"):
            compiles[_build(record)] += details["compiles"]
        kernel = record.kernel, record.stage, record.lane, record.preset, _sizes(record)
        launches[kernel] += count
        seconds = details.get("device_seconds")
        # The median of repeats stands for each of them.
        times.setdefault(kernel, []).extend([] if seconds is None else [seconds] * min(count, MOST_REPEATS))
        for number, reason in details.get("given_up", {}).items():
            given_up.setdefault((machine, int(number)), reason)
    if not used:
        return None
    return Cards(
        used=tuple((_name(*card), count) for card, count in sorted(used.items())),
        given_up=tuple((_name(*card), reason) for card, reason in sorted(given_up.items())),
        compiles=compiles.total(),
        builds=len(compiles),
        times=tuple(_times(*kernel, launches[kernel], found) for kernel, found in sorted(times.items())),
    )


def _build(record: Record) -> tuple[str, ...]:
    """What a record's kernel was compiled for: the dimensions of the case with the rows that it has."""
    try:
        key = CaseKey.parse(record.case)
        dims = key.dims
        if key.rows:
            dims = dims.resized(batch=len(key.rows))
        if key.rows and key.chunk_lens:
            dims = dims.resized(tokens=sum(key.chunk_lens[row] for row in key.rows))
        return record.kernel, record.stage, str(dims)
    except (UsageError, IndexError):  # of a model that is not installed here
        return record.kernel, record.stage, record.case


def _sizes(record: Record) -> str:
    try:
        key = CaseKey.parse(record.case)
        full_size = model_named(stage_named(key.stage).model).full_size
    except UsageError:  # of a model that is not installed here
        return ""
    if full_size is None or full_size.preset != key.preset:
        return ""
    return " ".join(f"{name}={size}" for name, size in key.overrides)


def _times(kernel: str, stage: str, lane: str, preset: str, sizes: str, launches: int, times: list[float]) -> CardTimes:
    median = statistics.median(times) if times else None
    return CardTimes(kernel, stage, lane, preset, sizes, launches, median, max(times, default=None))


def _name(machine: str, card: int) -> str:
    return f"{machine} card {card}" if machine else f"card {card}"
