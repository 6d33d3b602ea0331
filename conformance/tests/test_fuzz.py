"""Whatever parses is given anything: one line and an exit code, or a result that can be used; never a traceback or a hang.

The samples of every run are small and always the same; at night (``slow``) they are many and new ones each time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conformance import cli, fixtures, reports
from conformance.cases.case import make_case
from conformance.cases.key import CaseKey
from conformance.cli import main
from conformance.errors import UsageError
from conformance.judge.verdict import DETECTORS
from conformance.kernels.qwen3.generation.checkpoint import CONFIG, INDEX, SINGLE_FILE, Checkpoint
from conformance.kernels.qwen3.generation.command import main as generate
from conformance.lanes.messages import decode_answer
from conformance.running.session import ExpectedFailures

#: Characters that a terminal would obey, that XML forbids, or that no encoding has.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

SIZES = [pytest.param(False, id="sample"), pytest.param(True, id="many", marks=pytest.mark.slow)]


def holds(many: bool, sample: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None], *given_too: Any) -> None:
    """``check`` holds for what the strategy draws: ``sample`` examples that are always the same, or at night many new ones."""
    tried = given(strategy)(check)
    for one in given_too:
        tried = example(one)(tried)
    settings(
        max_examples=1000 if many else sample,
        derandomize=not many,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(tried)()


ANY_TEXT = st.text(st.characters(), max_size=40)
NUMBERS = st.sampled_from(
    ["1", "2", "3", "0", "-1", "17", "1e3", "nan", "inf", "-inf", "", "0x10", "1_0", "²", "9" * 20, "9" * 400, "9" * 5000]
)
PATHS = st.sampled_from(
    [
        "nowhere",
        "mine.py",
        "known.txt",
        "pipe",
        "/dev/zero",
        "/dev/null",
        "a\0b",
        "x" * 300,
        "x/" * 5000,
        "\udc80",
        ".",
        "",
        "run",
    ]
)
NAMES = st.sampled_from(
    ["rms_norm", "qwen3/rms_norm", "tiny", "eager", "auto", "device", "\x1b[31m", "mine.py:plain", "x" * 10_000]
)
VALUES = NUMBERS | PATHS | NAMES | ANY_TEXT
SIZES_OF = st.tuples(st.sampled_from(["B", "H", "S", "L", "NB", "T", "preset", "Q"]), NUMBERS | NUMBERS | VALUES)
DIMS = st.lists(SIZES_OF, max_size=3).map(lambda items: ",".join(f"{name}={value}" for name, value in items))
KEYS = st.tuples(NAMES, st.just("tiny"), DIMS, st.sampled_from(["normal", "small", "", "x"]), NUMBERS).map(":".join)


def an_option(name: str, values: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    return values.map(lambda value: [f"{name}={value}"])


def command_line(words: list[st.SearchStrategy[str]], options: dict[str, st.SearchStrategy[str]]) -> st.SearchStrategy[list[str]]:
    """Positional arguments, and any of the options; that which takes long is taken short."""
    one = st.one_of([an_option(name, values) for name, values in options.items()] + [ANY_TEXT.map(lambda text: [text])])
    return st.tuples(st.tuples(*words), st.lists(one, max_size=3)).map(
        lambda parts: [*parts[0], *(word for option in parts[1] for word in option)]
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a list of expected failures and a pipe that nobody writes to."""
    (tmp_path / "mine.py").write_text(
        "import conformance\ndef plain(x, weight, out): ...\nkernel = conformance.kernel('rms_norm', name='kernel')(plain)\n"
    )
    (tmp_path / "known.txt").write_text("plain known\n")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers(command: Any, words: list[str]) -> None:
    """A command ends by itself: with help or a result, or with one line and no traceback."""
    done = CliRunner().invoke(command, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
    assert done.exit_code in (0, 1, 2, 3, 4), (words, done.output)
    assert "Traceback" not in done.output
    assert "this should not have happened" not in done.output, (words, done.stderr)
    assert not FORBIDDEN.search(done.output), (words, done.output)
    if words and done.exit_code == 2 and not done.stdout:
        assert len(done.stderr.strip().splitlines()) == 1, (words, done.stderr)


def mostly(right: str, others: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """What is right in three of four, so that what comes after it is read too."""
    return st.integers(0, 3).flatmap(lambda number: st.just(right) if number else others)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """What is done here may be refused, and in no other way; the commands make one line of what is said."""
    with contextlib.suppress(UsageError):
        yield


COMMANDS: dict[str, tuple[Any, st.SearchStrategy[list[str]]]] = {
    "list": (main, command_line([st.just("list")], {"--kernels": PATHS})),
    "check": (
        main,
        command_line(
            [st.just("check"), mostly("rms_norm", NAMES | ANY_TEXT), mostly("mine.py:plain", PATHS | NAMES)],
            {
                "--dims": DIMS | VALUES,
                "--examples": NUMBERS,
                "--seed": NUMBERS,
                "--lane": VALUES,
                "--timeout": NUMBERS,
                "--out": PATHS,
                "--expected-failures": PATHS,
                "--case": KEYS | VALUES,
            },
        ),
    ),
    "diff": (
        main,
        command_line(
            [st.just("diff"), mostly("mine.py:kernel", PATHS | NAMES), mostly("rms_norm", PATHS)],
            {
                "--dims": DIMS | VALUES,
                "--examples": NUMBERS,
                "--seed": NUMBERS,
                "--lane": VALUES,
                "--timeout": NUMBERS,
                "--device": NUMBERS | VALUES,
                "--device-wait": NUMBERS,
            },
        ),
    ),
    "exam": (
        main,
        command_line([st.just("exam")], {"--lane": VALUES, "--seed": NUMBERS, "--processes": NUMBERS, "--out": PATHS}).map(
            lambda words: [*words, "--stage=none"]
        ),
    ),
    "report": (main, command_line([st.just("report"), PATHS | ANY_TEXT], {"--help": VALUES})),
    "anything": (main, st.lists(VALUES, max_size=4)),
    "generate": (
        generate,
        command_line(
            [st.just("--random=1"), mostly("--prompt=1,2", NUMBERS.map("--prompt={}".format)), st.just("--new=1")],
            {
                "--checkpoint": PATHS,
                "--random": NUMBERS,
                "--dims": DIMS | VALUES,
                "--prompt": VALUES,
                "--new": NUMBERS,
                "--batch": NUMBERS,
                "--context": NUMBERS,
                "--device": NUMBERS | VALUES,
                "--page-size": NUMBERS,
                "--pages": NUMBERS,
                "--chunk": NUMBERS,
                "--timeout": NUMBERS,
                "--kernels": PATHS,
                "--json": PATHS,
            },
        ).map(lambda words: [*words, "--executor=none"]),
    ),
}


@pytest.mark.parametrize("many", SIZES)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_answers_any_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, many: bool) -> None:
    # What the arguments say is all that is looked at: nothing is judged.
    monkeypatch.setattr(cli, "_judge", lambda *arguments: None)
    monkeypatch.setattr(cli, "_summary_of", lambda *arguments: {})
    command, words = COMMANDS[name]
    holds(many, 25, words, lambda drawn: answers(command, drawn))


@pytest.mark.parametrize("many", SIZES)
def test_a_case_key_is_refused_or_the_same_again(many: bool) -> None:
    def check(text: str) -> None:
        with refused():
            key = CaseKey.parse(text)
            assert CaseKey.parse(str(key)) == key
            make_case(key)

    lengths = st.lists(st.integers(0, 10**20), max_size=4).map(lambda values: "seq_lens=" + "+".join(map(str, values)))
    keys = st.tuples(
        st.sampled_from(["rms_norm", "rope", "prefill_fwd", "nothing"]),
        st.sampled_from(["tiny", "awkward", "qwen3_14b"]),
        st.lists(DIMS | lengths, max_size=2).map(",".join),
        st.sampled_from(["normal", "needle", "long"]),
        NUMBERS,
    ).map(":".join)
    holds(
        many,
        60,
        keys | KEYS | ANY_TEXT,
        check,
        "rms_norm:tiny:B=2147483647:normal:0",
        "rope:tiny:B=1,seq_lens=1:normal:" + "9" * 5000,
    )


# Records.

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, 2**63, -(10**30), 1e308, float("nan"), float("inf"), -1e308])
    | st.floats()
    | ANY_TEXT
    | st.sampled_from(["nan", "inf", "-inf", "\x1b[31mred", "\ud800", "passed", "rms_norm", "tiny:B=3", "x" * 3000])
)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3), max_leaves=8
)
FINDINGS = st.fixed_dictionaries(
    {"detector": st.sampled_from([*DETECTORS, "unheard_of"])},
    optional=dict.fromkeys(("message", "argument", "index", "where", "share", "ulps", "count", "total"), TREES)
    | {"index": st.lists(st.integers(0, 2**63), max_size=3), "where": st.dictionaries(ANY_TEXT, st.integers(0, 9), max_size=2)},
)
PLANS = st.lists(
    st.dictionaries(
        st.sampled_from(["kernel", "stage", "lane", "preset", "capabilities", "capacity"]), LEAVES | TREES, max_size=5
    )
    | TREES,
    max_size=3,
)
DETAILS = st.fixed_dictionaries(
    {}, optional={"plan": PLANS, "machine": TREES, "options": TREES, "exit_code": LEAVES, "versions": TREES}
)
FIELDS = ("kernel", "stage", "lane", "toolchain", "preset", "source", "check", "case", "status", "share", "profile", "seconds")
RECORDS = st.fixed_dictionaries(
    {
        "schema": st.sampled_from([1, 1, 1, 1, 1, 2, True, 1.0, "1"]),
        "event": st.sampled_from(["start", "case", "skip", "error", "expected", "end"]),
    },
    optional=dict.fromkeys((*FIELDS, "peak_memory", "reason", "time", "process"), LEAVES)
    | {"findings": st.lists(FINDINGS | TREES, max_size=2), "details": DETAILS | TREES},
)


def as_line(record: Any) -> bytes:
    return json.dumps(record).encode()


LINES = st.lists(RECORDS.map(as_line) | TREES.map(as_line) | st.binary(max_size=60), min_size=1, max_size=8).map(b"\n".join)

GOOD = (
    b'{"schema": 1, "event": "start", "details": {"plan": [{"kernel": "k", "stage": "rms_norm", "lane": "eager"}]}}\n'
    b'{"schema": 1, "event": "case", "kernel": "k", "stage": "rms_norm", "lane": "eager", "status": "passed"}\n'
)


@pytest.mark.parametrize("many", SIZES)
def test_reports_and_comparisons_take_any_records(tmp_path: Path, many: bool) -> None:
    def check(lines: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as name:
            run = Path(name)
            (run / "records-main.jsonl").write_bytes(GOOD + lines)
            built = reports.build(run)
            for path in (built["html"], built["markdown"], built["junit"]):
                assert isinstance(path, Path)
                assert not FORBIDDEN.search(path.read_text(encoding="utf-8"))
            assert not FORBIDDEN.search(str(built["terminal"]))
            ElementTree.parse(str(built["junit"]))
            answers(main, ["report", name])
            answers(main, ["diff", name, name])

    deep = b'{"schema": 1, "event": "start", "details": ' + b'{"a": ' * 400 + b"1" + b"}" * 400 + b"}"
    holds(many, 30, LINES, check, deep, b"[" * 100_000, b"9" * 10_000)


# Files that a person writes or is given.


@pytest.mark.parametrize("many", SIZES)
def test_a_list_of_expected_failures_is_read_or_refused(tmp_path: Path, many: bool) -> None:
    def check(content: bytes) -> None:
        path = tmp_path / "known.txt"
        path.write_bytes(content)
        with refused():
            ExpectedFailures.read(path).require_known([])

    lines = st.lists(st.tuples(VALUES, ANY_TEXT).map(" ".join), max_size=4).map("\n".join)
    holds(many, 60, lines.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=80), check)


MANIFESTS = st.fixed_dictionaries(
    {"format": st.just(1) | LEAVES},
    optional={
        "versions": st.just({}) | TREES,
        "fixtures": st.dictionaries(
            st.just("one") | ANY_TEXT,
            st.fixed_dictionaries(
                {"case": KEYS | LEAVES, "size": st.just(0) | LEAVES, "sha256": LEAVES, "inputs": st.just({}) | TREES}
            )
            | TREES,
            max_size=2,
        )
        | TREES,
    },
)


@pytest.mark.parametrize("many", SIZES)
def test_a_manifest_of_fixtures_is_read_or_refused(tmp_path: Path, many: bool) -> None:
    (tmp_path / "one.safetensors").write_bytes(b"")

    def check(content: bytes) -> None:
        (tmp_path / "manifest.json").write_bytes(content)
        with refused():
            for name in fixtures.names(folder=tmp_path):
                fixtures.load(name, folder=tmp_path)

    holds(many, 60, MANIFESTS.map(as_line) | TREES.map(as_line) | st.binary(max_size=60), check, b"[" * 100_000)


CONFIGURATION = {
    "model_type": "qwen3",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "max_position_embeddings": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
OTHER_FIELDS = ("rope_scaling", "rope_parameters", "layer_types", "attention_bias", "hidden_act", "tie_word_embeddings")
CONFIGURATIONS = st.dictionaries(st.sampled_from([*CONFIGURATION, *OTHER_FIELDS]), LEAVES | TREES, max_size=2).map(
    lambda changes: CONFIGURATION | changes
)


def safetensors_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    content = as_line(header) if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(content) if length is None else length) + content + data


HEADERS = (
    st.dictionaries(
        st.sampled_from(["model.norm.weight", "__metadata__", "lm_head.weight"]) | ANY_TEXT,
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["BF16", "F32", "F8_E4M3", "U64", "X"]),
                "shape": st.lists(st.integers(-1, 2**64), max_size=3),
            }
            | {"data_offsets": st.lists(st.integers(-1, 40), max_size=3)}
        )
        | TREES,
        max_size=3,
    )
    | TREES
)
WEIGHTS = st.one_of(
    st.binary(max_size=60),
    st.tuples(HEADERS, st.binary(max_size=40)).map(lambda parts: safetensors_file(*parts)),
    st.tuples(HEADERS, st.integers(0, 2**64 - 1)).map(lambda parts: safetensors_file(parts[0], length=parts[1])),
)
INDEXES = st.fixed_dictionaries(
    {
        "weight_map": st.dictionaries(
            ANY_TEXT, st.sampled_from(["a.safetensors", "../a", "\0", "x" * 300, "pipe"]) | LEAVES, max_size=3
        )
        | TREES
    }
)


@pytest.mark.parametrize("many", SIZES)
def test_a_checkpoint_is_opened_or_refused(tmp_path: Path, many: bool) -> None:
    os.mkfifo(tmp_path / "pipe")

    def check(drawn: tuple[bytes, bytes, bool]) -> None:
        config, weights, sharded = drawn
        (tmp_path / CONFIG).write_bytes(config)
        for name in (SINGLE_FILE, INDEX):
            (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / "a.safetensors").write_bytes(weights)
        (tmp_path / (INDEX if sharded else SINGLE_FILE)).write_bytes(weights)
        with refused():
            Checkpoint.open(tmp_path)

    configs = CONFIGURATIONS.map(as_line) | TREES.map(as_line) | st.binary(max_size=40)
    plain_config = st.just(as_line(CONFIGURATION))
    drawn = st.tuples(configs, WEIGHTS, st.just(False)) | st.tuples(plain_config, WEIGHTS | INDEXES.map(as_line), st.booleans())
    holds(many, 60, drawn, check, (b"[" * 100_000, b"", False), (as_line(CONFIGURATION), b'{"weight_map": {"a": "pipe"}}', True))


# What a worker answers; a kernel may have written it.

ANSWERS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=9) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "status", "message", "kernels", "reasons"]) | st.text(max_size=9), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("many", SIZES)
def test_an_answer_of_a_worker_is_read_or_refused(many: bool) -> None:
    def check(content: bytes) -> None:
        with contextlib.suppress(msgspec.DecodeError):
            decode_answer(content)

    deep, endless, no_text = b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\x81\xa4type\xa4\xff\xff\xff\xff"
    holds(many, 60, st.binary(max_size=80) | ANSWERS.map(msgspec.msgpack.encode), check, deep, endless, no_text)
