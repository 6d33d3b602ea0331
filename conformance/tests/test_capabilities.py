"""Declared capabilities: one that holds is shown, one that does not is a finding that names it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import conformance
from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.cases.space import Space
from conformance.cli import main
from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel
from conformance.contract.loading import load_module
from conformance.contract.registry import capability_meanings, stage_named
from conformance.errors import UsageError
from conformance.kernels.qwen3 import capabilities
from conformance.kernels.qwen3.capabilities import _shares_pages
from conformance.lanes.base import Outcome
from conformance.lanes.eager import run_eager
from conformance.lanes.listing import bundled_kernels
from conformance.lanes.messages import Passes
from conformance.numerics.arithmetic import SINGLE, Arithmetic
from conformance.running.capabilities import BATCHES, CHECK_PREFIX, LAYERS, prove, proven
from conformance.running.records import read_run
from conformance.running.runs import MOST_LOST, Judged
from conformance.tests.reference_kernels import SMALL, Spoil, reference_kernel
from conformance.toolchains import detect

Tensor = torch.Tensor
Inputs = dict[str, Tensor]
STAGES = conformance.stages()
needs_pypto = pytest.mark.skipif(not detect().supported, reason=detect().message)


def runs_of(kernel: Kernel, dims: dict[str, Any] = SMALL) -> list[Judged]:
    """What the proofs of a kernel run, in this process."""

    def run(case: Case, passes: Passes = "last") -> Outcome:
        return run_eager(kernel, case)

    return list(prove(kernel, Space.of(kernel.stage, dims), run))


def only_finding(kernel: Kernel, dims: dict[str, Any] = SMALL) -> str:
    """The message of the one finding, which must be about the last run: a proof ends with it."""
    runs = runs_of(kernel, dims)
    findings = [finding for judged in runs for finding in judged.verdict.findings]
    assert [finding.detector for finding in findings] == ["capability"]
    assert runs[-1].verdict.findings == tuple(findings)
    assert "\n" not in findings[0].message
    return findings[0].message


# -- what holds -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [name for name, stage in STAGES.items() if stage.capabilities])
def test_every_capability_that_a_stage_can_show_is_shown_by_a_kernel_that_has_it(stage: str) -> None:
    kernel = reference_kernel(stage, STAGES[stage].capabilities)
    runs = runs_of(kernel)
    assert all(judged.verdict.ok for judged in runs)
    assert {name for judged in runs for name in proven(judged.check)} == set(STAGES[stage].capabilities)
    for judged in runs:
        assert judged.outcome.outputs == {}  # tensors of a run are not kept


def test_every_capability_can_be_shown_by_some_stage() -> None:
    assert {name for stage in STAGES.values() for name in stage.capabilities} == set(capability_meanings())


def test_a_kernel_that_declares_nothing_has_nothing_to_show() -> None:
    assert runs_of(reference_kernel("paged_decode_fwd")) == []


def test_a_check_is_evidence_of_the_capabilities_that_it_names() -> None:
    assert proven(f"{CHECK_PREFIX}paged_kv") == ("paged_kv",)
    assert proven(f"{CHECK_PREFIX}stacked_weights+fused_layers") == ("stacked_weights", "fused_layers")
    assert proven("example") == proven("") == proven("lone_row") == ()


def test_one_build_is_tried_with_one_few_an_odd_number_and_the_capacity() -> None:
    runs = runs_of(reference_kernel("paged_attention", ["variable_batch"]))
    batches = [judged.case.dims.B for judged in runs]
    assert batches == [*BATCHES, 16]
    assert {judged.case.dims.NB for judged in runs} == {1 + 16 * 5}  # the pool belongs to the build
    assert all(len(set(judged.case.seq_lens)) > 1 for judged in runs if judged.case.dims.B > 1)


def test_pages_are_shown_in_two_pools_with_pages_that_are_shared() -> None:
    seen = []

    def note(inputs: Inputs, dims: Dims) -> None:
        seen.append((dims.NB, inputs["block_table"].tolist(), inputs["seq_lens"].tolist()))

    runs_of(reference_kernel("paged_attention", ["paged_kv"], before=note))
    (pages, table, lengths), (more, other, same) = seen
    assert more == pages + 5
    assert lengths == same
    assert other != table
    for used in (table, other):
        owned = [page for page in used if page >= 0]
        assert len(set(owned)) < len(owned)


@pytest.mark.parametrize("stage", ["paged_attention", "paged_decode_layer", "prefill_layer", "prefill_fwd"])
def test_pages_are_shared_also_where_sequences_have_few(stage: str) -> None:
    runs = runs_of(reference_kernel(stage, ["paged_kv"]), {**SMALL, "S": 9})
    assert len(runs) == 2
    assert all(judged.verdict.ok and _shares_pages(make_case(judged.case)) for judged in runs)


def test_where_nothing_can_be_shared_nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[CaseKey] = []

    def counted(key: CaseKey) -> Case:
        made.append(key)
        return make_case(key)

    monkeypatch.setattr(capabilities, "make_case", counted)
    for stage, dims in (("kv_write", SMALL), ("paged_attention", {**SMALL, "S": 8})):
        made.clear()
        assert [judged.verdict.ok for judged in runs_of(reference_kernel(stage, ["paged_kv"]), dims)] == [True, True]
        assert len(made) == 2


def test_shared_pages_that_are_not_found_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "_shares_pages", lambda case: False)
    message = only_finding(reference_kernel("paged_attention", ["paged_kv"]))
    assert (
        message
        == "declared capability paged_kv could not be tested with pages that sequences share: none of 80 data sets has any"
    )


def test_cache_rows_that_depend_on_where_pages_lie() -> None:
    """Either is right, by less than the error bound."""
    pools: list[int] = []

    def nudge(tensors: Inputs, dims: Dims) -> None:
        pools.append(dims.NB)
        if pools[0] != dims.NB:
            slot = int(tensors["slot_mapping"][0])
            row = tensors["k_cache"][slot // dims.BS * dims.NKV * dims.BS + slot % dims.BS]
            row[:1].view(torch.int16).bitwise_xor_(1)

    message = only_finding(reference_kernel("paged_decode_layer", ["paged_kv"], after=nudge))
    assert message == (
        "declared capability paged_kv does not hold when the same sequences lie in other pages: "
        "k_cache's new rows differs in the bits of 1 of 48 elements from the first pool's"
    )


@pytest.mark.parametrize(
    ("dims", "accepted"),
    [
        ({"NH": 2, "NKV": 1, "D": 16}, False),
        ({"NH": 2, "NKV": 2, "D": 24}, False),
        ({"NH": 3, "NKV": 3, "D": 16}, True),
        ({"NH": 1, "NKV": 1, "D": 32}, True),
        ({"NH": 1, "NKV": 1, "D": 48}, True),
    ],
    ids=str,
)
def test_the_prefill_kernels_take_whole_blocks_only(dims: dict[str, int], accepted: bool) -> None:
    """Of other dimensions they lose values when code is generated."""
    for kernel in bundled_kernels():
        if kernel.name.startswith("prefill_"):
            refusal = kernel.refusal(Space.of(kernel.stage, {**SMALL, **dims}).limit)
            assert (refusal is None) is accepted
            assert refusal is None or refusal.startswith(f"{kernel.name} takes D in multiples of 16, not 16 itself where NKV = 1")


def test_a_chain_goes_on_from_its_own_result() -> None:
    seen: list[Inputs] = []
    results: list[Tensor] = []
    kernel = reference_kernel(
        "decode_fwd_layers",
        ["chunked_layers"],
        before=lambda inputs, dims: seen.append(inputs),
        after=lambda tensors, dims: results.append(tensors["out"].clone()),
    )
    runs = runs_of(kernel)
    assert [len(inputs["input_rms_weight"]) for inputs in seen] == [1, LAYERS - 1]
    assert len(runs) == 2
    assert torch.equal(seen[1]["hidden_states"], results[0])
    assert not torch.equal(seen[1]["wq"][:32], seen[0]["wq"])


# -- what does not --------------------------------------------------------------------------------------------------------------


def require_full_batch(inputs: Inputs, dims: Dims) -> None:
    if dims.B != 16:
        raise ValueError(f"built for 16 rows, found {dims.B}")


def last_row_zero_unless_full(tensors: Inputs, dims: Dims) -> None:
    if dims.B != 16:
        list(tensors.values())[-1][-1] = 0


def equal_lengths(inputs: Inputs, dims: Dims) -> None:
    inputs["seq_lens"][:] = inputs["seq_lens"][0]


def a_page_is_read_once(inputs: Inputs, dims: Dims) -> None:
    owned = [page for page in inputs["block_table"].tolist() if page >= 0]
    if len(set(owned)) < len(owned):
        raise ValueError("a page belongs to two sequences")


def first_pages_only(pages: int) -> Spoil:
    def spoil(inputs: Inputs, dims: Dims) -> None:
        inputs["block_table"].clamp_(max=pages - 1)

    return spoil


def identity_table(inputs: Inputs, dims: Dims) -> None:
    table = inputs["block_table"]
    inputs["block_table"] = torch.where(table >= 0, torch.arange(len(table), dtype=torch.int32) % (dims.NB - 1), table)


def weights_of_layer_0(inputs: Inputs, dims: Dims) -> None:
    for name in ("wq", "w_up", "post_rms_weight"):
        rows = len(inputs[name]) // dims.L
        inputs[name] = inputs[name][:rows].repeat(dims.L, 1)


def cache_of_layer_0(inputs: Inputs, dims: Dims) -> None:
    rows = len(inputs["k_cache"]) // dims.L
    for layer in range(1, dims.L):
        inputs["v_cache"][layer * rows : (layer + 1) * rows] = inputs["v_cache"][:rows]


def needs_a_loop(inputs: Inputs, dims: Dims) -> None:
    if dims.L < 2:
        raise ValueError("one layer is no loop")


class Remembers:
    """What a kernel that keeps something of its first call does with it in the next."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.first: Tensor | None = None

    def __call__(self, inputs: Inputs, dims: Dims) -> None:
        if self.first is None:
            self.first = inputs[self.name].clone()
        elif self.first.shape == inputs[self.name].shape:
            inputs[self.name] = self.first.clone()


def half_of_the_vocabulary(tensors: Inputs, dims: Dims) -> None:
    tensors["logits"][:, dims.V // 2 :] = 0


@pytest.mark.parametrize(
    ("stage", "capabilities", "spoil", "message"),
    [
        ("attention", ["paged_kv"], {}, r"attention has no arguments that paged_kv \(.*\) concerns: declare it no more"),
        ("decode_fwd", ["paged_kv"], {}, r"decode_fwd has no arguments that paged_kv \(.*\) concerns: declare it no more"),
        (
            "decode_layer",
            ["fused_lm_head"],
            {},
            r"decode_layer has no arguments that fused_lm_head \(.*\) concerns: declare it no more",
        ),
        ("rms_norm", ["host_loop"], {}, r"rms_norm has no arguments that host_loop \(.*\) concerns: declare it no more"),
        (
            "decode_fwd",
            ["chunked_layers"],
            {},
            r"decode_fwd has no arguments that chunked_layers \(.*\) concerns: declare it no more",
        ),
        (
            "rms_norm",
            ["variable_batch"],
            {"before": require_full_batch},
            r"declared capability variable_batch does not hold with a batch of 1 in the build made for 16 \(raised\): "
            r"ValueError: built for 16 rows",
        ),
        (
            "lm_head",
            ["variable_batch"],
            {"after": last_row_zero_unless_full},
            r"declared capability variable_batch does not hold with a batch of 1 in the build made for 16 \(all_zeros\): "
            r"every element of logits is zero",
        ),
        (
            "prefill_layer",
            ["variable_batch"],
            {"after": last_row_zero_unless_full},
            r"declared capability variable_batch does not hold with a batch of 1 in the build made for 16 \(element\): "
            r"out\[\d+, \d+\] is 0, ",
        ),
        (
            "attention",
            ["variable_batch"],
            {"before": equal_lengths},
            r"declared capability variable_batch does not hold with a batch of 3 in the build made for 16 \(element\): ",
        ),
        (
            "paged_attention",
            ["paged_kv"],
            {"before": a_page_is_read_once},
            r"declared capability paged_kv does not hold on a pool of pages in random order \(raised\): "
            r"ValueError: a page belongs to two",
        ),
        (
            "paged_decode_layer",
            ["paged_kv"],
            {"before": identity_table},
            r"declared capability paged_kv does not hold on a pool of pages in random order \((not_finite|element)\): ",
        ),
        (
            "kv_write",
            ["paged_kv"],
            {"before": lambda inputs, dims: inputs["slot_mapping"].remainder_(8)},
            r"declared capability paged_kv does not hold on a pool of pages in random order \(",
        ),
        (
            "paged_decode_fwd",
            ["stacked_weights", "fused_layers"],
            {"before": weights_of_layer_0},
            r"declared capabilities stacked_weights and fused_layers do not hold with 3 layers \((element|spread)\): ",
        ),
        (
            "decode_fwd_layers",
            ["stacked_weights"],
            {"before": cache_of_layer_0},
            r"declared capability stacked_weights does not hold with 3 layers \(",
        ),
        (
            "decode_fwd_layers",
            ["fused_layers"],
            {"before": needs_a_loop},
            r"declared capability fused_layers does not hold with one layer \(raised\): ValueError: one layer is no loop",
        ),
        (
            "prefill_fwd",
            ["fused_lm_head"],
            {"after": half_of_the_vocabulary},
            r"declared capability fused_lm_head does not hold from hidden states to logits \(element\): logits\[",
        ),
        (
            "decode_fwd_layers",
            ["chunked_layers"],
            {"before": Remembers("hidden_states")},
            r"declared capability chunked_layers does not hold at layers 1 to 2 of 3 \(.*Likely cause: layer 0 is the first "
            r"whose cache rows follow from no",
        ),
        (
            "paged_decode_layer",
            ["host_loop"],
            {"before": Remembers("wk")},
            r"declared capability host_loop does not hold at layer 1 of 3 \(",
        ),
        (
            "prefill_layer",
            ["host_loop"],
            {"before": Remembers("hidden_states")},
            r"declared capability host_loop does not hold at layer 1 of 3 \(",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
def test_a_capability_that_does_not_hold_is_named(
    stage: str, capabilities: list[str], spoil: dict[str, Any], message: str
) -> None:
    found = only_finding(reference_kernel(stage, capabilities, **spoil))
    assert re.match(message, found), found


def test_a_kernel_that_knows_the_first_pages_only() -> None:
    """Its own pool is small enough, the larger one is not."""
    sizes: list[int] = []
    runs_of(reference_kernel("paged_attention", ["paged_kv"], before=lambda inputs, dims: sizes.append(dims.NB)))
    message = only_finding(reference_kernel("paged_attention", ["paged_kv"], before=first_pages_only(min(sizes))))
    assert message.startswith("declared capability paged_kv does not hold when the same sequences lie in other pages (")


def test_a_result_that_depends_on_where_pages_lie() -> None:
    """Each of the two is right; which one it is, must not follow from the pool."""

    class Rounded(Arithmetic):
        def optional(self, tensor: Tensor, name: str, sequences: Tensor | None = None) -> Tensor:
            return self.round(tensor)

    calls: list[int] = []

    def alternate(inputs: Inputs) -> Arithmetic:
        calls.append(int(inputs["block_table"].sum()))
        return SINGLE if calls[-1] == calls[0] else Rounded(torch.float32, rounds=True)

    kernel = reference_kernel("paged_attention", ["paged_kv"], arithmetic=alternate)
    message = only_finding(kernel)
    assert re.fullmatch(
        r"declared capability paged_kv does not hold when the same sequences lie in other pages: "
        r"out differs in the bits of \d+ of 96 elements from the first pool's",
        message,
    )


def test_only_what_fails_ends_and_the_rest_is_still_tried() -> None:
    kernel = reference_kernel("paged_decode_fwd", STAGES["paged_decode_fwd"].capabilities, before=weights_of_layer_0)
    runs = runs_of(kernel)
    failed = {name for judged in runs if not judged.verdict.ok for name in proven(judged.check)}
    assert failed == {"stacked_weights", "fused_layers"}
    shown = {name for judged in runs if judged.verdict.ok for name in proven(judged.check)}
    assert {"paged_kv", "variable_batch", "fused_lm_head"} <= shown


@pytest.mark.parametrize("status", ["crashed", "timed_out"])
def test_a_kernel_that_takes_its_process_down_is_given_up(status: Any) -> None:
    kernel = reference_kernel("paged_decode_fwd", STAGES["paged_decode_fwd"].capabilities)
    tried: list[Case] = []

    def run(case: Case, passes: Passes = "last") -> Outcome:
        tried.append(case)
        return Outcome(status, message="gone")

    runs = list(prove(kernel, Space.of(kernel.stage, SMALL), run))
    assert len(tried) == len(runs) == MOST_LOST
    assert all(f"({status}): gone" in judged.verdict.findings[0].message for judged in runs)


# -- capacity -------------------------------------------------------------------------------------------------------------------


def test_a_capacity_is_the_largest_batch_that_is_asked_for() -> None:
    kernel = reference_kernel("attention", ["variable_batch"], before=batches_up_to(4), capacity=4)
    report = conformance.check("attention", kernel, dims=SMALL, examples=12)
    assert report.ok, report
    assert max(judged.case.dims.B for judged in report.runs) == 4
    proofs = [judged.case.dims.B for judged in report.runs if proven(judged.check)]
    assert proofs == [1, 3, 4]


def batches_up_to(most: int) -> Spoil:
    def spoil(inputs: Inputs, dims: Dims) -> None:
        rows = len(inputs["seq_lens"])
        if rows > most:
            raise ValueError(f"no room for {rows} rows")

    return spoil


def test_a_larger_batch_than_the_capacity_is_refused_in_one_line() -> None:
    kernel = reference_kernel("attention", ["variable_batch"], capacity=4)
    assert kernel.refusal(stage_dims("attention", 5)) == "kernel attention serves batches of 1 to 4, not 5"
    assert kernel.refusal(stage_dims("attention", 4)) is None
    with pytest.raises(UsageError, match="takes none of these cases: kernel attention serves batches of 1 to 4, not 7"):
        conformance.check("attention", kernel, dims={**SMALL, "B": 7}, examples=2)


def stage_dims(stage: str, batch: int) -> Dims:
    return Space.of(stage_named(stage), {**SMALL, "B": batch}).limit


@pytest.mark.parametrize("capacity", [0, -1, True, 2.5, "4"])
def test_a_capacity_that_is_none_is_refused_in_one_line(capacity: object) -> None:
    with pytest.raises(UsageError, match=r"capacity is the largest batch .* a positive whole number, found") as error:
        reference_kernel("attention", ["variable_batch"], capacity=capacity)
    assert repr(capacity) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("capabilities", "capacity", "message"),
    [
        (["variable_batch"], 17, "capacity is at most 16, the largest batch of the contract, found 17"),
        (["variable_batch"], 1, "a kernel of capacity 1 serves one batch only: it has no variable_batch to declare"),
        ([], 4, "capacity goes with variable_batch, which is not declared, found capacity 4"),
        (["paged_kv"], 1, "capacity goes with variable_batch, which is not declared, found capacity 1"),
    ],
)
def test_a_capacity_that_means_nothing_is_refused_in_one_line(capabilities: list[str], capacity: int, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        reference_kernel("paged_attention", capabilities, capacity=capacity)
    assert reference_kernel("paged_attention", ["variable_batch"], capacity=2).capacity == 2


@needs_pypto
def test_a_kernel_that_is_compiled_anew_for_every_batch_has_no_variable_batch() -> None:
    """Its results are right for every batch: ``pypto.STATIC`` takes any extent, and makes a program of each."""
    kernel = vars(load_module(Path(__file__).parent / "kernels_under_test" / "static_batch.py"))["static_batch"]
    report = conformance.check("rms_norm", kernel, dims={**SMALL, "B": 4}, examples=1)
    # A case as large as the build is right.
    assert all(judged.verdict.ok for judged in report.runs if judged.check == "example")
    (finding,) = [found for found in report.findings if found.detector == "capability"]
    assert finding.message == (
        "declared capability variable_batch does not hold with a batch of 1 in the build made for 4 (raised): "
        "argument x: axis 0 (B) is "
        "pypto.STATIC, and PyPTO compiles another program for 1 than for 4; annotate it as pypto.DYNAMIC"
    )


def test_one_build_is_made_for_the_capacity_and_for_no_number_of_tokens() -> None:
    dims = Space.of(stage_named("prefill_layer"), {**SMALL, "B": 3, "T": 20}).limit
    assert (dims.B, dims.T) == (3, 20)
    built = reference_kernel("prefill_layer", ["variable_batch"], capacity=8).built_for(dims)
    assert built == dims.replace(B=8, T=1)
    assert reference_kernel("prefill_layer", ["paged_kv"]).built_for(dims) == dims


def test_what_a_kernel_refuses_is_a_capability_that_is_not_shown() -> None:
    kernel = reference_kernel("attention", ["variable_batch"], accepts=lambda dims: dims.B == 16 or "it takes B = 16 only")
    message = only_finding(kernel)
    assert message == (
        "declared capability variable_batch could not be tested with a batch of 1 in the build made for 16: "
        "the kernel refuses the dimensions: it takes B = 16 only"
    )


@pytest.mark.parametrize(
    ("stage", "batch"),
    [("decode_fwd_layers", 1), ("decode_layer", 16), ("paged_decode_fwd", 1), ("paged_decode_fwd", 5), ("prefill_fwd", 1)],
)
def test_a_kernel_of_one_batch_size_shows_what_else_it_has(stage: str, batch: int) -> None:
    able = [name for name in STAGES[stage].capabilities if name != "variable_batch"]
    kernel = reference_kernel(stage, able, accepts=lambda dims: batch == dims.B or f"it takes B = {batch} only")
    runs = runs_of(kernel)
    assert all(judged.verdict.ok for judged in runs), [finding for judged in runs for finding in judged.verdict.findings]
    assert {name for judged in runs for name in proven(judged.check)} == set(able)
    assert {judged.case.dims.B for judged in runs} == {batch}


# -- where it is done -----------------------------------------------------------------------------------------------------------


def test_a_check_puts_what_is_declared_to_the_test_and_says_it() -> None:
    wrong = reference_kernel("attention", ["paged_kv", "variable_batch"], before=equal_lengths)
    report = conformance.check("attention", wrong, dims={**SMALL, "B": 1}, examples=6)
    # Its cases have one sequence, and are right; which batches a build serves is not for the caller to choose.
    assert report.detectors == ("capability",)
    failed = {judged.check for judged in report.runs if not judged.verdict.ok}
    assert failed == {"capability:paged_kv", "capability:variable_batch"}
    text = str(report)
    assert text.count("  capability, 1 case") == 2
    assert "attention has no arguments that" in " ".join(text.split())


def test_a_single_case_is_run_without_the_proofs() -> None:
    kernel = reference_kernel("attention", ["paged_kv"])
    assert not conformance.check("attention", kernel, dims=SMALL, examples=1).ok
    case = "attention:tiny:B=2,NH=2,NKV=1,D=16,S=40,BS=8,seq_lens=3+9:normal:1"
    report = conformance.check("attention", kernel, case=case)
    assert report.ok
    assert not any(proven(judged.check) for judged in report.runs)


FILE = """
import ctypes
import conformance
from conformance.tests.reference_kernels import compute


@conformance.kernel("paged_attention", capabilities=["paged_kv", "variable_batch"])
def paged(*arguments, dims):
    compute("paged_attention", arguments, dims)


@conformance.kernel("attention", capabilities=["paged_kv"])
def claims(*arguments, dims):
    compute("attention", arguments, dims)


@conformance.kernel("attention", capabilities=["variable_batch"])
def gone(*arguments, dims):
    ctypes.string_at(0)
"""


def command(folder: Path, *arguments: str) -> Result:
    (folder / "mine.py").write_text(FILE)
    small = ",".join(f"{name}={size}" for name, size in SMALL.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return CliRunner().invoke(main, ["check", *arguments, "--dims", small, "--out", "kept"])


def checks_kept(folder: Path) -> list[str]:
    return [record.check for record in read_run(folder / "kept").of("case")]


def test_a_run_keeps_the_proofs_and_what_was_declared(tmp_path: Path) -> None:
    done = command(tmp_path, "paged_attention", "mine.py:paged", "--examples", "1")
    assert done.exit_code == 0, done.output
    kept = [check for check in checks_kept(tmp_path) if check.startswith(CHECK_PREFIX)]
    assert kept == ["capability:paged_kv"] * 2 + ["capability:variable_batch"] * 4
    (start,) = read_run(tmp_path / "kept").of("start")
    assert start.details["plan"][0]["capabilities"] == ["paged_kv", "variable_batch"]
    assert start.details["plan"][0]["capacity"] == 16


def test_a_claim_that_does_not_hold_fails_the_command_and_the_whole_check_shows_it_again(tmp_path: Path) -> None:
    done = command(tmp_path, "attention", "mine.py:claims", "--examples", "1")
    assert done.exit_code == 1
    assert "capability, 1 case" in done.stdout
    records = [record for record in read_run(tmp_path / "kept").of("case") if record.status == "failed"]
    assert [(record.check, record.findings[0].detector) for record in records] == [("capability:paged_kv", "capability")]
    again = next(line for line in done.stdout.splitlines() if line.startswith("again: "))
    model = ",".join(f"{name}={size}" for name, size in sorted(SMALL.items()))
    assert again == f"again: conformance check attention mine.py:claims --dims preset=tiny,{model}"
    repeated = ["check", "attention", f"{tmp_path}/mine.py:claims", *again.split()[5:], "--out", str(tmp_path / "again")]
    assert CliRunner().invoke(main, repeated).exit_code == 1


def test_a_kernel_that_was_given_up_is_not_tried_further(tmp_path: Path) -> None:
    done = command(tmp_path, "attention", "mine.py:gone", "--examples", "3")
    assert done.exit_code == 1
    assert "crashed" in done.stdout
    assert "SIGSEGV" in done.stdout
    assert checks_kept(tmp_path) == ["example"] * MOST_LOST
