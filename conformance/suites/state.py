"""What the pytest plugin knows during a run: the kernels, presets and subjects that were chosen, and where the run is kept.

As in the plugin, nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from conformance.lanes import LANES, default_lane, lane_named, lanes_of

if TYPE_CHECKING:
    from conformance.cases.profiles import SuiteProfile
    from conformance.contract.kernel import Declaration
    from conformance.lanes import Lane
    from conformance.lanes.cards import CardChoice
    from conformance.running.interrupts import Interrupts
    from conformance.running.session import ExpectedFailures, RunLog, Subject
    from conformance.suites.live import SuiteProgress


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn ``UsageError`` into the error with which pytest ends in one line."""
    from conformance.errors import UsageError
    from conformance.outside import one_line

    try:
        yield
    except UsageError as error:
        raise pytest.UsageError(one_line(error, 1000)) from error


#: Gigabytes: more than any machine has.
MOST_MEMORY = 1e6


#: Set in the failure of a test that had to run and could not, for what the machine lacks, and in its report.
LACKING = "conformance_could_not_run"


def fail_for_lack(reason: str) -> NoReturn:
    """Fail a test for what the machine lacks: no finding about a kernel."""
    failure = pytest.fail.Exception(reason, pytrace=False)
    setattr(failure, LACKING, True)
    raise failure


class Failures:
    """A plugin of pytest that counts the tests that failed, in the process that has the exit code."""

    def __init__(self) -> None:
        self._failed = self._lacking = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a failure."""
        self._failed += report.failed
        self._lacking += report.failed and getattr(report, LACKING, False)

    @property
    def only_could_not_run(self) -> bool:
        """Whether something failed, and all of it because the machine lacks something."""
        return 0 < self._failed == self._lacking


@dataclasses.dataclass
class PluginState:
    """What the plugin knows during one pytest run."""

    config: pytest.Config
    log: RunLog | None = None
    progress: SuiteProgress | None = None
    interrupts: Interrupts | None = None
    #: What is to be printed at the end, and a line for everything that could not be kept.
    told: list[str] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)
    #: Whether the folder is another run's by now.
    taken: bool = False
    failures: Failures = dataclasses.field(default_factory=Failures)
    _open: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    _claimed: bool = False
    _kernels: list[Declaration] | None = None
    _folder: Path | None = None
    _expected: ExpectedFailures | None = None

    @property
    def folder(self) -> Path:
        """Where the run is kept; named when first asked for."""
        if self._folder is None:
            from_controller = getattr(self.config, "workerinput", {}).get("conformance_run")
            chosen = from_controller or self.config.option.conformance_run
            if chosen:
                self._folder = self._path(chosen).resolve()
            else:
                from conformance.running.session import new_run_folder

                self._folder = new_run_folder(self.config.invocation_params.dir / "runs")
        return self._folder

    def claim_folder(self) -> None:
        """Have the run's folder for this run until ``close``; raises ``pytest.UsageError`` if it holds a run or cannot."""
        from conformance.running.session import ClaimedFolder

        if self._claimed or self.is_worker:
            return
        with usage_errors():
            self._open.enter_context(ClaimedFolder(self.folder))
        self._claimed = True

    def require_limits(self) -> None:
        """Raise ``pytest.UsageError`` for limits of kernels that are none."""
        from conformance.errors import UsageError
        from conformance.running.check import require_seconds

        memory = self.config.option.conformance_kernel_memory
        with usage_errors():
            require_seconds("--conformance-kernel-timeout", self.config.option.conformance_kernel_timeout)
            if memory is not None and not 0 < memory <= MOST_MEMORY:
                raise UsageError(f"--conformance-kernel-memory must be a positive number of GB, found {memory}")

    @property
    def cards(self) -> CardChoice:
        """The cards to run on, and which of them is this process's; raises ``pytest.UsageError`` for options that name none."""
        from conformance.lanes.cards import choice_of

        options, process = self.config.option, getattr(self.config, "workerinput", {}).get("workerid", "gw0")
        with usage_errors():
            return choice_of(options.conformance_device, options.conformance_device_wait, int(process.removeprefix("gw")))

    def begin_judging(self) -> None:
        """From here on a signal that ends the process ends the run in order, with what was judged."""
        if self.interrupts is None and not self.is_worker:
            from conformance.running.interrupts import interrupted_once

            self.interrupts = self._open.enter_context(interrupted_once())

    def build_reports(self) -> None:
        """Build the reports of all processes' records, if there are any."""
        if self.is_worker or not (self.wrote_records() or self.lost):
            return
        from conformance import reports
        from conformance.errors import UsageError
        from conformance.outside import one_line

        if self.taken:
            self.lost.append("no report is built: the folder holds another run")
            return
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        try:
            built = reports.build(
                self.folder,
                ("terminal", "html", "markdown", "junit"),
                colour=reporter is not None and reporter.hasmarkup,
                unwritten=self.lost,
            )
        except UsageError as error:  # the folder is gone
            self.lost.append(str(error))
            return
        kept = ", ".join(path.name for path in built.values() if isinstance(path, Path))
        self.told += [str(built["terminal"]), *([one_line(f"kept in {self.folder}: {kept}")] if kept else [])]

    @property
    def is_worker(self) -> bool:
        """Whether this process is one of xdist's workers, which belong to their controller's run."""
        return hasattr(self.config, "workerinput")

    def close(self) -> None:
        """Take the live line away, and give back the folder and the signals."""
        if self.progress is not None:
            self.progress.stop()
        self._open.close()

    def wrote_records(self) -> bool:
        """Whether any process of this run wrote records."""
        return self._folder is not None and any(self._folder.glob("records-*.jsonl"))

    @property
    def profile(self) -> SuiteProfile:
        """How many cases."""
        from conformance.cases.profiles import profile_named

        return profile_named(self.config.option.conformance_profile)

    def kernels(self) -> list[Declaration]:
        """Bundled kernels and the user's; raises ``pytest.UsageError`` for a file that cannot be used."""
        if self._kernels is None:
            from conformance.errors import UsageError
            from conformance.lanes.listing import bundled_kernels, kernels_of

            options = self.config.option
            with usage_errors():
                found: list[Declaration] = [] if options.conformance_only_user_kernels else [*bundled_kernels()]
                for location in options.conformance_kernels:
                    own = kernels_of(self._resolve(location))
                    if not own:
                        raise UsageError(f"{location} defines no kernel: decorate one with @conformance.kernel(STAGE)")
                    found += own
                if not found:
                    raise UsageError("no kernel to judge: --conformance-only-user-kernels needs --conformance-kernels FILE.py")
                self._require_distinct(found)
            self._kernels = found
        return self._kernels

    def _resolve(self, location: str) -> str:
        # pytest may have been started elsewhere than where an xdist worker stands.
        if location.endswith(".py"):
            return str(self._path(location))
        return location

    def _path(self, given: str) -> Path:
        from conformance.outside import require_path

        with usage_errors():
            require_path(given)
        return self.config.invocation_params.dir / given

    @staticmethod
    def _require_distinct(kernels: list[Declaration]) -> None:
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
            from conformance.running.session import ExpectedFailures

            path = self.config.option.conformance_expected_failures
            with usage_errors():
                self._expected = ExpectedFailures.read(self._path(path)) if path else ExpectedFailures()
                self._expected.require_known(self.kernels())
        return self._expected

    def presets(self) -> dict[str, list[str]]:
        """By model the presets to run: those that the user chose, or those of the model's suites.

        Raises ``pytest.UsageError`` for a name that no model of the kernels has, or several, and where a model has none of them.
        """
        from conformance.contract.registry import chosen_name, models

        chosen = [name for name in self.config.option.conformance_presets.split(",") if name]
        if not chosen:
            return {model.name: list(model.suite_presets) for model in models()}
        judged = {kernel.stage.model for kernel in self.kernels()}
        known = [f"{model.name}/{preset}" for model in models() if model.name in judged for preset in model.presets]
        found: dict[str, list[str]] = {model: [] for model in judged}
        with usage_errors():
            for name in chosen:
                model, _, preset = chosen_name(name, known, "preset").partition("/")
                found[model].append(preset)
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
        """Every kernel that declares a capability, in its usual lane and on a card.

        At the first preset: what a kernel serves does not depend on its sizes.
        """
        executor = self.config.option.conformance_device_executor

        def shown(lane: Lane) -> bool:
            return lane.default or lane.takes_card(executor)

        subjects = [
            subject for subject in self.subjects(executes=True) if subject.kernel.capabilities and shown(lane_named(subject.lane))
        ]
        first = {(subject.name, subject.lane): subject for subject in reversed(subjects)}
        return [subject for subject in subjects if first[subject.name, subject.lane] is subject]

    def full_size_subjects(self, executes: bool) -> list[Subject]:
        """Every kernel of a compiler at the model's real size.

        On a card all execute; elsewhere the fused loops only compile, and all others execute.
        """
        from conformance.cases.space import Space
        from conformance.contract.registry import model_named
        from conformance.running.real_size import host_bytes
        from conformance.running.session import Subject

        subjects: list[Subject] = []
        for kernel in self.kernels():
            full_size = model_named(kernel.stage.model).full_size
            usual = default_lane(kernel.toolchain)
            if full_size is None or usual.in_process:
                continue
            for lane in lanes_of(kernel.toolchain):
                on_card = lane.takes_card(self.config.option.conformance_device_executor)
                if lane.executes != executes or (executes and not on_card and lane is not usual):
                    continue
                sizes = full_size.on_card if on_card else full_size.executed if executes else full_size.compiled
                for overrides in sizes(kernel.stage):
                    memory = full_size.memory
                    if on_card:
                        memory = host_bytes(kernel.stage, Space.of(kernel.stage, {"preset": full_size.preset, **overrides}).limit)
                    given = tuple(overrides.items())
                    called = self.kernel_names[kernel.id]
                    subjects.append(Subject(kernel, full_size.preset, lane.name, given, memory, called))
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
        self.claim_folder()
        self.begin_judging()
        with usage_errors():
            self.log = RunLog(self.folder, process)
        self.log.start(
            planned,
            {
                "profile": options.conformance_profile,
                "markers": options.markexpr,
                "require_device": options.conformance_require_device,
                "device_executor": options.conformance_device_executor,
                "device": options.conformance_device,
            },
        )
