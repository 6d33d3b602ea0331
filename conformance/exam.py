"""The harness takes an exam: kernels whose verdict is known are judged, by our rule and by the rules that others use.

Every kernel goes the way of any kernel (``checking.judged_runs`` on stratified cases, then the proofs of what it declares). The
other rules look at the first run of the same cases. What comes of it is data, from which ``reports.exam`` makes a table and a
page.
"""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from conformance.arithmetic import CONTRACT, EXACT, Arithmetic
from conformance.buffers import bits
from conformance.cases import Case, CaseKey, Space, make_case, stratified_keys
from conformance.checking import (
    MOST_LOST,
    Judged,
    Plans,
    Runner,
    RunPlan,
    capability_runs,
    eager_runner,
    is_lost,
    judged_runs,
    pooled_run,
    worker_runner,
)
from conformance.contract import Stage, models, stage_named, stages
from conformance.declaration import load_module
from conformance.errors import UsageError
from conformance.executors.base import Outcome
from conformance.executors.messages import Passes
from conformance.faults.catalogue import random_variant, subjects
from conformance.faults.subject import Subject
from conformance.judge import Oracle, judge
from conformance.rules import RULES, Compared

#: What our own rule is called in tables.
OURS = "conformance"
#: A result of ordinary torch code in the low precision: every intermediate in bf16.
ROUGH = Arithmetic(torch.bfloat16, rounds=False)
#: How many rejected legal runs are kept with their cases.
MOST_REJECTIONS = 5
#: Seconds between two times that an exam so far is kept.
KEPT_EVERY = 60.0
#: How many interpreted kernels, or compiled ones, there are to each one of a sample: every one needs a process of its own, which
#: takes seconds.
INTERPRETED_SAMPLE = 16
#: Detectors that need more than the outputs of one run: no rule that compares outputs could stand in for them.
BEYOND_OUTPUTS = frozenset(
    {"changed_input", "out_of_bounds", "nondeterministic", "compiler_pass", "unwritten_read", "capability"}
)
#: Layers and chains may miss so much of their faults: what lies below their composed rounding noise.
COMPOSITE_TARGET = 0.97
#: Probability with which the stated number of examples shows a fault.
CONFIDENCE = 0.999
#: An exam that measures power fails where a stage's own number of examples shows a fault with less than this. It is less than
#: ``CONFIDENCE`` because the same power, measured on the cases of another seed, comes out a little differently.
LEAST_CONFIDENCE = 0.99


@dataclasses.dataclass(frozen=True)
class Cases:
    """How many cases a faulty kernel is judged on at least, a legal one, and any at most."""

    faulty: int
    legal: int
    most: int


@dataclasses.dataclass(frozen=True)
class Effort:
    """How many cases a kernel is judged on, by kind of stage and lane, and how many random combinations of legal choices.

    A faulty kernel is judged on more than its least number until our rule has found it, which the other rules see as well. Where
    ``measures`` is set, a faulty torch kernel is judged until it has had as many cases as its power so far asks for
    (``trials_for``): the one whose power is poor is measured longest.
    The catalogue has a fault or a variant in every stage to which it means something; a ``sample`` has it once among the single
    stages and once among the composite ones, and one in ``INTERPRETED_SAMPLE`` of the others, faulty and legal ones of each lane.
    Up to ``together`` torch kernels are judged by one task, which makes their cases and oracles once; what a task has judged is
    kept when it ends.
    """

    name: str
    sample: bool
    measures: bool
    single: Cases
    composite: Cases
    interpreted: Cases
    random_single: int
    random_composite: int
    together: int

    def cases(self, subject: Subject) -> Cases:
        """The numbers that hold for one subject."""
        if subject.lane != "eager":
            return self.interpreted
        return self.composite if stage_named(subject.stage).composite else self.single

    def random(self, stage: Stage) -> int:
        """Random legal combinations of a stage, each on a case of its own."""
        return self.random_composite if stage.composite else self.random_single


EFFORTS: dict[str, Effort] = {
    # A few cases each: the random combinations of a single stage see all its regimes, the legal kernels of all layers and chains
    # between them. What is faulty and not found has up to 50, as many as a check has by default; of a layer 18, which are dear.
    "quick": Effort(
        "quick",
        sample=True,
        measures=False,
        single=Cases(3, 6, 50),
        composite=Cases(2, 3, 18),
        interpreted=Cases(1, 1, 12),
        random_single=20,
        random_composite=2,
        together=128,
    ),
    # Of each single stage 10,000 random combinations; of all layers and chains as many legal runs, named variants included, which
    # have as many cases as a check, because that judges all of them together as well.
    # Power of layers is told by 60 cases at most, which is what a check takes: what they show seldom they may miss anyway.
    "full": Effort(
        "full",
        sample=False,
        measures=True,
        single=Cases(22, 22, 330),
        composite=Cases(18, 60, 60),
        interpreted=Cases(4, 4, 36),
        random_single=10_000,
        random_composite=100,
        together=32,
    ),
}


@dataclasses.dataclass
class Standing:
    """What came of one subject. Counts are of trials: a trial is one case, with the repeats and row checks that belong to it."""

    id: str
    stage: str
    name: str
    lane: str
    kind: str | None
    summary: str
    hidden: str = ""
    trials: int = 0
    #: By rule, how many trials it rejected. A capability that does not hold counts as one trial of ours.
    rejected: dict[str, int] = dataclasses.field(default_factory=dict)
    #: By regime, trials and those that our rule rejected.
    regimes: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    #: Trials whose first run, which is all that the other rules see, shows the fault in its outputs.
    in_outputs: int = 0
    #: The detectors of ours that fired.
    detectors: list[str] = dataclasses.field(default_factory=list)
    #: The first trial that our rule rejected, counted from 1; 0 if none was.
    first: int = 0
    #: The largest share of the allowance that a run which passed used.
    share: float = 0.0
    #: The first rejected cases of a legal variant, or the one that tells most of a fault that all cases show together; with what
    #: was found.
    rejections: list[str] = dataclasses.field(default_factory=list)
    #: Why the subject could not be judged, if so.
    error: str = ""

    @classmethod
    def of(cls, subject: Subject, error: str = "") -> Standing:
        """That of a subject before its first trial."""
        about = subject.id, subject.stage, subject.name, subject.lane, subject.kind, subject.summary, subject.hidden
        return cls(*about, error=error)

    @property
    def legal(self) -> bool:
        """Whether the kernel must pass."""
        return self.kind is None

    @property
    def composite(self) -> bool:
        """Whether the stage is a layer or a chain of layers."""
        return stage_named(self.stage).composite

    @property
    def has_power(self) -> bool:
        """Whether data show the fault: one that comes and goes from call to call is shown by repeats.

        Interpreted kernels are run once a case and have fewer cases: they say nothing of the number of examples.
        """
        return self.lane == "eager" and self.kind != "nondeterminism"

    def caught_by(self, rule: str) -> bool:
        """Whether the rule rejected any trial."""
        return self.rejected.get(rule, 0) > 0


@dataclasses.dataclass
class Cost:
    """Seconds that judging took, bounds and goldens given, over ``runs`` runs of legal kernels."""

    seconds: float = 0.0
    runs: int = 0

    def add(self, other: Cost) -> None:
        """Take another's runs in."""
        self.seconds += other.seconds
        self.runs += other.runs


@dataclasses.dataclass
class Exam:
    """Everything that came of an exam."""

    effort: Effort
    seed: int
    standings: list[Standing]
    costs: dict[str, Cost]
    seconds: float = 0.0

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules that were examined, ours first."""
        return (OURS, *(rule.name for rule in RULES))

    @property
    def faults(self) -> list[Standing]:
        """Faulty kernels that could be judged and that their lane can show."""
        return [one for one in self.standings if not one.legal and not one.hidden and not one.error]

    @property
    def variants(self) -> list[Standing]:
        """Legal kernels that were judged, if not all to their end: a rejection counts whatever came after it."""
        return [one for one in self.standings if one.legal and one.trials]

    @property
    def hidden(self) -> list[Standing]:
        """Faults that their lane cannot show by its nature."""
        return [one for one in self.standings if one.hidden]

    @property
    def errors(self) -> list[Standing]:
        """Subjects that could not be judged."""
        return [one for one in self.standings if one.error]

    def missed(self, rule: str = OURS) -> list[Standing]:
        """Faults that no trial showed to a rule."""
        return [one for one in self.faults if not one.caught_by(rule)]

    def score(self, rule: str) -> Score:
        """Of one rule: faults and legal runs together."""
        faults, variants = self.faults, self.variants
        cost = self.costs.get(rule, Cost())
        return Score(
            rule,
            caught=sum(one.caught_by(rule) for one in faults),
            faults=len(faults),
            caught_trials=sum(min(one.rejected.get(rule, 0), one.trials) for one in faults),
            fault_trials=sum(one.trials for one in faults),
            rejected_variants=sum(one.caught_by(rule) for one in variants),
            variants=len(variants),
            rejected_trials=sum(one.rejected.get(rule, 0) for one in variants),
            legal_trials=sum(one.trials for one in variants),
            milliseconds=1000 * cost.seconds / cost.runs if cost.runs else math.nan,
        )

    @property
    def layer_faults(self) -> int:
        """How many faults of layers and chains there are: of these a share may be missed.

        Those that could not be judged are among them: an exam with such faults has not passed anyway.
        """
        return sum(one.composite and not one.legal and not one.hidden for one in self.standings)

    @property
    def failed(self) -> bool:
        """Whether a legal kernel was rejected, a fault of a single stage missed or hardly shown, or too many of layers missed."""
        missed = self.missed()
        of_layers = sum(one.composite for one in missed)
        too_many = len(missed) > of_layers or of_layers > (1 - COMPOSITE_TARGET) * self.layer_faults
        return too_many or bool(self.too_few_examples()) or any(one.caught_by(OURS) for one in self.variants)

    @property
    def passed(self) -> bool:
        """Whether both faults and legal kernels were judged, all of them, and rightly."""
        return bool(self.faults and self.variants) and not self.errors and not self.failed

    def examples_needed(self, confidence: float = CONFIDENCE) -> dict[str, tuple[int, str]]:
        """By stage, how many stratified examples show every fault of the catalogue with ``confidence``, and the dearest fault.

        From the measured power in each regime, since stratified examples go round the regimes. Faults that were never caught
        say nothing about a number and are left out: they are listed as missed. So are those that have no power (``has_power``).
        Empty if the exam measures no power: a few cases say next to nothing about it.
        """
        needed: dict[str, tuple[int, str]] = {}
        for one in self.faults if self.effort.measures else ():
            if one.has_power and any(caught for _, caught in one.regimes.values()):
                needed[one.stage] = max(needed.get(one.stage, (0, "")), (trials_for(one.regimes, confidence), one.name))
        return needed

    def too_few_examples(self) -> dict[str, str]:
        """The single stages whose own number of examples is too small by what this exam measured, and the fault that shows it.

        Layers and chains may miss some faults, so one that they show seldom is no reason.
        """
        needed = self.examples_needed(LEAST_CONFIDENCE)
        given = {name: stage_named(name) for name in needed}
        return {name: needed[name][1] for name, one in given.items() if not one.composite and needed[name][0] > one.examples}

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads."""
        return {
            "effort": dataclasses.asdict(self.effort),
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "costs": {name: dataclasses.asdict(cost) for name, cost in self.costs.items()},
            "standings": [dataclasses.asdict(one) for one in self.standings],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Exam:
        """The inverse of ``to_json``."""
        cases = {name: Cases(**data["effort"][name]) for name in ("single", "composite", "interpreted")}
        return cls(
            Effort(**{**data["effort"], **cases}),
            data["seed"],
            [Standing(**one) for one in data["standings"]],
            {name: Cost(**cost) for name, cost in data["costs"].items()},
            data["seconds"],
        )


@dataclasses.dataclass(frozen=True)
class Score:
    """How one rule did. A fault is caught if any of its trials is rejected, a variant is rejected likewise."""

    rule: str
    caught: int
    faults: int
    caught_trials: int
    fault_trials: int
    rejected_variants: int
    variants: int
    rejected_trials: int
    legal_trials: int
    milliseconds: float


def trials_for(regimes: Mapping[str, Sequence[int]], confidence: float = CONFIDENCE) -> int:
    """How many trials that go round the regimes show a fault with this probability, from ``(trials, caught)`` by regime.

    A rate is taken as ``caught / (trials + 1)``: no finite number of trials proves that a regime always shows a fault, and
    none is credited where nothing was caught.
    """
    rates = [caught / (trials + 1) for trials, caught in regimes.values() if trials]
    if not rates or max(rates) == 0:
        raise ValueError("a fault that was never caught has no number of examples")
    each_round = sum(math.log1p(-rate) for rate in rates)
    return max(1, math.ceil(math.log(1 - confidence) / each_round * len(rates)))


def catalogue() -> list[Subject]:
    """Every kernel of the exam: torch kernels, and those that the models bring for other lanes."""
    found = list(subjects())
    for model in models():
        for name in model.exam_modules:
            found += load_module(name).SUBJECTS
    return found


def chosen_subjects(effort: Effort, stage: str | None = None, lane: str | None = None) -> list[Subject]:
    """The kernels that an exam judges, of one stage or one lane only; raises ``UsageError`` if there are none.

    Where a fault is sampled, its stage follows from its name, so that all stages come up.
    """
    if stage is not None:
        stage_named(stage)
    found = [one for one in catalogue() if stage in (None, one.stage) and lane in (None, one.lane)]
    if not found:
        raise UsageError(f"the exam has no kernel of stage {stage or 'any'} in lane {lane or 'any'}")
    if not effort.sample or stage is not None:
        return found
    alike: dict[tuple[str, bool], list[Subject]] = collections.defaultdict(list)
    others: dict[tuple[str, bool], list[Subject]] = collections.defaultdict(list)
    for one in found:
        if one.lane == "eager":
            alike[one.name, stage_named(one.stage).composite].append(one)
        else:
            others[one.lane, one.legal].append(one)
    sample = [group[_number(name) % len(group)] for (name, _), group in alike.items()]
    for group in others.values():
        sample += sorted(group, key=lambda one: _number(one.id))[: math.ceil(len(group) / INTERPRETED_SAMPLE)]
    return sample


def _number(name: str) -> int:
    """A number that follows from a name, the same everywhere."""
    return zlib.crc32(name.encode())


def take(
    effort: Effort,
    *,
    seed: int = 0,
    stage: str | None = None,
    lane: str | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep: Callable[[Exam], None] | None = None,
) -> Exam:
    """Judge the catalogue; what comes of it follows from ``seed``.

    ``progress`` is told how many tasks are done, of how many. ``keep`` is given the exam so far as a task ends, if it was not for
    ``KEPT_EVERY`` seconds. An exam that is interrupted (``KeyboardInterrupt``), or loses a process, returns what it has. In both,
    a subject that was not judged to its end is an error, so that neither is a pass.
    """
    began = kept = time.monotonic()
    # Those of layers first, which are the longest, so that no process ends alone with one.
    tasks = sorted(
        _tasks(chosen_subjects(effort, stage, lane), effort, seed), key=lambda task: not stage_named(task.stage).composite
    )
    workers = min(processes or os.cpu_count() or 1, len(tasks))
    results: dict[int, _Result] = {}

    def so_far(missing: str) -> Exam:
        standings: dict[str, Standing] = {}
        costs: dict[str, Cost] = collections.defaultdict(Cost)
        for number, task in enumerate(tasks):  # not in the order in which processes ended
            result = results.get(number) or _not_judged(task, missing)
            for one in result.standings:
                # The random combinations of a stage come in several parts.
                if one.id in standings:
                    _join(standings[one.id], one)
                else:
                    standings[one.id] = copy.deepcopy(one)  # others are added to it, at every time that the exam is kept
            for name, cost in result.costs.items():
                costs[name].add(cost)
        return Exam(effort, seed, list(standings.values()), dict(costs), time.monotonic() - began)

    missing = ""
    try:
        for number, result in _results(tasks, workers):
            results[number] = result
            if progress is not None:
                progress(len(results), len(tasks))
            if keep is not None and time.monotonic() - kept > KEPT_EVERY:
                kept = time.monotonic()
                keep(so_far("the exam had not come to it"))
    except KeyboardInterrupt:
        missing = "the exam was interrupted"
    except concurrent.futures.BrokenExecutor:
        missing = "the exam lost a process, which was killed or ran out of memory"
    try:
        return so_far(missing)
    except KeyboardInterrupt:  # what there is to judge has been judged
        return so_far(missing)


# Tasks


@dataclasses.dataclass(frozen=True)
class _Task:
    """Subjects of one stage, lane and size, by their ids; or random combinations ``first`` to ``last`` of a stage."""

    stage: str
    effort: Effort
    seed: int
    ids: tuple[str, ...] = ()
    first: int = 0
    last: int = 0


@dataclasses.dataclass
class _Result:
    standings: list[Standing]
    costs: dict[str, Cost]


#: Random combinations that one task judges.
_COMBINATIONS_PER_TASK = 250


def _tasks(chosen: Sequence[Subject], effort: Effort, seed: int) -> Iterator[_Task]:
    def alike(one: Subject) -> tuple[bool, str, str, str]:
        return one.lane == "eager", one.stage, one.lane, str(sorted(one.dims.items()))

    for (is_eager, stage, _, _), group in itertools.groupby(sorted(chosen, key=alike), key=alike):
        size = effort.together if is_eager else 1
        ids = [one.id for one in group]
        for start in range(0, len(ids), size):
            yield _Task(stage, effort, seed, tuple(ids[start : start + size]))
    for stage in dict.fromkeys(one.stage for one in chosen if one.lane == "eager"):
        count = effort.random(stage_named(stage))
        for start in range(0, count, _COMBINATIONS_PER_TASK):
            yield _Task(stage, effort, seed, first=start, last=min(start + _COMBINATIONS_PER_TASK, count))


def _results(tasks: Sequence[_Task], workers: int) -> Iterator[tuple[int, _Result]]:
    """The number and the result of every task, as they come."""
    if workers <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from enumerate(map(_perform, tasks))
        finally:
            torch.set_num_threads(threads)
        return
    others = multiprocessing.active_children()
    # Spawned: a forked child hangs in its first matrix product if the parent's thread pool was running.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    try:
        waiting = {pool.submit(_perform, task): number for number, task in enumerate(tasks)}
        for future in concurrent.futures.as_completed(waiting):
            yield waiting[future], future.result()
    finally:
        # Whoever is interrupted, or loses a process, need not wait for what has not come to its end.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()


def _begin_worker() -> None:
    """One thread; an interrupt from the terminal goes to all processes, and this one's is ended by the first, or ends with it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Of a process that is killed nobody says so, and its workers would wait for tasks for good."""
    parent.join()
    os._exit(1)


def _not_judged(task: _Task, why: str) -> _Result:
    """The subjects of a task that was not performed, as errors."""
    known = {one.id: one for one in catalogue()}
    chosen = [known[name] for name in task.ids] or [random_variant(task.stage, task.first, task.seed)]
    return _Result([Standing.of(one, why) for one in chosen], {})


def _perform(task: _Task) -> _Result:
    if not task.ids:
        return _random_combinations(task)
    known = {one.id: one for one in catalogue()}
    group = [known[name] for name in task.ids]
    space = Space.of(stage_named(task.stage), dict(group[0].dims))
    cases = task.effort.cases(group[0])
    keys = list(itertools.islice(stratified_keys(space, task.seed), cases.most))
    shelf = [Trial(key) for key in keys]  # what is made for one subject serves the others
    costs: dict[str, Cost] = collections.defaultdict(Cost)
    standings = []
    for one in group:
        least, trials = (cases.legal, _in_turn(shelf, one, cases.legal, task.seed)) if one.legal else (cases.faulty, shelf)
        standings.append(_stand(one, trials, least, space, costs, measures=task.effort.measures))
    return _Result(standings, costs)


def _in_turn(shelf: Sequence[Trial], subject: Subject, least: int, seed: int) -> list[Trial]:
    """The same cases, after the first gone on with another kind of data: ``least`` each are all kinds between them.

    A case of a layer or chain is dear, so all kernels of such a stage have the same: a stage goes on where the one before ended.
    The first case has rows to rearrange.
    """
    stage = stage_named(subject.stage)
    first, others, more = shelf[:1], shelf[1 : len(stage.regimes)], shelf[len(stage.regimes) :]
    place = list(stages()).index(stage.name) if stage.composite else _number(subject.id)
    start = (place * (least - 1) + seed) % max(1, len(others))
    return [*first, *others[start:], *others[:start], *more]


def _random_combinations(task: _Task) -> _Result:
    """Each combination on a case of its own; together they are one standing."""
    costs: dict[str, Cost] = collections.defaultdict(Cost)
    whole: Standing | None = None
    keys: dict[Space, Iterator[tuple[int, CaseKey]]] = {}
    # So that a few of each stage do not all have the first kinds of data.
    skipped = _number(f"random/{task.stage}/{task.seed}") % len(stage_named(task.stage).regimes)
    for index in range(task.first, task.last):
        variant = random_variant(task.stage, index, task.seed)
        space = Space.of(stage_named(task.stage), dict(variant.dims))
        if space not in keys:
            # Another sequence of cases than that of the named variants, and one for each geometry.
            keys[space] = enumerate(stratified_keys(space, task.seed + 1))
        key = next(key for number, key in keys[space] if number == index + skipped)
        one = _stand(variant, [Trial(key)], 1, space, costs, first=index)
        one.rejections = [f"{text} (combination {index} of seed {task.seed})" for text in one.rejections]
        if whole is None:
            whole = one
        else:
            _join(whole, one)
    return _Result([whole] if whole else [], costs)


def _join(whole: Standing, part: Standing) -> None:
    """Take the trials of another part of the same subject in."""
    if part.first and not whole.first:
        whole.first = whole.trials + part.first
    whole.trials += part.trials
    whole.in_outputs += part.in_outputs
    for name, count in part.rejected.items():
        whole.rejected[name] = whole.rejected.get(name, 0) + count
    for name, counts in part.regimes.items():
        known = whole.regimes.setdefault(name, [0, 0])
        known[0] += counts[0]
        known[1] += counts[1]
    whole.detectors += [name for name in part.detectors if name not in whole.detectors]
    whole.share = max(whole.share, part.share)
    whole.rejections = [*whole.rejections, *part.rejections][:MOST_REJECTIONS]
    whole.error = whole.error or part.error


# Trials


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


def _stand(
    subject: Subject,
    trials: Iterable[Trial],
    least: int,
    space: Space,
    costs: dict[str, Cost],
    *,
    first: int = 0,
    measures: bool = False,
) -> Standing:
    """Judge one subject on ``least`` trials, and on more until it is found, or its power measured, if it is faulty.

    ``first`` is the number of the first trial, by which its row checks are chosen. Whatever goes wrong is this subject's error.
    """
    standing = Standing.of(subject)
    try:
        _judge_trials(subject, standing, trials, least, space, costs, first, measures)
    except Exception as error:
        what = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
        standing.error = f"{what}{error}".split("\n", 1)[0]
    if not standing.trials and not standing.error:
        standing.error = "the kernel took none of the cases"
    return standing


def _judge_trials(
    subject: Subject,
    standing: Standing,
    trials: Iterable[Trial],
    least: int,
    space: Space,
    costs: dict[str, Cost],
    first: int,
    measures: bool,
) -> None:
    kernel = subject.make()
    # A torch kernel runs here: none of the catalogue takes its process down, and a process each would take an hour.
    runner = eager_runner(kernel) if subject.lane == "eager" else worker_runner(kernel, subject.lane)
    lost, plans = 0, Plans(subject.lane, kernel.stage, first)
    judged: list[Judged] = []
    with runner as run:
        for trial in trials:
            if standing.trials >= least:
                settled = _is_settled(standing, measures) if standing.first else _show_together(standing, judged)
                if subject.legal or settled:
                    break
            if kernel.refusal(trial.case.dims) is not None:
                continue
            watched = _Watched(run)
            plan = plans.following(trial.key) if subject.lane == "eager" else _INTERPRETED[kernel.stage.composite]
            runs: list[Judged] = []
            for one in judged_runs(kernel, trial.key, watched, plan, oracle=trial.oracle):
                runs.append(one)
                if not one.verdict.ok:
                    break  # it is found: what a repeat would add is not counted
            judged += runs
            assert watched.first is not None
            _count(standing, trial, watched.first, runs, costs)
            lost += sum(map(is_lost, runs))
            if lost >= MOST_LOST:
                break
        if not standing.first:
            _show_together(standing, judged)
        if kernel.capabilities and not standing.first:
            proofs = list(capability_runs(kernel, space, run, subject.lane, judged))
            refuted = [finding for proof in proofs for finding in proof.verdict.findings]
            if refuted:
                standing.first = standing.trials
                standing.rejected[OURS] = 1
                standing.detectors = ["capability"]
                standing.rejections = [refuted[0].message]


def _show_together(standing: Standing, judged: Sequence[Judged]) -> bool:
    """Whether what no trial shows by itself is shown by all so far, which counts as one trial rejected."""
    for one in pooled_run(judged):
        if one.verdict.ok:
            standing.share = max(standing.share, one.verdict.share or 0.0)
        else:
            finding = one.verdict.findings[0]
            standing.first = standing.trials
            standing.rejected[OURS] = 1
            standing.in_outputs = 1  # whoever compares outputs had all of these to go by
            standing.detectors = [finding.detector]
            standing.rejections = [f"{one.case} ({one.check}): {finding.detector}: {finding.message}"]
    return standing.first > 0


def _is_settled(standing: Standing, measures: bool) -> bool:
    """Whether a fault that was found was judged on as many cases as its power so far asks for, if that is measured."""
    return not (measures and standing.has_power) or trials_for(standing.regimes) <= standing.trials


def _count(standing: Standing, trial: Trial, outcome: Outcome, runs: Sequence[Judged], costs: dict[str, Cost]) -> None:
    """Add one trial to a standing, and its cost if the kernel is a legal one."""
    standing.trials += 1
    regime = standing.regimes.setdefault(trial.key.regime, [0, 0])
    regime[0] += 1
    findings = [(run, finding) for run in runs for finding in run.verdict.findings]
    if findings:
        regime[1] += 1
        standing.rejected[OURS] = standing.rejected.get(OURS, 0) + 1
        standing.first = standing.first or standing.trials
        standing.in_outputs += any(run.check == "example" and finding.detector not in BEYOND_OUTPUTS for run, finding in findings)
        fired = dict.fromkeys(finding.detector for _, finding in findings)
        standing.detectors += [name for name in fired if name not in standing.detectors]
        if standing.legal and len(standing.rejections) < MOST_REJECTIONS:
            run, finding = findings[0]
            standing.rejections.append(f"{run.case} ({run.check}): {finding.detector}: {finding.message}")
    else:
        standing.share = max([standing.share, *(run.verdict.share or 0.0 for run in runs)])
    compared = list(trial.compared(outcome)) if outcome.outputs else []  # a kernel that is compiled only leaves none
    for rule in RULES:
        began = time.perf_counter()
        accepted = outcome.status == "ok" and all(rule.accepts(one) for one in compared)
        if standing.legal and compared:
            costs[rule.name].add(Cost(time.perf_counter() - began, 1))
        if not accepted:  # a kernel that did not come to its end is seen by everyone
            standing.rejected[rule.name] = standing.rejected.get(rule.name, 0) + 1
    if standing.legal and compared:
        began = time.perf_counter()
        judge(trial.case, outcome, oracle=trial.oracle)  # once more: bounds are there now, as goldens are for the others
        costs[OURS].add(Cost(time.perf_counter() - began, 1))


def write_json(exam: Exam, path: Path) -> None:
    """Keep an exam; ``read_json`` reads it."""
    write_whole(path, json.dumps(exam.to_json(), indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that holds what it held before until all is written, whenever this is killed; raises ``OSError``."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Exam:
    """A kept exam; raises ``UsageError`` for a file that holds none."""
    try:
        return Exam.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: expected an exam that `conformance exam --out` wrote, found none: {error}") from error
