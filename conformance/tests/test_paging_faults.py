"""Paging gone wrong in real kernels: each is found through PyPTO's interpreter, and none of it by an identity block table."""

from __future__ import annotations

import pytest

from conformance.kernels.qwen3.exam import KNOWN_KERNELS
from conformance.kernels.qwen3.paged_attention import paged_attention
from conformance.running.check import Report, check

FAULTS = {(one.stage, one.name): one for one in KNOWN_KERNELS if not one.legal and one.lane == "interpret"}
#: Pages of eight rows; the first sequence has just begun one, the second fills its last, the third is in the middle of one.
MODEL = "B=3,BS=8,D=16,NB=11,S=32"
CASE = f"paged_attention:tiny:{MODEL},seq_lens=17+16+30:normal:1"
WRITE = f"kv_write:tiny:{MODEL},seq_lens=17+16+30:normal:1"


def judged(stage: str, name: str, case: str | None = None) -> Report:
    subject = FAULTS[stage, name]
    return check(stage, subject.make(), dims=subject.dims, case=case, examples=2)


def test_the_kernel_that_the_faults_are_made_of_is_right() -> None:
    report = check("paged_attention", paged_attention, case=CASE)
    assert report.ok, report


@pytest.mark.parametrize(
    ("name", "detector"),
    [
        pytest.param("identity_block_table", "element", marks=pytest.mark.slow),
        pytest.param("stale_page", "element", marks=pytest.mark.slow),
        ("page_of_a_freed_sequence", "not_finite"),
        ("whole_pages", "element"),
        ("minus_one_dereferenced", "raised"),
    ],
)
def test_reading_the_wrong_page_is_found(name: str, detector: str) -> None:
    report = judged("paged_attention", name, CASE)
    assert detector in report.detectors, report
    if name == "whole_pages":
        # The second sequence fills its last page: nothing lies past it.
        assert "in 2 of 3 rows" in next(finding.message for finding in report.findings if finding.detector == detector)


@pytest.mark.parametrize("name", ["slot_one_too_low", pytest.param("slot_of_the_first_sequence", marks=pytest.mark.slow)])
def test_writing_the_wrong_slot_is_found(name: str) -> None:
    report = judged("kv_write", name, WRITE)
    # The right row keeps its old contents, and a row that nobody may touch changes.
    assert "stale_row" in report.detectors, report
    if name == "slot_one_too_low":
        assert "out_of_bounds" in report.detectors, report


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name"), [("attention", "batch_baked_in"), ("paged_attention", "batch_in_the_loop")])
def test_a_batch_that_is_baked_in_is_not_a_variable_batch(stage: str, name: str) -> None:
    report = judged(stage, name)
    (finding,) = [found for found in report.findings if found.detector == "capability" and "variable_batch" in found.message]
    assert "declared capability variable_batch does not hold with a batch of 1 in the build made for 3" in finding.message
