"""Runs at a model's real size, here at a small one: cases that share their weights, and steps that go on from the last."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.cases.source import SharedDraws
from conformance.cases.space import Space
from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel
from conformance.contract.registry import stage_named
from conformance.kernels.qwen3.capabilities import _shares_pages
from conformance.kernels.qwen3.reference import LAYER_WEIGHTS
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import same_bits
from conformance.lanes.eager import run_eager
from conformance.lanes.messages import Passes
from conformance.numerics.arithmetic import SINGLE
from conformance.running.real_size import SMALL_BATCH, STEPS, host_bytes, runs_at_real_size
from conformance.running.runs import Judged
from conformance.tests.reference_kernels import SMALL, reference_kernel

Tensor = torch.Tensor


def at_small_size(kernel: Kernel, cases: list[Case]) -> list[Judged]:
    stage = kernel.stage
    sizes = {**SMALL, "B": 5, **({"L": 3} if "L" in stage.drawn else {}), **({"NB": 40} if "NB" in stage.drawn else {})}

    def run(case: Case, passes: Passes = "last") -> Outcome:
        cases.append(case)
        return run_eager(kernel, case)

    return list(runs_at_real_size(kernel, Space.of(stage, sizes), run, repeats=2))


@pytest.mark.parametrize("stage", ["decode_layer", "decode_fwd", "paged_decode_fwd", "prefill_fwd", "mlp"])
def test_a_correct_kernel_passes_on_one_set_of_weights(stage: str) -> None:
    contract, cases = stage_named(stage), list[Case]()
    steps = STEPS if contract.following is not None else 0
    runs = at_small_size(reference_kernel(stage, capabilities=("variable_batch",)), cases)
    assert [finding for judged in runs for finding in judged.verdict.findings] == []
    checks = [judged.check for judged in runs if not judged.check.startswith("capability")]
    assert checks == ["example", "repeat", "example", *(["example"] if steps else []), *["step"] * steps]
    assert runs[-1].check == "capability:variable_batch"
    own = cases[: 1 + 2 + 1 + (1 + steps if steps else 0)]
    assert {case.dims.B for case in own} == {5, SMALL_BATCH}
    weights = [argument.name for argument in contract.inputs if argument.name in (*LAYER_WEIGHTS, "lm_head_weight", "w_gate")]
    matrices = [name for name in weights if own[0].inputs[name].dtype == torch.bfloat16]
    assert matrices
    for name in matrices:
        assert len({id(case.inputs[name]) for case in own}) == 1, name


def test_a_step_that_forgets_what_the_one_before_it_wrote_is_found_in_the_steps_alone() -> None:
    last: dict[str, Tensor] = {}

    def forget(inputs: dict[str, Tensor], dims: Dims) -> None:
        """Go on with the caches that the call before had, where the sequences are those of the call before."""
        given = {name: inputs[name].clone() for name in ("seq_lens", "k_cache", "v_cache")}
        if last and last["seq_lens"].shape == given["seq_lens"].shape and torch.equal(last["seq_lens"] + 1, given["seq_lens"]):
            inputs.update(k_cache=last["k_cache"].clone(), v_cache=last["v_cache"].clone())
        last.update(given)

    runs = at_small_size(reference_kernel("decode_fwd", before=forget), [])
    failed = [judged for judged in runs if not judged.verdict.ok]
    assert [judged.check for judged in failed] == ["step"]
    assert failed[0].verdict.findings[0].message.startswith("one step after this case, which by itself passes: ")
    assert failed[0] is runs[-1]


def test_nothing_follows_once_a_case_is_wrong() -> None:
    def spoil(outputs: dict[str, Tensor], dims: Dims) -> None:
        outputs["logits"][0, 3] += 10

    runs = at_small_size(reference_kernel("decode_fwd", after=spoil), [])
    assert {judged.check for judged in runs} <= {"example", "repeat"}
    assert not runs[0].verdict.ok


@pytest.mark.parametrize("seed", range(3))
def test_a_sequence_goes_on_in_a_page_that_nobody_owns(seed: int) -> None:
    overrides = tuple({**SMALL, "L": 2, "NB": 24, "B": 3}.items())
    case = make_case(CaseKey("paged_decode_fwd", "tiny", "normal", seed, overrides, seq_lens=(8, 15, 16)))
    outputs = case.stage.reference(case.inputs, case.dims, SINGLE)
    outputs = {one.name: outputs[one.name].to(one.dtype) for one in case.stage.outputs}
    following = case.stage.following
    assert following is not None
    found = following(case.inputs, outputs, case.dims)
    assert found is not None
    assert found["seq_lens"].tolist() == [9, 16, 17]
    before, table = (tensors["block_table"].view(3, -1) for tensors in (case.inputs, found))
    begun = [(0, 1), (2, 2)]
    assert [tuple(at) for at in (before != table).nonzero().tolist()] == begun
    new = {int(table[at]) for at in begun}
    assert len(new) == 2
    assert not new & set(before.flatten().tolist())
    assert case.dims.NB - 1 not in new
    pages = [int(table[0, 1]), int(table[1, 1]), int(table[2, 2])]
    assert found["slot_mapping"].tolist() == [pages[0] * 8, pages[1] * 8 + 7, pages[2] * 8]
    for name in ("k_cache", "v_cache"):
        cache = found[name].view(case.dims.L, case.dims.NB, -1)
        assert bool(torch.isfinite(cache[:, sorted(new)]).all())
        old = sorted(set(before.flatten().tolist()) - {-1})
        assert same_bits(cache[:, old], outputs[name].view(cache.shape)[:, old])
    again = dataclasses.replace(case, inputs=found)
    assert not _shares_pages(again) or _shares_pages(case)


def test_no_step_follows_the_longest() -> None:
    overrides = tuple({**SMALL, "L": 1, "B": 2}.items())
    case = make_case(CaseKey("decode_fwd", "tiny", "normal", 1, overrides, seq_lens=(40, 7)))
    outputs = {**case.inputs, "logits": torch.zeros(2, case.dims.V)}
    assert case.stage.following is not None
    assert case.stage.following(case.inputs, outputs, case.dims) is None


def test_shared_draws_are_those_that_are_not_shared_and_one_that_was_changed_is_drawn_anew() -> None:
    keys = [CaseKey("mlp", "tiny", regime, 5, (("B", batch),)) for regime in ("normal", "cancel") for batch in (2, 4)]
    shared, before = SharedDraws(), None
    for key in keys:
        case, alone = make_case(key, shared), make_case(key)
        assert all(same_bits(tensor, alone.inputs[name]) for name, tensor in case.inputs.items())
        same = before is not None and case.inputs["w_gate"] is before.inputs["w_gate"]
        assert same == (key.regime == "normal" and key.dims.B == 4)  # cancelling pairs are written into what was drawn
        before = case
    case = make_case(keys[0], shared)
    case.inputs["w_up"][0, 0] += 1
    assert same_bits(make_case(keys[0], shared).inputs["w_up"], make_case(keys[0]).inputs["w_up"])


def test_memory_grows_with_what_is_judged() -> None:
    stage = stage_named("decode_fwd")
    dims = Space.of(stage, {"preset": "qwen3_14b", "B": 16, "S": 2048, "L": 40}).limit
    bytes_of_weights = 40 * 2 * (dims.H * (dims.NH + 2 * dims.NKV) * dims.D + dims.NH * dims.D * dims.H + 3 * dims.H * dims.I)
    assert 2 * bytes_of_weights < host_bytes(stage, dims) < 5 * bytes_of_weights
