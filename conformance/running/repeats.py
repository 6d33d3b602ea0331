"""A case run again and again: what a race, a stale buffer or a cold start changes."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from conformance.cases.case import Case
from conformance.contract.kernel import Declaration
from conformance.judge.verdict import Finding, Verdict, worst_first
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import bits, same_bits
from conformance.running.runs import Runner

#: Of the repeats that differ from the first run so many are judged: in attention that takes longer than the run itself.
MOST_JUDGED = 3


@dataclasses.dataclass
class _Difference:
    """How an output of the repeats differs from that of the first run: ``runs`` has the numbers of those that do, from 1."""

    runs: list[int]
    where: str
    index: tuple[int, ...]
    count: int
    total: int
    #: The output of the first repeat that differs, and whether all that do agree with it.
    tensor: torch.Tensor
    alike: bool = True


@dataclasses.dataclass(frozen=True)
class Repeated:
    """What repeats showed besides what the first run did: ``outcome`` is that of the first that differs, or of the last."""

    verdict: Verdict
    outcome: Outcome
    #: The outputs of the first repeat that differs, by name: those that do.
    outputs: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)


def run_again(
    kernel: Declaration,
    case: Case,
    first: Outcome,
    verdict: Verdict,
    run: Runner,
    count: int,
    judge_run: Callable[[Outcome], Verdict],
) -> Repeated:
    """Run a case ``count`` times more, as long as runs come to an end.

    Each must leave the same bits as the first. Floating-point outputs of a kernel that ``reorders_sums`` may differ: each that
    does is judged by itself.
    """
    differences: dict[str, _Difference] = {}
    telling: Outcome | None = None
    verdicts: list[Verdict] = []
    seconds, compiles, done = 0.0, 0, 0
    by_card: list[float] = []
    given_up: dict[int, str] = {}
    launched = 0
    again = first
    for number in range(1, count + 1):
        again = run(case, "none")  # what the passes do to the same case has been seen
        seconds, compiles, done = seconds + again.seconds, compiles + again.compiles, number
        launched += again.status == "ok"
        by_card += [] if again.device_seconds is None else [again.device_seconds]
        given_up |= again.given_up
        ended = again.status == "ok"
        differs = ended and _compare(first, again, number, differences)
        if differs or not ended or _conduct(again) != _conduct(first):
            telling = telling or again
            if len(verdicts) < MOST_JUDGED or not ended:
                verdicts.append(judge_run(again))
        if not ended:
            break
    known = {_told(finding) for finding in verdict.findings}
    new: dict[Any, Finding] = {}
    for one in verdicts:
        for finding in one.findings:
            if _told(finding) not in known:
                new.setdefault(_told(finding), finding)
    findings = [*new.values(), *_nondeterministic(kernel, case, differences, done)]
    kept = {name: difference.tensor for name, difference in differences.items()}
    usual = statistics.median(by_card) if by_card else None
    outcome = dataclasses.replace(
        telling or again, seconds=seconds, compiles=compiles, device_seconds=usual, launches=launched, given_up=given_up
    )
    told = verdicts[0] if verdicts else verdict
    return Repeated(dataclasses.replace(told, findings=worst_first(findings)), outcome, kept)


def _compare(first: Outcome, again: Outcome, number: int, differences: dict[str, _Difference]) -> bool:
    """Whether a repeat left other bits than the first run; where it did is put into ``differences``."""
    differs = False
    for name, tensor in first.outputs.items():
        other = again.outputs[name]
        if same_bits(tensor, other):
            continue
        differs = True
        if name in differences:
            differences[name].runs.append(number)
            differences[name].alike = differences[name].alike and same_bits(differences[name].tensor, other)
            continue
        different = bits(tensor) != bits(other)
        # Not by nonzero(): of a cache of forty layers it takes 22 GB.
        first_place = different.flatten().to(torch.uint8).argmax()
        index = tuple(int(position) for position in torch.unravel_index(first_place, different.shape))
        count, total = int(different.sum()), different.numel()
        where = f"{count} of {total} elements of {name}, the first at {list(index)}"
        differences[name] = _Difference([number], where, index, count, total, other)
    return differs


def _nondeterministic(kernel: Declaration, case: Case, differences: Mapping[str, _Difference], done: int) -> list[Finding]:
    findings = []
    for argument in case.stage.outputs:
        found = differences.get(argument.name)
        if found is None or (kernel.reorders_sums and argument.dtype.is_floating_point):
            continue
        message = f"{_how_many(found, done)} in {found.where}"
        findings.append(Finding("nondeterministic", message, argument.name, found.index, count=found.count, total=found.total))
    return findings


def _how_many(found: _Difference, done: int) -> str:
    if done == 1:
        return "two runs on the same inputs gave different bits"
    if len(found.runs) == done and found.alike:
        return f"the first run gave other bits than the {done} after it on the same inputs, which agree,"
    alike = "" if len(found.runs) == 1 else ", the same" if found.alike else ", not the same"
    runs = f"{len(found.runs)} of {done} further runs on the same inputs"
    return f"{runs} gave other bits than the first{alike}: run {found.runs[0]} of them"


def _conduct(outcome: Outcome) -> tuple[Any, ...]:
    return outcome.changed_inputs, outcome.guard_damage, outcome.unwritten_reads, outcome.pass_differences


def _told(finding: Finding) -> tuple[str, str | None, str]:
    return finding.detector, finding.argument, finding.message
