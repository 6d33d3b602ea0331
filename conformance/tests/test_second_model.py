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
