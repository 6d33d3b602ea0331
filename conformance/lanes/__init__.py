"""Lanes: where kernels can be run. One module each, the registry of them all, and the worker process they share."""

from __future__ import annotations

from conformance.errors import UsageError
from conformance.lanes.compile_only import COMPILE_ONLY
from conformance.lanes.device import DEVICE
from conformance.lanes.eager import EAGER
from conformance.lanes.interpret import INTERPRET
from conformance.lanes.lane import Lane

__all__ = ["LANES", "Lane", "default_lane", "find_lane", "lane_named", "lanes_of"]

#: Every lane, from the cheapest to the dearest: the order of reports.
LANES: tuple[Lane, ...] = (
    EAGER,
    COMPILE_ONLY,
    INTERPRET,
    DEVICE,
)


def lane_named(name: str) -> Lane:
    """The lane of that name; raises ``UsageError`` that lists the known ones."""
    lane = find_lane(name)
    if lane is None:
        raise UsageError(f"unknown lane {name!r}; known are {', '.join(lane.name for lane in LANES)}")
    return lane


def find_lane(name: str) -> Lane | None:
    """The lane of that name; ``None`` for one that this version does not have, as a record of another may name."""
    return next((lane for lane in LANES if lane.name == name), None)


def lanes_of(toolchain: str) -> tuple[Lane, ...]:
    """The lanes that take kernels of a toolchain."""
    return tuple(lane for lane in LANES if toolchain in lane.toolchains)


def default_lane(toolchain: str) -> Lane:
    """Where kernels of a toolchain run unless a lane is named."""
    return next(lane for lane in lanes_of(toolchain) if lane.default)
