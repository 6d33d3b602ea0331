"""One subject's run inside a suite's test: cases drawn, judged and recorded, and the test's own outcome."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.cases.key import CaseKey
from conformance.cases.profiles import SuiteProfile
from conformance.cases.space import Space, stratified_keys
from conformance.cases.strategies import keys
from conformance.contract.registry import short_name
from conformance.errors import UnavailableError, UsageError
from conformance.judge.explanations import Explainer
from conformance.judge.judgement import judge_without_outputs
from conformance.lanes import lane_named
from conformance.lanes.base import Outcome
from conformance.lanes.cards import CardChoice
from conformance.lanes.process import KernelProcess, Limits
from conformance.outside import one_line
from conformance.reports.text import number
from conformance.running.capabilities import prove
from conformance.running.check import Report, judged_runs, pooled_run
from conformance.running.evidence import keep_evidence
from conformance.running.plans import Plans, RunPlan
from conformance.running.real_size import runs_at_real_size
from conformance.running.runs import MOST_LOST, Judged, is_lost
from conformance.running.session import RunLog, Subject
from conformance.suites.state import fail_for_lack

#: The dearest real-size kernel runs in about a minute and 11.5 GB; a slow machine gets ten times that.
FULL_SIZE_LIMITS = Limits(seconds=900, memory_bytes=14 << 30, compile_seconds=1800)
#: Where the stratified keys of the suites start.
SEED = 0


class ConformanceError(Exception):
    """A case with findings; Hypothesis sees it, pytest gets the report instead."""


class SubjectJudging:
    """Judges one kernel at one preset on one lane, and ends the test accordingly."""

    def __init__(
        self,
        subject: Subject,
        log: RunLog,
        profile: SuiteProfile,
        expected_reason: str | None,
        options: Any,
        folder: Path,
        presets: Sequence[str],
        cards: CardChoice,
    ) -> None:
        self.subject, self.log, self.profile, self.options, self.folder = subject, log, profile, options, folder
        self.expected_reason = expected_reason
        #: All presets of the subject's model that the run judges kernels at.
        self.presets = presets
        self.cards = cards
        self.runs: list[Judged] = []

    def _process(self, limits: Limits) -> KernelProcess:
        """A worker process for the subject's kernel on its lane; the user's limits win over the lane's."""
        options = self.options
        if options.conformance_kernel_timeout is not None:
            seconds = options.conformance_kernel_timeout
            limits = dataclasses.replace(limits, seconds=seconds, launch_seconds=seconds)
        if options.conformance_kernel_memory is not None:
            limits = dataclasses.replace(limits, memory_bytes=int(options.conformance_kernel_memory * 2**30))
        return KernelProcess(
            self.subject.kernel,
            self.subject.lane,
            limits=limits,
            folder=self.folder,
            device_executor=options.conformance_device_executor,
            cards=self.cards,
        )

    def compiled(self) -> None:
        """Compile the kernel at the subject's dimensions."""
        space = self._space()
        key = space.largest
        limits = FULL_SIZE_LIMITS if self.subject.overrides else Limits()
        with self.usage_errors():
            self._require_accepted([key])
            with self._process(limits) as process:
                self._record("compile", key, process.compile(key.dims))
        self._conclude()

    def cases(self) -> None:
        """Judge the kernel on cases: one or more of every regime, then, at night, what Hypothesis draws."""
        space = self._space()
        given = list(itertools.islice(stratified_keys(space, SEED), self.profile.given(space.stage)))
        # What stands in for a card does the same every time.
        repeats = lane_named(self.subject.lane).repeats[not self.profile.deterministic] if self._on_card else 1
        plans = Plans(self.subject.lane, space.stage, repeats=repeats)
        explainer = Explainer(self.subject.kernel.judged_by)
        with self.usage_errors(), contextlib.ExitStack() as stack:
            self._require_accepted(given)
            process = stack.enter_context(self._process(Limits()))

            def one(key: CaseKey) -> None:
                if self._refused(key) or sum(map(is_lost, self.runs)) >= MOST_LOST:
                    return
                before = len(self.runs)
                runs = judged_runs(
                    self.subject.kernel, key, process.run, plans.following(key), explainer=explainer, keep=self._evidence
                )
                for run in runs:
                    self._keep(run)
                if not all(run.verdict.ok for run in self.runs[before:]):
                    raise ConformanceError(str(key))

            for key in given:
                with contextlib.suppress(ConformanceError):
                    one(key)
            if not self.profile.deterministic and all(run.verdict.ok for run in self.runs):
                self._draw(space, one)
        for run in pooled_run(self.runs):
            self._keep(run)
        self._conclude()

    def _draw(self, space: Space, one: Callable[[CaseKey], None]) -> None:
        """What Hypothesis draws: what failed on an earlier night first, then new cases, shrunk where they fail."""
        import hypothesis

        settings = self.profile.settings(f"{self.subject.lane}-{self.subject.id}")
        try:
            settings(hypothesis.given(key=keys(space))(one))()
        except BaseException as error:
            if not _is_only_conformance(error):
                raise

    def capabilities(self) -> None:
        """Put what the kernel declares that it serves to the test."""
        space = self._space()
        with self.usage_errors(), self._process(Limits()) as process:
            for run in prove(self.subject.kernel, space, process.run):
                self._keep(run)
        self._conclude()

    def full_size(self) -> None:
        """Judge the kernel at real geometry: on a card several cases and what follows from them, elsewhere one.

        Compiler passes are not compared, which would take minutes.
        """
        space, kernel = self._space(), self.subject.kernel
        key = space.with_longest(next(iter(stratified_keys(space, SEED))))
        with self.usage_errors():
            self._require_accepted([key])
            with self._process(self._full_size_limits()) as process:
                if self._on_card:
                    repeats, _ = lane_named(self.subject.lane).repeats
                    runs = runs_at_real_size(kernel, space, process.run, repeats, self._evidence)
                else:
                    runs = judged_runs(kernel, key, process.run, RunPlan(passes="none"), keep=self._evidence)
                for run in runs:
                    self._keep(run)
        self._conclude()

    def _full_size_limits(self) -> Limits:
        if not self._on_card:
            return FULL_SIZE_LIMITS
        # What a worker has of a case: the shared memory, and copies on their way to the card and back.
        return dataclasses.replace(FULL_SIZE_LIMITS, memory_bytes=FULL_SIZE_LIMITS.memory_bytes + self.subject.memory)

    def _space(self) -> Space:
        dims: dict[str, Any] = {"preset": self.subject.preset, **dict(self.subject.overrides)}
        return Space.of(self.subject.kernel.stage, dims)

    def _require_accepted(self, planned: list[CaseKey]) -> None:
        """Skip the test if the kernel takes none of the planned cases; say how many if it does not take all.

        A kernel that takes none at any preset is not judged at all, which is no pass: raises ``UsageError``.
        """
        reasons = [reason for key in planned if (reason := self.subject.kernel.refusal(key.dims)) is not None]
        if not reasons:
            return
        reason = (
            f"takes {len(planned) - len(reasons)} of {len(planned)} planned cases of preset {self.subject.preset}: {reasons[0]}"
        )
        self.log.skipped(self.subject, reason)
        if len(reasons) == len(planned):
            if not self.subject.overrides and not any(map(self._takes, self.presets)):
                raise UsageError(f"nothing was judged: kernel {self.subject.name} {reason}, and none at any other preset")
            pytest.skip(reason)

    def _takes(self, preset: str) -> bool:
        """Whether the kernel takes any of a preset's planned cases."""
        space = Space.of(self.subject.kernel.stage, preset)
        keys = itertools.islice(stratified_keys(space, SEED), self.profile.given(space.stage))
        return any(self.subject.kernel.refusal(key.dims) is None for key in keys)

    def _refused(self, key: CaseKey) -> bool:
        return self.subject.kernel.refusal(key.dims) is not None

    def _record(self, check: str, key: CaseKey, outcome: Outcome) -> None:
        self._keep(Judged(check, key, judge_without_outputs(outcome), outcome))

    def _keep(self, run: Judged) -> None:
        self.runs.append(run)
        self.log.judged(self.subject, run)

    @property
    def _on_card(self) -> bool:
        return lane_named(self.subject.lane).takes_card(self.options.conformance_device_executor)

    def _evidence(self, run: Judged, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep what a failure on a card left behind: the card may not be there tomorrow."""
        if self._on_card:
            keep_evidence(self.log.folder, self.subject, run, tensors, self.folder)

    def usage_errors(self) -> _Translated:
        """Ends the test with one line for what could not run."""
        return _Translated(self)

    def _conclude(self) -> None:
        kernel = self.subject.kernel
        if sum(map(is_lost, self.runs)) >= MOST_LOST:
            self.log.skipped(self.subject, f"the remaining cases were not tried after {MOST_LOST} runs that crashed or timed out")
        report = Report(short_name(kernel.stage), self.subject.name, self.subject.lane, tuple(self.runs))
        if self.expected_reason is not None:
            self.log.expected(self.subject, self.expected_reason, fixed=report.ok)
            if not report.ok:
                pytest.xfail(f"expected: {self.expected_reason}")
        elif not report.ok:
            pytest.fail(str(report) if report.runs else "no case was judged: the kernel refuses every one", pytrace=False)
        elif self.log.failure:
            pytest.fail(f"{report}\n{self.log.failure}", pytrace=False)


def _is_only_conformance(error: BaseException) -> bool:
    parts = getattr(error, "exceptions", None)
    if parts is not None:
        return all(_is_only_conformance(part) for part in parts)
    return isinstance(error, ConformanceError)


class _Translated:
    """Ends the test with one line where the lane could not run or the kernel does not fit its contract, and records it."""

    def __init__(self, judging: SubjectJudging) -> None:
        self.judging = judging

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            runs = number(len(self.judging.runs), "run")
            self.judging.log.could_not_run(self.judging.subject, f"interrupted after {runs}")
        if isinstance(error, (UsageError, OSError, MemoryError)):
            reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            self.judging.log.could_not_run(self.judging.subject, reason)
            if isinstance(error, UnavailableError):
                fail_for_lack(one_line(reason))
            pytest.fail(one_line(reason), pytrace=False)
