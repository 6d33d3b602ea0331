"""How far the suites are, on the screen while they run; with xdist too, where only the workers judge."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator
from typing import Any, TextIO

import pytest

from conformance.reports import text
from conformance.reports.progress import LiveProgress
from conformance.running.records import RunFollower

#: Seconds between two looks at what the workers have recorded.
PERIOD = 0.5
#: The attribute of a test's report that says, across processes, that the test is not the suites' own.
NOT_OF_SUITES = "conformance_not_of_suites"


def may_show(options: Any) -> bool:
    """Whether nothing else writes to the terminal while tests run: no names of tests, prompt of a debugger, or output."""
    return options.verbose <= 0 and not options.usepdb and not options.trace and options.capture not in ("no", "tee-sys")


class SuiteProgress:
    """A plugin of pytest for the process that has the terminal: a live line in place of pytest's dots.

    Tests done come from pytest, cases and findings from the records that every process writes as it judges: a test may take
    minutes, the first of its cases a second. Pytest's letters and the line cannot share the screen: with the first test that is
    not a suite's the line is taken away, and letters are written from then on.
    """

    def __init__(self, follower: RunFollower, planned: int) -> None:
        self._follower, self._done = follower, 0
        self._stream = _terminal()
        self._live = LiveProgress("judging", planned, "tests", stream=self._stream)
        self._ended = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._live.__enter__()
        self._looking.start()

    def stop(self) -> None:
        """Take the line away; harmless if it is gone."""
        if not self._ended.is_set():
            self._ended.set()
            self._looking.join()
            self._live.__exit__()
            self._stream.close()

    def _look(self) -> None:
        while not self._ended.wait(PERIOD):
            self._follower.follow()
            runs, findings = self._follower.runs, self._follower.findings
            found = f"{text.number(runs, 'run')}, {text.number(findings, 'finding')}" if runs else ""
            self._live.update(self._done, found)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the tests that ended."""
        self._done += report.when == "teardown"

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(
        self, report: pytest.TestReport
    ) -> Generator[None, tuple[str, str, object], tuple[str, str, object]]:
        """No letter for a test of the suites: it would stand in the middle of the line. The summary counts them as ever."""
        category, letter, word = yield
        if getattr(report, NOT_OF_SUITES, False):
            self.stop()
        return (category, letter, word) if self._ended.is_set() else (category, "", "")

    def pytest_enter_pdb(self) -> None:
        """A test calls ``breakpoint()``: the prompt needs the screen."""
        self.stop()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """The summary follows."""
        self.stop()


def _terminal() -> TextIO:
    """Standard error as it is outside of tests: while one runs, pytest captures what goes there."""
    try:
        number = sys.stderr.fileno()
    except (OSError, ValueError):  # replaced by something that is no file
        return os.fdopen(os.dup(2), "w")
    return os.fdopen(os.dup(number), "w", encoding=sys.stderr.encoding)
