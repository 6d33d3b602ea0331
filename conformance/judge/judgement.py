"""The judgement of one run: is every output within what a correct kernel can return, and if not, where.

The tests are derived in docs/rule.md; each constant's reason stands beside it in ``limits.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch

from conformance.cases.case import Case
from conformance.contract.arguments import Argument
from conformance.contract.precision import TIES, allowed_profiles
from conformance.errors import UnavailableError, UsageError
from conformance.judge import limits
from conformance.judge.elements import judge_elements, judge_integers, tell_nearest
from conformance.judge.oracle import Oracle
from conformance.judge.outputs import NumericFindings, as_matrix, part_of
from conformance.judge.signatures import judge_low_bits, judge_signatures
from conformance.judge.statistics import Statistics
from conformance.judge.structure import degenerate_outputs, structural_findings
from conformance.judge.verdict import Finding, Verdict, worst_first
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import one_thread
from conformance.numerics.bounds import Bounds, Profile


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Whatever the caller or the kernel set: one thread, and gradients, which the correlation of errors is told by."""
    with one_thread(), torch.inference_mode(False), torch.enable_grad():
        yield


@_own_settings()
def judge(
    case: Case,
    outcome: Outcome,
    *,
    profile: str | None = None,
    rounds: Sequence[str] = (),
    ties: str = TIES[0],
    oracle: Oracle | None = None,
    signatures: bool = True,
) -> Verdict:
    """Judge one run of one case. ``profile`` names the only profile allowed; otherwise any of the stage's may explain the run.

    ``rounds`` and ``ties`` are what the kernel declares besides: roundings by their names, and that any of several equals is
    right (``Declaration.judged_by`` has all three). With ``signatures`` the errors of a composite stage are searched for those of
    known mistakes, most of what judging it takes.

    Raises ``UsageError`` if an output has another dtype or shape than the contract says.
    """
    oracle = oracle or Oracle(case)
    if outcome.status != "ok" or not outcome.executed:
        return judge_without_outputs(outcome)
    undelivered = [argument for argument in case.stage.outputs if argument.name not in outcome.outputs]
    if undelivered:
        return Verdict(
            tuple(Finding("unwritten", f"{one.name} was not delivered by a run that ended well", one.name) for one in undelivered)
        )
    findings = _conduct(outcome)
    for argument in case.stage.outputs:
        _require_declared_shape(argument, outcome.outputs[argument.name], case)
    allowed = allowed_profiles(case.stage, profile, rounds)
    best: NumericFindings | None = None
    structural, explained = structural_findings(case, outcome, oracle.bounds(allowed[0]))
    for candidate in allowed:
        numeric = _numeric(case, outcome, oracle, candidate, explained, ties, signatures)
        if best is None or numeric.badness < best.badness:
            best = numeric
        if not numeric.findings:
            break
    assert best is not None
    tell_nearest(case, outcome, oracle, (one for one in allowed if one is not best.profile), best)
    findings += structural + degenerate_outputs(case, outcome, best.findings, oracle.bounds(best.profile))
    ordered = worst_first(findings)
    if case.stage.localise is not None and (structural or best.findings):
        ordered = _with_causes(ordered, case.stage.localise(case.inputs, outcome.outputs, case.dims))
    return Verdict(ordered, best.share, best.profile.name, best.shares, best.responses)


def judge_without_outputs(outcome: Outcome) -> Verdict:
    """Judge a run that left no outputs, since it came to no end or nothing was to be executed; no case is needed."""
    if outcome.status == "unavailable":
        raise UnavailableError(f"the lane cannot run here: {outcome.message}")
    if outcome.status != "ok":
        return Verdict((failure(outcome),))
    return Verdict(worst_first(_conduct(outcome)))


def _with_causes(findings: tuple[Finding, ...], causes: list[str]) -> tuple[Finding, ...]:
    if not causes or not findings:
        return findings
    first = findings[0]
    return (dataclasses.replace(first, message=f"{first.message}. Likely cause: {'; '.join(causes)}"), *findings[1:])


def failure(outcome: Outcome) -> Finding:
    """The finding of a run that did not come to its end: raised, crashed or timed out."""
    return Finding(outcome.status, f"{outcome.message}{_in_text(outcome.location)}")


def _in_text(location: str | None) -> str:
    return f" ({location})" if location else ""


def _conduct(outcome: Outcome) -> list[Finding]:
    """Findings about what a run did besides computing values."""
    findings = [
        Finding(
            "changed_input", f"the kernel changed its input {name} in {count} elements; inputs are read-only", name, count=count
        )
        for name, count in outcome.changed_inputs.items()
    ]
    findings += [
        Finding("out_of_bounds", f"the kernel wrote outside the memory of {name}: {where}", name)
        for name, where in outcome.guard_damage.items()
    ]
    findings += [
        Finding("unwritten_read", f"{read.message}{_in_text(read.location)}", read.argument, count=read.count, total=read.total)
        for read in outcome.unwritten_reads
    ]
    if outcome.pass_differences:
        findings.append(_first_guilty_pass(outcome))
    return findings


def _first_guilty_pass(outcome: Outcome) -> Finding:
    """One finding for all passes that differ: what the first of them changed, since the later ones inherit it."""
    differences = sorted(outcome.pass_differences, key=lambda difference: difference.compiler_pass)
    first = differences[0]
    later = sorted({difference.compiler_pass for difference in differences} - {first.compiler_pass})
    rest = f", in {len(later)} later passes too" if later else ""
    return Finding(
        "compiler_pass",
        f"{first.message}. It is the first pass that differs; {len(differences)} of {outcome.passes_compared} results compared "
        f"differ{rest}",
        count=first.count,
        total=first.total,
    )


def _require_declared_shape(argument: Argument, found: torch.Tensor, case: Case) -> None:
    expected = argument.size(case.dims)
    if found.dtype != argument.dtype or tuple(found.shape) != expected:
        raise UsageError(
            f"{argument.name} of {case.stage.name} must be {argument.dtype} {list(expected)}, "
            f"found {found.dtype} {list(found.shape)}"
        )


def _numeric(
    case: Case,
    outcome: Outcome,
    oracle: Oracle,
    profile: Profile,
    explained: dict[str, torch.Tensor],
    ties: str,
    signatures: bool,
) -> NumericFindings:
    result = NumericFindings(profile, [], {})
    tied = {} if case.stage.ties is None else case.stage.ties(case.inputs, outcome.outputs, case.dims)
    for name, estimate in oracle.bounds(profile).items():
        part = part_of(case, outcome, name, estimate)
        flat = Bounds(as_matrix(estimate.value), as_matrix(estimate.variance), as_matrix(estimate.worst))
        skip = explained.get(name)
        if skip is not None and bool(skip.all()):
            continue
        if not part.argument.dtype.is_floating_point:
            result.shares[name] = judge_integers(case, part, flat, skip, result, tied.get(name), ties)
            continue
        share = judge_elements(case, oracle, profile, part, flat, skip, result)
        if part.argument.dtype in limits.STATISTICAL:
            statistics = Statistics(case, oracle, profile, part, flat, estimate, skip)
            share = max(share, statistics.spread(result))
            if not case.stage.composite:
                share = max(share, statistics.bias(result))
        result.shares[name] = share
    # Errors that are too large together may have a cause that is known; what is wrong or missing in a place hides it.
    if case.stage.composite and not explained and all(finding.detector == "spread" for finding in result.findings):
        judge_low_bits(case, outcome, oracle.bounds(profile), result)
        # Rows of a case that were rearranged are those of one that was judged.
        small = sum(tensor.numel() for tensor in case.inputs.values()) <= limits.MOST_INPUTS
        if signatures and small and not case.key.rows:
            judge_signatures(case, outcome, oracle, profile, result)
    return result
