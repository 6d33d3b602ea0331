"""Every known fault is found, by a detector that says what it is.

Those that are woven into the kernels are tried in every stage, those that are a function of their own in one; the exam has all of
them in all of their stages.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import conformance
from conformance.cases.case import Case
from conformance.cases.space import Space, stratified_keys
from conformance.contract.kernel import Kernel
from conformance.contract.registry import stage_named
from conformance.lanes.base import Outcome
from conformance.lanes.eager import run_eager
from conformance.lanes.messages import Passes
from conformance.running.check import Runner, case_runs
from kernels.qwen3.exam.torch.catalogue import dims_of
from kernels.qwen3.exam.torch.kernels import FAULTS, torch_kernel
from kernels.qwen3.exam.torch.layers import LAYER_WEIGHTS
from kernels.qwen3.exam.torch.registry import REGISTERED

#: The detector that tells a fault first. Those that are not listed compute a wrong value: ``element``.
FIRST_DETECTOR: dict[str, str] = {
    "zeros": "all_zeros",
    "row_unwritten": "unwritten",
    "column_tile_unwritten": "unwritten",
    "nan_element": "not_finite",
    "input_changed": "changed_input",
    "past_the_end": "out_of_bounds",
    "before_the_start": "out_of_bounds",
    "raises_at_batch_1": "raised",
    "returns_a_tensor": "raised",
    "echo": "echo",
    "second_call_differs": "nondeterministic",
    "k_not_written": "stale_row",
    "v_not_written": "stale_row",
    "next_slot": "out_of_bounds",
    "token_major_page": "out_of_bounds",
    "other_row_overwritten": "out_of_bounds",
    "next_row_overwritten": "out_of_bounds",
    "no_maximum": "not_finite",
    "truncate_result": "spread",
    # Pages that nobody owns hold NaN.
    "identity_block_table": "not_finite",
    "transposed_block_table": "not_finite",
    "page_off_by_one": "not_finite",
    "unowned_page": "not_finite",
    "minus_one_dereferenced": "not_finite",
    "page_size_16": "not_finite",
    "one_row_nan": "not_finite",
    "first_page_overwritten": "out_of_bounds",
    "slots_consecutive": "out_of_bounds",
    "layer_stride_of_pages_in_use": "out_of_bounds",
    # Cache rows that should have been written.
    "layer_dropped": "stale_row",
    "last_layer_dropped": "stale_row",
    "caches_of_layer_0": "stale_row",
    "rows_of_the_last_token_only": "stale_row",
    "one_too_few_at_a_page_edge": "stale_row",
    "second_half_dropped": "stale_row",
    "last_tile_unwritten": "unwritten",
    "takes_16_rows": "raised",
    # Those that are a function of their own.
    "first_kv_head_written_only": "stale_row",
    "last_kv_head_not_written": "stale_row",
    "rows_of_a_page_in_reverse": "out_of_bounds",
    "start_of_a_page_in_the_one_before": "out_of_bounds",
    "slot_one_too_small": "out_of_bounds",
    "slots_ignored": "out_of_bounds",
    "cache_page_cleared": "out_of_bounds",
    "rows_of_a_full_batch_written": "out_of_bounds",
    "table_rows_as_long_as_needed": "not_finite",
    "activations_in_fp16": "not_finite",
    "cache_in_fp16": "not_finite",
    "silu_overflows": "not_finite",
    "masked_block_is_nan": "not_finite",
    "added_to_what_was_there": "not_finite",
    "nan_for_small_rows": "not_finite",
    "overflows_at_large_values": "not_finite",
    "scores_capped": "bias",
    "probabilities_truncated": "bias",
    "denominator_in_bf16": "bias",
    "position_zero": "echo",
    "partial_tile_of_rows_zero": "all_zeros",
    "input_cleared": "changed_input",
    "result_computed_in_the_input": "changed_input",
    "last_input_overwritten": "changed_input",
    **dict.fromkeys(
        (
            "rows_past_the_eighth_unwritten",
            "partial_tile_of_rows_unwritten",
            "full_batch_only",
            "first_row_unwritten",
            "last_column_unwritten",
            "tail_columns_unwritten",
            "second_half_of_columns_unwritten",
            "last_row_last_tile_unwritten",
            "second_output_unwritten",
        ),
        "unwritten",
    ),
    **dict.fromkeys(
        ("every_second_call_unwritten", "element_lost_once_in_seven", "output_buffer_kept", "gives_up_on_the_first_call"),
        "nondeterministic",
    ),
    **{name: "raised" for name in REGISTERED if name.startswith("raises_")},
}
#: Where a fault shows otherwise in one stage.
FIRST_DETECTOR_OF_STAGE: dict[tuple[str, str], str] = {
    # Probabilities that a legal kernel may round leave each element room for a truncation, but not all of them together.
    ("attention", "truncate"): "bias",
    ("decode_layer", "bf16_accumulation"): "spread",
    ("decode_fwd_layers", "gain"): "spread",
    **{(stage, "gain"): "signature" for stage in ("decode_fwd", "paged_decode_fwd", "prefill_fwd")},
    ("paged_attention", "truncate"): "bias",
    # A layer writes to pages as well as reading them.
    ("paged_attention", "token_major_page"): "element",
    **{(stage, "page_size_16"): "out_of_bounds" for stage in ("paged_decode_layer", "paged_decode_fwd", "prefill_layer")},
    # Integers have no word for it.
    ("greedy_sample", "zeros"): "element",
    ("rope", "k_not_rotated"): "echo",
    # No probability is left: zero over zero.
    ("paged_attention", "maximum_starts_at_zero"): "not_finite",
}
#: Of the single stages' faults those that layers show because the shape of what they add is known.
SIGNATURES_IN_LAYERS = (
    "root_in_bf16",
    "root_too_large",
    "inverse_too_large",
    "silu_in_bf16",
    "sigmoid_in_bf16",
    "denominator_in_bf16",
)
#: Inside a layer no element shows a rounding that is slightly wrong, and a spread seldom: what shows is what it adds to them all.
FIRST_DETECTOR_OF_LAYERS: dict[str, str] = {
    "casts_truncate": "spread",
    **dict.fromkeys(
        (
            "bf16_tables",
            "bf16_result",
            "normalised_truncated",
            "keys_truncated",
            "values_truncated",
            "attention_truncated",
            "activation_truncated",
            "carried_state_truncated",
            "gamma_in_bf16",
            "bf16_scores",
            *SIGNATURES_IN_LAYERS,
            *(f"{name}_in_bf16" for name in LAYER_WEIGHTS if name.endswith("rms_weight") or name.endswith("norm_weight")),
            *(name for name in REGISTERED if name.endswith("_rounded_up")),
        ),
        "signature",
    ),
    "queries_truncated": "pooled_signature",
}
#: Faults that no case shows so far, and what would.
UNSEEN: dict[tuple[str, str], str] = {}
#: Most faults show in the first examples; the others need a batch of one, a length at a page's edge or a regime that comes late.
EXAMPLES = 50
EXAMPLES_OF_LAYERS = 18

SINGLE_STAGES = [stage for stage in FAULTS if not stage_named(stage).composite]
#: In a chain: the faults of a chain, and one of each kind that a layer has too.
CHAIN_FAULTS = (
    "zeros",
    "row_unwritten",
    "raises_at_batch_1",
    "column_tile_zeroed_once_in_three",
    "gain",
    "position_off_by_one",
    "modulo_heads",
    "eps_1e-5",
    "q_norm_missing",
    "oldest_row_dropped",
    "other_row_overwritten",
    "carried_state_ignored",
    "layer_dropped",
    "last_layer_dropped",
    "weights_of_layer_0",
    "caches_of_layer_0",
)


def expected_detector(stage: str, fault: str) -> str:
    of_layers = FIRST_DETECTOR_OF_LAYERS if stage_named(stage).composite else {}
    return FIRST_DETECTOR_OF_STAGE.get((stage, fault), of_layers.get(fault, FIRST_DETECTOR.get(fault, "element")))


def woven(stage: str) -> list[str]:
    """The faults of a stage that are no function of their own."""
    return [fault for fault in FAULTS[stage] if fault not in REGISTERED]


def report_of(stage: str, fault: str) -> conformance.Report:
    """The report of a faulty kernel on the first examples, up to the one that tells the fault: the same as in a longer run."""
    kernel, space = torch_kernel(stage, fault=fault), Space.of(stage_named(stage), dims_of(stage, fault))
    examples = EXAMPLES_OF_LAYERS if stage_named(stage).composite else EXAMPLES
    runs = []
    for run in case_runs(kernel, itertools.islice(stratified_keys(space, 0), examples), run_with(kernel), "eager"):
        runs.append(run)
        if expected_detector(stage, fault) in {finding.detector for finding in run.verdict.findings}:
            break
    return conformance.Report(stage, kernel.name, "eager", tuple(runs))


def run_with(kernel: Kernel) -> Runner:
    def run(case: Case, passes: Passes = "none") -> Outcome:
        return run_eager(kernel, case)

    return run


def _known(stage: str, fault: str) -> Any:
    reason = UNSEEN.get((stage, fault))
    marks = [] if reason is None else [pytest.mark.xfail(strict=True, reason=f"needs {reason}")]
    return pytest.param(stage, fault, marks=marks)


@pytest.mark.parametrize(("stage", "fault"), [_known(stage, fault) for stage in SINGLE_STAGES for fault in woven(stage)])
def test_fault_of_a_single_stage_is_found(stage: str, fault: str) -> None:
    report = report_of(stage, fault)
    assert not report.ok
    assert expected_detector(stage, fault) in report.detectors
    assert report.findings[0].detector == report.detectors[0]


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        *(_known(fault.stages[0], fault.name) for fault in REGISTERED.values()),
        *(_known("decode_layer", fault) for fault in SIGNATURES_IN_LAYERS),
    ],
)
def test_fault_that_is_a_function_of_its_own_is_found(stage: str, fault: str) -> None:
    report = report_of(stage, fault)
    assert not report.ok
    assert expected_detector(stage, fault) in report.detectors


@pytest.mark.parametrize("fault", woven("decode_layer"))
def test_fault_of_a_layer_is_found(fault: str) -> None:
    report = report_of("decode_layer", fault)
    assert not report.ok
    assert expected_detector("decode_layer", fault) in report.detectors


@pytest.mark.parametrize("fault", CHAIN_FAULTS)
def test_fault_of_a_chain_is_found(fault: str) -> None:
    report = report_of("decode_fwd_layers", fault)
    assert not report.ok
    assert expected_detector("decode_fwd_layers", fault) in report.detectors


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        (stage, fault)
        for stage in ("paged_decode_layer", "decode_fwd", "paged_decode_fwd", "prefill_layer", "prefill_fwd")
        for fault in woven(stage)
    ],
)
def test_fault_of_pages_heads_or_chunks_is_found(stage: str, fault: str) -> None:
    report = report_of(stage, fault)
    assert not report.ok
    assert expected_detector(stage, fault) in report.detectors


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("carried_state_ignored", "layer 1 read the first input"),
        ("layer_dropped", "layer 1 wrote no cache rows"),
        ("weights_of_layer_0", "layer 1 used the weights of layer 0"),
        ("position_off_by_one", "layer 0 is the first whose cache rows follow from no state"),
        ("relu", "layer 1 is the first whose cache rows follow from no state"),
    ],
)
def test_a_finding_names_the_layer_that_went_wrong_first(fault: str, cause: str) -> None:
    kernel = torch_kernel("decode_fwd_layers", fault=fault)
    report = conformance.check("decode_fwd_layers", kernel, dims={"S": 48, "L": 3, "B": 3}, examples=1, seed=0)
    assert cause in report.findings[0].message


@pytest.mark.parametrize(
    ("stage", "fault", "cause"),
    [
        ("decode_fwd", "head_on_the_last_layers_input", "from layer 0's output, not layer 1's output"),
        ("paged_decode_fwd", "last_layer_dropped", "layer 1 wrote no cache rows"),
        ("prefill_fwd", "carried_state_ignored", "layer 1 read the first input"),
        ("prefill_layer", "not_causal", "the cache rows are right, the fault lies behind them"),
    ],
)
def test_a_finding_names_the_layer_of_pages_heads_and_chunks_too(stage: str, fault: str, cause: str) -> None:
    assert cause in report_of(stage, fault).findings[0].message


def test_a_finding_behind_the_cache_rows_says_so() -> None:
    kernel = torch_kernel("decode_layer", fault="modulo_heads")
    report = conformance.check("decode_layer", kernel, dims={"S": 48, "B": 3}, examples=1, seed=0)
    assert "the cache rows are right, the fault lies behind them" in report.findings[0].message


def test_the_last_layers_dropped_state_is_named() -> None:
    """The last layer runs and its result is thrown away: its cache rows are right, ``out`` is an earlier state."""
    right = torch_kernel("decode_fwd_layers")

    @conformance.kernel("decode_fwd_layers")
    def returns_its_input(*arguments, dims):  # type: ignore[no-untyped-def]
        right(*arguments, dims=dims)
        arguments[-1].copy_(arguments[0])

    report = conformance.check("decode_fwd_layers", returns_its_input, dims={"S": 48, "L": 2, "B": 2}, examples=1, seed=0)
    assert "out is the first input, not layer 1's output" in report.findings[0].message


def test_every_fault_is_examined() -> None:
    """A fault that is declared and never run proves nothing."""
    assert set(CHAIN_FAULTS) <= set(FAULTS["decode_fwd_layers"])
    assert set(woven("decode_fwd_layers")) - set(CHAIN_FAULTS) <= set(FAULTS["decode_layer"])
    assert set(FIRST_DETECTOR) <= {fault for faults in FAULTS.values() for fault in faults}
    known = {(stage, fault) for stage, faults in FAULTS.items() for fault in faults}
    assert set(FIRST_DETECTOR_OF_STAGE) <= known
    assert set(UNSEEN) <= known


def test_a_misspelt_fault_is_not_a_right_kernel() -> None:
    with pytest.raises(KeyError, match="has no fault 'zerso'"):
        torch_kernel("rms_norm", fault="zerso")


def test_where_a_fault_is_found_is_where_it_is() -> None:
    report = conformance.check("rms_norm", torch_kernel("rms_norm", fault="column_tile_unwritten"), examples=1)
    worst = report.findings[0]
    assert worst.argument == "out"
    assert worst.index == (0, 16)
    assert worst.where == {"row": 0, "column": 16}
    assert "every row, columns 16..31" in worst.message
    report = conformance.check("kv_write", torch_kernel("kv_write", fault="other_row_overwritten"), examples=1)
    assert report.findings[0].argument == "v_cache"
    assert set(report.findings[0].where) == {"layer", "page", "kv_head", "offset", "lane"}
