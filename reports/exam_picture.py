"""The rules of an exam in a plane: legal runs rejected (across) against faults caught (up), by their numbers in the table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from conformance.reports.exam_figures import RuleLine


@dataclasses.dataclass(frozen=True)
class Dot:
    """A rule in the picture, and its number in the table of rules."""

    line: RuleLine
    x: float
    y: float
    number: int


@dataclasses.dataclass(frozen=True)
class Label:
    """The numbers of the dots of one place, beside the first of them."""

    x: float
    y: float
    text: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """Rules by legal runs rejected (across) and faults caught (up), in the coordinates of a drawing."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    #: Where the logarithmic part of the axis begins; left of it is the lane of the rules that rejected none.
    seam: float
    zero: float
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    dots: tuple[Dot, ...]
    labels: tuple[Label, ...]


#: Geometry: the whole, its plane, the lane of the rules that rejected nothing, how near two dots are one place, room to a label.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM, _LANE = 900, 480, 66.0, 800.0, 30.0, 418.0, 96.0
_NEAR_ACROSS, _NEAR_UP, _GAP = 44.0, 12.0, 10.0


def picture(lines: Sequence[RuleLine]) -> Picture | None:
    """The rules in a plane; ``None`` where there is nothing to compare."""
    shown = [line for line in lines if math.isfinite(line.caught_share) and math.isfinite(line.rejected_share)]
    if not shown:
        return None
    positive = [line.rejected_share for line in shown if line.rejected_share > 0]
    first = min(math.floor(math.log10(min(positive, default=1.0))), 1)
    lowest = min(90, 10 * math.floor(min(line.caught_share for line in shown) / 10))
    seam = _LEFT + _LANE

    def across(share: float) -> float:
        if share <= 0:
            return _LEFT + _LANE / 2
        return round(seam + (_RIGHT - seam) * (math.log10(share) - first) / (2 - first), 1)

    def up(share: float) -> float:
        # Room above 100%, so that a perfect rule is not cut in half.
        return round(_BOTTOM - (_BOTTOM - _TOP) * (share - lowest) / (100 - lowest) * 0.96, 1)

    step = 5 if lowest >= 80 else 10 if lowest >= 40 else 20
    dots = [
        Dot(line, across(line.rejected_share), up(line.caught_share), number)
        for number, line in enumerate(lines, 1)
        if line in shown
    ]
    return Picture(
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_RIGHT,
        top=_TOP,
        bottom=_BOTTOM,
        seam=seam,
        zero=across(0),
        across=tuple((across(10.0**power), f"{10.0**power:g}%") for power in range(first, 3)),
        up=tuple((up(share), f"{share}%") for share in range(lowest, 101, step)),
        dots=tuple(dots),
        labels=tuple(_labels(dots)),
    )


def _labels(dots: Sequence[Dot]) -> Iterator[Label]:
    """One label for all dots that are near one another: their numbers would cover each other."""
    left = list(dots)
    while left:
        here = [left.pop(0)]
        for dot in here:
            near = [other for other in left if abs(other.x - dot.x) < _NEAR_ACROSS and abs(other.y - dot.y) < _NEAR_UP]
            here += near
            left = [other for other in left if other not in near]
        rightmost = max(here, key=lambda dot: dot.x)
        yield Label(rightmost.x + _GAP, rightmost.y, ", ".join(str(dot.number) for dot in here))
