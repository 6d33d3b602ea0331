"""Paging gone wrong in real kernels: each is found through PyPTO's interpreter, and none of it by an identity block table."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.checking import Report, check
from conformance.declaration import find_kernel, kernels_in, load_module

FILE = Path(__file__).parent / "kernels_under_test" / "paging_faults.py"
#: Pages of eight rows; the first sequence has just begun one, the second fills its last, the third is in the middle of one.
MODEL = "B=3,BS=8,D=16,NB=11,S=32"
CASE = f"paged_attention:tiny:{MODEL},seq_lens=17+16+30:normal:1"
WRITE = f"kv_write:tiny:{MODEL},seq_lens=17+16+30:normal:1"


def judged(name: str, case: str | None = None, examples: int = 1) -> Report:
    kernel = find_kernel(kernels_in(load_module(FILE)), name, FILE.name)
    return check(kernel.stage_name, kernel, case=case, examples=examples, dims={"B": 3, "BS": 8, "D": 16, "S": 32})


def test_the_kernel_that_the_faults_are_made_of_is_right() -> None:
    report = judged("right", CASE)
    assert report.ok, report


@pytest.mark.parametrize(
    ("name", "detector"),
    [
        ("identity_block_table", "element"),
        ("page_not_yet_in_the_table", "element"),
        ("page_of_a_freed_sequence", "not_finite"),
        ("last_page_read_past_the_end", "element"),
        ("unused_entry_dereferenced", "raised"),
    ],
)
def test_reading_the_wrong_page_is_found(name: str, detector: str) -> None:
    report = judged(name, CASE)
    assert detector in report.detectors, report
    if name == "last_page_read_past_the_end":
        # The second sequence fills its last page: nothing lies past it.
        assert "in 2 of 3 rows" in next(finding.message for finding in report.findings if finding.detector == detector)


@pytest.mark.parametrize("name", ["slot_one_too_low", "slot_of_another_sequence"])
def test_writing_the_wrong_slot_is_found(name: str) -> None:
    report = judged(name, WRITE)
    # The right row keeps its old contents, and a row that nobody may touch changes.
    assert "stale_row" in report.detectors, report
    if name == "slot_one_too_low":
        assert "out_of_bounds" in report.detectors, report


@pytest.mark.parametrize("name", ["batch_baked_in", "batch_in_the_loop"])
def test_a_batch_that_is_baked_in_is_not_a_variable_batch(name: str) -> None:
    kernel = find_kernel(kernels_in(load_module(FILE)), name, FILE.name)
    report = check("paged_attention", kernel, examples=3, dims={"BS": 8, "D": 16, "S": 32})
    (finding,) = [found for found in report.findings if found.detector == "capability" and "variable_batch" in found.message]
    assert "variable_batch does not hold with a batch of 1 in the build made for 16" in finding.message
