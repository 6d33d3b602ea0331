"""The judge: each detector on one element more and one less, buffers that tell what was done to them, and messages."""

from __future__ import annotations

import math

import pytest
import torch

import conformance
from conformance.arithmetic import CONTRACT, Arithmetic
from conformance.buffers import GUARD_ALIGNMENT, GUARD_BYTES, Guarded, bits, poison, poisoned, same_bits
from conformance.cases import Case, CaseKey, make_case
from conformance.errors import UsageError
from conformance.executors.base import Outcome, PassDifference
from conformance.judge import Oracle, judge, kappa, spread_limit
from conformance.verdict import DETECTORS, Finding, Verdict, worst_first

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
    guarded = Guarded.of(shape, dtype)
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
    guarded = Guarded.of((3, 5), dtype)
    beyond = guarded.tensor.as_strided((1,), (1,), guarded.tensor.storage_offset() + 15 + distance - 1)
    beyond.fill_(0)
    assert guarded.damage() == f"1 elements past the end, the nearest {distance} past it"
    guarded = Guarded.of((3, 5), dtype)
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
    assert "only repeats x" in verdict.findings[0].message


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


@pytest.mark.parametrize(("added", "many"), [(1, False), (-500, False), (1, True)])
def test_a_wrong_integer_is_an_element_with_its_place_and_both_values(sample_case: Case, added: int, many: bool) -> None:
    outputs = perfect(sample_case)
    expected = outputs["token_ids"].tolist()
    outputs["token_ids"][2 if not many else slice(None)] += added
    verdict = judged(sample_case, outputs)
    assert detectors(verdict) == ["element"]
    (finding,) = verdict.findings
    row = 0 if many else 2
    extent = "all 4 elements" if many else "1 of 4 elements"
    assert finding.message == f"token_ids[{row}] is {expected[row] + added}, expected {expected[row]}; {extent}"
    assert (finding.argument, finding.index, finding.where) == ("token_ids", (row,), {"row": row})
    assert (finding.count, finding.total, finding.share) == (4 if many else 1, 4, math.inf)
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
    assert finding.message == "token_ids was not written: 1 of 4 elements, the first at token_ids[3] (row 3)"
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
    assert "Cause: the cache rows are right" in judged(case, outputs).findings[0].message
    assert conformance.stages()["decode_layer"].localise is not None


# -- several tokens a sequence --------------------------------------------------------------------------------------------------


class EveryRounding(Arithmetic):
    """A legal kernel that makes every optional rounding."""

    def optional(self, tensor: torch.Tensor, name: str, sequence: int | None = None) -> torch.Tensor:
        return self.round(tensor)


PREFILL = "prefill_layer:tiny:B=2,NH=2,NKV=1,D=32,I=64,S=40,NB=8,seq_lens=20+33,chunk_lens=6+4"


def rounded_everywhere(case: Case) -> dict[str, torch.Tensor]:
    results = case.stage.reference(case.inputs, case.dims, EveryRounding(torch.float32, rounds=True))
    return {argument.name: results[argument.name].to(argument.dtype) for argument in case.stage.outputs}


@pytest.mark.parametrize("end", ["normal:2", "small:14", "needle:22"])
def test_errors_that_a_tokens_roundings_share_do_not_reject_a_prefill(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the errors of a row independent of one another, these would be too large together."""
    case = make_case(CaseKey.parse(f"{PREFILL}:{end}"))
    outputs = rounded_everywhere(case)
    assert judged(case, outputs).ok
    monkeypatch.setattr(Oracle, "independent_errors", lambda self, argument, profile: torch.tensor(math.inf))
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
