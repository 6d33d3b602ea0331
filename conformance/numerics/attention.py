"""How far a correct attention may stray: softmax over rows of keys, and a sum of rows of values, for grouped queries.

Shapes: ``N`` queries, ``K`` heads of keys and values, each of which ``G`` query heads share, ``n`` rows, ``D`` columns of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from conformance.numerics.bounds import (
    BF16,
    FINER,
    FP16_SPACING,
    SMALLEST_NORMAL,
    SUM_OF_RESULT,
    SUM_OF_SQUARES,
    Bounds,
    Correlation,
    Profile,
    U,
    optional_rounding,
    rounding_variance,
    scaled,
)
from conformance.numerics.ulp import rounded, spacing

#: Elements of what attention computes for every query, key and column, at a time: 1 MB, which stays in a core's cache.
ATTENTION_ELEMENTS = 1 << 17


#: Variance of the relative error of one bf16 rounding, averaged over mantissas: ``(2**-8)**2 / 5`` per probability.
PROBABILITY_VARIANCE = 2.0**-16 / 5


#: Smallest normal number of fp16.
FP16_NORMAL = 2.0**-14


#: Fewer probabilities that agree may agree by accident.
FEWEST_ALIKE = 4


@dataclasses.dataclass(frozen=True)
class NewRows:
    """The key and value rows that a layer has just written for one query: ``[K, m, D]``, the last ``m`` that it attends to."""

    key: Bounds
    value: Bounds


def attention(
    query: Bounds,
    keys: Sequence[torch.Tensor] | torch.Tensor,
    values: Sequence[torch.Tensor] | torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    profile: Profile,
    new_rows: Sequence[NewRows] | None = None,
    want_correlation: bool = False,
) -> Bounds:
    """``softmax(scale * q K^T) V`` before its cast, for ``query [N, K*G, D]`` and for each of the N the rows ``[K, n, D]``.

    Rows past ``lengths`` are never looked at. ``new_rows`` replace the last rows of every query by uncertain values. With
    ``want_correlation`` the result says how roundings of the probabilities correlate the errors of a row, for its final bf16.
    """
    step = max(1, ATTENTION_ELEMENTS // (max(lengths) * query.value.shape[1] * query.value.shape[2]))
    # Those of about equal length together: the others are padded.
    order = torch.tensor(lengths).argsort()
    parts = []
    for some in torch.split(order, step):
        chosen = some.tolist()
        parts.append(
            _attention_of(
                query[some],
                [keys[index] for index in chosen],
                [values[index] for index in chosen],
                [lengths[index] for index in chosen],
                scale,
                profile,
                None if new_rows is None else [new_rows[index] for index in chosen],
                want_correlation,
            )
        )
    back = order.argsort()
    columns = [torch.cat([getattr(estimate, name) for estimate, _ in parts])[back] for name in ("value", "variance", "worst")]
    correlation = None
    if want_correlation and _probabilities_rounded_to(profile) is not None:
        sums, squares, of_heads = (torch.cat(column)[back] for column in zip(*(sums for _, sums in parts), strict=True))
        correlation = Correlation((sums**2 / squares.clamp_min(1e-300)).clamp_min(1), sums, of_heads)
    return Bounds(columns[0], columns[1], columns[2], correlation=correlation)


def _probabilities_rounded_to(profile: Profile) -> torch.dtype | None:
    """The format that probabilities are rounded to; ``None`` if they stay fp32. fp16 stands for all that is finer than bf16."""
    if profile.makes("probabilities"):
        return BF16
    return torch.float16 if "probabilities" in profile.finer else None


def _padded(rows: list[torch.Tensor], stops: list[int], longest: int) -> torch.Tensor:
    """``[N, K, longest, D]`` in float64 of rows ``[K, m, D]`` each, the last of which is to be the one before ``stops``."""
    kv_heads, _, head_dim = rows[0].shape
    found = torch.zeros(len(stops), kv_heads, longest, head_dim, dtype=torch.float64)
    for place, part, stop in zip(found, rows, stops, strict=True):
        place[:, stop - part.shape[1] : stop] = part
    return found


def _attention_of(
    query: Bounds,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    lengths: list[int],
    scale: float,
    profile: Profile,
    new_rows: list[NewRows] | None,
    want_correlation: bool,
) -> tuple[Bounds, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The bounds of some queries; of each the variance of its signed sum, that sum's squares, and the heads' variances."""
    several, heads, head_dim = query.value.shape
    kv_heads, longest = keys[0].shape[0], max(lengths)
    grouped = query.reshape(several, kv_heads, -1, head_dim)  # [N, K, G, D]
    q = grouped.value
    k, v = (_padded([r[:, :n] for r, n in zip(rows, lengths, strict=True)], lengths, longest) for rows in (keys, values))
    length = torch.tensor(lengths, dtype=torch.float64).view(-1, 1, 1, 1)
    inside = torch.arange(longest) < length  # [N, 1, 1, n]
    if new_rows is not None:
        # Zero where the rows are those of the cache.
        key_variance, key_worst, value_variance, value_worst = (
            _padded([getattr(getattr(new, which), name) for new in new_rows], lengths, longest)
            for which in ("key", "value")
            for name in ("variance", "worst")
        )
        for index, (new, stop) in enumerate(zip(new_rows, lengths, strict=True)):
            written = slice(stop - new.key.value.shape[1], stop)
            k[index, :, written], v[index, :, written] = new.key.value, new.value.value
    k_t = k.transpose(2, 3)
    k_abs_t = k_t.abs()
    z = scale * (q @ k_t)  # [N, K, G, n]
    z_abs = z.abs()
    z_magnitude = scale * (q.abs() @ k_abs_t)
    z_variance = (U * (z_magnitude + 2 * z_abs + 3)) ** 2
    z_worst = U * (head_dim * z_magnitude + 2 * z_abs + 3)
    if new_rows is not None:
        z_variance += scale**2 * (q**2 @ key_variance.transpose(2, 3))
        z_worst += scale * (q.abs() @ key_worst.transpose(2, 3) + grouped.worst @ k_abs_t)
    rounds_scores = profile.makes("unscaled scores") or profile.makes("scores")
    if rounds_scores:
        z, z_variance, z_worst = _rounded_scores(Bounds(z, z_variance, z_worst), scale, profile)
    z = torch.where(inside, z, -torch.inf)
    p = torch.softmax(z, -1)
    o = p @ v  # [N, K, G, D]
    v_abs = v.abs()
    centred = v.unsqueeze(2) - o.unsqueeze(3)  # V - o, [N, K, G, n, D]
    if new_rows is not None:
        # What an uncertain query does. All is over its largest magnitude, so that fp32 will do: where it cancels, V - o has.
        (value_size, key_size, query_size) = (_largest(tensor) for tensor in (v, k, grouped.variance))
        weighted = ((p / value_size).unsqueeze(-1) * centred).float().transpose(3, 4)  # [N, K, G, D, n]
        sensitivity = weighted @ (k / key_size).float().unsqueeze(2)  # [N, K, G, D, D]
        of_query = sensitivity.square_() @ (grouped.variance / query_size).float().unsqueeze(-1)
        of_query = of_query.squeeze(-1).double() * (query_size * (value_size * key_size) ** 2)
    spread = centred.abs_()
    magnitude = p @ v_abs
    worst = ((p * torch.expm1(z_worst.clamp_max(60))).unsqueeze(3) @ spread).squeeze(3)
    squared = spread.square_()
    variance = ((p**2 * z_variance).unsqueeze(3) @ squared).squeeze(3)
    if rounds_scores:
        # However far a score is off, the result is a mean of values: none of them is further away than the furthest.
        furthest = torch.where(inside.transpose(2, 3).unsqueeze(2), squared, 0.0).amax(3)
        variance = torch.minimum(variance, furthest)
    if new_rows is not None:
        variance += scale**2 * of_query
        variance += p**2 @ value_variance
        worst += p @ value_worst
    squares = (p**2 @ v**2).sqrt()
    deviation = torch.maximum(magnitude, SUM_OF_SQUARES * length.sqrt() * squares)
    accumulation = U * (deviation + (SUM_OF_RESULT * length.sqrt() + 4) * o.abs())
    variance += accumulation**2
    worst += U * (2 * length + 8) * magnitude
    # Probabilities below fp32's smallest normal number lose their precision, or are flushed to zero.
    underflow = SMALLEST_NORMAL * v_abs.sum(2).unsqueeze(2)
    variance += underflow**2
    worst += underflow
    sum_variance = square_sum = torch.zeros(several, dtype=torch.float64)
    head_variance = torch.zeros(several, heads, dtype=torch.float64)
    narrow = _probabilities_rounded_to(profile)
    if narrow is not None:
        unit = 1.0 if narrow == BF16 else 1 / FINER
        several_keys = length > 1  # the probability of a lone key is 1, which no rounding changes
        from_rounded = profile.makes("denominator_of_rounded") and not profile.modelled
        signed = (v.unsqueeze(2) - o.unsqueeze(3)) if from_rounded else v.unsqueeze(2).expand_as(spread)
        moving = p * several_keys
        # What rounding does to each probability relative to it, before or after it is normalised.
        exponentials = torch.exp(z - z.amax(-1, keepdim=True))
        bins = _equal_probabilities(p, length, unit=unit)
        variance += bins.variance(moving, signed, exponentials, narrow)
        worst += several_keys * 2.0**-8 * unit * magnitude
        if narrow != BF16:
            # Below its normal numbers fp16 errs by as much whatever the probability.
            variance += several_keys * FP16_SPACING**2 / 12 * (v**2).sum(2).unsqueeze(2)
            worst += several_keys * FP16_SPACING / 2 * v_abs.sum(2).unsqueeze(2)
        if want_correlation:
            # d(sum of signed scaled errors) / d(one rounded probability), and one term per final rounding.
            relative = torch.maximum(*(_relative_rounding(some, narrow) for some in (p, exponentials))).flatten().unsqueeze(1)
            ulp_variance = rounding_variance(spacing(o, BF16))
            weight = torch.sign(o) / (variance + ulp_variance).sqrt()
            by_probability = (moving * (signed @ weight.unsqueeze(4)).squeeze(4)).flatten().unsqueeze(1)
            # Heads whose probabilities agree round them alike too: all of a row's, where its query is small.
            whole_row = _equal_probabilities(p, length, across_heads=True, unit=unit)
            shared = whole_row.squared(by_probability, relative)
            final = weight**2 * ulp_variance * several_keys
            sum_variance = whole_row.sum_of_owners(shared).flatten() + final.flatten(1).sum(1)
            square_sum = whole_row.sum_of_owners(shared**2).flatten() + (final**2).flatten(1).sum(1)
            of_heads = bins.sum_of_owners(bins.squared(by_probability, relative)).view(several, heads)
            head_variance = of_heads + final.flatten(1, 2).sum(-1)
    return Bounds(o, variance, worst).reshape(several, heads, head_dim), (sum_variance, square_sum, head_variance)


def _rounded_scores(scores: Bounds, scale: float, profile: Profile) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores in bf16, before their scale, after it or both: their value, the variance of exp of it, relative, and the worst case.

    A ULP of bf16 at a score of 100 is a half: ``exp`` is no straight line there. For a Gaussian error of variance s2 the mean of
    ``(exp(error) - 1)**2`` is ``exp(2 s2) - 2 exp(s2 / 2) + 1``, and s2 to first order.
    """
    if profile.makes("unscaled scores"):
        factor = torch.tensor(1 / scale, dtype=torch.float64)
        unscaled = optional_rounding(scaled(scores, factor), profile, "unscaled scores")
        scores = scaled(unscaled, 1 / factor)
    scores = optional_rounding(scores, profile, "scores")
    s2 = scores.variance.clamp_max(60)
    return scores.value, torch.expm1(2 * s2) - 2 * torch.expm1(s2 / 2), scores.worst


@dataclasses.dataclass(frozen=True)
class _Bins:
    """Probabilities by bin: which bin each is in, and which of ``count`` owners, heads or whole rows, each bin is of."""

    members: torch.Tensor
    owners: torch.Tensor
    count: int
    unit: float = 1.0

    def squared(self, terms: torch.Tensor, relative: torch.Tensor) -> torch.Tensor:
        """By bin, the variance that roundings of ``terms [probabilities, D]`` add up to: alike or independent, as is larger.

        Alike, they cancel where the terms do; the small differences between members of a bin then remain. Where a bin has several
        members the error that they share is no accident, but ``relative [probabilities, 1]`` of each: 255 probabilities of
        1 / 255 all lie on a tie of bf16, and err by five times the variance that roundings have on average.
        """
        several = torch.bincount(self.members)[self.members] >= FEWEST_ALIKE
        average = PROBABILITY_VARIANCE**0.5 * self.unit
        size = torch.where(several.unsqueeze(1), relative.clamp_min(average), average)
        zeros = terms.new_zeros(len(self.owners), terms.shape[-1])
        errors = terms * size
        alike = zeros.index_add(0, self.members, errors) ** 2
        return torch.maximum(alike, zeros.index_add_(0, self.members, errors * errors))

    def variance(self, p: torch.Tensor, values: torch.Tensor, exponentials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What rounding all ``p [N, K, G, n]`` does to their sums of ``values [N, K, G, n, D]``: variances, ``[N, K, G, D]``.

        The sum over the bins of a head of what ``squared`` tells. Most bins have one member, which needs no collecting.
        """
        lone = (torch.bincount(self.members)[self.members] == 1).view_as(p)
        found = PROBABILITY_VARIANCE * self.unit**2 * ((p * lone).square().unsqueeze(3) @ values.square()).squeeze(3)
        place = torch.nonzero(~lone & (p > 0), as_tuple=True)
        if not len(place[0]):
            return found
        bins, members = torch.unique(self.members.view_as(p)[place], return_inverse=True)
        relative = torch.maximum(*(_relative_rounding(one[place], dtype) for one in (p, exponentials))).unsqueeze(1)
        some = _Bins(members, self.owners[bins], self.count, self.unit)
        return found + some.sum_of_owners(some.squared(p[place].unsqueeze(1) * values[place], relative)).view_as(found)

    def sum_of_owners(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over the bins of each owner."""
        return sums.new_zeros(self.count, sums.shape[-1]).index_add_(0, self.owners, sums)


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each matrix."""
    return tensor.abs().amax((-2, -1), keepdim=True).clamp_min(1e-300)


def _relative_rounding(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far each positive value is rounded, relative to it; 0 for those that the format cannot hold."""
    smallest = SMALLEST_NORMAL if dtype == BF16 else FP16_NORMAL
    return torch.where(value > smallest, (rounded(value, dtype) - value).abs() / value, 0.0)


def _equal_probabilities(p: torch.Tensor, length: torch.Tensor, across_heads: bool = False, unit: float = 1.0) -> _Bins:
    """Which of ``p [N, K, G, n]`` are so nearly equal that their bf16 roundings are one and the same error, not independent.

    Each head's by themselves, or all of the row's. ``length [N, 1, 1, 1]`` is how many each has. A finer rounding than bf16's has
    errors, and bins, of ``unit`` times its size.

    Where queries are small the probabilities are all about ``1 / n``, are all rounded the same way, and the whole row is off by
    that much. Two values round alike while they are a fraction of a ULP apart: bins of ``2**-9``, around ``1 / n``.
    """
    steps = torch.round(torch.log(p * length).clamp_min(-1e3) * (2.0**9 / unit)).to(torch.int64)
    count = p.shape[0] if across_heads else p.shape[:3].numel()
    owners = torch.arange(count).view(-1, 1, 1, 1) if across_heads else torch.arange(count).view(*p.shape[:3], 1)
    keys, members = torch.unique((steps + (owners << 32)).flatten(), return_inverse=True)
    return _Bins(members, (keys + (1 << 31)) >> 32, count, unit)
