"""Every kernel against its contract, lane by lane. The kernels and presets are chosen by options; see ``pytest --help``."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.suites.machine import require_memory, require_npu

#: At real geometry: the whole batch, 256 cache rows. Stages of one layer execute; the fused loops compile.
FULL_SIZE = {"B": 16, "S": 256}
#: On a paged cache one sequence is as long as the model allows.
FULL_LENGTH = {"B": 16, "S": 4096}
#: A prefill reads all weights for every tile of 16 tokens, and the interpreter copies what is read: a few tiles are what fits.
FULL_PREFILL = {"B": 2, "S": 256, "T": 18}
#: Layers and cache rows of the fused programs: the fewest layers that make a loop, and the model's own. 40 layers of 4096 rows
#: would be a cache of 5.4 GB, and PyPTO 0.2.0 refuses to write into a tensor of more than 4 GiB.
DEPTHS = ((2, 4096), (40, 2048))
#: What the dearest real-size layer takes: 11.5 GB in the interpreter (paged, 4096 rows), and its weights once more here.
FULL_SIZE_BYTES = 14 << 30


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
    stage = subject.kernel.stage
    judging.full_size(FULL_PREFILL if stage.has_chunks else FULL_LENGTH if "paged" in stage.name else FULL_SIZE)


@pytest.mark.full_size(lane="compile_only")
@pytest.mark.parametrize(("layers", "rows"), DEPTHS)
def test_compiles_at_full_size(subject: Any, judging: Any, layers: int, rows: int) -> None:
    # The interpreter copies whatever a loop's body reads at every trip: stacked real weights would take hours. Compiling needs
    # their shapes alone.
    require_memory(judging, FULL_SIZE_BYTES)
    judging.compiled({"B": 16, "S": rows, "L": layers})
