"""What a part of the harness may need: judging a torch callable takes torch alone, importing the package next to nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"blocked: {{name}}")

sys.meta_path.insert(0, Blocked())
"""


def run(blocked: set[str], program: str) -> subprocess.CompletedProcess[str]:
    source = BLOCKED.format(blocked=blocked) + program
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)


def test_a_torch_callable_is_judged_without_pypto_pytest_and_hypothesis() -> None:
    program = """
import torch
import conformance

def kernel(x, weight, out):
    wide = x.float()
    out.copy_(wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6) * weight)

report = conformance.check("rms_norm", kernel, examples=9)
assert report.ok, report
assert not conformance.check("rms_norm", lambda x, weight, out: out.zero_() and None, examples=9).ok

@conformance.kernel("greedy_sample", capabilities=["variable_batch"])
def sample(logits, token_ids):
    token_ids.copy_(logits.argmax(-1))

report = conformance.check("greedy_sample", sample, examples=9)
assert report.ok, report
assert any(run.check == "capability:variable_batch" for run in report.runs)
print(len(conformance.stages()))
"""
    done = run({"pypto", "pytest", "_pytest", "hypothesis", "xdist", "transformers"}, program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "18"


def test_the_wheel_takes_one_import_name() -> None:
    """``kernels`` is another package's name on PyPI, and ``reports`` and ``fixtures`` are anybody's."""
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    # In a process of its own: reading the configuration imports packages, and setuptools replaces distutils.
    program = (
        "import sys, setuptools.config.pyprojecttoml as reader; "
        "print(*reader.read_configuration(sys.argv[1])['tool']['setuptools']['packages'])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(pyproject)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    packages = set(done.stdout.split())
    assert {name.partition(".")[0] for name in packages} == {"conformance"}
    assert {"conformance.kernels.qwen3", "conformance.reports", "conformance.fixtures", "conformance.suites"} <= packages
    assert not any(name.startswith("conformance.tests") for name in packages)


@pytest.mark.parametrize("name", ["kernels", "reports", "fixtures"])
def test_another_package_of_a_folder_s_name_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("mine = 'untouched'\n")
    program = f"import conformance.{name}, {name}; print({name}.mine)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "untouched", done.stderr


def test_importing_the_package_does_not_import_torch() -> None:
    done = run({"torch", "pypto", "numpy"}, "import conformance\nprint(conformance.__version__)\n")
    assert done.returncode == 0, done.stderr
