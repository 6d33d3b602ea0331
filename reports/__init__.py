"""Reports of a run, built from its records alone: for the terminal, a CI step summary, a CI test view, and one HTML page.

>>> reports.build(Path("runs/nightly"), formats=("markdown", "html"))
{'markdown': PosixPath('runs/nightly/summary.md'), 'html': PosixPath('runs/nightly/report.html')}
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conformance.errors import UsageError
from conformance.outside import write_whole

if TYPE_CHECKING:
    from conformance.reports.summary import RunSummary

__all__ = ["FORMATS", "build"]

#: Every format, and the file in the run's folder that holds it; the terminal's is returned, not written.
FORMATS: dict[str, str | None] = {
    "terminal": None,
    "markdown": "summary.md",
    "junit": "junit.xml",
    "html": "report.html",
}


def build(
    folder: Path,
    formats: Sequence[str] = ("terminal", "markdown", "junit", "html"),
    *,
    colour: bool = False,
    unwritten: list[str] | None = None,
) -> dict[str, Path | str]:
    """Build reports of the run in ``folder``: the text itself for ``terminal``, the path of the written file for the others.

    ``colour`` is for the terminal's. Building again replaces the files; the records are only read. Raises ``UsageError`` for an
    unknown format and for a folder without records. ``unwritten`` takes a line for each file that cannot be written, which the
    result then lacks; without it ``OSError`` is raised.
    """
    from conformance.reports import junit, markdown, page, terminal
    from conformance.reports.summarise import summarise
    from conformance.running.records import read_run

    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"unknown report format {name!r}; known are {', '.join(FORMATS)}")
    summary = summarise(read_run(folder))
    renderers: dict[str, Callable[[RunSummary], str]] = {
        "terminal": functools.partial(terminal.render, colour=colour),
        "markdown": markdown.render,
        "junit": junit.render,
        "html": page.render,
    }
    built: dict[str, Path | str] = {}
    for name in formats:
        content = renderers[name](summary)
        file = FORMATS[name]
        if file is None:
            built[name] = content
            continue
        try:
            write_whole(folder / file, content)
            built[name] = folder / file
        except OSError as error:
            if unwritten is None:
                raise
            unwritten.append(f"cannot write {folder / file}: {error.strerror or error}")
    return built
