"""The rules of an exam in a plane: legal runs rejected (across) against faults caught (up), each with its name beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from conformance.reports.exam_figures import RuleLine


@dataclasses.dataclass(frozen=True)
class Dot:
    """A rule in the picture, and its name beside it; ``leader`` if the name stands so far off that a line has to lead to it."""

    line: RuleLine
    x: float
    y: float
    label_x: float
    label_y: float
    anchor: str
    leader: bool


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


#: Geometry: the whole, its plane (names may stand to the right of it), the lane of the rules that rejected nothing, letters.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM, _LANE = 900, 480, 66.0, 800.0, 30.0, 418.0, 96.0
_LETTER, _LETTER_HEIGHT, _GAP = 7.4, 15.0, 10.0


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
    places = [(across(line.rejected_share), up(line.caught_share)) for line in shown]
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
        dots=tuple(_labelled(shown, places)),
    )


_Box = tuple[float, float, float, float]


def _labelled(lines: Sequence[RuleLine], places: Sequence[tuple[float, float]]) -> list[Dot]:
    """Each name near its dot, where it covers neither another name nor a dot.

    Who is placed first decides who has to give way, so a few orders are tried, and the one with the nearest names is taken.
    """
    indices = range(len(lines))
    orders = [
        sorted(indices, key=key)
        for key in (
            lambda index: index,
            lambda index: places[index],
            lambda index: (-places[index][0], places[index][1]),
            lambda index: (places[index][1], places[index][0]),
            lambda index: (-places[index][1], places[index][0]),
        )
    ]
    tried = [_named_in_order(lines, places, order) for order in orders]
    return min(tried, key=lambda dots: sum(math.hypot(dot.label_x - dot.x, dot.label_y - dot.y) for dot in dots))


def _named_in_order(lines: Sequence[RuleLine], places: Sequence[tuple[float, float]], order: Sequence[int]) -> list[Dot]:
    taken: list[_Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    dots: dict[int, Dot] = {}
    for index in order:
        line, (x, y) = lines[index], places[index]
        width = _LETTER * len(line.name) * (1.15 if line.ours else 1)
        found = (x + _GAP, y, "start")
        for label_x, label_y, anchor in _around(x, y):
            start = label_x - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            box = (start, label_y - _LETTER_HEIGHT / 2, start + width, label_y + _LETTER_HEIGHT / 2)
            inside = box[0] > _LEFT and box[1] > _TOP - 14 and box[2] < _WIDTH and box[3] < _BOTTOM - 22
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found = (label_x, label_y, anchor)
                break
        far = math.hypot(found[0] - x, found[1] - y) > 20
        dots[index] = Dot(line, x, y, round(found[0], 1), round(found[1], 1), found[2], far)
    return [dots[index] for index in range(len(lines))]


def _around(x: float, y: float) -> Iterable[tuple[float, float, str]]:
    yield from ((x + _GAP, y, "start"), (x - _GAP, y, "end"), (x, y - 15, "middle"), (x, y + 15, "middle"))
    for ring in range(1, 45):
        for drop in (ring * 8.0, -ring * 8.0):
            yield x + _GAP + ring * 1.5, y + drop, "start"
            yield x - _GAP - ring * 1.5, y + drop, "end"


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
