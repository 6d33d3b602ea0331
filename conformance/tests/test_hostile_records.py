"""Full disks, folders that others use or remove, and records that others wrote: nothing is lost, mixed up or believed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from conformance import reports
from conformance.cli import main
from conformance.errors import UsageError
from conformance.judge.verdict import Finding, Verdict
from conformance.lanes.base import Outcome
from conformance.outside import one_line, plain, read_text
from conformance.running import check, records
from conformance.running.records import Record, RecordWriter, read_run
from conformance.running.runs import Judged
from conformance.running.session import ClaimedFolder
from conformance.tests.synthetic_runs import case, end, start, write

KERNEL = """
import conformance

@conformance.kernel("rms_norm")
def mine(x, weight, out):
    out.copy_(x)
"""


class Disk:
    """A disk that is full for some of the records."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 10**9
        monkeypatch.setattr(records, "os", SimpleNamespace(**{**vars(os), "write": self.write}))

    def write(self, descriptor: int, content: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(descriptor, content[: self.room])
        self.room -= written
        return written


def test_records_that_a_full_disk_refused_are_written_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    writer = RecordWriter(tmp_path)
    disk.room = 40  # in the middle of a line
    for number in range(3):
        writer.write(Record("case", kernel=f"k{number}"))
    assert writer.failure == "No space left on device"
    disk.room = 10**9
    writer.write(Record("end"))
    writer.close()
    assert writer.failure == ""
    log = read_run(tmp_path)
    assert ([record.kernel for record in log.of("case")], log.unreadable) == (["k0", "k1", "k2"], ())


def judged(kernel: Any, keys: Any, *others: Any) -> Iterator[Judged]:
    """Made-up runs, so that no process is started."""
    for key in keys:
        yield Judged("example", key, Verdict((Finding("element", "is wrong \x1b[31m\udc80"),)), Outcome("ok"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(KERNEL)
    monkeypatch.setattr(check, "case_runs", judged)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CHECK = ("check", "rms_norm", "mine.py:mine", "--examples", "3", "--out", "kept")


def test_a_check_that_cannot_be_kept_prints_its_verdict_and_ends_with_3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch).room = 0
    done = CliRunner().invoke(main, CHECK)
    assert done.exit_code == 3
    assert "mine (rms_norm, eager): FAILED 3 of 3 runs" in done.stdout
    assert "is wrong \ufffd[31m\ufffd" in done.stdout
    assert "conformance: cannot keep all records in kept: No space left on device" in done.stderr


def test_a_report_that_cannot_be_written_leaves_the_others(folder: Path) -> None:
    (folder / "kept" / "report.html").mkdir(parents=True)
    done = CliRunner().invoke(main, CHECK)
    assert done.exit_code == 3
    assert "kept in kept: summary.md, junit.xml" in done.stdout
    assert done.stderr.splitlines()[-1] == "conformance: cannot write kept/report.html: Is a directory"
    assert "summary.md" in (again := CliRunner().invoke(main, ["report", "kept"])).stdout
    assert again.exit_code == 3


def test_what_goes_wrong_in_between_leaves_the_verdict_so_far(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Iterator[Judged]:
        yield from judged(*arguments)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(check, "case_runs", broken)
    done = CliRunner().invoke(main, CHECK)
    assert done.exit_code == 3
    assert done.stdout.startswith("not judged to the end: 3 of 3 cases were judged\nmine (rms_norm, eager): FAILED 3 of 3")
    assert done.stderr.splitlines()[-1] == "conformance: cannot use a file: Too many open files"


def test_a_run_whose_folder_is_removed_meanwhile_is_kept_again(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "run")
    writer.write(Record("case", kernel="k"))
    writer.path.unlink()
    writer.path.parent.rmdir()
    writer.write(Record("end"))
    writer.close()
    assert [record.event for record in read_run(tmp_path / "run").records] == ["case", "end"]


def test_nothing_is_written_over_another_run_that_took_the_folder(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    writer.write(Record("case", kernel="mine"))
    writer.path.unlink()
    write(tmp_path, [case("theirs")])
    writer.close()
    assert writer.taken
    assert [record.kernel for record in read_run(tmp_path).records] == ["theirs"]


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    with ClaimedFolder(tmp_path / "run"):
        with pytest.raises(UsageError, match="belongs to a run that is not over"):
            ClaimedFolder(tmp_path / "run")
        write(tmp_path / "run", [start(), end()])
    with pytest.raises(UsageError, match="already holds a run"):
        ClaimedFolder(tmp_path / "run")
    with ClaimedFolder(tmp_path / "unused"):
        pass
    assert not (tmp_path / "unused").exists()


# What others wrote.

CASE = {"schema": 1, "event": "case", "kernel": "k", "stage": "rms_norm", "lane": "eager", "status": "passed"}
FINDING = {"detector": "element", "message": "is wrong"}
START = {"schema": 1, "event": "start"}


@pytest.mark.parametrize(
    "line",
    [
        CASE | {"kernel": 3},
        CASE | {"reason": ["x"]},
        CASE | {"share": True},
        CASE | {"share": 10**400},
        CASE | {"share": "-inf"},
        CASE | {"seconds": "inf"},
        CASE | {"seconds": -1},
        CASE | {"time": 1e300},
        CASE | {"peak_memory": 2**64},
        CASE | {"peak_memory": 0.5},
        CASE | {"findings": {}},
        CASE | {"findings": [FINDING | {"index": ["a"]}]},
        CASE | {"findings": [FINDING | {"index": 7}]},
        CASE | {"findings": [FINDING | {"where": {"row": "3"}}]},
        CASE | {"findings": [FINDING | {"count": -1}]},
        CASE | {"findings": [{"message": "without a detector"}]},
        CASE | {"schema": True},
        CASE | {"schema": 2},
        CASE | {"event": ""},
        START | {"details": []},
        START | {"details": {"plan": {}}},
        START | {"details": {"plan": ["k"]}},
        START | {"details": {"plan": [{"kernel": 3}]}},
        START | {"details": {"plan": [{"kernel": "k", "capabilities": "variable_batch"}]}},
        START | {"details": {"plan": [{"kernel": "k", "capacity": "many"}]}},
        START | {"details": {"options": 3}},
        START | {"details": {"machine": [[[[[[[[[]]]]]]]]]}},
        {"schema": 1, "event": "end", "details": {"exit_code": "0"}},
    ],
    ids=lambda line: json.dumps(line)[-50:],
)
def test_a_record_of_other_types_is_no_record(line: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        Record.from_json(json.dumps(line))


def test_what_is_written_is_read_again() -> None:
    found = Finding("element", "wrong", "out", (1, 2), {"row": 1}, float("inf"), float("nan"), 3, 4)
    record = case("k", findings=[found], share=float("inf"))
    again = Record.from_json(record.to_json())
    assert repr(again) == repr(record)  # NaN equals nothing, itself neither


def test_a_comparison_says_how_many_lines_it_could_not_read(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write(tmp_path / name, [start(), case("k"), end()])
    with (tmp_path / "new" / "records-main.jsonl").open("a") as file:
        file.write("[]\n{}\n")
    done = CliRunner().invoke(main, ["diff", str(tmp_path / "old"), str(tmp_path / "new")])
    assert done.exit_code == 3, done.output
    assert "NEW could not run: 2 lines of its log cannot be read; the first is records-main.jsonl:4: " in done.stdout


def test_what_is_no_file_of_records_is_named_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 1000)
    write(tmp_path, [start(), case("k"), end()])
    os.mkfifo(tmp_path / "records-pipe.jsonl")
    (tmp_path / "records-zero.jsonl").symlink_to("/dev/zero")
    with (tmp_path / "records-main.jsonl").open("a") as file:
        file.write("x" * 5000 + "\n" + case("last").to_json() + "\n")
    log = read_run(tmp_path)
    assert [record.kernel for record in log.of("case")] == ["k", "last"]
    assert [line.partition(": ")[0] for line in log.unreadable] == [
        "records-main.jsonl:4",
        "records-pipe.jsonl",
        "records-zero.jsonl",
    ]


def test_nothing_that_a_terminal_obeys_comes_out_of_a_record(tmp_path: Path) -> None:
    evil = "\x1b]0;mine\x07\x1b[2Jname\x9b31m\udc80"
    found = Finding("element", evil, evil)
    write(
        tmp_path, [start(), case(evil, evil, evil, findings=[found], check=evil, source=evil), Record("skip", reason=evil), end()]
    )
    built = reports.build(tmp_path)
    texts = [str(built.pop("terminal")), *(Path(path).read_text() for path in built.values())]
    texts.append(CliRunner().invoke(main, ["diff", str(tmp_path), str(tmp_path)]).stdout)
    for text in texts:
        assert "name" in text
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\udc80"}


def test_texts_are_made_plain() -> None:
    assert plain("a\x1b[31mb\r\nc\td\ud800\u202e") == "a\ufffd[31mb\nc\td\ufffd\ufffd"
    assert one_line(" a\n\n b\x00 ") == "a b\ufffd"
    assert plain("x" * 1500, 10) == "xxxxxxxxxx ... (1,490 more characters)"


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "folder", "long", "a\0b", "n" * 300, "nowhere"])
def test_a_list_that_is_no_small_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "long").write_text("x" * 101)
    with pytest.raises(UsageError) as caught:
        read_text(tmp_path / name, "the list", 100)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_changes_no_exit_code(closed: str) -> None:
    command = f"{sys.executable} -m conformance.cli --version {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_pytest_runs_without_standard_streams(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    command = f"{sys.executable} -m pytest -q -p no:cacheprovider test_it.py >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=60, check=False).returncode == 0


def test_a_full_disk_behind_standard_output_is_said() -> None:
    command = f"{sys.executable} -m conformance.cli --version > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr == "conformance: cannot use a file: No space left on device\n"
