"""Mistakes inside a layer that no element shows are told by what they add to all outputs; legal kernels are taken for none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import conformance
from conformance.arithmetic import CONTRACT, EXACT, Arithmetic, Mistaken, RoundingSites
from conformance.cases import Case, CaseKey, Space, make_case, stratified_keys, take_rows
from conformance.executors.base import Outcome
from conformance.executors.eager import run_eager
from conformance.faults.kernels import HUGGING_FACE_LIKE, Choices, random_choices, torch_kernel
from conformance.judge import SIGNATURE_SIGMAS, Oracle, judge
from conformance.sensitivity import Sensitivity
from conformance.signatures import Filter, filters, signatures
from conformance.ulp import rounded, spacing
from conformance.verdict import Verdict

BF16 = torch.bfloat16
LAYER = "decode_layer:tiny:B=16,seq_lens=1+80+16+71+1+66+122+15+102+2+119+4+94+3+83+58:normal:821304491"
STEP = "decode_fwd:tiny:B=8,L=2,seq_lens=17+80+16+71+33+66+122+15:normal:5"
PREFILL = "prefill_layer:tiny:B=3,NB=14,seq_lens=60+77+9,chunk_lens=20+17+9:normal:30"


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

    def optional(self, tensor: torch.Tensor, name: str, sequence: int | None = None) -> torch.Tensor:
        return self.round(tensor, name) if name == self.name else tensor

    def unrounded(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        return super().round(tensor) if name == self.name else tensor


def verdict_on(case: Case, arithmetic: Arithmetic, inputs: dict[str, torch.Tensor] | None = None) -> Verdict:
    """Of a kernel that computes the reference in this arithmetic."""
    results = case.stage.reference(inputs or case.inputs, case.dims, arithmetic)
    outputs = {argument.name: results[argument.name].to(argument.dtype) for argument in case.stage.outputs}
    return judge(case, Outcome("ok", outputs=outputs))


def told(verdict: Verdict) -> list[str]:
    return [finding.detector for finding in verdict.findings]


# -- what is told ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["input norm", "rotated k", "v", "attention", "post norm", "activation", "gate", "projection", "residual", "branch"]
)
def test_a_truncation_is_told_by_its_name(name: str) -> None:
    case = make_case(CaseKey.parse(LAYER))
    assert verdict_on(case, CONTRACT).ok
    verdict = verdict_on(case, Truncating(name))
    finding = verdict.findings[0]  # the errors' spread may tell it too
    # What is truncated before a product shifts what comes after it: the one that is told may be the next.
    near = {"projection": ("v",), "input norm": ("v", "projection"), "gate": ("activation",)}
    places = (name, *near.get(name, ()))
    assert finding.detector == "signature"
    assert any(f"a kernel where {place} is truncated instead of rounded" in finding.message for place in places), finding.message
    assert finding.share is not None
    assert finding.share > 1


@pytest.mark.parametrize("key", [STEP, PREFILL])
@pytest.mark.parametrize("name", ["input norm", "rotated k", "v"])
def test_so_is_one_in_a_chain_or_a_chunk(key: str, name: str) -> None:
    case = make_case(CaseKey.parse(key))
    assert verdict_on(case, CONTRACT).ok
    assert told(verdict_on(case, Truncating(name)))[0] == "signature"


@pytest.mark.parametrize(
    ("mistake", "names"),
    [
        ("the RoPE tables are rounded to bf16", ("rope_cos", "rope_sin")),
        ("the norms' weights are rounded to bf16", ("input_rms_weight", "q_norm_weight", "k_norm_weight", "post_rms_weight")),
    ],
)
def test_inputs_that_were_rounded_are_told(mistake: str, names: tuple[str, ...]) -> None:
    case = make_case(CaseKey.parse(PREFILL))
    changed = {**case.inputs, **{name: case.inputs[name].to(BF16).float() for name in names}}
    verdict = verdict_on(case, CONTRACT, changed)
    assert told(verdict)[0] == "signature"
    assert mistake in verdict.findings[0].message


@pytest.mark.parametrize(
    ("factor", "message"), [(1.01, "logits is too large by a factor"), (0.99, "logits is too small by a factor")]
)
def test_a_factor_on_the_logits_is_told(factor: float, message: str) -> None:
    case = make_case(CaseKey.parse(STEP))
    results = case.stage.reference(case.inputs, case.dims, CONTRACT)
    outputs = {argument.name: results[argument.name].to(argument.dtype) for argument in case.stage.outputs}
    outputs["logits"] = outputs["logits"] * factor
    verdict = judge(case, Outcome("ok", outputs=outputs))
    assert told(verdict) == ["signature"]
    assert message in verdict.findings[0].message
    assert verdict.findings[0].argument == "logits"


def test_logits_that_went_through_bf16_are_told() -> None:
    case = make_case(CaseKey.parse(STEP))
    results = case.stage.reference(case.inputs, case.dims, CONTRACT)
    outputs = {argument.name: results[argument.name].to(argument.dtype) for argument in case.stage.outputs}
    outputs["logits"] = outputs["logits"].to(BF16).float()
    verdict = judge(case, Outcome("ok", outputs=outputs))
    assert told(verdict) == ["signature"]
    assert "logits must be fp32, and holds bf16 values: its low 16 bits are zero: all" in verdict.findings[0].message


def test_logits_that_are_bf16_values_by_themselves_are_not() -> None:
    """A head of powers of two picks single values of the normalised state."""
    case = make_case(CaseKey.parse(STEP))
    picks = torch.zeros_like(case.inputs["lm_head_weight"])
    rows = torch.arange(len(picks))
    picks[rows, rows % picks.shape[1]] = 2.0
    case = dataclasses.replace(case, inputs={**case.inputs, "lm_head_weight": picks})
    verdict = verdict_on(case, CONTRACT)
    assert "signature" not in told(verdict)


# -- what is not ----------------------------------------------------------------------------------------------------------------


LEGAL = [Choices(), HUGGING_FACE_LIKE, dataclasses.replace(HUGGING_FACE_LIKE, cast="half_away")]


@pytest.mark.parametrize("choices", [*LEGAL, *(random_choices("decode_layer", seed) for seed in range(3))])
@pytest.mark.parametrize("stage", ["decode_layer", "decode_fwd_layers"])
def test_legal_kernels_are_taken_for_none(stage: str, choices: Choices) -> None:
    report = conformance.check(stage, torch_kernel(stage, choices), examples=9, seed=21)
    assert report.ok, str(report)


def test_ties_that_are_rounded_away_from_zero_are_no_mistake() -> None:
    """Residuals of branches in bf16 fall on ties in plenty; without room for them this run had 5.1 of 5.5 deviations."""
    lengths = "128+127+127+115+122+128+126+120+127+121+128+124+127+125+127+127"
    case = make_case(CaseKey.parse(f"decode_fwd:tiny:B=16,L=4,seq_lens={lengths}:long:2052286160"))
    choices = dataclasses.replace(
        HUGGING_FACE_LIKE,
        cast="half_away",
        block=8,
        visit="shuffled",
        whole_page="replace",
        probabilities="before",
        lazy_maximum=True,
    )
    choices = dataclasses.replace(choices, up=False, projection=False, before_rope=False)
    outcome = run_eager(torch_kernel("decode_fwd", choices), case)
    oracle = Oracle(case)
    assert judge(case, outcome, oracle=oracle).ok
    assert max(sigmas_of(case, outcome.outputs, oracle).values()) < 0.75 * SIGNATURE_SIGMAS


def sigmas_of(case: Case, outputs: dict[str, torch.Tensor], oracle: Oracle) -> dict[str, float]:
    profile = case.stage.profiles[0]
    bounds = oracle.bounds(profile)
    with torch.enable_grad():
        found = oracle.filters(profile)
    return {one.mistake: amount_along(one, case, outputs, bounds) / one.deviation for one in found}


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
    keys = stratified_keys(Space.of(conformance.stages()["decode_layer"], "tiny"), 3)
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
        monkeypatch.setattr("conformance.judge.MOST_INPUTS", 1000)
    assert verdict_on(make_case(key), Truncating("rotated k")).ok


# -- how they are made ----------------------------------------------------------------------------------------------------------


def test_every_rounding_of_a_layer_has_a_signature() -> None:
    case = make_case(CaseKey.parse(PREFILL))
    mistakes = [one.mistake for one in signatures(case, dict.fromkeys(("k_cache", "v_cache", "out")))]
    sites = RoundingSites(case.stage.profiles[0].roundings)
    case.stage.reference(case.inputs, case.dims, sites)
    names = Mistaken()
    case.stage.reference(case.inputs, case.dims, names)
    assert len(mistakes) == len(set(mistakes)) == len(names.names) + len(case.stage.mistakes) + 6
    assert set(names.names) >= case.stage.profiles[0].roundings - {"deferred_norm"}
    assert [name for name, stays_fp32 in names.names.items() if stays_fp32] == ["scores"]
    assert set(case.stage.tie_prone) <= set(names.names)


def test_a_truncation_costs_half_a_ulp_on_average() -> None:
    case = make_case(CaseKey.parse(LAYER))
    found = {one.mistake: one.shifts for one in signatures(case, dict.fromkeys(("k_cache", "v_cache", "out")))}
    shift = found["v is truncated instead of rounded, or smaller by as much"]["v_cache"]
    exact = case.stage.reference(case.inputs, case.dims, EXACT)["v_cache"]
    written = shift != 0
    assert int(written.sum()) == 16 * 2 * 64
    assert torch.allclose(shift[written], (-exact.sign() * spacing(exact, BF16) / 2)[written])
    assert not found["v is truncated instead of rounded, or smaller by as much"]["k_cache"].any()


def test_covariances_of_all_sequences_add_up_to_the_variance_along_a_direction() -> None:
    case = make_case(CaseKey.parse(PREFILL))
    oracle, profile = Oracle(case), case.stage.profiles[0]
    bounds = oracle.bounds(profile)
    generator = torch.Generator().manual_seed(3)
    directions = [
        {name: torch.randn(one.value.shape, generator=generator, dtype=torch.float64) for name, one in bounds.items()}
        for _ in range(2)
    ]
    with torch.enable_grad():
        sensitivity = Sensitivity(case, bounds, profile)
        covariances = sensitivity.covariances(directions)
        along = [sensitivity.along(direction) for direction in directions]
    assert covariances.shape == (3, 2, 2)
    assert torch.allclose(covariances, covariances.transpose(1, 2))
    for k in range(2):
        assert float(covariances[:, k, k].sum()) == pytest.approx(along[k], rel=0.05)  # some values of two sequences agree


def test_a_case_without_a_batch_of_rows_has_filters_too() -> None:
    case = make_case(CaseKey.parse("decode_fwd:tiny:B=1,L=1,seq_lens=1:length_one:9"))
    oracle, profile = Oracle(case), case.stage.profiles[0]
    with torch.enable_grad():
        found = filters(case, oracle.bounds(profile), Sensitivity(case, oracle.bounds(profile), profile))
    assert found
    # A lone key has the probability 1: neither scores nor probabilities nor queries matter.
    assert not [one.mistake for one in found if one.mistake.startswith(("scores", "rotated q"))]
