"""Which runs a case gets besides the first: repeats, rows in another order or alone, compiler passes, a search for signatures."""

from __future__ import annotations

import collections
import dataclasses

from conformance.cases.key import CaseKey, of_stage
from conformance.cases.source import Source
from conformance.contract.registry import preset_named, stage_named
from conformance.contract.stage import Stage
from conformance.lanes import lane_named
from conformance.lanes.messages import Passes

#: Of so many examples with several sequences one is judged again with these in another order, and one with a sequence alone;
#: prime to the number of regimes of every stage, so that all of them come up.
ROW_CHECK_PERIOD = 5
#: Of a layer or a chain the last compiler pass is compared once in so many cases: that takes ten times as long as the run itself.
PASS_PERIOD = 4
#: Of a layer or a chain that is interpreted so many cases are searched for signatures of mistakes before any is left out.
SEARCHED_FIRST = 3
#: After that this many over the tokens of the preset's largest case: at ``tiny`` one in four, of a prefill one in sixteen. What a
#: search takes rises with the tokens, and all are so few that judging takes about three tenths of what interpreting takes
#: (``benchmarks/judging_layers.py``).
SEARCHED_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """Which extra runs a case gets: repeats, its rows in another order, one row alone, and a comparison of all passes.

    With ``signatures`` its errors are searched for those of known mistakes.
    """

    repeats: int = 0
    permuted: bool = False
    lone: bool = False
    all_passes: bool = False
    passes: Passes = "last"
    signatures: bool = True


def is_searched(key: CaseKey) -> bool:
    """Whether a case that is one of many that are interpreted is searched for signatures of mistakes; follows from its key."""
    stage = stage_named(key.stage)
    largest = of_stage(stage, preset_named(key.preset, stage.model))
    # Not by the case's own tokens: a large case tells more of a mistake than as many tokens in small ones.
    number = Source(f"signatures/{by_bare_name(key)}").integers("number", 0, max(largest.batch, largest.tokens) - 1, 1)[0]
    return number < SEARCHED_TOKENS


class Plans:
    """Which extra runs the cases of one kernel get, case after case, of which there were ``first`` before of each preset.

    Where runs are cheap (``Lane.repeats_every_case``) each is repeated, and of those that have several rows every fifth is run
    with its rows in another order, the one after it with a row alone: a few cases have both. Elsewhere all extra runs come once
    per kernel and dimensions, and not every case is searched for signatures of mistakes, but the first ``SEARCHED_FIRST`` and
    those that ``is_searched`` chooses. ``repeats``: how often a case is run again, as often as the lane says unless given.
    """

    def __init__(self, lane: str, stage: Stage, first: int = 0, repeats: int | None = None) -> None:
        self._lane, self._composite = lane_named(lane), stage.composite
        self._repeats = self._lane.repeats[0] if repeats is None else repeats
        self._counts: dict[str, int] = collections.defaultdict(lambda: first)
        self._planned = 0

    def following(self, key: CaseKey) -> RunPlan:
        """The plan of the next case."""
        self._planned += 1
        signatures = self._lane.repeats_every_case or self._planned <= SEARCHED_FIRST or is_searched(key)
        return dataclasses.replace(self._runs(key), signatures=signatures)

    def _runs(self, key: CaseKey) -> RunPlan:
        count = self._counts[key.preset]
        if self._lane.repeats_every_case:
            self._counts[key.preset] += key.dims.batch > 1
            return RunPlan(self._repeats, count % ROW_CHECK_PERIOD == 0, count % ROW_CHECK_PERIOD == 1)
        self._counts[key.preset] += 1
        if count == 0:
            return RunPlan(self._repeats, True, True, all_passes=self._lane.compares_passes)
        return RunPlan(passes="none" if self._composite and count % PASS_PERIOD else "last")


def by_bare_name(key: CaseKey) -> CaseKey:
    """The key by its stage's bare name: what is drawn by it does not depend on which other models are installed."""
    return dataclasses.replace(key, stage=stage_named(key.stage).name)
