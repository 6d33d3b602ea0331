"""Reports tell the truth about a run: also about a killed one, a damaged log, and text that tries to break the page."""

from __future__ import annotations

import html
import html.parser
import itertools
import math
import re
import shlex
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from conformance import reports
from conformance.errors import UsageError
from conformance.judge.verdict import Finding
from conformance.reports import junit, markdown, page, terminal, text
from conformance.reports.summarise import summarise
from conformance.reports.summary import Cell, RunSummary
from conformance.running.records import Record, read_run
from conformance.tests import synthetic_runs as runs
from conformance.tests.synthetic_runs import case, element, end, planned, start, write

RENDERERS = {"terminal": terminal.render, "markdown": markdown.render, "junit": junit.render, "html": page.render}

every_format = pytest.mark.parametrize("name", RENDERERS)


def summary_of(folder: Path) -> RunSummary:
    return summarise(read_run(folder))


def run_of(folder: Path, *records: Record, plan: tuple[dict[str, str], ...] = (), exit_code: int = 0) -> RunSummary:
    """The summary of a run of one process that started, left these records and ended."""
    return summary_of(write(folder, [start(plan), *records, end(exit_code)]))


def cell(summary: RunSummary, kernel: str, lane: str = "interpret", preset: str = "tiny") -> Cell:
    (found,) = (cell for cell in summary.cells if (cell.kernel, cell.lane, cell.preset) == (kernel, lane, preset))
    return found


# What did not run is not a pass.


def test_killed_run_is_incomplete_and_nothing_in_it_passes(tmp_path: Path) -> None:
    summary = summary_of(runs.killed_run(tmp_path))
    assert summary.outcome == "incomplete"
    assert summary.unfinished == ("main",)
    assert len(summary.unreadable) == 1
    assert cell(summary, "rms_norm").status == "cut short"
    assert cell(summary, "rope").status == "nothing ran"
    assert summary.totals.cells["passed"] == 0


@every_format
def test_killed_run_says_so_in_every_format(tmp_path: Path, name: str) -> None:
    shown = RENDERERS[name](summary_of(runs.killed_run(tmp_path)))
    for words in ("cut short", "nothing ran", "cannot be read"):
        assert words in shown


def test_second_session_in_a_file_is_found_cut_short(tmp_path: Path) -> None:
    write(tmp_path, [start(), case("rope"), end(), start(), case("rope")])
    assert summary_of(tmp_path).unfinished == ("main",)


def test_process_that_left_an_empty_file_was_cut_short(tmp_path: Path) -> None:
    write(tmp_path, [start(), case("rope"), end()])
    write(tmp_path, [], "worker-1")
    summary = summary_of(tmp_path)
    assert summary.unfinished == ("worker-1",)
    assert summary.outcome == "incomplete"
    assert cell(summary, "rope").status == "passed"  # judged by the process that did end


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"schema": 1, "event": "case", "kernel": "ro',
        '{"schema": 99, "event": "case"}',
        "[]",
        '{"schema": 1, "event": "case", "findings": [3]}',
        '{"schema": 1, "event": "case", "findings": [{"detector": "unheard_of", "message": ""}]}',
        '{"schema": 1, "event": "case", "share": "much"}',
        '{"schema": 1, "event": "case", "time": "noon"}',
        '{"schema": 1, "event": "case", "details": {"card": "first"}}',
        '{"schema": 1, "event": "case", "details": {"device_seconds": -1}}',
        '{"schema": 1, "event": "case", "details": {"given_up": {"0": 5}}}',
    ],
)
def test_line_that_cannot_be_read_is_counted_and_keeps_the_run_from_passing(tmp_path: Path, line: str) -> None:
    write(tmp_path, [start(), case("rope")])
    with (tmp_path / "records-main.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n" + end().to_json() + "\n")
    summary = summary_of(tmp_path)
    assert summary.outcome == "incomplete"
    assert [where.split(": ")[0] for where in summary.unreadable] == ["records-main.jsonl:3"]
    assert cell(summary, "rope").cases == 1


def test_planned_entry_without_a_record_is_shown_and_is_not_a_pass(tmp_path: Path) -> None:
    summary = run_of(tmp_path, case("rope"), plan=(planned("rope", "interpret"), planned("mlp", "interpret", "awkward")))
    assert cell(summary, "mlp", preset="awkward").status == "nothing ran"
    assert summary.outcome == "incomplete"
    suite = ElementTree.fromstring(junit.render(summary)).find("testsuite[@name='interpret']")
    assert suite is not None
    (error,) = suite.findall("testcase[@name='mlp[awkward]']/error")
    assert "no record" in error.get("message", "")
    assert suite.get("errors") == "1"


@pytest.mark.parametrize("planned_lanes", [(), ("device",)])
def test_run_without_a_case_does_not_pass(tmp_path: Path, planned_lanes: tuple[str, ...]) -> None:
    plan = tuple(planned("rope", lane) for lane in planned_lanes)
    summary = run_of(tmp_path, Record("skip", lane="device", reason="no NPU"), plan=plan)
    assert summary.outcome == "nothing ran"
    # A CI system takes a file without an error for a success.
    assert int(ElementTree.fromstring(junit.render(summary)).get("errors", "0")) > 0


@pytest.mark.parametrize(("exit_code", "outcome"), [(0, "passed"), (3, "incomplete")])
def test_exit_code_that_no_record_explains_is_a_gap(tmp_path: Path, exit_code: int, outcome: str) -> None:
    summary = run_of(tmp_path, case("rope"), exit_code=exit_code)
    assert summary.outcome == outcome
    assert any("exit code 3" in gap for gap in summary.gaps) == (exit_code == 3)


# Statuses of a cell.


@pytest.mark.parametrize(
    ("records", "status", "outcome"),
    [
        ([case("rope")], "passed", "passed"),
        ([case("rope", findings=[element()])], "failed", "failed"),
        ([case("rope", status="failed")], "failed", "failed"),
        ([case("rope", findings=[element()], status="passed")], "failed", "failed"),
        ([case("rope", status="")], "failed", "failed"),
        ([Record("skip", kernel="rope", stage="rope", lane="interpret", preset="tiny", reason="why")], "skipped", "nothing ran"),
        (
            [Record("error", kernel="rope", stage="rope", lane="interpret", preset="tiny", reason="why")],
            "could not run",
            "incomplete",
        ),
        # The blank fields of a record apply to everything planned that agrees in the others.
        ([Record("error", lane="interpret", reason="why")], "could not run", "incomplete"),
        ([Record("skip", kernel="rope", reason="why")], "skipped", "nothing ran"),
        ([Record("skip", kernel="mlp", lane="interpret", reason="why")], "nothing ran", "nothing ran"),
        ([case("rope"), Record("error", kernel="rope", lane="interpret", reason="why")], "could not run", "incomplete"),
        ([case("rope"), Record("skip", kernel="rope", lane="interpret", reason="why")], "passed", "passed"),
    ],
)
def test_status_of_a_cell(tmp_path: Path, records: list[Record], status: str, outcome: str) -> None:
    summary = run_of(tmp_path, *records, plan=(planned("rope", "interpret"),))
    assert cell(summary, "rope").status == status
    assert summary.outcome == outcome


@every_format
def test_why_something_was_skipped_or_could_not_run_is_shown(tmp_path: Path, name: str) -> None:
    summary = run_of(
        tmp_path,
        case("rope"),
        Record("skip", lane="device", reason="there is no NPU on this machine"),
        Record("error", kernel="mlp", stage="mlp", lane="interpret", reason="g++ was not found"),
        Record("error", reason="mine.py does not import"),
        plan=(planned("rope", "device"), planned("mlp", "interpret")),
    )
    shown = " ".join(RENDERERS[name](summary).replace("\\", "").split())
    for words in ("there is no NPU on this machine", "g++ was not found", "mine.py does not import", "skipped"):
        assert words in shown


def test_failed_and_stopped_cell_says_both(tmp_path: Path) -> None:
    write(tmp_path, [start(), case("rope", findings=[element()])])
    found = cell(summary_of(tmp_path), "rope")
    assert found.status == "failed"
    assert "did not end" in found.stopped_because[0]


# Merging.


def test_kernel_judged_by_two_processes_is_one_cell(tmp_path: Path) -> None:
    plan = [planned("rope", "interpret")]
    write(tmp_path, [start(plan), *(case("rope", seed=seed, share=0.1) for seed in range(3)), end()], "worker-0")
    write(tmp_path, [start(plan), *(case("rope", seed=seed, share=0.7) for seed in range(4)), end()], "worker-1")
    summary = summary_of(tmp_path)
    (merged,) = summary.cells
    assert (merged.status, merged.cases, merged.shares.worst, merged.shares.median) == ("passed", 7, 0.7, 0.7)
    assert [machine.processes for machine in summary.machines] == [("worker-0", "worker-1")]


def test_runs_of_two_machines_merge_and_a_fault_says_where(tmp_path: Path) -> None:
    write(tmp_path, [start([planned("rope", "interpret")], machine="here"), case("rope"), end()], "here")
    failing = [start([planned("rope", "device")], machine="there"), case("rope", "device", findings=[element()]), end(1)]
    write(tmp_path, failing, "there")
    summary = summary_of(tmp_path)
    assert [machine.label for machine in summary.machines] == ["here", "there"]
    assert [row.lane for row in summary.rows] == ["interpret", "device"]
    assert summary.problems[0].machines == ("there",)


def test_summary_does_not_depend_on_which_file_holds_what(tmp_path: Path) -> None:
    parts = [[case("rope", seed=seed, share=seed / 10, time=runs.START + seed)] for seed in range(4)]
    shown = []
    for number, order in enumerate(itertools.permutations(range(4))):
        folder = tmp_path / str(number)
        for process, part in zip(order, parts, strict=True):
            write(folder, [start(), *part, end()], f"p{process}")
        shown.append(summary_of(folder).rows)
    assert all(rows == shown[0] for rows in shown)


# Faults.


def test_one_fault_in_forty_cases_is_one_entry_with_the_worst_example(tmp_path: Path) -> None:
    plain = [case("rope", seed=seed) for seed in range(10)]
    wrong = [case("rope", seed=seed, findings=[element(share=1 + seed / 10, index=(1, seed))]) for seed in range(40)]
    also = Finding("spread", "rows", argument="out", share=9.0)
    wrong[7] = case("rope", seed=7, findings=[also, element(share=1.7, index=(1, 7))])
    summary = run_of(tmp_path, *plain, *wrong)
    (fault,) = summary.problems
    assert (fault.detector, fault.argument, fault.failed_cases, fault.cases) == ("element", "out", 40, 50)
    assert fault.example is not None
    assert fault.example.index == (1, 39)
    assert fault.also == (("spread", 1),)
    assert fault.replay == "conformance check rope kernels/qwen3/rope.py:rope --case rope:tiny:B=3:unit:39"
    for render in RENDERERS.values():
        shown = " ".join(render(summary).replace("\\", "").split())
        assert "40 of 50 cases" in shown.replace("<b>", "").replace("</b>", "")
        assert "--case rope:tiny:B=3:unit:39" in shown


def test_faults_differ_by_kernel_lane_detector_argument_and_kind_of_error(tmp_path: Path) -> None:
    def raised(message: str) -> list[Finding]:
        return [Finding("raised", message)]

    summary = run_of(
        tmp_path,
        case("rope", findings=[element()], preset="tiny"),
        case("rope", findings=[element()], preset="awkward"),  # the same fault
        case("rope", "eager", findings=[element()]),
        case("mlp", findings=[element()]),
        case("rope", findings=[Finding("bias", "leans", argument="out", share=2.0)]),
        case("rope", findings=[Finding("element", "k_out", argument="k_out", share=2.0)]),
        case("rope", findings=raised("FC4001: tile 16 x 100\nsee the log of process 77")),
        case("rope", findings=raised("FC4001: tile 16 x 36\nsee the log of process 78")),  # the same fault
        case("rope", findings=raised("ValueError: K differs")),
    )
    assert len(summary.problems) == 7
    assert sorted(fault.failed_cases for fault in summary.problems) == [1, 1, 1, 1, 1, 2, 2]


def test_faults_are_worst_first(tmp_path: Path) -> None:
    summary = run_of(
        tmp_path,
        case("a", findings=[Finding("bias", "leans", argument="out", share=50.0)]),
        case("b", findings=[element(share=1.1)]),
        case("c", findings=[element(share=math.nan)]),
        case("d", findings=[element(share=30.0)]),
        case("e", findings=[Finding("crashed", "signal 11")]),
        case("f", status="failed"),
    )
    assert [fault.kernel for fault in summary.problems] == ["e", "c", "d", "b", "a", "f"]


@pytest.mark.parametrize("name", ["my kernel", "a'b", 'a"b', "a;b", "$(b)", "中文"])
def test_replay_command_is_quoted_for_the_shell(tmp_path: Path, name: str) -> None:
    record = case(name, findings=[element()], stage="rope", source=f"my kernels/{name}.py", case=f"rope/tiny/{name}")
    (fault,) = run_of(tmp_path, record).problems
    assert fault.replay is not None
    words = ["conformance", "check", "rope", f"my kernels/{name}.py:{name}", "--case", f"rope/tiny/{name}"]
    assert shlex.split(fault.replay) == words


@pytest.mark.parametrize(
    ("lane", "option"), [("eager", ""), ("interpret", ""), ("compile_only", "--lane compile_only "), ("device", "--lane device ")]
)
def test_replay_command_names_a_lane_that_is_not_the_usual_one(tmp_path: Path, lane: str, option: str) -> None:
    (fault,) = run_of(tmp_path, case("rope", lane, findings=[element()])).problems
    assert fault.replay == f"conformance check rope kernels/qwen3/rope.py:rope {option}--case rope:tiny:B=3:unit:0"


@pytest.mark.parametrize(("lane", "option"), [("interpret", "--all-passes"), ("compile_only", "--lane compile_only")])
def test_replay_command_looks_at_the_compiled_graph_where_that_was_found(tmp_path: Path, lane: str, option: str) -> None:
    found = Finding("unwritten_read", "buffer is read", "out", count=3, total=10)
    (fault,) = run_of(tmp_path, case("rope", lane, findings=[found])).problems
    assert fault.replay is not None
    assert set(option.split()) < set(fault.replay.split())
    assert ("--all-passes" in fault.replay) == (lane == "interpret")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"profile": "ci"}, "--dims preset=tiny"),
        ({"dims": "L=8,B=3", "examples": 35, "seed": 7, "case": ""}, "--dims=L=8,B=3 --examples=35 --seed=7"),
        ({"dims": "", "examples": 35, "seed": 0, "case": ""}, "--examples=35 --seed=0"),
    ],
)
def test_replay_command_runs_the_whole_check_for_what_no_case_shows(tmp_path: Path, options: dict, expected: str) -> None:  # type: ignore[type-arg]
    found = Finding("pooled_signature", "the errors of 50 cases are together those of a kernel where v is truncated", share=1.4)
    pooled = case("rope", findings=[found], check="pooled", case="rope:tiny:B=3:unit:0")
    write(tmp_path, [start(options=options), pooled, end()])
    summary = summary_of(tmp_path)
    assert summary.problems[0].replay == f"conformance check rope kernels/qwen3/rope.py:rope {expected}"
    for render in RENDERERS.values():
        assert expected in html.unescape(render(summary))


def test_command_in_the_terminal_can_be_pasted_although_it_takes_two_lines(tmp_path: Path) -> None:
    summary = run_of(tmp_path, case("rope", findings=[element()], case="rope/tiny/" + "x" * 90))
    shown = terminal.render(summary)
    command = shown[shown.index("conformance check") :].split("\n\n")[0]
    assert "\n" in command.strip()
    # The shell itself says which words it reads.
    script = f"conformance() {{ printf '%s\\n' conformance \"$@\"; }}\n{command}"
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == shlex.split(str(summary.problems[0].replay))


def test_no_command_is_shown_where_the_record_cannot_give_one(tmp_path: Path) -> None:
    summary = run_of(tmp_path, case("a", findings=[element()], source=""), case("b", findings=[element()], case="line\nbreak"))
    assert [fault.replay for fault in summary.problems] == [None, None]
    for render in RENDERERS.values():
        assert "conformance check" not in render(summary)


# Shares.


def test_infinite_and_undefined_shares_are_the_worst(tmp_path: Path) -> None:
    summary = run_of(
        tmp_path,
        *(case("rope", share=share) for share in (0.1, 0.5, math.inf)),
        *(case("mlp", share=share) for share in (0.5, math.nan, 3.0)),
        *(case("o_proj", share=share) for share in (0.0, 1.0, -0.0)),
        case("rms_norm", share=None),
    )
    shares = {row.kernel: row.shares for row in summary.rows}
    assert shares["rope"].worst == math.inf
    assert math.isnan(shares["mlp"].worst or 0.0)
    assert shares["mlp"].median == 3.0
    assert (shares["rope"].histogram[-1], shares["mlp"].histogram[-1], shares["o_proj"].histogram[-1]) == (1, 2, 0)
    assert sum(shares["o_proj"].histogram) == 3
    assert shares["rms_norm"].worst is None
    for render in RENDERERS.values():
        assert render(summary)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0%"),
        (0.4271, "42%"),
        (0.9996, "99.9%"),  # not yet all of it
        (1.0, "100%"),
        (1.00004, "1.001x"),  # no longer allowed
        (3.21, "3.2x"),
        (250.4, "250x"),
        (229_000.0, "2e5x"),
        (math.inf, "inf"),
        (math.nan, "NaN"),
    ],
)
def test_share_never_rounds_across_what_is_allowed(value: float | None, shown: str) -> None:
    assert text.share(value) == shown


# Expected failures.


def expectation(status: str, kernel: str = "rope") -> Record:
    return Record("expected", kernel=kernel, stage=kernel, lane="interpret", status=status, reason="known since May")


def test_expected_failure_does_not_fail_the_run_and_is_told_apart(tmp_path: Path) -> None:
    records = [case("rope", findings=[element()]), case("rope", preset="awkward"), expectation("failed as expected")]
    summary = run_of(tmp_path, *records)
    assert summary.outcome == "passed"
    assert cell(summary, "rope").status == "failed as expected"
    assert cell(summary, "rope", preset="awkward").status == "passed"
    assert (len(summary.problems), len(summary.expected_problems)) == (0, 1)
    root = ElementTree.fromstring(junit.render(summary))
    assert (root.get("failures"), root.get("errors")) == ("0", "0")
    assert [skipped.get("type") for skipped in root.iter("skipped")] == ["failed as expected"]
    for render in RENDERERS.values():
        assert "known since May" in render(summary)


def test_expected_failure_covers_only_its_own_kernel_and_lane(tmp_path: Path) -> None:
    records = [case(name, lane, findings=[element()]) for name in ("rope", "mlp") for lane in ("interpret", "eager")]
    summary = run_of(tmp_path, *records, expectation("failed as expected"))
    assert {(cell.kernel, cell.lane) for cell in summary.cells if cell.status == "failed"} == {
        ("rope", "eager"),
        ("mlp", "interpret"),
        ("mlp", "eager"),
    }


def test_expected_failure_does_not_excuse_what_could_not_run(tmp_path: Path) -> None:
    stopped = Record("error", kernel="rope", stage="rope", lane="interpret", reason="the worker is gone")
    summary = run_of(tmp_path, case("rope", findings=[element()]), stopped, expectation("failed as expected"))
    assert cell(summary, "rope").status == "could not run"
    assert summary.outcome == "incomplete"


@every_format
def test_fixed_failure_is_announced(tmp_path: Path, name: str) -> None:
    summary = run_of(tmp_path, case("rope"), expectation("fixed"))
    assert cell(summary, "rope").fixed
    assert "no longer fails" in RENDERERS[name](summary)


def test_failure_said_to_be_fixed_that_still_happens_is_a_failure(tmp_path: Path) -> None:
    summary = run_of(tmp_path, case("rope", findings=[element()]), expectation("fixed"))
    assert summary.outcome == "failed"
    assert not cell(summary, "rope").fixed


# Text that is out to break a report.


class WellFormed(html.parser.HTMLParser):
    """Fails on a tag that is not closed where it must be, and collects what a browser would act on."""

    VOID = frozenset({"meta", "br", "wbr", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def parse_page(content: str) -> WellFormed:
    assert content.startswith("<!DOCTYPE html>")
    parser = WellFormed()
    parser.feed(content)
    parser.close()
    assert parser.open == []
    return parser


RUN_MAKERS = (runs.rich_run, runs.empty_run, runs.killed_run, runs.hostile_run)


@pytest.mark.parametrize("make", RUN_MAKERS)
def test_page_is_well_formed_and_needs_nothing_else(tmp_path: Path, make: object) -> None:
    assert callable(make)
    content = page.render(summary_of(make(tmp_path)))
    parsed = parse_page(content)
    assert (parsed.tags["script"], parsed.tags["style"]) == (1, 1)
    assert not {"img", "link", "iframe", "object", "form", "base"} & set(parsed.tags)
    for tag, name, value in parsed.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "srcset", "style"), (tag, name)
        if name == "href":
            assert value.startswith("#")
            assert value[1:] in parsed.ids
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "@import" not in content
    assert "url(" not in content


UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff\ufffe\uffff]")


@every_format
def test_hostile_text_leaves_no_control_character(tmp_path: Path, name: str) -> None:
    shown = RENDERERS[name](summary_of(runs.hostile_run(tmp_path)))
    assert UNPRINTABLE.search(shown) is None
    assert len(shown) < 100_000
    shown.encode("utf-8")


@pytest.mark.parametrize("make", [runs.rich_run, runs.hostile_run])
def test_lines_for_the_terminal_fit_unless_they_are_commands(tmp_path: Path, make: object) -> None:
    assert callable(make)
    for width in (80, 120):
        lines = terminal.render(summary_of(make(tmp_path / str(width))), width).splitlines()
        assert [line for line in lines if len(line) > width and "conformance check" not in line and "--case" not in line] == []


def test_hostile_text_stays_text_in_markdown(tmp_path: Path) -> None:
    shown = markdown.render(summary_of(runs.hostile_run(tmp_path)))
    assert "<script" not in shown
    assert "<img" not in shown
    assert not re.search(r"(?<!\\)\]\(http", shown)
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) == 8  # two of each table's head, three kernels, and one of them on a card
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [9] * 5 + [6] * 3


# JUnit.

#: Attributes and children of each element, after the schema of Jenkins's xUnit plugin.
SCHEMA: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": ({"name", "tests", "failures", "errors"}, {"time", "skipped", "timestamp", "hostname"}, {"testcase"}),
    "testcase": ({"name"}, {"classname", "time"}, {"failure", "error", "skipped", "system-out"}),
    "failure": (set(), {"type", "message"}, set()),
    "error": (set(), {"type", "message"}, set()),
    "skipped": (set(), {"type", "message"}, set()),
    "system-out": (set(), set(), set()),
}


@pytest.mark.parametrize("make", RUN_MAKERS)
def test_junit_keeps_to_the_schema_and_its_counts_add_up(tmp_path: Path, make: object) -> None:
    assert callable(make)
    root = ElementTree.fromstring(junit.render(summary_of(make(tmp_path))))
    for parent in root.iter():
        required, optional, children = SCHEMA[parent.tag]
        assert required <= set(parent.keys()) <= required | optional
        assert {child.tag for child in parent} <= children
        if "time" in parent.keys():  # noqa: SIM118  an Element is not a mapping
            assert re.fullmatch(r"\d+\.\d{3}", parent.get("time", ""))
    for suite in root:
        assert int(suite.get("tests", "")) == len(suite)
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(attribute, "")) == len(suite.findall(f"testcase/{tag}"))
        for test in suite:
            assert sum(child.tag != "system-out" for child in test) <= 1
    for name in ("tests", "failures", "errors"):
        assert int(root.get(name, "")) == sum(int(suite.get(name, "")) for suite in root)


def test_junit_tells_every_status_apart(tmp_path: Path) -> None:
    summary = summary_of(runs.rich_run(tmp_path))
    root = ElementTree.fromstring(junit.render(summary))
    counts = summary.totals.cells
    lanes = [suite for suite in root if suite.get("name") != junit.RUN_SUITE]
    assert [suite.get("name") for suite in lanes] == list(runs.LANES)
    assert sum(len(suite) for suite in lanes) == len(summary.cells)
    assert len(root.findall(".//failure")) == counts["failed"] > 0
    assert len(root.findall(".//skipped")) == counts["skipped"] + counts["failed as expected"] > 0
    not_run = counts["could not run"] + counts["cut short"] + counts["nothing ran"]
    assert sum(len(suite.findall("testcase/error")) for suite in lanes) == not_run > 0
    # The file that does not import, and the process that did not end.
    assert len(root.findall(f"testsuite[@name='{junit.RUN_SUITE}']/testcase/error")) == 2


# Cards and compilers.


def on_card(kernel: str, card: int, milliseconds: float, compiles: int = 0, **fields: Any) -> Record:
    details = {"card": card, "compiles": compiles, "device_seconds": milliseconds / 1000}
    return case(kernel, "device", details=details, **fields)


def test_a_night_on_cards_is_told_in_every_format(tmp_path: Path) -> None:
    lost = "the card reported error 507018: (AICPU)"
    moved = {"card": 1, "compiles": 1, "device_seconds": 0.00075, "given_up": {"0": lost}}
    summary = run_of(
        tmp_path,
        on_card("rope", 1, 2.0, 1),
        on_card("mlp", 0, 0.25, 1),
        # The same dimensions once more, in another process; other lengths are no other dimensions.
        case("mlp", "device", details=moved, case="mlp:tiny:B=3,seq_lens=1+2+3:unit:1"),
        on_card("mlp", 1, 0.5, case="mlp:tiny:B=3:unit:2"),
        on_card("mlp", 1, 9.0, 1, case="mlp:tiny:B=3,rows=2+0:unit:2"),
        case("mlp", "device", details={"card": 1, "launches": 20}, check="repeat"),
        on_card("rope", 1, 70.0, case="rope:qwen3_14b:B=16,seq_lens=1+2:normal:1", preset="qwen3_14b"),
        on_card("rope", 1, 30.0, case="rope:qwen3_14b:B=3,seq_lens=1+2:normal:1", preset="qwen3_14b"),
        case("rms_norm"),
    )
    cards = summary.cards
    assert cards is not None
    assert (cards.used, cards.given_up) == ((("card 0", 1), ("card 1", 26)), (("card 0", lost),))
    assert (cards.compiles, cards.builds) == (4, 3)
    mlp, full, small, rope = cards.times
    # What a step takes is told by its sizes, where it matters.
    assert [(one.place, one.median) for one in (full, small)] == [("qwen3_14b B=16", 0.07), ("qwen3_14b B=3", 0.03)]
    assert (mlp.kernel, mlp.preset, mlp.launches, mlp.worst) == ("mlp", "tiny", 24, 0.009)
    assert mlp.median == pytest.approx(0.000625)
    assert (rope.kernel, rope.launches, rope.median, rope.worst) == ("rope", 1, 0.002, 0.002)
    for name, render in RENDERERS.items():
        told = re.sub(r"<[^>]*>|\\|\s+", " ", html.unescape(render(summary)) if name == "html" else render(summary))
        for words in (
            ("median 625 us, worst 9.00 ms",)
            if name == "junit"
            else ("4 compiles for 3 pairs", "625 us", "9.00 ms", "card 1: 26 launches", "card 0 is used no more")
        ):
            assert words in told, (name, words)


def test_a_run_that_used_no_card_says_nothing_of_cards(tmp_path: Path) -> None:
    summary = run_of(tmp_path, case("rms_norm", "device"), case("rms_norm"))
    assert summary.cards is None
    assert not any("n card" in render(summary) for render in RENDERERS.values())


def test_cards_of_several_machines_are_told_apart(tmp_path: Path) -> None:
    for number, machine in enumerate(("here", "there")):
        write(tmp_path, [start(machine=machine), on_card("mlp", 0, 1.0, time=runs.START + number), end()], machine)
    cards = summary_of(tmp_path).cards
    assert cards is not None
    assert cards.used == (("here card 0", 1), ("there card 0", 1))


@every_format
def test_host_compile_and_device_compile_are_two_verdicts(tmp_path: Path, name: str) -> None:
    refused = Finding("raised", "tile (16, 100) is not aligned to 16")
    host = case("mlp", "compile_only", check="compile", share=None, details={"compile": "host compile"})
    device = case("mlp", "compile_only", check="compile", share=None, findings=[refused], details={"compile": "device compile"})
    write(tmp_path, [start(machine="laptop"), host, end()], "laptop")
    summary = summary_of(write(tmp_path, [start(machine="with-cann"), device, end(1)], "with-cann"))
    told = " ".join(RENDERERS[name](summary).split())
    assert "device compile failed" in told
    assert "host compile" in told
    assert "host compile failed" not in told


# Sizes, and the files.


def test_ten_thousand_cases_take_seconds_and_less_than_a_megabyte(tmp_path: Path) -> None:
    folder = runs.large_run(tmp_path, cases=10_000)
    began = time.perf_counter()
    built = reports.build(folder)
    assert time.perf_counter() - began < 15  # 1.1 s on an idle 2-core machine
    path = built["html"]
    assert isinstance(path, Path)
    assert path.stat().st_size < 1_000_000
    assert summary_of(folder).totals.cases == 10_000


def test_page_of_very_many_kernels_shows_those_that_fail_and_counts_the_rest(tmp_path: Path) -> None:
    names = [f"kernel_{number}" for number in range(2000)]
    records = [case(name, findings=[element()] if name == "kernel_1999" else [], seed=1) for name in names]
    summary = run_of(tmp_path, *records, plan=tuple(planned(name, lane) for name in names for lane in ("interpret", "device")))
    content = page.render(summary)
    assert len(content.encode()) < 1_500_000
    assert "kernel_<wbr>1999" in content
    hidden = re.search(r"([\d,]+) more kernels", content)
    assert hidden is not None
    assert int(hidden[1].replace(",", "")) + content.count('<tr><th scope="row">') == 2000
    for render in (terminal.render, markdown.render):
        assert len(render(summary).encode()) < 200_000


def test_build_writes_what_was_asked_for_and_can_be_repeated(tmp_path: Path) -> None:
    runs.rich_run(tmp_path)
    before = set(tmp_path.iterdir())
    built = reports.build(tmp_path, formats=("markdown", "terminal"))
    assert set(tmp_path.iterdir()) - before == {tmp_path / "summary.md"}
    assert built["markdown"] == tmp_path / "summary.md"
    assert isinstance(built["terminal"], str)
    assert reports.build(tmp_path, formats=("terminal",))["terminal"] == built["terminal"]
    assert set(reports.build(tmp_path)) == {"terminal", "markdown", "junit", "html"}


def test_build_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown report format 'pdf'; known are terminal, markdown, junit, html"):
        reports.build(runs.empty_run(tmp_path / "run"), formats=("pdf",))
    with pytest.raises(UsageError, match="no run in"):
        reports.build(tmp_path / "nothing")


def test_colour_adds_nothing_but_colour(tmp_path: Path) -> None:
    summary = summary_of(runs.rich_run(tmp_path))
    plain, coloured = terminal.render(summary), terminal.render(summary, colour=True)
    assert "\x1b[" in coloured
    stripped = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in stripped.splitlines()] == plain.splitlines()
