"""What a kernel may do to its numbers: more accurate is never wrong, and what it declares is made or modelled by the oracle."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import conformance
from conformance.cases.case import make_case
from conformance.cases.key import CaseKey
from conformance.cases.space import Space, stratified_keys
from conformance.cli import main
from conformance.contract.precision import allowed_profiles, declared_names
from conformance.contract.registry import stage_named
from conformance.errors import UsageError
from conformance.judge.judgement import judge
from conformance.judge.oracle import Oracle
from conformance.judge.verdict import Verdict
from conformance.kernels.qwen3.exam.torch.choices import Choices
from conformance.kernels.qwen3.exam.torch.kernels import torch_kernel
from conformance.lanes.eager import run_eager
from conformance.numerics.arithmetic import Arithmetic
from conformance.reports.text import replay_command
from conformance.tests.transformers_kernels import transformers_kernel

#: Norm weights that bf16 cannot hold.
WIDE = 1


def keys_of(stage: str, count: int, seed: int = 0, **dims: int) -> list[CaseKey]:
    return list(itertools.islice(stratified_keys(Space.of(stage_named(stage), {"preset": "tiny", **dims}), seed), count))


def verdict_of(key: CaseKey, *, fault: str = "", choices: Choices | None = None, **declared: Any) -> Verdict:
    case = make_case(key)
    return judge(case, run_eager(torch_kernel(key.stage, choices, fault), case), **declared)


# -- more accurate is never wrong ------------------------------------------------------------------------------------------------

FINER = {
    "the activation in fp32": ("mlp", Choices(inside="fp32")),
    "the activation in tf32": ("mlp", Choices(inside="tf32")),
    "the activation in fp32, gate and up in bf16": ("mlp", Choices(inside="fp32", gate=True, up=True)),
    "the final norm in fp32": ("lm_head", Choices(inside="fp32")),
    "the deferred final norm in tf32": ("lm_head", Choices(inside="tf32", deferred_final_norm=True)),
    "the normalised value in fp16": ("rms_norm", Choices(normalised="fp16")),
    "a normalised head in fp16, then in bf16": ("qk_norm", Choices(normalised="fp16", before_rope=True)),
    "the final norm through fp16": ("lm_head", Choices(normalised="fp16")),
    "probabilities in fp16": ("attention", Choices(probabilities="fp16")),
}


@pytest.mark.parametrize(("stage", "choices"), FINER.values(), ids=FINER)
def test_a_finer_format_passes_unless_the_kernel_says_that_it_rounds_to_bf16(stage: str, choices: Choices) -> None:
    held_to_it = []
    for key in keys_of(stage, len(stage_named(stage).regimes)):
        verdict = verdict_of(key, choices=choices)
        assert verdict.ok, f"{key}: {verdict.findings[0].message}"
        held_to_it.append(verdict_of(key, choices=choices, profile="contract").ok)
    assert not all(held_to_it)


def test_fp16_that_loses_what_bf16_keeps_is_not_finer() -> None:
    """A small activation is a subnormal number of fp16, whose error is a hundred times that of bf16."""
    fault = "activation_in_fp16"
    assert not verdict_of(keys_of("mlp", 2)[1], fault=fault).ok  # the second regime is the small one


@pytest.mark.parametrize("stage", ["mlp", "decode_layer"])
def test_silu_may_be_rounded(stage: str) -> None:
    """As vLLM, sglang, Liger, unsloth, transformers and mlx do."""
    for key in keys_of(stage, 4, **({"S": 48} if stage == "decode_layer" else {})):
        verdict = verdict_of(key, choices=Choices(gate=True, up=True, silu_rounded=True))
        assert verdict.ok, f"{key}: {verdict.findings[0].message}"


def test_most_norm_weights_are_bf16_numbers() -> None:
    """Whoever keeps them in bf16 then loses nothing. One seed in three has others, so that this is no habit of the data."""
    exact: list[bool] = []
    for seed in range(6):
        case = make_case(CaseKey.parse(f"decode_layer:tiny:B=1,S=48,seq_lens=5:normal:{seed}"))
        norms = [weight for name, weight in case.inputs.items() if "norm_weight" in name or "rms_weight" in name]
        held = {torch.equal(weight, weight.to(torch.bfloat16).float()) for weight in norms}
        assert len(held) == 1
        exact += held
    assert exact == [True, False, True, True, False, True]


# -- declared precision ----------------------------------------------------------------------------------------------------------

DECLARED = {
    "norm weights": [("rms_norm", "gamma_in_bf16"), ("qk_norm", "gamma_in_bf16"), ("lm_head", "gamma_in_bf16")],
    "rope tables": [("rope", "bf16_tables"), ("decode_layer", "bf16_tables")],
    "rotation products": [("rope", "rotation_in_bf16")],
    "scores": [("attention", "bf16_scores"), ("decode_layer", "bf16_scores")],
    "projection": [("qkv_proj", "bf16_result")],
    "result": [("o_proj", "bf16_result")],
    "logits": [("lm_head", "bf16_result")],
}


@pytest.mark.parametrize(("name", "stage", "fault"), [(name, *one) for name, some in DECLARED.items() for one in some])
def test_a_rounding_is_right_where_it_is_declared_and_wrong_elsewhere(name: str, stage: str, fault: str) -> None:
    layers = stage_named(stage).composite
    found = []
    for key in keys_of(stage, 3 if layers else 6, **({"S": 48} if layers else {})):
        key = dataclasses.replace(key, seed=WIDE)
        verdict = verdict_of(key, fault=fault, rounds=(name,))
        assert verdict.ok, f"{key}: {verdict.findings[0].message}"
        assert verdict_of(key, rounds=(name,)).ok, "a kernel may do less than it declares"
        found.append(verdict_of(key, fault=fault).ok)
    assert layers or not all(found)


def test_another_mistake_is_found_beside_what_is_declared() -> None:
    for fault in ("position_one_too_small", "theta_1e4", "sine_and_cosine_exchanged"):
        assert not verdict_of(keys_of("rope", 1)[0], fault=fault, rounds=("rope tables", "rotation products")).ok


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("stage", "count"), [("decode_layer", 5), ("decode_fwd", 3)])
def test_transformers_in_bf16_passes_under_its_policy_and_under_no_less(stage: str, count: int, attention: str) -> None:
    dims = {"S": 48, "L": 2} if stage == "decode_fwd" else {"S": 48}
    kernel = transformers_kernel(stage, attention, precision="torch_bf16")
    for key in keys_of(stage, count, seed=5, **dims):
        case = make_case(dataclasses.replace(key, seed=WIDE))
        oracle, outcome = Oracle(case), run_eager(kernel, case)
        assert outcome.status == "ok", outcome.message
        verdict = judge(case, outcome, oracle=oracle, **kernel.judged_by)
        assert verdict.ok, f"{key}: {verdict.findings[0].message}"
    assert not judge(case, outcome, oracle=oracle).ok


def test_what_all_modules_round_is_wrong_in_a_model_that_was_converted_with_its_frequencies() -> None:
    """What the policy covers is not anything: frequencies in bf16 lose the position, and are found by their columns."""
    kernel = transformers_kernel("decode_fwd", "eager", precision="torch_bf16", frequencies_in_bf16=True)
    case = make_case(CaseKey.parse("decode_fwd:tiny:B=2,L=2,S=48,seq_lens=48+46:mixed_rows:1168200275"))
    verdict = judge(case, run_eager(kernel, case), **kernel.judged_by)
    assert "element" in {finding.detector for finding in verdict.findings}


def test_the_oracle_makes_what_is_done_to_an_input_and_models_the_rest() -> None:
    """In a layer one profile has the tables rounded and one has not; places are roundings that may be made or not."""
    profiles = allowed_profiles(stage_named("decode_layer"), None, ("rope tables", "scores"))
    assert {one.inputs for one in profiles} == {frozenset({"rope_cos", "rope_sin"}), frozenset()}
    assert {one.declared for one in profiles} == {frozenset({"unscaled scores", "scores"})}
    assert profiles[0].inputs, "what a kernel says that it does is tried first"
    assert len({one.name for one in profiles}) == len(profiles)
    single = allowed_profiles(stage_named("attention"), None, ("scores",))
    assert {one.declared for one in single} == {
        frozenset(some) for some in ((), ("scores",), ("unscaled scores",), ("scores", "unscaled scores"))
    }


class _Names(Arithmetic):
    """The names by which a reference calls its places."""

    def __init__(self) -> None:
        super().__init__(torch.float64, rounds=True)
        self.found: set[str] = set()

    def optional(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        self.found.add(name)
        return tensor

    unrounded = declarable = optional


@pytest.mark.parametrize("stage", [name for name, stage in conformance.stages().items() if stage.composite])
def test_what_may_be_declared_of_layers_are_inputs_and_places_of_the_reference(stage: str) -> None:
    contract, names = stage_named(stage), _Names()
    case = make_case(keys_of(stage, 1, B=1, S=16)[0])
    contract.reference(case.inputs, case.dims, names)
    for members in contract.declarable.values():
        assert set(members) <= set(case.inputs) or set(members) <= names.found


def test_unknown_names_are_an_error_that_lists_the_stages_own() -> None:
    with pytest.raises(UsageError, match="no rounding 'tables' to declare; it has rope tables, rotation products"):
        conformance.kernel("rope", rounds=("tables",))
    with pytest.raises(UsageError, match="no precision 'bf16'; it has contract, torch_bf16"):
        conformance.kernel("rope", precision="bf16")
    with pytest.raises(UsageError, match="rounds is a list of names, found 'rope tables'"):
        conformance.kernel("rope", rounds="rope tables")
    with pytest.raises(UsageError, match="no ties"):
        conformance.kernel("rope", ties="any")
    with pytest.raises(UsageError, match="ties is one of lowest, any"):
        conformance.kernel("greedy_sample", ties="first")
    assert declared_names(stage_named("rope"), (), "torch_bf16") == ("rope tables", "rotation products")


def test_the_command_lists_the_names_and_takes_them() -> None:
    listed = CliRunner().invoke(main, ["list"]).output
    assert "may be declared: rope tables, rotation products, precision=torch_bf16" in listed
    assert "may be declared: ties=any" in listed
    told = CliRunner().invoke(main, ["check", "rope", "--rounds", "tables"])
    assert told.exit_code == 2
    options = {"rounds": "rope tables", "precision": "torch_bf16", "ties": "any"}
    again = replay_command("rope", "mine.py", "mine", "rope:tiny:B=1,seq_lens=1:normal:1", options=options)
    assert again is not None
    assert "'--rounds=rope tables' --precision=torch_bf16 --ties=any" in again
    assert "it has rope tables, rotation products" in told.output


# -- what would explain a finding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "fault", "explained"),
    [
        (
            "rope",
            "bf16_tables",
            "every error is explained by rope tables rounded to bf16; if that is meant, declare rounds=('rope tables',)",
        ),
        ("lm_head", "bf16_result", "declare rounds=('logits',)"),
        ("lm_head", "gain", None),
    ],
)
def test_a_finding_says_what_would_explain_it(stage: str, fault: str, explained: str | None) -> None:
    report = conformance.check(stage, torch_kernel(stage, fault=fault), examples=3)
    assert report.findings
    for one in report.findings:
        assert one.finding.message.endswith(explained) if explained else "explained" not in one.finding.message


def test_two_roundings_explain_together_what_neither_does_alone() -> None:
    def both(q: Any, k: Any, seq_lens: Any, rope_cos: Any, rope_sin: Any, q_out: Any, k_out: Any, *, dims: Any) -> None:
        class Rounding(Arithmetic):
            def declarable(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
                return self.round(tensor)

        tables = {name: table.bfloat16().float() for name, table in (("rope_cos", rope_cos), ("rope_sin", rope_sin))}
        inputs = {"q": q, "k": k, "seq_lens": seq_lens, **tables}
        found = stage_named("rope").reference(inputs, dims, Rounding(torch.float64, rounds=True))
        q_out.copy_(found["q_out"])
        k_out.copy_(found["k_out"])

    report = conformance.check("rope", both, examples=2)
    message = report.findings[0].finding.message
    assert message.endswith(
        "explained by rope tables and rotation products rounded to bf16; if that is meant, "
        "declare rounds=('rope tables', 'rotation products')"
    )
    assert conformance.check("rope", both, examples=2, precision="torch_bf16").ok
    # What it declares already is part of what it has to declare.
    (first, *_) = conformance.check("rope", both, examples=2, rounds=("rotation products",)).findings
    assert first.finding.message.endswith(
        "explained by rope tables rounded to bf16; if that is meant, declare rounds=('rotation products', 'rope tables')"
    )


# -- ties ------------------------------------------------------------------------------------------------------------------------


def test_another_index_of_equal_logits_is_told_as_what_it_is_and_may_be_declared() -> None:
    key = CaseKey.parse("greedy_sample:tiny:B=3:ties:1")
    (finding,) = verdict_of(key, fault="highest_index_on_a_tie").findings
    assert "a tie: what both stand for is equal, and the contract takes the lowest" in finding.message
    assert "declare ties='any'" in finding.message
    assert verdict_of(key, fault="highest_index_on_a_tie", ties="any").ok
    (finding,) = verdict_of(key, fault="index_off_by_one", ties="any").findings
    assert "tie" not in finding.message
