"""A second model, as a user adds one: found by its entry point, judged, examined, listed and reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.running.records import read_run

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
import conformance
from click.testing import CliRunner
from conformance.cases.key import CaseKey
from conformance.cli import main
from conformance.contract.registry import preset_named
from conformance.errors import UsageError
from conformance.tests.second_model import kernels

def command(*words):
    done = CliRunner().invoke(main, list(words))
    return done.exit_code, done.output

def refused(function):
    try:
        function()
    except UsageError as error:
        return str(error)

def wrong(x, weight, bias, out):
    out.copy_(x)

found = {
    "stages": list(conformance.stages()),
    "right": [conformance.check(f"gelu/{one.name}", one, dims=dims, examples=10).ok
              for one in (kernels.layer_norm, kernels.mlp) for dims in ("tiny", "odd")],
    "wrong": conformance.check("layer_norm", wrong, examples=4).detectors,
    "keys": [str(run.case) for run in conformance.check("gelu/mlp", kernels.mlp, examples=1).runs],
    "dims": [repr(CaseKey.parse(key).dims) for key in ("gelu/mlp:tiny:N=3:normal:1", "qwen3/mlp:tiny:B=3:normal:1")],
    "ambiguous": [refused(lambda: conformance.check("mlp", kernels.mlp)), refused(lambda: preset_named("tiny"))],
    "list": command("list")[1],
    "bundled": command("check", "gelu/mlp", "--examples", "2", "--out", "bundled"),
    "exam": {name: command("exam", "--stage", name, "--processes", "1") for name in ("layer_norm", "gelu/mlp")},
}
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One in which a distribution that brings the second model is installed."""
    folder = tmp_path_factory.mktemp("site")
    information = folder / "gelu_model-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: gelu-model\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[conformance.models]\ngelu = conformance.tests.second_model.contract:MODEL\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_a_second_model_needs_nothing_of_the_harness(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "found.json"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    # Its own names are bare, those that both models have are not.
    assert {"layer_norm", "gelu/mlp", "qwen3/mlp", "rms_norm"} <= set(found["stages"])
    assert found["right"] == [True] * 4
    assert found["wrong"]
    assert all(key.startswith("gelu/mlp:tiny:N=") for key in found["keys"])
    assert "GeluDims(N=3, C=96" in found["dims"][0]
    assert "Qwen3Dims(B=3" in found["dims"][1]
    assert found["ambiguous"] == [
        "stage 'mlp' is ambiguous: gelu/mlp and qwen3/mlp; say which",
        "preset 'tiny' is ambiguous: gelu/tiny and qwen3/tiny; say which",
    ]
    assert "gelu/mlp: bf16(gelu(x @ w_in)) @ w_out" in found["list"]
    code, text = found["bundled"]
    assert code == 0, text
    assert (tmp_path / "bundled" / "report.html").exists()
    for code, text in found["exam"].values():
        assert code == 0, text


MIXED = """
import conformance

@conformance.kernel("gelu/layer_norm", name="norm")
def wrong(x, weight, bias, out):
    out.copy_(x)

@conformance.kernel("qwen3/rms_norm", name="norm")
def right(x, weight, out):
    wide = x.float()
    out.copy_(wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight)
"""


@pytest.mark.slow
def test_kernels_of_one_name_are_told_by_their_model(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MIXED)
    (tmp_path / "expected.txt").write_text("gelu/norm copies its input\n")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", *words]
        return subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    suites = ("pytest", "--pyargs", "conformance.suites", "-m", "interpret", "-p", "no:cacheprovider", "-q")
    own = (
        "--conformance-only-user-kernels",
        "--conformance-kernels",
        "mine.py",
        "--conformance-expected-failures",
        "expected.txt",
    )
    # A preset that one of the models lacks would leave its kernel unjudged; one that both have does not say which is meant.
    left_out = run(*suites, *own, "--conformance-presets", "narrow")
    assert "no preset of model gelu is chosen" in left_out.stdout + left_out.stderr
    assert left_out.returncode != 0
    assert (
        "preset 'tiny' is ambiguous" in (unclear := run(*suites, *own, "--conformance-presets", "tiny")).stdout + unclear.stderr
    )
    both = run(*suites, *own, "--conformance-presets", "gelu/tiny,qwen3/tiny", "--conformance-run", "run")
    assert "1 passed, " in both.stdout, both.stdout + both.stderr
    assert "1 xfailed" in both.stdout
    judged = {(record.kernel, record.status) for record in read_run(tmp_path / "run").of("case")}
    assert {("qwen3/norm", "passed"), ("gelu/norm", "failed")} <= judged
    # The command finds the kernel of the stage, takes the same list, and what it prints can be run again.
    alone = run(
        "conformance.cli", "check", "layer_norm", "mine.py:norm", "--examples", "4", "--expected-failures", "expected.txt"
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr
    again = alone.stdout.split("again: conformance ", 1)[1].splitlines()[0].split()
    assert run("conformance.cli", *again).returncode == 1


def test_the_suites_judge_both_models(environment: dict[str, str], tmp_path: Path) -> None:
    words = ["-m", "interpret", "-k", "mlp-odd", "--conformance-run", "run", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", "conformance.suites", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    judged = {(record.kernel, record.stage, record.preset, record.status) for record in read_run(tmp_path / "run").of("case")}
    assert judged == {("gelu/mlp", "gelu/mlp", "odd", "passed")}
