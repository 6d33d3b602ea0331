"""What a run shows while it runs: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

from conformance.judge.verdict import Finding
from conformance.reports.progress import LiveProgress
from conformance.running.records import Record, RecordWriter, RunFollower


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_at_the_first_verdict_and_no_other_until_the_period_is_over() -> None:
    log = io.StringIO()
    with LiveProgress("rope interpret", 40, "cases", stream=log, period=3600) as live:
        live.update(0)
        assert log.getvalue() == ""
        for done in range(1, 30):
            live.update(done, f"{done} findings")
    (line,) = log.getvalue().splitlines()
    assert re.fullmatch(r"rope interpret: 1 of 40 cases, 1 findings, \S+ s so far, about \S+ s left", line)


def test_a_log_is_not_silent_while_nothing_ends() -> None:
    log = io.StringIO()
    with LiveProgress("rope", 40, "cases", stream=log, period=0.05):
        deadline = time.monotonic() + 30
        while not log.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert log.getvalue().startswith("rope: 0 of 40 cases, no verdict yet")


def test_a_terminal_gets_one_line_that_is_taken_away_and_no_escape_of_a_kernels_own() -> None:
    terminal = _Terminal()
    with LiveProgress("ro\x1b[31mpe", 4, "cases", stream=terminal) as live:
        live.update(1, "2 findings\x1b]0;title\x07")
    shown = terminal.getvalue()
    assert "1/4 cases" in shown
    assert "2 findings" in shown
    assert "\x1b[31mpe" not in shown
    assert "\x1b]" not in shown
    assert shown.endswith("\x1b[2K")


def test_a_run_is_followed_line_by_whole_line(tmp_path: Path) -> None:
    follower = RunFollower(tmp_path / "run")
    follower.follow()
    assert (follower.runs, follower.findings) == (0, 0)
    writers = [RecordWriter(tmp_path / "run", process) for process in ("gw0", "gw1")]
    for writer in writers:
        writer.write(Record("start"))
        writer.write(Record("case", findings=(Finding("element", "wrong"), Finding("bias", "wrong"))))
    follower.follow()
    assert (follower.runs, follower.findings) == (2, 4)
    line = Record("case").to_json() + "\n"
    with writers[0].path.open("a") as file:
        file.write(line[:9])
        file.flush()
        follower.follow()
        assert follower.runs == 2
        file.write(line[9:] + "no record\n")
    follower.follow()
    follower.follow()
    assert (follower.runs, follower.findings) == (3, 4)
