"""The pytest plugin: options, markers, the kernels that the suites are run on, and the records and reports of a run.

Loaded by every pytest run in an environment that has the harness, so nothing heavy is imported before a suite is collected.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance.lanes import LANES, lane_named
from conformance.lanes.device import DEVICE, DEVICE_EXECUTORS, NPU
from conformance.suites.state import LACKING, PluginState

if TYPE_CHECKING:
    from conformance.running.session import Subject

MARKERS = {
    **{lane.name: lane.summary for lane in LANES if lane.marker == lane.name},
    "full_size": "runs at a model's real size and needs the memory that the model says; skipped with less",
    "conformance(shows)": "a test of the suites, which shows compiles, values or capabilities of every kernel",
}

#: Options that had no prefix once. The old spelling still works, where no other plugin has an option of that name.
OLD_SPELLINGS = {
    f"--{name}": f"--conformance-{name}"
    for name in (
        "kernels",
        "only-user-kernels",
        "presets",
        "kernel-timeout",
        "kernel-memory",
        "device",
        "device-wait",
        "require-device",
        "device-executor",
        "expected-failures",
    )
}

#: Of a run in which all that failed could not run on this machine, as of the command.
COULD_NOT_RUN = 3

_STATE = pytest.StashKey["PluginState"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suites."""
    group = parser.getgroup("conformance", "kernel conformance")
    group.addoption(
        "--conformance-kernels",
        action="append",
        default=[],
        metavar="FILE.py",
        help="also judge the kernels that this file or module defines (may be repeated); also spelled --kernels, as the others "
        "may be without the prefix, where no other plugin has an option of that name",
    )
    group.addoption("--conformance-only-user-kernels", action="store_true", help="leave the bundled kernels out")
    group.addoption(
        "--conformance-profile",
        choices=("dev", "ci", "nightly"),
        default="ci",
        help="how many cases and how they are drawn (default: ci, deterministic)",
    )
    group.addoption(
        "--conformance-presets",
        default="",
        metavar="NAME,NAME",
        help="presets to run (default: those of the model's suites)",
    )
    group.addoption("--conformance-run", default="", metavar="DIR", help="folder for records and reports (default: runs/<time>)")
    group.addoption(
        "--conformance-kernel-timeout",
        type=float,
        default=None,
        metavar="SECONDS",
        help="time limit of one run of a kernel",
    )
    group.addoption(
        "--conformance-kernel-memory",
        type=float,
        default=None,
        metavar="GB",
        help="memory limit of a kernel's process",
    )
    group.addoption(
        "--conformance-device",
        default="",
        metavar="0,2-3",
        help="cards to run on, one for each process (default: TASK_DEVICE, TILE_FWK_DEVICE_ID, or all cards); also spelled "
        "--device, where no other plugin has that option",
    )
    group.addoption(
        "--conformance-device-wait",
        type=float,
        default=None,
        metavar="SECONDS",
        help="how long to wait for a card that is busy (default: 600)",
    )
    group.addoption(
        "--conformance-require-device",
        action="store_true",
        help="fail, instead of skipping, where no NPU is usable",
    )
    group.addoption(
        "--conformance-device-executor",
        choices=DEVICE_EXECUTORS,
        default=NPU,
        help="interpret: exercise the device lane with the interpreter standing in for the card",
    )
    group.addoption(
        "--conformance-expected-failures",
        default="",
        metavar="FILE",
        help="lines KERNEL[@LANE] REASON: known to fail",
    )


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, object, object]:
    """Put the prefixed options in place of their old spellings, but for those that another plugin has as its own.

    They are no options of pytest's parser: a plugin or ``conftest.py`` that is loaded later could not have one of the same name.
    """
    if sys.stdout is None or sys.stderr is None:  # pytest itself could not run
        from conformance.command import open_closed_streams

        open_closed_streams()
    prefixed = _with_prefixes(parser, args)
    if prefixed != args:
        # The value of an option that pytest does not know is taken for a test path, beside which it looks for a conftest.py.
        # An option of a conftest.py that is still to be loaded may look wrong here; then pytest takes what it took itself.
        with contextlib.suppress(pytest.UsageError):
            known = parser.parse_known_args(prefixed, namespace=copy.copy(early_config.option))
            early_config.known_args_namespace.file_or_dir = known.file_or_dir
    result = yield
    args[:] = _with_prefixes(parser, args)
    return result


def _with_prefixes(parser: pytest.Parser, args: list[str]) -> list[str]:
    prefixed = []
    for argument in args:
        name, equals, value = argument.partition("=")
        if name in OLD_SPELLINGS and not _is_known(parser, name):
            argument = OLD_SPELLINGS[name] + equals + value
        prefixed.append(argument)
    return prefixed


def _is_known(parser: pytest.Parser, option: str) -> bool:
    try:
        return option not in parser.parse_known_and_unknown_args([option])[1]
    except pytest.UsageError:  # It is known, and takes a value.
        return True


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and decide where the run is kept, once for all xdist workers."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    state = config.stash[_STATE] = PluginState(config)
    config.pluginmanager.register(state.failures)
    # Of a run that is plainly one of the suites from the beginning: collecting, and starting xdist's workers, takes seconds.
    if any("conformance" in argument and "suites" in argument for argument in config.args) or any(_given(config.option)):
        state.begin_judging()
        if "torch" not in sys.modules:
            from conformance.toolchains.npu import AUTOLOAD_VARIABLE

            # Who judges needs no card, and a torch_npu that does not import must not keep the other lanes from running. The
            # device lane imports it by itself.
            os.environ.setdefault(AUTOLOAD_VARIABLE, "0")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell an xdist worker which folder the run is kept in."""
    node.workerinput["conformance_run"] = str(node.config.stash[_STATE].folder)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Read what the user gave before anything is collected: a mistake in it is one line, and pytest's usage error."""
    options = session.config.option
    if options.conformance_run:
        session.config.stash[_STATE].claim_folder()
    if options.conformance_kernel_timeout is not None or options.conformance_kernel_memory is not None:
        session.config.stash[_STATE].require_limits()
    if options.conformance_device or options.conformance_device_wait is not None:
        assert session.config.stash[_STATE].cards
    if any(_given(options)):
        state = session.config.stash[_STATE]
        if options.conformance_require_device and not any(kernel.toolchain in DEVICE.toolchains for kernel in state.kernels()):
            raise pytest.UsageError("--conformance-require-device: no PyPTO kernel is judged, nothing could run on a device")
        state.presets()
        assert state.expected is not None


def _given(options: Any) -> tuple[Any, ...]:
    """The options that say what is judged."""
    return (
        options.conformance_kernels,
        options.conformance_only_user_kernels,
        options.conformance_presets,
        options.conformance_expected_failures,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per kernel, preset and lane that can show what a suite's test is marked with."""
    if not {"subject", "judging"} <= set(metafunc.fixturenames):
        return
    state = metafunc.config.stash[_STATE]
    marks = {marker.name: marker for marker in metafunc.definition.iter_markers()}
    if "conformance" not in marks:
        return
    shows, full_size = marks["conformance"].args[0], "full_size" in marks
    executes = shows != "compiles"
    if shows == "capabilities":
        subjects = state.declaring_subjects()
    else:
        subjects = state.full_size_subjects(executes) if full_size else state.subjects(executes)
    parameters = []
    for subject in subjects:
        lane = lane_named(subject.lane)
        # A test's name says the lane where others run the same test.
        identity = subject.id if lane.default or not executes else f"{subject.id}-{lane.name}"
        # At real size another lane's marker would ask for 14 GB of whoever uses it; a card is there for that.
        marked = not full_size or lane.takes_card(metafunc.config.option.conformance_device_executor)
        parameters.append(pytest.param(subject, id=identity, marks=getattr(pytest.mark, lane.marker) if marked else ()))
    metafunc.parametrize("subject", parameters)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Write the plan, once the selection by ``-m`` and ``-k`` is known: before xdist tells the controller of it."""
    state = session.config.stash[_STATE]
    planned = [subject for subject in map(_subject_of, session.items) if subject is not None]
    if planned and not session.config.option.collectonly and not _is_controller(session.config):
        state.open_log(planned)
        if not state.is_worker:
            state.show_progress(len(session.items))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """Begin the live line in xdist's controller."""
    state = node.config.stash[_STATE]
    if state.wrote_records():
        state.begin_judging()
        state.show_progress(len(ids))


def _subject_of(item: pytest.Item) -> Subject | None:
    found = getattr(getattr(item, "callspec", None), "params", {}).get("subject")
    # A lane without any kernel has pytest's stand-in for an empty list, and another project's subject may be anything.
    return found if all(hasattr(found, name) for name in ("kernel", "preset", "lane")) else None


def _is_controller(config: pytest.Config) -> bool:
    return bool(getattr(config.option, "dist", "no") != "no") and not hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Take the live line away before pytest writes of a test that is not the suites'."""
    progress = item.config.stash[_STATE].progress
    if progress is not None and _subject_of(item) is None:
        progress.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell xdist's controller, which has no tests, whose test it is, and whether it failed because it could not run."""
    report = yield
    if call.excinfo is not None and getattr(call.excinfo.value, LACKING, False):
        setattr(report, LACKING, True)
    if item.config.stash[_STATE].log is not None and _subject_of(item) is None:
        from conformance.suites.live import NOT_OF_SUITES

        setattr(report, NOT_OF_SUITES, True)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """What follows the last test is short, and would lose what was judged."""
    try:
        return (yield)
    finally:
        interrupts = session.config.stash[_STATE].interrupts
        if interrupts is not None:
            interrupts.ignore()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Close this process's records, and build the reports from those of all.

    A run that judged kernels and was interrupted has the exit code that shells know; one that failed only because the machine
    lacks something has that of the command for it.
    """
    state = session.config.stash[_STATE]
    if state.interrupts is not None and state.interrupts.number:
        session.exitstatus = exitstatus = state.interrupts.exit_code
    elif exitstatus == pytest.ExitCode.TESTS_FAILED and state.failures.only_could_not_run:
        session.exitstatus = exitstatus = COULD_NOT_RUN
    if state.log is not None:
        state.lost, state.taken = state.log.end(int(exitstatus)), state.log.taken
        state.log = None
    # Before pytest prints anything of the run: its screen may be gone.
    state.build_reports()
    if state.lost and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Give back the screen, the signals and the folder, however the run ended."""
    state = config.stash.get(_STATE, None)
    if state is not None:
        state.close()


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Print the summary; say so where a lane ran nothing, and what could not be kept."""
    state = config.stash[_STATE]
    if not (state.told or state.lost):
        return
    from conformance.outside import one_line

    terminalreporter.section("kernel conformance")
    for text in state.told:
        terminalreporter.write_line(text)
    for line in state.lost:
        terminalreporter.write_line(one_line(line))


@pytest.fixture
def judging(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Judges the test's subject: ``compiled()`` or ``cases()``; see ``conformance.suites.judging``."""
    from conformance.suites.judging import SubjectJudging

    state = request.config.stash[_STATE]
    subject = request.getfixturevalue("subject")
    assert state.log is not None, "records are opened when collection ends"
    presets = state.presets()[subject.kernel.stage.model]
    expected = state.expected.reason(subject)
    return SubjectJudging(subject, state.log, state.profile, expected, request.config.option, tmp_path, presets, state.cards)
