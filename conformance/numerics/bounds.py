"""How far a correct kernel's result can be from the exact one: value, variance and worst case, operation by operation.

First-order running error analysis (docs/rule.md, Error model). Each tensor carries ``(value, variance, worst)`` in float64: the
value under a profile of roundings, the variance of the error of a kernel that sums in any order, and a bound that no correct
kernel exceeds. Inputs are exact. ``U`` is fp32's unit roundoff.

How far a sum of K terms t strays in fp32: the k-th addition adds an error of variance ``(U * partial_sum)**2 / 3``. Over random
orders the squares of the partial sums add up to ``K * (y**2 / 3 + sum(t**2) / 6)`` for a sum y, which gives the deviation
``U * sqrt(K) * (|y| / 3 (+) 0.24 * sqrt(sum(t**2)))``. Where all terms are alike the second part is a quarter of the sum of
magnitudes A; we allow half, and where few terms dominate (outlier channels) ``0.3 * sqrt(K * sum(t**2))``, which is larger.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from conformance.numerics.ulp import Mode, _rounded, rounded, spacing

#: Unit roundoff of fp32.
U = 2.0**-24
#: Smallest normal number of fp32, and of bf16.
SMALLEST_NORMAL = 2.0**-126
#: fp32 roundings of one normalisation: square, sum, mean, eps, rsqrt (or sqrt and division), product.
NORM_ROUNDINGS = 6
#: Deviation of a sum of K fp32 terms in unit roundoffs: of A (terms alike), of sqrt(K sum t^2) (few dominate), of sqrt(K) |y|.
SUM_OF_MAGNITUDES = 0.5
SUM_OF_SQUARES = 0.3
SUM_OF_RESULT = 0.33
#: One rounding of a sum is uniform within half a ULP: at most 0.58 u of the sum's size (just above a power of two) in standard
#: deviation. A sum that begins with a large value makes K of them at that value's size.
SUM_ONTO = 0.58
#: Elements of what attention computes for every query, key and column, at a time: 1 MB, which stays in a core's cache.
ATTENTION_ELEMENTS = 1 << 17
#: Memory that the chunks of one projection may take, in bytes.
CHUNK_BYTES = 32 << 20

BF16 = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Profile:
    """One way in which a legal kernel rounds.

    ``roundings`` names the optional bf16 roundings that it makes; ``cast`` is how its casts treat ties. With ``modelled`` the
    kernel may or may not make each rounding (the contract's own included): all of them become variance, none is reproduced.
    """

    name: str
    roundings: frozenset[str] = frozenset()
    cast: Mode = "half_even"
    modelled: bool = False

    def makes(self, rounding: str) -> bool:
        """Whether the profile makes this optional rounding."""
        return rounding in self.roundings


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a correct kernel may return for one tensor, before its last cast.

    ``value``, ``variance`` and ``worst`` are float64 of one shape. ``rows`` are the rows of the argument that they describe;
    every other row must keep its bits; ``None`` means all rows. ``correlation`` gives, per row, the number of independent
    contributions to the row's error (``n_eff``) and the variance of its signed sum (``VarT``), where roundings are shared.
    """

    value: torch.Tensor
    variance: torch.Tensor
    worst: torch.Tensor
    rows: torch.Tensor | None = None
    correlation: Correlation | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Bounds:
        """The same rearrangement (a reshape, a selection) of all three."""
        return Bounds(function(self.value), function(self.variance), function(self.worst))

    def __getitem__(self, index: Any) -> Bounds:
        """The same selection of all three."""
        return self.map(lambda tensor: tensor[index])

    def reshape(self, *shape: int) -> Bounds:
        """All three in another shape."""
        return self.map(lambda tensor: tensor.reshape(shape))


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Per row: how many independent errors its elements share, and the variance of the signed sum of its scaled errors.

    ``head_variance [rows, NH]`` is the variance of the signed sum of each head.
    """

    independent: torch.Tensor
    sum_variance: torch.Tensor
    head_variance: torch.Tensor | None = None


def exact(value: torch.Tensor) -> Bounds:
    """An input: no error."""
    wide = value.to(torch.float64)
    zero = torch.zeros((), dtype=torch.float64).expand_as(wide)
    return Bounds(wide, zero, zero)


def rounding_variance(ulp: torch.Tensor) -> torch.Tensor:
    """Variance of one rounding, uniform over a ULP."""
    return ulp * ulp / 12


def with_fp32_roundings(estimate: Bounds, count: float) -> Bounds:
    """``count`` elementwise fp32 roundings of the value."""
    error = (count * U) * estimate.value.abs()
    return Bounds(estimate.value, estimate.variance + error * error / 3, estimate.worst + error)


def modelled_rounding(estimate: Bounds, tie_prone: bool = False) -> Bounds:
    """A bf16 rounding that a kernel may or may not make. A sum of two bf16 values (``tie_prone``) often falls on a tie."""
    ulp = spacing(estimate.value, BF16)
    return Bounds(estimate.value, estimate.variance + ulp * ulp / (8 if tie_prone else 12), estimate.worst + ulp / 2)


def reproduced_rounding(estimate: Bounds, mode: Mode) -> Bounds:
    """A bf16 rounding that the kernel makes for certain; where the value is next to a tie it may fall on the other side."""
    ulp = spacing(estimate.value, BF16)
    value = _rounded(estimate.value, ulp, BF16, mode)
    # Distance to the nearest tie: below a power of two the spacing is half as wide, and to a value that is rounded down to one
    # the tie below may be the nearer.
    below = spacing(value * (1 - 2.0**-40), BF16)
    offset = (estimate.value - value).abs()
    tie = torch.minimum((ulp / 2 - offset).clamp_min(0), offset + below / 2)
    deviation = estimate.variance.sqrt()
    near = (tie < 6 * deviation) | (tie == 0)
    small = torch.where(near, ulp * ulp / 4, torch.zeros_like(ulp))
    variance = torch.where(deviation < ulp / 4, small, estimate.variance + rounding_variance(ulp))
    # An exact value on a tie is no doubt: the cast's mode decides, and a profile reproduces it.
    certain = estimate.worst == 0
    variance = torch.where(certain, torch.zeros_like(ulp), variance)
    worst = torch.where(certain | (estimate.worst < tie), torch.zeros_like(ulp), estimate.worst + ulp)
    return Bounds(value, variance, worst)


def rounding(estimate: Bounds, profile: Profile) -> Bounds:
    """A bf16 rounding that the contract demands."""
    return modelled_rounding(estimate) if profile.modelled else reproduced_rounding(estimate, profile.cast)


def optional_rounding(estimate: Bounds, profile: Profile, name: str, tie_prone: bool = False) -> Bounds:
    """A bf16 rounding that is legal, not demanded: modelled, reproduced or absent as the profile says."""
    if not profile.makes(name):
        return estimate
    if profile.modelled:
        return modelled_rounding(estimate, tie_prone)
    return reproduced_rounding(estimate, profile.cast)


def add(left: Bounds, right: Bounds) -> Bounds:
    """Sum of two uncertain tensors, rounded to fp32."""
    total = Bounds(left.value + right.value, left.variance + right.variance, left.worst + right.worst)
    return with_fp32_roundings(total, 1)


def multiply(left: Bounds, right: Bounds) -> Bounds:
    """Product of two uncertain tensors, rounded to fp32; the second-order term is kept."""
    return with_fp32_roundings(
        Bounds(
            left.value * right.value,
            left.variance * right.value**2 + right.variance * left.value**2 + left.variance * right.variance,
            left.worst * right.value.abs() + right.worst * left.value.abs() + left.worst * right.worst,
        ),
        1,
    )


def scaled(estimate: Bounds, factor: torch.Tensor) -> Bounds:
    """Product with an exact tensor, without the rounding of the product."""
    return Bounds(estimate.value * factor, estimate.variance * factor * factor, estimate.worst * factor.abs())


def projection(x: Bounds, weight: torch.Tensor) -> Bounds:
    """``x @ weight`` for ``x [B, K]`` and exact bf16 weights ``[K, N]``, accumulated in fp32 in any order.

    The value is float64: fp32 would spend the very allowance that is being computed. Variances and magnitudes need no such
    precision: no term of theirs is negative, so nothing cancels, and fp32 sums are off by less than 1e-6 of themselves, where
    the constants they are multiplied with are good to a tenth. Each row is scaled to its own largest entry, so that none
    underflows. Weights are widened a chunk of columns at a time.
    """
    depth, width = weight.shape
    batch = x.value.shape[0]
    uncertain = bool(x.worst.any())
    # Squared weights serve the squares of the terms and the variance alike, absolute ones the magnitudes and the worst case.
    size = x.value.abs()
    rows = torch.cat([size, x.variance.sqrt(), x.worst]) if uncertain else size
    scale = rows.amax(1, keepdim=True).clamp_min(1e-300)
    scaled_rows = (rows / scale).float()
    square_rows = scaled_rows[: 2 * batch].square()
    magnitude_rows = torch.cat([scaled_rows[:batch], scaled_rows[2 * batch :]])
    value = torch.empty(batch, width, dtype=torch.float64)
    squares = torch.empty(len(square_rows), width)
    magnitudes = torch.empty(len(magnitude_rows), width)
    step = max(1, CHUNK_BYTES // (16 * depth))
    for start in range(0, width, step):
        part = slice(start, start + step)
        block = weight[:, part].float()
        value[:, part] = x.value @ block.double()
        magnitudes[:, part] = magnitude_rows @ block.abs_()
        squares[:, part] = square_rows @ block.square_()
    squares_of = squares.double() * scale[: 2 * batch].square()
    total = magnitudes[:batch] * scale[:batch]
    deviation = torch.maximum(SUM_OF_MAGNITUDES * total, SUM_OF_SQUARES * math.sqrt(depth) * squares_of[:batch].sqrt())
    variance = (U * (deviation + SUM_OF_RESULT * math.sqrt(depth) * value.abs())) ** 2
    worst = (U * depth) * total
    if uncertain:
        variance += squares_of[batch:]
        worst += magnitudes[batch:] * scale[2 * batch :]
    return Bounds(value, variance, worst)


def accumulated_onto(start: Bounds, product: Bounds, depth: int) -> Bounds:
    """``start + product``, where the accumulator of the ``depth`` products may have begun with ``start``."""
    result, size = add(product, start), start.value.abs()
    variance = result.variance + (U * SUM_ONTO * math.sqrt(depth) * size) ** 2
    return Bounds(result.value, variance, result.worst + U * depth * size)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``1 / sqrt(mean(x**2) + eps)`` over the last axis, kept as an axis of one."""
    return ((x * x).mean(-1, keepdim=True) + eps).rsqrt()


def inverse_rms_drift(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Deviation ``[B, 1]`` and worst case of what summing squares in fp32 adds to ``1 / rms`` of each row, relative to it.

    The root takes half of the sum's relative error. In the worst order, the largest first, all n roundings are of the size of the
    whole sum (``SUM_ONTO``), but they are independent for different squares only: a running sum is a multiple of its own ULP, so
    what it is rounded by depends, up to the next power of two, on the square that is added. n equal squares make n equal errors,
    whose sum deviates by n of them instead of the root of n. Squares too small to change the sum are lost, all of them. Left out:
    beside one that rules the sum from its start, squares of half to three quarters of its ULP are rounded alike too (up to 6.9
    deviations where all of them are such; no regime makes these rows).
    """
    square = x * x
    share = square / square.sum(-1, keepdim=True).clamp_min(1e-300)
    lost = share < U
    ordered = x.abs().sort(-1).values.contiguous()
    first, last = (torch.searchsorted(ordered, x.abs().contiguous(), right=right) for right in (False, True))
    variance_of_equal = ((last - first) * ~lost).sum(-1, keepdim=True).double()  # each stands for all that equal it: n, or n * n
    sum_of_lost = (share * lost).sum(-1, keepdim=True) / U
    return SUM_ONTO / 2 * U * (variance_of_equal + sum_of_lost**2).sqrt(), x.shape[-1] / 2 * U


def rms_norm(x: Bounds, weight: torch.Tensor, eps: float, profile: Profile) -> Bounds:
    """``x * rsqrt(mean(x**2) + eps) * weight`` over the last axis, before its cast."""
    count = x.value.shape[-1]
    inverse = inverse_rms(x.value, eps)
    value = x.value * inverse
    if bool(x.worst.any()):
        square = x.value * x.value
        shared = (square * x.variance).sum(-1, keepdim=True) * inverse**4 / count**2
        variance = inverse**2 * (x.variance * (1 - 2 * square * inverse**2 / count) + square * shared).clamp_min(0)
        worst = inverse * (x.worst + x.value.abs() * inverse**2 * (x.value.abs() * x.worst).mean(-1, keepdim=True))
    else:
        variance = worst = torch.zeros_like(value)
    deviation, most = inverse_rms_drift(x.value)
    size = value.abs()
    normalised = Bounds(value, variance + (deviation * size) ** 2, worst + most * size)
    normalised = with_fp32_roundings(normalised, NORM_ROUNDINGS)
    normalised = optional_rounding(normalised, profile, "normalised")
    return with_fp32_roundings(scaled(normalised, weight.to(torch.float64)), 1)


def norm_and_projections(
    x: Bounds, weight: torch.Tensor, projections: list[torch.Tensor], eps: float, profile: Profile
) -> list[Bounds]:
    """RMSNorm, its bf16 rounding, and projections of it; or the norm's division deferred past them, if the profile says so."""
    if not profile.makes("deferred_norm"):
        normalised = rounding(rms_norm(x, weight, eps, profile), profile)
        return [projection(normalised, matrix) for matrix in projections]
    inverse = inverse_rms(x.value, eps)
    weighted = rounding(with_fp32_roundings(scaled(x, weight.to(torch.float64)), 1), profile)
    # The error of 1/rms is common to the row: fp32 roundings, and what the uncertainty of x adds to the mean square. Its
    # variance follows from that of x: the worst case grows beyond all measure along a chain, and would excuse anything there.
    square = x.value * x.value
    deviation, most = inverse_rms_drift(x.value)
    drift_variance = (square * x.variance).sum(-1, keepdim=True) * inverse**4 / x.value.shape[-1] ** 2 + deviation**2
    drift = (x.value.abs() * x.worst).mean(-1, keepdim=True) * inverse**2 + most
    results = []
    for matrix in projections:
        product = with_fp32_roundings(scaled(projection(weighted, matrix), inverse), NORM_ROUNDINGS)
        variance = product.variance + drift_variance * product.value**2
        results.append(Bounds(product.value, variance, product.worst + drift * product.value.abs()))
    return results


def rotate_half(x: Bounds, cosine: torch.Tensor, sine: torch.Tensor) -> Bounds:
    """``lo*cos - hi*sin`` and ``hi*cos + lo*sin`` over the last axis; each product is rounded by itself."""
    half = x.value.shape[-1] // 2
    low, high = x.map(lambda tensor: tensor[..., :half]), x.map(lambda tensor: tensor[..., half:])
    cosine, sine = cosine.to(torch.float64), sine.to(torch.float64)

    def product(part: Bounds, factor: torch.Tensor) -> Bounds:
        return with_fp32_roundings(scaled(part, factor), 2)

    first = add(product(low, cosine[..., :half]), product(high, -sine[..., :half]))
    second = add(product(high, cosine[..., half:]), product(low, sine[..., half:]))
    return Bounds(
        torch.cat([first.value, second.value], -1),
        torch.cat([first.variance, second.variance], -1),
        torch.cat([first.worst, second.worst], -1),
    )


#: Variance of the relative error of one bf16 rounding, averaged over mantissas: ``(2**-8)**2 / 5`` per probability.
PROBABILITY_VARIANCE = 2.0**-16 / 5
#: Fewer probabilities that agree may agree by accident.
FEWEST_ALIKE = 4


@dataclasses.dataclass(frozen=True)
class NewRows:
    """The key and value rows that a layer has just written for one query: ``[NKV, m, D]``, the last ``m`` that it attends to."""

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
    """``softmax(scale * q K^T) V`` before its cast, for ``query [N, NH, D]`` and for each of the N the rows ``[NKV, n, D]``.

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
    if want_correlation and profile.makes("probabilities"):
        sums, squares, of_heads = (torch.cat(column)[back] for column in zip(*(sums for _, sums in parts), strict=True))
        correlation = Correlation((sums**2 / squares.clamp_min(1e-300)).clamp_min(1), sums, of_heads)
    return Bounds(columns[0], columns[1], columns[2], correlation=correlation)


def _padded(rows: list[torch.Tensor], stops: list[int], longest: int) -> torch.Tensor:
    """``[N, NKV, longest, D]`` in float64 of rows ``[NKV, m, D]`` each, the last of which is to be the one before ``stops``."""
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
    grouped = query.reshape(several, kv_heads, -1, head_dim)  # [N, NKV, G, D]
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
    z = scale * (q @ k_t)  # [N, NKV, G, n]
    z_abs = z.abs()
    z_magnitude = scale * (q.abs() @ k_abs_t)
    z_variance = (U * (z_magnitude + 2 * z_abs + 3)) ** 2
    z_worst = U * (head_dim * z_magnitude + 2 * z_abs + 3)
    if new_rows is not None:
        z_variance += scale**2 * (q**2 @ key_variance.transpose(2, 3))
        z_worst += scale * (q.abs() @ key_worst.transpose(2, 3) + grouped.worst @ k_abs_t)
    z = torch.where(inside, z, -torch.inf)
    p = torch.softmax(z, -1)
    o = p @ v  # [N, NKV, G, D]
    v_abs = v.abs()
    spread = (v.unsqueeze(2) - o.unsqueeze(3)).abs_()  # |V - o|, [N, NKV, G, n, D]
    magnitude = p @ v_abs
    worst = ((p * torch.expm1(z_worst.clamp_max(60))).unsqueeze(3) @ spread).squeeze(3)
    variance = ((p**2 * z_variance).unsqueeze(3) @ spread.square_()).squeeze(3)
    if new_rows is not None:
        weighted = (p.unsqueeze(-1) * v.unsqueeze(2)).transpose(3, 4)  # [N, NKV, G, D, n]
        sensitivity = weighted @ k.unsqueeze(2) - o.unsqueeze(-1) * (p @ k).unsqueeze(3)  # dz-weighted, [N, NKV, G, D, D]
        variance += scale**2 * (sensitivity**2 @ grouped.variance.unsqueeze(-1)).squeeze(-1)
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
    if profile.makes("probabilities"):
        several_keys = length > 1  # the probability of a lone key is 1, which no rounding changes
        from_rounded = profile.makes("denominator_of_rounded") and not profile.modelled
        signed = (v.unsqueeze(2) - o.unsqueeze(3)) if from_rounded else v.unsqueeze(2)
        bins = _equal_probabilities(p, length)
        # What rounding does to each probability relative to it, before or after it is normalised.
        exponentials = torch.exp(z - z.amax(-1, keepdim=True))
        relative = torch.maximum(_relative_rounding(p), _relative_rounding(exponentials)).flatten().unsqueeze(1)
        moved = ((p * several_keys).unsqueeze(-1) * signed).flatten(0, 3)
        variance += bins.sum_of_owners(bins.squared(moved, relative)).view_as(o)
        worst += several_keys * 2.0**-8 * magnitude
        if want_correlation:
            # d(sum of signed scaled errors) / d(one rounded probability), and one term per final rounding.
            ulp_variance = rounding_variance(spacing(o, BF16))
            weight = torch.sign(o) / (variance + ulp_variance).sqrt()
            by_probability = (moved * weight.unsqueeze(3).expand_as(spread).flatten(0, 3)).sum(-1, keepdim=True)
            # Heads whose probabilities agree round them alike too: all of a row's, where its query is small.
            whole_row = _equal_probabilities(p, length, across_heads=True)
            shared = whole_row.squared(by_probability, relative)
            final = weight**2 * ulp_variance * several_keys
            sum_variance = whole_row.sum_of_owners(shared).flatten() + final.flatten(1).sum(1)
            square_sum = whole_row.sum_of_owners(shared**2).flatten() + (final**2).flatten(1).sum(1)
            of_heads = bins.sum_of_owners(bins.squared(by_probability, relative)).view(several, heads)
            head_variance = of_heads + final.flatten(1, 2).sum(-1)
    return Bounds(o, variance, worst).reshape(several, heads, head_dim), (sum_variance, square_sum, head_variance)


@dataclasses.dataclass(frozen=True)
class _Bins:
    """Probabilities by bin: which bin each is in, and which of ``count`` owners, heads or whole rows, each bin is of."""

    members: torch.Tensor
    owners: torch.Tensor
    count: int

    def squared(self, terms: torch.Tensor, relative: torch.Tensor) -> torch.Tensor:
        """By bin, the variance that roundings of ``terms [probabilities, D]`` add up to: alike or independent, as is larger.

        Alike, they cancel where the terms do; the small differences between members of a bin then remain. Where a bin has several
        members the error that they share is no accident, but ``relative [probabilities, 1]`` of each: 255 probabilities of
        1 / 255 all lie on a tie of bf16, and err by five times the variance that roundings have on average.
        """
        several = torch.bincount(self.members)[self.members] >= FEWEST_ALIKE
        average = PROBABILITY_VARIANCE**0.5
        size = torch.where(several.unsqueeze(1), relative.clamp_min(average), average)
        zeros = terms.new_zeros(len(self.owners), terms.shape[-1])
        errors = terms * size
        alike = zeros.index_add(0, self.members, errors) ** 2
        return torch.maximum(alike, zeros.index_add_(0, self.members, errors * errors))

    def sum_of_owners(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over the bins of each owner."""
        return sums.new_zeros(self.count, sums.shape[-1]).index_add_(0, self.owners, sums)


def _relative_rounding(value: torch.Tensor) -> torch.Tensor:
    """How far bf16 rounds each positive value, relative to it; 0 for those that it cannot hold."""
    return torch.where(value > SMALLEST_NORMAL, (rounded(value, BF16) - value).abs() / value, 0.0)


def _equal_probabilities(p: torch.Tensor, length: torch.Tensor, across_heads: bool = False) -> _Bins:
    """Which of ``p [N, NKV, G, n]`` are so nearly equal that their bf16 roundings are one and the same error, not independent.

    Each head's by themselves, or all of the row's. ``length [N, 1, 1, 1]`` is how many each has.

    Where queries are small the probabilities are all about ``1 / n``, are all rounded the same way, and the whole row is off by
    that much. Two values round alike while they are a fraction of a ULP apart: bins of ``2**-9``, around ``1 / n``.
    """
    steps = torch.round(torch.log(p * length).clamp_min(-1e3) * 2.0**9).to(torch.int64)
    count = p.shape[0] if across_heads else p.shape[:3].numel()
    owners = torch.arange(count).view(-1, 1, 1, 1) if across_heads else torch.arange(count).view(*p.shape[:3], 1)
    keys, members = torch.unique((steps + (owners << 32)).flatten(), return_inverse=True)
    return _Bins(members, (keys + (1 << 31)) >> 32, count)


def silu_times(gate: Bounds, up: Bounds) -> Bounds:
    """``silu(gate) * up`` in fp32."""
    sigmoid = torch.sigmoid(gate.value)
    silu = gate.value * sigmoid
    slope = sigmoid * (1 + gate.value * (1 - sigmoid))
    size = gate.value.abs()
    # A sigmoid computed as (1 + tanh(x / 2)) / 2 is right to fp32's spacing at 1, not to its own: the last term of each.
    activation = Bounds(
        silu,
        gate.variance * slope**2 + (4 * U * silu) ** 2 / 3 + (U * size * silu) ** 2 + (U * size) ** 2 / 4,
        gate.worst * (slope.abs() + 0.5 * gate.worst) + U * (4 + size) * silu.abs() + U * size,
    )
    return multiply(activation, up)
