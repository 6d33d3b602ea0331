"""Signatures of known mistakes: what each would add to the outputs of a layer, or of a chain of them.

Composed rounding noise hides them element by element. But their shape is known before a kernel runs, from the reference evaluated
as the mistaken kernel would; and so is the shape of the noise. A weighted sum of all errors, large for the mistake and small for
roundings, tells the two apart (a matched filter).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import Tensors
from conformance.judge.sensitivity import Sensitivity
from conformance.numerics.arithmetic import EXACT, Arithmetic, Disturbed, Sites, Truncating
from conformance.numerics.bounds import Bounds, rounding_variance
from conformance.numerics.ulp import spacing

if TYPE_CHECKING:
    from conformance.cases.case import Case

#: A factor that is off by this is searched for in every floating-point output. Half of it is enough to be told, and more than
#: what a sum of bf16 values gains by a cast that rounds its many ties away from zero.
FACTOR = 2.0**-7
#: Correlation from which on the rounding errors of two kernels at the same places count as the same.
ALIKE = 0.7
#: What is added to the diagonal of the correlations before they are inverted. Without it a filter would cancel noise to more
#: digits than a first-order model of it has.
RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class Signature:
    """A mistake, as a clause, and what it adds to the judged rows of each output, float64.

    ``opposite`` is the mistake that takes away as much, where there is one. One that ``is_legal`` is no mistake, and must not be
    taken for one.
    """

    mistake: str
    shifts: dict[str, torch.Tensor]
    opposite: str | None = None
    is_legal: bool = False


def signatures(case: Case, judged_rows: Mapping[str, torch.Tensor | None]) -> Iterator[Signature]:
    """The signatures of a composite stage's case; ``judged_rows`` has the rows of each output that count, ``None`` for all.

    First the mistakes that the reference has a name for, then those that the stage declares, then a factor on each output.
    """

    def results(inputs: Tensors, dims: Dims, arithmetic: Arithmetic = EXACT) -> dict[str, torch.Tensor]:
        found = case.stage.reference(inputs, dims, arithmetic)
        return {name: found[name] if rows is None else found[name][rows] for name, rows in judged_rows.items()}

    right = results(case.inputs, case.dims)

    def shifts(wrong: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: wrong[name] - right[name] for name in right}

    sites, after_all = Sites(rounds_all=False), Sites(rounds_all=True)
    results(case.inputs, case.dims, sites)
    results(case.inputs, case.dims, after_all)
    for name in sites.ties:
        tie_prone = name in case.stage.tie_prone
        larger = None if tie_prone else f"{name} is rounded away from zero (or too large by half a ULP on average)"
        truncated = shifts(results(case.inputs, case.dims, Truncating(name)))
        yield Signature(f"{name} is truncated instead of rounded (or too small by half a ULP on average)", truncated, larger)
        if tie_prone:
            for where, ties in (("", after_all.ties[name]), (", wherever they fall", after_all.even_ties(name))):
                away = shifts(results(case.inputs, case.dims, Disturbed(name, ties)))
                yield Signature(f"{name} is rounded with ties away from zero{where}", away, is_legal=True)
    for name, errors in sites.errors.items():
        yield Signature(f"{name} is rounded to bf16", shifts(results(case.inputs, case.dims, Disturbed(name, errors))))
        others = after_all.errors[name]
        if _unlike(errors, others):
            what = f"{name} is rounded to bf16 (in a kernel that makes all optional roundings)"
            yield Signature(what, shifts(results(case.inputs, case.dims, Disturbed(name, others))))
    for mistake, changed in case.stage.mistakes.items():
        yield Signature(mistake, shifts(results(*changed(case.inputs, case.dims))))
    nothing = {name: torch.zeros_like(value) for name, value in right.items()}
    for name, value in right.items():
        if case.stage.argument(name).dtype.is_floating_point:
            factor = {**nothing, name: value * FACTOR}
            yield Signature(f"{name} is too large by a constant factor", factor, f"{name} is too small by a constant factor")


def _unlike(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether rounding errors of the same places have so little in common that one cannot stand for the other."""
    one, other = (torch.cat([part.flatten() for part in parts]) for parts in (some, others))
    if not bool(one.any()):
        return bool(other.any())
    return float(one @ other) < ALIKE * float(one.norm() * other.norm())


@dataclasses.dataclass(frozen=True)
class Filter:
    """A weighted sum of all errors that shows one mistake: one standard deviation in correct kernels, ``expected`` in a mistaken
    one."""

    mistake: str
    weights: dict[str, torch.Tensor]
    expected: float


def filters(case: Case, bounds: Mapping[str, Bounds], sensitivity: Sensitivity) -> list[Filter]:
    """A filter for each signature that the case shows at all, and for its opposite.

    The best weights for a shift s in noise of covariance C are ``inverse(C) s``. C has a row for every element of every output:
    the weights are sought among combinations of the signatures, each over the variance of the elements, and different for each
    sequence. ``benchmarks/signatures.py`` compares them with the best. What is legal is not among them: a filter could be made
    blind to where ties fall in one kernel, and see those of another.
    """
    found = list(signatures(case, {name: estimate.rows for name, estimate in bounds.items()}))
    found.sort(key=lambda one: one.is_legal)
    count = sum(not one.is_legal for one in found)
    shifts = {name: _finite(torch.stack([one.shifts[name] for one in found])) for name in bounds}  # [K, rows, columns]
    directions = {
        name: _finite(shift[:count] / (bounds[name].variance + _cast_variance(case, name, bounds[name])))
        for name, shift in shifts.items()
    }
    largest = torch.stack([direction.flatten(1).abs().amax(1) for direction in directions.values()]).amax(0)
    shown = largest > 0
    if not bool(shown.any()):
        return []
    directions = {name: direction[shown] / largest[shown].view(-1, 1, 1) for name, direction in directions.items()}
    owners = {name: _sequence_of_judged_rows(case, name, bounds[name], sensitivity) for name in bounds}
    effects = sensitivity.effects(directions)
    covariances = effects.covariances()
    # What each direction makes of each signature, by sequence.
    responses = torch.zeros(case.dims.batch, len(covariances[0]), len(found), dtype=torch.float64)
    for name, owner in owners.items():
        responses.index_add_(0, owner, torch.einsum("krc,lrc->rkl", directions[name], shifts[name]))
    legal = list(responses[:, :, count:].unbind(2))
    sums = []
    for signature, response, shows in zip(found, responses.unbind(2), shown.tolist(), strict=False):
        for mistake, sign in ((signature.mistake, 1), (signature.opposite, -1)):
            if mistake is not None and shows:
                part, variance = _combination(covariances, sign * response, legal)
                sums.append((mistake, part, float((part * sign * response).sum()), variance))
    results = []
    # The covariances take sequences as independent, which they are not where they are rounded alike.
    shared = effects.variances(torch.stack([part for _, part, _, _ in sums])).tolist()
    for (mistake, part, expected, variance), with_shared in zip(sums, shared, strict=True):
        # What looks like the mistake and is legal is for a single case an error like others.
        deviation = math.sqrt(max(variance, with_shared) + sum(max(0.0, float((part * one).sum())) ** 2 for one in legal))
        if 0 < deviation < math.inf:
            unit = part / deviation
            weights = {name: torch.einsum("rk,krc->rc", unit[owner], directions[name]) for name, owner in owners.items()}
            # In fp32: of many cases they are most of what is kept.
            results.append(Filter(mistake, {name: weight.float() for name, weight in weights.items()}, expected / deviation))
    return results


def _combination(covariances: torch.Tensor, response: torch.Tensor, legal: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The best weights of K directions for each sequence, ``[B, K]``, and the variance of what they sum in correct kernels.

    ``covariances [B, K, K]`` are those of the directions in correct kernels, ``response [B, K]`` is what each makes of the
    mistake, ``legal`` what it makes of something that a correct kernel does or not, in all sequences alike: where that looks like
    the mistake, its sum over the sequences has to vanish.
    """
    batch, count = response.shape
    doubtful: list[torch.Tensor] = []
    while True:
        noise = covariances + sum((batch * one.unsqueeze(1) * one.unsqueeze(2) for one in doubtful), torch.zeros(()))
        size = noise.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-150)
        correlations = noise / size.unsqueeze(1) / size.unsqueeze(2) + RIDGE * torch.eye(count, dtype=torch.float64)
        part = torch.linalg.solve(correlations, response / size) / size
        more = [one for one in legal if float((part * one).sum()) > 0 and not any(one is other for other in doubtful)]
        if not more:
            break
        doubtful += more
    return part, float((part.unsqueeze(1) @ covariances @ part.unsqueeze(2)).sum())


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isfinite(tensor), tensor, 0.0)


def _cast_variance(case: Case, name: str, estimate: Bounds) -> torch.Tensor:
    """Of the last rounding of an output, to its own dtype."""
    return rounding_variance(spacing(estimate.value, case.stage.argument(name).dtype))


def _sequence_of_judged_rows(case: Case, name: str, estimate: Bounds, sensitivity: Sensitivity) -> torch.Tensor:
    """Which sequence each judged row of an output belongs to; they stand by layer, token and head, by token or by sequence."""
    if case.stage.argument(name).axes[0] == (case.dims.symbol("batch"),):
        return torch.arange(case.dims.batch)
    if estimate.rows is None:
        return sensitivity.sequences
    tokens, layers = len(sensitivity.sequences), case.dims.depth
    per_layer = sensitivity.sequences.repeat_interleave(len(estimate.rows) // (tokens * layers))
    return per_layer.repeat(layers)
