"""The errors of a layer or a chain, held against the signatures of known mistakes; of one case, and of all cases together.

The limits and the sums over cases: docs/rule.md, Pooling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from conformance.cases.case import Case
from conformance.judge import limits
from conformance.judge.matched_filters import Filter
from conformance.judge.oracle import Oracle
from conformance.judge.outputs import NumericFindings, as_matrix, count_true, part_of
from conformance.judge.verdict import FilterResponse, Finding, Verdict
from conformance.judge.wording import extent_finding
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import bits
from conformance.numerics.arithmetic import CONTRACT
from conformance.numerics.bounds import Bounds, Profile


def judge_together(runs: Sequence[Mapping[str, FilterResponse]]) -> tuple[Verdict, int]:
    """Judge what the errors of several cases have in common, of each how far they lie along the signature of each mistake.

    Each case counts by what the mistake adds to it (a matched filter over cases), and none decides by itself: the one that speaks
    for the mistake most is left out. Returns the verdict and the number of that case.
    """
    verdict, telling = Verdict(), 0
    for mistake in dict.fromkeys(mistake for run in runs for mistake in run):
        known = {number: run[mistake] for number, run in enumerate(runs) if mistake in run}
        most = max(known, key=lambda number: known[number].sigmas * known[number].expected)
        others = [one for number, one in known.items() if number != most]
        expected = sum(one.expected**2 for one in others)
        if len(others) < 2 or not 0 < expected < math.inf:
            continue
        amount = sum(one.sigmas * one.expected for one in others)
        sigmas, part = amount / math.sqrt(expected), amount / expected
        share = min(sigmas / limits.POOLED_SIGMAS, part / limits.POOLED_PART)
        if not share > (verdict.share or 0.0):
            continue
        telling = most
        message = (
            f"errors pooled over {len(known)} cases match a known mistake: {mistake}. z-score {sigmas:.3g} (limit "
            f"{limits.POOLED_SIGMAS:g}), amplitude {part:.2g} of that mistake (limit {limits.POOLED_PART:g}), the most telling "
            "case left out; no single case is significant"
        )
        verdict = Verdict((Finding("pooled_signature", message, share=share),) if share > 1 else (), share)
    return verdict, telling


def judge_signatures(case: Case, outcome: Outcome, oracle: Oracle, profile: Profile, result: NumericFindings) -> None:
    """Do the errors of all outputs together look like what a known mistake adds? The one that they look like most is told.

    Inside a layer a truncated value leaves every element within its allowance, but moves all of them in a way that is known.
    """
    bounds = oracle.bounds(profile)
    errors = {}
    for name, estimate in bounds.items():
        error = part_of(case, outcome, name, estimate).value - as_matrix(estimate.value)
        errors[name] = torch.where(torch.isfinite(error), error, 0.0)
    worst: tuple[float, float, Filter] | None = None
    found = oracle.filters(profile)
    sums = found[0].directions.sums(errors) if found else torch.zeros(())
    for one in found:
        sigmas = float((one.combination * sums).sum())
        part = sigmas / one.expected
        result.responses[one.mistake] = FilterResponse(sigmas, one.expected)
        enough = max(limits.SIGNATURE_SIGMAS, worst[0] if worst else 0.0)
        if part <= limits.SIGNATURE_PART or sigmas <= enough:
            continue
        # The filter takes it for granted which rounding belongs to which sequence.
        sigmas /= max(1.0, oracle.deviation_along(one.weights, profile))
        if sigmas > enough:
            worst = sigmas, part, one
    if worst is None:
        return
    sigmas, part, one = worst
    weights = one.weights
    name = max(weights, key=lambda name: float((errors[name] * as_matrix(weights[name])).sum()))
    share = min(sigmas / limits.SIGNATURE_SIGMAS, part / limits.SIGNATURE_PART)
    result.wrong += 1
    result.shares[name] = max(result.shares.get(name, 0.0), share)
    result.findings.append(
        Finding(
            "signature",
            f"errors match a known mistake: {one.mistake}. z-score {sigmas:.3g} (limit {limits.SIGNATURE_SIGMAS:g}), amplitude "
            f"{part:.2g} of that mistake (limit {limits.SIGNATURE_PART:g}); matched filter over {', '.join(bounds)}, of which "
            "each element by itself is legal",
            name,
            share=share,
        )
    )


def judge_low_bits(case: Case, outcome: Outcome, bounds: dict[str, Bounds], result: NumericFindings) -> None:
    """Are most values of an fp32 output bf16 values? By chance one in 65536 is. Not looked for where the kernel declares it."""
    for name, estimate in bounds.items():
        part = part_of(case, outcome, name, estimate)
        if name in result.profile.declared:
            continue
        if part.argument.dtype != torch.float32 or 2 * count_true(_is_bf16(part.found)) <= part.found.numel():
            continue
        # So may those of a correct kernel be: its weights may be ones that pick a rounded value each.
        expected = case.stage.reference(case.inputs, case.dims, CONTRACT)[name].float()
        telling = torch.isfinite(part.found) & ~_is_bf16(
            as_matrix(expected if estimate.rows is None else expected[estimate.rows])
        )
        short = telling & _is_bf16(part.found)
        if count_true(telling) >= limits.FEWEST_DISTINCT and 2 * count_true(short) > count_true(telling):
            result.wrong += count_true(short)
            result.findings.append(
                extent_finding(
                    case,
                    part,
                    short,
                    "signature",
                    "is an fp32 output that was rounded to bf16 (the low 16 bits are zero where the exact result's are not)",
                )
            )


def _is_bf16(found: torch.Tensor) -> torch.Tensor:
    return bits(found.contiguous()) & 0xFFFF == 0
