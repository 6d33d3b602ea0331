"""What makes judging cheap changes no verdict: blocks, looking closely only where it matters, and little memory.

How long judging takes is for ``benchmarks/judge_cost.py`` to say: times are no matter for a test.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.judge import elements, limits
from conformance.judge.judgement import judge
from conformance.judge.limits import kappa
from conformance.judge.oracle import Oracle
from conformance.judge.outputs import blocks_of
from conformance.judge.verdict import Verdict
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import poison
from conformance.numerics.arithmetic import SINGLE
from conformance.numerics.bounds import Bounds
from conformance.numerics.ulp import spacing

ROOT = Path(__file__).parents[2]
WHOLE = 1 << 60

Tensor = torch.Tensor
Outputs = dict[str, Tensor]


def honest(case: Case) -> Outputs:
    results = case.stage.reference(case.inputs, case.dims, SINGLE)
    return {argument.name: results[argument.name].to(argument.dtype) for argument in case.stage.outputs}


def judged(case: Case, outputs: Outputs, oracle: Oracle) -> Verdict:
    return judge(case, Outcome("ok", outputs=outputs), oracle=oracle)


# -- blocks ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (7, 13), (100, 1), (16, 64), (0, 5), (5, 0)])
@pytest.mark.parametrize("size", [1, 5, 13, 64, 10**9])
def test_blocks_cover_every_element_once(shape: tuple[int, int], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOCK", size)
    seen = torch.zeros(shape)
    for rows, columns in blocks_of(seen):
        assert 0 < seen[rows, columns].numel() <= size
        assert (rows.stop, columns.stop) <= shape  # where an element stands is told from where its block does
        seen[rows, columns] += 1
    assert bool((seen == 1).all())


def fill(value: float) -> Callable[[Tensor], object]:
    return lambda part: part.fill_(value)


DAMAGE: dict[str, Callable[[Tensor], object]] = {
    "zeros": fill(0),
    "nan": fill(math.nan),
    "inf": fill(math.inf),
    "-inf": fill(-math.inf),
    "huge": fill(1e30),
    "gain": lambda part: part.mul_(1.01),
    "small gain": lambda part: part.mul_(1 + 1e-5),
    "unwritten": lambda part: part.copy_(poison(torch.empty_like(part))),
}


def damaged(outputs: Outputs, draw: random.Random) -> Outputs:
    """Up to three rectangles of an output are wrong, each in its own way."""
    outputs = {name: tensor.clone() for name, tensor in outputs.items()}
    for _ in range(draw.randint(0, 3)):
        tensor = draw.choice(list(outputs.values()))
        matrix = tensor if tensor.dim() > 1 else tensor.view(1, -1)
        spans = []
        for extent in matrix.shape:
            start = draw.randrange(extent)
            spans.append(slice(start, start + draw.choice([1, 1, 5, extent])))
        part = matrix[spans[0], spans[1]]
        if tensor.dtype.is_floating_point:
            DAMAGE[draw.choice(list(DAMAGE))](part)
        else:
            part += 1
    return outputs


KEYS = (
    "lm_head:awkward:B=5:normal:1",
    "qkv_proj:tiny:B=3:cancel:1",
    "o_proj:awkward:B=4:outlier:1",
    "rms_norm:awkward:B=7:heavy_tail:1",
    "attention:tiny:B=3,seq_lens=1+60+128:normal:1",
    "kv_write:tiny:B=3,NB=8,seq_lens=5+16+33:normal:1",
    "greedy_sample:awkward:B=4:ties:1",
    "decode_layer:tiny:B=3,NH=2,NKV=1,D=32,I=64,S=40,seq_lens=5+17+40:normal:1",
)


@pytest.mark.parametrize("key", KEYS)
def test_the_verdict_does_not_depend_on_the_blocks(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Findings, their places, counts and texts, profile and shares; 37 divides no extent of any output."""
    case = make_case(CaseKey.parse(key))
    right, oracle = honest(case), Oracle(case)
    detectors: set[str] = set()
    for seed in range(5 if case.stage.composite else 20):
        outputs = damaged(right, random.Random(f"{key}/{seed}"))
        verdicts = []
        for size in (WHOLE, 37, 1000):
            monkeypatch.setattr(limits, "BLOCK", size)
            verdicts.append(judged(case, outputs, oracle))
        # A share may be NaN, which equals nothing.
        assert len({repr(verdict) for verdict in verdicts}) == 1
        detectors.update(finding.detector for finding in verdicts[0].findings)
    assert len(detectors) > 1 or case.stage.name == "greedy_sample"


# -- the rule as it is written --------------------------------------------------------------------------------------------------


Place = tuple[int, ...]


def by_the_rule(found: Tensor, estimate: Bounds) -> tuple[set[Place], dict[Place, float]]:
    """Which elements of an fp32 output are not finite, and the share of every other one: element by element in Python."""
    strange: set[Place] = set()
    shares: dict[Place, float] = {}
    for place in itertools.product(*map(range, found.shape)):
        out, v, s2, w = (float(tensor[place]) for tensor in (found, estimate.value, estimate.variance, estimate.worst))
        if not math.isfinite(out):
            strange.add(place)
            continue
        exponent = max(math.frexp(max(abs(out), abs(v)))[1] - 1, -126)
        excess = abs(out - v) - (2.0 ** (exponent - 23) / 2 * (1 + 2**-12) + 2.0**-126)
        shares[place] = max(0.0, excess) / min(kappa(found.numel()) * math.sqrt(s2), w)
    return strange, shares


@pytest.mark.parametrize("size", [WHOLE, 64, 11])
def test_every_element_is_judged_by_the_rule(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOCK", size)
    case = make_case(CaseKey.parse("lm_head:tiny:B=5,V=130,NH=1,NKV=1,D=64:normal:1"))
    right, oracle = honest(case)["logits"], Oracle(case)
    profile = case.stage.profiles[0]
    estimate = oracle.bounds(profile)["logits"]
    deviation = estimate.variance.sqrt()
    told: set[str] = set()
    for seed in range(30):
        draw = random.Random(seed)
        found = right.clone()
        for _ in range(draw.randint(0, 6)):
            row, column = draw.randrange(5), draw.randrange(130)
            away = draw.choice([-1, 1]) * draw.uniform(1, 12) * deviation[row, column]
            found[row, column] = draw.choice([math.nan, math.inf, float(estimate.value[row, column] + away)])
        verdict = judge(case, Outcome("ok", outputs={"logits": found}), profile=profile.name, oracle=oracle)
        strange, shares = by_the_rule(found, estimate)
        over = {place: share for place, share in shares.items() if share > 1}
        assert verdict.share == pytest.approx(max(shares.values()), rel=1e-9)
        by_detector = {finding.detector: finding for finding in verdict.findings}
        told.update(by_detector)
        assert ("not_finite" in by_detector, "element" in by_detector) == (bool(strange), bool(over))
        if strange:
            assert (by_detector["not_finite"].count, by_detector["not_finite"].index) == (len(strange), min(strange))
        if over:
            assert (by_detector["element"].count, by_detector["element"].index) == (len(over), max(over, key=over.__getitem__))
    assert told == {"not_finite", "element"}


@pytest.mark.parametrize("column", [0, 63, 64, 127, 129])
def test_an_element_just_past_its_allowance_is_found_after_one_just_within(column: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of 0.99 comes first, so that all other blocks are passed over that use less than that."""
    monkeypatch.setattr(limits, "BLOCK", 16)
    case = make_case(CaseKey.parse("lm_head:tiny:B=2,V=130,NH=1,NKV=1,D=64:normal:1"))
    outputs, oracle = honest(case), Oracle(case)
    profile = case.stage.profiles[0]
    estimate = oracle.bounds(profile)["logits"]
    allowance = torch.minimum(kappa(260) * estimate.variance.sqrt(), estimate.worst)

    def reach(share: float, row: int, column: int) -> None:
        # The half ULP comes on top; one of fp32's steps is a few percent of an allowance here.
        half = spacing(estimate.value[row, column], torch.float32) / 2
        outputs["logits"][row, column] = float(estimate.value[row, column] + half + share * allowance[row, column])

    def verdict() -> Verdict:
        return judge(case, Outcome("ok", outputs=outputs), profile=profile.name, oracle=oracle)

    reach(0.9, 0, 5)
    within = verdict()
    assert within.ok
    assert within.share is not None
    assert 0.8 < within.share < 1
    reach(1.1, 1, column)
    beyond = verdict()
    assert [(finding.detector, finding.index, finding.count) for finding in beyond.findings] == [("element", (1, column), 1)]


def test_what_is_not_finite_is_found_after_an_infinite_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copied key with a wrong bit has no allowance at all: its share is infinite, and no later one is larger."""
    monkeypatch.setattr(limits, "BLOCK", 16)
    case = make_case(CaseKey.parse("kv_write:tiny:B=3,NB=8,seq_lens=5+16+33:normal:1"))
    outputs, oracle = honest(case), Oracle(case)
    rows = oracle.bounds(case.stage.profiles[0])["k_cache"].rows
    assert rows is not None
    outputs["k_cache"][rows[0], 0] *= 2
    outputs["k_cache"][rows[-1], -1] = math.inf
    verdict = judged(case, outputs, oracle)
    assert [(finding.detector, finding.index) for finding in verdict.findings[:2]] == [
        ("not_finite", (int(rows[-1]), case.dims.D - 1)),
        ("element", (int(rows[0]), 0)),
    ]
    assert verdict.share == math.inf


class Altered(Oracle):
    """An oracle with one bound of one element of the logits replaced."""

    def __init__(self, case: Case, bound: str, place: Place, value: float) -> None:
        super().__init__(case)
        for profile in case.stage.profiles:
            getattr(self.bounds(profile)["logits"], bound)[place] = value


@pytest.mark.parametrize("size", [WHOLE, 37])
@pytest.mark.parametrize("place", [(0, 0), (2, 100), (4, 499)])
def test_bounds_that_are_no_numbers(place: Place, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variance that is none allows nothing to be said for the element; a worst case that is none limits nothing."""
    monkeypatch.setattr(limits, "BLOCK", size)
    case = make_case(CaseKey.parse(KEYS[0]))
    outputs = honest(case)
    outputs["logits"][place] *= 1 + 2.0**-22  # more than the last rounding is forgiven
    plain = judged(case, outputs, Oracle(case))
    assert plain.ok
    verdict = judged(case, outputs, Altered(case, "variance", place, math.nan))
    assert [(finding.detector, finding.index, finding.count) for finding in verdict.findings] == [("element", place, 1)]
    assert verdict.share is not None
    assert math.isnan(verdict.share)
    assert judged(case, outputs, Altered(case, "worst", place, math.nan)) == plain


def test_a_copied_power_of_two_is_not_the_number_below_it() -> None:
    """That one is half a ULP away, by the ULP of the larger: as much as a last rounding may be off, but there is none."""
    case = make_case(CaseKey.parse("kv_write:tiny:B=3,NB=8,seq_lens=5+16+33:normal:1"))
    case.inputs["k"][1, 7] = 1.0
    outputs, oracle = honest(case), Oracle(case)
    assert judged(case, outputs, oracle).ok
    rows = oracle.bounds(case.stage.profiles[0])["k_cache"].rows
    assert rows is not None
    outputs["k_cache"][rows[case.dims.NKV], 7] = 1 - 2.0**-8
    (finding,) = judged(case, outputs, oracle).findings
    assert (finding.detector, finding.share, finding.count) == ("element", math.inf, 1)


def test_zeros_for_values_that_flushing_would_make_zero_are_not_all_zeros() -> None:
    case = make_case(CaseKey.parse("kv_write:tiny:B=3,NB=8,seq_lens=5+16+33:normal:1"))
    case.inputs["k"].fill_(2.0**-130)
    outputs, oracle = honest(case), Oracle(case)
    outputs["k_cache"][oracle.bounds(case.stage.profiles[0])["k_cache"].rows] = 0
    assert "all_zeros" not in [finding.detector for finding in judged(case, outputs, oracle).findings]
    case.inputs["k"][0, 0] = 1.0
    assert "all_zeros" in [finding.detector for finding in judged(case, outputs, Oracle(case)).findings]


@pytest.mark.parametrize(
    ("places", "pattern"),
    [
        (((1, 3), (2, 3), (2, 9)), "3 of 2500 elements, in 2 of 5 rows"),
        (((1, 3), (2, 9)), "2 of 2500 elements, in 2 of 5 rows"),
        (((1, 3), (1, 9), (2, 3), (2, 9)), "4 of 2500 elements: rows 1..2, columns 3, 9"),
        (((1, 3), (1, 4), (1, 5)), "3 of 2500 elements: rows 1, columns 3..5"),
    ],
)
def test_a_block_is_told_from_scattered_elements(places: tuple[Place, ...], pattern: str) -> None:
    case = make_case(CaseKey.parse(KEYS[0]))
    outputs = honest(case)
    for place in places:
        outputs["logits"][place] = 1e3
    (finding,) = judged(case, outputs, Oracle(case)).findings
    assert finding.message.endswith(f"; {pattern}")


# -- cost -----------------------------------------------------------------------------------------------------------------------

#: As many logits as the 14B model has, of a model that is otherwise small.
LOGITS_KEY = "lm_head:tiny:B=16,V=151936,NH=1,NKV=1,D=2:normal:1"
#: Caches that are large beside everything else of a layer.
LAYER_KEY = f"decode_layer:tiny:B=16,NH=2,NKV=2,D=64,I=64,S=1024,seq_lens={'+'.join(['9'] * 16)}:normal:1"


@pytest.mark.slow
def test_of_right_logits_few_blocks_are_looked_at_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where an element may use more of its allowance than those before: about as often as a record is broken."""
    case = make_case(CaseKey.parse(LOGITS_KEY))
    outputs, oracle = honest(case), Oracle(case)
    seen: list[int] = []
    shares = elements._shares

    def counted(out: Tensor, *others: Any) -> Tensor:
        seen.append(out.numel())
        return shares(out, *others)

    monkeypatch.setattr(elements, "_shares", counted)
    assert judged(case, outputs, oracle).ok
    assert 1 <= len(seen) <= 20
    assert sum(seen) < outputs["logits"].numel() / 4
    seen.clear()
    outputs["logits"] *= 2
    assert not judged(case, outputs, oracle).ok
    assert sum(seen) >= outputs["logits"].numel()


MEASURE = """
import json, math, sys
import torch
from benchmarks.judge_cost import damaged, extra_memory, honest, memory_ratio
from conformance.cases.key import CaseKey
from conformance.cases.case import make_case
from conformance.judge.oracle import Oracle

torch.set_num_threads(1)
found = {"of a known size": extra_memory(lambda: torch.ones(4_000_000).add_(1)) / 16e6}
for key, output in json.loads(sys.argv[1]).items():
    case = make_case(CaseKey.parse(key))
    outputs, oracle = honest(case), Oracle(case)
    found[f"{key} honest"] = memory_ratio(case, outputs, oracle)
    if case.stage.localise is None:
        for what, wrong in damaged(outputs, output).items():
            found[f"{key} {what}"] = memory_ratio(case, wrong, oracle)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is measured by Linux's /proc")
def test_a_judgement_takes_at_most_twice_the_outputs_in_memory() -> None:
    """In a process of its own, where nothing else is allocated; a tensor of known size shows that the measure is true."""
    command = [sys.executable, "-c", MEASURE, json.dumps({LOGITS_KEY: "logits", LAYER_KEY: "out"})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0.95 < found.pop("of a known size") < 1.1
    assert len(found) == 4
    assert all(0 < ratio <= 2 for ratio in found.values()), found
