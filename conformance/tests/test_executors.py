"""A kernel's process: right kernels come back with their results, and nothing a kernel does hurts the harness."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.contract.kernel import Kernel, as_kernel, kernel
from conformance.contract.loading import load_module
from conformance.errors import UsageError
from conformance.lanes.arena import Arena
from conformance.lanes.buffers import GUARD_ALIGNMENT, bits, case_bytes, contents, fill, lay_out, poisoned, same_bits
from conformance.lanes.process import KernelProcess, Limits
from conformance.lanes.pypto.device import Placed, run_on_card
from conformance.lanes.pypto.passes import compare_passes
from conformance.lanes.scratch import ScratchFolder, remove_abandoned
from conformance.tests.processes import alive
from conformance.toolchains import detect, find_npu

KERNELS = Path(__file__).parent / "kernels_under_test"
PYPTO = KERNELS / "pypto_misbehaving.py"
TORCH = KERNELS / "torch_misbehaving.py"

needs_pypto = pytest.mark.skipif(not detect().supported, reason=detect().message)


def pypto_kernel(name: str) -> Kernel:
    found = vars(load_module(PYPTO))[name]
    assert isinstance(found, Kernel)
    return found


def torch_kernel(name: str) -> Kernel:
    found = vars(load_module(TORCH))[name]
    assert isinstance(found, Kernel)
    return found


def case_of(stage: str = "rms_norm", B: int = 3) -> Case:
    return make_case(CaseKey(stage, "tiny", "normal", 7, (("B", B),), ()))


def expected_rms_norm(case: Case) -> torch.Tensor:
    wide = case.inputs["x"].float()
    mean_square = (wide * wide * (1.0 / case.dims.H)).sum(-1, keepdim=True)
    return (wide / (mean_square + case.dims.eps).sqrt() * case.inputs["weight"]).to(torch.bfloat16)


def line_of(path: Path, text: str) -> int:
    return 1 + next(number for number, line in enumerate(path.read_text().splitlines()) if text in line)


# A right kernel


@pytest.fixture(scope="module")
def shared() -> Iterator[KernelProcess]:
    """A process that interprets kernels chosen by the batch; tests that need no process of their own share it."""
    with KernelProcess(pypto_kernel("chosen_by_batch"), "interpret") as process:
        yield process


@needs_pypto
def test_one_process_serves_cases_of_every_batch_and_leaves_only_logs(tmp_path: Path) -> None:
    with KernelProcess(pypto_kernel("right"), "interpret", folder=tmp_path) as process:
        for B in (3, 16, 1):
            case = case_of(B=B)
            before = {name: tensor.clone() for name, tensor in case.inputs.items()}
            outcome = process.run(case)
            assert outcome.status == "ok", outcome
            assert torch.allclose(outcome.outputs["out"].float(), expected_rms_norm(case).float(), rtol=2**-7)
            assert outcome.passes_compared == 1
            assert outcome.pass_differences == ()
            assert outcome.changed_inputs == {}
            assert all(same_bits(before[name], tensor) for name, tensor in case.inputs.items())
        assert process.starts == 1
        assert outcome.seconds > 0
        assert outcome.peak_memory is not None
        assert outcome.peak_memory > 50 << 20
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".log"}


@needs_pypto
def test_outputs_do_not_change_when_the_next_case_runs(shared: KernelProcess) -> None:
    first = shared.run(case_of(B=3), "none").outputs["out"]
    copy = first.clone()
    shared.run(make_case(CaseKey("rms_norm", "tiny", "big", 8, (("B", 16),), ())), "none")
    assert same_bits(first, copy)


@needs_pypto
def test_an_axis_may_be_dynamic(shared: KernelProcess) -> None:
    for B in (2, 5):
        case = case_of(B=B)
        outcome = shared.run(case)
        assert torch.allclose(outcome.outputs["out"].float(), expected_rms_norm(case).float(), rtol=2**-7)
        assert outcome.pass_differences == ()
        # One comparison per trip of the loop over blocks of four rows.
        assert outcome.passes_compared == -(-B // 4)


@needs_pypto
def test_an_output_may_be_assembled_from_several_pieces_by_one_call(shared: KernelProcess) -> None:
    # The interpreter's table has two inputs for each piece then: the piece, and what was there before.
    case = case_of(B=11)
    for outcome in (shared.run(case, "last"), shared.run(case, "all")):
        assert outcome.status == "ok", outcome
        assert torch.allclose(outcome.outputs["out"].float(), expected_rms_norm(case).float(), rtol=2**-7)
        assert outcome.passes_compared > 0
        assert outcome.pass_differences == ()


@needs_pypto
def test_every_pass_is_compared_on_request_and_none_if_not_wanted(shared: KernelProcess) -> None:
    every, none = shared.run(case_of(), "all"), shared.run(case_of(), "none")
    assert every.passes_compared > 30
    assert every.pass_differences == ()
    assert none.passes_compared == 0
    assert same_bits(every.outputs["out"], none.outputs["out"])


@needs_pypto
def test_what_a_kernel_leaves_out_still_holds_the_poison(shared: KernelProcess) -> None:
    case = case_of(B=9)
    out = shared.run(case).outputs["out"]
    half = case.dims.H // 2
    assert not poisoned(out[:, :half]).any()
    assert poisoned(out[:, half:]).all()


@needs_pypto
def test_an_input_that_the_kernel_writes_to_is_named(shared: KernelProcess) -> None:
    outcome = shared.run(case_of(B=10))
    assert outcome.status == "ok", outcome
    assert list(outcome.changed_inputs) == ["weight"]


@needs_pypto
def test_compile_only_needs_no_inputs_and_executes_nothing() -> None:
    with KernelProcess(pypto_kernel("right"), "compile_only") as process:
        outcome = process.compile(case_of(B=16).dims)
        assert outcome.status == "ok", outcome
        assert outcome.outputs == {}
        with pytest.raises(UsageError, match="executes nothing"):
            process.run(case_of())


# Kernels that fail


@needs_pypto
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("segfaults", "SIGSEGV", marks=pytest.mark.slow),
        ("aborts", "SIGABRT during the run; it printed:\nan assertion failed"),
        ("exits", "exit code 0"),
    ],
)
def test_a_process_that_dies_is_an_outcome_that_says_how(name: str, expected: str) -> None:
    with KernelProcess(pypto_kernel(name), "interpret") as process:
        outcome = process.run(case_of())
    assert outcome.status == "crashed"
    assert expected in outcome.message
    if name != "exits":
        assert outcome.location is not None
        assert Path(outcome.location.rsplit(":", 1)[0]) == PYPTO


@needs_pypto
def test_an_endless_kernel_is_stopped_at_its_limit_and_the_next_case_gets_a_new_process() -> None:
    with KernelProcess(pypto_kernel("never_ends"), "interpret", limits=Limits(seconds=0.5)) as process:
        for _ in range(2):
            outcome = process.run(case_of())
            assert outcome.status == "timed_out"
            assert "0.5 s" in outcome.message
            assert 0.5 <= outcome.seconds < 5.0
        assert process.starts == 2


@needs_pypto
def test_a_kernel_that_uses_too_much_memory_is_stopped() -> None:
    with KernelProcess(pypto_kernel("hogs_memory"), "interpret", limits=Limits(memory_bytes=1 << 30)) as process:
        outcome = process.run(case_of())
    assert outcome.status == "crashed"
    assert re.search(r"used \d+ MiB of memory .* limit of 1024 MiB", outcome.message)


@needs_pypto
@pytest.mark.parametrize(
    ("name", "message", "line"),
    [
        ("builder_raises", "KeyError: 'no such tile table'", "raise KeyError"),
        pytest.param("body_raises", "NameError: name 'forgotten' is not defined", "forgotten(x)", marks=pytest.mark.slow),
        ("mixes_dtypes", "dtype of input tensors are not same", "pypto.add(x, pypto.cast"),
    ],
)
def test_an_error_is_told_in_one_clean_line_with_its_place(name: str, message: str, line: str) -> None:
    with KernelProcess(pypto_kernel(name), "interpret") as process:
        outcome = process.run(case_of())
    assert outcome.status == "raised"
    assert message in outcome.message
    assert "\n" not in outcome.message
    assert "\x1b" not in outcome.message
    assert ".so" not in outcome.message
    assert outcome.location == f"{PYPTO}:{line_of(PYPTO, line)}"


@needs_pypto
def test_a_failing_pass_is_named_with_its_cause_and_the_next_case_is_not_affected() -> None:
    with KernelProcess(pypto_kernel("fails_in_a_pass"), "interpret") as process:
        failed = process.run(case_of("o_proj", B=3))
        assert failed.status == "raised"
        assert re.search(r"compiler pass \w+ failed: .*exceeds", failed.message)
        # PyPTO refuses everything after such a failure, in the same process.
        passed = process.run(case_of("o_proj", B=2))
        assert passed.status == "ok", passed
        assert process.starts == 2


@needs_pypto
def test_what_a_kernel_prints_goes_to_a_log_that_stays_small(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with KernelProcess(pypto_kernel("talks"), "interpret", folder=tmp_path) as process:
        for B in (1, 2, 3):
            assert process.run(case_of(B=B), "none").status == "ok"
    assert (tmp_path / "stdout.log").stat().st_size < 2 << 20
    assert capfd.readouterr() == ("", "")


@needs_pypto
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("wrong_dtype", ("argument weight", "expected f32", "found pypto.DT_BF16", "correct its annotation")),
        ("wrong_shape", ("argument x", "expected shape [3, 256] (B H)", "found [16, 256]")),
        ("wrong_order", ("(x, weight, out)", "found (out, x, weight)")),
        ("returns_a_function", ("pypto.frontend.jit", "returned function")),
    ],
)
def test_annotations_that_are_not_the_contract_are_told_in_one_line(interpreted: Path, name: str, parts: Sequence[str]) -> None:
    message = (interpreted / name).read_text()
    assert re.fullmatch(rf"kernel {name}[,:][^\n]*", message)
    assert all(part in message for part in parts)


@needs_pypto
def test_annotations_that_are_not_the_contract_are_an_error_of_use() -> None:
    with KernelProcess(pypto_kernel("wrong_dtype"), "interpret") as process, pytest.raises(UsageError, match="argument weight"):
        process.run(case_of())


# Torch kernels


def test_a_torch_kernel_without_the_decorator_runs_in_a_process_of_its_own() -> None:
    case = case_of()
    with KernelProcess(as_kernel("rms_norm", load_module(TORCH).plain), "eager") as process:
        outcome = process.run(case)
    assert outcome.status == "ok", outcome
    assert torch.allclose(outcome.outputs["out"].float(), expected_rms_norm(case).float(), rtol=2**-7)


def test_a_torch_kernel_that_raises_keeps_its_process_and_one_that_crashes_is_told_with_its_line() -> None:
    with KernelProcess(torch_kernel("raises"), "eager") as process:
        for _ in range(2):
            outcome = process.run(case_of())
            assert (outcome.status, outcome.message) == ("raised", "ZeroDivisionError: of course")
        assert process.starts == 1
    with KernelProcess(torch_kernel("segfaults"), "eager") as process:
        outcome = process.run(case_of())
        assert outcome.status == "crashed"
        assert outcome.location == f"{TORCH}:{line_of(TORCH, 'ctypes.string_at(0)')}"


def test_a_native_call_that_never_returns_is_stopped_and_located(tmp_path: Path) -> None:
    with KernelProcess(torch_kernel("sleeps"), "eager", limits=Limits(seconds=1.0), folder=tmp_path) as process:
        outcome = process.run(case_of())
    assert outcome.status == "timed_out"
    here = line_of(TORCH, "PyDLL(None).sleep")
    assert outcome.location == f"{TORCH}:{here}"
    assert f'torch_misbehaving.py", line {here} in sleeps' in (tmp_path / "stack.log").read_text()


# Processes and their owner


def test_closing_ends_the_process_and_removes_its_folder_and_a_later_run_starts_anew() -> None:
    process = KernelProcess(torch_kernel("right"), "eager")
    process.run(case_of())
    number, folder = process.pid, process._worker._folder
    assert number is not None
    assert folder is not None
    assert folder.is_dir()
    process.close()
    process.close()
    assert not alive(number)
    assert not folder.exists()
    assert process.run(case_of()).status == "ok"
    process.close()


OWNER = """
import sys, threading, time
from conformance.cases.key import CaseKey
from conformance.cases.case import make_case
from conformance.contract.loading import load_module
from conformance.lanes.process import KernelProcess

process = KernelProcess(load_module(sys.argv[1]).sleeps, "eager")
threading.Thread(target=process.run, args=(make_case(CaseKey("rms_norm", "tiny", "normal", 1, (("B", 1),), ())),)).start()
while process.pid is None:
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("seconds", [0.0, 8.0], ids=["starting", "in a native call"])
def test_a_process_does_not_outlive_an_owner_that_is_killed(seconds: float) -> None:
    command = [sys.executable, "-c", OWNER, str(TORCH), str(seconds)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        worker = int(owner.stdout.readline())
        assert alive(worker)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    deadline = time.monotonic() + 30.0
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(worker)


ABANDON = """
import os, sys
from pathlib import Path
from conformance.lanes.scratch import ScratchFolder

print(ScratchFolder(Path(sys.argv[1])).path, flush=True)
os.kill(os.getpid(), 9)
"""


def test_folders_of_a_killed_owner_are_removed_by_the_next_and_those_in_use_are_not(tmp_path: Path) -> None:
    in_use = ScratchFolder(tmp_path)
    done = subprocess.run([sys.executable, "-c", ABANDON, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=False)
    abandoned = Path(done.stdout.strip())
    assert abandoned.is_dir()
    other = ScratchFolder(tmp_path)
    assert not abandoned.exists()
    assert in_use.path.is_dir()
    for folder in (in_use, other):
        folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_for_abandoned_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.flock, list[str]()

    def late(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_EX and not removed:
            removed.extend(path.name for path in tmp_path.iterdir())
            remove_abandoned(tmp_path)
        lock(descriptor, how)

    monkeypatch.setattr("fcntl.flock", late)
    folder = ScratchFolder(tmp_path)
    assert folder.path.is_dir()
    assert [folder.path.name] != removed
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_no_other_process_can_import_is_refused() -> None:
    @kernel("rms_norm")
    def inner(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        out.zero_()

    with pytest.raises(UsageError, match="define it at module level"):
        KernelProcess(inner, "eager")


def test_questions_that_make_no_sense_are_refused() -> None:
    right = torch_kernel("right")
    with pytest.raises(UsageError, match="is a torch kernel, whose lanes are eager"):
        KernelProcess(right, "interpret")
    with pytest.raises(UsageError, match="unknown lane 'simulate'"):
        KernelProcess(right, "simulate")
    with pytest.raises(UsageError, match="must be a positive number"):
        Limits(seconds=0)
    with pytest.raises(UsageError, match="passes is"):
        KernelProcess(right, "eager").run(case_of(), "some")  # type: ignore[arg-type]


def test_the_arena_keeps_what_is_in_use_when_it_grows() -> None:
    arena = Arena()
    small = arena.view(0, torch.int32, 10)
    small.copy_(torch.arange(10, dtype=torch.int32))
    large = arena.view(GUARD_ALIGNMENT, torch.bfloat16, 1_000_000)
    large.copy_(torch.randn(1_000_000))
    other = Arena(os.dup(arena.descriptor))
    assert torch.equal(other.view(GUARD_ALIGNMENT, torch.bfloat16, 1_000_000), large)
    small += 1
    assert torch.equal(other.view(0, torch.int32, 10), torch.arange(1, 11, dtype=torch.int32))
    for side in (arena, other):
        side.close()


def test_a_kernel_cannot_make_the_arena_shorter() -> None:
    arena = Arena()
    arena.reach(1 << 20)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.descriptor, 0)
    arena.close()


def test_arguments_lie_aligned_between_guards() -> None:
    case = case_of()
    arena = Arena()
    arguments = lay_out(arena, case.stage, case.dims)
    fill(arguments, case.stage, case.inputs)
    assert all(guarded.tensor.data_ptr() % GUARD_ALIGNMENT == 0 for guarded in arguments.values())
    assert list(contents(arguments, case.stage, case.inputs).guard_damage) == []
    assert poisoned(arguments["out"].tensor).all()
    arena.close()


# The device lane


@needs_pypto
@pytest.mark.skipif(find_npu().usable, reason="this machine has an NPU")
def test_without_a_card_the_device_lane_is_unavailable_and_says_what_is_missing() -> None:
    with KernelProcess(pypto_kernel("right"), "device") as process:
        outcome = process.run(case_of())
        assert process.starts == 0
    assert outcome.status == "unavailable"
    assert "no usable NPU" in outcome.message


class StrayCard:
    """A card whose kernel copies ``x`` to ``out``, one row too many, and changes an element of ``weight``."""

    device_seconds: float | None = None

    def place(self, storage: torch.Tensor) -> torch.Tensor:
        return storage.clone()

    def launch(self, jit: Any, arguments: Sequence[torch.Tensor]) -> None:
        x, weight, out = arguments
        out.copy_(x)
        beyond = torch.as_strided(out, (out.shape[1],), (1,), out.storage_offset() + out.numel())
        beyond.fill_(1.0)
        weight[0, 5] = 17.0

    def read_back(self, storage: torch.Tensor) -> torch.Tensor:
        return storage.clone()


def test_what_a_card_writes_beside_its_outputs_is_found() -> None:
    case = case_of()
    arena = Arena()
    arena.reach(case_bytes(case.stage, case.dims))
    arguments = lay_out(arena, case.stage, case.dims)
    fill(arguments, case.stage, case.inputs)
    assert run_on_card(StrayCard(), case.stage, None, arguments).status == "ok"
    left = contents(arguments, case.stage, case.inputs)
    assert same_bits(left.outputs["out"], case.inputs["x"])
    assert list(left.guard_damage) == ["out"]
    assert f"{case.dims.H} elements past the end" in left.guard_damage["out"]
    assert left.changed_inputs == {"weight": 1}
    arena.close()


class HostCard:
    """A card in the host's memory, which remembers of what size it was asked to place and to read back."""

    device_seconds: float | None = None

    def __init__(self) -> None:
        self.placed: list[int] = []
        self.read: list[int] = []
        self.spoil: Callable[[torch.Tensor], object] = lambda weights: None

    def place(self, storage: torch.Tensor) -> torch.Tensor:
        self.placed.append(storage.numel())
        return storage.clone()

    def launch(self, jit: Any, arguments: Sequence[torch.Tensor]) -> None:
        *_, weights, _, out = arguments
        out.zero_()
        self.spoil(weights)

    def read_back(self, storage: torch.Tensor) -> torch.Tensor:
        self.read.append(storage.numel())
        return storage.clone()


def one_element(weights: torch.Tensor) -> None:
    bits(weights)[-1, -1] ^= 1


def two_exchanged(weights: torch.Tensor) -> None:
    weights[7, 40:44] = weights[7, 40:44].flip(0)


def past_the_end(weights: torch.Tensor) -> None:
    torch.as_strided(weights, (1,), (1,), weights.storage_offset() + weights.numel() + 9).fill_(1.0)


@pytest.mark.parametrize("spoil", [one_element, two_exchanged, past_the_end])
def test_weights_are_placed_once_and_read_back_where_their_checksum_changed(spoil: Callable[[torch.Tensor], None]) -> None:
    case = make_case(CaseKey("o_proj", "qwen3_0_6b", "normal", 1, (("B", 2),)))
    arena = Arena()
    arena.reach(case_bytes(case.stage, case.dims))
    arguments = lay_out(arena, case.stage, case.dims)
    card, placed, weights = HostCard(), dict[str, Placed](), arguments["wo"].storage.numel()

    def found() -> tuple[bool, bool]:
        fill(arguments, case.stage, case.inputs)
        kept = {name: one for name, one in placed.items() if name == "wo"}
        placed.clear()
        placed.update(kept)
        run_on_card(card, case.stage, None, arguments, placed)
        left = contents(arguments, case.stage, case.inputs)
        return "wo" in left.changed_inputs, "wo" in left.guard_damage

    assert found() == found() == (False, False)
    assert (card.placed.count(weights), card.read.count(weights)) == (1, 0)
    card.spoil = spoil
    assert found() == (spoil is not past_the_end, spoil is past_the_end)
    assert card.read.count(weights) == 1
    # What was spoiled is placed anew, and the next run is blamed for nothing.
    card.spoil = lambda weights: None
    assert found() == (False, False)
    assert (card.placed.count(weights), card.read.count(weights)) == (2, 1)
    arena.close()


# The comparison of passes, on what PyPTO really wrote, altered

COMPILE = """
import shutil, sys
from pathlib import Path
import torch
from conformance.cases.key import CaseKey
from conformance.cases.case import make_case
from conformance.contract.loading import load_module
from conformance.errors import UsageError
from conformance.lanes.pypto import interpret
from conformance.lanes.arena import Arena
from conformance.lanes.buffers import fill, lay_out
from conformance.lanes.pypto.runtime import Builds, Runtime
from conformance.lanes.pypto.serve import Build
from conformance.toolchains import calculator

folder = Path(sys.argv[2])
runtime = Runtime(folder, folder, calculator())
compare = interpret.compare_passes
for name, stage in (("right", "rms_norm"), ("fails_in_a_pass", "o_proj")):
    kernel = vars(load_module(sys.argv[1]))[name]
    case = make_case(CaseKey(stage, "tiny", "normal", 7, (("B", 8 if stage == "rms_norm" else 2),), ()))

    def keep(output):
        shutil.copytree(output, folder / stage)
        return compare(output)

    interpret.compare_passes = keep
    arguments = lay_out(Arena(), kernel.stage, case.dims)
    fill(arguments, kernel.stage, case.inputs)
    build = Build(runtime, Builds(runtime, kernel)[case.dims], kernel.stage, case.dims)
    interpret.interpret(build, {name: guarded.tensor for name, guarded in arguments.items()}, "last")

for name in ("wrong_dtype", "wrong_shape", "wrong_order", "returns_a_function"):
    try:
        Builds(runtime, vars(load_module(sys.argv[1]))[name])[CaseKey("rms_norm", "tiny", "normal", 7, (("B", 3),), ()).dims]
    except UsageError as error:
        (folder / name).write_text(str(error))
"""

PASS = "Pass_36_CodegenPreproc"


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``rms_norm`` (8 rows in tiles of 4) and ``o_proj`` of what PyPTO wrote, and files of what was said of kernels."""
    folder = tmp_path_factory.mktemp("interpreted")
    subprocess.run([sys.executable, "-c", COMPILE, str(PYPTO), str(folder)], check=True, timeout=300)
    return folder


@dataclasses.dataclass
class Written:
    """A copy of PyPTO's files that a test may alter."""

    folder: Path

    @property
    def verify(self) -> Path:
        (found,) = self.folder.glob("verify_*")
        return found

    def rows(self, table: str) -> list[dict[str, str]]:
        with (self.verify / f"verify_result_{table}.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def keep_rows(self, table: str, rows: list[dict[str, str]]) -> None:
        fields = list(self.rows(table)[0])
        with (self.verify / f"verify_result_{table}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(rows)

    def tiles(self) -> list[tuple[list[int], Path]]:
        """Where each tile of the result goes and the file of what is written there, after the last pass."""
        return [
            ([int(part) for part in row["offset"].strip("[]").split(",")], self.verify / PASS / row["inputTensors"])
            for row in self.rows("metadata")
            if row["passName"] == PASS and row["opCode"] == "COPY_OUT" and row["outputSymbol"] == "out"
        ]

    def result(self) -> Path:
        """The file of the result after the last pass, as far as PyPTO saves it: whole if it is one tile."""
        (found,) = [row["outputTensor"] for row in self.rows("brief") if row["passName"] == PASS]
        return self.verify / PASS / found

    def last_tile(self) -> tuple[list[int], Path]:
        return max(self.tiles())

    def alter(self, path: Path, dtype: torch.dtype, position: int, factor: float) -> None:
        values = torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype)
        values[position] *= factor
        path.write_bytes(bytes(bits(values).view(torch.uint8).tolist()))


@pytest.fixture
def rms_norm(interpreted: Path, tmp_path: Path) -> Written:
    return Written(Path(shutil.copytree(interpreted / "rms_norm", tmp_path / "rms_norm")))


@pytest.fixture
def o_proj(interpreted: Path, tmp_path: Path) -> Written:
    return Written(Path(shutil.copytree(interpreted / "o_proj", tmp_path / "o_proj")))


@needs_pypto
def test_passes_agree_on_what_pypto_wrote(rms_norm: Written, o_proj: Written) -> None:
    for written in (rms_norm, o_proj):
        comparison = compare_passes(written.folder)
        assert comparison.differences == ()
        assert comparison.compared == 1


@needs_pypto
def test_a_changed_element_is_seen_where_pypto_itself_does_not_look(rms_norm: Written) -> None:
    # Its own comparison covers the first tile of a result; this is the last one.
    offset, path = rms_norm.last_tile()
    assert offset[0] == 4
    rms_norm.alter(path, torch.bfloat16, 10, 1.5)
    (difference,) = compare_passes(rms_norm.folder).differences
    assert (difference.compiler_pass, difference.result, difference.count) == (PASS, "out", 1)
    assert difference.total == 8 * 256
    assert "at [4, 10]" in difference.message


@needs_pypto
def test_one_unit_in_the_last_place_is_seen_where_a_pass_can_reorder_nothing(rms_norm: Written) -> None:
    # Without its row sum the function has no operation whose order matters.
    rows = [row for row in rms_norm.rows("metadata") if "SUM" not in row["opCode"]]
    rms_norm.keep_rows("metadata", rows)
    assert compare_passes(rms_norm.folder).differences == ()
    rms_norm.alter(rms_norm.last_tile()[1], torch.bfloat16, 10, 1 + 2**-7)
    (difference,) = compare_passes(rms_norm.folder).differences
    assert difference.count == 1


@needs_pypto
def test_nan_on_one_side_only_is_a_difference_and_on_both_is_not(rms_norm: Written) -> None:
    _, path = rms_norm.last_tile()
    rms_norm.alter(path, torch.bfloat16, 10, float("nan"))
    (difference,) = compare_passes(rms_norm.folder).differences
    assert (difference.count, difference.worst) == (1, float("inf"))
    (golden,) = (rms_norm.verify / PASS).glob("*~golden~*")
    rms_norm.alter(golden, torch.bfloat16, 4 * 256 + 10, float("nan"))
    assert compare_passes(rms_norm.folder).differences == ()


@needs_pypto
def test_what_another_order_of_summation_explains_is_no_difference(o_proj: Written) -> None:
    path = o_proj.result()
    largest = int(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).abs().argmax())
    o_proj.alter(path, torch.float32, largest, 1 + 2**-18)
    assert compare_passes(o_proj.folder).differences == ()
    o_proj.alter(path, torch.float32, largest, 1 + 2**-10)
    assert len(compare_passes(o_proj.folder).differences) == 1


@needs_pypto
def test_a_result_that_is_no_longer_written_is_a_difference(rms_norm: Written) -> None:
    _, path = rms_norm.last_tile()
    rows = [row for row in rms_norm.rows("metadata") if not (row["opCode"] == "COPY_OUT" and row["inputTensors"] == path.name)]
    rms_norm.keep_rows("metadata", rows)
    (difference,) = compare_passes(rms_norm.folder).differences
    assert difference.count == 4 * 256
    assert "no longer written" in difference.message


@needs_pypto
def test_results_and_files_that_are_missing_are_differences(rms_norm: Written) -> None:
    rms_norm.last_tile()[1].unlink()
    comparison = compare_passes(rms_norm.folder)
    assert "could not be compared" in comparison.differences[0].message
    assert comparison.compared == 0
    rms_norm.keep_rows("brief", [row for row in rms_norm.rows("brief") if row["passName"] == "tensor_graph"])
    (difference,) = compare_passes(rms_norm.folder).differences
    assert difference.compiler_pass == PASS
    assert "left no result" in difference.message


@needs_pypto
def test_a_pass_whose_result_cannot_be_interpreted_is_a_difference(rms_norm: Written) -> None:
    function = rms_norm.rows("brief")[0]["verifyType"]
    with (rms_norm.verify / "verify_exception.log").open("a") as log:
        log.write(
            f"ErrCode: F4B003! VerifyPass failed for function {function}, pass InferParamIndex "
            "(passIndex: 28, captureIndex: 0): index out of range\n"
        )
    (difference,) = compare_passes(rms_norm.folder).differences
    assert difference.compiler_pass == "Pass_28_InferParamIndex"
    assert "index out of range" in difference.message
