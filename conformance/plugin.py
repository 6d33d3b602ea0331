"""The pytest plugin: options, markers, the kernels that the suites are run on, and the records and reports of a run.

Loaded by every pytest run in an environment that has the harness, so nothing heavy is imported before a suite is collected.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance.lanes import LANES, default_lane, lane_named, lanes_of
from conformance.lanes.device import DEVICE, DEVICE_EXECUTORS, NPU

if TYPE_CHECKING:
    from conformance.cases.profiles import SuiteProfile
    from conformance.contract.kernel import Kernel
    from conformance.running.session import ExpectedFailures, RunLog, Subject
    from conformance.suites.live import SuiteProgress

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
        "require-device",
        "device-executor",
        "expected-failures",
    )
}

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
    config.stash[_STATE] = PluginState(config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell an xdist worker which folder the run is kept in."""
    node.workerinput["conformance_run"] = str(node.config.stash[_STATE].folder)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Read what the user gave before anything is collected: a mistake in it is one line, and pytest's usage error."""
    options = session.config.option
    if options.conformance_run and not hasattr(session.config, "workerinput"):
        session.config.stash[_STATE].require_new_folder()
    given = (
        options.conformance_kernels,
        options.conformance_only_user_kernels,
        options.conformance_presets,
        options.conformance_expected_failures,
    )
    if any(given):
        state = session.config.stash[_STATE]
        if options.conformance_require_device and not any(kernel.toolchain in DEVICE.toolchains for kernel in state.kernels()):
            raise pytest.UsageError("--conformance-require-device: no PyPTO kernel is judged, nothing could run on a device")
        state.presets()
        assert state.expected is not None


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
        parameters.append(pytest.param(subject, id=identity, marks=() if full_size else getattr(pytest.mark, lane.marker)))
    metafunc.parametrize("subject", parameters)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Write the plan, once the selection by ``-m`` and ``-k`` is known: before xdist tells the controller of it."""
    state = session.config.stash[_STATE]
    planned = [subject for subject in map(_subject_of, session.items) if subject is not None]
    if planned and not session.config.option.collectonly and not _is_controller(session.config):
        state.open_log(planned)
        if not hasattr(session.config, "workerinput"):
            state.show_progress(len(session.items))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """Begin the live line in xdist's controller."""
    state = node.config.stash[_STATE]
    if state.wrote_records():
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
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell xdist's controller, which has no tests, whose test it is."""
    report = yield
    if item.config.stash[_STATE].log is not None and _subject_of(item) is None:
        from conformance.suites.live import NOT_OF_SUITES

        setattr(report, NOT_OF_SUITES, True)
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Close this process's records."""
    state = session.config.stash[_STATE]
    if state.log is not None:
        state.log.end(int(exitstatus))
        state.log = None


def pytest_unconfigure(config: pytest.Config) -> None:
    """Take the live line away, however the run ended."""
    state = config.stash.get(_STATE, None)
    if state is not None and state.progress is not None:
        state.progress.stop()


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Build the reports from the records and print the summary; say so where a lane ran nothing."""
    state = config.stash[_STATE]
    if hasattr(config, "workerinput") or not state.wrote_records():
        return
    from conformance import reports

    built = reports.build(state.folder, colour=terminalreporter.hasmarkup)
    terminalreporter.section("kernel conformance")
    terminalreporter.write_line(str(built["terminal"]))
    terminalreporter.write_line(f"kept in {state.folder}: report.html, summary.md, junit.xml")


@dataclasses.dataclass
class PluginState:
    """What the plugin knows during one pytest run."""

    config: pytest.Config
    log: RunLog | None = None
    progress: SuiteProgress | None = None
    _kernels: list[Kernel] | None = None
    _folder: Path | None = None
    _expected: ExpectedFailures | None = None

    @property
    def folder(self) -> Path:
        """Where the run is kept; named when first asked for."""
        if self._folder is None:
            from_controller = getattr(self.config, "workerinput", {}).get("conformance_run")
            chosen = from_controller or self.config.option.conformance_run
            if chosen:
                self._folder = Path(chosen).resolve()
            else:
                from conformance.running.session import new_run_folder

                self._folder = new_run_folder(self.config.invocation_params.dir / "runs")
        return self._folder

    def require_new_folder(self) -> None:
        """Raise ``pytest.UsageError`` if the folder that the user named already holds a run."""
        from conformance.errors import UsageError
        from conformance.running.session import require_new_folder

        try:
            require_new_folder(self.folder)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error

    def wrote_records(self) -> bool:
        """Whether any process of this run wrote records."""
        return self._folder is not None and any(self._folder.glob("records-*.jsonl"))

    @property
    def profile(self) -> SuiteProfile:
        """How many cases."""
        from conformance.cases.profiles import profile_named

        return profile_named(self.config.option.conformance_profile)

    def kernels(self) -> list[Kernel]:
        """Bundled kernels and the user's; raises ``pytest.UsageError`` for a file that cannot be used."""
        if self._kernels is None:
            from conformance.contract.loading import bundled_kernels, kernels_in, load_module
            from conformance.errors import UsageError

            options = self.config.option
            try:
                found = [] if options.conformance_only_user_kernels else bundled_kernels()
                for location in options.conformance_kernels:
                    own = kernels_in(load_module(self._resolve(location)))
                    if not own:
                        raise UsageError(f"{location} defines no kernel: decorate one with @conformance.kernel(STAGE)")
                    found += own
                if not found:
                    raise UsageError("no kernel to judge: --conformance-only-user-kernels needs --conformance-kernels FILE.py")
                self._require_distinct(found)
            except UsageError as error:
                raise pytest.UsageError(str(error)) from error
            self._kernels = found
        return self._kernels

    def _resolve(self, location: str) -> str:
        # pytest may have been started elsewhere than where an xdist worker stands.
        if location.endswith(".py"):
            return str(self.config.invocation_params.dir / location)
        return location

    @staticmethod
    def _require_distinct(kernels: list[Kernel]) -> None:
        from conformance.errors import UsageError

        seen: dict[str, Path] = {}
        for kernel in kernels:
            if kernel.id in seen:
                raise UsageError(
                    f"two kernels are named {kernel.name!r}, in {seen[kernel.id].name} and {kernel.source.name}: "
                    f"give one another name=..."
                )
            seen[kernel.id] = kernel.source

    @property
    def expected(self) -> ExpectedFailures:
        """The user's list of expected failures."""
        if self._expected is None:
            from conformance.errors import UsageError
            from conformance.running.session import ExpectedFailures

            path = self.config.option.conformance_expected_failures
            try:
                self._expected = ExpectedFailures.read(self.config.invocation_params.dir / path) if path else ExpectedFailures()
                self._expected.require_known(self.kernels())
            except UsageError as error:
                raise pytest.UsageError(str(error)) from error
        return self._expected

    def presets(self) -> dict[str, list[str]]:
        """By model the presets to run: those that the user chose, or those of the model's suites.

        Raises ``pytest.UsageError`` for a name that no model of the kernels has, or several, and where a model has none of them.
        """
        from conformance.contract.registry import chosen_name, models
        from conformance.errors import UsageError

        chosen = [name for name in self.config.option.conformance_presets.split(",") if name]
        if not chosen:
            return {model.name: list(model.suite_presets) for model in models()}
        judged = {kernel.stage.model for kernel in self.kernels()}
        known = [f"{model.name}/{preset}" for model in models() if model.name in judged for preset in model.presets]
        found: dict[str, list[str]] = {model: [] for model in judged}
        try:
            for name in chosen:
                model, _, preset = chosen_name(name, known, "preset").partition("/")
                found[model].append(preset)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error
        for model, presets in found.items():
            if not presets:
                raise pytest.UsageError(
                    f"no preset of model {model} is chosen, and kernels of it are to be judged: add {model}/NAME"
                )
        return found

    @property
    def kernel_names(self) -> dict[str, str]:
        """What each kernel is called: its name, or ``model/name`` where kernels of several models have the name."""
        from conformance.contract.registry import names_in_short

        return names_in_short(kernel.id for kernel in self.kernels())

    def subjects(self, executes: bool) -> list[Subject]:
        """Every kernel in every lane that takes it and executes, or that only compiles, at every preset of the lane."""
        from conformance.running.session import Subject

        chosen, presets = bool(self.config.option.conformance_presets), self.presets()
        names = self.kernel_names
        lanes = [lane for lane in LANES if lane.executes == executes]
        return [
            Subject(kernel, preset, lane.name, called=names[kernel.id])
            for marker in sorted({lane.marker for lane in lanes}, key=[lane.name for lane in LANES].index)
            for kernel in self.kernels()
            for lane in lanes
            if lane.marker == marker and kernel.toolchain in lane.toolchains
            for preset in presets[kernel.stage.model][: None if chosen else lane.presets]
        ]

    def declaring_subjects(self) -> list[Subject]:
        """Every kernel that declares a capability, at the first preset: what a kernel serves does not depend on its sizes."""
        subjects = [
            subject
            for subject in self.subjects(executes=True)
            if subject.kernel.capabilities and lane_named(subject.lane).default
        ]
        first = {subject.name: subject for subject in reversed(subjects)}
        return [subject for subject in subjects if first[subject.name] is subject]

    def full_size_subjects(self, executes: bool) -> list[Subject]:
        """Every kernel of a compiler at the model's real size: the fused loops only compile there, all others execute."""
        from conformance.contract.registry import model_named
        from conformance.running.session import Subject

        subjects = []
        for kernel in self.kernels():
            full_size = model_named(kernel.stage.model).full_size
            usual = default_lane(kernel.toolchain)
            if full_size is None or usual.in_process:
                continue
            lanes = [usual] if executes else [lane for lane in lanes_of(kernel.toolchain) if not lane.executes]
            sizes = full_size.executed if executes else full_size.compiled
            subjects += [
                Subject(
                    kernel, full_size.preset, lane.name, tuple(overrides.items()), full_size.memory, self.kernel_names[kernel.id]
                )
                for lane in lanes
                for overrides in sizes(kernel.stage)
            ]
        return subjects

    def show_progress(self, planned: int) -> None:
        """Begin the live line, if there is none yet and the terminal is free for it."""
        from conformance.suites.live import SuiteProgress, may_show

        if self.progress is None and may_show(self.config.option):
            from conformance.running.records import RunFollower

            reporter = self.config.pluginmanager.get_plugin("terminalreporter")
            if reporter is not None and reporter.isatty:
                reporter.write_line("")  # xdist leaves a line about its workers open
            self.progress = SuiteProgress(RunFollower(self.folder), planned)
            self.config.pluginmanager.register(self.progress)

    def open_log(self, planned: list[Subject]) -> None:
        """Begin this process's records."""
        from conformance.running.session import RunLog

        options = self.config.option
        process = getattr(self.config, "workerinput", {}).get("workerid", "main")
        self.log = RunLog(self.folder, process)
        self.log.start(
            planned,
            {
                "profile": options.conformance_profile,
                "markers": options.markexpr,
                "require_device": options.conformance_require_device,
                "device_executor": options.conformance_device_executor,
            },
        )


@pytest.fixture
def judging(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Judges the test's subject: ``compiled()`` or ``cases()``; see ``conformance.suites.judging``."""
    from conformance.suites.judging import SubjectJudging

    state = request.config.stash[_STATE]
    subject = request.getfixturevalue("subject")
    assert state.log is not None, "records are opened when collection ends"
    return SubjectJudging(subject, state.log, state.profile, state.expected.reason(subject), request.config.option, tmp_path)
