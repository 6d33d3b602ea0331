"""No legal kernel is rejected: every choice by itself, random combinations, all of Hugging Face's roundings."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import pytest

import conformance
from conformance.cases.case import make_case
from conformance.cases.key import CaseKey
from conformance.cases.space import Space, stratified_keys
from conformance.contract.registry import stage_named
from conformance.judge.judgement import judge
from conformance.judge.limits import kappa
from conformance.judge.oracle import Oracle
from conformance.judge.verdict import Verdict
from conformance.kernels.qwen3.exam.torch.choices import HUGGING_FACE_LIKE, RELEVANT, Choices, random_choices, single_choices
from conformance.kernels.qwen3.exam.torch.kernels import torch_kernel
from conformance.lanes.eager import run_eager

SINGLE_STAGES = [name for name, stage in conformance.stages().items() if not stage.composite]
COMPOSITE_STAGES = [name for name, stage in conformance.stages().items() if stage.composite]


def verdict_of(key: CaseKey, choices: Choices) -> Verdict:
    case = make_case(key)
    return judge(case, run_eager(torch_kernel(key.stage, choices), case))


def assert_legal(key: CaseKey, choices: Choices) -> None:
    verdict = verdict_of(key, choices)
    assert verdict.ok, f"{key} {choices}: {verdict.findings[0].detector}: {verdict.findings[0].message}"
    assert verdict.share is not None


def keys_of(stage: str, dims: str | Mapping[str, Any], count: int, seed: int) -> list[CaseKey]:
    return list(itertools.islice(stratified_keys(Space.of(stage_named(stage), dims), seed), count))


@pytest.mark.parametrize(
    # Over pages attention is the same arithmetic: by night.
    "stage",
    [pytest.param(stage, marks=pytest.mark.slow) if stage == "paged_attention" else stage for stage in SINGLE_STAGES],
)
def test_each_choice_by_itself_passes_in_every_regime(stage: str) -> None:
    for index, choices in enumerate(single_choices(stage)):
        keys = keys_of(stage, "awkward" if index % 2 else "tiny", len(stage_named(stage).regimes), seed=index)
        for key in keys if index < 2 else keys[index % 3 :: 3]:
            assert_legal(key, choices)


@pytest.mark.parametrize("stage", SINGLE_STAGES)
def test_random_combinations_pass(stage: str) -> None:
    keys = [*keys_of(stage, "tiny", 10, seed=100), *keys_of(stage, "awkward", 10, seed=100)]
    for seed, key in enumerate(keys):
        assert_legal(key, random_choices(stage, seed))


def small_dims(stage: str, preset: str = "tiny") -> dict[str, str | int]:
    """Dimensions of a stage of layers that take well below a second a case."""
    contract = stage_named(stage)
    dims: dict[str, str | int] = {"preset": preset, "S": 48}
    if "L" in contract.drawn:
        dims["L"] = 2
    if contract.has_chunks:
        dims["T"] = 24
    return dims


@pytest.mark.parametrize("stage", COMPOSITE_STAGES)
def test_random_combinations_of_layers_pass(stage: str) -> None:
    count = 9 if stage in ("decode_layer", "prefill_layer") else 4
    for seed, key in enumerate(keys_of(stage, small_dims(stage), count, seed=200)):
        assert_legal(key, random_choices(stage, seed))


@pytest.mark.parametrize("preset", ["tiny", "awkward"])
@pytest.mark.parametrize(("stage", "count"), [("attention", 12), ("decode_layer", 4)])
def test_all_of_hugging_faces_roundings_pass(stage: str, count: int, preset: str) -> None:
    for key in keys_of(stage, preset, count, seed=300):
        assert_legal(key, HUGGING_FACE_LIKE)


@pytest.mark.parametrize(
    ("stage", "preset"),
    [
        ("decode_fwd_layers", "tiny"),
        ("decode_fwd", "awkward"),
        ("paged_decode_layer", "awkward"),
        ("paged_decode_fwd", "tiny"),
        ("prefill_layer", "tiny"),
        ("prefill_fwd", "awkward"),
    ],
)
def test_all_of_hugging_faces_roundings_pass_in_small_layers(stage: str, preset: str) -> None:
    for key in keys_of(stage, small_dims(stage, preset), 3, seed=300):
        assert_legal(key, HUGGING_FACE_LIKE)


@pytest.mark.parametrize(
    ("queries", "whole_page", "visit"),  # every pair of choices
    [
        (1, "no", "forward"),
        (1, "add", "backward"),
        (1, "replace", "shuffled"),
        (3, "no", "backward"),
        (3, "add", "shuffled"),
        (3, "replace", "forward"),
        (0, "no", "shuffled"),
        (0, "add", "forward"),
        (0, "replace", "backward"),
    ],
)
def test_prefill_may_go_by_tokens_or_by_blocks_of_queries(queries: int, whole_page: str, visit: str) -> None:
    """Block by block under a causal mask, pages in any order, the last one read to its end or not."""
    choices = Choices(queries=queries, whole_page=whole_page, visit=visit, block=16)
    (key,) = keys_of("prefill_layer", small_dims("prefill_layer"), 1, seed=400 + queries)
    assert_legal(key, choices)


def test_a_projection_may_be_accumulated_onto_its_residual() -> None:
    """The residual is the largest term of the sum: every partial sum is rounded at its size."""
    choices = Choices(residual_first=True, order="sequential")
    assert_legal(CaseKey.parse("o_proj:tiny:B=5:mixed_rows:638194671"), choices)


#: Runs that earlier versions of the error model rejected, and what it left out.
ONCE_REJECTED = {
    "a few roundings steer a tile of an outlier row": (
        "prefill_layer:awkward:B=16,NH=9,NKV=3,D=32,NB=58,S=48,seq_lens=38+44+15+48+34+8+48+35+17+16+8+7+33+7+48+7,"
        "chunk_lens=9+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1:outlier:1826666345",
        Choices(normalised=True, before_rope=True, gate=True, up=True, branch=True, projection=True, visit="backward"),
    ),
    "probabilities all about 1/n are rounded alike": (
        "attention:tiny:B=16,seq_lens=60+8+127+128+128+1+15+116+2+1+66+16+115+1+106+29:mixed_rows:1916677662",
        HUGGING_FACE_LIKE,
    ),
    "equal probabilities of values that cancel": (
        "attention:tiny:B=9,seq_lens=15+16+128+16+32+127+40+17+2:mixed_rows:957146020",
        HUGGING_FACE_LIKE,
    ),
    "probabilities below the smallest normal number": (
        "attention:tiny:B=11,seq_lens=127+32+92+16+17+2+42+47+16+89+84:big:600307145",
        HUGGING_FACE_LIKE,
    ),
    "a head of equal values makes a tile of equal errors": (
        "attention:awkward:B=9,NH=9,NKV=3,D=32,seq_lens=9+39+66+32+7+26+2+47+30:constant:66959491",
        HUGGING_FACE_LIKE,
    ),
    "forty heads with small queries round their probabilities alike": (
        "attention:tiny:B=16,D=16,NH=40,NKV=8,seq_lens=75+125+70+128+82+14+127+16+17+20+12+100+28+17+64+128:small:896205371",
        Choices(probabilities="after"),
    ),
    "255 probabilities of 1 / 255 all lie on a tie of bf16": (
        f"attention:tiny:B=16,S=256,seq_lens={'+'.join(['255'] * 16)}:small:6",
        Choices(probabilities="after"),
    ),
    "constant rows repeat one another": ("rms_norm:tiny:B=11:constant:438427099", Choices(order="tile64", normalised=True)),
    "a rounded branch cancels its residual exactly": ("o_proj:tiny:B=16:cancel:1784904468", Choices(branch=True)),
    "one attention weight steers a whole row of a later layer": (
        "decode_fwd_layers:tiny:B=6,L=3,seq_lens=75+128+2+100+128+17:needle:1741822976",
        HUGGING_FACE_LIKE,
    ),
    "the roundings of one query with two keys steer a column twice as far as others": (
        "decode_layer:tiny:B=10,S=48,seq_lens=15+16+47+7+38+33+39+2+2+2:small:1280500169",
        dataclasses.replace(HUGGING_FACE_LIKE, probabilities="before"),
    ),
}


@pytest.mark.parametrize(("key", "choices"), ONCE_REJECTED.values(), ids=ONCE_REJECTED)
def test_runs_that_were_once_rejected_pass(key: str, choices: Choices) -> None:
    assert_legal(CaseKey.parse(key), choices)


def test_an_element_of_a_layer_is_allowed_what_roundings_do_to_it_and_no_more() -> None:
    """Were every column allowed what the one is that a query's roundings steer, an error of the others would hide in it."""
    case = make_case(CaseKey.parse("decode_layer:tiny:B=10,S=48,seq_lens=15+16+47+7+38+33+39+2+2+2:small:1280500169"))
    oracle, profile, row = Oracle(case), case.stage.profiles[0], 9
    estimate = oracle.bounds(profile)["out"]
    modelled = estimate.variance[row]
    ratios = {
        column: oracle.element_variance("out", profile, row, column) / float(modelled[column]) for column in range(0, 256, 2)
    }
    steered, steady = max(ratios, key=lambda column: ratios[column]), min(ratios, key=lambda column: ratios[column])
    assert ratios[steered] > 3
    outcome = run_eager(torch_kernel("decode_layer"), case)
    for column, right in ((steered, True), (steady, False)):
        spoilt = {name: tensor.clone() for name, tensor in outcome.outputs.items()}
        error = 1.5 * kappa(estimate.value.numel()) * float(modelled[column].sqrt())
        spoilt["out"][row, column] = estimate.value[row, column] + error
        verdict = judge(case, dataclasses.replace(outcome, outputs=spoilt), oracle=oracle)
        assert ("element" in {finding.detector for finding in verdict.findings}) is not right


@pytest.mark.parametrize("stage", SINGLE_STAGES)
def test_a_declared_profile_suffices_for_the_kernel_that_has_it(stage: str) -> None:
    contract = stage_named(stage)
    kernel = torch_kernel(stage)
    case = make_case(keys_of(stage, "tiny", 1, seed=0)[0])
    assert judge(case, run_eager(kernel, case), profile=contract.profiles[0].name).ok


@pytest.mark.parametrize(
    ("stage", "made", "profile"),
    [
        ("qk_norm", "before_rope", "before_rope"),
        ("mlp", "gate", "gate"),
        ("mlp", "up", "up"),
        ("o_proj", "branch", "branch"),
        ("lm_head", "normalised", "normalised"),
        ("lm_head", "deferred_final_norm", "deferred_norm"),
    ],
)
def test_a_rounding_that_was_not_declared_is_found(stage: str, made: str, profile: str) -> None:
    case = make_case(keys_of(stage, "tiny", 1, seed=0)[0])
    outcome = run_eager(torch_kernel(stage, Choices(**{made: True})), case)  # type: ignore[arg-type]
    assert judge(case, outcome).ok
    assert judge(case, outcome).profile == profile
    assert not judge(case, outcome, profile="contract").ok


def test_a_rounding_that_belongs_inside_a_layer_is_no_stages_own() -> None:
    """q, k and v in bf16 are legal inside a layer, and a finding where they are the stage's output."""
    report = conformance.check("qkv_proj", torch_kernel("qkv_proj", fault="bf16_result"), examples=3)
    assert report.detectors == ("element",)


def test_every_choice_matters_to_some_stage() -> None:
    assert {name for names in RELEVANT.values() for name in names} == set(Choices.__dataclass_fields__)
