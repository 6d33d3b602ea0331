"""The judge: each detector on one element more and one less, buffers that tell what was done to them, and messages."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch

import conformance
from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.contract.arguments import read, write
from conformance.contract.dims import Dims
from conformance.contract.stage import Stage, Tensors
from conformance.errors import UnavailableError, UsageError
from conformance.judge import sensitivity
from conformance.judge.judgement import judge
from conformance.judge.limits import kappa, spread_limit
from conformance.judge.matched_filters import Filter
from conformance.judge.oracle import Oracle
from conformance.judge.verdict import DETECTORS, Finding, Verdict, worst_first
from conformance.kernels.qwen3.config import Qwen3Dims
from conformance.kernels.qwen3.exam.torch.choices import Choices
from conformance.kernels.qwen3.exam.torch.kernels import torch_kernel
from conformance.lanes.arena import Arena
from conformance.lanes.base import Outcome, PassDifference, UnwrittenRead
from conformance.lanes.buffers import GUARD_ALIGNMENT, GUARD_BYTES, Guarded, bits, guarded_bytes, poison, poisoned, same_bits
from conformance.lanes.eager import run_eager
from conformance.numerics.arithmetic import CONTRACT, Arithmetic
from conformance.numerics.bounds import Bounds, Correlation, Profile
from conformance.numerics.ulp import rounded, spacing

BF16 = torch.bfloat16
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int32]


def perfect(case: Case) -> dict[str, torch.Tensor]:
    """What a perfect kernel leaves: the contract's own roundings of the exact result; cache rows that it keeps, bit for bit."""
    results = case.stage.reference(case.inputs, case.dims, CONTRACT)
    return {argument.name: results[argument.name].to(argument.dtype) for argument in case.stage.outputs}


def judged(case: Case, outputs: dict[str, torch.Tensor]) -> Verdict:
    return judge(case, Outcome("ok", outputs=outputs))


def detectors(verdict: Verdict) -> list[str]:
    return [finding.detector for finding in verdict.findings]


@pytest.fixture
def norm_case() -> Case:
    return make_case(CaseKey.parse("rms_norm:tiny:B=5:normal:1"))


@pytest.fixture
def cache_case() -> Case:
    return make_case(CaseKey.parse("kv_write:tiny:B=3,NB=8,seq_lens=5+16+33:normal:1"))


@pytest.fixture
def projection_case() -> Case:
    return make_case(CaseKey.parse("qkv_proj:tiny:B=2:normal:1"))


def poisoned_between_guards(shape: tuple[int, ...], dtype: torch.dtype) -> Guarded:
    arena = Arena()
    storage = poison(arena.view(0, dtype, guarded_bytes(shape, dtype) // dtype.itemsize))
    arena.close()
    return Guarded.over(storage, shape)


# -- buffers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_is_seen_until_it_is_written(dtype: torch.dtype) -> None:
    tensor = poison(torch.zeros(3, 4, dtype=dtype))
    assert bool(poisoned(tensor).all())
    tensor[1, 2] = 0
    assert int((~poisoned(tensor)).sum()) == 1
    assert not bool(poisoned(tensor)[1, 2])


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_an_ordinary_nan_is_not_poison(dtype: torch.dtype) -> None:
    made = torch.tensor([0.0, math.inf], dtype=dtype) * torch.tensor([math.inf, 0.0], dtype=dtype)
    assert bool(made.isnan().all())
    assert not bool(poisoned(made).any())
    assert not bool(poisoned(torch.full((2,), math.nan, dtype=dtype)).any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 256), (5,)])
def test_a_guarded_tensor_is_aligned_poisoned_and_undamaged(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    guarded = poisoned_between_guards(shape, dtype)
    assert tuple(guarded.tensor.shape) == shape
    assert guarded.tensor.is_contiguous()
    assert guarded.tensor.data_ptr() % GUARD_ALIGNMENT == 0
    assert bool(poisoned(guarded.tensor).all())
    guarded.tensor.zero_()
    assert guarded.damage() is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [1, 2, 100])
def test_one_element_outside_is_told_with_its_distance(dtype: torch.dtype, distance: int) -> None:
    assert distance * dtype.itemsize <= GUARD_BYTES
    guarded = poisoned_between_guards((3, 5), dtype)
    beyond = guarded.tensor.as_strided((1,), (1,), guarded.tensor.storage_offset() + 15 + distance - 1)
    beyond.fill_(0)
    assert guarded.damage() == f"1 elements past the end, the nearest {distance} past it"
    guarded = poisoned_between_guards((3, 5), dtype)
    guarded.tensor.as_strided((1,), (1,), guarded.tensor.storage_offset() - distance).fill_(0)
    assert guarded.damage() == f"1 elements before the start, the nearest {distance} before it"


def test_same_bits_tells_zeros_apart_and_nan_alike() -> None:
    assert same_bits(torch.tensor([math.nan]), torch.tensor([math.nan]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=BF16))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2))


# -- verdicts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["norm_case", "cache_case", "projection_case"])
def test_a_perfect_run_has_no_finding_and_uses_part_of_its_allowance(fixture: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(fixture)
    verdict = judged(case, perfect(case))
    assert verdict.ok
    assert verdict.share is not None
    assert verdict.share < 1
    assert verdict.profile == "contract"


def test_one_ulp_in_one_element_is_an_element_finding_there(norm_case: Case) -> None:
    outputs = perfect(norm_case)
    bits(outputs["out"])[3, 77] += 2
    verdict = judged(norm_case, outputs)
    assert detectors(verdict) == ["element"]
    (finding,) = verdict.findings
    assert (finding.argument, finding.index, finding.where) == ("out", (3, 77), {"row": 3, "column": 77})
    assert (finding.count, finding.total) == (1, 5 * 256)
    assert finding.share is not None
    assert finding.share > 1
    assert finding.ulps is not None
    assert 1.4 < finding.ulps < 2.6


@pytest.mark.parametrize(("past_the_tie", "low_is_legal"), [(0.0, True), (1e-5, True), (1e-2, False)])
def test_a_tie_may_go_either_way_and_nothing_else_may(cache_case: Case, past_the_tie: float, low_is_legal: bool) -> None:
    cache_case.inputs["v"][0, 0] = 1 + 2.0**-8 * (1 + past_the_tie)
    row = int(Oracle(cache_case).bounds(cache_case.stage.profiles[0])["v_cache"].rows[0])  # type: ignore[index]
    for found, legal in ((1.0, low_is_legal), (1 + 2.0**-7, True), (1 - 2.0**-8, False)):
        outputs = perfect(cache_case)
        outputs["v_cache"][row, 0] = found
        assert judged(cache_case, outputs).ok == legal


@pytest.mark.parametrize(
    ("value", "detector"), [(math.nan, "not_finite"), (math.inf, "not_finite"), (-math.inf, "not_finite"), (1e30, "element")]
)
def test_a_value_that_cannot_be_is_found(norm_case: Case, value: float, detector: str) -> None:
    outputs = perfect(norm_case)
    outputs["out"][2, 9] = value
    verdict = judged(norm_case, outputs)
    assert verdict.findings[0].detector == detector
    assert verdict.findings[0].index == (2, 9)


def test_an_overflow_that_the_oracle_has_too_is_agreement() -> None:
    case = make_case(CaseKey.parse("rms_norm:tiny:B=2:normal:1"))
    case.inputs["weight"].fill_(3e38)
    outputs = perfect(case)
    assert bool(outputs["out"].isinf().any())
    assert judged(case, outputs).ok
    where = outputs["out"].isinf().nonzero()[0].tolist()
    outputs["out"][where[0], where[1]] *= -1
    assert detectors(judged(case, outputs)) == ["not_finite"]


def test_an_unwritten_element_is_found_even_where_zero_is_right() -> None:
    case = make_case(CaseKey.parse("rms_norm:tiny:B=2:normal:1"))
    case.inputs["x"].zero_()
    outputs = perfect(case)
    assert judged(case, outputs).ok  # all zeros, and rightly so
    poison(outputs["out"][1, 3:4])
    verdict = judged(case, outputs)
    assert detectors(verdict) == ["unwritten"]
    assert verdict.findings[0].index == (1, 3)


def test_all_zeros_and_a_copy_of_an_input_are_called_so(norm_case: Case) -> None:
    assert detectors(judged(norm_case, {"out": torch.zeros_like(norm_case.inputs["x"])})) == ["all_zeros"]
    verdict = judged(norm_case, {"out": norm_case.inputs["x"].clone()})
    assert detectors(verdict) == ["echo"]
    assert "equals the input x in every element" in verdict.findings[0].message


def test_a_factor_of_a_fifth_of_a_percent_is_a_bias(norm_case: Case) -> None:
    """Each element stays within half a ULP more or less; all together they lean."""
    value = Oracle(norm_case).bounds(norm_case.stage.profiles[0])["out"].value
    found = detectors(judged(norm_case, {"out": (value * 1.002).to(BF16)}))
    assert "bias" in found


def test_noise_of_one_ulp_in_one_tile_is_a_spread() -> None:
    case = make_case(CaseKey.parse("attention:tiny:B=4,seq_lens=100+90+80+128:normal:1"))
    outputs = perfect(case)
    assert judged(case, outputs).ok
    tile = bits(outputs["out"])[2, 32:48]
    tile += torch.tensor([2, -2] * 8, dtype=tile.dtype)
    found = judged(case, outputs)
    assert "spread" in detectors(found)
    spread = next(finding for finding in found.findings if finding.detector == "spread")
    assert spread.index == (2, 32)
    assert "row 2, columns 32..47" in spread.message


def test_a_constant_row_says_nothing_about_spread_or_bias() -> None:
    case = make_case(CaseKey.parse("rms_norm:tiny:B=3:constant:1"))
    case.inputs["weight"].fill_(1.0005)  # every value of a row is the same, and rounded down
    assert judged(case, perfect(case)).ok


# -- integers -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sample_case() -> Case:
    return make_case(CaseKey.parse("greedy_sample:awkward:B=4:ties:1"))


def test_the_right_integers_pass_and_use_nothing(sample_case: Case) -> None:
    verdict = judged(sample_case, perfect(sample_case))
    assert verdict.ok
    assert verdict.share == 0
    assert verdict.shares == {"token_ids": 0}


@pytest.mark.parametrize(
    ("added", "wrong", "extent"),
    [
        (1, [2], "1 of 4 elements"),
        (-500, [2], "1 of 4 elements"),
        (1, [1, 3], "2 of 4 elements: every row, columns 1, 3"),
        (1, [0, 1, 2, 3], "all 4 elements"),
    ],
)
def test_a_wrong_integer_is_an_element_with_its_place_and_both_values(
    sample_case: Case, added: int, wrong: list[int], extent: str
) -> None:
    outputs = perfect(sample_case)
    expected = outputs["token_ids"].tolist()
    outputs["token_ids"][wrong] += added
    verdict = judged(sample_case, outputs)
    assert detectors(verdict) == ["element"]
    (finding,) = verdict.findings
    row = wrong[0]
    assert finding.message == f"token_ids[{row}] is {expected[row] + added}, must be exactly {expected[row]}; {extent}"
    assert (finding.argument, finding.index, finding.where) == ("token_ids", (row,), {"row": row})
    assert (finding.count, finding.total, finding.share) == (len(wrong), 4, math.inf)
    assert verdict.share == math.inf


def test_zeros_are_a_token_like_any_other() -> None:
    case = make_case(CaseKey.parse("greedy_sample:awkward:B=1:normal:1"))
    case.inputs["logits"][0, 0] = 100
    assert judged(case, {"token_ids": torch.zeros(1, dtype=torch.int32)}).ok
    case.inputs["logits"][0, 1] = 101
    assert detectors(judged(case, {"token_ids": torch.zeros(1, dtype=torch.int32)})) == ["element"]


def test_an_integer_that_was_not_written_is_found_and_told_once(sample_case: Case) -> None:
    outputs = perfect(sample_case)
    poison(outputs["token_ids"][3:])
    verdict = judged(sample_case, outputs)
    assert detectors(verdict) == ["unwritten"]
    (finding,) = verdict.findings
    assert finding.message == f"token_ids {UNWRITTEN}: 1 of 4 elements, the first at token_ids[3] (row 3)"
    assert (finding.index, finding.where) == ((3,), {"row": 3})
    poison(outputs["token_ids"])
    assert "all 4 elements" in judged(sample_case, outputs).findings[0].message


# -- caches ---------------------------------------------------------------------------------------------------------------------


def test_a_row_that_was_not_written_is_stale(cache_case: Case) -> None:
    outputs = perfect(cache_case)
    dims = cache_case.dims
    slot = int(cache_case.inputs["slot_mapping"][1])
    row = (slot // dims.BS * dims.NKV + 1) * dims.BS + slot % dims.BS
    outputs["k_cache"][row] = cache_case.inputs["k_cache"][row]
    verdict = judged(cache_case, outputs)
    assert detectors(verdict) == ["stale_row"]
    assert verdict.findings[0].index == (row, 0)
    assert verdict.findings[0].where["kv_head"] == 1


def test_one_bit_of_another_row_is_out_of_bounds(cache_case: Case) -> None:
    outputs = perfect(cache_case)
    before = cache_case.inputs["v_cache"]
    kept = [
        row
        for row in range(len(before))
        if same_bits(outputs["v_cache"][row], before[row]) and not bool(before[row].isnan().any())
    ]
    bits(outputs["v_cache"])[kept[7], 5] ^= 1
    verdict = judged(cache_case, outputs)
    assert detectors(verdict) == ["out_of_bounds"]
    assert verdict.findings[0].index == (kept[7], 5)


def test_a_page_of_nobody_must_not_be_written(cache_case: Case) -> None:
    outputs = perfect(cache_case)
    outputs["k_cache"][-1] = 0  # it held NaN
    assert detectors(judged(cache_case, outputs)) == ["out_of_bounds"]


def test_one_bit_of_a_copied_key_is_an_element(cache_case: Case) -> None:
    outputs = perfect(cache_case)
    changed = next(
        row for row in range(len(outputs["k_cache"])) if not same_bits(outputs["k_cache"][row], cache_case.inputs["k_cache"][row])
    )
    bits(outputs["k_cache"])[changed, 5] ^= 1
    verdict = judged(cache_case, outputs)
    assert verdict.findings[0].detector == "element"
    assert verdict.findings[0].index == (changed, 5)


# -- conduct and failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["raised", "crashed", "timed_out"])
def test_a_run_without_result_is_its_own_finding(norm_case: Case, status: str) -> None:
    outcome = Outcome(status, message="what happened", location="mine.py:7")  # type: ignore[arg-type]
    verdict = judge(norm_case, outcome)
    assert detectors(verdict) == [status]
    assert verdict.findings[0].message == "what happened (mine.py:7)"
    assert verdict.share is None


def test_conduct_is_judged_beside_the_values(norm_case: Case) -> None:
    difference = PassDifference("Pass_05_Name", "f", "y", "", 1.0, 3, 10, "3 of 10 elements differ")
    outcome = Outcome(
        "ok",
        outputs=perfect(norm_case),
        changed_inputs={"x": 2},
        guard_damage={"out": "1 elements past the end"},
        pass_differences=(difference,),
    )
    assert detectors(judge(norm_case, outcome)) == ["changed_input", "out_of_bounds", "compiler_pass"]


def test_an_output_of_another_dtype_or_shape_is_refused_in_one_line(norm_case: Case) -> None:
    for wrong in (torch.zeros(5, 256), torch.zeros(5, 255, dtype=BF16)):
        with pytest.raises(UsageError, match=r"out of rms_norm must be torch.bfloat16 \[5, 256\], found") as error:
            judged(norm_case, {"out": wrong})
        assert "\n" not in str(error.value)


def test_an_unknown_profile_is_refused(norm_case: Case) -> None:
    with pytest.raises(UsageError, match="no profile 'bf16'"):
        judge(norm_case, Outcome("ok", outputs=perfect(norm_case)), profile="bf16")


# -- constants and findings -----------------------------------------------------------------------------------------------------


def test_limits_hold_for_normal_errors() -> None:
    """20000 tensors of 64 normal errors: none beyond kappa, none beyond the spread limit."""
    errors = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(errors.abs().max()) < kappa(64)
    limit = float(spread_limit(torch.tensor(64.0)))
    assert float(errors.square().mean(1).max()) < limit
    assert limit < 3  # errors twice as large as they should be are found


def test_the_spread_limit_falls_as_more_errors_are_independent() -> None:
    limits = spread_limit(torch.tensor([1.0, 2.0, 16.0, 256.0, 1e6], dtype=torch.float64))
    assert bool((limits[:-1] >= limits[1:]).all())
    assert 1.1 < float(limits[-1]) < 1.12


def test_findings_are_told_cause_first_then_worst() -> None:
    found = worst_first(
        [
            Finding("bias", "b", share=9.0),
            Finding("element", "small", share=2.0),
            Finding("element", "large", share=5.0),
            Finding("raised", "r"),
        ]
    )
    assert [finding.message for finding in found] == ["r", "large", "small", "b"]


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_finding_survives_json(detector: str) -> None:
    finding = Finding(detector, "text", "out", (1, 2), {"row": 1}, share=math.inf, ulps=2.5, count=3, total=4)
    assert Finding.from_json(finding.to_json()) == finding


def test_an_unknown_detector_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown detector 'wrong'"):
        Finding("wrong", "text")


def test_composite_runs_are_localised_only_when_wrong() -> None:
    case = make_case(CaseKey.parse("decode_layer:tiny:B=2,S=40,seq_lens=5+9:normal:1"))
    outputs = perfect(case)
    assert judged(case, outputs).ok
    outputs["out"] = outputs["out"] * 2
    assert "Likely cause: the cache rows are right" in judged(case, outputs).findings[0].message
    assert conformance.stages()["decode_layer"].localise is not None


# -- several tokens a sequence --------------------------------------------------------------------------------------------------


class EveryRounding(Arithmetic):
    """A legal kernel that makes every optional rounding."""

    def optional(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        return self.round(tensor)


PREFILL = "prefill_layer:tiny:B=2,NH=2,NKV=1,D=32,I=64,S=40,NB=8,seq_lens=20+33,chunk_lens=6+4"


def rounded_everywhere(case: Case) -> dict[str, torch.Tensor]:
    results = case.stage.reference(case.inputs, case.dims, EveryRounding(torch.float32, rounds=True))
    return {argument.name: results[argument.name].to(argument.dtype) for argument in case.stage.outputs}


@pytest.mark.parametrize("end", ["normal:2", "small:22", "needle:22"])
def test_errors_that_a_tokens_roundings_share_do_not_reject_a_prefill(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the errors of a row independent of one another, these would be too large together."""
    case = make_case(CaseKey.parse(f"{PREFILL}:{end}"))
    outputs = rounded_everywhere(case)
    assert judged(case, outputs).ok
    monkeypatch.setattr(Oracle, "independent_errors", lambda self, argument, profile: torch.tensor(math.inf))
    monkeypatch.setattr(Oracle, "independent_in_row", lambda self, argument, profile, row: math.inf)
    monkeypatch.setattr(Oracle, "independent_in_tile", lambda self, argument, profile, row, columns: math.inf)
    assert detectors(judged(case, outputs)) == ["spread"]


def test_a_prefill_of_one_token_a_sequence_has_the_correlations_of_a_decode_step() -> None:
    key = CaseKey.parse("prefill_layer:tiny:B=3,S=40,NB=9,seq_lens=5+17+40,chunk_lens=1+1+1,rows=0+1+2:normal:1")
    prefill = make_case(key)  # rows: packed in the order of the sequences
    decode_stage = conformance.stages()["paged_decode_layer"]
    inputs = {argument.name: prefill.inputs[argument.name] for argument in decode_stage.inputs}
    decode = Case(key, decode_stage, prefill.dims.replace(T=1), inputs)
    for name in ("k_cache", "v_cache", "out"):
        one, other = (Oracle(case).independent_errors(name, case.stage.profiles[0]) for case in (prefill, decode))
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-3)


def test_the_correlation_of_a_token_does_not_depend_on_where_it_is_packed() -> None:
    """What a token's roundings share is told from eight random directions: to about a quarter, and more where few modes rule."""
    whole = make_case(CaseKey.parse(f"{PREFILL}:normal:3"))
    turned = make_case(CaseKey.parse(f"{PREFILL},rows=1+0:normal:3"))
    counts = []
    for case in (whole, turned):
        found = Oracle(case).independent_errors("out", case.stage.profiles[0])
        starts, lengths = case.inputs["chunk_offsets"].tolist(), case.inputs["chunk_lens"].tolist()
        counts.append([found[start : start + length] for start, length in zip(starts, lengths, strict=True)])
    first, second = counts[0], list(reversed(counts[1]))
    assert [len(part) for part in first] == [len(part) for part in second] == [6, 4]
    ratio = torch.cat(first) / torch.cat(second)
    assert bool(((ratio > 0.4) & (ratio < 2.5)).all())
    assert 0.8 < float(ratio.log().mean().exp()) < 1.25


@pytest.mark.parametrize(("deviations", "detector"), [(20.0, "element"), (4.5, "spread")])
def test_a_wrong_token_of_a_chunk_is_named(deviations: float, detector: str) -> None:
    case = make_case(CaseKey.parse(f"{PREFILL}:normal:3"))
    outputs = perfect(case)
    assert judged(case, outputs).ok
    estimate = Oracle(case).bounds(case.stage.profiles[0])["out"]
    signs = torch.tensor([1.0, -1.0] * 32, dtype=torch.float64)
    outputs["out"][7] = (estimate.value[7] + signs * deviations * estimate.variance[7].sqrt()).to(BF16)
    finding = judged(case, outputs).findings[0]
    assert finding.detector == detector
    assert finding.index is not None
    assert finding.index[0] == finding.where["token"] == 7
    assert ("out[7, " if detector == "element" else "errors of out in row 7 are") in finding.message


def test_a_prefills_stale_row_is_named_by_page_and_offset() -> None:
    case = make_case(CaseKey.parse(f"{PREFILL}:normal:3"))
    outputs = perfect(case)
    slot = int(case.inputs["slot_mapping"][4])
    outputs["v_cache"][slot] = case.inputs["v_cache"][slot]  # one KV head: a row is a slot
    verdict = judged(case, outputs)
    assert detectors(verdict) == ["stale_row"]
    where = verdict.findings[0].where
    assert (where["page"], where["offset"]) == divmod(slot, case.dims.BS)


def test_rounding_that_had_to_lean_is_no_bias() -> None:
    """One key takes all but a thousandth of the weight: every column is rounded back up to that key's value."""
    case = make_case(CaseKey.parse("attention:tiny:B=1,seq_lens=2:normal:1"))
    case.inputs["q"].zero_()
    keys, values = (case.inputs[name].view(2, 128, 64) for name in ("k_cache", "v_cache"))
    keys[:, :2] = 0
    keys[:, 0, 0] = 8.0
    case.inputs["q"].view(4, 64)[:, 0] = 6.75  # a score of 6.75 against 0: the other key weighs 0.00117
    values[:, 1] = 0
    outputs = perfect(case)
    assert same_bits(outputs["out"].view(2, 2, 64)[:, 0], values[:, 0].contiguous())
    # Under this profile: one that rounds probabilities leaves room for it anyway.
    assert judge(case, Outcome("ok", outputs=outputs), profile="contract").ok
    leaning = bits(outputs["out"])
    leaning += 1
    assert "element" in detectors(judged(case, outputs))


# -- spread and bias, on stages made up for it ----------------------------------------------------------------------------------


#: What is said of an output that holds the pattern it was filled with.
UNWRITTEN = "was not written (it still holds what it was filled with before the run)"
ROWS, COLUMNS = 5, 40  # two whole tiles and half a one


def made_up(
    value: torch.Tensor,
    variance: torch.Tensor,
    *,
    worst: torch.Tensor | None = None,
    dtype: torch.dtype = BF16,
    composite: bool = False,
    correlation: Correlation | None = None,
    reference: Callable[..., torch.Tensor] | None = None,
    sequences: list[int] | None = None,
    heads: int = 0,
    lanes: int = 0,
    causes: list[str] | None = None,
) -> Case:
    """A case of a stage with one output, ``out``, and these bounds of it; elements are limited by their variance alone.

    With ``heads`` the rows are those of a cache, by token and head; with ``lanes`` columns are those of heads so wide.
    """
    rows, columns = value.shape
    cache_rows, heads = torch.arange(rows) if heads else None, max(1, heads)
    limit = torch.full_like(value, math.inf) if worst is None else worst
    estimate = Bounds(value, variance, limit, cache_rows, correlation)
    stage = Stage(
        model="qwen3",
        name="made_up",
        summary="",
        arguments=(write("out", "B NH*D" if lanes else "B*NKV V", dtype),),
        reference=lambda inputs, dims, arithmetic: {"out": reference(arithmetic)} if reference else {},
        error_model=lambda inputs, dims, profile: {"out": estimate},
        make_inputs=lambda *arguments: {},
        regimes=("normal",),
        profiles=(Profile("only", frozenset({"owned"})),),
        composite=composite,
        sequences=None if sequences is None else lambda inputs, dims: torch.tensor(sequences),
        localise=None if causes is None else lambda inputs, outputs, dims: causes,
    )
    query_heads, width = (columns // lanes, lanes) if lanes else (heads, 2)
    dims = Qwen3Dims(B=rows // heads, NH=query_heads, NKV=heads, D=width, I=1, V=columns, L=1, S=1, BS=1, NB=1)
    return Case(CaseKey.parse("rms_norm:tiny:B=1:normal:1"), stage, dims, {})


def with_another(case: Case, another: Case) -> Case:
    """A case with the output of another one as well, ``other``."""
    mine, others = case.stage.error_model, another.stage.error_model

    def both(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
        return {**mine(inputs, dims, profile), "other": others(inputs, dims, profile)["out"]}

    argument = dataclasses.replace(another.stage.arguments[0], name="other")
    stage = dataclasses.replace(case.stage, arguments=(*case.stage.arguments, argument), error_model=both)
    return dataclasses.replace(case, stage=stage)


def in_rows(case: Case, rows: list[int]) -> Case:
    """The same case, its judged rows standing in these rows of a cache."""
    model = case.stage.error_model

    def moved(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
        return {"out": dataclasses.replace(model(inputs, dims, profile)["out"], rows=torch.tensor(rows))}

    return dataclasses.replace(case, stage=dataclasses.replace(case.stage, error_model=moved))


def different(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    """bf16 values of mixed signs and sizes, all different, in the middle of their binades."""
    draw = torch.Generator().manual_seed(seed)
    number = torch.randperm(64 * 40, generator=draw)[: rows * columns].view(rows, columns).double()
    signs = torch.randint(0, 2, (rows, columns), generator=draw) * 2.0 - 1.0
    return signs * (1.25 + (number % 64) / 128) * 2.0 ** (torch.div(number, 64, rounding_mode="floor") - 20)


def off_by(out: torch.Tensor, scaled: torch.Tensor, uncertainty: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact values that ``out`` is so many standard deviations away from, and their variance: so many ULPs, squared."""
    ulp = spacing(out, BF16)
    value = out - scaled * ulp * math.sqrt(uncertainty**2 + 1 / 12)
    assert torch.equal(spacing(value, BF16), ulp)
    return value, (uncertainty * ulp) ** 2


def alternating(size: float | torch.Tensor, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    """Errors of that size that cancel along rows, and nearly down columns."""
    steps = torch.arange(rows).unsqueeze(1) * 0 + torch.arange(columns)
    return size * (1.0 - 2.0 * (steps % 2)).double()


def verdict_on(case: Case, out: torch.Tensor, oracle: Oracle | None = None) -> Verdict:
    return judge(case, Outcome("ok", outputs={"out": out.to(case.stage.argument("out").dtype)}), oracle=oracle)


def spread_allows(count: float) -> float:
    """The mean square of ``count`` independent errors that docs/rule.md, Spread, allows."""
    part = 2 / (9 * max(2.0, count))
    return 1.1 * (1 - part + 5.5 * math.sqrt(part)) ** 3


def bias_allows(count: int, variance: float) -> float:
    return 6 * math.sqrt(variance) + 0.02 * count


def element_off(share: float, count: int = 200) -> float:
    """How many deviations an element is off that uses this share of its allowance, as one of so many."""
    return (share * kappa(count) + 0.5 * (1 + 2.0**-12)) / math.sqrt(13 / 12)


EVERY = slice(None)
#: Rows, columns, elements, and what they are called in a message.
AREAS: list[tuple[slice, slice, int, str]] = [
    (EVERY, EVERY, 200, "the whole tensor"),
    (slice(2, 3), EVERY, 40, "row 2"),
    (slice(2, 3), slice(16, 32), 16, "row 2, columns 16..31"),
    (slice(4, 5), slice(32, 40), 8, "row 4, columns 32..39"),
    (EVERY, slice(16, 32), 80, "columns 16..31 of every row"),
    (EVERY, slice(32, 40), 40, "columns 32..39 of every row"),
]


@pytest.mark.parametrize("size", [0.98, 1.02])
@pytest.mark.parametrize(("rows", "columns", "count", "name"), AREAS, ids=[area[3] for area in AREAS])
def test_errors_that_are_too_large_together_are_found_where_they_are(
    rows: slice, columns: slice, count: int, name: str, size: float
) -> None:
    """Each of them is within its own allowance; a local fault cannot hide in the rest of the tensor."""
    scaled = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    each = math.sqrt(size * spread_allows(count))
    scaled[rows, columns] = alternating(each)[rows, columns]
    out = different()
    verdict = verdict_on(made_up(*off_by(out, scaled)), out)
    assert verdict.share == pytest.approx(size, rel=1e-6)
    assert detectors(verdict) == (["spread"] if size > 1 else [])
    if size > 1:
        (finding,) = verdict.findings
        # No coordinate of what it is all of: nothing of "row 0" where all rows are meant.
        row = {} if rows == EVERY else {"row": rows.start, "kv_head": 0}
        column = {} if columns == EVERY else {"column": columns.start}
        place = None if rows == EVERY else tuple(part.start for part in (rows, columns) if part != EVERY)
        assert (finding.argument, finding.index, finding.where) == ("out", place, {**row, **column})
        assert f"errors of out in {name} are too large together: their RMS is {each:.3g} times " in finding.message
        assert f"limit {math.sqrt(each**2 / size):.3g} ({count:.3g} effective degrees of freedom)" in finding.message
        assert (finding.count, finding.total) == (200, 200)
        assert finding.share == pytest.approx(size, rel=1e-6)
        assert finding.ulps == pytest.approx(each * math.sqrt(13 / 12), rel=1e-6)


def test_errors_in_a_cache_are_told_by_its_own_rows() -> None:
    """The judged rows stand in another order in the cache."""
    scaled = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    scaled[1] = alternating(math.sqrt(1.5 * spread_allows(40)))[1]
    out = different()
    case = in_rows(made_up(*off_by(out, scaled), heads=1), [4, 3, 2, 1, 0])
    (finding,) = verdict_on(case, out.flip(0)).findings
    assert "errors of out in row 3 are " in finding.message
    assert finding.index == (3,)


@pytest.mark.parametrize("size", [0.98, 1.02])
@pytest.mark.parametrize("lean", [1, -1])
@pytest.mark.parametrize(("rows", "count", "name"), [(EVERY, 200, "the whole tensor"), (slice(3, 4), 40, "row 3")])
def test_errors_that_lean_are_found_in_a_row_and_in_the_whole(rows: slice, count: int, name: str, lean: int, size: float) -> None:
    out = different()
    each = size * bias_allows(count, count) / count
    scaled = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    scaled[rows] = (lean * each * torch.sign(out))[rows]
    verdict = verdict_on(made_up(*off_by(out, scaled)), out)
    assert verdict.share == pytest.approx(size, rel=1e-6)
    assert detectors(verdict) == (["bias"] if size > 1 else [])
    if size > 1:
        (finding,) = verdict.findings
        place = (None, {}) if rows == EVERY else ((3,), {"row": 3, "kv_head": 0})
        assert (finding.argument, finding.index, finding.where) == ("out", *place)
        size_in_words = "too large" if lean > 0 else "too small"
        assert f"magnitudes of out in {name} are {size_in_words} on average: mean error {each:.3g} " in finding.message
        assert f"limit {each / size:.3g} (" in finding.message
        assert (finding.count, finding.total) == (200, 200)
        assert finding.share == pytest.approx(size, rel=1e-6)


@pytest.mark.parametrize("uncertainty", [0.0, 0.1, 0.2, 0.3, 5.0])
def test_what_a_certain_value_is_rounded_by_is_no_bias(uncertainty: float) -> None:
    """A value known to a part of a step is rounded the way it must be; how much of that is left follows the document."""
    out = different(1)
    ulp = spacing(out, BF16)
    value, variance = out - 0.3 * torch.sign(out) * ulp, (uncertainty * ulp) ** 2
    scaled = 0.3 / math.sqrt(uncertainty**2 + 1 / 12)
    accident = 1 - math.exp(-2 * math.pi**2 * uncertainty**2)
    expected = max(scaled**2 / spread_allows(40), 40 * scaled * accident / bias_allows(40, 40))
    verdict = verdict_on(made_up(value, variance), out)
    assert verdict.ok
    assert verdict.share == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("from_tie", "says"), [(0.0, False), (0.9e-5, False), (1.1e-5, True)])
def test_next_to_a_tie_the_direction_says_nothing(from_tie: float, says: bool) -> None:
    out = different(1, 60)
    ulp, offset = spacing(out, BF16), torch.full((1, 60), 0.4, dtype=torch.float64)
    offset[0, ::6] = 0.5 - from_tie
    verdict = verdict_on(made_up(out - offset * torch.sign(out) * ulp, ulp**2), out)
    count = 60 if says else 50
    lean = float(offset.sum() if says else 20.0) / math.sqrt(13 / 12)
    assert verdict.share == pytest.approx(lean / bias_allows(count, count), rel=1e-6)


def repeated(times: int, columns: int = COLUMNS) -> torch.Tensor:
    """A row of values that come ``times`` times each, side by side."""
    return different(1, columns // times).repeat_interleave(times, 1)


@pytest.mark.parametrize("size", [0.98, 1.02])
def test_values_that_repeat_are_one_error(size: float) -> None:
    """Ten values, four times each: the mean square of their errors scatters as that of ten, and of four in a tile."""
    out, of_value = repeated(4), alternating(1.0, 1, 10).repeat_interleave(4, 1)
    whole = verdict_on(made_up(*off_by(out, of_value * math.sqrt(size * spread_allows(10)))), out)
    assert whole.share == pytest.approx(size, rel=1e-6)
    assert whole.ok == (size < 1)
    scaled = torch.zeros(1, COLUMNS, dtype=torch.float64)
    scaled[:, 16:32] = (of_value * math.sqrt(size * spread_allows(4)))[:, 16:32]
    tile = verdict_on(made_up(*off_by(out, scaled)), out)
    assert tile.share == pytest.approx(size, rel=1e-6)
    leaning = verdict_on(made_up(*off_by(out, torch.sign(out) * size * bias_allows(40, 40 * 4) / 40)), out)
    assert leaning.share == pytest.approx(size, rel=1e-6)
    assert leaning.ok == (size < 1)


@pytest.mark.parametrize("size", [0.98, 1.02])
def test_rows_that_repeat_one_another_are_one_error(size: float) -> None:
    """Five rows of the same values: what is the same down the rows averages out along them only."""
    out, limit = different(1).expand(ROWS, -1), spread_allows
    whole = verdict_on(made_up(*off_by(out, alternating(math.sqrt(size * limit(40))))), out)
    assert whole.share == pytest.approx(size, rel=1e-6)
    scaled = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    scaled[:, :16] = alternating(math.sqrt(size * limit(16)))[:, :16]
    assert verdict_on(made_up(*off_by(out, scaled)), out).share == pytest.approx(size, rel=1e-6)
    # The limit of a row is tighter than that of the tensor here: 200 errors, of which one in five is different.
    leaning = verdict_on(made_up(*off_by(out, torch.sign(out) * 0.9)), out)
    assert leaning.share == pytest.approx(max(36 / bias_allows(40, 40), 180 / bias_allows(200, 1000)), rel=1e-6)


@pytest.mark.parametrize(("values", "judged_at_all"), [(7, False), (8, True)])
def test_a_row_of_few_values_says_nothing(values: int, judged_at_all: bool) -> None:
    out = different(1, values).repeat(1, 6)
    scaled = alternating(1.0, 1, values).repeat(1, 6) * math.sqrt(2 * spread_allows(values))
    verdict = verdict_on(made_up(*off_by(out, scaled)), out)
    assert detectors(verdict) == (["spread"] if judged_at_all else [])
    assert verdict.share is not None
    if not judged_at_all:
        assert 0.5 < verdict.share < 0.9  # what its elements use of their own allowance
    else:
        assert verdict.share == pytest.approx(2, rel=1e-6)
        assert verdict.findings[0].count == values * 6


@pytest.mark.parametrize(("step", "judged_at_all"), [(2.0**-12, True), (2.0**-13, False)])
def test_values_that_agree_to_twelve_bits_are_one(step: float, judged_at_all: bool) -> None:
    exact = 1.25 + step * (torch.arange(40) % 8).double().unsqueeze(0)
    out = rounded(exact + alternating(3.0, 1) * 2.0**-7, BF16)
    verdict = verdict_on(made_up(exact, torch.full_like(exact, 2.0**-14)), out)
    assert detectors(verdict) == (["spread"] if judged_at_all else [])


def test_a_row_of_few_values_hides_no_other_row() -> None:
    out, scaled = different(), torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    out[0] = out[0, 0]
    scaled[3] = alternating(math.sqrt(1.5 * spread_allows(40)))[3]
    verdict = verdict_on(made_up(*off_by(out, scaled)), out)
    assert [(finding.detector, finding.index, finding.count) for finding in verdict.findings] == [("spread", (3,), 160)]


@pytest.mark.parametrize("size", [0.98, 1.02])
def test_a_tile_of_one_element_counts_that_one(size: float) -> None:
    out, scaled = different(ROWS, 33), torch.zeros(ROWS, 33, dtype=torch.float64)
    scaled[2, 32] = math.sqrt(size * spread_allows(2))
    verdict = verdict_on(made_up(*off_by(out, scaled, 5.0)), out)
    assert verdict.share == pytest.approx(size, rel=1e-6)
    assert detectors(verdict) == (["spread"] if size > 1 else [])


def test_what_is_not_finite_or_was_not_written_is_no_part_of_the_statistics() -> None:
    """Two elements overflow, and rightly so; two were not written. The others' errors are judged all the same."""
    out, size = different(), 1.5
    scaled = alternating(math.sqrt(size * spread_allows(36 + 160)))
    value, variance = off_by(out, scaled)
    value[1, :2] = out[1, :2] = math.inf
    case, found = made_up(value, variance), out.to(BF16)
    poison(found[1, 2:4])
    verdict = verdict_on(case, found)
    assert detectors(verdict) == ["unwritten", "spread"]
    assert verdict.findings[0].count == 2
    assert (verdict.findings[1].count, verdict.findings[1].total) == (196, 200)
    assert verdict.findings[1].share == pytest.approx(size, rel=1e-2)


def test_an_exact_zero_leans_to_neither_side() -> None:
    out = different()
    value, variance = off_by(out, torch.zeros_like(out))
    out[1, 3], value[1, 3], variance[1, 3] = 2.0**-10, 0.0, 2.0**-20
    verdict = verdict_on(made_up(value, variance), out)
    assert verdict.ok
    assert verdict.share is not None
    assert verdict.share < 0.5


def test_results_of_the_other_sign_are_as_far_off_as_they_are() -> None:
    out = different()
    verdict = verdict_on(made_up(-out, (spacing(out, BF16) / 4) ** 2), out)
    assert "element" in detectors(verdict)
    assert verdict.findings[0].count == ROWS * COLUMNS


@pytest.mark.parametrize(("size", "flushed"), [(0.9, True), (1.1, False)])
def test_what_fp32_cannot_hold_but_as_a_subnormal_may_be_zero(size: float, flushed: bool) -> None:
    value = torch.tensor([[size * 2.0**-126, 1.0]], dtype=torch.float64)
    little = torch.full_like(value, 1e-60)
    verdict = verdict_on(made_up(value, little**2, worst=little, dtype=torch.float32), torch.tensor([[0.0, 1.0]]))
    assert detectors(verdict) == ([] if flushed else ["element"])


@pytest.mark.parametrize("count", [1, 200, 1 << 20])
def test_how_far_a_correct_element_may_be_off_follows_the_document(count: int) -> None:
    """A normal error is beyond it with a probability of a millionth, at the most, for all elements together."""
    assert kappa(count) == pytest.approx(math.sqrt(2 * math.log(2e6 * count)), rel=1e-12)


@pytest.mark.parametrize("block", [1 << 15, 10])
def test_of_elements_that_allow_no_error_the_largest_is_told(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Whatever its value, and wherever it stands."""
    monkeypatch.setattr("conformance.judge.limits.BLOCK", block)
    value = torch.ones(ROWS, COLUMNS, dtype=torch.float64)
    value[1, 2], value[2, 30], value[4, 5] = 100.0, -8.0, 2.0
    case = made_up(value, torch.zeros_like(value), worst=torch.zeros_like(value))
    out = value.clone()
    out[1, 2], out[2, 30], out[4, 5] = 101.0, -4.0, 1.0
    (finding,) = verdict_on(case, out).findings
    assert (finding.detector, finding.index, finding.count) == ("element", (2, 30), 3)
    out[2, 30] = -8.0
    assert verdict_on(case, out).findings[0].index == (1, 2)  # of equal ones the first


def test_an_element_of_which_nothing_is_known_is_told_before_one_that_is_too_far_off() -> None:
    out, scaled = different(), torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    scaled[0, 2] = element_off(1.2)
    scaled[3, 7] = 1.0
    value, variance = off_by(out, scaled)
    variance[3, 7] = math.nan
    (finding,) = verdict_on(made_up(value, variance), out).findings
    assert (finding.detector, finding.index, finding.count) == ("element", (3, 7), 2)


@pytest.mark.parametrize("size", [0.98, 1.02])
def test_roundings_that_a_row_shares_make_its_errors_fewer(size: float) -> None:
    """A row of four independent errors: the row and its tiles may be further off together, and lean more."""
    rows, few, varied = 40, torch.full((40,), 40.0).double(), torch.full((40,), 40.0).double()
    few[2], varied[2], out = 4.0, 400.0, different(40)

    def share(scaled: torch.Tensor) -> float | None:
        verdict = verdict_on(made_up(*off_by(out, scaled), correlation=Correlation(few, varied)), out)
        assert verdict.ok == (size < 1)
        return verdict.share

    in_tile, in_short_tile = (1 / (1 / count + 1 / 4 - 1 / 40) for count in (16, 8))
    for columns, count in ((EVERY, 4.0), (slice(16, 32), in_tile), (slice(32, 40), in_short_tile)):
        scaled = torch.zeros(rows, COLUMNS, dtype=torch.float64)
        scaled[2, columns] = alternating(math.sqrt(size * spread_allows(count)))[2, columns]
        assert share(scaled) == pytest.approx(size, rel=1e-6)
    scaled = torch.zeros(rows, COLUMNS, dtype=torch.float64)
    scaled[2] = torch.sign(out[2]) * size * bias_allows(40, 400) / 40
    assert share(scaled) == pytest.approx(size, rel=1e-6)


def test_more_independent_errors_than_values_are_not_believed() -> None:
    out = repeated(4)
    many = Correlation(torch.tensor([1e9]).double(), torch.tensor([0.0]).double())
    scaled = alternating(1.0, 1, 10).repeat_interleave(4, 1) * math.sqrt(0.9 * spread_allows(10))
    assert verdict_on(made_up(*off_by(out, scaled), correlation=many), out).share == pytest.approx(0.9, rel=1e-6)


HEADS, LANES = 4, 10


def leaning(out: torch.Tensor, by: float, signs: torch.Tensor | None = None) -> torch.Tensor:
    """Errors that make each head of ``out`` lean by so many deviations in all, every second one to the other side."""
    sides = alternating(1.0, len(out), HEADS) if signs is None else signs
    return torch.sign(out) * sides.repeat_interleave(LANES, 1) * by / LANES


def heads_lean(square: float, variance: float = LANES) -> float:
    """By how much a head leans whose square over its deviation, beyond what is always allowed, is this."""
    return math.sqrt(square * variance) + 0.02 * LANES


@pytest.mark.parametrize("size", [0.98, 1.02])
def test_two_heads_a_row_are_enough_to_lean_each_its_own_way(size: float) -> None:
    out = different(ROWS, 2 * LANES)
    sides = alternating(1.0, ROWS, 2)
    scaled = leaning(out, heads_lean(size * spread_allows(ROWS * 2)), sides)
    verdict = verdict_on(made_up(*off_by(out, scaled), lanes=LANES), out)
    assert verdict.share == pytest.approx(size, rel=1e-6)
    assert verdict.ok == (size < 1)


@pytest.mark.parametrize("size", [0.98, 1.02])
def test_heads_that_lean_each_its_own_way_are_found_together(size: float) -> None:
    out = different()
    scaled = leaning(out, heads_lean(size * spread_allows(ROWS * HEADS)))
    scaled[3, 10:20] *= 1 + 1e-9  # the worst
    verdict = verdict_on(made_up(*off_by(out, scaled), lanes=LANES), out)
    assert verdict.share == pytest.approx(size, rel=1e-6)
    assert detectors(verdict) == (["bias"] if size > 1 else [])
    if size > 1:
        (finding,) = verdict.findings
        assert finding.message.startswith("magnitudes of out are biased group by group, some too large, some too small: ")
        assert f"limit {spread_allows(ROWS * HEADS):.3g} (" in finding.message
        assert "worst at row 3, head 1, lane 0" in finding.message
        assert (finding.argument, str(finding.index), finding.where) == ("out", "(3, 10)", {"row": 3, "head": 1, "lane": 0})
        assert (finding.count, finding.total) == (200, 200)
        assert finding.share == verdict.share


def test_a_row_that_is_no_heads_has_no_heads_that_lean() -> None:
    out = different()
    scaled = leaning(out, heads_lean(2 * spread_allows(ROWS * HEADS)))
    assert verdict_on(made_up(*off_by(out, scaled)), out).ok


def test_a_row_that_leans_is_told_before_its_heads() -> None:
    """Where every head leans the same way the row says more; the share is the larger one."""
    out = different()
    scaled = leaning(out, heads_lean(2 * spread_allows(ROWS * HEADS)), torch.ones(ROWS, HEADS).double())
    verdict = verdict_on(made_up(*off_by(out, scaled), lanes=LANES), out)
    assert [finding.message.split(":")[0] for finding in verdict.findings] == [
        "magnitudes of out in the whole tensor are too large on average"
    ]
    assert verdict.share is not None
    assert verdict.share > 2
    scaled[:] = 0
    assert verdict_on(made_up(*off_by(out, scaled), lanes=LANES), out).share == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("size", [0.98, 1.02])
def test_values_that_repeat_within_a_head_lean_it_more(size: float) -> None:
    """Two values five times each: the sum of their errors varies five times as much."""
    out = different(ROWS, 8).repeat_interleave(5, 1)
    scaled = leaning(out, heads_lean(size * spread_allows(ROWS * HEADS), LANES * 5))
    assert verdict_on(made_up(*off_by(out, scaled), lanes=LANES), out).share == pytest.approx(size, rel=1e-6)


@pytest.mark.parametrize("size", [0.98, 1.02])
def test_rows_of_heads_that_repeat_one_another_are_one(size: float) -> None:
    out = different(1).expand(ROWS, -1)
    scaled = leaning(out, heads_lean(size * spread_allows(HEADS)))
    assert verdict_on(made_up(*off_by(out, scaled), lanes=LANES), out).share == pytest.approx(size, rel=1e-6)


@pytest.mark.parametrize("size", [0.98, 1.02])
def test_what_the_errors_of_a_head_share_may_lean_it(size: float) -> None:
    """Each head varies twice as much as its elements say; a row as much as its heads, or as though half of them were one."""
    rows = torch.full((ROWS,), 40.0).double()
    of_heads = torch.full((ROWS, HEADS), 2.0 * LANES).double()
    out = different()
    for row_variance, count in ((1.0, HEADS), (2.0 * LANES * HEADS, HEADS), (4.0 * LANES * HEADS, HEADS / 2)):
        correlation = Correlation(rows, torch.full((ROWS,), row_variance).double(), of_heads)
        scaled = leaning(out, heads_lean(size * spread_allows(ROWS * count), 2 * LANES))
        verdict = verdict_on(made_up(*off_by(out, scaled), lanes=LANES, correlation=correlation), out)
        assert verdict.share == pytest.approx(size, rel=1e-6)
    # A deviation that is smaller than that of the elements is not believed, and none need be told.
    for few in (torch.zeros(ROWS, HEADS).double(), None):
        correlation = Correlation(rows, torch.full((ROWS,), 40.0).double(), few)
        scaled = leaning(out, heads_lean(size * spread_allows(ROWS * HEADS)))
        verdict = verdict_on(made_up(*off_by(out, scaled), lanes=LANES, correlation=correlation), out)
        assert verdict.share == pytest.approx(size, rel=1e-6)


@pytest.mark.parametrize("left", [0, 1])
def test_a_head_of_which_nothing_is_counted_is_none(left: int) -> None:
    """All that is left of a head is one element, or nothing: the others overflow, and rightly so."""
    out = different()
    scaled = leaning(out, heads_lean(1.2 * spread_allows(ROWS * HEADS)))
    value, variance = off_by(out, scaled)
    value[2, 10 + left : 20] = out[2, 10 + left : 20] = math.inf
    verdict = verdict_on(made_up(value, variance, lanes=LANES), out)
    of_one = (float(scaled[2, 10].abs()) - 0.02) ** 2
    heads = ROWS * HEADS - 1 + left
    mean = (1.2 * spread_allows(ROWS * HEADS) * (ROWS * HEADS - 1) + left * of_one) / heads
    assert verdict.share == pytest.approx(mean / spread_allows(heads), rel=1e-6)
    # Where a row varies by more than its heads add up to, by those that are left: 80 of 40, and of 30 or 31 in that row.
    correlation = Correlation(torch.full((ROWS,), 40.0).double(), torch.full((ROWS,), 80.0).double())
    verdict = verdict_on(made_up(value, variance, lanes=LANES, correlation=correlation), out)
    count = (ROWS - 1) * HEADS / 2 + (HEADS - 1 + left) * (30 + left) / 80
    assert verdict.share == pytest.approx(mean / spread_allows(count), rel=1e-6)


def test_a_factor_of_each_heads_own_is_found_where_no_row_leans() -> None:
    """A denominator of softmax rounded to bf16: some heads come out too large, others too small."""
    lengths = "128+128+128+128+127+128+114+125+122+127+123+128+123+119+119+127"
    case = make_case(CaseKey.parse(f"attention:tiny:B=16,seq_lens={lengths}:long:1930531386"))
    wrong = judge(case, run_eager(torch_kernel("attention", fault="denominator_in_bf16"), case))
    (finding,) = wrong.findings
    assert finding.detector == "bias"
    assert finding.message.startswith("magnitudes of out are biased group by group")
    assert set(finding.where) == {"row", "head", "lane"}
    for choices in (Choices(), Choices(probabilities="after"), Choices(probabilities="before"), Choices(probabilities="both")):
        assert judge(case, run_eager(torch_kernel("attention", choices), case)).ok


# -- layers: which errors are independent ---------------------------------------------------------------------------------------


class Told(Oracle):
    """An oracle that is told how many independent errors rows and tiles hold and how much elements vary; notes what is asked."""

    def __init__(
        self,
        case: Case,
        of_rows: list[float],
        of_tiles: dict[tuple[int, int], float],
        of_elements: dict[tuple[int, int], float] | None = None,
    ) -> None:
        super().__init__(case)
        self.of_rows, self.of_tiles = torch.tensor(of_rows, dtype=torch.float64), of_tiles
        self.of_elements = of_elements or {}
        self.elements: list[tuple[int, int]] = []
        self.asked: list[object] = []

    def filters(self, profile: Profile) -> list[Filter]:
        return []

    def independent_errors(self, argument: str, profile: Profile) -> torch.Tensor:
        assert (argument, profile.name) == ("out", "only")
        self.asked.append("rows")
        return self.of_rows

    def element_variance(self, argument: str, profile: Profile, row: int, column: int) -> float:
        assert (argument, profile.name) == ("out", "only")
        self.elements.append((row, column))
        return self.of_elements.get((row, column), 0.0)

    def independent_in_row(self, argument: str, profile: Profile, row: int) -> float:
        assert (argument, profile.name) == ("out", "only")
        self.asked.append(row)
        return float(self.of_rows[row])

    def independent_in_all_rows(self, argument: str, profile: Profile, columns: slice) -> float:
        assert (argument, profile.name) == ("out", "only")
        self.asked.append(("all", columns.start, columns.stop))
        return float(self.of_rows.sum())

    def independent_in_tile(self, argument: str, profile: Profile, row: int, columns: slice) -> float:
        assert (argument, profile.name) == ("out", "only")
        self.asked.append((row, columns.start, columns.stop))
        return self.of_tiles.get((row, columns.start), 16.0)


def layer(scaled: torch.Tensor, of_rows: list[float], of_tiles: dict[tuple[int, int], float]) -> tuple[Verdict, Told]:
    out = different(*scaled.shape)
    case = made_up(*off_by(out, scaled), composite=True)
    oracle = Told(case, of_rows, of_tiles)
    return verdict_on(case, out, oracle), oracle


def tiles_off(rows: int = ROWS, **sizes: float) -> torch.Tensor:
    """Errors in some tiles, named ``r2t16`` by row and column, of so many times what 16 independent ones may be."""
    scaled = torch.zeros(rows, 48, dtype=torch.float64)
    for name, size in sizes.items():
        row, column = map(int, name[1:].split("t"))
        scaled[row, column : column + 16] = alternating(math.sqrt(size * spread_allows(16)), 1, 16)
    return scaled


def test_a_layers_errors_may_lean() -> None:
    out = different()
    case = made_up(*off_by(out, torch.sign(out) * 1.1), composite=True)
    assert verdict_on(case, out, Told(case, [40.0] * 5, {})).ok


def test_a_layers_errors_are_counted_only_where_they_are_too_large() -> None:
    verdict, oracle = layer(alternating(1.2), [40.0] * 5, {})
    assert (verdict.ok, oracle.asked) == (True, [])
    verdict, oracle = layer(alternating(1.5), [4.0] * 5, {})
    assert (verdict.ok, oracle.asked) == (True, [("all", 0, 40)])
    assert verdict.share == pytest.approx(1.5**2 / spread_allows(5 * 16), rel=1e-6)  # now a column of tiles is worst
    verdict, oracle = layer(alternating(1.5), [40.0] * 5, {})
    assert (detectors(verdict), oracle.asked) == (["spread"], [("all", 0, 40)])


def test_rows_that_share_their_errors_are_looked_at_together() -> None:
    """Sixteen tiles one above the other, each within its limit: of one token's rows in layer after layer they are one error."""
    errors = torch.zeros(16, 48, dtype=torch.float64)
    errors[:, 16:32] = alternating(1.5, 16, 16)
    verdict, oracle = layer(errors, [48.0] * 16, {})
    (finding,) = verdict.findings
    assert (finding.detector, finding.index, finding.where["column"]) == ("spread", None, 16)
    assert oracle.asked == [("all", 16, 32)]
    verdict, oracle = layer(errors, [1.0] * 16, {})
    assert (verdict.ok, oracle.asked) == (True, [("all", 16, 32)])


def test_the_tensor_and_each_column_of_tiles_are_looked_at_by_themselves() -> None:
    errors = alternating(1.4, 16, 48)
    errors[:, 16:32] = alternating(1.9, 16, 16)
    verdict, oracle = layer(errors, [1.0] * 16, {})
    assert (verdict.ok, oracle.asked) == (True, [("all", 16, 32), ("all", 0, 48), ("all", 0, 16), ("all", 32, 48)])


def test_only_so_many_columns_of_tiles_are_looked_at_by_themselves() -> None:
    """Eight, with the tensor, before all rows are counted together."""
    verdict, oracle = layer(alternating(1.6, 16, 144), [1.0] * 16, {})
    of_tiles = [("all", 16 * number, 16 * number + 16) for number in range(7)]
    assert (verdict.ok, oracle.asked) == (True, [("all", 0, 144), *of_tiles, "rows"])


def test_a_layer_that_is_wrong_anyway_is_told_with_its_spread_and_not_counted() -> None:
    scaled = alternating(1.5)
    scaled[0, 0] = element_off(1.2)
    verdict, oracle = layer(scaled, [4.0] * 5, {})
    assert (detectors(verdict), oracle.asked) == (["element", "spread"], [])
    out = different()
    case = with_another(made_up(*off_by(out, alternating(1.5)), composite=True), made_up(*off_by(out, scaled)))
    told = Told(case, [4.0] * 5, {})
    outputs = {"out": out.to(BF16), "other": out.to(BF16) + 1e30}
    verdict = judge(case, Outcome("ok", outputs=outputs), oracle=told)
    assert {(finding.detector, finding.argument) for finding in verdict.findings} == {("element", "other"), ("spread", "other")}
    assert told.asked == [("all", 0, 40)]  # what is wrong with another output says nothing of this one


def test_a_tile_that_few_roundings_steer_is_looked_at_by_itself() -> None:
    """Three independent errors, not sixteen, explain it; where the answer is sixteen or twelve, it is a finding."""
    errors = tiles_off(r2t16=1.3)
    verdict, oracle = layer(errors, [48.0] * 5, {(2, 16): 3.0})
    assert verdict.ok
    assert verdict.share == pytest.approx(1.3 * spread_allows(16) / 3 / spread_allows(48), rel=1e-6)  # now the row is worst
    assert oracle.asked == [2, (2, 16, 32)]
    for count in (16.0, 12.0):
        verdict, oracle = layer(errors, [48.0] * 5, {(2, 16): count})
        assert [(finding.detector, finding.index) for finding in verdict.findings] == [("spread", (2, 16))]
        assert verdict.share == pytest.approx(1.3 * spread_allows(16) / spread_allows(count), rel=1e-6)
        assert oracle.asked == [2, (2, 16, 32)]
    # What the row's errors share was counted before: a tile is never told to have more independent ones than it was thought to.
    verdict, oracle = layer(tiles_off(r2t16=2.0), [48.0, 48.0, 8.0, 48.0, 48.0], {(2, 16): 1e6})
    assert verdict.share == pytest.approx(2 * spread_allows(16) / spread_allows(1 / (1 / 16 + 1 / 8 - 1 / 48)), rel=1e-6)


def test_tiles_are_looked_at_one_by_one_from_the_worst_on() -> None:
    errors = tiles_off(r2t16=1.3, r4t32=1.2, r0t0=1.1)
    explained = {(2, 16): 3.0, (4, 32): 3.0, (0, 0): 3.0}
    verdict, oracle = layer(errors, [48.0] * 5, explained)
    assert (verdict.ok, oracle.asked) == (True, [2, (2, 16, 32), 4, (4, 32, 48), 0, (0, 0, 16)])
    del explained[(4, 32)]
    verdict, oracle = layer(errors, [48.0] * 5, explained)
    assert [(finding.detector, finding.index) for finding in verdict.findings] == [("spread", (4, 32))]
    assert oracle.asked == [2, (2, 16, 32), 4, (4, 32, 48)]


def test_a_tile_that_nothing_could_explain_is_not_looked_at() -> None:
    """Two independent errors are the fewest: they may be 4.6 times as large as sixteen."""
    (limit_of_two,) = spread_limit(torch.tensor([2.0], dtype=torch.float64)).tolist()
    assert limit_of_two == pytest.approx(4.6 * spread_allows(16), rel=0.02)
    out = different(ROWS, 48)
    for size, asked in ((4.6, [2, (2, 16, 32)]), (4.8, [])):
        scaled = tiles_off(r2t16=size)
        value, variance = off_by(out, scaled, 3.0)
        case = made_up(value, variance, composite=True)
        oracle = Told(case, [1e3] * 5, {(2, 16): 1.0})
        verdict = verdict_on(case, out, oracle)
        assert oracle.asked == asked
        assert "element" not in detectors(verdict)


@pytest.mark.parametrize(("wrong", "looks", "ok"), [(4, 8, True), (8, 17, True), (9, 17, False)])
def test_only_so_many_rows_and_tiles_are_looked_at_by_themselves(wrong: int, looks: int, ok: bool) -> None:
    """Eight rows and tiles before all rows are counted together, and eight after that."""
    places = [(4 * number, 16 * (number % 3)) for number in range(wrong)]
    errors = tiles_off(40, **{f"r{row}t{tile}": 1.5 - 0.01 * number for number, (row, tile) in enumerate(places)})
    verdict, oracle = layer(errors, [48.0] * 40, dict.fromkeys(places, 2.0))
    assert (verdict.ok, len(oracle.asked)) == (ok, looks)
    assert ("rows" in oracle.asked) == (looks > 8)
    if not ok:
        assert verdict.findings[0].index == places[8]


@pytest.mark.parametrize("composite", [True, False])
@pytest.mark.parametrize(("many", "asked"), [(1, True), (12, True), (13, False)])
def test_a_few_elements_of_a_layer_may_vary_by_more_than_the_model_says(many: int, asked: bool, composite: bool) -> None:
    """Where few roundings steer a row, their own effects tell how far an element may be off; many elements are just wrong."""
    out, scaled = different(40, 48), torch.zeros(40, 48, dtype=torch.float64)
    places = [(2 * number, (16 * number + number) % 48) for number in range(many)]
    for row, column in places:
        scaled[row, column] = element_off(1.2, 40 * 48)
    value, variance = off_by(out, scaled)
    case = made_up(value, variance, composite=composite)
    more = {place: float(variance[place]) * (1.2 / 0.95) ** 2 for place in places}
    for explained in (more, {}):
        oracle = Told(case, [48.0] * 40, {}, explained)
        verdict = verdict_on(case, out, oracle)
        helped = bool(explained) and asked and composite
        looked_at = places if explained else places[:1]  # the first that is not explained is enough
        assert oracle.elements == (looked_at if asked and composite else [])
        assert verdict.share == pytest.approx(0.95 if helped else 1.2, rel=1e-6)
        assert [(finding.detector, finding.count) for finding in verdict.findings] == ([] if helped else [("element", many)])


@pytest.mark.parametrize(("share", "asked"), [(3.9, True), (4.1, False)])
def test_an_element_of_a_layer_that_is_far_off_is_wrong_whatever_steers_it(share: float, asked: bool) -> None:
    out, scaled = different(40, 48), torch.zeros(40, 48, dtype=torch.float64)
    out[3, 5], scaled[3, 5] = 1.703125, element_off(share, 40 * 48)
    value, variance = off_by(out, scaled)
    case = made_up(value, variance, composite=True)
    oracle = Told(case, [48.0] * 40, {}, {(3, 5): 1e3 * float(variance[3, 5])})
    verdict = verdict_on(case, out, oracle)
    assert (oracle.elements, "element" in detectors(verdict)) == ([(3, 5)] if asked else [], not asked)


def test_what_was_not_written_is_told_once_where_an_element_is_explained() -> None:
    out, scaled = different(40, 48), torch.zeros(40, 48, dtype=torch.float64)
    scaled[3, 5] = element_off(1.2, 40 * 48)
    value, variance = off_by(out, scaled)
    case, found = made_up(value, variance, composite=True), out.to(BF16)
    poison(found[20, 7:9])
    verdict = verdict_on(case, found, Told(case, [48.0] * 40, {}, {(3, 5): 1e3 * float(variance[3, 5])}))
    assert detectors(verdict) == ["unwritten"]


def test_one_element_that_is_explained_explains_no_other() -> None:
    out, scaled = different(40, 48), torch.zeros(40, 48, dtype=torch.float64)
    scaled[3, 5] = scaled[8, 40] = element_off(1.2, 40 * 48)
    value, variance = off_by(out, scaled)
    case = made_up(value, variance, composite=True)
    verdict = verdict_on(case, out, Told(case, [48.0] * 40, {}, {(3, 5): 1e3 * float(variance[3, 5])}))
    assert [(finding.detector, finding.index, finding.count) for finding in verdict.findings] == [("element", (8, 40), 1)]


# -- how many independent errors there are --------------------------------------------------------------------------------------


def independent(effects: torch.Tensor, deviations: torch.Tensor | None = None, rows: int = 2) -> tuple[torch.Tensor, Oracle]:
    """Per row, of outputs that bf16 roundings of ones move by ``effects [roundings, columns]``: what the judge counts."""
    value = torch.full((rows, effects.shape[1]), 1.5, dtype=torch.float64)
    variance = torch.zeros_like(value) if deviations is None else (deviations**2).expand_as(value).clone()

    def reference(arithmetic: Arithmetic) -> torch.Tensor:
        return arithmetic.round(rounded_each_its_own_way(rows, len(effects))) @ effects.float()

    case = made_up(value, variance, composite=True, reference=reference)
    oracle = Oracle(case)
    return oracle.independent_errors("out", case.stage.profiles[0]), oracle


def rounded_each_its_own_way(rows: int, columns: int) -> torch.Tensor:
    """Values of one exponent, no two alike."""
    return (1 + torch.arange(rows * columns) / (rows * columns)).view(rows, columns)


def in_groups(size: int, columns: int = 64) -> torch.Tensor:
    """Each rounding moves ``size`` columns by the same."""
    return torch.eye(columns // size).repeat_interleave(size, 1)


@pytest.mark.parametrize("size", [1, 2, 4, 64])
def test_errors_are_as_many_as_the_roundings_that_cause_them(size: int) -> None:
    found, oracle = independent(in_groups(size), rows=16)
    assert found.shape == (16,)
    # Eight random directions tell it to about a quarter, sixteen rows of them better.
    assert float(found.log().mean().exp()) == pytest.approx(64 // size, rel=0.3)
    tiles = [oracle.independent_in_tile("out", oracle.case.stage.profiles[0], row, slice(16, 32)) for row in range(16)]
    assert torch.tensor(tiles).log().mean().exp().item() == pytest.approx(max(1, 16 // size), rel=0.15)
    assert min(tiles) >= 1


def test_a_tile_may_hold_fewer_errors_than_its_row_has_room_for() -> None:
    effects = in_groups(1)
    effects[16:32, 16:32] = 0
    effects[16, 16:32] = 1
    found, oracle = independent(effects)
    profile = oracle.case.stage.profiles[0]
    assert bool((found > 5).all())
    assert oracle.independent_in_tile("out", profile, 1, slice(16, 32)) == pytest.approx(1, abs=0.2)
    assert oracle.independent_in_tile("out", profile, 1, slice(0, 16)) > 8


@pytest.mark.parametrize("shared", [False, True])
def test_columns_of_all_rows_hold_the_errors_of_each_or_the_same_ones(shared: bool) -> None:
    """Rows of sixteen errors, of which the columns asked for show eight."""
    value = torch.full((8, 64), 1.5, dtype=torch.float64)

    def reference(arithmetic: Arithmetic) -> torch.Tensor:
        return (arithmetic.round(rounded_each_its_own_way(1 if shared else 8, 16)) @ in_groups(4)).expand(8, 64)

    case = made_up(value, torch.zeros_like(value), composite=True, reference=reference)
    oracle, profile = Oracle(case), case.stage.profiles[0]
    found = [oracle.independent_in_all_rows("out", profile, columns) for columns in (slice(0, 32), slice(0, 64))]
    assert found == [pytest.approx(8 if shared else 64, rel=0.5), pytest.approx(16 if shared else 128, rel=0.5)]


@pytest.mark.parametrize("rows", [None, [3, 2, 1, 0]])
def test_whatever_is_asked_first_is_counted(rows: list[int] | None) -> None:
    """Four rows of 64, 16, 4 and one error, in order or in a cache that holds them backwards."""
    value = torch.full((4, 64), 1.5, dtype=torch.float64)
    effects = torch.stack([torch.cat([in_groups(size), torch.zeros(64 - 64 // size, 64)]) for size in (1, 4, 16, 64)])

    def reference(arithmetic: Arithmetic) -> torch.Tensor:
        found = torch.einsum("rk,rkc->rc", arithmetic.round(rounded_each_its_own_way(4, 64)), effects)
        return found if rows is None else found[rows]

    case = made_up(value, torch.zeros_like(value), composite=True, reference=reference)
    case = case if rows is None else in_rows(case, rows)
    profile = case.stage.profiles[0]
    for row, count in enumerate((64, 16, 4, 1)):
        assert Oracle(case).independent_in_row("out", profile, row) == pytest.approx(count, rel=0.4)
        tile = Oracle(case).independent_in_tile("out", profile, row, slice(16, 32))
        assert tile == pytest.approx(max(1, count // 4), rel=0.4)
        # Every rounding of a value from one to two moves a column of its row by one of its steps.
        assert Oracle(case).element_variance("out", profile, row, 5) == pytest.approx(2.0**-14 / 12, rel=1e-5)
    assert Oracle(case).independent_in_all_rows("out", profile, slice(0, 64)) > 5
    assert close_to(Oracle(case).independent_errors("out", profile), [64, 16, 4, 1])


def test_values_that_are_rounded_alike_are_one_error() -> None:
    value = torch.full((4, 64), 1.5, dtype=torch.float64)
    alike = made_up(
        value, torch.zeros_like(value), composite=True, reference=lambda arithmetic: arithmetic.round(torch.ones(4, 64))
    )
    oracle, profile = Oracle(alike), alike.stage.profiles[0]
    assert oracle.independent_in_tile("out", profile, 1, slice(16, 32)) == pytest.approx(1)
    assert oracle.independent_in_all_rows("out", profile, slice(0, 64)) < 1.2


def test_one_rounding_with_much_of_all_variance_makes_a_longer_tail_than_as_many_equal_ones() -> None:
    """Sixteen columns that one rounding moves by half of what they vary, and sixteen by one each."""
    effects = torch.cat([torch.eye(16), torch.ones(1, 16)])
    value = torch.full((1, 16), 1.5, dtype=torch.float64)

    def reference(arithmetic: Arithmetic) -> torch.Tensor:
        return arithmetic.round(rounded_each_its_own_way(1, 17)) @ effects

    case = made_up(value, torch.zeros_like(value), composite=True, reference=reference)
    found = Oracle(case).independent_in_tile("out", case.stage.profiles[0], 0, slice(0, 16))
    # Parts of the variance: 17 / 32 of the one that all share, and 1 / 32 fifteen times over.
    parts = torch.tensor([17 / 32, *[1 / 32] * 15], dtype=torch.float64)
    assert found < 0.9 / float(parts.square().sum())
    # As many samples of the mean square lie beyond its limit as of a Gaussian beyond so many deviations, or fewer.
    drawn = torch.randn(2_000_000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square() @ parts
    for sigmas in (2.5, 3.5, 4.0):
        counted = sensitivity._matching_degrees_of_freedom(float(parts.square().sum()), float((parts**3).sum()), sigmas)
        limit = sensitivity.chi_square_mean(counted, sigmas)
        assert float((drawn > limit).double().mean()) < 1.5 * 0.5 * math.erfc(sigmas / math.sqrt(2))
        assert float((drawn > 0.85 * limit).double().mean()) > 0.5 * math.erfc(sigmas / math.sqrt(2))


@pytest.mark.parametrize("count", [1, 2, 7.5, 100])
def test_equal_errors_reach_as_far_as_so_many_of_them(count: float) -> None:
    assert sensitivity._matching_degrees_of_freedom(1 / count, 1 / count**2, 5.5) == pytest.approx(count)


def test_the_rows_of_every_layer_are_counted() -> None:
    """Two layers of three tokens of a cache, by layer and token."""
    groups = [1, 64, 8, 64, 8, 1]
    value = torch.full((6, 64), 1.5, dtype=torch.float64)
    effects = torch.stack([torch.cat([in_groups(size), torch.zeros(64 - 64 // size, 64)]) for size in groups])

    def reference(arithmetic: Arithmetic) -> torch.Tensor:
        of_tokens = arithmetic.round(torch.ones(3, 2, 64))
        return torch.einsum("tlk,ltkc->ltc", of_tokens, effects.view(2, 3, 64, 64)).reshape(6, 64)

    case = made_up(value, torch.zeros_like(value), composite=True, reference=reference, sequences=[0, 1, 2])
    assert close_to(Oracle(case).independent_errors("out", case.stage.profiles[0]), [64, 1, 8, 1, 8, 64])


def test_an_error_counts_by_how_far_the_element_may_be_off() -> None:
    """One rounding moves half of the columns by much; but what is uncertain by more still is hardly moved by it."""
    effects = torch.cat([in_groups(1, 32), torch.zeros(32, 32)], 1)
    effects[0, 32:] = 3.0
    deviations = torch.cat([torch.zeros(32), torch.full((32,), 10.0)]).double()
    certain, _ = independent(effects, rows=16)
    found, _ = independent(effects, deviations, rows=16)
    assert float(certain.log().mean().exp()) < 2
    assert float(found.log().mean().exp()) == pytest.approx(32, rel=0.2)


def test_how_many_errors_there_are_does_not_depend_on_their_size() -> None:
    plain, _ = independent(in_groups(2))
    small, _ = independent(in_groups(2), torch.full((64,), 1e3).double())
    assert torch.allclose(plain, small, rtol=1e-5)


@pytest.mark.parametrize("rows", [None, [2, 0, 3, 1]])
def test_an_element_varies_by_the_roundings_that_reach_it(rows: list[int] | None) -> None:
    effects = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    value = torch.full((4, 30), 1.5, dtype=torch.float64)

    def reference(arithmetic: Arithmetic) -> torch.Tensor:
        unused = arithmetic.round(torch.ones(4, 3))
        assert unused.shape == (4, 3)
        return arithmetic.round(2 * torch.ones(4, 20)) @ effects * torch.arange(1.0, 5.0).unsqueeze(1)

    case = made_up(value, torch.ones_like(value), composite=True, reference=reference)
    oracle = Oracle(case if rows is None else in_rows(case, rows))
    for row, column in ((0, 0), (1, 7), (3, 29)):
        factor = 1 + (row if rows is None else rows[row])
        # A step of bf16 at 2 is 2**-6.
        expected = float(effects[:, column].double().square().sum()) * factor**2 * 2.0**-12 / 12
        assert oracle.element_variance("out", case.stage.profiles[0], row, column) == pytest.approx(expected, rel=1e-5)


def test_counting_errors_neither_uses_nor_changes_the_global_random_numbers() -> None:
    """The same run gets the same verdict, whatever was drawn before."""
    counts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        found, oracle = independent(in_groups(2))
        tile = oracle.independent_in_tile("out", oracle.case.stage.profiles[0], 1, slice(16, 32))
        assert torch.equal(torch.random.get_rng_state(), state)
        counts.append([*found.tolist(), tile])
    assert counts[0] == counts[1]


def of_tokens(groups: list[int], sequences: list[int], owned: dict[int, float], heads: int = 0) -> torch.Tensor:
    """Errors per row of tokens whose roundings move so many columns each; some sequences have one of their own that moves all.

    Sequences take turns at their own roundings in the order of ``owned``.
    """
    effects = torch.stack([torch.cat([in_groups(size), torch.zeros(64 - 64 // size, 64)]) for size in groups])
    of_row = torch.tensor(sequences).repeat_interleave(max(1, heads))

    def reference(arithmetic: Arithmetic) -> torch.Tensor:
        shared = arithmetic.round(torch.ones(len(sequences), len(groups) // len(sequences) * 64))
        result = torch.einsum("rk,rkc->rc", shared.reshape(len(groups), 64), effects)
        for sequence, size in owned.items():
            own = arithmetic.optional(torch.ones(1), "owned", torch.tensor([sequence]))
            result = result + size * own * (of_row == sequence).unsqueeze(1)
        return result

    value = torch.full((len(groups), 64), 1.5, dtype=torch.float64)
    case = made_up(value, torch.zeros_like(value), composite=True, reference=reference, sequences=sequences, heads=heads)
    return Oracle(case).independent_errors("out", case.stage.profiles[0])


def close_to(found: torch.Tensor, expected: list[float]) -> bool:
    """Within a factor of two: a row's count is told to a quarter or so."""
    ratio = found / torch.tensor(expected)
    return bool(((ratio > 0.5) & (ratio < 2)).all())


@pytest.mark.parametrize("sequences", [[0, 0, 0, 1, 1, 2], [2, 2, 0, 1, 1, 1], [1, 0, 2, 1, 0, 1]])
def test_tokens_of_a_sequence_are_counted_each_by_itself(sequences: list[int]) -> None:
    """A row of every sequence at a time; those of one sequence must not be mixed."""
    assert close_to(of_tokens([1, 64, 8, 64, 1, 8], sequences, {}), [64, 1, 8, 1, 64, 8])


@pytest.mark.parametrize("owned", [{0: 8.0, 1: 0.0}, {1: 0.0, 0: 8.0}, {1: 8.0, 0: 0.0}, {0: 0.0, 1: 8.0}])
def test_a_rounding_of_one_sequence_is_shared_by_its_rows_alone(owned: dict[int, float]) -> None:
    sequences = [0, 0, 0, 1, 1, 1, 1]
    shared = {sequence for sequence, size in owned.items() if size}
    expected = [1.0 if sequence in shared else 64.0 for sequence in sequences]
    assert close_to(of_tokens([1] * 7, sequences, owned), expected)


def test_cache_rows_stand_by_token_and_head() -> None:
    assert close_to(of_tokens([1, 64, 64, 1, 8, 1], [0, 1, 2], {}, heads=2), [64, 1, 1, 64, 8, 64])


# -- findings say where and what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("causes", "told"), [([], ""), (["one"], ". Likely cause: one"), (["one", "two"], ". Likely cause: one; two")]
)
def test_the_causes_are_told_with_the_first_finding_and_no_finding_is_lost(causes: list[str], told: str) -> None:
    out, scaled = different(), alternating(2.0)
    scaled[0, 0] = 20.0
    value, variance = off_by(out, scaled)
    found = out.to(BF16)
    found[4, 7] = math.nan
    plain, verdict = (verdict_on(made_up(value, variance, causes=given), found) for given in (None, causes))
    assert detectors(verdict) == detectors(plain) == ["not_finite", "element", "spread"]
    assert verdict.findings[0].message == plain.findings[0].message + told
    assert verdict.findings[1:] == plain.findings[1:]


def test_a_run_that_failed_somewhere_unknown_is_told_without_a_place(norm_case: Case) -> None:
    assert judge(norm_case, Outcome("crashed", message="what happened")).findings[0].message == "what happened"


def test_the_first_guilty_pass_is_told() -> None:
    def differs(compiler_pass: str, count: int) -> PassDifference:
        return PassDifference(compiler_pass, "f", "y", "", 1.0, count, 10, f"{compiler_pass} changed {count}")

    case = make_case(CaseKey.parse("rms_norm:tiny:B=2:normal:1"))
    found: list[Finding] = []
    for passes in (["Pass_05"], ["Pass_07", "Pass_05", "Pass_07", "Pass_09", "Pass_05"]):
        differences = tuple(differs(name, number + 1) for number, name in enumerate(passes))
        outcome = Outcome("ok", outputs=perfect(case), pass_differences=differences, passes_compared=33)
        found += judge(case, outcome).findings
    assert [(finding.detector, finding.count, finding.total) for finding in found] == [
        ("compiler_pass", 1, 10),
        ("compiler_pass", 2, 10),
    ]
    assert found[0].message == "Pass_05 changed 1. It is the first pass that differs; 1 of 33 results compared differ"
    assert (
        found[1].message
        == "Pass_05 changed 2. It is the first pass that differs; 5 of 33 results compared differ, in 2 later passes too"
    )


def test_changed_inputs_and_guards_are_told_by_argument(norm_case: Case) -> None:
    outcome = Outcome("ok", outputs=perfect(norm_case), changed_inputs={"x": 2}, guard_damage={"out": "1 elements past the end"})
    changed, damaged = judge(norm_case, outcome).findings
    assert changed == Finding("changed_input", "the kernel changed its input x in 2 elements; inputs are read-only", "x", count=2)
    assert damaged == Finding("out_of_bounds", "the kernel wrote outside the memory of out: 1 elements past the end", "out")


@pytest.mark.parametrize(
    ("location", "told"), [("mine.py:7", "out[0] is read unwritten (mine.py:7)"), (None, "out[0] is read unwritten")]
)
def test_a_read_of_what_nobody_wrote_is_told_with_its_place_in_the_kernel(
    norm_case: Case, location: str | None, told: str
) -> None:
    unwritten = UnwrittenRead("out", "out[0] is read unwritten", location, 3, 70)
    verdict = judge(norm_case, Outcome("ok", outputs=perfect(norm_case), unwritten_reads=(unwritten,)))
    assert verdict.findings == (Finding("unwritten_read", told, "out", count=3, total=70),)


def test_rows_that_had_to_keep_their_contents_are_counted_and_the_first_is_named(cache_case: Case) -> None:
    outputs, dims = perfect(cache_case), cache_case.dims
    before = cache_case.inputs["v_cache"]
    finite = [row for row in range(len(before)) if same_bits(outputs["v_cache"][row], before[row])]
    bits(outputs["v_cache"])[finite[9], 5] ^= 1
    bits(outputs["v_cache"])[finite[7], 11:13] ^= 1
    (finding,) = judged(cache_case, outputs).findings
    slot, offset = divmod(finite[7], dims.BS)
    page, head = divmod(slot, dims.NKV)
    where = {"layer": 0, "page": page, "kv_head": head, "offset": offset, "lane": 11}
    assert (finding.detector, finding.argument, finding.index) == ("out_of_bounds", "v_cache", (finite[7], 11))
    assert (finding.where, finding.count, finding.total) == (where, 2, len(before))
    assert finding.message == (
        f"the kernel changed 2 of {len(before)} rows of v_cache that it must not touch, the first at "
        f"layer 0, page {page}, kv head {head}, offset {offset}, lane 11"
    )


# -- which profile explains a run -----------------------------------------------------------------------------------------------


def one_of(shares: dict[str, list[float]], out: torch.Tensor) -> Case:
    """A case of a stage whose profiles leave the first elements of the rows of ``out`` at these shares of their allowance."""
    errors = {}
    for name, of_rows in shares.items():
        errors[name] = torch.zeros_like(out)
        for row, share in enumerate(of_rows):
            errors[name][row, 0] = element_off(share, out.numel())
    return explained_by(errors, out)


def explained_by(errors: dict[str, torch.Tensor], out: torch.Tensor, lanes: int = 0) -> Case:
    """A case of a stage whose profiles leave ``out`` so many deviations off, each element."""
    case = made_up(out, torch.ones_like(out), lanes=lanes)
    estimates = {}
    for name, scaled in errors.items():
        value, variance = off_by(out, scaled)
        estimates[name] = {"out": Bounds(value, variance, torch.full_like(value, math.inf))}
    stage = dataclasses.replace(
        case.stage,
        profiles=tuple(Profile(name) for name in errors),
        error_model=lambda inputs, dims, profile: estimates[profile.name],
    )
    return dataclasses.replace(case, stage=stage)


#: From the worst explanation to the best: two kinds of finding, one element more, a larger share of one element.
EXPLANATIONS = {"two findings": [3.0], "two elements": [1.05, 1.05], "far off": [1.2], "a little off": [1.1]}


@pytest.mark.parametrize("order", list(itertools.permutations(EXPLANATIONS, 3)), ids=", ".join)
def test_findings_are_those_of_the_profile_that_explains_most(order: tuple[str, ...]) -> None:
    out = different()
    verdict = verdict_on(one_of({name: EXPLANATIONS[name] for name in order}, out), out)
    expected = max(order, key=list(EXPLANATIONS).index)
    assert verdict.profile == expected
    assert verdict.share == pytest.approx(EXPLANATIONS[expected][0], rel=1e-6)
    assert verdict.shares == {"out": verdict.share}
    assert detectors(verdict) == ["element"]
    assert verdict.findings[0].count == len(EXPLANATIONS[expected])


@pytest.mark.parametrize("kind", ["spread", "bias", "heads"])
@pytest.mark.parametrize("first", ["element", "other"])
def test_of_one_finding_each_the_smaller_share_explains_more(kind: str, first: str) -> None:
    """Whatever its kind: a tensor that is off counts as one element that is."""
    out = different()
    for element, other in ((1.1, 1.2), (1.2, 1.1)):
        errors = {"element": torch.zeros_like(out), "other": alternating(math.sqrt(other * spread_allows(200)))}
        errors["element"][0, 0] = element_off(element)
        if kind == "bias":
            errors["other"] = torch.sign(out) * other * bias_allows(200, 200) / 200
        elif kind == "heads":
            errors["other"] = leaning(out, heads_lean(other * spread_allows(ROWS * HEADS)))
        case = explained_by({name: errors[name] for name in sorted(errors, key=lambda name: name != first)}, out, LANES)
        outcome = Outcome("ok", outputs={"out": out.to(BF16)})
        verdict = judge(case, outcome)
        assert verdict.profile == ("element" if element < other else "other")
        assert [len(judge(case, outcome, profile=name).findings) for name in errors] == [1, 1]


@pytest.mark.parametrize("kind", ["spread", "bias", "heads"])
@pytest.mark.parametrize("first", ["one", "two"])
def test_of_two_findings_each_the_fewer_wrong_elements_explain_more(kind: str, first: str) -> None:
    """One that is far off beside a tensor that is off, and two that are less."""
    out = different()
    base = {
        "spread": alternating(math.sqrt(1.1 * spread_allows(200))),
        "bias": torch.sign(out) * 1.1 * bias_allows(200, 200) / 200,
        "heads": leaning(out, heads_lean(1.1 * spread_allows(ROWS * HEADS))),
    }[kind]
    errors = {"one": base.clone(), "two": base.clone()}
    errors["one"][0, 0] = element_off(1.2)
    errors["two"][0, 0] = errors["two"][2, 20] = element_off(1.05)
    case = explained_by(
        {name: errors[name] for name in sorted(errors, key=lambda name: name != first)}, out, LANES * (kind == "heads")
    )
    outcome = Outcome("ok", outputs={"out": out.to(BF16)})
    assert judge(case, outcome).profile == "one"
    for name in errors:
        found = detectors(judge(case, outcome, profile=name))
        assert found == ["element", kind if kind == "spread" else "bias"]


@pytest.mark.parametrize("first", ["one each", "three"])
def test_the_wrong_elements_of_all_outputs_count(first: str) -> None:
    out = different()
    errors = {"one each": ([1.2], [1.2]), "three": ([1.1, 1.1], [1.1])}
    errors = {name: errors[name] for name in sorted(errors, key=lambda name: name != first)}
    case, another = (one_of({name: both[number] for name, both in errors.items()}, out) for number in (0, 1))
    outputs = {"out": out.to(BF16), "other": out.to(BF16)}
    assert judge(with_another(case, another), Outcome("ok", outputs=outputs)).profile == "one each"


def test_of_explanations_that_are_alike_the_first_is_told() -> None:
    out = different()
    verdict = verdict_on(one_of({"a": [1.2], "b": [1.2], "c": [1.2]}, out), out)
    assert (verdict.profile, verdict.ok) == ("a", False)


def test_two_kinds_of_finding_are_a_worse_explanation() -> None:
    out = different()
    assert detectors(verdict_on(one_of({"only": EXPLANATIONS["two findings"]}, out), out)) == ["element", "spread"]


def test_the_first_profile_that_explains_a_run_is_told() -> None:
    out = different()
    case = one_of({"no": [1.1], "yes": [0.9], "better": [0.5]}, out)
    verdict = verdict_on(case, out)
    assert (verdict.ok, verdict.profile) == (True, "yes")
    assert verdict.share == pytest.approx(0.9, rel=1e-6)
    outcome = Outcome("ok", outputs={"out": out.to(BF16)})
    declared = judge(case, outcome, profile="better")
    assert (declared.ok, declared.profile) == (True, "better")
    assert declared.share == pytest.approx(0.5, rel=1e-6)
    assert detectors(judge(case, outcome, profile="no")) == ["element"]


def test_an_oracle_computes_what_a_profile_allows_once() -> None:
    out, asked = different(), []
    case = one_of({"a": [0.1], "b": [0.2]}, out)
    model = case.stage.error_model

    def counted(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
        asked.append(profile.name)
        return model(inputs, dims, profile)

    case = dataclasses.replace(case, stage=dataclasses.replace(case.stage, error_model=counted))
    oracle = Oracle(case)
    for _ in range(2):
        assert verdict_on(case, out, oracle).ok
        assert judge(case, Outcome("ok", outputs={"out": out.to(BF16)}), profile="b", oracle=oracle).profile == "b"
    assert asked == ["a", "b"]


def test_a_run_that_only_compiled_has_findings_and_no_share(norm_case: Case) -> None:
    assert judge(norm_case, Outcome("ok", executed=False)) == Verdict()
    verdict = judge(norm_case, Outcome("ok", executed=False, changed_inputs={"x": 1}, guard_damage={"out": "before"}))
    assert (detectors(verdict), verdict.share, verdict.profile) == (["changed_input", "out_of_bounds"], None, None)


def test_a_run_that_ended_well_and_left_an_output_out_is_no_pass(cache_case: Case) -> None:
    outputs = dict(perfect(cache_case))
    for name in list(outputs):
        del outputs[name]
        verdict = judge(cache_case, Outcome("ok", outputs=dict(outputs)))
        assert detectors(verdict)[0] == "unwritten"
        assert name in {finding.argument for finding in verdict.findings}


def test_a_lane_that_cannot_run_is_no_verdict(norm_case: Case) -> None:
    with pytest.raises(UnavailableError, match=r"^the lane cannot run here: no card$"):
        judge(norm_case, Outcome("unavailable", message="no card"))


@pytest.mark.parametrize("gradients", [True, False])
def test_the_callers_settings_are_as_before_and_do_not_matter(gradients: bool, norm_case: Case) -> None:
    """An unavailable lane raises: also then."""
    case = make_case(CaseKey.parse(f"{PREFILL}:normal:2"))
    outputs = rounded_everywhere(case)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode(not gradients):
            assert judged(case, outputs).ok
            with pytest.raises(UnavailableError):
                judge(norm_case, Outcome("unavailable"))
            assert torch.is_grad_enabled() == gradients
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("allowed", "used"), [(True, "outside the legal "), (False, "must be exactly ")])
def test_an_element_is_told_with_both_values_and_what_it_uses(allowed: bool, used: str) -> None:
    out, scaled = different(), torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    out[3, 2] = -1.5
    scaled[3, 2] = element_off(1.2)
    value, variance = off_by(out, scaled)
    limit = torch.full_like(value, math.inf)
    if not allowed:
        limit[3, 2] = 0.0
    verdict = verdict_on(made_up(value, variance, worst=limit), out)
    (finding,) = verdict.findings
    ulps = float(scaled[3, 2]) * math.sqrt(13 / 12)
    assert finding.message.startswith(f"out[3, 2] is -1.5, {used}")
    assert finding.message.endswith(f"{ulps:.3g} ulp away{')' if allowed else ''}; 1 of 200 elements, in 1 of 5 rows")
    if allowed:
        # The interval is what an element may hold, its last rounding included: how far beyond it the value lies, in its ULPs.
        told = re.search(r"legal (\S+)\.\.(\S+) by (\S+) ulp \(expected (\S+),", finding.message)
        assert told is not None
        low, high, outside, expected = map(float, told.groups())
        half = 0.5 * float(spacing(torch.tensor(1.5, dtype=torch.float64), torch.bfloat16))
        assert low < expected < high
        assert (high - low) / 2 == pytest.approx(abs(-1.5 - float(value[3, 2])) - outside * 2 * half, rel=1e-3)
        assert (high - low) / 2 > half
    assert (finding.detector, finding.argument, finding.index) == ("element", "out", (3, 2))
    assert (finding.where, finding.count, finding.total) == ({"row": 3, "kv_head": 0, "column": 2}, 1, 200)
    assert finding.ulps == pytest.approx(ulps, rel=1e-6)
    assert finding.share == (pytest.approx(1.2, rel=1e-6) if allowed else math.inf)


@pytest.mark.parametrize(
    ("dtype", "off", "allowed", "told"),
    [
        (torch.float32, 900, 9.5, r"by 890 ulp \(expected 1\.5, 900 ulp away\)"),
        # 131072 ULPs of fp32 say nothing, two of bf16 do.
        (torch.float32, 131072, 99.5, r"by 2 bf16 ulp \(expected 1\.5, 2 bf16 ulp away\)"),
        (torch.float32, 131072, 65535.5, r"by 1 bf16 ulp \(expected 1\.5, 2 bf16 ulp away\)"),
        # Where many are legal, neither does.
        (torch.float32, 1000, 499.5, r"by 1 times the legal distance \(expected 1\.5, 2 times the legal distance away\)"),
        (torch.float32, 2**22, 2**21, r"by 1 times the legal distance \(expected 1\.5, 2 times the legal distance away\)"),
        (BF16, 12, 4, r"by 7\.5 ulp \(expected 1\.5, 12 ulp away\)"),
        (BF16, 60, 29.5, r"by 1 times the legal distance \(expected 1\.5, 2 times the legal distance away\)"),
    ],
)
def test_errors_are_counted_in_units_that_say_something(dtype: torch.dtype, off: int, allowed: float, told: str) -> None:
    value = torch.linspace(1.01, 1.99, 200, dtype=torch.float64).reshape(5, 40)
    value[2, 7] = 1.5
    ulp = float(spacing(value[2, 7], dtype))
    out = value.clone()
    out[2, 7] -= off * ulp
    case = made_up(value, torch.full_like(value, 1e9), worst=torch.full_like(value, allowed * ulp), dtype=dtype)
    finding = verdict_on(case, out).findings[0]
    assert (finding.detector, finding.index) == ("element", (2, 7))
    assert re.search(told, finding.message), finding.message
    assert finding.ulps == (None if "bf16" in told or "distance" in told else off)


@pytest.mark.parametrize(("found", "told"), [(1.75, "1.625"), (1.625, "1.5")])
def test_the_exact_value_that_is_told_is_that_of_the_nearest_profile(found: float, told: str) -> None:
    """Where it is wrong under that one too: the one that explains the rest best may mean another value there."""
    out = torch.linspace(1.01, 1.99, 200, dtype=torch.float64).reshape(5, 40)
    out[2, 7] = found
    best, nearest = out.clone(), out + 0.25
    best[2, 7], nearest[2, 7] = 1.5, 1.625
    case = made_up(best, torch.full_like(best, 1e-12), dtype=torch.float32)
    bounds = {
        name: Bounds(value, torch.full_like(value, 1e-12), torch.full_like(value, math.inf))
        for name, value in (("best", best), ("nearest", nearest))
    }
    stage = dataclasses.replace(
        case.stage,
        profiles=tuple(Profile(name) for name in bounds),
        error_model=lambda inputs, dims, profile: {"out": bounds[profile.name]},
    )
    verdict = verdict_on(dataclasses.replace(case, stage=stage), out)
    assert verdict.profile == "best"
    assert f"(expected {told}, " in verdict.findings[0].message


@pytest.mark.parametrize(("element", "spread", "bias"), [(0.5, 0.4, 0.3), (0.4, 0.7, 0.3), (0.3, 0.4, 0.9)])
def test_the_share_of_a_run_is_the_largest_of_its_tests(element: float, spread: float, bias: float) -> None:
    out = different()
    lean = bias * bias_allows(160, 200) / 160  # of all rows but one, so that no row leans by as much
    scaled = alternating(math.sqrt(spread * spread_allows(200) - lean**2)) + lean * torch.sign(out)
    scaled[0] = alternating(math.sqrt(spread * spread_allows(200)))[0]
    scaled[0, 0] = element_off(element)
    verdict = verdict_on(made_up(*off_by(out, scaled)), out)
    assert verdict.ok
    assert verdict.share == pytest.approx(max(element, spread, bias), rel=0.1)


PATTERNS = {
    "all 200 elements": [(row, column) for row in range(5) for column in range(40)],
    "5 of 200 elements: every row, columns 7": [(row, 7) for row in range(5)],
    "10 of 200 elements: every row, columns 7..8": [(row, column) for row in range(5) for column in (7, 8)],
    "40 of 200 elements: rows 3": [(3, column) for column in range(40)],
    "120 of 200 elements: rows 0..1, 3": [(row, column) for row in (0, 1, 3) for column in range(40)],
    "4 of 200 elements: rows 2, columns 1, 3, 5, 7": [(2, column) for column in (1, 3, 5, 7)],
    "6 of 200 elements: rows 2, columns 1, 3, 5, 7 and 2 more": [(2, column) for column in (1, 3, 5, 7, 9, 11)],
    "1 of 200 elements, in 1 of 5 rows": [(4, 39)],
    "3 of 200 elements, in 2 of 5 rows": [(0, 0), (0, 1), (4, 0)],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_was_not_written_is_told_by_its_shape(pattern: str) -> None:
    out = different().to(BF16)
    for row, column in PATTERNS[pattern]:
        poison(out[row, column : column + 1])
    case = made_up(out.double().nan_to_num(1.0), torch.ones(ROWS, COLUMNS, dtype=torch.float64))
    (finding,) = verdict_on(case, out).findings
    row, column = PATTERNS[pattern][0]
    place = f"row {row}, kv head 0, column {column}"
    assert finding.message == f"out {UNWRITTEN}: {pattern}, the first at out[{row}, {column}] ({place})"
    assert (finding.detector, finding.index) == ("unwritten", (row, column))
    assert (finding.count, finding.total) == (len(PATTERNS[pattern]), 200)


def test_a_single_row_has_no_pattern_of_rows() -> None:
    out = different(1).to(BF16)
    poison(out[0, 3:4])
    poison(out[0, 9:10])
    case = made_up(different(1), torch.ones(1, COLUMNS, dtype=torch.float64))
    message = verdict_on(case, out).findings[0].message
    assert message.startswith(f"out {UNWRITTEN}: 2 of 40 elements: every row, columns 3, 9, ")
    out[0, 9] = 1.0
    assert "before the run): 1 of 40 elements, the first at " in verdict_on(case, out).findings[0].message
    two = different(2).to(BF16)
    poison(two[1, 3:4])
    case = made_up(different(2), torch.ones(2, COLUMNS, dtype=torch.float64))
    assert "before the run): 1 of 80 elements, in 1 of 2 rows, the first at " in verdict_on(case, two).findings[0].message


def test_an_output_that_was_not_written_at_all_has_no_share(projection_case: Case) -> None:
    outputs = perfect(projection_case)
    poison(outputs["k"])
    verdict = judged(projection_case, outputs)
    assert detectors(verdict) == ["unwritten"]
    assert sorted(verdict.shares) == ["q", "v"]


def test_one_output_in_one_word_and_the_others_by_their_elements(projection_case: Case) -> None:
    outputs = perfect(projection_case)
    outputs["q"].zero_()
    outputs["k"][1, 5] = 1e3
    outputs["k"][0, 7] = math.nan
    verdict = judged(projection_case, outputs)
    assert [(finding.detector, finding.argument) for finding in verdict.findings] == [
        ("all_zeros", "q"),
        ("not_finite", "k"),
        ("element", "k"),
    ]
    size = outputs["q"].numel()
    assert verdict.findings[0] == Finding(
        "all_zeros", "every element of q is zero; the exact result is not", "q", count=size, total=size
    )


def test_a_copy_is_told_with_its_extent(norm_case: Case) -> None:
    (finding,) = judged(norm_case, {"out": norm_case.inputs["x"].clone()}).findings
    assert finding == Finding(
        "echo", "out equals the input x in every element; the exact result does not", "out", count=5 * 256, total=5 * 256
    )
    almost = norm_case.inputs["x"].clone()
    almost[4, 255] += 1
    assert "echo" not in detectors(judged(norm_case, {"out": almost}))


@pytest.mark.parametrize(("columns", "told"), [(1, "element"), (2, "echo")])
def test_one_number_that_is_equal_is_no_copy(columns: int, told: str) -> None:
    value = torch.full((1, columns), 2.0, dtype=torch.float64)
    case = made_up(value, torch.zeros_like(value), worst=torch.zeros_like(value))
    arguments = (read("x", "B*NKV V", BF16), *case.stage.arguments)
    copied = torch.full((1, columns), 3.0, dtype=BF16)
    case = dataclasses.replace(case, stage=dataclasses.replace(case.stage, arguments=arguments), inputs={"x": copied})
    assert detectors(verdict_on(case, copied)) == [told]


def test_all_rows_of_an_output_that_is_updated_in_place_may_have_to_be_written() -> None:
    value = different()
    case = made_up(value, torch.zeros_like(value), worst=torch.zeros_like(value))
    before = torch.ones(ROWS, COLUMNS, dtype=BF16)
    argument = dataclasses.replace(case.stage.arguments[0], access="io")
    case = dataclasses.replace(case, stage=dataclasses.replace(case.stage, arguments=(argument,)), inputs={"out": before})
    outputs = value.clone()
    outputs[3] = 1.0
    assert ("stale_row", (3, 0)) in [(one.detector, one.index) for one in verdict_on(case, outputs).findings]


def test_a_cache_row_that_already_held_its_new_contents_is_not_stale(cache_case: Case) -> None:
    outputs = perfect(cache_case)
    rows = Oracle(cache_case).bounds(cache_case.stage.profiles[0])["k_cache"].rows
    assert rows is not None
    cache_case.inputs["k_cache"][rows[2]] = outputs["k_cache"][rows[2]]
    assert judged(cache_case, outputs).ok
    outputs["k_cache"][rows[1]] = cache_case.inputs["k_cache"][rows[1]]
    (finding,) = judged(cache_case, outputs).findings
    width, total = cache_case.dims.D, len(rows) * cache_case.dims.D
    assert (finding.detector, finding.index, finding.count, finding.total) == ("stale_row", (int(rows[1]), 0), width, total)
    assert finding.message.startswith(
        f"k_cache has rows that the call must write and that still hold their old contents: {width} of {total} elements: "
        f"rows {int(rows[1])}, the first"
    )


def test_an_infinity_that_the_oracle_has_is_agreement_in_fp32_too() -> None:
    value = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]], dtype=torch.float64)
    case = made_up(value, torch.ones_like(value), dtype=torch.float32)
    assert verdict_on(case, value).ok
    for place, wrong in ((0, -math.inf), (1, math.nan), (2, math.inf), (3, math.nan), (3, math.inf)):
        what = "NaN" if math.isnan(wrong) else "infinite"
        found = value.clone()
        found[0, place] = wrong
        (finding,) = verdict_on(case, found).findings
        assert (finding.detector, finding.index, finding.count) == ("not_finite", (0, place), 1)
        assert finding.message.startswith(f"out is {what} where the exact result is finite: 1 of 4 elements, the first at ")
