"""What a finding says of a fault besides its detector: which layer went wrong first, and where in the tensor.

That every known fault is found, by a detector that names it, is for the exam to show (``conformance exam``).
"""

from __future__ import annotations

import pytest

import conformance
from conformance.kernels.qwen3.exam.torch.kernels import torch_kernel


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
    dims = {"S": 48, **({"L": 2} if stage.endswith("_fwd") else {}), **({"T": 24} if stage.startswith("prefill") else {})}
    report = conformance.check(stage, torch_kernel(stage, fault=fault), dims=dims, examples=3, seed=0)
    assert cause in report.findings[0].message


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
