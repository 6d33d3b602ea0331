"""Elements that are not finite, or further from the oracle than any correct kernel's can be: docs/rule.md, Element."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import torch

from conformance.cases.case import Case
from conformance.contract.precision import TIES
from conformance.judge import limits
from conformance.judge.limits import kappa
from conformance.judge.oracle import Oracle
from conformance.judge.outputs import NumericFindings, OutputPart, WorstElement, as_matrix, blocks_of, count_true, part_of
from conformance.judge.verdict import Finding
from conformance.judge.wording import element_in_words, extent_finding, pattern_in_words
from conformance.lanes.base import Outcome
from conformance.numerics.bounds import Bounds, Profile
from conformance.numerics.ulp import distance, rounded, spacing


@dataclasses.dataclass(frozen=True, order=True)
class _Worst:
    """The element that is told of: the one of the largest share; of those that allow nothing, the largest error; the first."""

    rank: float
    error: float
    minus_flat: int
    share: float


def judge_elements(
    case: Case,
    oracle: Oracle,
    profile: Profile,
    part: OutputPart,
    estimate: Bounds,
    skip: torch.Tensor | None,
    result: NumericFindings,
) -> float:
    """The worst share of its allowance that an element uses."""
    scan = _scan(part, estimate, skip)
    if case.stage.composite and scan.highest <= limits.MOST_ELEMENT_SHARE and 0 < count_true(scan.beyond) <= limits.MOST_ELEMENTS:
        # The error model takes the errors that a sum has for terms as independent. Where a few roundings steer a row (those of a
        # query that reads two keys), they are not: some columns vary four times as much as it says, and others less.
        variance = estimate.variance.clone()
        for row, column in torch.nonzero(scan.beyond).tolist():
            exact = oracle.element_variance(part.argument.name, profile, row, column)
            if exact <= float(variance[row, column]):
                break  # this one is wrong, and so is the run
            variance[row, column] = exact
        estimate = Bounds(estimate.value, variance, estimate.worst)
        scan = _scan(part, estimate, skip)
    if bool(scan.broken.any()):
        result.wrong += count_true(scan.broken)
        # Block by block: a selection of the whole would take as much memory as the output.
        kinds = {kind for block in blocks_of(part.found) for kind in _kinds(part.found[block], scan.broken[block])}
        what = " or ".join(sorted(kinds))
        text = f"is {what} where the exact result is finite"
        result.findings.append(extent_finding(case, part, scan.broken, "not_finite", text))
    if scan.worst is not None:
        result.wrong += count_true(scan.beyond)
        row, column = divmod(-scan.worst.minus_flat, part.found.shape[1])
        pattern, count = pattern_in_words(part, scan.beyond), count_true(scan.beyond)
        near = estimate[row, column]
        worst = WorstElement(part.argument.name, row, column, scan.worst.share, pattern, count, scan.beyond.numel(), near)
        result.elements[part.argument.name] = worst
        result.findings.append(_element_finding(case, part, worst, near))
    return scan.highest


def _kinds(found: torch.Tensor, broken: torch.Tensor) -> Iterator[str]:
    nan = found.isnan()
    if bool((nan & broken).any()):
        yield "NaN"
    if bool((broken & ~nan).any()):
        yield "infinite"


@dataclasses.dataclass(frozen=True)
class _Scan:
    """Which elements of an output are not finite or beyond their allowance, the worst of these, and the highest share."""

    broken: torch.Tensor
    beyond: torch.Tensor
    worst: _Worst | None
    highest: float


def _scan(part: OutputPart, estimate: Bounds, skip: torch.Tensor | None) -> _Scan:
    """Look at every element, block by block, most of them in passing."""
    found, dtype = part.found, part.argument.dtype
    deviations = kappa(found.numel())
    broken, beyond = (torch.zeros(found.shape, dtype=torch.bool) for _ in range(2))
    highest = 0.0
    worst: _Worst | None = None
    for block in blocks_of(found):
        out, near = found[block], estimate[block]
        # Forgiving the half ULP of the last rounding only makes a share smaller. Where even without it no element uses more of
        # its allowance than one did before, the block has nothing to tell. What is not a number is never that little.
        error = (out - near.value).abs_()
        unforgiven = error.div_(torch.minimum(near.variance.sqrt().mul_(deviations), near.worst))
        if float(unforgiven.max()) <= min(highest, 1.0):
            continue
        out = out.to(torch.float64)
        wanted = None if skip is None else ~skip[block]
        strange = _not_finite(out, near.value, dtype, wanted)
        if strange is not None:
            broken[block] = strange
        share = _shares(out, near, dtype, deviations, wanted)
        most = float(share.max())
        if math.isnan(most) or most > highest:
            highest = most
        over = ~(share <= 1)
        if bool(over.any()):
            beyond[block] = over
            here = _worst_of(out - near.value, share, over, block, found.shape[1])
            worst = here if worst is None else max(worst, here)
    return _Scan(broken, beyond, worst, highest)


def _not_finite(out: torch.Tensor, value: torch.Tensor, dtype: torch.dtype, wanted: torch.Tensor | None) -> torch.Tensor | None:
    """Which elements are NaN or infinite where the oracle is not the same; ``None`` if all are finite."""
    strange = ~torch.isfinite(out)
    if not bool(strange.any()):
        return None
    oracle = rounded(value, dtype)
    # Bit-equal infinities and NaNs of both are agreement; one-sided ones are not.
    strange &= ~((out == oracle) | (out.isnan() & oracle.isnan()))
    return strange if wanted is None else strange & wanted


def _shares(
    out: torch.Tensor, estimate: Bounds, dtype: torch.dtype, deviations: float, wanted: torch.Tensor | None
) -> torch.Tensor:
    """What part of its allowance the error of each element uses; 0 for one that is not finite, or not wanted."""
    value = estimate.value
    rounding, allowance = _legal_distance(out, estimate, dtype, deviations)
    excess = (out - value).abs_().sub_(rounding)
    usable = torch.isfinite(out) & torch.isfinite(value) & (excess > 0)
    if wanted is not None:
        usable &= wanted
    return torch.where(usable, excess / allowance, 0.0)


def _legal_distance(
    out: torch.Tensor, estimate: Bounds, dtype: torch.dtype, deviations: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far an element may be from the exact value: by its last rounding, and by the errors before that (the allowance)."""
    value = estimate.value
    half = spacing(torch.maximum(out.abs(), value.abs()), dtype).mul_(0.5 * limits.HALF_ULP_SLACK).add_(limits.FLUSHED)
    certain = estimate.worst == 0
    if bool(certain.any()):
        # A copy of an exact value (a cache row, a bf16 key) is bit-exact: there is no last rounding to forgive.
        half.masked_fill_(certain & (rounded(value, dtype) == value), 0.0)
    worst = torch.nan_to_num(estimate.worst, nan=math.inf, posinf=math.inf)
    return half, torch.minimum(estimate.variance.sqrt().mul_(deviations), worst)


def _worst_of(error: torch.Tensor, share: torch.Tensor, over: torch.Tensor, block: tuple[slice, slice], columns: int) -> _Worst:
    """The worst of a block's elements that are ``over``, and where it stands among all rows of that many ``columns``."""
    rank = torch.where(over, torch.nan_to_num(share, nan=math.inf), -1.0)
    highest = rank.max()
    size = torch.where(rank == highest, error.abs(), -1.0)
    place = int(size.argmax())
    row, column = divmod(place, error.shape[1])
    flat = (block[0].start + row) * columns + block[1].start + column
    return _Worst(float(highest), float(size.flatten()[place]), -flat, float(share.flatten()[place]))


def judge_integers(
    case: Case,
    part: OutputPart,
    estimate: Bounds,
    skip: torch.Tensor | None,
    result: NumericFindings,
    tied: torch.Tensor | None = None,
    ties: str = TIES[0],
) -> float:
    """Integers are right or wrong; returns the share of the allowance, of which there is none.

    ``tied`` marks those that name another one of equals than the contract does, ``ties`` is what the kernel declares of them.
    """
    wrong = part.value != estimate.value
    if skip is not None:
        wrong &= ~skip
    tied = torch.zeros_like(wrong) if tied is None else wrong & tied.view(wrong.shape)
    if ties != TIES[0]:
        wrong &= ~tied
    if not bool(wrong.any()):
        return 0.0
    untied = wrong & ~tied
    flat = int(torch.nonzero((untied if bool(untied.any()) else wrong).flatten())[0])
    index = part.index(flat)[-len(part.argument.size(case.dims)) :]
    why = ""
    if bool(tied.flatten()[flat]):
        why = " (a tie: what both stand for is equal, and the contract takes the lowest; if any will do, declare ties='any')"
    found, expected = int(part.value.flatten()[flat]), int(estimate.value.flatten()[flat])
    result.wrong += count_true(wrong)
    result.findings.append(
        Finding(
            "element",
            f"{element_in_words(part.argument, index)} is {found}, must be exactly {expected}{why}; "
            f"{pattern_in_words(part, wrong)}",
            part.argument.name,
            index,
            part.argument.where(index, case.dims),
            share=math.inf,
            count=count_true(wrong),
            total=wrong.numel(),
        )
    )
    return math.inf


def _element_finding(case: Case, part: OutputPart, worst: WorstElement, near: Bounds) -> Finding:
    """The finding about the worst element, with what it may be as ``near`` says."""
    argument = part.argument
    index = part.index(worst.row * part.found.shape[1] + worst.column)
    where = argument.where(index[-len(argument.size(case.dims)) :], case.dims)
    at_worst, value = part.found[worst.row, worst.column].to(torch.float64), near.value
    found, expected = float(at_worst), float(value)
    rounding, allowance = map(float, _legal_distance(at_worst, near, argument.dtype, limits.kappa(part.found.numel())))
    legal = rounding + allowance
    count = _unit(at_worst, value, argument.dtype, legal)
    away = abs(found - expected)
    digits = 9 if argument.dtype == torch.float32 else 6
    if allowance == 0:
        text = f"must be exactly {expected:.{digits}g} (no error is legal here), {count(away)} away"
    else:
        # Beyond the interval: the share of the allowance leaves the last rounding out and would mislead.
        text = (
            f"outside the legal {expected - legal:.{digits}g}..{expected + legal:.{digits}g} by {count(away - legal)} "
            f"(expected {expected:.{digits}g}, {count(away)} away)"
        )
    return Finding(
        "element",
        f"{element_in_words(argument, index)} is {found:.{digits}g}, {text}; {worst.pattern}",
        argument.name,
        index,
        where,
        share=worst.share,
        ulps=float(distance(at_worst, value, argument.dtype)) if count.own else None,
        count=worst.count,
        total=worst.total,
    )


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What an error is counted in; ``own``: in ULPs of the output's dtype."""

    size: float
    name: str
    own: bool = False

    def __call__(self, amount: float) -> str:
        number = amount / self.size
        return f"{number:.3g} {self.name}" if number >= 0.001 else f"less than 0.001 {self.name}"


def _unit(found: torch.Tensor, value: torch.Tensor, dtype: torch.dtype, legal: float) -> _Unit:
    """ULPs, as long as they say something: of bf16 for an fp32 value that is off by many of its own, and of neither where many
    are legal (the value is what is left of larger ones): there the legal distance is the measure."""
    larger = torch.maximum(found.abs(), value.abs())
    unit = _Unit(float(spacing(larger, dtype)), "ulp", own=True)
    if dtype == torch.float32 and float((found - value).abs()) >= limits.MANY_ULPS_FP32 * unit.size:
        unit = _Unit(float(spacing(larger, limits.BF16)), "bf16 ulp")
    return unit if legal <= limits.MANY_ULPS * unit.size else _Unit(legal, "times the legal distance")


def tell_nearest(case: Case, outcome: Outcome, oracle: Oracle, profiles: Iterable[Profile], result: NumericFindings) -> None:
    """Tell each element that is wrong by the profile whose exact value comes nearest to what was found, where it is wrong under
    that one too: what a kernel meant to compute is more likely that."""
    for position, finding in enumerate(result.findings):
        worst = result.elements.get(finding.argument or "")
        if finding.detector != "element" or worst is None:
            continue
        nearest = worst.near
        for profile in profiles:
            estimate = oracle.bounds(profile)[worst.argument]
            part = part_of(case, outcome, worst.argument, estimate)
            flat = Bounds(as_matrix(estimate.value), as_matrix(estimate.variance), as_matrix(estimate.worst))
            near = flat[worst.row, worst.column]
            found = part.found[worst.row, worst.column].to(torch.float64)
            error = (found - near.value).abs()
            legal = sum(_legal_distance(found, near, part.argument.dtype, limits.kappa(part.found.numel())))
            if bool(error > legal) and bool(error < (found - nearest.value).abs()):
                nearest = near
                result.findings[position] = _element_finding(case, part, worst, near)
