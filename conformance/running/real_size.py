"""One kernel at a model's real size, on a card: where alone a fused model of forty layers can be run.

Its weights take longer to draw, to copy and to place than it takes to run. So all cases here have the same ones, which stay on
the card from the first run to the last; the batch, the lengths and the caches differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.cases.source import SharedDraws
from conformance.cases.space import Space, stratified_keys
from conformance.contract.dims import Dims
from conformance.contract.kernel import Declaration
from conformance.contract.stage import Stage
from conformance.judge.judgement import judge
from conformance.judge.oracle import Oracle
from conformance.judge.verdict import Finding
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import case_bytes
from conformance.lanes.messages import Passes
from conformance.running.capabilities import prove
from conformance.running.check import judged_runs
from conformance.running.plans import RunPlan
from conformance.running.runs import MOST_LOST, Judged, Keep, Runner, is_lost

#: Steps that follow a case, each from what the one before it left.
STEPS = 2
#: A batch besides the full one, of a kernel that serves any: odd, and smaller than a tile. What else it serves is proven with
#: fewer layers.
SMALL_BATCH = 3


def host_bytes(stage: Stage, dims: Dims) -> int:
    """Memory that judging one case takes here, in bytes: its inputs, those in shared memory, what comes back, and the oracle.

    The oracle takes up to 2.5 GB beside them, measured for three layers and the head of Qwen3-14B; it goes layer by layer.
    """
    return 3 * case_bytes(stage, dims) + (4 << 30)


def keys_at_real_size(kernel: Declaration, space: Space) -> Iterator[CaseKey]:
    """A full batch with one sequence as long as can be, a small batch, and a full one whose sequences can go on.

    All have one seed, so one set of weights, and one pool of pages.
    """
    first = next(iter(stratified_keys(space, 0)))
    longest = dataclasses.replace(first, seq_lens=_from(space.limit.length, first.seq_lens))
    yield longest
    batch = space.limit.symbol("batch")
    if "variable_batch" in kernel.capabilities and batch in space.stage.drawn:
        overrides = tuple({**dict(first.overrides), batch: SMALL_BATCH}.items())
        lengths, chunks = first.seq_lens[:SMALL_BATCH], first.chunk_lens[:SMALL_BATCH]
        yield dataclasses.replace(first, overrides=overrides, seq_lens=lengths, chunk_lens=chunks)
    if space.stage.following is not None:
        most = space.limit.length - STEPS
        yield dataclasses.replace(first, seq_lens=tuple(min(length, most) for length in first.seq_lens))


def _from(first: int, lengths: Sequence[int]) -> tuple[int, ...]:
    return (first, *lengths[1:]) if lengths else ()


def runs_at_real_size(kernel: Declaration, space: Space, run: Runner, repeats: int, keep: Keep | None = None) -> Iterator[Judged]:
    """Every run: the first case again and again, then the others, steps that go on from the last, and what the kernel declares.

    ``keep``: as for ``judged_runs``. The cases end with the first that has findings: at this size each takes minutes to judge.
    """
    lost = 0
    for judged in _cases(kernel, space, run, repeats, keep):
        lost += is_lost(judged)
        yield judged
    if lost < MOST_LOST:
        yield from prove(kernel, space, run)


def _cases(kernel: Declaration, space: Space, run: Runner, repeats: int, keep: Keep | None) -> Iterator[Judged]:
    shared, last = SharedDraws(), Outcome("unavailable")

    def remember(case: Case, passes: Passes = "last") -> Outcome:
        nonlocal last
        last = run(case, passes)
        return last

    oracle: Oracle | None = None
    for key in keys_at_real_size(kernel, space):
        if kernel.refusal(key.dims) is not None:
            continue
        plan = RunPlan(repeats=0 if oracle else repeats, passes="none")
        oracle, wrong = Oracle(make_case(key, shared)), False
        for judged in judged_runs(kernel, key, remember, plan, oracle=oracle, keep=keep):
            wrong = wrong or not judged.verdict.ok
            yield judged
        if wrong:
            return
    if oracle is not None and space.stage.following is not None:
        yield from _steps(kernel, oracle, last, run, keep)


def _steps(kernel: Declaration, oracle: Oracle, outcome: Outcome, run: Runner, keep: Keep | None) -> Iterator[Judged]:
    """Steps from a case on, greedily: each gets the caches that the one before it left, and the token that it chose.

    A step is judged by what a correct kernel makes of what it was really given. So its logits are right within the error model,
    and a token that is not the exact reference's is a tie within it.
    """
    case = oracle.case
    following = case.stage.following
    assert following is not None
    for number in range(1, STEPS + 1):
        inputs = following(case.inputs, outcome.outputs, case.dims)
        if inputs is None:
            return
        case = dataclasses.replace(case, inputs=inputs)
        outcome = run(case, "none")
        verdict = judge(case, outcome, **kernel.judged_by)
        findings = tuple(_after(number, finding) for finding in verdict.findings)
        verdict = dataclasses.replace(verdict, findings=findings)
        judged = Judged("step", case.key, verdict, dataclasses.replace(outcome, outputs={}))
        if not verdict.ok and keep is not None:
            keep(judged, outcome.outputs)
        yield judged
        if not verdict.ok:
            return


def _after(number: int, finding: Finding) -> Finding:
    steps = "one step" if number == 1 else f"{number} steps"
    return dataclasses.replace(finding, message=f"{steps} after this case, which by itself passes: {finding.message}")
