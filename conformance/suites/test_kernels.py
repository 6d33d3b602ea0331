"""Every kernel against its contract, lane by lane. The kernels and presets are chosen by options; see ``pytest --help``."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.suites.machine import require_memory, require_npu

#: At real geometry: the whole batch, 256 cache rows. Stages of one layer execute; the fused loops compile.
FULL_SIZE = {"B": 16, "S": 256}
#: On a paged cache sequences are as long as the model allows.
FULL_LENGTH = {"B": 16, "S": 4096}
#: Layers of the fused programs: the fewest that make a loop, and the model's own.
DEPTHS = (2, 40)
#: What a real-size layer takes: 6.3 GB in the interpreter, and its weights once more here.
FULL_SIZE_BYTES = 12 << 30


@pytest.mark.compile_only
def test_compiles(subject: Any, judging: Any) -> None:
    judging.compiled()


@pytest.mark.interpret
def test_agrees_with_its_contract(subject: Any, judging: Any) -> None:
    judging.cases()


@pytest.mark.interpret(declares="capabilities")
def test_holds_what_it_declares(subject: Any, judging: Any) -> None:
    judging.capabilities()


@pytest.mark.device
def test_agrees_on_the_device(subject: Any, judging: Any) -> None:
    require_npu(judging)
    judging.cases()


@pytest.mark.full_size
def test_agrees_at_full_size(subject: Any, judging: Any) -> None:
    require_memory(judging, FULL_SIZE_BYTES)
    decodes_from_pages = "paged" in subject.kernel.stage_name
    judging.full_size(FULL_LENGTH if decodes_from_pages else FULL_SIZE)


@pytest.mark.full_size(lane="compile_only")
@pytest.mark.parametrize("layers", DEPTHS)
def test_compiles_at_full_size(subject: Any, judging: Any, layers: int) -> None:
    # The interpreter copies whatever a loop's body reads at every trip: stacked real weights would take hours. Compiling needs
    # their shapes alone.
    require_memory(judging, FULL_SIZE_BYTES)
    judging.compiled({**FULL_LENGTH, "L": layers})
