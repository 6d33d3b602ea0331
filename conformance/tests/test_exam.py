"""The exam itself: what it judges, how it counts, and that it fails where the rule does."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import conformance
from conformance.cases.key import CaseKey
from conformance.cases.space import Space, stratified_keys
from conformance.cli import main
from conformance.contract.registry import stage_named, stages
from conformance.errors import UsageError
from conformance.exam import efforts, pool, results
from conformance.exam.efforts import EFFORTS, Cases, Effort, chosen_subjects
from conformance.exam.known_kernels import KnownKernel
from conformance.exam.pool import take
from conformance.exam.results import LEAST_CONFIDENCE, OURS, Exam, KernelResult, trials_for
from conformance.exam.rules import RULES
from conformance.exam.trials import Trial
from conformance.kernels.qwen3.exam.torch.kernels import torch_kernel
from conformance.lanes.base import Outcome
from conformance.reports import exam_figures, exam_page, exam_table
from conformance.tests.processes import alive

#: A few cases of each kind.
SHORT = Effort(
    "short", True, False, Cases(9, 9, 9), Cases(2, 2, 2), Cases(1, 1, 2), random_single=6, random_composite=2, together=32
)


def subject(name: str, kind: Any, make: Any, stage: str = "rms_norm") -> KnownKernel:
    return KnownKernel(stage, name, kind, "what an engineer did", make)


def of(monkeypatch: pytest.MonkeyPatch, *chosen: KnownKernel, effort: Effort = SHORT) -> Exam:
    """An exam of these kernels alone, in this process."""
    monkeypatch.setattr(efforts, "catalogue", lambda: list(chosen))
    return take(effort, processes=1)


RIGHT = subject("right", None, functools.partial(torch_kernel, "rms_norm"))
GAIN = subject("gain", "value", functools.partial(torch_kernel, "rms_norm", fault="gain"))


def test_a_rule_is_scored_on_the_runs_that_all_rules_see(monkeypatch: pytest.MonkeyPatch) -> None:
    found = of(monkeypatch, RIGHT, GAIN)
    gain, right, random = sorted(found.standings, key=lambda one: one.name != "gain")
    assert (gain.trials, right.trials, random.trials) == (9, 9, 6)
    assert random.name == "random_combinations"
    assert gain.rejected[OURS] >= 7
    assert gain.first in (1, 2)
    assert {"bias", "spread", "element"} & set(gain.detectors)
    # Half a percent is well within what these allow.
    assert not gain.caught_by("assert_close")
    assert not gain.caught_by("cosine > 0.999")
    assert sum(trials for trials, _ in gain.regimes.values()) == 9
    assert sum(caught for _, caught in gain.regimes.values()) == gain.rejected[OURS]
    ours = found.score(OURS)
    assert (ours.caught, ours.faults, ours.rejected_variants, ours.variants) == (1, 1, 0, 2)
    assert (ours.rejected_trials, ours.legal_trials) == (0, 15)
    assert found.rules == (OURS, *(rule.name for rule in RULES))
    assert all(found.score(rule).milliseconds > 0 for rule in found.rules)
    assert found.passed
    assert not found.missed()
    assert [one.name for one in found.missed("assert_close")] == ["gain"]


def test_a_rejected_variant_fails_the_exam_and_its_case_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    wrongly_legal = dataclasses.replace(GAIN, kind=None)
    found = of(monkeypatch, GAIN, dataclasses.replace(wrongly_legal, name="said_to_be_legal"))
    assert not found.passed
    (rejected,) = [one for one in found.variants if one.caught_by(OURS)]
    assert rejected.name == "said_to_be_legal"
    assert rejected.rejections[0].startswith("rms_norm:tiny:")
    key = rejected.rejections[0].split(" ")[0]
    assert not conformance.check("rms_norm", torch_kernel("rms_norm", fault="gain"), case=key).ok


def test_a_missed_fault_of_a_single_stage_fails_the_exam(monkeypatch: pytest.MonkeyPatch) -> None:
    found = of(monkeypatch, RIGHT, dataclasses.replace(RIGHT, name="said_to_be_wrong", kind="value"))
    assert [one.name for one in found.missed()] == ["said_to_be_wrong"]
    assert not found.passed


def test_a_fault_that_is_never_named_fails_the_exam(monkeypatch: pytest.MonkeyPatch) -> None:
    misnamed = dataclasses.replace(GAIN, name="misnamed", detectors=("raised", "echo"))
    found = of(monkeypatch, RIGHT, GAIN, misnamed)
    assert [one.name for one in found.unnamed()] == ["misnamed"]
    (standing,) = found.unnamed()
    assert standing.unnamed == standing.rejected[OURS]
    assert not found.missed()
    assert not found.passed
    assert "1 fault caught and never named" in exam_figures.verdict(found)[1]
    words = " ".join(exam_table.render(found).split())
    assert f"{standing.unnamed} did so by no detector that names it; never named: rms_norm/misnamed." in words


def test_a_fault_is_judged_until_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element shows it in one case, nothing else does before a batch of one comes."""

    def make() -> conformance.Kernel:
        right = torch_kernel("rms_norm")

        @conformance.kernel("rms_norm")
        def needs_two_rows(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, dims: Any) -> None:
            if dims.B == 1:
                raise RuntimeError("two rows at least")
            right(x, weight, out, dims=dims)
            out[0, 0] += 1

        return needs_two_rows

    one = dataclasses.replace(subject("needs_two_rows", "robustness", make), detectors=("raised",))
    found = of(monkeypatch, RIGHT, one, effort=dataclasses.replace(SHORT, single=Cases(1, 1, 30)))
    (standing,) = found.faults
    assert standing.trials > 1
    assert standing.detectors[-1] == "raised"
    assert standing.unnamed == standing.trials - 1
    assert found.passed


def test_what_a_lane_cannot_show_is_neither_caught_nor_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = dataclasses.replace(RIGHT, name="race", kind="dependency", hidden="runs in program order")
    found = of(monkeypatch, RIGHT, GAIN, hidden)
    assert [one.name for one in found.hidden] == ["race"]
    assert not found.missed()
    assert found.score(OURS).faults == 1
    assert found.passed


def test_a_kernel_that_takes_no_case_is_an_error_and_not_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    @conformance.kernel("rms_norm", accepts=lambda dims: "takes nothing")
    def refuses(x: Any, weight: Any, out: Any) -> None: ...

    found = of(monkeypatch, RIGHT, GAIN, subject("refuses", "robustness", lambda: refuses))
    assert [(one.name, one.error) for one in found.errors] == [("refuses", "the kernel took none of the cases")]
    assert not found.passed


def test_a_kernel_that_raises_is_seen_by_every_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    @conformance.kernel("rms_norm")
    def raises(x: Any, weight: Any, out: Any) -> None:
        raise RuntimeError("no")

    found = of(monkeypatch, RIGHT, subject("raises", "robustness", lambda: raises))
    assert all(found.score(rule).caught == 1 for rule in found.rules)


def test_a_kernel_is_made_once_and_remembers_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault may show at the second call only: every trial must meet the same kernel."""

    def make() -> Any:
        calls = []
        right = torch_kernel("rms_norm")

        @conformance.kernel("rms_norm")
        def tires(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, dims: Any) -> None:
            calls.append(1)
            right(x, weight, out, dims=dims)
            if len(calls) > 8:
                out[0, 0] += 1

        return tires

    found = of(monkeypatch, RIGHT, subject("tires", "nondeterminism", make))
    tires = next(one for one in found.standings if one.name == "tires")
    assert 2 <= tires.first <= 5


def test_a_refuted_claim_counts_as_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Any:
        right = torch_kernel("rms_norm")

        @conformance.kernel("rms_norm", capabilities=["fused_lm_head"])
        def boasts(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, dims: Any) -> None:
            right(x, weight, out, dims=dims)

        return boasts

    found = of(monkeypatch, RIGHT, subject("boasts", "robustness", make))
    boasts = next(one for one in found.standings if one.name == "boasts")
    assert boasts.detectors == ["capability"]
    assert found.score(OURS).caught == 1
    assert found.score("assert_close").caught == 0


def test_what_all_cases_show_together_counts_as_caught_once_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    few = (("S", 48), ("B", 1))
    right = KnownKernel("decode_layer", "right", None, "", functools.partial(torch_kernel, "decode_layer"), dims=dict(few))
    make = functools.partial(torch_kernel, "decode_layer", fault="bf16_scores")
    short_of_bits = dataclasses.replace(right, name="bf16_scores", kind="precision", summary="scores in bf16", make=make)
    found = of(
        monkeypatch, right, short_of_bits, effort=dataclasses.replace(SHORT, composite=Cases(6, 6, 60), random_composite=0)
    )
    fault = next(one for one in found.standings if not one.legal)
    assert fault.detectors == ["pooled_signature"]
    assert 6 <= fault.first == fault.trials < 60  # no longer than until it shows
    assert fault.rejected[OURS] == fault.in_outputs == 1
    assert "(pooled)" in fault.rejections[0]
    legal = next(one for one in found.standings if one.legal)
    assert not legal.rejected.get(OURS)
    assert found.passed


def test_of_a_cache_others_see_the_rows_that_were_or_should_have_been_written() -> None:
    key = next(iter(stratified_keys(Space.of(stage_named("kv_write"), "tiny"), 0)))
    trial = Trial(key)
    inputs = trial.case.inputs
    outputs = {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
    rows = trial.oracle.bounds(trial.case.stage.profiles[0])["k_cache"].rows
    assert rows is not None
    other = next(
        row for row in range(len(inputs["k_cache"])) if row not in rows.tolist() and not inputs["k_cache"][row].isnan().any()
    )
    outputs["k_cache"][other] += 1
    compared = {one.name: one for one in trial.compared(Outcome("ok", outputs=outputs))}
    assert compared["k_cache"].found.shape[0] == len(rows) + 1
    assert compared["v_cache"].found.shape[0] == len(rows)
    assert compared["k_cache"].golden.dtype == torch.bfloat16
    assert compared["k_cache"].exact.dtype == torch.float64


@pytest.mark.parametrize("stage", list(stages()))
def test_what_others_compare_with_is_finite_and_of_the_outputs_dtype(stage: str) -> None:
    contract = stage_named(stage)
    dims = {"S": 48, **({"L": 2} if "L" in contract.drawn else {}), **({"T": 24} if contract.has_chunks else {})}
    trial = Trial(next(iter(stratified_keys(Space.of(contract, dims), 0))))
    kernel = torch_kernel(stage)
    from conformance.lanes.eager import run_eager

    for one in trial.compared(run_eager(kernel, trial.case)):
        assert one.found.dtype == one.golden.dtype == one.rough.dtype == contract.argument(one.name).dtype
        assert bool(one.golden.isfinite().all())
        assert bool(one.rough.isfinite().all())
        assert one.found.shape == one.exact.shape


def test_the_catalogue_is_large_and_named_once() -> None:
    whole = chosen_subjects(EFFORTS["full"])
    assert len({one.id for one in whole}) == len(whole)
    faults = {one.name for one in whole if not one.legal and one.lane == "eager"}
    variants = {one.name for one in whole if one.legal and one.lane == "eager"}
    assert len(faults) >= 200
    assert len(variants) >= 50
    interpreted = [one for one in whole if one.lane == "interpret"]
    assert sum(not one.legal for one in interpreted) >= 30
    assert sum(one.legal for one in interpreted) >= 15
    assert {one.stage for one in whole if not one.legal} == set(stages())
    assert all(one.summary and "\n" not in one.summary for one in whole)


def test_a_sample_has_every_fault() -> None:
    whole, sample = (chosen_subjects(EFFORTS[name], lane="eager") for name in ("full", "quick"))
    assert {one.name for one in sample} == {one.name for one in whole}
    assert {one.stage for one in sample} == set(stages())
    assert len(sample) < len(whole) / 2
    assert {one.id for one in chosen_subjects(EFFORTS["quick"], stage="rope")} == {
        one.id for one in chosen_subjects(EFFORTS["full"]) if one.stage == "rope"
    }


def test_a_sample_has_faulty_and_legal_kernels_of_every_lane() -> None:
    whole, sample = (chosen_subjects(EFFORTS[name]) for name in ("full", "quick"))
    assert {(one.lane, one.legal) for one in sample} == {(one.lane, one.legal) for one in whole}
    assert len([one for one in sample if one.lane != "eager"]) < 16
    for lane in {one.lane for one in whole}:
        assert chosen_subjects(EFFORTS["quick"], lane=lane)


def _legal_by_stage(effort: Effort) -> dict[str, list[KnownKernel]]:
    found: dict[str, list[KnownKernel]] = {}
    for one in chosen_subjects(effort, lane="eager"):
        if one.legal:
            found.setdefault(one.stage, []).append(one)
    return found


def _first_cases(one: KnownKernel, effort: Effort, seed: int = 0) -> list[CaseKey]:
    keys = itertools.islice(stratified_keys(Space.of(stage_named(one.stage), dict(one.dims)), seed), effort.cases(one).most)
    return [trial.key for trial in pool._in_rotation(list(map(Trial, keys)), one, effort.cases(one).legal, seed)][
        : effort.cases(one).legal
    ]


def test_the_legal_kernels_of_a_sample_see_every_kind_of_data_between_them() -> None:
    effort, of_layers = EFFORTS["quick"], set()
    for stage, group in _legal_by_stage(effort).items():
        seen = {key.regime for one in group for key in _first_cases(one, effort)}
        if stage_named(stage).composite:
            of_layers |= seen
        else:
            assert len(seen) >= min(4, len(stage_named(stage).regimes)), stage
            assert effort.random_single >= len(stage_named(stage).regimes)  # random combinations go round them
    assert of_layers == {regime for one in stages().values() if one.composite for regime in one.regimes}
    decode_layers = _legal_by_stage(effort)["decode_layer"]
    others = [[key.regime for key in _first_cases(decode_layers[0], effort, seed)] for seed in range(9)]
    assert {name for some in others for name in some} == set(stage_named("decode_layer").regimes)


def test_every_legal_kernel_of_a_sample_is_run_with_its_rows_rearranged_and_with_a_row_alone() -> None:
    effort = EFFORTS["quick"]
    checked = 0
    for stage, group in _legal_by_stage(effort).items():
        for one in group if "B" in stage_named(stage).drawn else ():
            assert sum(key.dims.B > 1 for key in _first_cases(one, effort)) >= 2, one.id
            checked += 1
    assert checked > 90


def test_an_order_of_cases_loses_none() -> None:
    one = chosen_subjects(EFFORTS["quick"], stage="rope")[0]
    keys = list(itertools.islice(stratified_keys(Space.of(stage_named("rope"), {}), 0), 30))
    for count in (1, 2, 5, 9, 10, 30):
        trials = list(map(Trial, keys[:count]))
        orders = [pool._in_rotation(trials, one, 6, seed) for seed in range(20)]
        assert all(sorted(order, key=trials.index) == trials and order[0] is trials[0] for order in orders)
        assert len({tuple(map(trials.index, order)) for order in orders}) == max(1, min(count, 9) - 1)


@pytest.mark.slow
def test_parallel_processes_give_the_same_standings() -> None:
    def plain(found: Exam) -> list[dict[str, Any]]:
        return sorted((dataclasses.asdict(one) for one in found.standings), key=lambda one: str(one["id"]))

    one, two = (take(SHORT, stage="greedy_sample", lane="eager", processes=count) for count in (1, 2))
    assert plain(one) == plain(two)


def test_a_kept_exam_is_read_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = of(monkeypatch, RIGHT, GAIN)
    results.write_json(found, tmp_path / "exam.json")
    again = results.read_json(tmp_path / "exam.json")
    assert again.standings == found.standings
    assert again.effort == found.effort
    assert again.score(OURS) == found.score(OURS)
    with_pairs = {**found.to_json(), "effort": {**found.to_json()["effort"], "single": [12, 50]}}  # as exams were kept before
    for broken in ("no json", "{}", json.dumps({**found.to_json(), "standings": [{"id": 1}]}), json.dumps(with_pairs)):
        (tmp_path / "exam.json").write_text(broken)
        with pytest.raises(UsageError, match=r"expected an exam that `conformance exam --out` wrote"):
            results.read_json(tmp_path / "exam.json")


def test_the_number_of_examples_follows_from_the_power_in_each_regime() -> None:
    # Shown by one regime of eleven with certainty, as far as 100 trials can tell: log(0.001) / log(1/101) = 1.5 rounds.
    regimes = {f"other{index}": [100, 0] for index in range(10)} | {"needle": [100, 100]}
    assert trials_for(regimes) == 17
    assert trials_for({"normal": [99, 50]}) == 10  # half of the trials: 0.5 ** 10 < 0.001
    assert trials_for({"normal": [10**9, 10**9]}) == 1
    with pytest.raises(ValueError, match="never caught"):
        trials_for({"normal": [10, 0]})
    standing = KernelResult(
        "s/a", "rms_norm", "a", "eager", "value", "", trials=99, rejected={OURS: 50}, regimes={"normal": [99, 50]}
    )
    easier = dataclasses.replace(standing, name="b", rejected={OURS: 99}, regimes={"normal": [99, 99]})
    measuring = dataclasses.replace(SHORT, measures=True)
    assert Exam(measuring, 0, [easier, standing], {}).examples_needed() == {"rms_norm": (10, "a")}
    assert not Exam(SHORT, 0, [easier, standing], {}).examples_needed()


def test_an_exam_that_measures_judges_the_fault_that_shows_least_the_longest() -> None:
    measuring = dataclasses.replace(SHORT, sample=False, measures=True, single=Cases(18, 18, 99), random_single=1)
    found = {one.name: one for one in take(measuring, stage="greedy_sample", lane="eager", processes=1).faults}
    always, in_one_regime = found["row_unwritten"], found["maximum_starts_at_zero"]
    assert (always.trials, always.rejected[OURS]) == (18, 18)
    assert in_one_regime.trials == trials_for(in_one_regime.regimes) > 27
    assert {name for name, (_, caught) in in_one_regime.regimes.items() if caught} == {"negative"}
    # What comes and goes from call to call is not a matter of data.
    assert found["every_second_call_unwritten"].trials == 18


def test_an_exam_that_measures_fails_where_a_check_has_too_few_examples_by_default() -> None:
    seldom = KernelResult(
        "s/a", "rms_norm", "seldom", "eager", "value", "", trials=99, rejected={OURS: 5}, regimes={"normal": [99, 5]}
    )
    legal = KernelResult("s/b", "rms_norm", "b", "eager", None, "", trials=9)
    assert trials_for(seldom.regimes, LEAST_CONFIDENCE) > stage_named("rms_norm").examples
    measuring = dataclasses.replace(SHORT, measures=True)
    assert Exam(measuring, 0, [seldom, legal], {}).too_few_examples() == {"rms_norm": "seldom"}
    assert Exam(measuring, 0, [seldom, legal], {}).failed
    assert "50 examples of rms_norm are too few for seldom" in exam_table.render(Exam(measuring, 0, [seldom, legal], {}))
    assert Exam(SHORT, 0, [seldom, legal], {}).passed  # a handful of trials says too little


def test_the_command_prints_the_table_and_keeps_a_page(tmp_path: Path) -> None:
    out = tmp_path / "kept"
    done = CliRunner().invoke(
        main, ["exam", "--stage", "greedy_sample", "--lane", "eager", "--processes", "1", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "assert_close" in done.output
    assert "PASSED" in done.output
    assert results.read_json(out / "exam.json").passed
    assert "<html" in (out / "exam.html").read_text()
    again = CliRunner().invoke(main, ["exam", "--stage", "greedy_sample", "--out", str(out)])
    assert again.exit_code == 2
    assert "already holds an exam" in again.output


def test_an_exam_says_how_far_it_is_in_a_log() -> None:
    done = CliRunner().invoke(main, ["exam", "--stage", "greedy_sample", "--lane", "eager", "--processes", "1"])
    assert re.search(r"^exam: \d+ of \d+ parts, .* so far", done.stderr, re.MULTILINE), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "nothing"], "unknown stage 'nothing'"),
        (["--lane", "device"], "the exam has no kernel of stage any in lane device"),
        (["--processes", "0"], "--processes takes a positive number"),
        (["--seed", "-1"], "seed must be a whole number"),
    ],
)
def test_a_users_mistake_is_one_line(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["exam", *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_what_goes_wrong_with_one_kernel_is_its_own_error_and_loses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no such kernel\nand more")

    found = of(monkeypatch, RIGHT, GAIN, subject("broken", "value", broken))
    assert [(one.name, one.error) for one in found.errors] == [("broken", "RuntimeError: no such kernel")]
    assert found.score(OURS).caught == 1
    assert not found.failed
    assert not found.passed


@pytest.mark.parametrize(
    ("stop", "why"),
    [
        (KeyboardInterrupt(), "the exam was interrupted"),
        (BrokenProcessPool(), "the exam lost a process, which was killed or ran out of memory"),
    ],
)
def test_an_exam_cut_short_has_what_it_judged_and_is_no_pass(
    monkeypatch: pytest.MonkeyPatch, stop: BaseException, why: str
) -> None:
    perform = pool._perform
    performed: list[Any] = []

    def once(task: Any) -> Any:
        if len(performed) == 3:
            raise stop
        performed.append(task)
        return perform(task)

    monkeypatch.setattr(pool, "_COMBINATIONS_PER_TASK", 5)
    # Combinations in three parts, the others in six or seven.
    effort = dataclasses.replace(SHORT, single=Cases(2, 2, 50), random_single=12, together=8)
    whole = take(effort, stage="greedy_sample", lane="eager", processes=1)
    monkeypatch.setattr(pool, "_perform", once)
    found = take(effort, stage="greedy_sample", lane="eager", processes=1)
    assert [one.id for one in found.standings] == [one.id for one in whole.standings]
    judged = {name for task in performed for name in task.ids}
    assert judged
    assert [one for one in found.standings if one.id in judged] == [one for one in whole.standings if one.id in judged]
    assert {one.id for one in found.errors} == {one.id for one in found.standings} - judged
    assert {one.error for one in found.errors} == {why}
    assert whole.passed
    assert not found.passed
    assert not found.failed
    assert "could not be judged" in exam_table.render(found)
    assert why in exam_page.render(found)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """In the background of a script an interrupt is ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("interrupted", [True, False])
def test_an_interrupt_while_the_exam_is_kept_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals, interrupted: bool
) -> None:
    """The second one of an exam that was interrupted, or the first one at its end."""
    perform, performed, write = pool._perform, itertools.count(), results.write_json

    def perform_some(task: Any) -> Any:
        if interrupted and next(performed) == 3:
            os.kill(os.getpid(), number)
        return perform(task)

    def interrupted_write(found: Exam, path: Path) -> None:
        os.kill(os.getpid(), number)
        write(found, path)

    monkeypatch.setitem(EFFORTS, "quick", dataclasses.replace(EFFORTS["quick"], together=8))
    monkeypatch.setattr(pool, "_perform", perform_some)
    monkeypatch.setattr(results, "write_json", interrupted_write)
    before = signal.getsignal(number)
    words = ["exam", "--stage", "greedy_sample", "--lane", "eager", "--processes", "1", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == (128 + number if interrupted else 0), done.output
    assert ("could not be judged" in done.output) == interrupted
    found = results.read_json(tmp_path / "out" / "exam.json")
    assert {one.error for one in found.errors} == ({"the exam was interrupted"} if interrupted else set())
    assert len(found.faults) == (24 if interrupted else 48)  # three parts of eight
    assert (tmp_path / "out" / "exam.html").exists()
    assert signal.getsignal(number) == before


def test_an_exam_that_is_interrupted_leaves_no_process_behind() -> None:
    def interrupt(done: int, total: int, wrong: int) -> None:
        raise KeyboardInterrupt

    found = take(SHORT, stage="greedy_sample", lane="eager", processes=2, progress=interrupt)
    assert {one.error for one in found.errors} == {"the exam was interrupted"}
    assert any(not one.error for one in found.standings)
    for _ in range(100):  # the pool's own thread may be joining them too
        if not multiprocessing.active_children():
            break
        time.sleep(0.1)
    assert multiprocessing.active_children() == []


def _die(task: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_exam_that_loses_a_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_perform", _die)
    found = take(SHORT, stage="greedy_sample", lane="eager", processes=2)
    assert {one.error for one in found.standings} == {"the exam lost a process, which was killed or ran out of memory"}


def test_what_was_kept_stays_whole_if_it_cannot_be_kept_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results.write_json(Exam(SHORT, 7, [], {}), tmp_path / "exam.json")

    def full(self: Path, data: str, **options: Any) -> int:
        self.write_bytes(data[:10].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        results.write_json(Exam(SHORT, 8, [], {}), tmp_path / "exam.json")
    assert results.read_json(tmp_path / "exam.json").seed == 7


def test_an_exam_that_cannot_be_kept_at_all_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(self: Path, data: str, **options: Any) -> int:
        self.write_bytes(data[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    words = ["exam", "--stage", "greedy_sample", "--lane", "eager", "--processes", "1", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 3, done.output
    assert "PASSED: 48 of 48 faulty kernels caught" in done.output
    assert f"cannot keep the exam in {tmp_path / 'out'}: No space left on device; the table above is all" in done.output
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_while_the_results_are_put_together_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    deepcopy, interrupts = copy.deepcopy, iter([KeyboardInterrupt()])

    def interrupted_once(one: Any) -> Any:
        for interrupt in interrupts:
            raise interrupt
        return deepcopy(one)

    whole = take(SHORT, stage="greedy_sample", lane="eager", processes=1)
    monkeypatch.setattr(pool, "copy", SimpleNamespace(deepcopy=interrupted_once))
    found = take(SHORT, stage="greedy_sample", lane="eager", processes=1)
    assert next(interrupts, None) is None
    assert found.standings == whole.standings
    assert not found.errors


@pytest.mark.usefixtures("interruptible")
def test_an_exam_that_is_interrupted_before_it_begins_could_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted() -> list[KnownKernel]:
        os.kill(os.getpid(), signal.SIGINT)
        return []

    monkeypatch.setattr(efforts, "catalogue", interrupted)
    done = CliRunner().invoke(main, ["exam", "--stage", "greedy_sample"])
    assert (done.exit_code, done.output) == (130, "interrupted before anything was judged\n")


KILLED = """
import multiprocessing, os, signal, sys
from conformance.exam import efforts, pool

def told(done, total, wrong):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    pool.take(efforts.EFFORTS["quick"], stage="greedy_sample", lane="eager", processes=2, progress=told)
"""


def test_workers_of_an_exam_that_was_killed_end(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    done = subprocess.run([sys.executable, tmp_path / "killed.py"], capture_output=True, text=True, timeout=120)
    workers = [int(number) for number in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL
    assert len(workers) == 2
    for _ in range(300):
        running = [number for number in workers if alive(number)]
        if not running:
            return
        time.sleep(0.1)
    pytest.fail(f"still running after 30 s: {running}")


def test_an_exam_that_cannot_be_kept_meanwhile_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write, written = results.write_json, itertools.count()

    def seldom(found: Exam, path: Path) -> None:
        if next(written) == 0:
            raise OSError(28, "No space left on device")
        write(found, path)

    monkeypatch.setattr(pool, "KEPT_EVERY", -1.0)
    monkeypatch.setattr(results, "write_json", seldom)
    words = ["exam", "--stage", "greedy_sample", "--lane", "eager", "--processes", "1", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "so far: No space left on device" in done.output
    assert results.read_json(tmp_path / "out" / "exam.json").passed


def test_a_share_of_all_faults_of_layers_may_be_missed_however_few_were_judged_yet() -> None:
    def fault(number: int, error: str = "") -> KernelResult:
        return KernelResult(
            f"decode_layer/{number}", "decode_layer", str(number), "eager", "value", "", trials=0 if error else 9, error=error
        )

    missed, caught = fault(0), [fault(number) for number in range(1, 20)]
    for one in caught:
        one.rejected = {OURS: 1}
    yet = [fault(number, "the exam was interrupted") for number in range(20, 40)]
    assert not Exam(SHORT, 0, [missed, *caught, *yet], {}).failed
    assert Exam(SHORT, 0, [missed, *caught], {}).failed


def test_an_exam_is_kept_while_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_COMBINATIONS_PER_TASK", 5)
    # Combinations in three parts, the others in six or seven.
    effort = dataclasses.replace(SHORT, single=Cases(2, 2, 50), random_single=12, together=8)
    whole = take(effort, stage="greedy_sample", lane="eager", processes=1)
    monkeypatch.setattr(pool, "KEPT_EVERY", -1.0)
    kept: list[Exam] = []
    found = take(effort, stage="greedy_sample", lane="eager", processes=1, keep=kept.append)
    assert len(kept) > 3
    unjudged = [len(one.errors) for one in kept]
    assert unjudged == sorted(unjudged, reverse=True)
    assert unjudged[0] > unjudged[-1] == 0
    assert found.standings == kept[-1].standings == whole.standings  # to keep it changes nothing
    combinations = [standing.trials for one in kept for standing in one.standings if standing.name == "random_combinations"]
    assert sorted(set(combinations)) == [0, 5, 10, 12]
    assert not any(one.failed for one in kept)
    assert not any(one.passed for one in kept[:-1] if one.errors)


def test_a_rejection_counts_though_the_rest_was_not_judged() -> None:
    part = KernelResult("greedy_sample/random", "greedy_sample", "random", "eager", None, "", error="the exam was interrupted")
    found = Exam(SHORT, 0, [part], {})
    assert not found.failed
    part.trials, part.rejected = 250, {OURS: 1}
    assert found.failed


def test_a_full_exam_judges_a_legal_layer_on_as_many_cases_as_a_check_puts_together() -> None:
    effort, known = EFFORTS["full"], {one.id: one for one in efforts.catalogue()}
    assert effort.cases(known["decode_layer/hugging_face_half_away"]).legal >= stage_named("decode_layer").examples
    assert effort.cases(known["decode_layer/queries_truncated"]) is effort.composite
    assert effort.cases(known["rms_norm/half_away"]) is effort.single
    interpreted = next(one for one in known.values() if one.lane == "interpret")
    assert effort.cases(interpreted) is effort.interpreted


def test_a_legal_kernel_and_a_faulty_one_have_their_own_numbers_of_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    found = of(monkeypatch, RIGHT, GAIN, effort=dataclasses.replace(SHORT, single=Cases(2, 5, 9)))
    assert {one.name: one.trials for one in found.standings if one.name in ("gain", "right")} == {"gain": 2, "right": 5}
    words = " ".join(exam_table.render(found).split())
    assert "Examples of a faulty kernel: 2 to 9 of single stages" in words
    assert "Of a legal one: 5 of single stages" in words


def test_another_seed_draws_other_combinations() -> None:
    from conformance.kernels.qwen3.exam.torch.catalogue import random_variant
    from conformance.kernels.qwen3.exam.torch.choices import random_choices

    def drawn(seed: int) -> list[Any]:
        made = [random_variant("decode_layer", index, seed).make for index in range(3)]
        return [one.args[1] for one in made if isinstance(one, functools.partial)]

    assert len(drawn(0)) == 3
    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(1)[2] == random_choices("decode_layer", "1/2")


def test_only_what_the_first_run_shows_is_shown_in_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Any:
        calls = []
        right = torch_kernel("rms_norm")

        @conformance.kernel("rms_norm")
        def every_second_time(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, dims: Any) -> None:
            calls.append(1)
            right(x, weight, out, dims=dims)
            if len(calls) == 2:
                out.mul_(2)

        return every_second_time

    found = of(monkeypatch, RIGHT, GAIN, subject("at_the_second_run", "nondeterminism", make))
    shown = {one.name: one.in_outputs for one in found.faults}
    assert shown["at_the_second_run"] == 0
    assert shown["gain"] == next(one for one in found.faults if one.name == "gain").rejected[OURS]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(main, ["exam", "--stage", "greedy_sample", "--out", str(tmp_path / "file")])
    assert done.exit_code == 2
    assert "cannot write to" in done.output


def test_a_policy_makes_faults_legal_that_are_what_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded_tables = next(one for one in efforts.catalogue() if one.id == "rope/bf16_tables")
    theta = next(one for one in efforts.catalogue() if one.id == "rope/theta_1e4")
    effort = dataclasses.replace(SHORT, single=Cases(3, 3, 9), random_single=2)
    monkeypatch.setattr(efforts, "catalogue", lambda: [rounded_tables, theta])
    under, as_usual = (take(effort, precision=policy, processes=1) for policy in ("torch_bf16", "contract"))
    assert [one.name for one in as_usual.faults] == ["bf16_tables", "theta_1e4"]
    assert not as_usual.made_legal
    assert as_usual.passed
    # Judged like any legal kernel: a policy that did not cover what it does would fail the exam.
    assert [one.name for one in under.made_legal] == ["bf16_tables"]
    assert [one.name for one in under.faults] == ["theta_1e4"]
    assert under.passed
    again = Exam.from_json(json.loads(json.dumps(under.to_json())))
    assert (again.precision, again.made_legal) == ("torch_bf16", under.made_legal)
    told = " ".join(exam_table.render(under).split())
    assert "Faults that precision torch_bf16 makes legal: 1 rope bf16_tables: precision: RoPE tables are kept in bf16" in told
    assert "Faults that this precision makes legal" in exam_page.render(under)
    assert "--precision torch_bf16" in exam_page.render(under)
    with pytest.raises(UsageError, match="no kernel of stage any in lane any under precision bf16"):
        take(effort, precision="bf16", processes=1)
