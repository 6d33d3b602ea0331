"""The exam's torch kernels are told apart, described, and made anew whenever they are asked for."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re

import pytest
import torch

import conformance
from conformance.cases.case import make_case
from conformance.cases.key import CaseKey
from conformance.contract.registry import stage_named
from conformance.exam.known_kernels import KINDS, Faults
from conformance.judge.verdict import DETECTORS
from conformance.kernels.qwen3.exam.torch import kernels, layers, operations
from conformance.kernels.qwen3.exam.torch.catalogue import VARIANTS, dims_of, random_variant, torch_kernels, variants_of
from conformance.kernels.qwen3.exam.torch.choices import RELEVANT, Choices
from conformance.kernels.qwen3.exam.torch.hooks import FAULTS
from conformance.lanes.eager import run_eager

KNOWN_KERNELS = torch_kernels()
DECLARED = [fault for stage in FAULTS.by_stage for fault in FAULTS.of(stage)]
NAMES = {fault.name for fault in DECLARED}


def test_ids_are_unique() -> None:
    assert len({subject.id for subject in KNOWN_KERNELS}) == len(KNOWN_KERNELS)


def test_every_fault_is_described() -> None:
    for fault in DECLARED:
        assert fault.kind in KINDS, fault.name
        assert fault.summary.strip() == fault.summary, fault.name
        assert fault.summary, fault.name
        assert not set("\n.") & set(fault.summary[-1:]), fault.name


def test_a_fault_is_named_by_detectors_that_there_are() -> None:
    for fault in DECLARED:
        assert fault.detectors, fault.name
        assert set(fault.detectors) <= DETECTORS.keys(), fault.name


def test_no_two_faults_of_a_stage_say_the_same() -> None:
    for stage in FAULTS.by_stage:
        faults = FAULTS.of(stage)
        assert len({fault.summary for fault in faults}) == len(faults), stage


def test_there_are_as_many_as_the_exam_asks_for() -> None:
    assert len(NAMES) >= 200
    assert len(VARIANTS) >= 50
    assert {fault.kind for fault in DECLARED} == set(KINDS)


@pytest.mark.parametrize("stage", conformance.stages())
def test_every_stage_has_faults_and_variants(stage: str) -> None:
    legal = [subject.name for subject in KNOWN_KERNELS if subject.stage == stage and subject.legal]
    faults = [subject.name for subject in KNOWN_KERNELS if subject.stage == stage and not subject.legal]
    assert "contract" in legal
    assert legal == list(variants_of(stage))
    assert faults == [fault.name for fault in FAULTS.of(stage)]


def test_variants_differ_from_one_another() -> None:
    choices = [variant.choices for variant in VARIANTS.values()]
    assert len(set(choices)) == len(choices)
    assert all(variants_of(stage) for stage in RELEVANT)
    assert {name for stage in RELEVANT for name in variants_of(stage)} == set(VARIANTS)


def test_a_variant_changes_only_what_means_something_to_its_stage() -> None:
    for stage in RELEVANT:
        for variant in variants_of(stage).values():
            changed = {
                field.name
                for field in dataclasses.fields(Choices)
                if getattr(variant.choices, field.name) != getattr(Choices(), field.name)
            }
            assert changed <= set(RELEVANT[stage])


def test_a_kernel_is_made_anew() -> None:
    """What one remembers of its calls the next does not know."""
    (subject,) = (subject for subject in KNOWN_KERNELS if subject.id == "rms_norm/accumulator_kept")
    case = make_case(CaseKey.parse("rms_norm:tiny:B=2:normal:1"))
    kernel = subject.make()
    first, second = run_eager(kernel, case), run_eager(kernel, case)
    assert not torch.equal(first.outputs["out"], second.outputs["out"])
    assert torch.equal(run_eager(subject.make(), case).outputs["out"], first.outputs["out"])


def test_dimensions_are_those_that_a_fault_needs() -> None:
    assert dims_of("rms_norm") == {"preset": "tiny"}
    assert dims_of("rms_norm", "tail_columns_zero") == {"preset": "awkward"}
    assert dims_of("prefill_fwd") == {"preset": "tiny", "S": 48, "L": 2, "T": 24}
    assert dims_of("attention", "heads_over_nkv") == {"preset": "awkward"}


def test_kv_heads_taken_for_the_heads_that_share_one_show_at_awkward() -> None:
    """``h // NKV`` for ``h // G``: right at ``tiny``, where the two are equal."""
    kernel = kernels.torch_kernel("attention", fault="heads_over_nkv")
    assert conformance.check("attention", kernel, dims="tiny", examples=5).ok
    assert "element" in conformance.check("attention", kernel, dims="awkward", examples=5).detectors


def test_random_combinations_are_one_subject() -> None:
    first, again, other = (random_variant("attention", index) for index in (0, 0, 1))
    assert first.id == other.id == "attention/random_combinations"
    assert first.legal
    assert first.make is not again.make  # made for this combination only
    assert first.dims == other.dims


def test_every_hook_of_a_fault_is_asked_for() -> None:
    """A hook that nobody asks for would leave the kernel right."""
    source = "".join(pathlib.Path(inspect.getfile(module)).read_text("utf-8") for module in (operations, layers, kernels))
    asked = set(re.findall(r"\.at\(\s*\"(\w+)\"", source)) | {"attention_sum", "mlp_sum"}
    assert {found.hook for found in DECLARED} == asked
    assert all(stage_named(stage) for stage in FAULTS.by_stage)


def test_a_misspelt_fault_is_not_a_right_kernel() -> None:
    with pytest.raises(KeyError, match="has no fault 'zerso'"):
        kernels.torch_kernel("rms_norm", fault="zerso")


def test_a_fault_says_what_it_is_and_is_declared_once() -> None:
    def gain(eps: float) -> float:
        """Eps is doubled."""
        return 2 * eps

    def untold(eps: float) -> float:
        return 2 * eps

    faults = Faults()
    for name, arguments, reason in (
        ("untold", ("eps", "value", "rms_norm"), "one line"),
        ("gain", ("eps", "value"), "expected stages"),
        ("gain", ("eps", "speed", "rms_norm"), "expected a kind"),
        ("gain", ("eps", None, "rms_norm"), "not declared"),
    ):
        with pytest.raises(ValueError, match=reason):
            faults.declare(*arguments)({"gain": gain, "untold": untold}[name])  # type: ignore[arg-type]
    assert not faults.by_stage
    faults.declare("eps", "value", "rms_norm")(gain)
    with pytest.raises(ValueError, match="do not have it yet"):
        faults.declare("eps", "value", "rms_norm")(gain)
    with pytest.raises(ValueError, match="kind is given once"):
        faults.declare("eps", "value", "qk_norm")(gain)


def test_a_fault_at_another_hook_or_in_another_toolchain_is_the_same_fault() -> None:
    def gain(eps: float) -> float:
        """Eps is doubled."""
        return 2 * eps

    faults = Faults()
    faults.declare("eps", "value", "rms_norm", detectors=("bias",))(gain)
    faults.declare("result", None, "mlp", name="gain")(lambda value: value)
    others = Faults(like=faults)
    others.declare("program", None, "mlp", name="gain", detectors=("element",))(lambda value: value)
    for found, hook, detectors in (
        (faults.by_stage["mlp"]["gain"], "result", ("bias",)),
        (others.by_stage["mlp"]["gain"], "program", ("element",)),
    ):
        assert (found.kind, found.summary) == ("value", "eps is doubled")
        assert (found.hook, found.detectors) == (hook, detectors)
