"""Kernels as their authors declare them, in a module or a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import conformance
from conformance.contract.kernel import Kernel, as_kernel, takes_dims
from conformance.contract.loading import find_kernel, kernels_in, load_module
from conformance.contract.registry import preset_named

Tensor = torch.Tensor
TINY = preset_named("tiny")


def norm(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Normalises.

    Slowly.
    """
    out.copy_(x)


def build(dims: conformance.Dims) -> object:
    return ("built for", dims.B)


def refused(match: str, **keywords: Any) -> None:
    function = keywords.pop("function", norm)
    with pytest.raises(conformance.UsageError, match=match) as error:
        conformance.kernel(keywords.pop("stage", "rms_norm"), **keywords)(function)
    assert "\n" not in str(error.value)


def test_a_declared_kernel_keeps_what_it_was_told_and_can_be_called() -> None:
    declared = conformance.kernel("rms_norm", name="mine", capabilities=["variable_batch"], profile="contract")(norm)
    assert (declared.name, declared.stage.name, declared.toolchain) == ("mine", "rms_norm", "torch")
    assert declared.capabilities == ("variable_batch",)
    assert declared.summary == "Normalises."
    assert declared.source == Path(__file__)
    out = torch.zeros(2)
    declared(torch.ones(2), torch.ones(2), out)
    assert out.tolist() == [1.0, 1.0]


def test_the_functions_own_name_is_the_default() -> None:
    assert conformance.kernel("rms_norm")(norm).name == "norm"


def test_mistakes_in_a_declaration_are_refused_in_one_line() -> None:
    refused("unknown stage 'norm'; known are rms_norm", stage="norm")
    refused("unknown toolchain 'cuda'; known are torch, pypto", toolchain="cuda")
    refused("unknown capability 'fast'; known are paged_kv", capabilities=["fast"])
    refused("stage rms_norm has no profile 'wide'; it has contract", profile="wide")
    refused(r"expected \(x, weight, out\), found \(\)", function=lambda: None)
    refused(r"expected \(x, weight, out\), found \(x, out, weight\)", function=lambda x, out, weight: None)
    refused(r"found \(x, weight, out, more\)", function=lambda x, weight, out, more: None)
    with pytest.raises(conformance.UsageError, match="takes the stage's name"):
        conformance.kernel(norm)  # type: ignore[arg-type]


def test_a_callable_with_open_arguments_is_taken_at_its_word() -> None:
    assert as_kernel("rms_norm", lambda *arguments: None).stage_name == "rms_norm"


def test_dims_are_passed_to_those_who_ask_by_keyword_alone() -> None:
    assert takes_dims(lambda x, weight, out, *, dims: None)
    assert not takes_dims(lambda x, weight, out, dims: None)
    assert not takes_dims(norm)


def test_a_builder_takes_dims_and_is_refused_otherwise() -> None:
    declared = conformance.kernel("rms_norm", toolchain="pypto")(build)
    assert declared.build(TINY) == ("built for", TINY.B)
    refused(r"builder that takes dims .* norm takes \(x, weight, out\)", toolchain="pypto")


def test_a_refusal_says_why() -> None:
    picky = conformance.kernel("rms_norm", toolchain="pypto", accepts=lambda dims: dims.B > 4 or "B must exceed 4")(build)
    assert picky.refusal(TINY) is None
    assert picky.refusal(TINY.replace(B=2)) == "B must exceed 4"
    with pytest.raises(conformance.UsageError, match=r"^B must exceed 4$"):
        picky.build(TINY.replace(B=2))
    silent = conformance.kernel("rms_norm", toolchain="pypto", accepts=lambda dims: False)(build)
    assert "kernel build does not take Qwen3Dims(" in str(silent.refusal(TINY))


def test_a_kernel_of_another_stage_is_refused() -> None:
    with pytest.raises(conformance.UsageError, match="kernel norm implements rms_norm, not mlp"):
        as_kernel("mlp", conformance.kernel("rms_norm")(norm))


KERNEL_FILE = """
import conformance
from helper import twice

@conformance.kernel("rms_norm")
def second(x, weight, out):
    out.copy_(twice(x))

@conformance.kernel("rms_norm", name="first")
def other(x, weight, out):
    out.copy_(x)

alias = second
"""


@pytest.fixture
def kernel_file(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("def twice(x):\n    return x + x\n")
    path = tmp_path / "my_kernels.py"
    path.write_text(KERNEL_FILE)
    return path


def test_a_file_is_loaded_once_with_its_neighbours(kernel_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    before = list(sys.path)
    module = load_module(kernel_file)
    assert load_module(str(kernel_file)) is module
    assert sys.path == before
    found = kernels_in(module)
    assert [kernel.name for kernel in found] == ["second", "first"]
    assert all(isinstance(kernel, Kernel) for kernel in found)
    assert find_kernel(found, "first", "my_kernels.py").function is module.other.function
    with pytest.raises(conformance.UsageError, match=r"no kernel 'third' in my_kernels.py; found second, first"):
        find_kernel(found, "third", "my_kernels.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_to_be_found", "does not import: ModuleNotFoundError: No module named 'nowhere_to_be_found', line 1 of"),
        ("x = 1\nraise RuntimeError('a\\nb')", "does not import: RuntimeError: a b, line 2 of broken.py"),
        ("def f(:", "does not import: SyntaxError"),
        ("raise SystemExit(3)", "does not import: SystemExit: 3"),
    ],
)
def test_a_file_that_does_not_import_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    before = set(sys.modules)
    with pytest.raises(conformance.UsageError) as error:
        load_module(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not [name for name in set(sys.modules) - before if "broken" in name]


def test_a_file_or_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(conformance.UsageError, match=r"no such kernel file: nowhere\.py"):
        load_module("nowhere.py")
    with pytest.raises(conformance.UsageError, match=r"cannot import no\.such\.module: ModuleNotFoundError"):
        load_module("no.such.module")
