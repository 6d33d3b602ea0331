"""Kernels that do what no kernel should. None is taken for right, none hurts the next one, none is left behind.

``pytest -m hostile`` runs all of them; what is not marked slow is the sample that every test run has.
"""

from __future__ import annotations

import gc
import os
import py_compile
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.errors import UsageError
from conformance.judge.judgement import judge
from conformance.judge.verdict import Verdict
from conformance.lanes.base import Outcome
from conformance.lanes.listing import ListedKernel, bundled_kernels, kernel_named, kernels_of
from conformance.lanes.process import KernelProcess, Limits
from conformance.running.check import check
from conformance.tests.processes import alive

pytestmark = pytest.mark.hostile

HOSTILE = Path(__file__).parent / "kernels_under_test" / "hostile.py"
CASE = make_case(CaseKey.parse("rms_norm:tiny:B=3:normal:7"))


@pytest.fixture(scope="module")
def kernels() -> dict[str, ListedKernel]:
    return {kernel.name: kernel for kernel in kernels_of(str(HOSTILE))}


def judged(kernel: ListedKernel, limits: Limits | None = None, case: Case = CASE) -> tuple[Outcome, Verdict]:
    with KernelProcess(kernel, "eager", limits=limits) as process:
        outcome = process.run(case)
        return outcome, judge(case, outcome)


@pytest.mark.parametrize(
    ("name", "detector", "message"),
    [
        ("forges_an_answer", "crashed", "that is no answer: it answers another request"),
        ("forges_the_answer", "unwritten", "out"),
        ("half_an_answer", "crashed", "no answer: it ended in the middle of a message"),
        ("endless_answer", "crashed", "at most 8388608 are taken"),
        ("garbage_on_every_descriptor", "crashed", "no answer: it begins with"),
        ("closes_every_descriptor", "crashed", "its process ended itself"),
        ("exits", "crashed", "its process ended itself with exit code 0"),
        ("raises_what_is_no_exception", "crashed", "GeneratorExit"),
        ("says_too_much", "raised", "more characters"),
        ("raises_what_has_no_text", "raised", "TextlessError: its text cannot be made"),
        ("imports_the_reference", "raised", "a kernel computes its result by itself"),
        ("asks_the_stage", "raised", "a kernel computes its result by itself"),
        ("searches_memory", "unwritten", "out"),
        ("shortens_the_arena", "raised", "PermissionError"),
        ("writes_behind_an_input", "out_of_bounds", "weight: 16 elements past the end, the nearest 1 past it"),
        ("changes_what_it_is_judged_by", "crashed", "that is no answer"),
    ],
)
def test_none_of_them_is_right(kernels: dict[str, ListedKernel], name: str, detector: str, message: str) -> None:
    _, verdict = judged(kernels[name])
    assert verdict.findings[0].detector == detector
    assert message in verdict.findings[0].message
    assert len(verdict.findings[0].message) < 10_000
    assert verdict.findings[0].message.isprintable() or "\n" in verdict.findings[0].message
    assert "\x1b" not in verdict.findings[0].message


@pytest.mark.parametrize("name", ["answers_twice", "kills_its_keeper"])
def test_a_right_result_is_right_whatever_else_a_kernel_does(kernels: dict[str, ListedKernel], name: str) -> None:
    with KernelProcess(kernels[name], "eager") as process:
        for _ in range(3):
            assert judge(CASE, process.run(CASE)).ok


def test_what_a_kernel_does_to_its_memory_and_clock_does_not_reach_the_judge(kernels: dict[str, ListedKernel]) -> None:
    larger = make_case(CaseKey.parse("rms_norm:narrow:B=7:normal:7"))
    for name in ("lengthens_the_arena", "sets_the_clock"):
        with KernelProcess(kernels[name], "eager") as process:
            for case in (CASE, larger):
                outcome = process.run(case)
                assert judge(case, outcome).ok
                assert 0 <= outcome.seconds < 60  # else the record of the run is not read


def test_what_is_sent_unasked_is_a_finding_of_the_next_run(kernels: dict[str, ListedKernel]) -> None:
    with KernelProcess(kernels["answers_from_a_thread"], "eager") as process:
        assert "no answer" in process.run(CASE).message
    assert judged(kernels["right"])[1].ok


def test_a_keeper_that_does_nothing_any_more_is_not_waited_for(
    kernels: dict[str, ListedKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conformance.lanes.worker_process._END_SECONDS", 0.5)
    with KernelProcess(kernels["stops_its_keeper"], "eager", limits=Limits(seconds=1.0)) as process:
        assert process.run(CASE).status == "timed_out"


@pytest.mark.parametrize("name", ["stops_itself", pytest.param("prints_without_end", marks=pytest.mark.slow)])
def test_what_does_not_end_is_ended(kernels: dict[str, ListedKernel], name: str, tmp_path: Path) -> None:
    with KernelProcess(kernels[name], "eager", limits=Limits(seconds=1.5), folder=tmp_path) as process:
        assert process.run(CASE).status == "timed_out"
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 256 << 20


# What a kernel starts


@pytest.fixture
def numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that processes write their numbers to; those that are left are ended."""
    path = tmp_path / "numbers"
    monkeypatch.setenv("HOSTILE_NUMBERS", str(path))
    yield path
    for number in path.read_text().split() if path.exists() else ():
        if alive(int(number)):
            os.kill(int(number), signal.SIGKILL)


@pytest.mark.parametrize(
    ("name", "status"),
    [("leaves_a_process", "ok"), pytest.param("leaves_a_process_and_hangs", "timed_out", marks=pytest.mark.slow)],
)
def test_what_a_kernel_starts_ends_with_it(kernels: dict[str, ListedKernel], numbers: Path, name: str, status: str) -> None:
    outcome, _ = judged(kernels[name], Limits(seconds=5.0))
    assert outcome.status == status
    (number,) = numbers.read_text().split()
    assert not alive(int(number))


OWNER = """
import sys
from conformance.cases.case import make_case
from conformance.cases.key import CaseKey
from conformance.lanes.listing import kernel_named
from conformance.lanes.process import KernelProcess

process = KernelProcess(kernel_named(sys.argv[1], "leaves_a_process_and_hangs"), "eager")
process.run(make_case(CaseKey.parse("rms_norm:tiny:B=3:normal:7")))
"""


@pytest.mark.slow
def test_what_a_kernel_starts_ends_with_an_owner_that_is_killed(numbers: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(HOSTILE)])
    deadline = time.monotonic() + 60
    while not (numbers.exists() and numbers.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    owner.kill()
    owner.wait()
    number = int(numbers.read_text())
    while alive(number) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(number)


@pytest.mark.slow
def test_copies_of_a_process_end_and_count_for_its_memory(kernels: dict[str, ListedKernel]) -> None:
    with KernelProcess(kernels["forks_copies_of_itself"], "eager", limits=Limits(memory_bytes=2 << 30)) as process:
        # Twenty copies share their pages: together they have not used what each seems to.
        assert judge(CASE, process.run(CASE)).ok
    outcome, _ = judged(kernels["hogs_memory_elsewhere"], Limits(seconds=60.0, memory_bytes=900 << 20))
    assert outcome.status == "crashed"
    assert "more than its limit of 900 MiB" in outcome.message


# What a file does before there is a kernel

HEAD = "import atexit, ctypes, os, signal, time\nimport torch\nimport conformance\n"
WRONG = """
@conformance.kernel("rms_norm"{declared})
def {name}(x, weight, out):
    out.fill_(7.0)
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("os._exit(0)", "its process ended itself with exit code 0"),
        ("ctypes.string_at(0)", "its process died of SIGSEGV"),
        ("raise SystemExit(0)", "does not import: SystemExit: 0"),
        ("raise ValueError('\\x1b[2J\\udcff')", "does not import: ValueError"),
    ],
)
def test_a_file_that_does_not_import_is_one_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(HEAD + line + "\n" + WRONG.format(name="wrong", declared=""))
    with pytest.raises(UsageError, match=r"^mine\.py: ") as caught:
        kernels_of(str(file))
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_file_that_never_ends_its_import_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.lanes.listing.IMPORT_LIMITS", Limits(seconds=1.0))
    (tmp_path / "mine.py").write_text(HEAD + "time.sleep(600)\n")
    with pytest.raises(UsageError, match=r"mine\.py: .* did not come to its end within 1 s"):
        kernels_of(str(tmp_path / "mine.py"))


def test_the_end_of_a_process_that_a_file_chose_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HEAD + "atexit.register(os._exit, 0)\n" + WRONG.format(name="wrong", declared=""))
    command = [sys.executable, "-m", "conformance.cli", "check", "rms_norm", "mine.py:wrong", "--examples", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (', name="\\x1b[31mred"', "a kernel's name has"),
        (', name="a" * 101', "a kernel's name has"),
        (', accepts=lambda dims: "x" * 10 ** 7', None),
        (", accepts=lambda dims: os._exit(0)", "accepts of kernel wrong: .* ended itself with exit code 0"),
    ],
)
def test_what_a_kernel_declares_is_bounded(tmp_path: Path, declared: str, message: str | None) -> None:
    (tmp_path / "mine.py").write_text(HEAD + WRONG.format(name="wrong", declared=declared))

    def refusal() -> str | None:
        (kernel,) = kernels_of(str(tmp_path / "mine.py"))
        return kernel.refusal(CASE.dims)

    if message is not None:
        with pytest.raises(UsageError, match=message):
            refusal()
        return
    reason = refusal()
    assert reason is not None
    assert len(reason) < 1000


OBJECTS = """
import dataclasses, functools

def scaled(x, weight, out, *, factor):
    out.copy_(x.float() * weight * factor)

@dataclasses.dataclass
class Scaled:  # has no hash
    factor: float
    def __call__(self, x, weight, out):
        scaled(x, weight, out, factor=self.factor)

partial = conformance.kernel("rms_norm", name="partial")(functools.partial(scaled, factor=2.0))
instance = conformance.kernel("rms_norm", name="instance")(Scaled(2.0))
"""


def test_callables_that_are_no_functions_are_listed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HEAD + OBJECTS)
    assert [kernel.name for kernel in kernels_of(str(tmp_path / "mine.py"))] == ["partial", "instance"]


def test_a_file_may_be_a_link_to_one_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "stored").write_text(HEAD + WRONG.format(name="wrong", declared=""))
    (tmp_path / "mine.py").symlink_to("stored")
    outcome, _ = judged(kernel_named(str(tmp_path / "mine.py"), "wrong"))
    assert outcome.outputs["out"].eq(7.0).all()


@pytest.mark.parametrize("name", ["loop.py", "not-utf-8-\udcff.py"])
def test_a_path_that_cannot_be_used_is_a_usage_error(tmp_path: Path, name: str) -> None:
    if name == "loop.py":
        (tmp_path / name).symlink_to(name)
    else:
        (tmp_path / name).write_text(HEAD)
    with pytest.raises(UsageError):
        kernels_of(str(tmp_path / name))


def test_a_file_that_does_not_import_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_of(str(HOSTILE))  # the server that workers are forked from keeps a folder of its own
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "mine.py").write_text("import os\nos._exit(0)\n")
    with pytest.raises(UsageError):
        kernels_of(str(tmp_path / "mine.py"))
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


KEEPS = """
import sys
from conformance.lanes.listing import kernels_of

sys.kept = kernels_of(sys.argv[1])  # longer than Python deletes objects
"""


@pytest.mark.slow
def test_a_listing_that_is_kept_to_the_end_leaves_no_folder(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", KEEPS, str(HOSTILE)], env=environment, check=True, timeout=120)
    assert not list(tmp_path.iterdir())


def test_two_kernels_of_one_name_are_an_error(tmp_path: Path) -> None:
    text = HEAD + WRONG.format(name="wrong", declared="") + WRONG.format(name="other", declared=', name="wrong"')
    (tmp_path / "mine.py").write_text(text)
    for ask in (lambda: kernels_of(str(tmp_path / "mine.py")), lambda: kernel_named(str(tmp_path / "mine.py"), "wrong")):
        with pytest.raises(UsageError, match=r"^mine\.py: two kernels are named 'wrong'"):
            ask()


# Which text is judged


def test_byte_code_that_is_older_than_its_text_is_not_run(tmp_path: Path) -> None:
    helper, file = tmp_path / "helper.py", tmp_path / "mine.py"
    file.write_text(HEAD + "from helper import FACTOR\n" + WRONG.format(name="wrong", declared="").replace("7.0", "FACTOR"))
    for path, text in ((helper, "FACTOR = 1.0\n"), (file, file.read_text().replace("fill_", "add_ ")[:])):
        path.write_text(text)
        stamp = path.stat()
        py_compile.compile(str(path))
        # As long as before and, by the clock, as old: Python would run what it compiled before.
        path.write_text(text.replace("1.0", "2.0").replace("add_ ", "fill_"))
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    outcome, _ = judged(kernel_named(str(file), "wrong"))
    assert outcome.outputs["out"].eq(2.0).all()


def test_what_is_recorded_of_a_file_is_not_told_by_its_code(tmp_path: Path) -> None:
    line = "import hashlib\nhashlib.sha256 = hashlib.sha1\n"
    (tmp_path / "mine.py").write_text(HEAD + line + WRONG.format(name="wrong", declared=""))
    with pytest.raises(UsageError, match=r"mine\.py is not the text whose kernels were listed"):
        kernels_of(str(tmp_path / "mine.py"))


def test_a_file_that_changes_while_it_is_judged_is_read_anew_only_by_a_new_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(HEAD + WRONG.format(name="wrong", declared=""))
    kernel = kernel_named(str(file), "wrong")
    file.write_text(file.read_text().replace("7.0", "8.0"))
    with KernelProcess(kernel, "eager") as process, pytest.raises(UsageError, match=r"mine\.py was changed"):
        process.run(CASE)


@pytest.mark.parametrize("name", ["random.py", "torch.py", "click.py"])
def test_a_module_beside_a_kernel_is_not_taken_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_text("raise RuntimeError('taken for another')\n")
    file = tmp_path / "mine.py"
    file.write_text(HOSTILE.read_text().replace("import gc\n", "import gc\nimport random\n"))
    monkeypatch.chdir(tmp_path)
    assert judged(kernel_named(str(file), "right"))[1].ok


# What happens to the harness meanwhile


def test_a_scratch_folder_that_somebody_removes_is_made_anew() -> None:
    import shutil

    kernel = next(one for one in bundled_kernels() if one.name == "rms_norm")
    with KernelProcess(kernel, "interpret") as process:
        assert judge(CASE, process.run(CASE, "none")).ok
        assert process._worker._scratch is not None
        shutil.rmtree(process._worker._scratch.path)
        assert judge(CASE, process.run(CASE, "none")).ok


@pytest.mark.parametrize("may_fork", [True, False])
def test_a_process_with_many_open_files_judges(kernels: dict[str, ListedKernel], may_fork: bool) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1200
    if hard != resource.RLIM_INFINITY and hard < most:
        pytest.skip("no process may open so many files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1050)]
    try:
        with KernelProcess(kernels["right"], "eager") as process:
            process._worker.may_fork = may_fork
            assert judge(CASE, process.run(CASE)).ok
    finally:
        for descriptor in files:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_kernel_is_judged_with_its_defaults_after_all_of_them(kernels: dict[str, ListedKernel]) -> None:
    report = check("rms_norm", kernels["right"], examples=2, isolated=True)
    assert report.ok
