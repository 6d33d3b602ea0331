"""The PyPTO kernels of the exam: each is what it says, as far as one case of each kind of kernel can tell.

The ``conformance exam`` command judges all of them, on many cases.
"""

from __future__ import annotations

import collections
import subprocess
import sys
from collections.abc import Container, Iterable
from typing import Any

import pytest

from conformance.cases.key import CaseKey
from conformance.exam.known_kernels import KINDS, KnownKernel
from conformance.judge.verdict import Verdict
from conformance.kernels.qwen3 import exam
from conformance.lanes.process import address_of
from conformance.running.check import case_runs
from conformance.running.plans import RunPlan
from conformance.running.runners import worker_runner

KNOWN_KERNELS = [one for one in exam.KNOWN_KERNELS if one.lane != "eager"]
BY_NAME = {f"{subject.stage}/{subject.name}": subject for subject in KNOWN_KERNELS if not subject.hidden}

#: A case of each stage that shows most faults: sequences of more than one block, and none at the edge of one.
CASES = {
    "rms_norm": "rms_norm:tiny:B=3:normal:1",
    "qkv_proj": "qkv_proj:tiny:B=3:normal:1",
    "qk_norm": "qk_norm:tiny:B=3:normal:1",
    "rope": "rope:tiny:B=3,S=48,seq_lens=48+3+37:normal:1",
    "kv_write": "kv_write:tiny:B=3,BS=8,D=16,NB=11,S=32,seq_lens=17+16+30:normal:1",
    "attention": "attention:tiny:B=2,BS=8,S=48,seq_lens=13+43:normal:1",
    "paged_attention": "paged_attention:tiny:B=3,BS=8,D=16,NB=11,S=32,seq_lens=17+16+30:normal:1",
    "o_proj": "o_proj:tiny:B=3:normal:1",
    "mlp": "mlp:tiny:B=3:normal:1",
    "lm_head": "lm_head:tiny:B=3,V=500:normal:1",
    "greedy_sample": "greedy_sample:tiny:B=3:normal:1",
    "decode_layer": "decode_layer:tiny:B=2,S=48,seq_lens=18+5:normal:1",
    "decode_fwd_layers": "decode_fwd_layers:tiny:B=2,L=2,S=48,seq_lens=18+5:normal:1",
}
#: Where another regime is needed, or other dimensions.
CASE_OF = {
    "attention/no_maximum": "attention:tiny:B=2,BS=8,S=48,seq_lens=13+43:big:1",
    "attention/no_rescale": "attention:tiny:B=2,BS=8,S=48,seq_lens=40+43:big:1",
    "greedy_sample/highest_index_on_a_tie": "greedy_sample:tiny:B=3:ties:1",
    "lm_head/loop_over_the_vocabulary": "lm_head:tiny:B=3,V=512:normal:1",
}
#: One fault for each way of going wrong and of being declared, and the detector that tells it.
FAULTS = {
    "rms_norm/missing_gamma": "element",
    "rms_norm/norm_in_bf16": "element",
    "qkv_proj/output_never_written": "unwritten",
    "qk_norm/normalised_by_row": "element",
    "rope/interleaved_pairs": "element",
    "rope/bf16_tables": "element",
    "kv_write/token_major_page": "out_of_bounds",
    "kv_write/other_row_overwritten": "out_of_bounds",
    "attention/no_maximum": "not_finite",
    "attention/no_rescale": "element",
    "attention/modulo_heads": "element",
    "paged_attention/masked_scores_are_zero": "element",
    "o_proj/bf16_accumulation": "element",
    "o_proj/column_tile_unwritten": "unwritten",
    "lm_head/last_tile_unwritten": "unwritten",
    "greedy_sample/highest_index_on_a_tie": "element",
    "decode_layer/attention_before_write": "element",
    "decode_layer/next_row_overwritten": "out_of_bounds",
}
#: What every run of the tests sees: one of each detector, of a layer and of a stage. The nightly exam judges all of them too.
SEEN_ALWAYS = {
    "kv_write/token_major_page",
    "attention/no_maximum",
    "attention/modulo_heads",
    "o_proj/column_tile_unwritten",
    "greedy_sample/highest_index_on_a_tie",
    "decode_layer/attention_before_write",
    "attention/one_block",
    "decode_layer/roundings_of_hugging_face",
}
VARIANTS = (
    "rms_norm/inverse",
    "attention/one_block",
    "attention/probabilities_in_fp32",
    "paged_attention/whole_pages_masked_by_replacing",
    "kv_write/rows_in_another_order",
    "mlp/gate_and_up_rounded",
    "mlp/activation_in_fp32",
    "lm_head/loop_over_the_vocabulary",
    "decode_layer/roundings_of_hugging_face",
)


def slow_but_some(names: Iterable[str], always: Container[str]) -> list[Any]:
    """Each takes a process, and with it two seconds: most run at night only."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in names]


def verdict_of(name: str, lane: str = "interpret") -> Verdict:
    """The verdict of one run of one case; its compiler passes are compared where that is cheap."""
    kernel = BY_NAME[name].make()
    key = CaseKey.parse(CASE_OF.get(name, CASES[kernel.stage.name]))
    plan = RunPlan(passes="none" if kernel.stage.composite else "last")
    with worker_runner(kernel, lane) as run:
        (judged,) = case_runs(kernel, [key], run, lane, plan)
    return judged.verdict


@pytest.mark.parametrize("name", slow_but_some(FAULTS, SEEN_ALWAYS))
def test_a_fault_is_found(name: str) -> None:
    assert not BY_NAME[name].legal
    assert FAULTS[name] in [finding.detector for finding in verdict_of(name).findings]


@pytest.mark.parametrize("name", slow_but_some(VARIANTS, SEEN_ALWAYS))
def test_a_legal_variant_passes(name: str) -> None:
    assert BY_NAME[name].legal
    verdict = verdict_of(name)
    assert verdict.ok, verdict.findings[0].message


COMPILED_ONLY = [name for name, subject in BY_NAME.items() if subject.lane == "compile_only"]


@pytest.mark.parametrize("name", slow_but_some(COMPILED_ONLY, COMPILED_ONLY[:1]))
def test_what_only_the_compiled_graph_shows(name: str) -> None:
    # If this fails the interpreter has learnt to show it, and the subject belongs there, where it is compared with other rules.
    assert verdict_of(name).ok
    assert [finding.detector for finding in verdict_of(name, "compile_only").findings] == ["unwritten_read"]


def test_what_the_interpreter_cannot_show_is_listed_and_found_elsewhere() -> None:
    hidden = {subject.id for subject in KNOWN_KERNELS if subject.hidden}
    elsewhere = {subject.id.replace("compile_only:", "interpret:") for subject in KNOWN_KERNELS if subject.lane == "compile_only"}
    assert hidden == elsewhere != set()


def test_there_are_enough_of_each_kind() -> None:
    shown = [subject for subject in KNOWN_KERNELS if not subject.legal and not subject.hidden]
    assert len(shown) >= 30
    assert sum(subject.legal for subject in KNOWN_KERNELS) >= 15
    # What differs from run to run is beyond an interpreter.
    assert {subject.kind for subject in shown} == KINDS.keys() - {"nondeterminism"}


def test_every_subject_is_described_and_unique() -> None:
    assert [name for name, count in collections.Counter(subject.id for subject in KNOWN_KERNELS).items() if count > 1] == []
    for subject in KNOWN_KERNELS:
        assert subject.lane in ("interpret", "compile_only"), subject.id
        assert subject.summary, subject.id
        assert not subject.summary.endswith("."), subject.id
        assert subject.kind is None or subject.kind in KINDS, subject.id


@pytest.mark.parametrize("subject", KNOWN_KERNELS[::20], ids=lambda subject: str(subject.id))
def test_a_worker_finds_the_kernel(subject: KnownKernel) -> None:
    kernel = subject.make()
    module, attribute = address_of(kernel)
    assert vars(sys.modules[module])[attribute] == kernel


def test_the_exam_is_listed_where_pypto_is_missing() -> None:
    code = "import sys; sys.modules['pypto'] = None; import conformance.kernels.qwen3.exam as all; print(len(all.KNOWN_KERNELS))"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(listed.stdout) == len(exam.KNOWN_KERNELS)


def test_replaced_fragments_leak_nothing() -> None:
    code = """
import sys
from conformance.kernels.qwen3 import fragments as before
from conformance.kernels.qwen3.exam.pypto.weaving import replaced_fragments
norm, layer = before.rms_norm, before.decode_layer
def edit(fragments):
    fragments.rms_norm = None
try:
    with replaced_fragments(edit) as copy:
        from conformance.kernels.qwen3 import fragments as within
        assert within is copy and within is not before and within.rms_norm is None
        assert within.decode_layer.__globals__["rms_norm"] is None
        raise KeyError
except KeyError:
    pass
from conformance.kernels.qwen3 import fragments as after
assert after is before and after is sys.modules["conformance.kernels.qwen3.fragments"]
assert (after.rms_norm, after.decode_layer) == (norm, layer)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
