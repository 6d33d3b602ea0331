"""How far a run is, while it runs: a live line for who watches, and a plain line now and then for who reads the log later."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from conformance.reports import text

#: Seconds between two plain lines: a log that says nothing for long looks like a hang.
PLAIN_PERIOD = 60.0


def is_interactive() -> bool:
    """Whether a person watches standard error, so that a progress line helps."""
    return sys.stderr.isatty()


class LiveProgress:
    """Shows ``done`` of ``planned`` with what was found so far and the time left, on standard error or on ``stream``.

    On a terminal it is one line that is drawn anew, and taken away at the end. Elsewhere it is a plain line as soon as something
    is done, and after that at most one in ``period`` seconds, also while nothing ends. Use it in a ``with`` statement.
    """

    def __init__(
        self, title: str, planned: int, unit: str, *, stream: TextIO | None = None, period: float = PLAIN_PERIOD
    ) -> None:
        self._title, self._planned, self._unit, self._period = text.one_line(title, 60), planned, unit, period
        self._stream = stream or sys.stderr
        self._done, self._found = 0, ""
        self._began = self._told = time.monotonic()
        self._told_first = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._live: Progress | None = None
        self._heart: threading.Thread | None = None

    def __enter__(self) -> LiveProgress:
        if self._stream.isatty():
            self._live = _live_line(self._stream)
            self._task = self._live.add_task(self._title, total=self._planned, unit=self._unit, found="")
            self._live.start()
        else:
            self._heart = threading.Thread(target=self._beat, daemon=True)
            self._heart.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
        if self._heart is not None:
            self._heart.join()

    def update(self, done: int, found: str = "", planned: int | None = None) -> None:
        """``done`` units of the planned ones are judged; ``found`` says what came of it, such as ``2 findings``.

        Empty ``found`` means that there is no verdict yet. ``planned`` replaces the number that was given before.
        """
        with self._lock:
            self._planned = self._planned if planned is None else planned
            self._done, self._found = done, text.one_line(found, 60)
            if self._live is not None:
                with contextlib.suppress(OSError):
                    self._live.update(self._task, completed=done, total=self._planned, found=self._found)
            elif found and not self._told_first:
                self._tell()

    def _beat(self) -> None:
        while not self._ended.wait(min(1.0, self._period)):
            with self._lock:
                if time.monotonic() - self._told >= self._period:
                    self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        self._told, self._told_first = now, True
        passed = now - self._began
        left = _time_left(passed, self._done, self._planned)
        parts = [f"{self._title}: {self._done:,} of {self._planned:,} {self._unit}", self._found or "no verdict yet"]
        parts.append(f"{text.seconds(passed)} so far")
        if left:
            parts.append(f"about {text.seconds(left)} left")
        with contextlib.suppress(OSError):  # nobody reads it, and judging goes on
            print(", ".join(parts), file=self._stream, flush=True)


def _time_left(passed: float, done: float, planned: float) -> float:
    """Seconds, if what is left takes as long as what is done did; 0 where nothing tells."""
    return passed * (planned - done) / done if done else 0.0


class _TimeLeft(ProgressColumn):
    """``about 3 min 05 s left``."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = _time_left(task.elapsed or 0.0, task.completed, task.total or 0)
        return Text(f"about {text.seconds(left)} left" if left else "", "cyan")


def _live_line(stream: TextIO) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", max_width=26)),
        BarColumn(bar_width=12),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}", markup=False),
        TextColumn("{task.fields[found]}", markup=False, table_column=Column(no_wrap=True)),
        _TimeLeft(),
        console=Console(file=stream),
        refresh_per_second=4,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
