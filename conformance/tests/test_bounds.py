"""The error model against experiments: what errors of known size do to a result, and what sums and casts in fp32 do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from conformance import bounds
from conformance.bounds import BF16, Bounds, NewRows, Profile
from conformance.ulp import Mode, rounded, spacing

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
    """Value, variance and worst case as the numerics document writes them, everything in float64."""
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
    "tiny": lambda depth: 1e-12 * normal(4, depth) * 10.0 ** -torch.arange(4).unsqueeze(1),
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
    estimate = bounds.attention(query, keys, values, [KEYS], D**-0.5, PLAIN, [new])

    def attended(draw: int) -> Tensor:
        k, v = keys[0, :, :KEYS].double(), values[0, :, :KEYS].double()
        k[:, -2:], v[:, -2:] = drawn(new.key, 3 * draw), drawn(new.value, 3 * draw + 1)
        return _attention(drawn(query, 3 * draw + 2)[0], k, v)

    observed = observed_variance(attended, estimate.value[0])
    assert_predicts(observed, Bounds(estimate.value[0], estimate.variance[0], estimate.worst[0]))


def test_attention_never_looks_past_the_length() -> None:
    query, keys, values = bounds.exact(bf16(1, NKV * G, D)), bf16(1, NKV, KEYS, D, seed=2), bf16(1, NKV, KEYS, D, seed=3)
    before = bounds.attention(query, keys, values, [KEYS - 4], D**-0.5, PLAIN)
    keys[:, :, KEYS - 4 :], values[:, :, KEYS - 4 :] = math.nan, math.inf
    after = bounds.attention(query, keys, values, [KEYS - 4], D**-0.5, PLAIN)
    for name in ("value", "variance", "worst"):
        assert torch.equal(getattr(before, name), getattr(after, name))


@pytest.mark.parametrize("query_size", [1.0, 1e-2, 1e-4, 0.0])
def test_bf16_probabilities_stay_within_their_variance(query_size: float) -> None:
    """Also where small queries make all probabilities alike, and one rounding of them all moves the whole row."""
    profile = Profile("probabilities", frozenset({"probabilities"}))
    scaled = []
    for length in range(5, 60):
        query = bf16(1, NKV * G, D, seed=length, scale=query_size)
        keys, values = bf16(1, NKV, length, D, seed=1000 + length), bf16(1, NKV, length, D, seed=2000 + length)
        estimate = bounds.attention(bounds.exact(query), keys, values, [length], D**-0.5, profile)
        scores = torch.einsum("hgd,hnd->hgn", query[0].double().view(NKV, G, D), keys[0].double()) * D**-0.5
        p = rounded(torch.softmax(scores, -1), BF16)
        found = torch.einsum("hgn,hnd->hgd", p, values[0].double()).reshape(NKV * G, D)
        error = found - estimate.value[0]
        assert bool((error.abs() <= estimate.worst[0]).all())
        scaled.append(error / estimate.variance[0].sqrt())
    together = torch.cat(scaled)
    assert 0.5 < float(together.square().mean()) < 1.3
    assert float(together.abs().max()) < 6


def test_the_only_probability_is_not_rounded() -> None:
    query, keys, values = bounds.exact(bf16(1, NKV * G, D)), bf16(1, NKV, 1, D, seed=2), bf16(1, NKV, 1, D, seed=3)
    rounds = Profile("probabilities", frozenset({"probabilities"}))
    plain, found = (bounds.attention(query, keys, values, [1], D**-0.5, profile) for profile in (PLAIN, rounds))
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
    value = torch.cat([3 * normal(20000), 2.0 ** torch.arange(-20, 20, dtype=torch.float64) * (1 - relative / 3)])
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
