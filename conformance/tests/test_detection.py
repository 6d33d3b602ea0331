"""Every known fault is found, by a detector that says what it is. The faults are in ``kernels.py``."""

from __future__ import annotations

from typing import Any

import pytest

import conformance
from conformance.contract import stage_named
from conformance.faults.kernels import FAULTS, torch_kernel

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
}
#: Where a fault shows otherwise in one stage.
FIRST_DETECTOR_OF_STAGE: dict[tuple[str, str], str] = {
    # Probabilities that a legal kernel may round leave each element room for a truncation, but not all of them together.
    ("attention", "truncate"): "bias",
    ("decode_layer", "bf16_accumulation"): "spread",
    ("decode_fwd_layers", "gain"): "spread",
    ("paged_attention", "truncate"): "bias",
    # A layer writes to pages as well as reading them.
    ("paged_attention", "token_major_page"): "element",
    **{(stage, "page_size_16"): "out_of_bounds" for stage in ("paged_decode_layer", "paged_decode_fwd", "prefill_layer")},
    # Integers have no word for it.
    ("greedy_sample", "zeros"): "element",
    ("rope", "k_not_rotated"): "echo",
}
#: Faults that no case shows so far, and what would.
UNSEEN: dict[tuple[str, str], str] = {
    ("paged_attention", "maximum_starts_at_zero"): "a query whose scores are all below -104, so that every probability vanishes",
    ("greedy_sample", "maximum_starts_at_minus_10"): "a row whose largest logit lies far below zero",
}
#: Most faults show in the first examples; the others need a batch of one, a length at a page's edge or a regime that comes late.
EXAMPLES = (1, 8, 50)
EXAMPLES_OF_LAYERS = (1, 4, 18)

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
    return FIRST_DETECTOR_OF_STAGE.get((stage, fault), FIRST_DETECTOR.get(fault, "element"))


def dims_of(stage: str, fault: str) -> dict[str, str | int]:
    """Dimensions at which a fault shows, small ones where there are layers."""
    # Its pages are smaller than 16, and its vocabulary ends in a part of a tile.
    preset = "awkward" if fault in ("page_size_16", "last_tile_unwritten", "last_tile_zeroed", "last_tile_repeated") else "tiny"
    contract = stage_named(stage)
    dims: dict[str, str | int] = {"preset": preset}
    if contract.composite:
        dims["S"] = 48
    if "L" in contract.drawn:
        dims["L"] = 2
    if contract.has_chunks:
        dims["T"] = 24
    return dims


def report_of(stage: str, fault: str) -> conformance.Report:
    """The report of a faulty kernel, of the first few examples if those tell the fault: they are the same in a longer run."""
    for examples in EXAMPLES_OF_LAYERS if stage_named(stage).composite else EXAMPLES:
        kernel = torch_kernel(stage, fault=fault)
        report = conformance.check(stage, kernel, dims=dims_of(stage, fault), examples=examples, seed=0)  # type: ignore[arg-type]
        if expected_detector(stage, fault) in report.detectors:
            break
    return report


def _known(stage: str, fault: str) -> Any:
    reason = UNSEEN.get((stage, fault))
    marks = [] if reason is None else [pytest.mark.xfail(strict=True, reason=f"needs {reason}")]
    return pytest.param(stage, fault, marks=marks)


@pytest.mark.parametrize(("stage", "fault"), [_known(stage, fault) for stage in SINGLE_STAGES for fault in FAULTS[stage]])
def test_fault_of_a_single_stage_is_found(stage: str, fault: str) -> None:
    report = report_of(stage, fault)
    assert not report.ok
    assert expected_detector(stage, fault) in report.detectors
    assert report.findings[0].detector == report.detectors[0]


@pytest.mark.parametrize("fault", FAULTS["decode_layer"])
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
        for fault in FAULTS[stage]
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
    assert set(FAULTS["decode_fwd_layers"]) - set(CHAIN_FAULTS) <= set(FAULTS["decode_layer"])
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
