"""The error model against experiments: what errors of known size do to a result, and what sums and casts in fp32 do."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from conformance.numerics import bounds
from conformance.numerics.attention import PROBABILITY_VARIANCE, NewRows
from conformance.numerics.attention import attention as attention_bounds
from conformance.numerics.bounds import BF16, Bounds, Profile
from conformance.numerics.ulp import Mode, rounded, spacing

Tensor = torch.Tensor

PLAIN = Profile("plain")
DRAWS = 400


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bf16(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (normal(*shape, seed=seed) * scale).to(BF16)


def uncertain(value: Tensor, relative: float, seed: int) -> Bounds:
    """A tensor with an error of about that size, different in every element."""
    deviation = relative * value.abs() * (0.5 + torch.rand(value.shape, generator=torch.Generator().manual_seed(seed)).double())
    return Bounds(value, deviation**2, 6 * deviation)


def drawn(estimate: Bounds, seed: int) -> Tensor:
    return estimate.value + estimate.variance.sqrt() * normal(*estimate.value.shape, seed=seed).clamp(-6, 6)


def observed_variance(function: Callable[[int], Tensor], expected: Tensor, draws: int = DRAWS) -> Tensor:
    """Mean square of the error of ``function(draw)`` by element."""
    total = torch.zeros_like(expected)
    for draw in range(draws):
        total += (function(draw) - expected) ** 2
    return total / draws


def assert_predicts(observed: Tensor, estimate: Bounds, low: float = 0.9, high: float = 1.1) -> None:
    """The observed variance is the predicted one on average, and in no element far from it."""
    ratio = observed / estimate.variance
    assert low < float(ratio.mean()) < high
    # The variance of 400 draws scatters by 7% of itself.
    assert float(ratio.max()) < 1.5
    assert float(estimate.worst.sub(3 * estimate.variance.sqrt()).min()) > 0


def test_projection_carries_errors_of_its_input() -> None:
    x, weight = uncertain(normal(3, 64), 1e-3, 1), bf16(64, 20, seed=2)
    estimate = bounds.projection(x, weight)
    assert_predicts(observed_variance(lambda draw: drawn(x, draw) @ weight.double(), estimate.value), estimate)


@pytest.mark.parametrize("alike", [False, True], ids=["signs mixed", "terms alike"])
def test_projection_covers_fp32_sums_in_any_order(alike: bool) -> None:
    depth = 256
    x, weight = bf16(2, depth, seed=1), bf16(depth, 8, seed=2)
    if alike:
        x, weight = x.abs(), weight.abs()
    estimate = bounds.projection(bounds.exact(x), weight)

    def summed(draw: int) -> Tensor:
        total = torch.zeros(2, 8)
        for index in torch.randperm(depth, generator=torch.Generator().manual_seed(draw)).tolist():
            total += x[:, index : index + 1].float() * weight[index].float()
        return total.double()

    observed = observed_variance(summed, estimate.value, draws=40)
    ratio = (observed / estimate.variance).sqrt()
    assert float(ratio.max()) < 1
    assert float(ratio.mean()) > 0.02  # an allowance of fifty times what happens would hide faults
    assert bool((estimate.worst > estimate.variance.sqrt()).all())


def test_projection_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = uncertain(normal(3, 64), 1e-3, 1), bf16(64, 50, seed=2)
    whole = bounds.projection(x, weight)
    monkeypatch.setattr(bounds, "CHUNK_BYTES", 16 * 50 * 7)
    parts = bounds.projection(x, weight)
    for name in ("value", "variance", "worst"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=0)


def _projection_in_float64(x: Bounds, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, variance and worst case as docs/rule.md, Error model, writes them, everything in float64."""
    wide, depth = weight.double(), weight.shape[0]
    value, total = x.value @ wide, x.value.abs() @ wide.abs()
    of_squares = bounds.SUM_OF_SQUARES * math.sqrt(depth) * (x.value.square() @ wide.square()).sqrt()
    deviation = torch.maximum(bounds.SUM_OF_MAGNITUDES * total, of_squares)
    own = (bounds.U * (deviation + bounds.SUM_OF_RESULT * math.sqrt(depth) * value.abs())) ** 2
    return value, own + x.variance @ wide.square(), bounds.U * depth * total + x.worst @ wide.abs()


#: Activations ``[4, K]`` that make sums in fp32 hard, by name: wide ranges in a row, few terms that rule, all terms alike.
HARD_ROWS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda depth: normal(4, depth),
    "alike": lambda depth: torch.ones(4, depth, dtype=torch.float64),
    "outliers": lambda depth: normal(4, depth) * torch.where(torch.arange(depth) % 50 == 0, 100.0, 1.0),
    "heavy tail": lambda depth: normal(4, depth) / (torch.arange(1, depth + 1) / depth).sqrt(),
    "tiny": lambda depth: 1e-15 * normal(4, depth) * 10.0 ** (-3 * torch.arange(4)).unsqueeze(1),
    "twelve decades": lambda depth: normal(4, depth) * 10.0 ** (-12 * torch.arange(depth) / depth),
}


@pytest.mark.parametrize("doubt", ["everywhere", "in few places"])
@pytest.mark.parametrize("rows", HARD_ROWS)
@pytest.mark.parametrize("depth", [5120, 17408])  # of the projections of Qwen3-14B
def test_variance_and_worst_case_are_summed_well_enough_in_fp32(depth: int, rows: str, doubt: str) -> None:
    """An error of 2e-6 in a variance moves a share of 1 by 1e-6; the model's own constants are good to a tenth."""
    value, weight = HARD_ROWS[rows](depth).to(BF16).double(), bf16(depth, 48, seed=2, scale=depth**-0.5)
    x = uncertain(value, 2.0**-9, 3)
    if doubt == "in few places":  # as after a rounding that is reproduced
        near_a_tie = torch.arange(depth) % 97 == 5
        x = Bounds(value, x.variance * near_a_tie, x.worst * near_a_tie)
    found = bounds.projection(x, weight)
    value, variance, worst = _projection_in_float64(x, weight)
    # Of the value itself fp32 would leave 1e-7.
    assert torch.allclose(found.value, value, rtol=0, atol=1e-12 * float(value.abs().max()))
    assert torch.allclose(found.variance, variance, rtol=2e-6, atol=0)
    assert torch.allclose(found.worst, worst, rtol=2e-6, atol=0)


def test_rms_norm_carries_errors_of_its_input() -> None:
    x, weight = uncertain(normal(4, 32), 1e-3, 1), 1 + 0.3 * normal(32, seed=2).float()
    estimate = bounds.rms_norm(x, weight, 1e-6, PLAIN)

    def normalised(draw: int) -> Tensor:
        value = drawn(x, draw)
        return value * (value.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()

    assert_predicts(observed_variance(normalised, estimate.value), estimate)


def test_rms_norm_of_one_dominating_value_hardly_depends_on_it() -> None:
    # x / rms(x) of the only large value is sqrt(n) whatever its error: the two errors cancel.
    value = torch.full((1, 64), 1e-3, dtype=torch.float64)
    value[0, 0] = 100.0
    estimate = bounds.rms_norm(Bounds(value, (1e-3 * value) ** 2, 6e-3 * value), torch.ones(64), 1e-6, PLAIN)
    assert float(estimate.variance[0, 0].sqrt() / estimate.value[0, 0]) < 1e-5


def test_rms_norm_covers_fp32_arithmetic() -> None:
    x, weight = bf16(64, 256), (1 + 0.3 * normal(256, seed=2)).float()
    estimate = bounds.rms_norm(bounds.exact(x), weight, 1e-6, PLAIN)
    wide = x.float()
    total = torch.zeros(64, 1)
    for column in range(256):
        total += wide[:, column : column + 1] ** 2
    found = wide * (1 / torch.sqrt(total / 256 + 1e-6)) * weight
    scaled = (found.double() - estimate.value) / estimate.variance.sqrt()
    assert 0.05 < float(scaled.square().mean().sqrt()) < 1
    assert bool(((found.double() - estimate.value).abs() <= estimate.worst).all())


def test_deferred_norm_is_the_same_function_with_an_allowance_of_its_own() -> None:
    x, gamma, weight = uncertain(normal(3, 64), 1e-3, 1), (1 + 0.3 * normal(64, seed=2)).float(), bf16(64, 24, seed=3)
    modelled = Profile("modelled", modelled=True)
    deferred = dataclasses.replace(modelled, roundings=frozenset({"deferred_norm"}))
    (plain,) = bounds.norm_and_projections(x, gamma, [weight], 1e-6, modelled)
    (late,) = bounds.norm_and_projections(x, gamma, [weight], 1e-6, deferred)
    assert torch.allclose(plain.value, late.value, rtol=1e-12)
    ratio = late.variance / plain.variance
    assert 0.5 < float(ratio.median()) < 2


def test_deferred_norm_does_not_grow_with_the_worst_case_of_its_input() -> None:
    # Along a chain the worst case grows beyond measure. As a variance it would excuse anything.
    x = uncertain(normal(3, 64), 1e-3, 1)
    hopeless = Bounds(x.value, x.variance, x.worst * 1e30)
    profile = Profile("deferred", frozenset({"deferred_norm"}), modelled=True)
    gamma, weight = torch.ones(64), bf16(64, 24, seed=3)
    (fair,) = bounds.norm_and_projections(x, gamma, [weight], 1e-6, profile)
    (found,) = bounds.norm_and_projections(hopeless, gamma, [weight], 1e-6, profile)
    assert torch.equal(fair.variance, found.variance)


def test_rotation_carries_errors_of_its_input() -> None:
    x = uncertain(normal(4, 32), 1e-3, 1)
    angle = normal(16, seed=2)
    cosine, sine = torch.cat([angle.cos()] * 2), torch.cat([angle.sin()] * 2)
    estimate = bounds.rotate_half(x, cosine, sine)

    def rotated(draw: int) -> Tensor:
        low, high = drawn(x, draw).chunk(2, -1)
        return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], -1)

    assert_predicts(observed_variance(rotated, estimate.value), estimate)


def test_silu_carries_errors_of_both_factors() -> None:
    gate, up = uncertain(2 * normal(4, 64), 3e-3, 1), uncertain(normal(4, 64, seed=2), 3e-3, 3)
    estimate = bounds.silu_times(gate, up)

    def product(draw: int) -> Tensor:
        g, u = drawn(gate, 2 * draw), drawn(up, 2 * draw + 1)
        return g * torch.sigmoid(g) * u

    observed = observed_variance(product, estimate.value)
    assert 0.9 < float((observed / estimate.variance).mean()) < 1.1
    assert bool((observed.sqrt() * 3 < estimate.worst).all())


NKV, G, D, KEYS = 2, 2, 16, 24


def _attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = torch.einsum("hgd,hnd->hgn", query.view(NKV, G, D), keys) * D**-0.5
    return torch.einsum("hgn,hnd->hgd", torch.softmax(scores, -1), values).reshape(NKV * G, D)


def test_attention_carries_errors_of_the_query_and_of_the_new_rows() -> None:
    query = uncertain(normal(1, NKV * G, D), 3e-3, 1)
    keys, values = bf16(1, NKV, KEYS + 3, D, seed=2), bf16(1, NKV, KEYS + 3, D, seed=3)
    new = NewRows(uncertain(normal(NKV, 2, D, seed=4), 3e-3, 5), uncertain(normal(NKV, 2, D, seed=6), 3e-3, 7))
    estimate = attention_bounds(query, keys, values, [KEYS], D**-0.5, PLAIN, [new])

    def attended(draw: int) -> Tensor:
        k, v = keys[0, :, :KEYS].double(), values[0, :, :KEYS].double()
        k[:, -2:], v[:, -2:] = drawn(new.key, 3 * draw), drawn(new.value, 3 * draw + 1)
        return _attention(drawn(query, 3 * draw + 2)[0], k, v)

    observed = observed_variance(attended, estimate.value[0])
    assert_predicts(observed, Bounds(estimate.value[0], estimate.variance[0], estimate.worst[0]))


def test_attention_never_looks_past_the_length() -> None:
    query, keys, values = bounds.exact(bf16(1, NKV * G, D)), bf16(1, NKV, KEYS, D, seed=2), bf16(1, NKV, KEYS, D, seed=3)
    before = attention_bounds(query, keys, values, [KEYS - 4], D**-0.5, PLAIN)
    keys[:, :, KEYS - 4 :], values[:, :, KEYS - 4 :] = math.nan, math.inf
    after = attention_bounds(query, keys, values, [KEYS - 4], D**-0.5, PLAIN)
    for name in ("value", "variance", "worst"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_the_unit_roundoff_is_what_fp32_rounds_by_at_most() -> None:
    value = normal(100000)
    found = float(((value.float().double() - value) / value).abs().max())
    assert 0.9 * bounds.U < found <= bounds.U


@pytest.mark.parametrize("query_size", [1.0, 1e-2, 1e-4, 0.0])
def test_bf16_probabilities_stay_within_their_variance(query_size: float) -> None:
    """Also where small queries make all probabilities alike, and one rounding of them all moves the whole row."""
    profile = Profile("probabilities", frozenset({"probabilities"}))
    scaled = []
    for length in range(5, 60):
        query = bf16(1, NKV * G, D, seed=length, scale=query_size)
        keys, values = bf16(1, NKV, length, D, seed=1000 + length), bf16(1, NKV, length, D, seed=2000 + length)
        estimate = attention_bounds(bounds.exact(query), keys, values, [length], D**-0.5, profile)
        scores = torch.einsum("hgd,hnd->hgn", query[0].double().view(NKV, G, D), keys[0].double()) * D**-0.5
        p = rounded(torch.softmax(scores, -1), BF16)
        found = torch.einsum("hgn,hnd->hgd", p, values[0].double()).reshape(NKV * G, D)
        error = found - estimate.value[0]
        assert bool((error.abs() <= estimate.worst[0]).all())
        scaled.append(error / estimate.variance[0].sqrt())
    together = torch.cat(scaled)
    # Those that agree are allowed the average error at least, also where their own is smaller.
    assert 0.3 < float(together.square().mean()) < 1.3
    assert float(together.abs().max()) < 6


def test_the_only_probability_is_not_rounded() -> None:
    query, keys, values = bounds.exact(bf16(1, NKV * G, D)), bf16(1, NKV, 1, D, seed=2), bf16(1, NKV, 1, D, seed=3)
    rounds = Profile("probabilities", frozenset({"probabilities"}))
    plain, found = (attention_bounds(query, keys, values, [1], D**-0.5, profile) for profile in (PLAIN, rounds))
    assert torch.equal(plain.variance, found.variance)


def test_a_modelled_rounding_has_the_variance_of_a_rounding() -> None:
    value = 3 * normal(50000)
    estimate = bounds.modelled_rounding(bounds.exact(value))
    error = rounded(value, BF16) - value
    assert 0.98 < float((error**2 / estimate.variance).mean()) < 1.02
    assert bool((error.abs() <= estimate.worst).all())


@pytest.mark.parametrize("mode", ["half_even", "half_away"])
@pytest.mark.parametrize("relative", [1e-7, 1e-5, 1e-4, 1e-3, 1e-2])
def test_a_reproduced_rounding_covers_kernels_that_fall_on_the_other_side(mode: Mode, relative: float) -> None:
    powers = 2.0 ** torch.arange(-20, 20, dtype=torch.float64)
    value = torch.cat([3 * normal(20000), powers * (1 - relative / 3), powers * (1 + relative / 3), powers])
    deviation = relative * value.abs()
    before = Bounds(value, deviation**2, 6 * deviation)
    after = bounds.reproduced_rounding(before, mode)
    assert torch.equal(after.value, rounded(value, BF16, mode))
    found = rounded(drawn(before, 1), BF16, mode)
    error = (found - after.value).abs()
    assert bool((error <= after.worst).all())
    assert bool((error[after.variance == 0] == 0).all())
    if relative <= 1e-5:
        assert float((after.variance == 0).double().mean()) > 0.9  # power: most elements allow no doubt
    observed, predicted = float((error**2).mean()), float(after.variance.mean())
    assert observed < 1.2 * predicted


def test_an_exact_tie_is_decided_by_the_mode() -> None:
    tie = torch.tensor([1 + 2.0**-8], dtype=torch.float64)
    for mode, expected in (("half_even", 1.0), ("half_away", 1 + 2.0**-7)):
        found = bounds.reproduced_rounding(bounds.exact(tie), mode)  # type: ignore[arg-type]
        assert (found.value.item(), found.variance.item(), found.worst.item()) == (expected, 0.0, 0.0)


def test_an_uncertain_tie_allows_both_sides() -> None:
    tie = torch.tensor([1 + 2.0**-8], dtype=torch.float64)
    found = bounds.reproduced_rounding(
        Bounds(tie, torch.full((1,), 1e-20).double(), torch.full((1,), 1e-9).double()), "half_even"
    )
    assert found.variance.item() == spacing(tie, BF16).item() ** 2 / 4
    assert found.worst.item() >= spacing(tie, BF16).item()


def test_sums_and_products_of_uncertain_tensors() -> None:
    left, right = uncertain(normal(2000), 1e-2, 1), uncertain(normal(2000, seed=2), 1e-2, 3)
    pairs = [(drawn(left, 2 * draw), drawn(right, 2 * draw + 1)) for draw in range(100)]
    sums = observed_variance(lambda draw: pairs[draw][0] + pairs[draw][1], left.value + right.value, draws=100)
    products = observed_variance(lambda draw: pairs[draw][0] * pairs[draw][1], left.value * right.value, draws=100)
    assert 0.95 < float((sums / bounds.add(left, right).variance).mean()) < 1.05
    assert 0.95 < float((products / bounds.multiply(left, right).variance).mean()) < 1.05


# -- the formulas of docs/rule.md, Error model -----------------------------------------------------------------------------------


def assert_same(found: Bounds, value: Tensor, variance: Tensor, worst: Tensor) -> None:
    """Variances to fp32's precision, all else to float64's: the experiments above would miss a term of a few percent."""
    assert torch.allclose(found.value, value, rtol=1e-12, atol=1e-15)
    assert torch.allclose(found.variance, variance, rtol=1e-6, atol=0)  # what an uncertain query does is in fp32
    assert torch.allclose(found.worst, worst, rtol=1e-9, atol=0)


def fp32(value: Tensor, count: float) -> Tensor:
    """Variance of ``count`` elementwise fp32 roundings."""
    return (count * bounds.U * value) ** 2 / 3


def small(*shape: int, seed: int) -> Bounds:
    """Normal values, with errors so small that what fp32 adds to them is as large."""
    return uncertain(normal(*shape, seed=seed), 3e-7, seed + 100)


def test_sums_and_products_are_rounded_to_fp32() -> None:
    left, right = small(50, seed=1), small(50, seed=2)
    total, product = left.value + right.value, left.value * right.value
    assert_same(
        bounds.add(left, right),
        total,
        left.variance + right.variance + fp32(total, 1),
        left.worst + right.worst + bounds.U * total.abs(),
    )
    assert_same(
        bounds.multiply(left, right),
        product,
        left.variance * right.value**2 + right.variance * left.value**2 + left.variance * right.variance + fp32(product, 1),
        left.worst * right.value.abs() + right.worst * left.value.abs() + left.worst * right.worst + bounds.U * product.abs(),
    )


def test_a_product_of_two_very_uncertain_tensors_keeps_its_second_order() -> None:
    left, right = (
        Bounds(normal(50, seed=seed), torch.full((50,), 4.0).double(), torch.full((50,), 9.0).double()) for seed in (1, 2)
    )
    found = bounds.multiply(left, right)
    assert bool((found.variance > 16).all())
    assert bool((found.worst > 81).all())


def test_a_sum_onto_a_large_start_is_rounded_at_its_size() -> None:
    start, product, depth = small(50, seed=1), small(50, seed=2), 64
    found, plain = bounds.accumulated_onto(start, product, depth), bounds.add(start, product)
    assert_same(
        found,
        plain.value,
        plain.variance + (bounds.U * 0.58 * 8 * start.value) ** 2,
        plain.worst + bounds.U * depth * start.value.abs(),
    )


@pytest.mark.parametrize("tie_prone", [False, True])
def test_a_rounding_that_may_be_made_adds_its_variance_and_half_a_step(tie_prone: bool) -> None:
    """A sum of two bf16 values often falls on a tie, where the error is half a ULP: more than one that is uniform."""
    x = small(200, seed=1)
    ulp = spacing(x.value, BF16)
    variance = x.variance + ulp**2 / (8 if tie_prone else 12)
    assert_same(bounds.modelled_rounding(x, tie_prone), x.value, variance, x.worst + ulp / 2)
    if not tie_prone:
        assert_same(bounds.modelled_rounding(x), x.value, variance, x.worst + ulp / 2)


@pytest.mark.parametrize("tie_prone", [False, True])
def test_an_optional_rounding_is_modelled_reproduced_or_absent(tie_prone: bool) -> None:
    x, names = small(200, seed=1), frozenset({"branch"})
    modelled, reproduced = Profile("m", names, "half_away", modelled=True), Profile("r", names, "half_away")
    cases = [
        (bounds.optional_rounding(x, modelled, "branch", tie_prone), bounds.modelled_rounding(x, tie_prone)),
        (bounds.optional_rounding(x, reproduced, "branch", tie_prone), bounds.reproduced_rounding(x, "half_away")),
        (bounds.optional_rounding(x, modelled, "projection", tie_prone), x),
        (bounds.optional_rounding(x, reproduced, "projection", tie_prone), x),
        (bounds.rounding(x, modelled), bounds.modelled_rounding(x)),
        (bounds.rounding(x, reproduced), bounds.reproduced_rounding(x, "half_away")),
    ]
    if not tie_prone:
        cases.append((bounds.optional_rounding(x, modelled, "branch"), bounds.modelled_rounding(x)))
    for found, expected in cases:
        assert_same(found, expected.value, expected.variance, expected.worst)


def test_a_reproduced_rounding_is_in_doubt_only_beside_a_tie() -> None:
    """Next to 1: steps of 2**-7 above it and of 2**-8 below it, so the ties are at 1 + 2**-8 and at 1 - 2**-9."""
    ulp, deviation = 2.0**-7, 1e-5
    rows: list[tuple[float, float, float, float]] = [
        # value, worst case before, variance after, worst case after
        (1.3, 6 * deviation, 0.0, 0.0),
        (1 + ulp / 2 + 5.9 * deviation, 6 * deviation, ulp**2 / 4, 6 * deviation + ulp),
        (1 + ulp / 2 - 5.9 * deviation, 6 * deviation, ulp**2 / 4, 6 * deviation + ulp),
        (1 + ulp / 2 + 6.1 * deviation, 6 * deviation, 0.0, 0.0),
        (1 + ulp / 2 + 6.1 * deviation, 7 * deviation, 0.0, 7 * deviation + ulp),
        # A value that is a power of two is half a step below it away from the lower tie, half a step above from the upper.
        (1.0, ulp / 4 - 1e-4, 0.0, 0.0),
        (1.0, ulp / 4 + 1e-4, 0.0, ulp / 4 + 1e-4 + ulp),
        # The same just above it.
        (1 + ulp / 16, ulp * 5 / 16 - 1e-4, 0.0, 0.0),
        (1 + ulp / 16, ulp * 5 / 16 + 1e-4, 0.0, ulp * 5 / 16 + 1e-4 + ulp),
        (1 + ulp * 3 / 16, ulp * 5 / 16 - 1e-4, 0.0, 0.0),
        (1 + ulp * 3 / 16, ulp * 5 / 16 + 1e-4, 0.0, ulp * 5 / 16 + 1e-4 + ulp),
        (1 - ulp / 16, ulp * 3 / 16 - 1e-4, 0.0, 0.0),
        (1 - ulp / 16, ulp * 3 / 16 + 1e-4, 0.0, ulp * 3 / 16 + 1e-4 + ulp / 2),
        (1 + ulp, ulp / 2 - 1e-4, 0.0, 0.0),
        (1 + ulp, ulp / 2 + 1e-4, 0.0, ulp / 2 + 1e-4 + ulp),
    ]
    for value, worst, variance_after, worst_after in rows:
        given = [torch.tensor([number], dtype=torch.float64) for number in (value, deviation**2, worst)]
        before = Bounds(given[0], given[1], given[2])
        found = bounds.reproduced_rounding(before, "half_even")
        assert found.variance.item() == pytest.approx(variance_after, rel=1e-9), value
        assert found.worst.item() == pytest.approx(worst_after, rel=1e-9), value


def test_a_reproduced_rounding_goes_by_the_document_at_its_limits_too() -> None:
    """A tie is near below six deviations, or where the value is one, and within reach up to the worst case; a deviation is small
    below a quarter of a step."""
    ulp, small = 2.0**-7, 2.0**-20
    for value, deviation, worst, variance_after, worst_after in (
        (1 + ulp / 2 + 6 * small, small, small, 0.0, 0.0),
        (1 + ulp / 2 + small, 0.0, small, 0.0, small + ulp),
        (1 + ulp / 2, 0.0, small, ulp**2 / 4, small + ulp),
        (1.25, ulp / 4, ulp, ulp**2 / 16 + ulp**2 / 12, 2 * ulp),
    ):
        given = [torch.tensor([number], dtype=torch.float64) for number in (value, deviation**2, worst)]
        found = bounds.reproduced_rounding(Bounds(given[0], given[1], given[2]), "half_even")
        assert found.variance.item() == pytest.approx(variance_after)
        assert found.worst.item() == pytest.approx(worst_after)


@pytest.mark.parametrize(("part_of_a_step", "grows"), [(0.24, False), (0.26, True)])
def test_an_error_of_a_quarter_of_a_step_is_carried_on(part_of_a_step: float, grows: bool) -> None:
    """From there on the rounding is one more independent error; a smaller one is either rounded away or moves a whole step."""
    value, ulp = torch.tensor([1.3], dtype=torch.float64), 2.0**-7
    deviation = part_of_a_step * ulp
    found = bounds.reproduced_rounding(
        Bounds(value, torch.tensor([deviation**2]).double(), torch.tensor([6 * ulp]).double()), "half_even"
    )
    assert found.variance.item() == pytest.approx(deviation**2 + ulp**2 / 12 if grows else ulp**2 / 4, rel=1e-6)
    assert found.worst.item() == 7 * ulp


@pytest.mark.parametrize("doubt", ["none", "some"])
def test_rms_norm_follows_the_document(doubt: str) -> None:
    count, eps = 24, 1e-3
    x, gamma = small(3, count, seed=1), 1 + 0.3 * normal(count, seed=2)
    if doubt == "none":
        x = bounds.exact(x.value)
    r = 1 / (x.value.square().mean(-1, keepdim=True) + eps).sqrt()
    v = x.value * r
    shared = (x.value**2 * x.variance).sum(-1, keepdim=True)
    variance = r**2 * (x.variance * (1 - 2 * x.value**2 * r**2 / count) + x.value**2 * r**4 / count**2 * shared).clamp_min(0)
    # The document has 0.33 / 2: for sums whose largest terms do not come first.
    variance = variance + (0.58 / 2 * math.sqrt(count) * bounds.U * v) ** 2 + fp32(v, 6)
    worst = r * (x.worst + x.value.abs() * r**2 * (x.value.abs() * x.worst).mean(-1, keepdim=True))
    worst = worst + bounds.U * (count / 2 + 6) * v.abs()
    value = v * gamma
    found = bounds.rms_norm(x, gamma, eps, PLAIN)
    assert_same(found, value, variance * gamma**2 + fp32(value, 1), worst * gamma.abs() + bounds.U * value.abs())


def test_each_head_is_normalised_and_rotated_by_itself() -> None:
    """Tokens by heads by lanes: nothing of one head, or of one token, goes into another."""
    x, gamma, angle = small(2, 3, 8, seed=1), 1 + 0.3 * normal(8, seed=2), normal(2, 1, 8, seed=3)
    normalised, rotated = bounds.rms_norm(x, gamma, 1e-3, PLAIN), bounds.rotate_half(x, angle.cos(), angle.sin())
    for token, head in itertools.product(range(2), range(3)):
        one = bounds.rms_norm(x[token, head : head + 1], gamma, 1e-3, PLAIN)
        assert_same(normalised[token, head], one.value[0], one.variance[0], one.worst[0])
        one = bounds.rotate_half(x[token, head], angle[token, 0].cos(), angle[token, 0].sin())
        assert_same(rotated[token, head], one.value, one.variance, one.worst)


def test_rms_norm_may_round_before_gamma() -> None:
    x, gamma = small(3, 24, seed=1), 1 + 0.3 * normal(24, seed=2)
    rounds = Profile("normalised", frozenset({"normalised"}), modelled=True)
    plain, found = (bounds.rms_norm(x, gamma, 1e-6, profile) for profile in (PLAIN, rounds))
    ulp = spacing(plain.value / gamma, BF16)
    assert_same(found, plain.value, plain.variance + gamma**2 * ulp**2 / 12, plain.worst + gamma.abs() * ulp / 2)


#: Rows that make a sum of squares in fp32 hard, ``[4, n]`` from normal ones: equal squares are rounded alike, small ones lost.
HARD_SQUARES: dict[str, Callable[[Tensor], Tensor]] = {
    "all different": lambda rows: rows,
    "all equal": lambda rows: torch.sign(rows) * rows[:, :1].abs(),
    "three sizes": lambda rows: torch.sign(rows) * rows[:, :3].abs().repeat(1, rows.shape[1] // 3 + 1)[:, : rows.shape[1]],
    "a large one first": lambda rows: torch.cat([16 * rows[:, :1].abs() + 16, rows[:, 1:]], 1),
    "two that rule first": lambda rows: torch.cat([100 * rows[:, :2], rows[:, 2:]], 1),
    "the largest first": lambda rows: rows.abs().sort(-1, descending=True).values,
    "one beside which most are lost": lambda rows: torch.cat([rows[:, :1].abs() + 4096, rows[:, 1:]], 1),
}


@pytest.mark.parametrize("count", [128, 640, 5120])
@pytest.mark.parametrize("kind", HARD_SQUARES)
def test_squares_that_are_summed_one_by_one_stay_within_their_variance(count: int, kind: str) -> None:
    """Squares of bf16 values are rounded down more often than up (an odd number's leaves 1 when divided by 8).

    Their sum is off by several deviations at the most, for which the allowance of an element, more than six, has room. Up to 256
    that are equal are summed exactly: sixteen bits and eight.
    """
    scaled, shares = [], []
    for seed in range(60):
        rows = HARD_SQUARES[kind](normal(4, count, seed=seed)).to(BF16).double()
        squares = rows.float().numpy() ** 2
        summed = torch.from_numpy(np.add.accumulate(squares, axis=1, dtype=np.float32)[:, -1:].astype(np.float64))
        found = (summed / count).rsqrt() * bounds.inverse_rms(rows, 0.0).reciprocal() - 1
        deviation, worst = bounds.inverse_rms_drift(rows)
        scaled.append(found / deviation)
        shares.append(found.abs() / worst)
    assert float(torch.cat(shares).max()) <= 1
    together = torch.cat(scaled)
    assert float(together.abs().max()) < 6
    if count > 256 or kind != "all equal":
        assert float(together.square().mean()) > 0.01  # an allowance of ten times what happens would hide faults


def test_how_far_squares_are_off_depends_on_how_many_are_equal_or_lost() -> None:
    """All different, all the same but for the sign, pairs, zeros, which add nothing, and two that are lost beside a large one."""
    rows = torch.arange(1.0, 9.0).double() * torch.tensor([1.0, -1.0]).repeat(4)
    few = torch.cat([rows[:2], torch.zeros(6)])
    beside = torch.tensor([2.0**13, 1.0, -1.0, 0.5, 0.0, 0.0, 0.0, 0.0]).double()
    lost = (2.25 * 2.0**-2) ** 2  # 2.25 of 2**26, in unit roundoffs of 2**-24
    for row, count in ((rows, 8), (torch.sign(rows), 64), (rows[:4].repeat(2), 16), (few, 2), (beside, 1 + lost)):
        deviation, worst = bounds.inverse_rms_drift(row.unsqueeze(0))
        assert deviation.tolist() == [[pytest.approx(0.58 / 2 * 2.0**-24 * math.sqrt(count), rel=1e-6)]]
        assert worst == 4 * 2.0**-24
    assert bounds.inverse_rms_drift(torch.zeros(1, 8).double())[0].tolist() == [[0.0]]


def test_how_far_squares_are_off_is_a_matter_of_each_row_whatever_its_size() -> None:
    sizes = torch.tensor([1e-20, 1.0, 1e12]).double().view(1, 3, 1)
    rows = torch.stack([normal(3, 640), HARD_SQUARES["one beside which most are lost"](normal(3, 640))]) * sizes
    found, _ = bounds.inverse_rms_drift(rows)
    assert found.shape == (2, 3, 1)
    for token, head in itertools.product(range(2), range(3)):
        one = rows[token, head].unsqueeze(0)
        alone, _ = bounds.inverse_rms_drift(one)
        larger, _ = bounds.inverse_rms_drift(one * 2.0**20)
        assert found[token, head].tolist() == alone[0].tolist() == larger[0].tolist()


@pytest.mark.parametrize("modelled", [False, True])
@pytest.mark.parametrize("doubt", ["none", "some"])
def test_a_deferred_norm_follows_the_document(doubt: str, modelled: bool) -> None:
    """The division by the root mean square comes after the projection, and its error is common to the row."""
    count, eps = 24, 1e-3
    x, gamma, weights = small(3, count, seed=1), 1 + 0.3 * normal(count, seed=2), [bf16(count, 7, seed=3), bf16(count, 5, seed=4)]
    if doubt == "none":
        x = bounds.exact(x.value)
    profile = Profile("deferred", frozenset({"deferred_norm"}), modelled=modelled)
    weighted = x.value * gamma
    rounded_first = bounds.rounding(
        Bounds(weighted, x.variance * gamma**2 + fp32(weighted, 1), x.worst * gamma.abs() + bounds.U * weighted.abs()),
        profile,
    )
    r = 1 / (x.value.square().mean(-1, keepdim=True) + eps).sqrt()
    # The document leaves out what the sum of squares is rounded by; a norm that comes first has it.
    drift = (x.value**2 * x.variance).sum(-1, keepdim=True) * r**4 / count**2 + (0.58 / 2 * bounds.U) ** 2 * count
    drift_worst = (x.value.abs() * x.worst).mean(-1, keepdim=True) * r**2 + count / 2 * bounds.U
    for weight, found in zip(weights, bounds.norm_and_projections(x, gamma, weights, eps, profile), strict=True):
        product = bounds.projection(rounded_first, weight)
        value = product.value * r
        variance, worst = product.variance * r**2 + fp32(value, 6), product.worst * r + 6 * bounds.U * value.abs()
        assert_same(found, value, variance + drift * value**2, worst + drift_worst * value.abs())


def test_a_norm_before_its_projections_is_rounded_as_the_contract_demands() -> None:
    x, gamma, weights = small(3, 24, seed=1), 1 + 0.3 * normal(24, seed=2), [bf16(24, 7, seed=3), bf16(24, 5, seed=4)]
    normalised = bounds.reproduced_rounding(bounds.rms_norm(x, gamma, 1e-3, PLAIN), "half_even")
    for weight, found in zip(weights, bounds.norm_and_projections(x, gamma, weights, 1e-3, PLAIN), strict=True):
        expected = bounds.projection(normalised, weight)
        assert_same(found, expected.value, expected.variance, expected.worst)


def test_rotation_rounds_each_product_and_the_sum() -> None:
    x, angle = small(3, 16, seed=1), normal(16, seed=2)
    cosine, sine = angle.cos(), angle.sin()  # two halves that differ, as no real table does
    turned = torch.cat([-x.value[:, 8:], x.value[:, :8]], -1)
    of_turned = [torch.cat([tensor[:, 8:], tensor[:, :8]], -1) for tensor in (x.variance, x.worst)]
    value = x.value * cosine + turned * sine
    variance = (
        x.variance * cosine**2 + of_turned[0] * sine**2 + fp32(x.value * cosine, 2) + fp32(turned * sine, 2) + fp32(value, 1)
    )
    worst = x.worst * cosine.abs() + of_turned[1] * sine.abs()
    worst = worst + bounds.U * (2 * (x.value * cosine).abs() + 2 * (turned * sine).abs() + value.abs())
    assert_same(bounds.rotate_half(x, cosine, sine), value, variance, worst)


def test_silu_follows_the_document() -> None:
    gate, up, unit = small(4, 30, seed=1), small(4, 30, seed=2), bounds.U
    g = gate.value
    sigmoid = 1 / (1 + torch.exp(-g))
    silu, slope = g * sigmoid, sigmoid + g * sigmoid * (1 - sigmoid)
    s2 = gate.variance * slope**2 + (4 * unit * silu) ** 2 / 3 + (unit * g * silu) ** 2 + (unit * g) ** 2 / 4
    w = gate.worst * (slope.abs() + 0.5 * gate.worst) + unit * (4 + g.abs()) * silu.abs() + unit * g.abs()
    found, expected = bounds.silu_times(gate, up), bounds.multiply(Bounds(silu, s2, w), up)
    assert_same(found, expected.value, expected.variance, expected.worst)


@dataclasses.dataclass
class Heads:
    """An attention of one query by the document, head by head and key by key; the probabilities differ from one another."""

    query: Bounds
    keys: Bounds
    values: Bounds
    scale: float

    def head(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Value, variance and worst case without roundings of probabilities, the probabilities and the values of a head."""
        unit, group = bounds.U, len(self.query.value) // len(self.keys.value)
        q, k, v = self.query[number], self.keys[number // group], self.values[number // group]
        n, width = k.value.shape
        z, size = self.scale * k.value @ q.value, self.scale * k.value.abs() @ q.value.abs()
        p = torch.exp(z - z.max())
        p = p / p.sum()
        o, magnitude = p @ v.value, p @ v.value.abs()
        away = v.value - o
        s2z = (unit * (size + 2 * z.abs() + 3)) ** 2 + self.scale**2 * k.variance @ q.value**2
        wz = unit * (width * size + 2 * z.abs() + 3) + self.scale * (k.worst @ q.value.abs() + k.value.abs() @ q.worst)
        pull = torch.einsum("j,jd,je->de", p, away, k.value)
        few = 0.3 * math.sqrt(n) * (p**2 @ v.value**2).sqrt()
        under = 2.0**-126 * v.value.abs().sum(0)
        variance = self.scale**2 * pull**2 @ q.variance + p**2 @ (away**2 * s2z.unsqueeze(1)) + p**2 @ v.variance + under**2
        variance = variance + (unit * (torch.maximum(magnitude, few) + (0.33 * math.sqrt(n) + 4) * o.abs())) ** 2
        worst = (p * torch.expm1(wz)) @ away.abs() + p @ v.worst + unit * (2 * n + 8) * magnitude + under
        return o, variance, worst, p, v.value


def heads_of(doubt: bool, length: int = 20) -> tuple[Heads, Bounds, Tensor, Tensor, NewRows | None]:
    """Keys and values of two new rows are uncertain, and so is the query, or nothing is; then what ``attention`` takes."""
    keys, values = bf16(1, NKV, length + 3, D, seed=2), bf16(1, NKV, length + 3, D, seed=3)
    query = small(1, NKV * G, D, seed=1)
    k, v = bounds.exact(keys[0, :, :length]), bounds.exact(values[0, :, :length])
    if not doubt:
        query = bounds.exact(query.value)
        return Heads(query[0], k, v, 0.3), query, keys, values, None
    new = NewRows(small(NKV, 2, D, seed=4), small(NKV, 2, D, seed=5))

    def with_new(old: Bounds, rows: Bounds) -> Bounds:
        kept = old[:, :-2]
        joined = [torch.cat([getattr(kept, name), getattr(rows, name)], 1) for name in ("value", "variance", "worst")]
        return Bounds(joined[0], joined[1], joined[2])

    return Heads(query[0], with_new(k, new.key), with_new(v, new.value), 0.3), query, keys, values, new


@pytest.mark.parametrize("length", [2, 20])
@pytest.mark.parametrize("doubt", [False, True])
def test_attention_follows_the_document(doubt: bool, length: int) -> None:
    heads, query, keys, values, new = heads_of(doubt, length)
    found = attention_bounds(query, keys, values, [length], heads.scale, PLAIN, None if new is None else [new])
    value, variance, worst = (torch.stack(part) for part in list(zip(*map(heads.head, range(NKV * G)), strict=True))[:3])
    assert found.correlation is None
    assert_same(found[0], value, variance, worst)


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("modelled", [False, True])
def test_probabilities_in_bf16_add_their_roundings(denominator: bool, modelled: bool) -> None:
    """Their sum may be of rounded ones, and then what all of them have in common cancels; a layer's kernel may do either."""
    heads, query, keys, values, _ = heads_of(False)
    names = frozenset({"probabilities", "denominator_of_rounded"} if denominator else {"probabilities"})
    profile = Profile("probabilities", names, modelled=modelled)
    found = attention_bounds(query, keys, values, [20], heads.scale, profile, want_correlation=True)
    shared = own = shared_squares = own_squares = 0.0
    of_heads = []
    for number in range(NKV * G):
        o, variance, worst, p, v = heads.head(number)
        moved = p.unsqueeze(1) * (v - o if denominator and not modelled else v)
        variance = variance + 2.0**-16 / 5 * (moved**2).sum(0)
        worst = worst + 2.0**-8 * p @ v.abs()
        assert_same(found[0][number], o, variance, worst)
        q = spacing(o, BF16) ** 2 / 12
        weight = torch.sign(o) / (variance + q).sqrt()
        of_site = 2.0**-16 / 5 * (moved @ weight) ** 2
        shared, shared_squares = shared + float(of_site.sum()), shared_squares + float((of_site**2).sum())
        own, own_squares = own + float((weight**2 * q).sum()), own_squares + float(((weight**2 * q) ** 2).sum())
        of_heads.append(float(of_site.sum() + (weight**2 * q).sum()))
    assert found.correlation is not None
    assert found.correlation.head_variance is not None
    # Hardly any two heads have a probability in common.
    count = (shared + own) ** 2 / (shared_squares + own_squares)
    assert found.correlation.sum_variance.tolist() == pytest.approx([shared + own], rel=1e-6)
    assert found.correlation.independent.tolist() == pytest.approx([count], rel=1e-6)
    assert found.correlation.head_variance.tolist() == [pytest.approx(of_heads, rel=1e-6)]


def test_the_errors_of_a_lone_element_are_its_probabilitys_and_its_own() -> None:
    """Two that are not alike: between one and two."""
    query, keys = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 2, 1, dtype=BF16)
    values = torch.full((1, 1, 2, 1), 1.9921875, dtype=BF16)
    rounds = Profile("probabilities", frozenset({"probabilities"}))
    found = attention_bounds(bounds.exact(query), keys, values, [2], 1.0, rounds, want_correlation=True).correlation
    assert found is not None
    own, shared = 2.0**-14 / 12, 2.0**-16 / 5 * 1.9921875**2
    assert found.independent.tolist() == pytest.approx([(own + shared) ** 2 / (own**2 + shared**2)], rel=1e-3)
    assert 1.5 < found.independent.item() < 2


def test_correlations_are_told_only_of_rounded_probabilities_and_only_on_request() -> None:
    heads, query, keys, values, _ = heads_of(False)
    rounds = Profile("probabilities", frozenset({"probabilities"}))
    assert attention_bounds(query, keys, values, [20], heads.scale, PLAIN, want_correlation=True).correlation is None
    assert attention_bounds(query, keys, values, [20], heads.scale, rounds).correlation is None
    assert attention_bounds(query, keys, values, [20], heads.scale, rounds, want_correlation=False).correlation is None


def test_every_query_has_its_own_keys_and_length() -> None:
    query, keys, values = bounds.exact(bf16(3, NKV * G, D)), bf16(3, NKV, 9, D, seed=2), bf16(3, NKV, 9, D, seed=3)
    rounds, lengths = Profile("probabilities", frozenset({"probabilities"})), [9, 1, 4]
    together = attention_bounds(query, list(keys), list(values), lengths, 0.3, rounds, want_correlation=True)
    assert together.correlation is not None
    for row in range(3):
        part = slice(row, row + 1)
        alone = attention_bounds(query[part], keys[part], values[part], lengths[part], 0.3, rounds, want_correlation=True)
        assert alone.correlation is not None
        assert_same(together[part], alone.value, alone.variance, alone.worst)
        assert torch.equal(together.correlation.sum_variance[part], alone.correlation.sum_variance)
        assert torch.equal(together.correlation.independent[part], alone.correlation.independent)
        assert together.correlation.head_variance is not None
        assert alone.correlation.head_variance is not None
        assert torch.equal(together.correlation.head_variance[part], alone.correlation.head_variance)


@pytest.mark.parametrize(("apart", "alike"), [(2.0**-12, True), (0.9 * 2.0**-9, True), (1.1 * 2.0**-9, False), (2.0**-6, False)])
def test_probabilities_that_are_nearly_equal_are_rounded_alike(apart: float, alike: bool) -> None:
    """Two keys share a head's weight, nearly evenly: their roundings are one error, or two."""
    query = torch.ones(1, 1, 1, dtype=torch.float64)
    keys = torch.tensor([apart / 2, -apart / 2]).double().view(1, 1, 2, 1)
    values = torch.ones(1, 1, 2, 1, dtype=BF16)
    rounds = Profile("probabilities", frozenset({"probabilities"}))
    plain, found = (
        attention_bounds(bounds.exact(query), keys, values, [2], 1.0, profile).variance.item() for profile in (PLAIN, rounds)
    )
    # Each moves the result by its own rounding: 1/2 each, so 1 together or the root of 1/2.
    assert (found - plain) / PROBABILITY_VARIANCE == pytest.approx(1.0 if alike else 0.5, rel=1e-3)


def test_equal_probabilities_of_two_heads_are_not_rounded_alike() -> None:
    query = torch.zeros(1, 2, 1, dtype=torch.float64)
    keys, values = torch.ones(1, 1, 2, 1, dtype=BF16), torch.tensor([1.0, 3.0], dtype=BF16).view(1, 1, 2, 1)
    rounds = Profile("probabilities", frozenset({"probabilities"}))
    plain, found = (attention_bounds(bounds.exact(query), keys, values, [2], 1.0, profile) for profile in (PLAIN, rounds))
    # (1/2 + 3/2)**2 in either head; the errors of all four would add up to more.
    added = (found.variance - plain.variance).flatten() / PROBABILITY_VARIANCE
    assert added.tolist() == pytest.approx([4.0, 4.0], rel=1e-3)


def test_equal_probabilities_of_two_heads_lean_the_row_together() -> None:
    """Each head's sum by itself, and the row's as one."""
    query = torch.zeros(1, 2, 1, dtype=torch.float64)
    keys, values = torch.ones(1, 1, 2, 1, dtype=BF16), torch.tensor([1.0, 3.0], dtype=BF16).view(1, 1, 2, 1)
    rounds = Profile("probabilities", frozenset({"probabilities"}))
    found = attention_bounds(bounds.exact(query), keys, values, [2], 1.0, rounds, want_correlation=True)
    assert found.correlation is not None
    assert found.correlation.head_variance is not None
    own = 2.0**-12 / 12  # of 2 = 1/2 + 3/2
    whole = float(found.variance[0, 0]) + own
    head = 4 * PROBABILITY_VARIANCE
    assert found.correlation.head_variance.flatten().tolist() == pytest.approx([(head + own) / whole] * 2, rel=1e-6)
    assert found.correlation.sum_variance.tolist() == pytest.approx([(4 * head + 2 * own) / whole], rel=1e-6)
    assert found.correlation.independent.tolist() == pytest.approx(
        [(4 * head + 2 * own) ** 2 / ((4 * head) ** 2 + 2 * own**2)], rel=1e-6
    )


@pytest.mark.parametrize("count", [3, 4, 30])
@pytest.mark.parametrize("before_normalised", [False, True])
def test_alike_probabilities_err_by_their_own_rounding_where_it_is_large(count: int, before_normalised: bool) -> None:
    """Beside one larger one in each of two heads: near a tie of bf16 before or after the division by their sum.

    Fewer than four may agree by accident, and err as roundings do on average.
    """
    tie = 1 + 2.0**-8 + 2.0**-12  # of bf16: 1 or 1 + 2**-7
    shares = [tie / 4, tie / 16] if before_normalised else [p / (1 - count * p) for p in (tie / 64, tie / 128)]
    largest = [1.0, 2.0]  # scores; of either head the largest is not 0
    keys = torch.zeros(1, 1, count + 1, 4, dtype=torch.float64)
    query = torch.eye(4, dtype=torch.float64)[:2].view(1, 2, 4)
    for head, (share, top) in enumerate(zip(shares, largest, strict=True)):
        keys[0, 0, :, head] = torch.tensor([top] + [top + math.log(share)] * count, dtype=torch.float64)
    values = torch.ones(1, 1, count + 1, 4, dtype=BF16)
    rounds = Profile("probabilities", frozenset({"probabilities"}))
    plain, found = (
        attention_bounds(bounds.exact(query), keys, values, [count + 1], 1.0, one).variance for one in (PLAIN, rounds)
    )
    average = PROBABILITY_VARIANCE**0.5
    for head, share in enumerate(shares):
        p = share / (1 + count * share)

        def rounding(value: float) -> float:
            return abs(float(rounded(torch.tensor(value).double(), BF16)) / value - 1)

        size = max(average, rounding(p), rounding(share)) if count >= 4 else average
        assert count < 4 or size > 2 * average
        expected = (count * p * size) ** 2 + (p / share * average) ** 2
        assert (found - plain)[0, head].tolist() == pytest.approx([expected] * 4, rel=1e-6)


def test_what_rounding_does_to_a_probability_below_fp32s_range_is_counted_once() -> None:
    """As lost, not as rounded."""
    query = torch.ones(1, 1, 1, dtype=torch.float64)
    keys = torch.tensor([0.0] + [-87.4] * 4).double().view(1, 1, 5, 1)
    values = torch.tensor([0.0] + [1e30] * 4).double().view(1, 1, 5, 1)
    assert 2.0**-127 < math.exp(-87.4) < 2.0**-126
    rounds = Profile("probabilities", frozenset({"probabilities"}))
    found = attention_bounds(bounds.exact(query), keys, values, [5], 1.0, rounds)
    assert found.variance.sqrt().item() == pytest.approx(4e30 * 2.0**-126, rel=1e-3)


def test_a_probability_that_fp32_cannot_hold_may_be_lost() -> None:
    """A key of weight exp(-100), which flushing makes zero, with a value so large that its part is all that there is."""
    query, keys = torch.ones(1, 1, 1, dtype=torch.float64), torch.tensor([0.0, -100.0]).double().view(1, 1, 2, 1)
    values = torch.tensor([0.0, 1e30]).double().view(1, 1, 2, 1)
    found = attention_bounds(bounds.exact(query), keys, values, [2], 1.0, PLAIN)
    assert found.value.item() == pytest.approx(math.exp(-100) * 1e30)
    assert found.worst.item() > found.value.item()
    assert found.variance.sqrt().item() > found.value.item()
    assert found.variance.sqrt().item() == pytest.approx(1e30 * 2.0**-126)


def test_a_score_that_nobody_knows_leaves_its_worst_case_finite() -> None:
    heads, query, keys, values, _ = heads_of(False)
    hopeless = Bounds(query.value, query.variance, torch.full_like(query.value, 1e9))
    new = NewRows(bounds.exact(keys[0, :, 18:20]), bounds.exact(values[0, :, 18:20]))
    found = attention_bounds(hopeless, keys, values, [20], heads.scale, PLAIN, [new])
    assert bool(torch.isfinite(found.worst).all())
    assert bool((found.worst > 1e20).all())
