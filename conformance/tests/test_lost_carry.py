"""The fault this project began with, as PyPTO kernels: a fused loop whose hidden states do not get from layer to layer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conformance.contract.loading import find_kernel, kernels_in, load_module
from conformance.running.check import Report, check

FILE = Path(__file__).parents[2] / "kernels" / "qwen3" / "exam" / "pypto" / "faults" / "lost_carry.py"
CASE = "decode_fwd_layers:tiny:B=2,L=3,seq_lens=1+15:normal:7"


def judged(name: str) -> Report:
    kernel = find_kernel(kernels_in(load_module(FILE)), name, FILE.name)
    return check("decode_fwd_layers", kernel, case=CASE)


@pytest.mark.parametrize("name", ["carry_rebound", pytest.param("carry_reads_first_input", marks=pytest.mark.slow)])
def test_layers_that_read_the_first_input_are_named(name: str) -> None:
    report = judged(name)
    assert not report.ok
    assert "element" in report.detectors
    message = report.findings[0].finding.message
    assert "layer 1 read the first input and did not see layer 0's output" in message
    assert "layer 2 read the first input and did not see layer 1's output" in message
    assert "layer 0" in message.split("Likely cause:")[1]
    assert not re.search(r"layer 0 (read|saw)", message)


def test_a_half_written_carry_is_named_by_layer() -> None:
    report = judged("carry_half_written")
    assert "element" in report.detectors
    message = report.findings[0].finding.message
    assert "layer 1 saw only the first half of layer 0's output, the rest was the first input" in message
    assert "layer 2 saw only the first half of layer 1's output, the rest was the first input" in message


def test_a_carry_that_is_never_written_is_raised_with_file_and_line() -> None:
    report = judged("carry_never_written")
    assert report.detectors == ("raised",)
    message = report.findings[0].finding.message
    assert re.search(r"lost_carry\.py:\d+", message), message
    assert len(message) > 60, message
