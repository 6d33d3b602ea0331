"""The HTML report in a real browser: it shows everything, runs without a script error, and its filters filter."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conformance.reports import page
from conformance.reports.summarise import summarise
from conformance.reports.summary import RunSummary
from conformance.running.records import read_run
from conformance.tests import synthetic_runs as runs

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None, reason=f"no browser: install chromium or google-chrome (looked for {', '.join(BROWSERS)})"
    ),
]

#: Put into a copy of the page before anything else: errors are kept where a dump of the document shows them.
HOOK = """<script>
window.errors = [];
window.addEventListener("error", (event) => window.errors.push(String(event.message)));
</script>"""


class Browser:
    """Headless Chromium, a new one for every page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def document(self, path: Path, width: int = 1280) -> tuple[str, list[str]]:
        """The document after its scripts ran, and what the console said."""
        assert BROWSER is not None
        arguments = [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", "--v=0", f"--window-size={width},900", "--virtual-time-budget=3000"),
            f"--user-data-dir={self.folder / 'profile'}",
            "--dump-dom",
            path.resolve().as_uri(),
        ]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, encoding="utf-8")
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def after(self, path: Path, steps: str, width: int = 1280) -> str:
        """What a script that runs after the page's own says: steps end with ``return``; errors of any script are appended."""
        content = path.read_text(encoding="utf-8")
        # The page's policy allows no script but its own; the copy has to allow the test's.
        content, removed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', HOOK, content)
        assert removed == 1
        probe = (
            f"<script>document.body.dataset.answer = JSON.stringify([(() => {{ {steps} }})(), window.errors]);</script></body>"
        )
        copy = path.with_name("probed.html")
        copy.write_text(content.replace("</body>", probe), encoding="utf-8")
        document, _ = self.document(copy, width)
        found = re.search(r'<body data-answer="([^"]*)"', document)
        assert found is not None, document[-2000:]
        return found[1].replace("&quot;", '"')


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    return Browser(tmp_path)


def written(folder: Path) -> tuple[RunSummary, Path]:
    summary = summarise(read_run(folder))
    path = folder / "report.html"
    path.write_text(page.render(summary), encoding="utf-8")
    return summary, path


class Matrix(html.parser.HTMLParser):
    """The text of every cell of the matrix, by line and column."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.inside = ("class", "matrix") in attrs
        elif self.inside and tag == "tr":
            self.lines.append([])
        elif self.inside and tag in ("td", "th"):
            self.lines[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside and self.lines and self.lines[-1]:
            self.lines[-1][-1] += data


@pytest.mark.parametrize("make", [runs.rich_run, runs.empty_run, runs.killed_run, runs.hostile_run])
def test_page_runs_its_own_script_and_nothing_else_without_an_error(tmp_path: Path, browser: Browser, make: object) -> None:
    assert callable(make)
    summary, path = written(make(tmp_path / "run"))
    document, console = browser.document(path)
    # The browser also reports here whatever the content security policy refused: our own script, if its hash were wrong.
    assert console == []
    if summary.rows:
        assert 'id="controls" hidden' not in document, "the script did not show the filters"
    assert document.count('<button type="button">Copy</button>') == document.count('<div class="command">')
    assert (
        browser.after(path, "return [typeof window.hacked, document.querySelectorAll('img').length];") == '[["undefined",0],[]]'
    )


def test_every_kernel_lane_and_preset_is_shown_with_its_status(tmp_path: Path, browser: Browser) -> None:
    summary, path = written(runs.rich_run(tmp_path / "run"))
    document, _ = browser.document(path)
    matrix = Matrix()
    matrix.feed(document)
    head, *lines = [[" ".join(text.split()) for text in line] for line in matrix.lines]
    assert head == ["Kernel", *summary.lanes]
    shown = {
        (line[0].split("stage")[0].split("kernels/")[0], lane): text
        for line in lines
        for lane, text in zip(head[1:], line[1:], strict=True)
    }
    for cell in summary.cells:
        text = shown[cell.kernel, cell.lane]
        assert re.search(rf"{re.escape(cell.preset)}\W*{re.escape(cell.status)}", text), (cell.kernel, cell.lane, text)
        for reason in (*cell.skipped_because, *cell.stopped_because):
            assert reason in text
    assert len(lines) == summary.totals.kernels


def test_skipped_cells_are_as_visible_as_passed_ones(tmp_path: Path, browser: Browser) -> None:
    _, path = written(runs.rich_run(tmp_path / "run"))
    steps = """
      const look = (status) => {
        const cell = document.querySelector(`.cell[data-status="${status}"]`);
        const word = cell.querySelector(".status");
        const style = getComputedStyle(word);
        const box = cell.getBoundingClientRect();
        return [style.fontSize, style.fontWeight, style.visibility, getComputedStyle(cell).opacity, Math.round(box.width) > 100];
      };
      const colour = (status) => getComputedStyle(document.querySelector(`.cell[data-status="${status}"]`)).backgroundColor;
      const same = ["skipped", "could not run", "nothing ran"].map((name) => String(look(name)) === String(look("passed")));
      return [...same, colour("skipped") !== colour("passed")];
    """
    assert browser.after(path, steps) == "[[true,true,true,true],[]]"


def test_filters_hide_the_rest_and_can_be_undone(tmp_path: Path, browser: Browser) -> None:
    summary, path = written(runs.rich_run(tmp_path / "run"))
    steps = """
      const choose = (id, value) => {
        const select = document.getElementById(id);
        select.value = value;
        select.dispatchEvent(new Event("change"));
        return [...document.querySelectorAll(".cell")].filter((cell) => cell.checkVisibility()).length;
      };
      return [choose("status", "failed"), choose("lane", "eager"), choose("status", ""), choose("lane", "")];
    """
    failed = [cell for cell in summary.cells if cell.status == "failed"]
    eager = [cell for cell in summary.cells if cell.lane == "eager"]
    expected = [len(failed), len([cell for cell in failed if cell.lane == "eager"]), len(eager), len(summary.cells)]
    assert 0 < expected[1] < expected[0]
    assert browser.after(path, steps) == f"[{expected},[]]".replace(" ", "")


def test_page_fits_a_narrow_window(tmp_path: Path, browser: Browser) -> None:
    _, path = written(runs.rich_run(tmp_path / "run"))
    # The matrix is wider than this; it has to scroll by itself, and not take the page with it.
    steps = """
      const fits = document.documentElement.scrollWidth <= window.innerWidth;
      return [window.innerWidth, fits, document.querySelector(".matrix").offsetWidth > window.innerWidth];
    """
    assert browser.after(path, steps, width=500) == "[[500,true,true],[]]"
