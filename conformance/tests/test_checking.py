"""``conformance.check`` as a user meets it: what it runs, what it says, and what it refuses."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import conformance
from conformance.cases.case import make_case
from conformance.cases.key import CaseKey
from conformance.cases.space import Space, interleaved_keys, stratified_keys
from conformance.contract.kernel import as_kernel
from conformance.contract.loading import load_module
from conformance.contract.registry import model_named, presets, stage_named
from conformance.kernels.qwen3.exam.torch.choices import Choices
from conformance.kernels.qwen3.exam.torch.kernels import torch_kernel
from conformance.lanes.eager import run_eager
from conformance.running.check import case_runs
from conformance.running.plans import ROW_CHECK_PERIOD, SEARCHED_FIRST, Plans, RunPlan, is_searched
from conformance.running.runners import eager_runner

Tensor = torch.Tensor
STAGES = list(conformance.stages())


def right_norm(x: Tensor, weight: Tensor, out: Tensor) -> None:
    wide = x.float()
    out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight)


def wrong_norm(x: Tensor, weight: Tensor, out: Tensor) -> None:
    wide = x.float()
    out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6))


def one_line_error(**keywords: Any) -> str:
    arguments: dict[str, Any] = {"stage": "rms_norm", "function": right_norm, "examples": 1} | keywords
    with pytest.raises(conformance.UsageError) as error:
        conformance.check(arguments.pop("stage"), arguments.pop("function"), **arguments)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_plain_function_with_the_contracts_names_is_enough() -> None:
    report = conformance.check("rms_norm", right_norm, examples=8)
    assert report.ok
    assert report.examples == 8
    assert report.findings == ()
    assert (report.stage, report.kernel, report.lane) == ("rms_norm", "right_norm", "eager")
    assert report.share is not None
    assert 0 < report.share < 1
    assert str(report).startswith("right_norm (rms_norm, eager): passed 8 cases of tiny and awkward, at most 0.")


def test_a_report_of_findings_tells_what_where_how_much_and_how_to_see_it_again() -> None:
    report = conformance.check("rms_norm", wrong_norm, examples=4)
    assert not report.ok
    text = str(report)
    assert re.search(r"wrong_norm \(rms_norm, eager\): FAILED \d+ of \d+ runs of 4 cases", text)
    assert "element in out, " in text
    assert re.search(r"outside the legal|must be\s+exactly", text)
    worst = report.findings[0]
    assert "case " + str(worst.case) in text.replace("\n      ", " ")
    again = conformance.check("rms_norm", wrong_norm, case=str(worst.case))
    assert again.findings[0].finding == worst.finding
    assert again.examples == 1


def test_findings_stand_worst_first() -> None:
    findings = conformance.check("rms_norm", wrong_norm, examples=8).findings
    elements = [entry.finding.magnitude for entry in findings if entry.finding.detector == "element"]
    assert len(elements) > 4
    assert elements == sorted(elements, reverse=True)
    assert findings[0].detector == "element"


def test_a_check_follows_from_its_seed() -> None:
    first, again, other = (conformance.check("rms_norm", wrong_norm, examples=3, seed=seed) for seed in (1, 1, 2))
    assert [run.case for run in first.runs] == [run.case for run in again.runs]
    assert [entry.finding for entry in first.findings] == [entry.finding for entry in again.findings]
    assert {run.case for run in first.runs}.isdisjoint({run.case for run in other.runs})


def test_more_examples_begin_with_the_same_ones() -> None:
    few, many = (conformance.check("rms_norm", right_norm, examples=count) for count in (3, 9))
    assert [run.case for run in few.runs] == [run.case for run in many.runs][: len(few.runs)]


def test_every_case_is_repeated_and_rows_are_moved_now_and_then() -> None:
    report = conformance.check("rms_norm", right_norm, examples=5 * ROW_CHECK_PERIOD)
    checks = [run.check for run in report.runs]
    assert checks.count("example") == checks.count("repeat") == 5 * ROW_CHECK_PERIOD
    assert "permuted_rows" in checks
    assert any(run.check.startswith("lone_row") and len(run.case.rows) == 1 for run in report.runs)


def test_what_a_repeat_shows_again_is_counted_once() -> None:
    report = conformance.check("rms_norm", wrong_norm, examples=3)
    assert [run.check for run in report.runs] == ["example"] * 3
    assert len({(str(entry.case), entry.detector, entry.argument) for entry in report.findings}) == len(report.findings)
    assert "FAILED 3 of 3 runs of 3 cases" in str(report)
    lone = conformance.check("rms_norm", wrong_norm, examples=1)
    assert "FAILED 1 of 1 run of 1 case" in str(lone)


def test_a_repeat_has_the_findings_that_are_its_own() -> None:
    calls = itertools.count()

    def flips(x: Tensor, weight: Tensor, out: Tensor) -> None:
        wrong_norm(x, weight, out)
        out[0, 3] = torch.nan if next(calls) % 2 else out[0, 3]

    first, repeat = conformance.check("rms_norm", flips, examples=1).runs
    assert (first.check, repeat.check) == ("example", "repeat")
    of_first = {finding.detector for finding in first.verdict.findings}
    assert "element" in of_first
    detectors = [finding.detector for finding in repeat.verdict.findings]
    assert {"not_finite", "nondeterministic"} <= set(detectors)
    messages = {finding.message for finding in first.verdict.findings}
    assert messages.isdisjoint({finding.message for finding in repeat.verdict.findings})


@pytest.mark.parametrize("reorders_sums", [False, True])
def test_sums_in_another_order_are_no_finding_where_the_kernel_declares_them(reorders_sums: bool) -> None:
    calls = itertools.count()

    @conformance.kernel("qkv_proj", reorders_sums=reorders_sums)
    def split(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        half = x.shape[1] // (2 if next(calls) % 2 else 4)
        for weight, out in ((wq, q), (wk, k), (wv, v)):
            first, second = (x[:, part].float() @ weight[part].float() for part in (slice(half), slice(half, None)))
            out.copy_(first + second)

    report = conformance.check("qkv_proj", split, examples=3)
    assert report.detectors == (() if reorders_sums else ("nondeterministic",))

    @conformance.kernel("qkv_proj", reorders_sums=reorders_sums)
    def wrong_now_and_then(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        split(x, wq, wk, wv, q, k, v)
        q[0, 0] += next(calls) % 2

    assert "element" in conformance.check("qkv_proj", wrong_now_and_then, examples=3).detectors


def test_the_first_cases_with_several_rows_have_the_row_checks() -> None:
    one, several = (CaseKey.parse(f"rms_norm:tiny:B={rows}:normal:1") for rows in (1, 3))
    plans = Plans("eager", stage_named("rms_norm"))
    keys = [one, several, one, one, several, *[several] * 4]
    taken = [plans.following(key) for key in keys]
    assert all(plan.repeats == 1 for plan in taken)
    with_rows = [plan for plan, key in zip(taken, keys, strict=True) if key is several]
    assert [plan.permuted for plan in with_rows] == [True, False, False, False, False, True]
    assert [plan.lone for plan in with_rows] == [False, True, False, False, False, False]
    assert not any(plan.all_passes for plan in taken)


def test_dims_reach_a_kernel_that_asks_for_them() -> None:
    seen = set()

    def asks(x: Tensor, weight: Tensor, out: Tensor, *, dims: conformance.Dims) -> None:
        seen.add((dims.B, dims.H))
        assert x.shape == (dims.B, dims.H)
        right_norm(x, weight, out)

    assert conformance.check("rms_norm", asks, dims={"B": 3, "NH": 2}, examples=3).ok
    assert (3, 128) in seen
    assert {batch for batch, _ in seen} <= {1, 3}


def test_awkward_dims_by_name_and_overrides_of_them() -> None:
    assert conformance.check("rms_norm", right_norm, dims="awkward", examples=2).ok
    report = conformance.check("rms_norm", right_norm, dims={"preset": "awkward", "B": 2}, examples=2)
    assert {run.case.preset for run in report.runs} == {"awkward"}
    assert {run.case.dims.B for run in report.runs} == {2}


def masked_for_a_power_of_two(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Sums whole tiles and takes the tail's mask for full: the mean is over the next power of two."""
    wide = x.float()
    padded = 1 << (x.shape[1] - 1).bit_length()
    out.copy_(wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / padded + 1e-6) * weight)


def test_a_tail_that_is_masked_wrongly_is_found_without_naming_a_preset() -> None:
    assert conformance.check("rms_norm", masked_for_a_power_of_two, dims="tiny", examples=8).ok
    report = conformance.check("rms_norm", masked_for_a_power_of_two, examples=4)
    assert {entry.case.preset for entry in report.findings} == {"awkward"}
    assert "element in out, 2 cases, only of awkward" in str(report)
    replay = conformance.check("rms_norm", masked_for_a_power_of_two, case=str(report.findings[0].case))
    assert replay.findings[0].finding == report.findings[0].finding


@pytest.mark.parametrize("stage", ["rms_norm", "attention", "decode_fwd_layers", "prefill_layer"])
def test_few_cases_are_of_all_presets_and_of_all_kinds_of_data(stage: str) -> None:
    contract = conformance.stages()[stage]
    spaces = Space.those_of(contract)
    assert [space.preset for space in spaces] == list(model_named(contract.model).check_presets)
    keys = list(itertools.islice(interleaved_keys(spaces, 0), contract.examples))
    first = keys[: len(contract.regimes)]
    assert [key.preset for key in first[:2]] == [space.preset for space in spaces]
    assert {key.regime for key in first} == set(contract.regimes)
    for space in spaces:  # later on each of them with each
        assert {key.regime for key in keys if key.preset == space.preset} == set(contract.regimes)


@pytest.mark.parametrize(("taken", "other"), [("tiny", "awkward"), ("awkward", "tiny")])
def test_a_kernel_that_takes_one_of_the_presets_is_judged_there_alone(taken: str, other: str) -> None:
    width = presets()[taken].H

    @conformance.kernel("rms_norm", accepts=lambda dims: width == dims.H or f"H must be {width}", capabilities=["variable_batch"])
    def picky(x: Tensor, weight: Tensor, out: Tensor) -> None:
        assert x.shape[1] == width
        right_norm(x, weight, out)

    report = conformance.check("rms_norm", picky, examples=6)
    assert report.ok, report
    assert report.examples == 6
    assert {run.case.preset for run in report.runs} == {taken}
    assert any(run.check == "capability:variable_batch" for run in report.runs)
    assert report.refused == {other: f"H must be {width}"}
    assert f"no case of {other}: H must be {width}" in str(report)


def test_a_kernel_gets_copies_so_it_cannot_spoil_the_next_run() -> None:
    def spoils(x: Tensor, weight: Tensor, out: Tensor) -> None:
        right_norm(x, weight, out)
        x.zero_()
        weight.zero_()

    report = conformance.check("rms_norm", spoils, examples=3)
    assert report.detectors == ("changed_input",)


def test_an_exception_is_a_finding_with_its_place() -> None:
    def fails(x: Tensor, weight: Tensor, out: Tensor) -> None:
        raise ValueError("no tile for\nthis shape")

    report = conformance.check("rms_norm", fails, examples=2)
    assert report.detectors == ("raised",)
    assert re.fullmatch(r"ValueError: no tile for \(test_checking.py:\d+\)", report.findings[0].message)


def test_an_interrupt_is_not_a_finding() -> None:
    def stops(x: Tensor, weight: Tensor, out: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conformance.check("rms_norm", stops, examples=1)


def test_what_a_kernel_refuses_is_not_judged() -> None:
    @conformance.kernel("rms_norm", accepts=lambda dims: dims.B > 1 or "B must be at least 2")
    def picky(x: Tensor, weight: Tensor, out: Tensor) -> None:
        assert len(x) > 1
        right_norm(x, weight, out)

    report = conformance.check("rms_norm", picky, examples=10)
    assert report.ok
    assert report.examples == 10
    assert all(dict(run.case.overrides)["B"] > 1 for run in report.runs)
    message = one_line_error(function=picky, dims={"B": 1})
    assert message == "kernel picky takes none of these cases: B must be at least 2"


def test_a_declared_profile_is_held_to() -> None:
    rounds = torch_kernel("o_proj", Choices(branch=True))
    assert conformance.check("o_proj", rounds, examples=2).ok
    declared = conformance.kernel("o_proj", profile="contract")(rounds.function)
    assert conformance.check("o_proj", declared, examples=2).detectors == ("element",)


def test_nothing_judged_is_not_a_pass() -> None:
    assert not conformance.Report("rms_norm", "none", "eager", ()).ok


def with_defaults(x: Tensor, weight: Tensor, out: Tensor, eps: float = 1e-6, block: int = 0) -> None:
    assert (eps, block) == (1e-6, 0)
    right_norm(x, weight, out)


def with_a_default_in_between(x: Tensor, block: int = 0, *, weight: Tensor, out: Tensor) -> None:
    assert block in (0, 4)
    right_norm(x, weight, out)


def by_keyword_alone(**tensors: Tensor) -> None:
    assert set(tensors) == {"x", "weight", "out"}
    right_norm(**tensors)


def with_more_keywords(x: Tensor, weight: Tensor, out: Tensor, **more: Any) -> None:
    assert not more
    right_norm(x, weight, out)


def block_before_the_rest(x: Tensor, block: int, weight: Tensor, out: Tensor) -> None:
    assert block == 4
    right_norm(x, weight, out)


class Norm(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor, out: Tensor, eps: float = 1e-6) -> None:
        right_norm(x, weight, out)


@functools.wraps(right_norm)
def wrapped(*tensors: Tensor, **keywords: Any) -> None:
    right_norm(*tensors, **keywords)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (with_defaults, "with_defaults"),
        (with_a_default_in_between, "with_a_default_in_between"),
        (by_keyword_alone, "by_keyword_alone"),
        (lambda x, eps=1e-6, **more: right_norm(x, **more), "<lambda>"),
        (with_more_keywords, "with_more_keywords"),
        (lambda *tensors: right_norm(*tensors), "<lambda>"),
        (lambda x, *rest: right_norm(x, *rest), "<lambda>"),
        (functools.partial(with_defaults, eps=1e-6), "with_defaults"),
        (functools.partial(functools.partial(block_before_the_rest), block=4), "block_before_the_rest"),
        (Norm(), "Norm"),
        (Norm().forward, "forward"),
        (wrapped, "right_norm"),
    ],
)
def test_whatever_takes_the_arguments_by_name_is_a_kernel(function: Callable[..., Any], name: str) -> None:
    report = conformance.check("rms_norm", function, examples=2)
    assert report.ok, report
    assert report.kernel == name


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda out, x, weight: None, "out, x, weight"),
        (lambda x, weight, out, eps: None, "x, weight, out, eps"),
        (lambda out, x, **more: None, "out, x"),
        (lambda weight, out, *rest: None, "weight, out"),
        (functools.partial(with_defaults, torch.zeros(1)), "weight, out, eps, block"),
    ],
)
def test_what_takes_them_otherwise_is_refused(function: Callable[..., Any], found: str) -> None:
    assert one_line_error(function=function).endswith(f"expected (x, weight, out), found ({found})")


def test_a_partial_of_a_module_is_found_by_a_worker(tmp_path: Path) -> None:
    (tmp_path / "partials.py").write_text(
        "import functools\n"
        "def scaled(x, weight, out, eps):\n"
        "    wide = x.float()\n"
        "    out.copy_(wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight)\n"
        "norm = functools.partial(scaled, eps=1e-6)\n"
    )
    norm = load_module(str(tmp_path / "partials.py")).norm
    report = conformance.check("rms_norm", norm, isolated=True, examples=2, name="a norm")
    assert (report.ok, report.kernel) == (True, "a norm")


def test_a_kernel_is_called_as_the_caller_says() -> None:
    report = conformance.check("rms_norm", functools.partial(wrong_norm), name="fused norm v2", examples=1)
    assert report.kernel == "fused norm v2"
    assert str(report).startswith("fused norm v2 (rms_norm, eager): FAILED")
    assert "name is what the kernel is called" in one_line_error(name=" ")


def test_progress_is_told_after_every_run() -> None:
    told: list[tuple[int, int, int]] = []
    report = conformance.check("rms_norm", wrong_norm, examples=3, progress=lambda *numbers: told.append(numbers))
    assert [done for done, _, _ in told] == [1, 2, 3]
    assert {planned for _, planned, _ in told} == {3}
    assert told[-1][2] == len(report.findings)
    assert "progress is True, or a callable" in one_line_error(progress="yes")


def test_progress_is_shown_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    conformance.check("rms_norm", right_norm, examples=3)
    assert capsys.readouterr() == ("", "")
    conformance.check("rms_norm", right_norm, examples=3, progress=True)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("right_norm eager: 1 of 3 cases, 0 findings")


@pytest.mark.parametrize("examples", [0, -1, 2.5, True, "3"])
def test_examples_that_make_no_sense_are_refused(examples: object) -> None:
    assert one_line_error(examples=examples) == f"examples must be a positive whole number, found {examples!r}"


@pytest.mark.parametrize("seed", [-1, 0.5, None, True])
def test_seeds_that_make_no_sense_are_refused(seed: object) -> None:
    assert one_line_error(seed=seed) == f"seed must be a whole number, not negative, found {seed!r}"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"stage": "rmsnorm"}, "unknown stage 'rmsnorm'; known are rms_norm, qkv_proj"),
        ({"dims": "huge"}, "unknown preset 'huge'; known are tiny, narrow, awkward, qwen3_0_6b, qwen3_1_7b"),
        ({"dims": {"Q": 3}}, "unknown dimension 'Q'; known are B"),
        ({"dims": {"B": 0}}, "dimension B must be a positive whole number, found 0"),
        ({"dims": ["B", 3]}, "dims is a preset's name or a dict such as {'B': 3, 'S': 64}, found ['B', 3]"),
        ({"lane": "interpret"}, "a torch kernel has no lane 'interpret'; it has eager"),
        ({"case": "rms_norm"}, "cannot read case key 'rms_norm'; a case key looks like"),
        ({"case": "mlp:tiny:B=1:normal:0"}, "case key mlp:tiny:B=1:normal:0 is of stage mlp, not of rms_norm"),
        ({"case": "rms_norm:tiny:B=1:needle:0"}, "stage rms_norm has no regime 'needle'"),
        ({"function": 3}, "a kernel must be callable, found int"),
        (
            {"function": lambda x, out: None},
            "must take the arguments of rms_norm by name and order: expected (x, weight, out), found (x, out)",
        ),
        ({"function": torch_kernel("mlp")}, "kernel mlp implements mlp, not rms_norm"),
    ],
)
def test_what_cannot_be_judged_as_asked_is_refused_in_one_line(keywords: dict[str, Any], message: str) -> None:
    assert message in one_line_error(**keywords)


def resized(tensor: Tensor) -> None:
    tensor.resize_(len(tensor) + 1, *tensor.shape[1:])


def resized_beyond_its_storage(tensor: Tensor) -> None:
    tensor.resize_(1_000_000 + tensor.numel())


def emptied(tensor: Tensor) -> None:
    tensor.resize_(0)


def freed(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def rebound(tensor: Tensor) -> None:
    tensor.data = tensor.clone()


def set_elsewhere(tensor: Tensor) -> None:
    tensor.set_(tensor.clone().untyped_storage(), 0, tensor.shape, tensor.stride())  # type: ignore[call-overload]


@pytest.mark.parametrize("rebinds", [resized, resized_beyond_its_storage, emptied, freed, rebound, set_elsewhere])
def test_an_output_stays_the_tensor_that_was_passed(rebinds: Callable[[Tensor], None]) -> None:
    def kernel(x: Tensor, weight: Tensor, out: Tensor) -> None:
        right_norm(x, weight, out)
        rebinds(out)

    report = conformance.check("rms_norm", kernel, examples=2)
    assert report.detectors == ("raised",)
    # Where it would need more memory than there is, torch itself refuses.
    told = ("a kernel writes its outputs in the memory that it is given; kernel ", "storage that is not resizable")
    assert any(text in report.findings[0].message for text in told)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resized_output_is_noticed_in_every_stage(stage: str) -> None:
    """By a row, in either direction: where nothing else of the run is wrong. Nothing is judged, so it is cheap."""
    contract = conformance.stages()[stage]
    case = make_case(next(stratified_keys(Space.of(contract, "awkward"), 0)))
    right = torch_kernel(stage)
    assert run_eager(right, case).status == "ok"
    for argument in contract.outputs:
        for rows in (1, -1):

            def resizes(*tensors: Tensor, dims: Any, name: str = argument.name, rows: int = rows) -> None:
                right.function(*tensors, dims=dims)
                named = dict(zip([one.name for one in contract.arguments], tensors, strict=True))
                named[name].resize_(len(named[name]) + rows, *named[name].shape[1:])

            outcome = run_eager(as_kernel(stage, resizes), case)
            size = list(argument.size(case.dims))
            other = [size[0] + rows, *size[1:]]
            assert outcome.status == "raised"
            told = f"made {argument.name} {argument.dtype} {other}, which is {argument.dtype} {size}"
            assert told in outcome.message or (rows > 0 and "storage that is not resizable" in outcome.message)


def test_turning_an_input_round_changes_nothing_for_the_judge() -> None:
    def turned(x: Tensor, weight: Tensor, out: Tensor) -> None:
        right_norm(x, weight, out)
        x.t_()

    assert conformance.check("rms_norm", turned, examples=5).ok


def test_a_kernel_that_exits_is_a_finding_and_the_caller_goes_on() -> None:
    def leaves(x: Tensor, weight: Tensor, out: Tensor) -> None:
        raise SystemExit(0)

    assert conformance.check("rms_norm", leaves, examples=2).detectors == ("raised",)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(mode: Any) -> None:
    with mode():
        assert conformance.check("decode_layer", torch_kernel("decode_layer"), dims={"S": 32, "B": 4}, examples=3).ok
        found = conformance.check("decode_layer", torch_kernel("decode_layer", fault="gain"), dims={"S": 32, "B": 16}, examples=1)
    assert not found.ok


def test_copies_are_bit_exact() -> None:
    def one_step_down(k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, *, dims: Any) -> None:
        torch_kernel("kv_write").function(k, v, slot_mapping, k_cache, v_cache, dims=dims)
        mantissas, _ = torch.frexp(k_cache.float())
        power = mantissas.abs() == 0.5
        slots = slot_mapping.long()
        rows = ((slots // dims.BS).unsqueeze(1) * dims.NKV + torch.arange(dims.NKV)) * dims.BS + (slots % dims.BS).unsqueeze(1)
        touched = torch.zeros(len(k_cache), 1, dtype=torch.bool)
        touched[rows.flatten()] = True
        k_cache.view(torch.int16)[power & touched] -= 1

    report = conformance.check("kv_write", one_step_down, examples=18)
    assert "element" in report.detectors
    assert {entry.finding.argument for entry in report.findings} == {"k_cache"}


def test_the_first_case_has_rows_to_rearrange_and_layers_to_go_round() -> None:
    for stage in conformance.stages():
        for preset in ("tiny", "awkward"):
            first = next(stratified_keys(Space.of(conformance.stages()[stage], preset), 0))
            assert first.dims.B >= 2
            assert first.dims.L >= 2 or "L" not in conformance.stages()[stage].drawn


@pytest.mark.parametrize(("stage", "part"), [("decode_layer", 1 / 4), ("prefill_fwd", 1 / 16)])
def test_of_many_interpreted_cases_a_part_is_searched_for_signatures(stage: str, part: float) -> None:
    keys = list(itertools.islice(stratified_keys(Space.of(stage_named(stage)), 0), 1000))
    searched = [key for key in keys if is_searched(key)]
    assert len(searched) / len(keys) == pytest.approx(part, abs=0.03)
    assert {key.regime for key in searched} == {key.regime for key in keys}


def test_interpreted_cases_are_searched_for_signatures_first_of_all_or_by_their_key_or_when_run_again() -> None:
    kernel = torch_kernel("decode_layer", fault="values_truncated")
    space = Space.of(stage_named("decode_layer"))
    keys = list(itertools.islice(stratified_keys(space, 0), 20))
    plans, cheap = Plans("interpret", space.stage), Plans("eager", space.stage)
    planned = [plans.following(key).signatures for key in keys]
    assert all(cheap.following(key).signatures for key in keys)
    assert planned == [True] * SEARCHED_FIRST + [is_searched(key) for key in keys[SEARCHED_FIRST:]]
    others = keys[planned.index(False) :]
    with eager_runner(kernel) as run:
        (passed_over,) = case_runs(kernel, others[:1], run, "eager", RunPlan(signatures=False))
    assert passed_over.verdict.ok
    assert not passed_over.verdict.responses
    report = conformance.check("decode_layer", kernel, case=str(others[0]))
    assert "signature" in report.detectors
