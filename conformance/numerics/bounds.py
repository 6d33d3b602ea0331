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
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from conformance.numerics.ulp import Mode, rounded_at, spacing

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


#: Memory that the chunks of one projection may take, in bytes.
CHUNK_BYTES = 32 << 20


BF16 = torch.bfloat16


#: How many steps of the next finer formats (fp16 and tf32: 10 bits) there are to one of bf16 (7 bits).
FINER = 8


#: From a deviation of one ULP over this on the error of a value is that of a finer rounding, not of a sum in fp32.
OF_FINER = 64


#: The spacing of fp16 where it is widest beside the value: that of its subnormal numbers.
FP16_SPACING = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Profile:
    """One way in which a legal kernel rounds.

    ``roundings`` names the bf16 roundings that it makes beyond the contract's; ``cast`` is how its casts treat ties. With
    ``modelled`` the kernel may or may not make each rounding (the contract's own included): all of them become variance, none is
    reproduced. Otherwise ``finer`` names the places, the contract's among them, where it rounds to a format finer than bf16 if at
    all. ``declared`` are those of ``roundings`` that are legal because the kernel says that it makes them, and so is the rounding
    of ``inputs`` to bf16.
    """

    name: str
    roundings: frozenset[str] = frozenset()
    cast: Mode = "half_even"
    modelled: bool = False
    finer: frozenset[str] = frozenset()
    declared: frozenset[str] = frozenset()
    inputs: frozenset[str] = frozenset()

    def makes(self, rounding: str) -> bool:
        """Whether the profile makes this optional rounding."""
        return rounding in self.roundings


#: The contract's roundings and no other.
PLAIN = Profile("contract")


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


def reproduced_rounding(estimate: Bounds, mode: Mode, of_finer: bool = False) -> Bounds:
    """A bf16 rounding that the kernel makes for certain; where the value is next to a tie it may fall on the other side.

    ``of_finer`` says that some of what it follows from may have been rounded to a finer format.
    """
    ulp = spacing(estimate.value, BF16)
    value = rounded_at(estimate.value, ulp, BF16, mode)
    # Distance to the nearest tie: below a power of two the spacing is half as wide, and to a value that is rounded down to one
    # the tie below may be the nearer.
    below = spacing(value * (1 - 2.0**-40), BF16)
    offset = (estimate.value - value).abs()
    tie = torch.minimum((ulp / 2 - offset).clamp_min(0), offset + below / 2)
    deviation = estimate.variance.sqrt()
    near = (tie < 6 * deviation) | (tie == 0)
    small = torch.where(near, ulp * ulp / 4, torch.zeros_like(ulp))
    if of_finer:
        # Errors that are themselves roundings, to a finer format, get past many ties: how often is known. One that does so
        # against all odds, of a thousand values, is within six deviations all the same.
        crossing = (torch.special.erfc(tie / (deviation * math.sqrt(2)).clamp_min(1e-300)) / 2).clamp_min(1 / 36)
        small = torch.where(near & (deviation > ulp / OF_FINER), crossing * ulp * ulp, small)
    variance = torch.where(deviation < ulp / 4, small, estimate.variance + rounding_variance(ulp))
    # An exact value on a tie is no doubt: the cast's mode decides, and a profile reproduces it.
    certain = estimate.worst == 0
    variance = torch.where(certain, torch.zeros_like(ulp), variance)
    worst = torch.where(certain | (estimate.worst < tie), torch.zeros_like(ulp), estimate.worst + ulp)
    return Bounds(value, variance, worst)


def finer_rounding(estimate: Bounds, floor: float = 0.0) -> Bounds:
    """No rounding, or one to a format of at least 10 bits whose spacing is ``floor`` at the least."""
    step = (spacing(estimate.value, BF16) / FINER).clamp_min(floor)
    return Bounds(estimate.value, estimate.variance + step * step / 12, estimate.worst + step / 2)


def rounding(estimate: Bounds, profile: Profile, name: str = "result") -> Bounds:
    """A bf16 rounding that the contract demands: of a kernel that is more accurate a finer one, or none."""
    if profile.modelled:
        return modelled_rounding(estimate)
    return finer_rounding(estimate) if name in profile.finer else reproduced_rounding(estimate, profile.cast, bool(profile.finer))


def optional_rounding(estimate: Bounds, profile: Profile, name: str, tie_prone: bool = False, finer_floor: float = 0.0) -> Bounds:
    """A bf16 rounding that is legal, not demanded: modelled, reproduced, finer or absent as the profile says.

    ``finer_floor`` is the widest spacing of a finer format that is nothing beside the values of this place.
    """
    if not profile.makes(name):
        return finer_rounding(estimate, finer_floor) if name in profile.finer else estimate
    if profile.modelled:
        return modelled_rounding(estimate, tie_prone)
    return reproduced_rounding(estimate, profile.cast, bool(profile.finer))


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
    count = x.shape[-1]
    # numpy sorts float64 several times as fast as torch.
    ordered = torch.from_numpy(np.sort(x.abs().numpy(), axis=-1))
    square = ordered * ordered
    share = square / square.sum(-1, keepdim=True).clamp_min(1e-300)
    lost = share < U
    # The k-th of a run of equal ones, from 0, stands for 2 k + 1: a run of m adds up to m * m.
    place = torch.arange(count).expand_as(ordered)
    begins = torch.ones_like(lost)
    torch.ne(ordered[..., 1:], ordered[..., :-1], out=begins[..., 1:])
    first = torch.where(begins, place, 0).cummax(-1).values
    variance_of_equal = ((2 * (place - first) + 1) * ~lost).sum(-1, keepdim=True).double()
    sum_of_lost = (share * lost).sum(-1, keepdim=True) / U
    return SUM_ONTO / 2 * U * (variance_of_equal + sum_of_lost**2).sqrt(), count / 2 * U


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
    # What fp16 loses below its normal numbers is nothing beside a row whose RMS is 1.
    normalised = optional_rounding(normalised, profile, "normalised", finer_floor=FP16_SPACING)
    return with_fp32_roundings(scaled(normalised, weight.to(torch.float64)), 1)


def norm_and_projections(
    x: Bounds, weight: torch.Tensor, projections: list[torch.Tensor], eps: float, profile: Profile, name: str = "result"
) -> list[Bounds]:
    """RMSNorm, its bf16 rounding and projections of it; or the norm's division deferred past them, if the profile says so.

    ``name`` is that of the rounding.
    """
    if not profile.makes("deferred_norm"):
        normalised = rounding(rms_norm(x, weight, eps, profile), profile, name)
        return [projection(normalised, matrix) for matrix in projections]
    inverse = inverse_rms(x.value, eps)
    weighted = rounding(with_fp32_roundings(scaled(x, weight.to(torch.float64)), 1), profile, name)
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


def rotate_half(x: Bounds, cosine: torch.Tensor, sine: torch.Tensor, profile: Profile = PLAIN) -> Bounds:
    """``lo*cos - hi*sin`` and ``hi*cos + lo*sin`` over the last axis; each product is rounded by itself."""
    half = x.value.shape[-1] // 2
    low, high = x.map(lambda tensor: tensor[..., :half]), x.map(lambda tensor: tensor[..., half:])
    cosine, sine = cosine.to(torch.float64), sine.to(torch.float64)

    def product(part: Bounds, factor: torch.Tensor) -> Bounds:
        return optional_rounding(with_fp32_roundings(scaled(part, factor), 2), profile, "rotation products")

    first = add(product(low, cosine[..., :half]), product(high, -sine[..., :half]))
    second = add(product(high, cosine[..., half:]), product(low, sine[..., half:]))
    return Bounds(
        torch.cat([first.value, second.value], -1),
        torch.cat([first.variance, second.variance], -1),
        torch.cat([first.worst, second.worst], -1),
    )


def silu_times(gate: Bounds, up: Bounds, profile: Profile = PLAIN) -> Bounds:
    """``silu(gate) * up`` in fp32, or with ``silu`` rounded to bf16."""
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
    return multiply(optional_rounding(activation, profile, "silu"), up)
