"""``check``: judge one kernel on a number of cases and say what is wrong with it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from conformance.cases.case import make_case
from conformance.cases.key import CaseKey, smallest, take_rows
from conformance.cases.source import Source
from conformance.cases.space import Space, interleaved_keys
from conformance.contract.kernel import Declaration, Kernel, as_kernel, require_kernel_of
from conformance.contract.precision import CONTRACT, TIES
from conformance.contract.registry import short_name, stage_named
from conformance.contract.stage import Stage
from conformance.errors import UsageError
from conformance.judge.explanations import Explainer
from conformance.judge.judgement import judge
from conformance.judge.oracle import Oracle
from conformance.judge.signatures import judge_together
from conformance.judge.verdict import DETECTORS, Finding, Verdict, worst_first
from conformance.lanes import default_lane, lane_named, lanes_of
from conformance.lanes.base import Outcome
from conformance.lanes.cards import CardChoice
from conformance.lanes.messages import Passes
from conformance.outside import LARGEST, LONGEST
from conformance.reports import check_report
from conformance.running.capabilities import prove
from conformance.running.plans import Plans, RunPlan, by_bare_name
from conformance.running.repeats import run_again
from conformance.running.runners import eager_runner, worker_runner
from conformance.running.runs import MOST_LOST, Judged, Keep, Runner, is_lost

#: Keys are drawn before the first case is judged.
MOST_EXAMPLES = 100_000
#: A kernel that refuses so many cases of a preset takes none of it.
MOST_REFUSED = 100


@dataclasses.dataclass(frozen=True)
class Located:
    """A finding and the case that shows it."""

    finding: Finding
    case: CaseKey

    def __getattr__(self, name: str) -> Any:
        # A located finding reads like the finding itself: detector, argument, index, magnitude, message, ...
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.finding, name)


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``check`` found. ``findings`` holds one entry per detector, argument and case, worst first."""

    stage: str
    kernel: str
    lane: str
    runs: tuple[Judged, ...]
    #: How many cases were to be judged; fewer were if too many runs crashed or timed out.
    planned: int = 0
    #: The presets of the model that the kernel takes no case of, each with its reason.
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether something was judged and nothing is wrong."""
        return bool(self.runs) and all(run.verdict.ok for run in self.runs)

    @property
    def examples(self) -> int:
        """How many cases were judged, repeats and row checks not counted."""
        return sum(run.check == "example" for run in self.runs)

    @property
    def share(self) -> float | None:
        """The worst share of the allowance that any run used."""
        shares = [run.verdict.share for run in self.runs if run.verdict.share is not None]
        return max(shares, default=None)

    @property
    def findings(self) -> tuple[Located, ...]:
        """Every finding with its case: what explains most first, then the worst."""
        located = [Located(finding, run.case) for run in self.runs for finding in run.verdict.findings]
        order = {id(finding): rank for rank, finding in enumerate(worst_first([entry.finding for entry in located]))}
        return tuple(sorted(located, key=lambda entry: order[id(entry.finding)]))

    @property
    def detectors(self) -> tuple[str, ...]:
        """The ids of the detectors that fired, what explains most first."""
        fired = {entry.finding.detector for entry in self.findings}
        return tuple(name for name in DETECTORS if name in fired)

    def __str__(self) -> str:
        return check_report.render(self)


class InterruptedCheck(KeyboardInterrupt):
    """A check was interrupted; ``report`` holds what had been judged."""

    def __init__(self, report: Report) -> None:
        super().__init__("interrupted")
        self.report = report


def check(
    stage: str,
    function: Callable[..., Any] | Declaration,
    *,
    dims: str | Mapping[str, Any] | None = None,
    examples: int | None = None,
    seed: int = 0,
    lane: str = "auto",
    case: str | None = None,
    timeout: float | None = None,
    isolated: bool = False,
    name: str | None = None,
    progress: bool | Callable[[int, int, int], object] = False,
    rounds: Sequence[str] = (),
    precision: str = CONTRACT,
    ties: str = TIES[0],
    cards: CardChoice | None = None,
) -> Report:
    """Judge a kernel on ``examples`` cases of a stage (``Stage.examples`` unless given), deterministic in ``seed``.

    ``function`` takes the contract's arguments by name (and keyword-only ``dims``, if it asks), or is a ``Kernel``; what else it
    takes must have a default, and ``*args`` and ``**kwargs`` will do. ``dims`` is the name of a preset or overrides of ``tiny``;
    without it cases come from each of the model's ``check_presets`` in turn: a tail that is masked wrongly does not show at
    sizes that every tile divides. The capabilities that a kernel declares are put to the test as well, at one preset. ``case``
    is the key of one finding to run again instead. ``name`` is what the kernel is called in the report. ``progress=True`` shows
    on standard error how far the check is; a callable is told so after every run: cases done, cases planned, findings.

    A PyPTO kernel goes through the interpreter in a worker process (``lane="auto"``), within ``timeout`` seconds a run. A torch
    callable runs here, in the process that judges it, each case twice: its file's code and the judge share their memory, it has
    no time limit, and one that writes to a wild address or ends the process ends the caller as well. With ``isolated=True`` it
    runs in a worker process too, as the command runs it, with a time and a memory limit: use it for what calls code of your own
    in C++ or CUDA, for what may not end, and for code that you do not trust with your process. It must then be an attribute of
    a module that can be imported anew.

    ``rounds``, ``precision`` and ``ties`` are declared of the kernel besides what it declares itself (``conformance.kernel``).
    ``cards`` says which cards the device lane may use.

    Raises ``UsageError`` for what cannot be judged as asked, ``UnavailableError`` where the lane cannot run; a
    ``KeyboardInterrupt`` has what was judged as ``report``.
    """
    contract = stage_named(stage)
    kernel = declaration_of(stage, function).declaring(rounds, precision, ties)
    require_seconds("timeout", timeout)
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise UsageError(f"name is what the kernel is called in the report, a text, found {name!r}")
    if not isinstance(progress, bool) and not callable(progress):
        raise UsageError(f"progress is True, or a callable that takes (done, planned, findings), found {progress!r}")
    chosen = resolve_lane(kernel, lane)
    spaces, refused = taken_spaces(kernel, Space.those_of(contract, dims))
    keys = chosen_keys(kernel, spaces, chosen, examples, seed, case)
    replay = RunPlan(repeats=lane_named(chosen).repeats[0]) if case is not None else None
    runs: list[Judged] = []
    in_process = lane_named(chosen).in_process and not isolated and isinstance(kernel, Kernel)
    called = name or kernel.name
    if in_process:  # a worker finds the kernel as it is declared
        kernel = dataclasses.replace(kernel, name=called)
    runner = eager_runner(kernel) if in_process else worker_runner(kernel, chosen, timeout, cards)  # type: ignore[arg-type]

    def report() -> Report:
        return Report(stage, called, chosen, tuple(runs), planned=len(keys), refused=refused if case is None else {})

    try:
        with told_to(progress, f"{called} {chosen}", len(keys)) as tell, runner as run:
            for judged in runs_of(kernel, keys, spaces[0], run, chosen, replay):
                runs.append(judged)
                tell(runs)
    except KeyboardInterrupt as error:
        raise InterruptedCheck(report()) from error
    return report()


@contextlib.contextmanager
def told_to(
    progress: bool | Callable[[int, int, int], object], title: str, planned: int
) -> Iterator[Callable[[Sequence[Judged]], object]]:
    """What is called with all runs so far after each, and tells the caller's function, a live line, or nobody."""

    def counted(tell: Callable[[int, int], object]) -> Callable[[Sequence[Judged]], object]:
        return lambda runs: tell(sum(one.check == "example" for one in runs), sum(len(one.verdict.findings) for one in runs))

    if not isinstance(progress, bool):
        yield counted(lambda done, findings: progress(done, planned, findings))
    elif not progress:
        yield lambda runs: None
    else:
        from conformance.reports.progress import LiveProgress
        from conformance.reports.text import number

        with LiveProgress(title, planned, "cases") as live:
            yield counted(lambda done, findings: live.update(done, number(findings, "finding")))


def declaration_of(stage: str, function: Callable[..., Any] | Declaration) -> Declaration:
    """The kernel that is to be judged; raises ``UsageError`` if it claims another stage or has another signature."""
    if not isinstance(function, Declaration):
        return as_kernel(stage, function)
    require_kernel_of(function, stage)
    return function


def taken_spaces(kernel: Declaration, spaces: Sequence[Space]) -> tuple[tuple[Space, ...], dict[str, str]]:
    """Those of several spaces that the kernel takes a case of, and the presets of the others with the kernel's reason.

    All of them if it takes none, or where there is but one: who judges it then says so.
    """
    if len(spaces) == 1:
        return tuple(spaces), {}
    reasons = {space.preset: _refusal(kernel, space) for space in spaces}
    refused = {preset: reason for preset, reason in reasons.items() if reason is not None}
    taken = tuple(space for space in spaces if space.preset not in refused)
    return (taken, refused) if taken else (tuple(spaces), {})


def _refusal(kernel: Declaration, space: Space) -> str | None:
    """Why the kernel takes none of a space's cases; ``None`` if it takes one of the first that are drawn."""
    first = None
    for key in itertools.islice(interleaved_keys((space,), 0), MOST_REFUSED):
        reason = kernel.refusal(key.dims)
        if reason is None:
            return None
        first = first or reason
    return first


def chosen_keys(
    kernel: Declaration, spaces: Sequence[Space], lane: str, examples: int | None, seed: int, case: str | None
) -> list[CaseKey]:
    """The keys to judge: the one of ``case``, the largest to compile, or ``examples`` stratified ones that the kernel takes."""
    examples = kernel.stage.examples if examples is None else examples
    require_count(examples, seed)
    if case is not None:
        return [require_stage(CaseKey.parse(case), kernel.stage)]
    if not lane_named(lane).executes:
        return acceptable(kernel, [spaces[0].largest], 1)
    return acceptable(kernel, interleaved_keys(spaces, seed), examples)


def case_runs(
    kernel: Declaration, keys: Iterable[CaseKey], run: Runner, lane: str, plan: RunPlan | None = None, keep: Keep | None = None
) -> Iterator[Judged]:
    """Judge case by case, with the lane's own plan unless one is given, then all together; end early if too many are lost.

    ``keep``: as for ``judged_runs``.
    """
    lost, runs, plans, explainer = 0, list[Judged](), Plans(lane, kernel.stage), Explainer(kernel.judged_by)
    for key in keys:
        for judged in judged_runs(kernel, key, run, plan or plans.following(key), explainer=explainer, keep=keep):
            lost += is_lost(judged)
            runs.append(judged)
            yield judged
        if lost >= MOST_LOST:
            return
    yield from pooled_run(runs)


def runs_of(
    kernel: Declaration,
    keys: Iterable[CaseKey],
    space: Space,
    run: Runner,
    lane: str,
    plan: RunPlan | None = None,
    keep: Keep | None = None,
) -> Iterator[Judged]:
    """Every run of a check: its cases, then what the kernel declares that it serves; with a ``plan`` the cases alone.

    ``keep``: as for ``judged_runs``.
    """
    runs: list[Judged] = []
    for judged in case_runs(kernel, keys, run, lane, plan, keep):
        runs.append(judged)
        yield judged
    if plan is None:
        yield from capability_runs(kernel, space, run, lane, runs)


def pooled_run(runs: Iterable[Judged]) -> Iterator[Judged]:
    """What all cases of a layer or a chain show together, judged where nothing else is wrong; none if one case is all there is.

    A case that came several times counts once.
    """
    runs = list(runs)
    cases = {run.case: run.verdict.responses for run in runs if run.check == "example" and run.verdict.responses}
    if len(cases) > 1 and all(run.verdict.ok for run in runs):
        verdict, telling = judge_together(list(cases.values()))
        yield Judged("pooled", list(cases)[telling], verdict, Outcome("ok"))


def capability_runs(kernel: Declaration, space: Space, run: Runner, lane: str, before: Iterable[Judged]) -> Iterator[Judged]:
    """Put the capabilities that the kernel declares to the test, unless nothing is executed or too many runs were lost before.

    Also where cases fail: what a kernel does not serve may be why.
    """
    if lane_named(lane).executes and sum(map(is_lost, before)) < MOST_LOST:
        yield from prove(kernel, space, run)


def require_count(examples: int, seed: int) -> None:
    """Raise ``UsageError`` unless there is at least one example, and not too many, and the seed is a whole number from 0."""
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise UsageError(f"examples must be a positive whole number, found {examples!r}")
    if examples > MOST_EXAMPLES:
        raise UsageError(f"examples are at most {MOST_EXAMPLES:,}: give another seed for more")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed must be a whole number, not negative, found {seed!r}")
    if seed > LARGEST:
        raise UsageError(f"seed is at most {LARGEST:,}")


def require_seconds(name: str, value: object) -> None:
    """Raise ``UsageError`` for a time limit that is none; ``None`` stands for the usual one."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LONGEST:
        raise UsageError(f"{name} must be a positive number of seconds, at most {LONGEST:,.0f}, found {value!r}")


def require_stage(key: CaseKey, stage: Stage) -> CaseKey:
    """The key, if it is one of this stage; raises ``UsageError`` otherwise.

    The stage's bare name will do, also where other models have one that is called so: keys outlive what is installed.
    """
    if key.stage not in (stage.name, stage.id):
        raise UsageError(f"case key {key} is of stage {key.stage}, not of {short_name(stage)}")
    return dataclasses.replace(key, stage=short_name(stage))


def acceptable(kernel: Declaration, keys: Iterable[CaseKey], count: int) -> list[CaseKey]:
    """The first ``count`` keys whose dimensions the kernel takes, of at most twenty times as many.

    Raises ``UsageError`` with the kernel's reason if it takes none.
    """
    kept: list[CaseKey] = []
    refusal: str | None = None
    for key in itertools.islice(keys, 20 * count):
        reason = kernel.refusal(key.dims)
        if reason is None:
            kept.append(key)
        refusal = refusal or reason
        if len(kept) == count:
            break
    if not kept:
        raise UsageError(f"kernel {kernel.name} takes none of these cases: {refusal}")
    return kept


def resolve_lane(kernel: Declaration, lane: str) -> str:
    """The lane to use; raises ``UsageError`` for one that the kernel's toolchain has not."""
    if lane == "auto":
        return default_lane(kernel.toolchain).name
    lanes = [one.name for one in lanes_of(kernel.toolchain)]
    if lane not in lanes:
        raise UsageError(f"a {kernel.toolchain} kernel has no lane {lane!r}; it has {', '.join(lanes)}")
    return lane


def judged_runs(
    kernel: Declaration,
    key: CaseKey,
    run: Runner,
    plan: RunPlan,
    *,
    oracle: Oracle | None = None,
    explainer: Explainer | None = None,
    keep: Keep | None = None,
) -> Iterator[Judged]:
    """Run a case and judge it, then whatever the plan adds, as long as nothing is wrong.

    Every case is judged against its oracle (``oracle``, if several kernels share one); repeats must also equal the first run bit
    for bit. Repeats that only show again what is wrong with the first run are left out: they would count that twice.
    ``explainer`` says what roundings would explain, if that is asked for. ``keep`` is called for each run with findings, before
    it is yielded.
    """

    def told(judged: Judged, tensors: Mapping[str, torch.Tensor]) -> Judged:
        if keep is not None and not judged.verdict.ok:
            keep(judged, tensors)
        return judged

    def related(other: CaseKey, check_name: str, passes: Passes) -> Iterator[Judged]:
        case = make_case(other)
        if kernel.refusal(case.dims) is None:
            outcome = run(case, passes)
            yield told(_judged(check_name, other, judge(case, outcome, **kernel.judged_by), outcome), outcome.outputs)

    oracle = oracle or Oracle(make_case(key))
    case = oracle.case
    first = run(case, plan.passes)
    judge_run = functools.partial(_explained, kernel, oracle, plan.signatures, explainer)
    verdict = judge_run(first)
    yield told(_judged("example", key, verdict, first), first.outputs)
    if first.status != "ok" or not first.executed:
        return
    fine = verdict.ok
    if plan.repeats:
        repeated = run_again(kernel, case, first, verdict, run, plan.repeats, judge_run)
        if fine or repeated.verdict.findings:
            tensors = {f"first.{name}": tensor for name, tensor in first.outputs.items()} | dict(repeated.outputs)
            yield told(_judged("repeat", key, repeated.verdict, repeated.outcome), tensors)
        fine = fine and repeated.verdict.ok
    if not fine:
        return
    if plan.all_passes:
        small = smallest(key)
        chosen = small if kernel.refusal(small.dims) is None else key
        yield from related(chosen, "all_passes", "all")
    rows = case.dims.batch
    if case.dims.symbol("batch") not in case.stage.drawn or rows < 2:
        return
    source = Source(f"rows/{by_bare_name(key)}")
    if plan.permuted:
        order = source.permutation("order", rows)
        yield from related(take_rows(key, tuple(order)), "permuted_rows", plan.passes)
    if plan.lone:
        lone = source.integers("lone", 0, rows - 1, 1)[0]
        yield from related(take_rows(key, (lone,)), "lone_row", plan.passes)


def _explained(kernel: Declaration, oracle: Oracle, signatures: bool, explainer: Explainer | None, outcome: Outcome) -> Verdict:
    """The verdict of a run, with what roundings would explain if that is asked for."""
    verdict = judge(oracle.case, outcome, oracle=oracle, signatures=signatures, **kernel.judged_by)
    return verdict if explainer is None else explainer.explained(oracle.case, outcome, verdict, oracle)


def _judged(check_name: str, key: CaseKey, verdict: Verdict, outcome: Outcome) -> Judged:
    # Tensors of a run are not kept: at real size they are 270 MB each.
    return Judged(check_name, key, verdict, dataclasses.replace(outcome, outputs={}))
