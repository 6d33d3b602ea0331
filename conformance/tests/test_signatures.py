"""Mistakes inside a layer that no element shows are told by what they add to all outputs; legal kernels are taken for none."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import conformance
from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey, take_rows
from conformance.cases.space import Space, stratified_keys
from conformance.contract.dims import Dims
from conformance.judge.judgement import judge
from conformance.judge.limits import SIGNATURE_SIGMAS
from conformance.judge.matched_filters import Filter, _sequence_of_judged_rows, filters, signatures
from conformance.judge.oracle import Oracle
from conformance.judge.sensitivity import TOGETHER, Sensitivity
from conformance.judge.signatures import judge_together
from conformance.judge.verdict import FilterResponse, Finding, Verdict
from conformance.kernels.qwen3.exam.torch.choices import HUGGING_FACE_LIKE, Choices
from conformance.kernels.qwen3.exam.torch.kernels import torch_kernel
from conformance.lanes.base import Outcome
from conformance.lanes.eager import run_eager
from conformance.numerics.arithmetic import CONTRACT, EXACT, Arithmetic, ErrorSites, RoundingSites
from conformance.numerics.ulp import rounded, spacing
from conformance.running.check import pooled_run
from conformance.running.runs import Judged

BF16 = torch.bfloat16
LAYER = "decode_layer:tiny:B=16,seq_lens=1+80+16+71+1+66+122+15+102+2+119+4+94+3+83+58:normal:821304493"
STEP = "decode_fwd:tiny:B=8,L=2,seq_lens=17+80+16+71+33+66+122+15:normal:5"
PREFILL = "prefill_layer:tiny:B=3,NB=14,seq_lens=60+77+9,chunk_lens=20+17+9:normal:28"


class Truncating(Arithmetic):
    """A kernel that makes the contract's roundings, and cuts off the low bits at the places of one name."""

    def __init__(self, name: str) -> None:
        super().__init__(torch.float64, rounds=True)
        self.name = name

    def round(self, tensor: torch.Tensor, name: str = "result") -> torch.Tensor:
        if name != self.name:
            return super().round(tensor)
        nearest = rounded(tensor, BF16)
        beyond = nearest.abs() > tensor.abs()
        return torch.where(beyond, nearest - nearest.sign() * spacing(tensor, BF16), nearest)

    def optional(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        return self.round(tensor, name) if name == self.name else tensor

    def unrounded(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        return super().round(tensor) if name == self.name else tensor


@pytest.fixture(scope="module")
def layer() -> Oracle:
    """The oracle of one case, which every test that asks for it judges by."""
    return Oracle(make_case(CaseKey.parse(LAYER)))


@pytest.fixture(scope="module")
def step() -> Oracle:
    return Oracle(make_case(CaseKey.parse(STEP)))


@pytest.fixture(scope="module")
def prefill() -> Oracle:
    return Oracle(make_case(CaseKey.parse(PREFILL)))


def results_of(case: Case, arithmetic: Arithmetic, inputs: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """What a kernel returns that computes the reference in this arithmetic."""
    results = case.stage.reference(inputs or case.inputs, case.dims, arithmetic)
    return {argument.name: results[argument.name].to(argument.dtype) for argument in case.stage.outputs}


def verdict_on(oracle: Oracle, outputs: dict[str, torch.Tensor]) -> Verdict:
    return judge(oracle.case, Outcome("ok", outputs=outputs), oracle=oracle)


def told(verdict: Verdict) -> list[str]:
    return [finding.detector for finding in verdict.findings]


# -- what is told ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["layer", "step", "prefill"])
def test_the_contracts_own_roundings_are_no_mistake(request: pytest.FixtureRequest, fixture: str) -> None:
    oracle = request.getfixturevalue(fixture)
    assert verdict_on(oracle, results_of(oracle.case, CONTRACT)).ok


@pytest.mark.parametrize(
    "name", ["input norm", "rotated k", "v", "attention", "post norm", "activation", "gate", "projection", "residual", "branch"]
)
def test_a_truncation_is_told_by_its_name(layer: Oracle, name: str) -> None:
    verdict = verdict_on(layer, results_of(layer.case, Truncating(name)))
    finding = verdict.findings[0]  # the errors' spread may tell it too
    # What is truncated before a product shifts what comes after it: the one that is told may be the next.
    near = {"projection": ("v",), "input norm": ("v", "projection"), "gate": ("activation",)}
    places = (name, *near.get(name, ()))
    assert finding.detector == "signature"
    assert any(f"known mistake: {place} is truncated instead of rounded" in finding.message for place in places), finding.message
    assert finding.share is not None
    assert finding.share > 1


@pytest.mark.parametrize("fixture", ["step", "prefill"])
@pytest.mark.parametrize("name", ["input norm", "rotated k", "v"])
def test_so_is_one_in_a_chain_or_a_chunk(request: pytest.FixtureRequest, fixture: str, name: str) -> None:
    oracle = request.getfixturevalue(fixture)
    assert told(verdict_on(oracle, results_of(oracle.case, Truncating(name))))[0] == "signature"


@pytest.mark.parametrize(
    ("mistake", "names"),
    [
        ("the RoPE tables are rounded to bf16", ("rope_cos", "rope_sin")),
        ("the norms' weights are rounded to bf16", ("input_rms_weight", "q_norm_weight", "k_norm_weight", "post_rms_weight")),
    ],
)
def test_inputs_that_were_rounded_are_told(prefill: Oracle, mistake: str, names: tuple[str, ...]) -> None:
    inputs = prefill.case.inputs
    changed = {**inputs, **{name: inputs[name].to(BF16).float() for name in names}}
    verdict = verdict_on(prefill, results_of(prefill.case, CONTRACT, changed))
    assert told(verdict)[0] == "signature"
    assert mistake in verdict.findings[0].message


@pytest.mark.parametrize(
    ("factor", "message"),
    [(1.01, "logits is too large by a constant factor"), (0.99, "logits is too small by a constant factor")],
)
def test_a_factor_on_the_logits_is_told(step: Oracle, factor: float, message: str) -> None:
    outputs = results_of(step.case, CONTRACT)
    outputs["logits"] = outputs["logits"] * factor
    verdict = verdict_on(step, outputs)
    assert told(verdict) == ["signature"]
    assert message in verdict.findings[0].message
    assert verdict.findings[0].argument == "logits"


def test_logits_that_went_through_bf16_are_told(step: Oracle) -> None:
    outputs = results_of(step.case, CONTRACT)
    outputs["logits"] = outputs["logits"].to(BF16).float()
    verdict = verdict_on(step, outputs)
    assert told(verdict) == ["signature"]
    assert (
        "logits is an fp32 output that was rounded to bf16 (the low 16 bits are zero where the exact result's are not): all"
        in verdict.findings[0].message
    )


def test_logits_that_are_bf16_values_by_themselves_are_not() -> None:
    """A head of powers of two picks single values of the normalised state."""
    case = make_case(CaseKey.parse(STEP))
    picks = torch.zeros_like(case.inputs["lm_head_weight"])
    rows = torch.arange(len(picks))
    picks[rows, rows % picks.shape[1]] = 2.0
    case = dataclasses.replace(case, inputs={**case.inputs, "lm_head_weight": picks})
    assert "signature" not in told(verdict_on(Oracle(case), results_of(case, CONTRACT)))


@pytest.mark.parametrize(
    ("fault", "mistake"),
    [
        ("root_too_large", "normalised is rounded away from zero (or too large by half a ULP on average)"),
        ("keys_rounded_up", "rotated k is rounded away from zero (or too large by half a ULP on average)"),
        ("k_norm_weight_in_bf16", "weight of the k norm is rounded to bf16"),
        ("root_in_bf16", "1/rms of the input norm is rounded to bf16"),
    ],
)
def test_what_is_larger_than_it_may_be_or_short_of_bits_is_told(layer: Oracle, fault: str, mistake: str) -> None:
    verdict = judge(layer.case, run_eager(torch_kernel("decode_layer", fault=fault), layer.case), oracle=layer)
    assert f"known mistake: {mistake}" in verdict.findings[0].message


class OnlyRounding(Arithmetic):
    """A kernel in float64 that rounds what must stay fp32 at the places of one name, and nothing else."""

    def __init__(self, name: str) -> None:
        super().__init__(torch.float64, rounds=False)
        self.name = name

    def unrounded(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        return rounded(tensor, BF16) if name == self.name else tensor


@pytest.mark.parametrize("name", ["scores", "1/rms of the post norm"])
def test_a_rounding_is_told_in_a_layer_that_makes_no_other(layer: Oracle, name: str) -> None:
    """What is rounded there depends on the roundings before it: the errors have little in common with those of other layers."""
    verdict = verdict_on(layer, results_of(layer.case, OnlyRounding(name)))
    assert told(verdict)[0] == "signature"
    assert f"{name} is rounded to bf16" in verdict.findings[0].message


# -- what is told by all cases together ------------------------------------------------------------------------------------------

#: Choices that round before the scores as much as is legal, but for the probabilities, whose rounding hides what is looked for.
ROUNDED = dataclasses.replace(HUGGING_FACE_LIKE, probabilities="no")
#: Cases each of which shows too little of a mistake in the scores.
FEW = {"S": 48, "B": 1}


@pytest.mark.parametrize(
    ("choices", "mistake"),
    [
        (Choices(), "scores is rounded to bf16"),
        (ROUNDED, "scores is rounded to bf16 (in a kernel that makes all optional roundings)"),
    ],
)
def test_what_no_case_shows_is_told_by_all_together(choices: Choices, mistake: str) -> None:
    kernel = torch_kernel("decode_layer", choices, fault="bf16_scores")
    report = conformance.check("decode_layer", kernel, dims=FEW, examples=40)
    assert report.detectors == ("pooled_signature",)
    (finding,) = report.findings
    assert f"cases match a known mistake: {mistake}." in finding.message
    assert [run.check for run in report.runs if not run.verdict.ok] == ["pooled"]
    assert finding.share is not None
    assert finding.share > 1
    assert finding.case in {run.case for run in report.runs if run.check == "example"}


#: The contract's roundings, and all that are optional besides, with ties to even and away from zero.
LEGAL = [Choices(), HUGGING_FACE_LIKE, dataclasses.replace(HUGGING_FACE_LIKE, cast="half_away")]


@pytest.mark.parametrize("choices", LEGAL[1:])
def test_legal_kernels_are_not_told_by_all_cases_together_either(choices: Choices) -> None:
    report = conformance.check("decode_layer", torch_kernel("decode_layer", choices), dims=FEW, examples=40)
    assert report.ok, str(report)
    pooled = report.runs[-1]
    assert pooled.check == "pooled"  # it was looked for
    assert pooled.verdict.share is not None
    assert pooled.verdict.share < 0.75


@pytest.mark.slow
def test_ties_of_many_layers_and_cases_are_not_told_together() -> None:
    """Sums of branches in bf16, rounded away from zero where they are ties: in all layers and cases alike."""
    choices = Choices(branch=True, residual=True, cast="half_away")
    report = conformance.check(
        "decode_fwd_layers", torch_kernel("decode_fwd_layers", choices), dims={"L": 8, "B": 4}, examples=11
    )
    assert report.ok, str(report)
    assert report.runs[-1].check == "pooled"
    assert report.runs[-1].verdict.share is not None
    assert report.runs[-1].verdict.share < 0.6


def test_together_a_case_counts_by_what_the_mistake_adds_to_it() -> None:
    told, telling = judge_together(
        [
            {"x": FilterResponse(3.0, 4.0)},
            {"x": FilterResponse(4.0, 3.0)},
            {"x": FilterResponse(3.0, 4.0)},
            {"y": FilterResponse(9.0, 1.0)},
            {"x": FilterResponse(5.0, 4.0)},
        ]
    )
    assert telling == 4  # is left out
    (finding,) = told.findings
    # 3 * 4 + 4 * 3 + 3 * 4 over the root of 4 * 4 + 3 * 3 + 4 * 4, and over that: 36 / 41
    assert "4 cases" in finding.message
    assert "amplitude 0.88" in finding.message
    assert "z-score 5.62" in finding.message
    assert told.share == pytest.approx(36 / math.sqrt(41) / 5.5)


@pytest.mark.parametrize(
    "runs",
    [
        [{"x": FilterResponse(30.0, 30.0)}],  # one case is judged by itself
        [{"x": FilterResponse(30.0, 30.0)}] * 2,  # so is what is left of two
        [
            {"x": FilterResponse(10.0, 30.0)},
            *[{"x": FilterResponse(1.0, 1.0)}] * 9,
        ],  # so is one case among many that hardly show anything
        [{"x": FilterResponse(12.0, 40.0)}] * 4,  # twenty deviations, and a third of what the mistake adds less a tenth
        [{"x": FilterResponse(3.0, 3.0)}] * 4,  # 5.2 deviations without one of them
        [{"x": FilterResponse(-9.0, 9.0)}] * 4,
        [{"x": FilterResponse(9.0, 9.0)}, {"y": FilterResponse(9.0, 9.0)}, {"z": FilterResponse(9.0, 9.0)}],
        [{"x": FilterResponse(0.0, 0.0)}] * 4,
        [{}, {}],
        [],
    ],
)
def test_together_too_little_is_nothing(runs: list[dict[str, FilterResponse]]) -> None:
    assert judge_together(runs)[0].ok


def test_what_cannot_be_told_of_one_mistake_hides_no_other() -> None:
    runs = [{"x": FilterResponse(5.0, 5.0), "y": FilterResponse(math.nan, 1.0)}] * 4
    told, _ = judge_together(runs)
    assert [finding.detector for finding in told.findings] == ["pooled_signature"]
    assert told.share == pytest.approx(5 * math.sqrt(3) / 5.5)


def test_a_case_that_comes_twice_counts_once_and_what_is_wrong_elsewhere_hides_it() -> None:
    key, other = CaseKey.parse(LAYER), CaseKey.parse(PREFILL)
    fine, wrong = (
        Verdict(responses={"x": FilterResponse(5.0, 5.0)}),
        Verdict((Finding("element", "far off"),), responses={"x": FilterResponse(5.0, 5.0)}),
    )
    example = Judged("example", key, fine, Outcome("ok"))
    elsewhere = dataclasses.replace(example, case=other)
    third = dataclasses.replace(example, case=CaseKey.parse(STEP))
    assert not list(pooled_run([example, example, dataclasses.replace(elsewhere, check="repeat")]))
    (unclear,) = pooled_run([example, example, elsewhere])
    assert unclear.verdict.ok
    (pooled,) = pooled_run([example, elsewhere, third])
    assert pooled.check == "pooled"
    assert not pooled.verdict.ok
    assert not list(pooled_run([example, elsewhere, third, dataclasses.replace(elsewhere, verdict=wrong)]))


# -- what is not ----------------------------------------------------------------------------------------------------------------


def test_a_tile_that_one_rounding_steers_is_not_too_far_off() -> None:
    """A quarter of its variance is one error's, 4.7 deviations in size: too many for as many equal errors as vary so much."""
    key = "decode_layer:awkward:B=16,seq_lens=38+48+14+8+40+9+12+8+2+16+8+75+16+8+8+21:normal:730298364"
    case = make_case(CaseKey.parse(key))
    oracle = Oracle(case)
    for choices in LEGAL:
        verdict = judge(case, run_eager(torch_kernel("decode_layer", choices), case), oracle=oracle)
        assert verdict.ok, verdict.findings


@pytest.mark.parametrize(
    "key",
    [
        "decode_fwd:tiny:B=16,L=4,seq_lens=128+127+127+115+122+128+126+120+127+121+128+124+127+125+127+127:long:2052286160",
        "decode_fwd_layers:tiny:B=16,L=4,seq_lens=128+2+127+128+94+24+121+17+17+102+122+86+127+57+70+1:outlier:239714411",
    ],
)
def test_ties_that_are_rounded_away_from_zero_are_no_mistake(key: str) -> None:
    """Residuals of branches in bf16 fall on ties in plenty; without room for them these runs had 5.1 and 7 of 5.5 deviations."""
    case = make_case(CaseKey.parse(key))
    oracle = Oracle(case)
    for choices in (
        dataclasses.replace(HUGGING_FACE_LIKE, cast="half_away", probabilities="before", block=8, projection=False, up=False),
        Choices(branch=True, residual=True, cast="half_away"),
    ):
        outcome = run_eager(torch_kernel(case.stage.name, choices), case)
        assert judge(case, outcome, oracle=oracle).ok
        assert max(sigmas_of(case, outcome.outputs, oracle).values()) < 0.75 * SIGNATURE_SIGMAS


def sigmas_of(case: Case, outputs: dict[str, torch.Tensor], oracle: Oracle) -> dict[str, float]:
    profile = case.stage.profiles[0]
    bounds = oracle.bounds(profile)
    with torch.enable_grad():
        found = oracle.filters(profile)
    return {one.mistake: amount_along(one, case, outputs, bounds) for one in found}


def amount_along(one: Filter, case: Case, outputs: dict[str, torch.Tensor], bounds: dict) -> float:  # type: ignore[type-arg]
    total = 0.0
    for name, weight in one.weights.items():
        rows = bounds[name].rows
        value = outputs[name] if rows is None else outputs[name][rows]
        total += float(((value.double() - bounds[name].value) * weight).sum())
    return total


def test_a_correct_kernel_is_a_deviation_off_in_every_direction() -> None:
    """Over some cases the mean square of what is found is what was predicted: the filters know the noise."""
    squares: list[float] = []
    keys = stratified_keys(Space.of(conformance.stages()["decode_layer"], {"S": 48}), 3)
    for _ in range(8):
        case = make_case(next(keys))
        outcome = run_eager(torch_kernel("decode_layer", HUGGING_FACE_LIKE), case)
        squares += [sigmas**2 for sigmas in sigmas_of(case, outcome.outputs, Oracle(case)).values()]
    assert len(squares) > 150
    assert 0.3 < sum(squares) / len(squares) < 1.5


@pytest.mark.parametrize("limit", ["rows", "size"])
def test_where_signatures_are_not_looked_for(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rearranged rows of a case that was judged, and layers of real size."""
    key = CaseKey.parse(LAYER)
    if limit == "rows":
        key = take_rows(key, tuple(range(16)))
    else:
        monkeypatch.setattr("conformance.judge.limits.MOST_INPUTS", 1000)
    case = make_case(key)
    assert verdict_on(Oracle(case), results_of(case, Truncating("rotated k"))).ok


# -- how they are made ----------------------------------------------------------------------------------------------------------


def test_every_rounding_of_a_layer_has_a_signature() -> None:
    case = make_case(CaseKey.parse(PREFILL))
    found = list(signatures(case, dict.fromkeys(("k_cache", "v_cache", "out"))))
    mistakes = [one.mistake for one in found] + [one.opposite for one in found if one.opposite is not None]
    assert len(mistakes) == len(set(mistakes))
    sites = RoundingSites(case.stage.profiles[0].roundings)
    case.stage.reference(case.inputs, case.dims, sites)
    names = ErrorSites("contract")
    case.stage.reference(case.inputs, case.dims, names)
    assert set(names.rounded_values) >= case.stage.profiles[0].roundings - {"deferred_norm"}
    for name in names.rounded_values:
        assert f"{name} is truncated instead of rounded (or too small by half a ULP on average)" in mistakes
        # Sums fall on ties, which a legal kernel may round away from zero.
        larger = f"{name} is rounded away from zero (or too large by half a ULP on average)"
        assert (larger in mistakes) is (name not in case.stage.tie_prone)
    norms = ("input norm", "q norm", "k norm", "post norm")
    stays_fp32 = {
        "scores",
        "softmax denominator",
        "sigmoid",
        *(f"{what} of the {norm}" for what in ("1/rms", "weight") for norm in norms),
    }
    assert set(names.unrounded_values) == stays_fp32
    assert {f"{name} is rounded to bf16" for name in stays_fp32} <= set(mistakes)
    assert {
        f"{output} is too {size} by a constant factor" for output in ("k_cache", "v_cache", "out") for size in ("large", "small")
    } <= set(mistakes)
    assert set(case.stage.mistakes) <= set(mistakes)
    assert set(case.stage.tie_prone) <= set(names.rounded_values)


def test_a_reference_that_branches_on_its_data_has_the_same_signatures(layer: Oracle) -> None:
    """Such a one cannot be evaluated for several mistakes at a time."""
    case, rows = layer.case, dict.fromkeys(("k_cache", "v_cache", "out"))

    def branching(inputs: dict[str, torch.Tensor], dims: Dims, arithmetic: Arithmetic) -> dict[str, torch.Tensor]:
        found = case.stage.reference(inputs, dims, arithmetic)
        return found if float(found["out"].abs().amax()) >= 0 else {}

    other = dataclasses.replace(case, stage=dataclasses.replace(case.stage, reference=branching))
    for one, same in zip(signatures(case, rows), signatures(other, rows), strict=True):
        assert one.mistake == same.mistake
        for name, shift in one.shifts.items():
            assert torch.allclose(shift, same.shifts[name], rtol=1e-6, atol=1e-12)


def test_what_rounding_adds_is_looked_for_after_all_optional_roundings_too_where_they_matter(layer: Oracle) -> None:
    """A score's rounding error depends on how q and k were rounded before; that of a weight on nothing."""
    mistakes = [one.mistake for one in signatures(layer.case, dict.fromkeys(("k_cache", "v_cache", "out")))]
    twice = {
        mistake.split(" is rounded")[0]
        for mistake in mistakes
        if mistake.endswith("(in a kernel that makes all optional roundings)")
    }
    assert {"scores", "sigmoid"} <= twice
    assert "weight of the input norm" not in twice
    assert "1/rms of the input norm" not in twice


def test_as_many_ties_are_expected_of_values_of_each_exponent() -> None:
    sites = ErrorSites("all")
    below, above = 1 + 2.0**-8, 2 + 2.0**-7  # ties
    sites.round(torch.tensor([[below, -below], [1.0, 1.5], [above, -3.0]], dtype=torch.float64))
    assert torch.equal(sites.ties("result")[0], torch.tensor([[2.0**-8, -(2.0**-8)], [0, 0], [2.0**-7, 0]]).double())
    (even,) = sites.expected_ties("result")
    assert torch.equal(even, torch.tensor([[2.0**-9, -(2.0**-9)], [2.0**-9, 2.0**-9], [2.0**-8, -(2.0**-8)]]).double())


def test_a_truncation_costs_half_a_ulp_on_average() -> None:
    case = make_case(CaseKey.parse(LAYER))
    rows = {name: one.rows for name, one in Oracle(case).bounds(case.stage.profiles[0]).items()}
    found = {one.mistake: one.shifts for one in signatures(case, rows)}
    shift = found["v is truncated instead of rounded (or too small by half a ULP on average)"]
    exact = case.stage.reference(case.inputs, case.dims, EXACT)["v_cache"][rows["v_cache"]]
    assert shift["v_cache"].shape == (16 * 2, 64)
    assert torch.allclose(shift["v_cache"], -exact.sign() * spacing(exact, BF16) / 2)
    assert not shift["k_cache"].any()


def test_covariances_of_all_sequences_add_up_to_the_variance_along_a_direction() -> None:
    case = make_case(CaseKey.parse(PREFILL))
    oracle, profile = Oracle(case), case.stage.profiles[0]
    bounds = oracle.bounds(profile)
    generator = torch.Generator().manual_seed(3)
    count = TOGETHER + 2  # more than are taken at a time
    directions = {
        name: torch.randn(count, *one.value.shape, generator=generator, dtype=torch.float64) for name, one in bounds.items()
    }
    with torch.enable_grad():
        sensitivity = Sensitivity(case, bounds, profile)
        effects = sensitivity.effects(directions)
        covariances = effects.covariances
        along = sensitivity.variances_of_sums(directions).tolist()
        # One sum by itself, and in every sequence another multiple of the next.
        combinations = torch.zeros(2, 3, count, dtype=torch.float64)
        combinations[0, :, 4] = 1e-60
        combinations[1, :, 5] = factors = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
        of_rows = {name: factors[_sequence_of_judged_rows(case, name, one, sensitivity)] for name, one in bounds.items()}
        scaled = {name: (directions[name][5] * of_rows[name].unsqueeze(1)).unsqueeze(0) for name in bounds}
        (along_scaled,) = sensitivity.variances_of_sums(scaled).tolist()
    found = effects.variances(combinations).tolist()
    assert found == [pytest.approx(1e-120 * along[4], rel=1e-4), pytest.approx(along_scaled, rel=1e-4)]
    assert covariances.shape == (3, count, count)
    assert torch.allclose(covariances, covariances.transpose(1, 2))
    for k in range(count):
        assert float(covariances[:, k, k].sum()) == pytest.approx(along[k], rel=0.05)  # some values of two sequences agree


def test_a_case_without_a_batch_of_rows_has_filters_too() -> None:
    case = make_case(CaseKey.parse("decode_fwd:tiny:B=1,L=1,seq_lens=1:length_one:9"))
    oracle, profile = Oracle(case), case.stage.profiles[0]
    with torch.enable_grad():
        found = filters(case, oracle.bounds(profile), Sensitivity(case, oracle.bounds(profile), profile))
    assert found
    # A lone key has the probability 1: neither scores nor probabilities nor queries matter.
    assert not [one.mistake for one in found if one.mistake.startswith(("scores", "rotated q"))]
