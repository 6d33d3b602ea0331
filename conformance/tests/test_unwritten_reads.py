"""Reads of memory that nothing wrote: found in what the compiler makes of a kernel, and nothing else is called one."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.cases.case import make_case
from conformance.cases.key import CaseKey
from conformance.contract.registry import stage_named
from conformance.errors import UnavailableError
from conformance.judge.judgement import judge_without_outputs
from conformance.lanes.base import Outcome, UnwrittenRead
from conformance.lanes.process import KernelProcess
from conformance.lanes.pypto.unwritten import look_at_graph
from conformance.reports.summarise import summarise
from conformance.running.check import check
from conformance.running.records import read_run
from conformance.running.runs import Judged
from conformance.running.session import RunLog, Subject
from conformance.tests.kernels_under_test import pypto_assembling
from conformance.tests.kernels_under_test.pypto_assembling import FAULTS, LEGAL
from conformance.toolchains import detect

needs_pypto = pytest.mark.skipif(not detect().supported, reason=detect().message)

KEY = CaseKey.parse("rms_norm:tiny:B=3:normal:1")

#: Compiles every kernel in one process: each takes hundredths of a second, and a process of its own seconds.
COMPILE = """
import dataclasses, json, sys
from pathlib import Path
from conformance.cases.key import CaseKey
from conformance.lanes.pypto.runtime import Builds
from conformance.lanes.pypto.runtime import Runtime
from conformance.lanes.base import Outcome
from conformance.lanes.pypto.unwritten import look_at_graph
from conformance.tests.kernels_under_test.pypto_assembling import FAULTS, LEGAL

folder = Path(sys.argv[1])
runtime, dims = Runtime(folder, folder, None), CaseKey.parse(sys.argv[2]).dims
found = {}
for name, kernel in {**LEGAL, **FAULTS}.items():
    outcome = Outcome("ok")
    look_at_graph(outcome, runtime, Builds(runtime, kernel)[dims], kernel.stage, dims)
    assert not outcome.message, outcome.message
    found[name] = [dataclasses.asdict(read) for read in outcome.unwritten_reads]
(folder / "found.json").write_text(json.dumps(found))
"""

#: What is written of the buffer (256 columns of 3 rows are what it is about), what is read, and how much of that nothing wrote.
TOLD = {
    "padding_summed": ("buffer [3, 320] is written in [0:3, 0:256] and read in [0:3, 0:320]", 192, 960),
    "half_read_whole": ("buffer [3, 256] is written in [0:3, 0:128] and read in [0:3, 0:256]", 384, 768),
    "one_column_too_far": ("buffer [3, 320] is written in [0:3, 64:320] and read in [0:3, 63:319]", 3, 768),
    "gap_in_a_list": ("buffer [3, 256] is written in 384 elements of [0:3, 0:256] and read in [0:3, 0:256]", 384, 768),
    "padding_of_k": ("buffer [3, 512] is written in [0:3, 0:256] and read in [0:3, 0:512]", 768, 1536),
    "rows_folded": ("buffer [6, 256] is written in [0:3, 0:256] and read in [0:6, 0:256]", 768, 1536),
    "padding_in_each_row": ("buffer [1, 320] is written in [0:1, 0:256] and read in [0:1, 0:320]", 64, 320),
    "half_cleared_accumulator": ("buffer [3, 256] is written in [0:3, 0:128] and read in [0:3, 0:256]", 384, 768),
    "never_written": ("buffer [3, 256] is written nowhere and read in [0:3, 0:256]", 768, 768),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    """What is found in each kernel."""
    folder = tmp_path_factory.mktemp("compiled")
    subprocess.run([sys.executable, "-c", COMPILE, str(folder), str(KEY)], check=True, timeout=300)
    result: dict[str, list[dict[str, object]]] = json.loads((folder / "found.json").read_text())
    return result


def line_of_the_read(name: str) -> int:
    """The line of a kernel's text that is marked."""
    lines = Path(pypto_assembling.__file__).read_text().splitlines()
    start = lines.index(next(line for line in lines if line.startswith(f"def {name}(")))
    return 1 + next(number for number, line in enumerate(lines) if number > start and line.endswith("# the read"))


@needs_pypto
@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_kernel_has_none(found: dict[str, list[dict[str, object]]], name: str) -> None:
    assert found[name] == []


@needs_pypto
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_with_what_is_written_and_what_is_read(found: dict[str, list[dict[str, object]]], name: str) -> None:
    (read,) = found[name]
    start, count, total = TOLD[name]
    rest = f": {count} of the {total} elements read hold whatever the memory held before, and out depends on it"
    assert read["message"] == start + rest
    assert read["location"] == f"{pypto_assembling.__file__}:{line_of_the_read(name)}"
    assert (read["argument"], read["count"], read["total"]) == ("out", count, total)


@needs_pypto
def test_a_check_on_the_compile_only_lane_reports_it() -> None:
    report = check("rms_norm", FAULTS["padding_summed"], dims={"B": 3}, lane="compile_only")
    (finding,) = report.findings
    assert (finding.detector, finding.argument, finding.count, finding.total) == ("unwritten_read", "out", 192, 960)
    assert finding.message.endswith(f" ({pypto_assembling.__file__}:{line_of_the_read('padding_summed')})")


@needs_pypto
def test_the_interpreter_reads_zeros_and_the_graph_is_looked_at_where_all_passes_are() -> None:
    with KernelProcess(FAULTS["padding_summed"], "interpret") as process:
        last, every = process.run(make_case(KEY), "last"), process.run(make_case(KEY), "all")
    assert (last.status, every.status) == ("ok", "ok")
    assert not last.outputs["out"].isnan().any()
    assert last.unwritten_reads == ()
    assert [read.argument for read in every.unwritten_reads] == ["out"]


class _WritesGraph:
    """Stands for PyPTO where it writes a graph that nobody has seen yet."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.text = folder, text

    @contextlib.contextmanager
    def output_folder(self, size: int) -> Iterator[Path]:
        assert size > 0
        yield self.folder

    def call(self, jit: object, arguments: object, *, stage: str) -> None:
        assert stage == "TENSOR_GRAPH"
        if self.text:
            (self.folder / "output" / "output_1").mkdir(parents=True)
            (self.folder / "output" / "output_1" / "program.json").write_text(self.text)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"functions": []}', '{"functions": [{"hash": 1}]}'])
def test_a_graph_that_cannot_be_read_is_no_fault_of_the_kernels_and_shown_as_not_looked_at(tmp_path: Path, text: str) -> None:
    outcome, stage, dims = Outcome("ok"), stage_named("rms_norm"), KEY.dims
    look_at_graph(outcome, _WritesGraph(tmp_path, text), None, stage, dims)  # type: ignore[arg-type]
    assert outcome.status == "ok"
    assert outcome.message.startswith("reads of memory that nothing wrote were not looked for")
    folder = tmp_path / "run"
    log = RunLog(folder)
    subject = Subject(FAULTS["padding_summed"], "tiny", "compile_only")
    log.start([subject], {})
    log.judged(subject, Judged("compile", KEY, judge_without_outputs(outcome), outcome))
    log.end(0)
    (cell,) = summarise(read_run(folder)).cells
    assert (cell.status, cell.skipped_because) == ("passed", (outcome.message,))


def test_a_run_without_outputs_is_judged_without_a_case() -> None:
    read = UnwrittenRead("out", "buffer is read", "mine.py:7", 3, 10)
    (finding,) = judge_without_outputs(Outcome("ok", unwritten_reads=(read,))).findings
    assert (finding.detector, finding.message) == ("unwritten_read", "buffer is read (mine.py:7)")
    assert judge_without_outputs(Outcome("ok")).ok
    (finding,) = judge_without_outputs(Outcome("raised", message="no such tensor")).findings
    assert (finding.detector, finding.message) == ("raised", "no such tensor")
    with pytest.raises(UnavailableError, match="no compiler"):
        judge_without_outputs(Outcome("unavailable", message="no compiler"))
