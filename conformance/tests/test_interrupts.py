"""Ctrl-C and requests to end, once and twice: what was judged is kept and told, and the exit code is the one that shells know."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from conformance import reports
from conformance.cases.key import CaseKey
from conformance.cli import main
from conformance.judge.verdict import Finding, Verdict
from conformance.lanes.base import Outcome
from conformance.running import check
from conformance.running.interrupts import interrupted_once
from conformance.running.records import read_run
from conformance.running.runs import Judged
from conformance.suites import judging
from conformance.tests.test_plugin import run_pytest

KERNEL = """
import conformance

@conformance.kernel("rms_norm")
def mine(x, weight, out):
    out.copy_(x)
"""

SIGNALS = [pytest.param(signal.SIGINT, 130, id="SIGINT"), pytest.param(signal.SIGTERM, 143, id="SIGTERM")]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """In the background of a script an interrupt is ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler, "signals are given back"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(KERNEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def interrupted_after(count: int, number: int) -> Callable[..., Iterator[Judged]]:
    """Made-up runs, of which the second fails, and a signal after ``count`` of them; no process is started."""
    judged = itertools.count(1)

    def runs(kernel: Any, keys: Iterable[CaseKey], *others: Any, **more: Any) -> Iterator[Judged]:
        for place, key in enumerate([keys] if isinstance(keys, CaseKey) else keys):
            findings = (Finding("element", "is wrong"),) if place == 1 else ()
            yield Judged("example", key, Verdict(findings, 0.5), Outcome("ok"))
            if next(judged) == count:
                send(number)

    return runs


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_check_keeps_and_tells_what_it_judged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, twice: bool
) -> None:
    build = reports.build

    def interrupted_build(*arguments: Any, **options: Any) -> Any:
        if twice:
            send(number)
        return build(*arguments, **options)

    monkeypatch.setattr(check, "case_runs", interrupted_after(3, number))
    monkeypatch.setattr(reports, "build", interrupted_build)
    done = CliRunner().invoke(main, ["check", "rms_norm", "mine.py:mine", "--examples", "5", "--out", "kept"])
    assert done.exit_code == code, done.output
    assert done.stdout.startswith("interrupted: 3 of 5 cases were judged\nmine (rms_norm, eager): FAILED 1 of 3 runs")
    log = read_run(folder / "kept")
    assert [record.event for record in log.records] == ["start", "case", "case", "case", "error", "end"]
    assert log.records[-1].details["exit_code"] == code
    assert all((folder / "kept" / name).exists() for name in ("report.html", "summary.md", "junit.xml"))


def test_a_check_that_is_interrupted_has_not_passed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "case_runs", interrupted_after(1, signal.SIGINT))
    done = CliRunner().invoke(main, ["check", "rms_norm", "mine.py:mine", "--examples", "5", "--out", "kept"])
    assert done.exit_code == 130
    assert "passed" not in done.stdout
    assert str(reports.build(folder / "kept", ("terminal",))["terminal"]).startswith("INCOMPLETE")


def test_a_comparison_tells_what_it_judged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "case_runs", interrupted_after(5, signal.SIGTERM))
    done = CliRunner().invoke(main, ["diff", "mine.py:mine", "mine.py:mine", "--examples", "3"])
    assert done.exit_code == 143, done.output
    assert done.stdout.startswith("OLD mine (rms_norm): FAILED 1 of 3 runs (element)\ninterrupted: 2 of 3 cases were judged\n")
    assert done.stderr == "conformance: interrupted\n"


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_suites_report_what_they_judged(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> None:
    monkeypatch.setattr(judging, "judged_runs", interrupted_after(2, number))
    options = ["--conformance-only-user-kernels", "--conformance-kernels", "mine.py", "--conformance-presets", "tiny"]
    done = run_pytest(folder, "-m", "interpret", *options)
    assert done.returncode == code, done.stdout + done.stderr
    assert "eager mine [tiny]: interrupted after 2 runs" in done.stdout
    log = read_run(folder / "run")
    assert [record.event for record in log.records] == ["start", "case", "case", "error", "end"]
    assert log.records[-1].details["exit_code"] == code
    assert (folder / "run" / "junit.xml").exists()


def test_an_interrupt_that_got_lost_in_a_destructor_still_ends_what_is_done() -> None:
    with interrupted_once() as interrupts:
        with contextlib.suppress(KeyboardInterrupt):  # as Python does with whatever a destructor raises
            send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_pending()


def test_what_is_ignored_anyway_stays_ignored() -> None:
    """As in the background of a script, or below ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupted_once() as interrupts:
            send(signal.SIGHUP)
            assert interrupts.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)
