"""The pytest plugin, driven as its users do: pytest on kernels in files, within this process, which has imported everything."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from conformance.contract.registry import models
from conformance.lanes.listing import bundled_kernels
from conformance.running.records import read_run
from conformance.running.session import ClaimedFolder
from conformance.suites.live import may_show
from conformance.tests.fake_machine import FakeMachine

HERE = Path(__file__).parent
TORCH_KERNELS = """
import torch
import conformance


def _rms_norm(x, weight, eps):
    wide = x.float()
    return wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps) * weight


@conformance.kernel("rms_norm")
def right(x, weight, out):
    out.copy_(_rms_norm(x, weight, 1e-6))


@conformance.kernel("rms_norm")
def wrong_eps(x, weight, out):
    out.copy_(_rms_norm(x, weight, 1e-5))
"""

MINE_ONLY = ("--conformance-only-user-kernels", "--conformance-kernels", "mine.py")
AT_TINY = ("--conformance-presets", "tiny")


#: A judgement of both kernels.
JUDGED = (
    "-m",
    "interpret",
    "--conformance-only-user-kernels",
    "--conformance-kernels",
    "mine.py",
    "--conformance-presets",
    "tiny",
)

Completed = subprocess.CompletedProcess[str]


def run_pytest(folder: Path, *arguments: str) -> Completed:
    """pytest on the suites from ``folder``, keeping the run in ``folder/run``."""
    # To collect garbage at the end, in search of exceptions that nobody saw, would take longer than most runs.
    plugins = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    folders = ["--conformance-run", str(folder / "run"), "--basetemp", str(folder / "temporary")]
    options = ["--pyargs", "conformance.suites", "-q", *plugins, *folders, *arguments]
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.chdir(folder)
        code = pytest.main(options)
    return subprocess.CompletedProcess(options, int(code), out.getvalue(), errors.getvalue())


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(TORCH_KERNELS)
    return path


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Completed]:
    """A folder, and the run of pytest that judged its two kernels there."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "mine.py").write_text(TORCH_KERNELS)
    return folder, run_pytest(folder, *JUDGED)


def test_a_users_kernels_are_judged_beside_a_wrong_one(judged: tuple[Path, Completed]) -> None:
    folder, done = judged
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    records = read_run(folder / "run").records
    statuses = Counter((record.kernel, record.status) for record in records if record.event == "case")
    assert statuses["right", "passed"] >= 7
    assert ("right", "failed") not in statuses
    assert statuses["wrong_eps", "failed"] >= 1
    assert [record.details["exit_code"] for record in records if record.event == "end"] == [1]
    assert "conformance check rms_norm mine.py:wrong_eps" in done.stdout
    for name in ("report.html", "summary.md", "junit.xml"):
        assert (folder / "run" / name).stat().st_size > 100


def test_parallel_processes_give_the_same_verdicts_as_one(judged: tuple[Path, Completed], tmp_path: Path, kernels: Path) -> None:
    done = run_pytest(tmp_path, *JUDGED, "-n", "2")
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    one, two = (
        sorted((r.kernel, r.preset, r.case, r.check, r.status, r.share or 0.0) for r in read_run(folder / "run").of("case"))
        for folder in (judged[0], tmp_path)
    )
    assert len(one) > 20
    assert one == two


def test_device_tests_are_collected_and_skipped_with_what_was_missing(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "-m", "device", "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" not in done.stdout.splitlines()[-1]
    # Every kernel at each preset of the suites, at the model's real size, and for what it declares.
    declaring = sum(bool(kernel.capabilities) for kernel in bundled_kernels())
    expected = len(bundled_kernels()) * (1 + sum(len(model.suite_presets) for model in models())) + declaring
    assert f"{expected} skipped" in done.stdout, done.stdout
    assert "CANN not found: ASCEND_HOME_PATH" in " ".join(done.stdout.split())
    skips = [record for record in read_run(tmp_path / "run").records if record.event == "skip"]
    assert len(skips) == expected
    assert all("torch_npu" in record.reason for record in skips)
    # A lane that ran nothing says so.
    text = done.stdout.lower()
    assert "passed: 0 cases" not in text
    assert "nothing" in text


@pytest.mark.parametrize("processes", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_the_live_line_takes_no_letters_but_the_suites(tmp_path: Path, processes: tuple[str, ...]) -> None:
    (tmp_path / "test_own.py").write_text(
        "import pytest\n@pytest.mark.device\n@pytest.mark.parametrize('n', range(3))\ndef test_rms_norm(n): pass\n"
    )
    done = run_pytest(tmp_path, "-m", "device", "-k", "rms_norm", "test_own.py", *processes)
    assert re.search(r"^\.\.\. +\[", done.stdout, re.MULTILINE), done.stdout + done.stderr


@pytest.mark.parametrize("option", ["-s", "--pdb", "--trace", "--capture=tee-sys", "-v"])
def test_what_else_writes_to_the_terminal_takes_the_place_of_the_live_line(pytester: pytest.Pytester, option: str) -> None:
    assert may_show(pytester.parseconfig().option)
    assert not may_show(pytester.parseconfig(option).option)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--device=x", "--device takes numbers of cards, such as 0 or 0,2-3, found 'x'"),
        ("--conformance-device-wait=-1", "--device-wait takes seconds, at most"),
    ],
)
def test_an_option_that_names_no_card_is_a_mistake_of_usage_in_one_line(tmp_path: Path, option: str, told: str) -> None:
    done = run_pytest(tmp_path, "-m", "device", option)
    assert done.returncode == 4
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_finding_beside_what_could_not_run_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "test_finding.py").write_text("def test_rms_norm(): assert False\n")
    done = run_pytest(tmp_path, "-k", "rms_norm-tiny-device or finding", "--conformance-require-device", "test_finding.py")
    assert done.returncode == 1
    assert "2 failed" in done.stdout


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """A machine with two cards in the place of this one."""
    fake = FakeMachine(tmp_path / "machine", torch=False)
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CONFORMANCE_MACHINE_ROOT", str(fake.root))
    monkeypatch.syspath_prepend(str(fake.packages))
    return fake


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (None, "card 7 is not there (--device): the cards of this machine are 0, 1"),
        ("bisheng", "no usable NPU: bisheng not found on PATH"),
    ],
)
def test_a_card_that_cannot_be_used_is_one_line_and_a_skip_or_could_not_run(
    tmp_path: Path, fake: FakeMachine, broken: str | None, told: str
) -> None:
    if broken:
        (fake.cann / "bin" / "bisheng").unlink()
    subset = ("-m", "device", "-k", "rms_norm-tiny", "--device", "7")
    done = run_pytest(tmp_path, *subset)
    assert done.returncode == 0, done.stdout + done.stderr
    required = run_pytest(tmp_path, *subset, "--conformance-require-device", "--conformance-run", str(tmp_path / "required"))
    assert required.returncode == 3, required.stdout + required.stderr
    for folder, event in (("run", "skip"), ("required", "error")):
        (record,) = (one for one in read_run(tmp_path / folder).records if one.event == event)
        assert record.reason.startswith(told)
        assert "\n" not in record.reason


def test_a_missing_device_fails_where_one_is_required(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "-m", "device and not full_size", "--conformance-require-device", "-k", "rms_norm")
    assert done.returncode == 3
    assert "--conformance-require-device: no usable NPU" in done.stdout
    assert [record.event for record in read_run(tmp_path / "run").records].count("error") == 2


def test_the_device_lane_runs_with_the_interpreter_standing_in(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "-m", "device", "--conformance-device-executor", "interpret", "-k", "kv_write-tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    lanes = {record.lane for record in read_run(tmp_path / "run").records if record.event == "case"}
    assert lanes == {"device"}


def test_kernels_that_take_their_process_down_leave_the_others_results(tmp_path: Path) -> None:
    kernels = str(HERE / "kernels_under_test" / "torch_misbehaving.py")
    options = [
        "--conformance-only-user-kernels",
        "--conformance-kernels",
        kernels,
        "--conformance-presets",
        "tiny",
        "--conformance-kernel-timeout",
        "3",
    ]
    done = run_pytest(tmp_path, "-m", "interpret", *options, "-k", "segfaults or sleeps or right")
    assert done.returncode == 1
    assert "2 failed, 1 passed" in done.stdout, done.stdout
    found: dict[str, set[str]] = {}
    for record in read_run(tmp_path / "run").of("case"):
        found.setdefault(record.kernel, set()).update(finding.detector for finding in record.findings)
    assert found == {"right_in_torch": set(), "segfaults": {"crashed"}, "sleeps": {"timed_out"}}
    assert "SIGSEGV" in done.stdout
    assert "its limit of 3 s" in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import no_such_module_anywhere", "mine.py: does not import: ModuleNotFoundError"),
        ("x = 1", "mine.py defines no kernel"),
        ("import conformance\n@conformance.kernel('rms_nrm')\ndef f(x): ...", "unknown stage 'rms_nrm'"),
        ("import conformance\n@conformance.kernel('rms_norm')\ndef f(x, out): ...", "expected (x, weight, out), found (x, out)"),
        ("import conformance\n@conformance.kernel('rms_norm', toolchain='cuda')\ndef f(x): ...", "unknown toolchain 'cuda'"),
        ("def broken(:", "mine.py: does not import: SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_a_usage_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(content)
    done = run_pytest(tmp_path, "-m", "interpret", "--conformance-kernels", "mine.py")
    assert done.returncode == 4, done.stdout + done.stderr  # pytest's own code for a usage error
    lines = [line for line in (done.stdout + done.stderr).splitlines() if message in line]
    assert lines, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_folder_that_already_holds_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "records-main.jsonl").write_text("")
    for processes in ((), ("-n", "1")):
        done = run_pytest(tmp_path, "-m", "device", *processes)
        assert done.returncode == 4, done.stdout + done.stderr
        assert "already holds a run" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--conformance-kernel-timeout", "nan"), "--conformance-kernel-timeout must be a positive number of seconds"),
        (("--conformance-kernel-memory", "inf"), "--conformance-kernel-memory must be a positive number of GB"),
        (("--conformance-expected-failures", "/dev/zero"), "it is no regular file"),
        (("--conformance-expected-failures", "n" * 300), "no file has so long a name"),
        (("--conformance-run", "mine.py"), "mine.py is a file"),
        (("--conformance-run", "in use"), "belongs to a run that is not over"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_line(tmp_path: Path, kernels: Path, options: tuple[str, str], message: str) -> None:
    with ClaimedFolder(tmp_path / "in use"):
        done = run_pytest(tmp_path, *JUDGED, *options)
    assert done.returncode == 4, done.stdout + done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("ERROR: ")]
    assert message in line
    assert "Traceback" not in done.stdout + done.stderr


def test_two_kernels_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TORCH_KERNELS.replace("def right", "def rms_norm"))
    done = run_pytest(tmp_path, "-m", "interpret", "--conformance-kernels", "mine.py")
    assert done.returncode == 4
    assert "two kernels are named 'rms_norm'" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("width", "code", "counted"),
    [(256, 0, "1 passed, 1 skipped"), (99, 1, "2 failed")],
    ids=["of one preset", "of every preset"],
)
def test_a_kernel_that_refuses_every_case_is_no_pass(tmp_path: Path, width: int, code: int, counted: str) -> None:
    accepts = f'"rms_norm", accepts=lambda dims: dims.H == {width} or "not that wide"'
    (tmp_path / "mine.py").write_text(
        TORCH_KERNELS.replace('"rms_norm"', accepts, 1).partition('\n\n\n@conformance.kernel("rms_norm")')[0]
    )
    done = run_pytest(tmp_path, "-m", "interpret", *MINE_ONLY)
    assert done.returncode == code, done.stdout + done.stderr
    assert counted in done.stdout
    assert ("nothing was judged" in done.stdout) == bool(code)


def test_expected_failures_do_not_fail_and_a_fixed_one_is_reported(tmp_path: Path, kernels: Path) -> None:
    known = tmp_path / "known.txt"
    known.write_text("# what we know\nwrong_eps  eps is 1e-5, to be fixed\nright@eager  was wrong once\n")
    done = run_pytest(tmp_path, "-m", "interpret", *MINE_ONLY, *AT_TINY, "--conformance-expected-failures", "known.txt")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "1 xfailed" in done.stdout
    records = [record for record in read_run(tmp_path / "run").records if record.event == "expected"]
    assert {(record.kernel, record.status) for record in records} == {("wrong_eps", "failed as expected"), ("right", "fixed")}
    assert "right eager no longer fails" in done.stdout


def test_an_expected_failure_of_no_kernel_is_a_usage_error(tmp_path: Path, kernels: Path) -> None:
    (tmp_path / "known.txt").write_text("wrong_epz  a typing error\n")
    done = run_pytest(
        tmp_path,
        "--conformance-only-user-kernels",
        "--conformance-kernels",
        "mine.py",
        "--conformance-expected-failures",
        "known.txt",
    )
    assert done.returncode == 4
    assert "no kernel 'wrong_epz'" in done.stdout + done.stderr


OWNER = """
def pytest_addoption(parser):
    parser.addoption("--kernels")
    parser.addoption("--presets", action="store_true")
"""


def test_options_may_be_spelled_without_the_prefix(pytester: pytest.Pytester) -> None:
    test = pytester.makepyfile(
        """
        def test_options(pytestconfig):
            options = pytestconfig.option
            assert options.conformance_only_user_kernels
            assert options.conformance_kernels == ["elsewhere/one.py", "elsewhere/two.py"]
            assert options.conformance_kernel_timeout == 2.5
        """
    )
    # The value of an option that pytest does not know is taken for a path, beside which it looks for a conftest.py.
    (pytester.mkdir("elsewhere") / "one.py").write_text(TORCH_KERNELS)
    (pytester.path / "elsewhere" / "two.py").write_text(TORCH_KERNELS.replace("def ", "def other_"))
    (pytester.path / "elsewhere" / "conftest.py").write_text("raise RuntimeError('not a folder of tests')")
    options = ["--kernels", "elsewhere/one.py", "--kernels=elsewhere/two.py", "--only-user-kernels", "--kernel-timeout", "2.5"]
    pytester.runpytest_inprocess(test, *options).assert_outcomes(passed=1)


@pytest.mark.parametrize("where", ["plugin", "conftest"])
def test_an_option_of_another_plugin_stays_its_own(pytester: pytest.Pytester, where: str) -> None:
    pytester.makepyfile(**{"owner" if where == "plugin" else "conftest": OWNER})
    pytester.makepyfile(
        """
        def test_options(pytestconfig):
            options = pytestconfig.option
            assert (options.kernels, options.presets) == ("theirs", True)
            assert (options.conformance_kernels, options.conformance_presets) == ([], "")
            assert options.conformance_kernel_memory == 3
        """
    )
    pytester.syspathinsert()
    plugins = ["-p", "owner"] if where == "plugin" else []
    options = ["--kernels", "theirs", "--presets", "--kernel-memory=3"]
    pytester.runpytest_inprocess(*plugins, *options).assert_outcomes(passed=1)


def test_markers_of_the_harness_s_own_tests_are_not_registered_elsewhere(pytester: pytest.Pytester) -> None:
    listed = pytester.runpytest_inprocess("--markers").stdout.str()
    for marker in ("compile_only", "interpret", "device", "full_size"):
        assert f"@pytest.mark.{marker}:" in listed
    assert "@pytest.mark.browser" not in listed
    assert "@pytest.mark.slow" not in listed


def test_the_plugin_costs_other_test_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\ndef test_it():\n    assert 'torch' not in sys.modules and 'conformance.contract' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_other.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "1 passed" in done.stdout
    assert not (tmp_path / "runs").exists()
    assert "kernel conformance" not in done.stdout
