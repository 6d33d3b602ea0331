"""An exam as tasks for several processes: taken, joined, kept as it goes, and ended early without losing what was judged."""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from conformance.cases.key import CaseKey
from conformance.cases.space import Space, stratified_keys
from conformance.contract.precision import CONTRACT
from conformance.contract.registry import stage_named, stages
from conformance.exam import efforts
from conformance.exam.efforts import Effort, chosen_subjects, number_of, random_variant, random_variants
from conformance.exam.known_kernels import KnownKernel
from conformance.exam.results import OURS, Cost, Exam, KernelResult
from conformance.exam.trials import MOST_REJECTIONS, Trial, judge_known_kernel
from conformance.lanes import lane_named

#: Seconds between two times that an exam so far is kept.
KEPT_EVERY = 60.0


def take(
    effort: Effort,
    *,
    seed: int = 0,
    stage: str | None = None,
    lane: str | None = None,
    precision: str = CONTRACT,
    processes: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
    keep: Callable[[Exam], None] | None = None,
) -> Exam:
    """Judge the catalogue, its kernels under a policy of ``precision``; what comes of it follows from ``seed``.

    ``progress`` is told how many tasks are done, of how many, and how many kernels were judged wrongly. ``keep`` is given the
    exam so far as a task ends, if it was not for ``KEPT_EVERY`` seconds. An exam that is interrupted (``KeyboardInterrupt``), or
    loses a process, returns what it has. In both, a subject that was not judged to its end is an error, so that neither is a
    pass.
    """
    began = kept = time.monotonic()
    # Those of layers first, which are the longest, so that no process ends alone with one.
    chosen = chosen_subjects(effort, stage, lane, precision)
    tasks = sorted(_tasks(chosen, effort, seed, precision), key=lambda task: not stage_named(task.stage).composite)
    workers = min(processes or os.cpu_count() or 1, len(tasks))
    results: dict[int, _Result] = {}

    def so_far(missing: str) -> Exam:
        standings: dict[str, KernelResult] = {}
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
        return Exam(effort, seed, list(standings.values()), dict(costs), time.monotonic() - began, precision)

    missing = ""
    try:
        for number, result in _results(tasks, workers):
            results[number] = result
            if progress is not None:
                judged = [one for done in results.values() for one in done.standings if one.trials and not one.hidden]
                wrong = sum(one.legal == one.caught_by(OURS) for one in judged)
                progress(len(results), len(tasks), wrong)
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


@dataclasses.dataclass(frozen=True)
class _Task:
    """Subjects of one stage, lane and size, by their ids; or random combinations ``first`` to ``last`` of a stage."""

    stage: str
    effort: Effort
    seed: int
    ids: tuple[str, ...] = ()
    first: int = 0
    last: int = 0
    precision: str = CONTRACT


@dataclasses.dataclass
class _Result:
    standings: list[KernelResult]
    costs: dict[str, Cost]


#: Random combinations that one task judges.
_COMBINATIONS_PER_TASK = 250


def _tasks(chosen: Sequence[KnownKernel], effort: Effort, seed: int, precision: str = CONTRACT) -> Iterator[_Task]:
    def alike(one: KnownKernel) -> tuple[bool, str, str, str]:
        return lane_named(one.lane).in_process, one.stage, one.lane, str(sorted(one.dims.items()))

    for (in_process, stage, _, _), group in itertools.groupby(sorted(chosen, key=alike), key=alike):
        size = effort.together if in_process else 1
        ids = [one.id for one in group]
        for start in range(0, len(ids), size):
            yield _Task(stage, effort, seed, tuple(ids[start : start + size]), precision=precision)
    for stage in dict.fromkeys(one.stage for one in chosen if lane_named(one.lane).in_process):
        count = effort.random(stage_named(stage)) if random_variants(stage) else 0
        for start in range(0, count, _COMBINATIONS_PER_TASK):
            last = min(start + _COMBINATIONS_PER_TASK, count)
            yield _Task(stage, effort, seed, first=start, last=last, precision=precision)


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
    known = _known(task)
    chosen = [known[name] for name in task.ids] or [random_variant(task.stage, task.first, task.seed)]
    return _Result([KernelResult.of(one, why) for one in chosen], {})


def _known(task: _Task) -> dict[str, KnownKernel]:
    """The kernels of a task's stage by their ids, as its policy has them."""
    return {one.id: one.under(task.precision) for one in efforts.catalogue() if one.stage == task.stage}


def _perform(task: _Task) -> _Result:
    if not task.ids:
        return _random_combinations(task)
    known = _known(task)
    group = [known[name] for name in task.ids]
    space = Space.of(stage_named(task.stage), dict(group[0].dims))
    cases = task.effort.cases(group[0])
    keys = list(itertools.islice(stratified_keys(space, task.seed), cases.most))
    trials = [Trial(key) for key in keys]  # what is made for one subject serves the others
    costs: dict[str, Cost] = collections.defaultdict(Cost)
    standings = []
    for one in group:
        least, trials = (cases.legal, _in_rotation(trials, one, cases.legal, task.seed)) if one.legal else (cases.faulty, trials)
        standings.append(judge_known_kernel(one, trials, least, space, costs, measures=task.effort.measures))
    return _Result(standings, costs)


def _in_rotation(trials: Sequence[Trial], subject: KnownKernel, least: int, seed: int) -> list[Trial]:
    """The same cases, after the first gone on with another kind of data: ``least`` each are all kinds between them.

    A case of a layer or chain is dear, so all kernels of such a stage have the same: a stage goes on where the one before ended.
    The first case has rows to rearrange.
    """
    stage = stage_named(subject.stage)
    first, others, more = trials[:1], trials[1 : len(stage.regimes)], trials[len(stage.regimes) :]
    place = list(stages()).index(subject.stage) if stage.composite else number_of(subject.id)
    start = (place * (least - 1) + seed) % max(1, len(others))
    return [*first, *others[start:], *others[:start], *more]


def _random_combinations(task: _Task) -> _Result:
    """Each combination on a case of its own; together they are one standing."""
    costs: dict[str, Cost] = collections.defaultdict(Cost)
    whole: KernelResult | None = None
    keys: dict[Space, Iterator[tuple[int, CaseKey]]] = {}
    # So that a few of each stage do not all have the first kinds of data.
    skipped = number_of(f"random/{task.stage}/{task.seed}") % len(stage_named(task.stage).regimes)
    for index in range(task.first, task.last):
        variant = random_variant(task.stage, index, task.seed).under(task.precision)
        space = Space.of(stage_named(task.stage), dict(variant.dims))
        if space not in keys:
            # Another sequence of cases than that of the named variants, and one for each geometry.
            keys[space] = enumerate(stratified_keys(space, task.seed + 1))
        key = next(key for number, key in keys[space] if number == index + skipped)
        one = judge_known_kernel(variant, [Trial(key)], 1, space, costs, first=index)
        one.rejections = [f"{text} (combination {index} of seed {task.seed})" for text in one.rejections]
        if whole is None:
            whole = one
        else:
            _join(whole, one)
    return _Result([whole] if whole else [], costs)


def _join(whole: KernelResult, part: KernelResult) -> None:
    """Take the trials of another part of the same subject in."""
    if part.first and not whole.first:
        whole.first = whole.trials + part.first
    whole.trials += part.trials
    whole.in_outputs += part.in_outputs
    whole.unnamed += part.unnamed
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
