"""One kernel of known verdict, judged case by case by our rule and by those that others use.

Every kernel goes the way of any kernel (``check.judged_runs`` on stratified cases, then the proofs of what it declares). The
other rules look at the first run of the same cases.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.cases.space import Space
from conformance.errors import UsageError
from conformance.exam.known_kernels import KnownKernel
from conformance.exam.results import OURS, Cost, KernelResult, trials_for
from conformance.exam.rules import RULES, Compared
from conformance.judge.judgement import judge
from conformance.judge.oracle import Oracle
from conformance.lanes import lane_named
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import bits
from conformance.lanes.messages import Passes
from conformance.numerics.arithmetic import CONTRACT, EXACT, Arithmetic
from conformance.running.check import capability_runs, judged_runs, pooled_run
from conformance.running.plans import Plans, RunPlan
from conformance.running.runners import eager_runner, worker_runner
from conformance.running.runs import MOST_LOST, Judged, Runner, is_lost

#: A result of ordinary torch code in the low precision: every intermediate in bf16.
ROUGH = Arithmetic(torch.bfloat16, rounds=False)


#: How many rejected legal runs are kept with their cases.
MOST_REJECTIONS = 5


#: Detectors that need more than the outputs of one run: no rule that compares outputs could stand in for them.
BEYOND_OUTPUTS = frozenset(
    {"changed_input", "out_of_bounds", "nondeterministic", "compiler_pass", "unwritten_read", "capability"}
)


class Trial:
    """One case with what its runs are compared with, made when first asked for: it serves every subject of a stage."""

    def __init__(self, key: CaseKey) -> None:
        self.key = key
        self._compared: dict[str, dict[str, torch.Tensor]] | None = None

    @functools.cached_property
    def oracle(self) -> Oracle:
        """What a correct kernel may return."""
        return Oracle(make_case(self.key))

    @property
    def case(self) -> Case:
        """The case itself."""
        return self.oracle.case

    def compared(self, outcome: Outcome) -> Iterator[Compared]:
        """What the other rules look at: every output; of a cache the rows that had to be written, and those that were."""
        case = self.case
        if self._compared is None:
            arithmetics = {"golden": CONTRACT, "exact": EXACT, "rough": ROUGH}
            self._compared = {
                name: case.stage.reference(case.inputs, case.dims, arithmetic) for name, arithmetic in arithmetics.items()
            }
        written = self.oracle.bounds(case.stage.profiles[0])
        for argument in case.stage.outputs:
            found = outcome.outputs[argument.name]
            golden, exact, rough = (self._compared[name][argument.name] for name in ("golden", "exact", "rough"))
            kept: torch.Tensor | slice = slice(None)
            if argument.access == "io":
                # The garbage in rows that nobody may look at would drown the rest in every rule that takes the tensor as a whole.
                rows = (bits(found) != bits(case.inputs[argument.name])).any(-1)
                rows[written[argument.name].rows] = True
                kept = rows
            yield Compared(
                argument.name,
                found[kept],
                golden[kept].to(argument.dtype),
                exact[kept].to(torch.float64),
                rough[kept].to(argument.dtype),
            )


#: A kernel that is interpreted is run once a case; of a single stage the last compiler pass is compared as well.
_INTERPRETED = {False: RunPlan(), True: RunPlan(passes="none")}


class _Watched:
    """A runner that keeps the first outcome, for the other rules to look at."""

    def __init__(self, run: Runner) -> None:
        self._run = run
        self.first: Outcome | None = None

    def __call__(self, case: Case, passes: Passes = "last") -> Outcome:
        outcome = self._run(case, passes)
        if self.first is None:
            self.first = outcome
        return outcome


def judge_known_kernel(
    subject: KnownKernel,
    trials: Iterable[Trial],
    least: int,
    space: Space,
    costs: dict[str, Cost],
    *,
    first: int = 0,
    measures: bool = False,
) -> KernelResult:
    """Judge one subject on ``least`` trials, and on more until it is found and named, or its power measured, if it is faulty.

    ``first`` is the number of the first trial, by which its row checks are chosen. Whatever goes wrong is this subject's error.
    """
    result = KernelResult.of(subject)
    try:
        _judge_trials(subject, result, trials, least, space, costs, first, measures)
    except Exception as error:
        what = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
        result.error = f"{what}{error}".split("\n", 1)[0]
    if not result.trials and not result.error:
        result.error = "the kernel took none of the cases"
    return result


def _judge_trials(
    subject: KnownKernel,
    result: KernelResult,
    trials: Iterable[Trial],
    least: int,
    space: Space,
    costs: dict[str, Cost],
    first: int,
    measures: bool,
) -> None:
    kernel = subject.make()
    # A torch kernel runs here: none of the catalogue takes its process down, and a process each would take an hour.
    in_process = lane_named(subject.lane).in_process
    runner = eager_runner(kernel) if in_process else worker_runner(kernel, subject.lane)
    kernel = kernel.declaring(precision=subject.precision)
    lost, plans = 0, Plans(subject.lane, kernel.stage, first)
    judged: list[Judged] = []
    with runner as run:
        for trial in trials:
            if result.trials >= least:
                settled = _is_settled(result, measures) if result.first else _show_together(result, judged)
                if subject.legal or (settled and result.names(result.detectors)):
                    break
            if kernel.refusal(trial.case.dims) is not None:
                continue
            watched = _Watched(run)
            plan = plans.following(trial.key)
            if not in_process:
                plan = dataclasses.replace(_INTERPRETED[kernel.stage.composite], signatures=plan.signatures)
            runs: list[Judged] = []
            for one in judged_runs(kernel, trial.key, watched, plan, oracle=trial.oracle):
                runs.append(one)
                if not one.verdict.ok:
                    break  # it is found: what a repeat would add is not counted
            judged += runs
            assert watched.first is not None
            _count(result, trial, watched.first, runs, costs, plan, kernel.judged_by)
            lost += sum(map(is_lost, runs))
            if lost >= MOST_LOST:
                break
        if not result.first:
            _show_together(result, judged)
        if kernel.capabilities and not result.first:
            proofs = list(capability_runs(kernel, space, run, subject.lane, judged))
            refuted = [finding for proof in proofs for finding in proof.verdict.findings]
            if refuted:
                result.first = result.trials
                result.rejected[OURS] = 1
                result.detectors = ["capability"]
                result.unnamed = not result.names(result.detectors)
                result.rejections = [refuted[0].message]


def _show_together(result: KernelResult, judged: Sequence[Judged]) -> bool:
    """Whether what no trial shows by itself is shown by all so far, which counts as one trial rejected."""
    for one in pooled_run(judged):
        if one.verdict.ok:
            result.share = max(result.share, one.verdict.share or 0.0)
        else:
            finding = one.verdict.findings[0]
            result.first = result.trials
            result.rejected[OURS] = 1
            result.in_outputs = 1  # whoever compares outputs had all of these to go by
            result.detectors = [finding.detector]
            result.unnamed = not result.names(result.detectors)
            result.rejections = [f"{one.case} ({one.check}): {finding.detector}: {finding.message}"]
    return result.first > 0


def _is_settled(result: KernelResult, measures: bool) -> bool:
    """Whether a fault that was found was judged on as many cases as its power so far asks for, if that is measured."""
    return not (measures and result.has_power) or trials_for(result.regimes) <= result.trials


def _count(
    result: KernelResult,
    trial: Trial,
    outcome: Outcome,
    runs: Sequence[Judged],
    costs: dict[str, Cost],
    plan: RunPlan,
    declared: Mapping[str, Any],
) -> None:
    """Add one trial to a result, and its cost if the kernel, which declares this of its numbers, is a legal one."""
    result.trials += 1
    regime = result.regimes.setdefault(trial.key.regime, [0, 0])
    regime[0] += 1
    findings = [(run, finding) for run in runs for finding in run.verdict.findings]
    if findings:
        regime[1] += 1
        result.rejected[OURS] = result.rejected.get(OURS, 0) + 1
        result.first = result.first or result.trials
        result.in_outputs += any(run.check == "example" and finding.detector not in BEYOND_OUTPUTS for run, finding in findings)
        fired = dict.fromkeys(finding.detector for _, finding in findings)
        result.detectors += [name for name in fired if name not in result.detectors]
        result.unnamed += not result.names(fired)
        if result.legal and len(result.rejections) < MOST_REJECTIONS:
            run, finding = findings[0]
            result.rejections.append(f"{run.case} ({run.check}): {finding.detector}: {finding.message}")
    else:
        result.share = max([result.share, *(run.verdict.share or 0.0 for run in runs)])
    compared = list(trial.compared(outcome)) if outcome.outputs else []  # a kernel that is compiled only leaves none
    for rule in RULES:
        began = time.perf_counter()
        accepted = outcome.status == "ok" and all(rule.accepts(one) for one in compared)
        if result.legal and compared:
            costs[rule.name].add(Cost(time.perf_counter() - began, 1))
        if not accepted:  # a kernel that did not come to its end is seen by everyone
            result.rejected[rule.name] = result.rejected.get(rule.name, 0) + 1
    if result.legal and compared:
        began = time.perf_counter()
        # Once more: bounds are there now, as goldens are for the others.
        judge(trial.case, outcome, oracle=trial.oracle, signatures=plan.signatures, **declared)
        costs[OURS].add(Cost(time.perf_counter() - began, 1))
