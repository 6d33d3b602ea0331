"""The ``conformance`` command, run as a person does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from conformance.cli import main
from conformance.lanes import process as process_module
from conformance.reports.summarise import summarise
from conformance.running.records import read_run
from conformance.tests.fake_machine import FakeMachine
from conformance.toolchains import detect

TORCH_KERNELS = """
import time
import torch
import conformance


def plain(x, weight, out):
    wide = x.float()
    out.copy_(wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6) * weight)


@conformance.kernel("rms_norm")
def gain(x, weight, out):
    plain(x, weight, out)
    out.mul_(1.005)


@conformance.kernel("rms_norm", capabilities=["variable_batch"])
def serving(x, weight, out):
    plain(x, weight, out)


@conformance.kernel("rms_norm")
def endless(x, weight, out):
    while True:
        time.sleep(0.01)


@conformance.kernel("rms_norm", accepts=lambda dims: dims.B == 99 or "it takes B = 99 only")
def picky(x, weight, out):
    plain(x, weight, out)


@conformance.kernel("rms_norm")
def masked(x, weight, out):
    wide = x.float()
    padded = 1 << (x.shape[1] - 1).bit_length()
    out.copy_(wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) / padded + 1e-6) * weight)


@conformance.kernel("rms_norm")
def resizing(x, weight, out):
    plain(x, weight, out)
    out.resize_(len(out) + 1, out.shape[1])


@conformance.kernel("rms_norm", accepts=lambda dims: dims.H == 256 or "H must be 256")
def wide(x, weight, out):
    plain(x, weight, out)
"""


#: The builder runs in the worker, after PyPTO has been loaded without the CANN that is not here.
COMPILED = """
import os
import conformance


@conformance.kernel("rms_norm", toolchain="pypto")
def mine(dims):
    import pypto

    if os.environ.get("LATER"):
        os.environ["ASCEND_HOME_PATH"] = os.environ["LATER"]
    B, H = dims.B, dims.H

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        pypto.set_vec_tile_shapes(4, H)
        out[:] = pypto.cast(pypto.mul(pypto.cast(x, pypto.DT_FP32), weight), pypto.DT_BF16)

    return rms_norm
"""


def run_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command from ``folder``, within this process, which has imported everything already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(main, arguments)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TORCH_KERNELS)
    return tmp_path


def test_a_plain_function_passes_and_the_run_is_kept(folder: Path) -> None:
    done = run_command(folder, "check", "rms_norm", "mine.py:plain", "--examples", "12", "--out", "kept")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plain (rms_norm, eager): passed 12 cases" in done.stdout
    log = read_run(folder / "kept")
    assert sum(record.check == "example" for record in log.records) == 12
    assert (folder / "kept" / "report.html").exists()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder, and the check of a wrong kernel that was kept there."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "mine.py").write_text(TORCH_KERNELS)
    return folder, run_command(folder, "check", "rms_norm", "mine.py:gain", "--examples", "9", "--out", "kept")


def test_a_finding_can_be_run_again_by_its_key(wrong: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = wrong
    assert done.returncode == 1
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("again: ")) <= 80
    again = next(line for line in done.stdout.splitlines() if line.startswith("again: conformance "))
    replay = run_command(folder, *again.split()[2:], "--out", "again")
    assert replay.returncode == 1
    assert "FAILED" in replay.stdout
    cases = {record.case for record in read_run(folder / "again").of("case") if record.check == "example"}
    assert cases == {again.split()[-1]}


def test_every_record_names_the_preset_of_its_case(folder: Path) -> None:
    done = run_command(folder, "check", "rms_norm", "mine.py:masked", "--examples", "6", "--out", "kept")
    assert done.returncode == 1, done.stdout + done.stderr
    log = read_run(folder / "kept")
    assert {record.preset: record.status for record in log.of("case")} == {"tiny": "passed", "awkward": "failed"}
    assert all(record.case.split(":")[1] == record.preset for record in log.of("case"))
    cells = {cell.preset: cell.status for cell in summarise(log).cells}
    assert cells == {"tiny": "passed", "awkward": "failed"}
    key = next(record.case for record in log.of("case") if record.preset == "awkward")
    run_command(folder, "check", "rms_norm", "mine.py:masked", "--case", key, "--out", "again")
    assert {cell.preset for cell in summarise(read_run(folder / "again")).cells} == {"awkward"}


def test_a_resized_output_is_noticed_in_a_worker(folder: Path) -> None:
    done = run_command(folder, "check", "rms_norm", "mine.py:resizing", "--examples", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "raised, 1 case" in done.stdout


def test_what_the_kernel_takes_no_case_of_is_in_the_summary(folder: Path) -> None:
    done = run_command(folder, "check", "rms_norm", "mine.py:wide", "--examples", "4", "--out", "kept")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no case of awkward: H must be 256" in done.stdout
    cells = {cell.preset: (cell.status, cell.cases > 0) for cell in summarise(read_run(folder / "kept")).cells}
    assert cells == {"tiny": ("passed", True), "awkward": ("skipped", False)}


def test_a_failure_at_one_preset_is_expected_as_at_the_other(folder: Path) -> None:
    (folder / "known.txt").write_text("masked  its tail\n")
    options = ["--examples", "4", "--expected-failures", "known.txt", "--out", "kept"]
    assert run_command(folder, "check", "rms_norm", "mine.py:masked", *options).returncode == 0
    summary = summarise(read_run(folder / "kept"))
    assert {cell.preset: cell.status for cell in summary.cells} == {"tiny": "passed", "awkward": "failed as expected"}
    assert summary.outcome == "passed"


def test_a_kernel_that_takes_too_long_is_a_finding(folder: Path) -> None:
    """One that crashes is in ``test_capabilities.py``."""
    done = run_command(folder, "check", "rms_norm", "mine.py:endless", "--examples", "2", "--timeout", "1.5")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "timed_out" in done.stdout
    assert "1.5 s" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "rms_nrm"], "unknown stage 'rms_nrm'"),
        (["check", "rms_norm", "mine.py"], "expected FILE.py:FUNC"),
        (["check", "rms_norm", "nowhere.py:f"], "no such kernel file"),
        (["check", "rms_norm", "mine.py:f"], "no kernel or function 'f'"),
        (["check", "rope", "mine.py:gain"], "gain implements rms_norm, not rope"),
        (["check", "rope", "mine.py:plain"], "expected (q, k, seq_lens"),
        (["check", "rms_norm", "mine.py:plain", "--dims", "huge"], "unknown preset 'huge'"),
        (["check", "rms_norm", "mine.py:plain", "--dims", "B=x"], "overrides such as B=3,S=64"),
        (["check", "rms_norm", "mine.py:plain", "--dims", "B=²"], "overrides such as B=3,S=64, found 'B=²'"),
        (["check", "rms_norm", "mine.py:plain", "--dims", "Q=3"], "unknown dimension 'Q'"),
        (["check", "rms_norm", "mine.py:plain", "--dims", "NKV=3"], "NH must be a multiple of NKV"),
        (["check", "rms_norm", "mine.py:plain", "--examples", "0"], "examples must be a positive"),
        (["check", "rms_norm", "mine.py:plain", "--case", "nonsense"], "a case key looks like"),
        (["check", "rms_norm", "mine.py:plain", "--case", "rope:tiny:B=1,seq_lens=3:normal:1"], "is of stage rope"),
        (["check", "rms_norm", "mine.py:plain", "--lane", "device"], "has no lane 'device'"),
        (["check", "rms_norm", "mine.py:picky"], "it takes B = 99 only"),
        (["check", "rms_norm", "mine.py:plain", "--expected-failures", "nowhere.txt"], "cannot read the list"),
        (["check", "rms_norm", "mine.py:plain", "--all-passes"], "--all-passes goes with --case"),
        (["check", "rms_norm", "mine.py:plain", "--out", "mine.py"], "mine.py is a file"),
        (["report", "nowhere"], "no run in nowhere"),
        (["diff", "mine.py:gain", "mine.py:plain"], "mine.py:plain is a plain function"),
        (["diff", "mine.py:gain", "nowhere"], "no kernel 'nowhere' in the bundled kernels (and there is no such folder)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout


def test_expected_failures_pass_and_a_fixed_one_says_so(folder: Path) -> None:
    (folder / "known.txt").write_text("# what we know\n\ngain  a known gain\n")
    options = ["--examples", "7", "--expected-failures", "known.txt"]
    done = run_command(folder, "check", "rms_norm", "mine.py:gain", *options)
    assert done.returncode == 0
    assert "failed as expected: a known gain" in done.stdout
    (folder / "known.txt").write_text("plain  was wrong once\n")
    done = run_command(folder, "check", "rms_norm", "mine.py:plain", *options)
    assert done.returncode == 0
    assert "FIXED, take it off the list: was wrong once" in done.stdout


def test_report_is_rebuilt_from_records_alone(wrong: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = wrong
    before = (folder / "kept" / "report.html").read_text()
    for name in ("report.html", "summary.md", "junit.xml"):
        (folder / "kept" / name).unlink()
    done = run_command(folder, "report", "kept")
    assert done.returncode == 0
    assert "gain" in done.stdout
    assert (folder / "kept" / "report.html").read_text() == before


def test_doctor_names_what_the_lanes_need(folder: Path) -> None:
    done = run_command(folder, "doctor")
    assert done.returncode == 0
    for name in ("python", "torch", "pypto", "g++", "make", "cmake", "calculator", "npu"):
        assert any(line[3:].lstrip().startswith(name) for line in done.stdout.splitlines()), done.stdout


def test_list_shows_every_stage_with_its_arguments_and_its_kernels(folder: Path) -> None:
    done = run_command(folder, "list", "--kernels", "mine.py")
    assert done.returncode == 0
    from conformance.contract.registry import stages
    from conformance.lanes.listing import bundled_kernels

    sections: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if not line.startswith(" "):
            sections[line.split(":")[0]] = []
        else:
            next(reversed(sections.values())).append(line)
    assert list(sections) == list(stages())
    for stage in stages().values():
        arguments = " ".join(line.strip() for line in sections[stage.name] if line.startswith("    "))
        assert arguments == ", ".join(argument.describe() for argument in stage.arguments)
    for kernel in bundled_kernels():
        able = f"; {' '.join(kernel.capabilities)}" if kernel.capabilities else ""
        assert f"  - {kernel.name} (pypto: compile_only interpret device{able})" in sections[kernel.stage.name]
    assert "  - gain (torch: eager)" in sections["rms_norm"]
    assert "  - serving (torch: eager; variable_batch)" in sections["rms_norm"]


def test_diff_has_an_exit_code_for_what_is_lost(folder: Path) -> None:
    """More of it in ``test_comparison.py``."""
    done = run_command(folder, "diff", "mine.py:serving", "mine.py:gain", "--examples", "2")
    assert done.returncode == 4, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "serves less: 1 capability lost"
    assert "lost: variable_batch" in done.stdout


def test_a_reader_that_has_seen_enough_ends_the_command_quietly() -> None:
    command = f"{sys.executable} -m conformance.cli list | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


# The device lane, and what compiles


@pytest.mark.parametrize("command", [("check", "rms_norm"), ("diff", "rms_norm", "rms_norm")])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lane", "device", "--device", "x"), "--device takes numbers of cards, such as 0 or 0,2-3, found 'x'"),
        (("--device", "0"), "--device is for runs on a card, and the interpret lane takes none"),
        (("--device-wait", "9"), "--device-wait is for runs on a card, and the interpret lane takes none"),
    ],
)
def test_an_option_that_names_no_card_or_is_for_none_is_usage_in_one_line(
    folder: Path, command: tuple[str, ...], options: tuple[str, ...], message: str
) -> None:
    done = run_command(folder, *command, *options)
    assert (done.returncode, done.stderr) == (2, f"conformance: {message}\n")


@pytest.mark.skipif(not detect().supported, reason=detect().message)
def test_a_host_compile_and_a_device_compile_are_two_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMachine(tmp_path / "machine")
    # What the device's compiler is asked for is the file behind -o.
    fake.program("bisheng", 'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done')
    # Without one PyPTO compiles a kernel's control flow for the host alone.
    fake.hcc.unlink()
    (tmp_path / "mine.py").write_text(COMPILED)
    monkeypatch.setenv("PATH", fake.environment["PATH"])
    for name, told in (("host", "host compile"), ("device", "device compile")):
        if name == "device":
            monkeypatch.setenv("LATER", str(fake.cann))
        done = run_command(
            tmp_path, "check", "rms_norm", "mine.py:mine", "--lane", "compile_only", "--dims", "tiny", "--out", name
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"passed 1 case, {told}" in done.stdout
        log = read_run(tmp_path / name)
        assert [record.details for record in log.of("case")] == [{"compile": told}]
        assert [row.remark for row in summarise(log).rows] == [f", {told}"]
        for page in ("report.html", "summary.md", "junit.xml"):
            assert told in (tmp_path / name / page).read_text()
    # What only the device's compiler refuses is a verdict of that one. Here only the worker has ASCEND_HOME_PATH.
    monkeypatch.setattr(process_module, "attempted", lambda: "device compile")
    fake.program("bisheng", "exit 1")
    done = run_command(tmp_path, "check", "rms_norm", "mine.py:mine", "--lane", "compile_only", "--dims", "tiny", "--out", "no")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED 1 of 1 run of 1 case, device compile" in done.stdout
    log = read_run(tmp_path / "no")
    assert [row.remark for row in summarise(log).rows] == [", device compile failed"]


#: In every process of a run: PyPTO is loaded without the CANN that is not here, and finds it when it compiles.
LATE_CANN = """
import os
import sys


class Late:
    def find_spec(self, name, path=None, target=None):
        if name == "conformance.lanes.pypto.unwritten":
            os.environ["ASCEND_HOME_PATH"] = os.environ["LATER"]


sys.meta_path.insert(0, Late())
"""
#: PyPTO names the sources of a kernel's parts by its loops: that of the probe is known.
REFUSES = """
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && : > "$2"
  case "$1" in TENSOR_tile*|*/TENSOR_tile*) {probe};; *TENSOR_*.cpp) {kernel};; esac
  shift
done
"""
FAILS = "echo \"pto.hpp:7:1: error: no member named 'TLOAD'\" >&2; exit 1"


@pytest.mark.skipif(not detect().supported, reason=detect().message)
@pytest.mark.parametrize(("probe", "code", "said"), [(FAILS, 3, "device compiler fails also for a"), (":", 1, "crashed, 1 case")])
def test_a_kernel_is_blamed_for_what_the_compiler_says_of_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: str, code: int, said: str
) -> None:
    fake = FakeMachine(tmp_path / "machine")
    fake.program("bisheng", REFUSES.format(probe=probe, kernel=FAILS))
    fake.hcc.unlink()
    (tmp_path / "mine.py").write_text(COMPILED)
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(LATE_CANN)
    monkeypatch.setenv("PATH", fake.environment["PATH"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "late"), prepend=":")
    monkeypatch.setenv("LATER", str(fake.cann))
    done = run_command(tmp_path, "check", "rms_norm", "mine.py:mine", "--lane", "compile_only", "--dims", "tiny")
    printed = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == code, printed
    assert said in printed
    assert "pto.hpp:7:1: error: no member named 'TLOAD'" in printed


@pytest.mark.skipif(not detect().supported, reason=detect().message)
def test_without_the_compiler_that_cann_names_nothing_is_compiled_and_no_kernel_blamed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", "/nowhere")
    done = run_command(folder, "check", "rms_norm", "--lane", "compile_only", "--dims", "tiny")
    assert done.returncode == 3
    assert "no device compiler: CANN not found: ASCEND_HOME_PATH is /nowhere, which is no folder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
