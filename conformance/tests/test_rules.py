"""The rules of other projects: their limits from both sides, and the blind spots that they are published with."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from conformance.errors import UsageError
from conformance.exam.rules import RULES, Compared, rule_named

BF16 = torch.bfloat16
F32 = torch.float32
I32 = torch.int32
NAMES = {rule.name for rule in RULES}
NAN, INF = math.nan, math.inf


def compared(
    found: torch.Tensor, golden: torch.Tensor, *, rough: torch.Tensor | None = None, exact: torch.Tensor | None = None
) -> Compared:
    """An output named ``out``; torch's own implementation and the exact value agree with the golden unless given."""
    return Compared("out", found, golden, golden.double() if exact is None else exact, golden if rough is None else rough)


def like(golden: list[float], found: list[float], dtype: torch.dtype = F32) -> Compared:
    return compared(torch.tensor(found, dtype=dtype), torch.tensor(golden, dtype=dtype))


def wrong(count: int, of: int) -> Compared:
    """``count`` of ``of`` ones are zero instead."""
    return like([1.0] * of, [0.0] * count + [1.0] * (of - count))


def random_golden(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if dtype == I32:
        return torch.randint(0, 151936, shape, generator=generator, dtype=I32)
    return torch.randn(shape, generator=generator).to(dtype)


def accepting(run: Compared) -> set[str]:
    """The names of the rules that accept an output."""
    return {rule.name for rule in RULES if rule.accepts(run)}


def rough_off(found: float) -> Compared:
    """An output of zero expected, where torch is off by a quarter."""
    return compared(torch.tensor([found]), torch.tensor([0.0]), rough=torch.tensor([0.25]))


def tilted(by: float) -> Compared:
    """A vector and the same with a perpendicular part, both of mean zero: cosine and correlation are ``1/sqrt(1 + by**2)``."""
    return like([1, 1, -1, -1], [1 + by, 1 - by, -1 + by, -1 - by])


ULP = 2.0**-23
BF16_ULP = 2.0**-7

LIMITS = [
    ("assert_close", like([1], [1 + 2 * BF16_ULP], BF16), like([1], [1 + 3 * BF16_ULP], BF16)),
    ("assert_close", like([1], [1 + 1.1e-5]), like([1], [1 + 1.2e-5])),
    # 2**-5 may be off by 1.6e-2 * 2**-5 + 1e-3, which is 6.1 ULPs.
    ("vLLM defaults", like([2**-5], [2**-5 + 6 * 2**-12], BF16), like([2**-5], [2**-5 + 7 * 2**-12], BF16)),
    ("vLLM defaults", like([1], [1 + 1.1e-5]), like([1], [1 + 1.2e-5])),
    ("98% within 3e-3", wrong(2, 100), wrong(3, 100)),
    ("98% within 3e-3", like([1], [1.00599]), like([1], [1.00601])),
    ("98% within 3e-3", like([-1], [-1.00599]), like([-1], [-1.00601])),
    ("99.5% within 3e-3", wrong(5, 1000), wrong(6, 1000)),
    ("98% within 5e-3", wrong(2, 100), wrong(3, 100)),
    ("98% within 5e-3", like([1], [1.00999]), like([1], [1.01001])),
    ("argmax of logits", wrong(2, 100), wrong(3, 100)),
    ("2x torch + 1e-5", rough_off(0.5 + 0.9e-5), rough_off(0.5 + 1.1e-5)),
    # bf16 makes 1.296875 of 1 + 0.3 and 0.99609375 of that less 0.3: the allowance is 2 * 2**-8, one ULP of 1.
    ("2x torch + noise", like([1], [1 + BF16_ULP], BF16), like([1], [1 + 2 * BF16_ULP], BF16)),
    # A gain of 1 + e gives e**2 / (1 + (1 + e)**2).
    ("calc_diff < 1e-3", like([1, -2], [1.0447, -2.0894]), like([1, -2], [1.046, -2.092])),
    ("calc_diff < 1e-5", like([1, -2], [1.0044, -2.0088]), like([1, -2], [1.0046, -2.0092])),
    # The limits are 1.01 / 0.99 and 0.99 / 1.01: relative to what was found.
    ("allclose 1e-2", like([1], [1.0202]), like([1], [1.0203])),
    ("allclose 1e-2", like([1], [0.9802]), like([1], [0.9801])),
    ("both over 1e-2", like([1], [1.0099]), like([1], [1.01005])),
    ("both over 1e-2", like([1e-3], [0.0109]), like([1e-3], [0.0111])),
    ("both over 1e-2", like([100], [100.99]), like([100], [101.01])),
    ("OpenCL ULPs", like([1.5], [1.5 + 3 * ULP]), like([1.5], [1.5 + 4 * ULP])),
    ("OpenCL ULPs", like([1.5], [1.5 + 2 * BF16_ULP], BF16), like([1.5], [1.5 + 3 * BF16_ULP], BF16)),
    # At a power of two a ULP is that of the binade below, so this is 2 and 4 of them.
    ("OpenCL ULPs", like([1], [1 + ULP]), like([1], [1 + 2 * ULP])),
    ("PCC >= 0.9999", tilted(0.01414), tilted(0.01415)),
    ("cosine > 0.999", tilted(0.0447), tilted(0.0448)),
    ("10 ULPs", like([1.5], [1.5 - 10 * ULP]), like([1.5], [1.5 - 11 * ULP])),
    ("10 ULPs", like([1.0], [1 + 10 * BF16_ULP], BF16), like([1.0], [1 + 11 * BF16_ULP], BF16)),
    # The golden's ULP counts, also where the output lies beyond the next power of two.
    ("10 ULPs", like([1.984375], [1.984375 + 10 * BF16_ULP], BF16), like([1.984375], [1.984375 + 12 * BF16_ULP], BF16)),
    ("2 bf16 ULPs", like([1.5], [1.5 + 2 * BF16_ULP], BF16), like([1.5], [1.5 + 3 * BF16_ULP], BF16)),
    ("2 bf16 ULPs", like([1.5], [1.5 + 2 * BF16_ULP]), like([1.5], [1.5 + 2.01 * BF16_ULP])),
    ("8 bf16 ULPs + floor", like([1.25], [1.25 + 8 * BF16_ULP], BF16), like([1.25], [1.25 + 9 * BF16_ULP], BF16)),
    # The row's root mean square is sqrt(1/2), a 64th of which is 0.01105.
    ("8 bf16 ULPs + floor", like([1, 0], [1, 0.0110]), like([1, 0], [1, 0.0111])),
]


@pytest.mark.parametrize(("name", "inside", "outside"), LIMITS)
def test_the_limit_lies_between_the_last_accepted_and_the_first_rejected(name: str, inside: Compared, outside: Compared) -> None:
    rule = rule_named(name)
    assert rule.accepts(inside)
    assert not rule.accepts(outside)


def test_every_rule_has_its_limit_tested() -> None:
    assert {name for name, _, _ in LIMITS} == NAMES


@pytest.mark.parametrize("dtype", [BF16, F32, I32])
def test_every_rule_accepts_the_golden_itself(dtype: torch.dtype) -> None:
    golden = random_golden(dtype, 8, 64)
    assert accepting(compared(golden.clone(), golden)) == NAMES


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_assert_close_decides_as_torch_testing_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    rule, decisions = rule_named("assert_close"), set()
    # Errors around the tolerance, where the precision in which it is computed decides.
    for scale in (1e-6, 1e-3, 1.0, 1e3):
        for _ in range(100):
            golden = (scale * torch.randn(1, generator=generator)).to(dtype)
            tolerance = 1e-5 + (1.6e-2 if dtype == BF16 else 1.3e-6) * golden.abs().double()
            found = (golden.double() + tolerance * (0.9 + 0.2 * torch.rand(1, generator=generator))).to(dtype)
            try:
                torch.testing.assert_close(found, golden)
                expected = True
            except AssertionError:
                expected = False
            assert rule.accepts(compared(found, golden)) == expected
            decisions.add(expected)
    assert decisions == {True, False}


ODD_VALUES = (NAN, INF, -INF, 0.0, -0.0, 1e30, 1e-40)


@pytest.mark.parametrize("dtype", [BF16, F32, I32])
def test_every_rule_decides_about_anything(dtype: torch.dtype) -> None:
    tensors = [random_golden(dtype, 4, 8), random_golden(dtype, 0, 8), random_golden(dtype, 1)[0]]
    odd: tuple[float, ...] = (0, -1, 2**31 - 1, -(2**31)) if dtype == I32 else ODD_VALUES
    for tensor, value, other in itertools.product(tensors, (None, *odd), (None, *odd)):
        found = tensor if value is None else torch.full_like(tensor, value)
        golden = tensor if other is None else torch.full_like(tensor, other)
        for name, rough in (("out", golden), ("logits", found)):
            run = dataclasses.replace(compared(found, golden, rough=rough), name=name)
            for rule in RULES:
                assert isinstance(rule.accepts(run), bool), (rule.name, run)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("value", [NAN, INF])
def test_no_rule_accepts_an_output_full_of_nan_or_infinity(dtype: torch.dtype, value: float) -> None:
    golden = random_golden(dtype, 8, 64)
    assert accepting(compared(torch.full_like(golden, value), golden)) == set()


def test_no_rule_accepts_an_output_full_of_nan_because_the_golden_is_small() -> None:
    golden = 1e-6 * random_golden(F32, 8, 64)
    assert accepting(compared(torch.full_like(golden, NAN), golden)) == set()
    # Infinities become zeros, and those are close to it.
    assert accepting(compared(torch.full_like(golden, INF), golden)) == {"PCC >= 0.9999"}


@pytest.mark.parametrize("value", [NAN, INF])
def test_one_element_that_is_not_finite_passes_where_it_is_an_outlier_or_taken_as_zero(value: float) -> None:
    golden = random_golden(F32, 100, 1000)
    found = golden.clone()
    found[7, 7] = value
    assert accepting(compared(found, golden)) == {"98% within 5e-3", "PCC >= 0.9999"}


def test_one_huge_value_fits_in_a_budget_of_outliers() -> None:
    golden = random_golden(BF16, 10, 100)
    found = golden.clone()
    found[7, 7] = 1e30
    budgets = {"98% within 3e-3", "99.5% within 3e-3", "98% within 5e-3", "argmax of logits"}
    assert accepting(compared(found, golden)) == budgets


def test_all_zeros_against_all_zeros_pass_but_for_the_cosine() -> None:
    zeros = torch.zeros(4, 8, dtype=BF16)
    assert accepting(compared(zeros, zeros)) == NAMES - {"cosine > 0.999"}
    spoilt = zeros.clone()
    spoilt[0, 0] = NAN
    assert accepting(compared(spoilt, zeros)) == set()


def test_all_zeros_pass_where_the_golden_is_smaller_than_an_absolute_tolerance() -> None:
    golden = 5e-4 * random_golden(BF16, 4, 8).sign()
    assert accepting(compared(torch.zeros_like(golden), golden)) == {
        "98% within 3e-3",
        "99.5% within 3e-3",
        "98% within 5e-3",
        "argmax of logits",
        "2x torch + noise",
        "allclose 1e-2",
        "both over 1e-2",
        "vLLM defaults",
    }
    assert accepting(compared(torch.zeros_like(golden), golden * 1000)) == set()


def test_a_wrong_scale_passes_where_only_the_direction_counts() -> None:
    golden = random_golden(BF16, 8, 64)
    run = compared(2 * golden, golden)
    assert accepting(run) == {"PCC >= 0.9999", "cosine > 0.999"}
    assert accepting(dataclasses.replace(run, name="logits")) == {"PCC >= 0.9999", "cosine > 0.999", "argmax of logits"}


def test_an_offset_passes_the_correlation_but_not_the_cosine() -> None:
    golden = random_golden(F32, 8, 64)
    assert accepting(compared(golden + 1, golden)) == {"PCC >= 0.9999"}


def test_one_bf16_ulp_everywhere_is_too_much_for_the_tightest() -> None:
    golden = (1 + torch.arange(128) * BF16_ULP).to(BF16)[:-1]
    run = compared(golden + BF16_ULP, golden, rough=golden - BF16_ULP / 2)
    rejecting = {"98% within 3e-3", "99.5% within 3e-3", "argmax of logits", "calc_diff < 1e-5"}
    assert accepting(run) == NAMES - rejecting


def test_constant_tensors_are_compared_element_by_element_instead_of_correlated() -> None:
    rule = rule_named("PCC >= 0.9999")
    assert rule.accepts(like([1, 1], [1 + 4 * BF16_ULP] * 2, BF16))
    assert not rule.accepts(like([1, 1], [1 + 6 * BF16_ULP] * 2, BF16))
    assert not rule.accepts(like([1, 1], [1.001, 1.001]))
    # The variance of what is constant must come out as exactly zero, also where the sum is not exact in fp32.
    assert not rule.accepts(like([0.1] * 1001, [0.7] * 1001))


def test_argmax_looks_at_the_largest_of_each_row_of_the_logits_only() -> None:
    rule = rule_named("argmax of logits")
    golden = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 4.0]])
    found = golden * 7 - 100
    assert not rule.accepts(compared(found, golden))
    logits = dataclasses.replace(compared(found, golden), name="logits")
    assert rule.accepts(logits)
    found[1, 2] = found[1, 0] + 1
    assert not rule.accepts(logits)
    # A NaN counts as the largest, so it passes unseen in the right place.
    found[1] = torch.tensor([NAN, 0.0, 0.0])
    assert rule.accepts(logits)


def test_opencl_compares_with_the_exact_value_and_not_with_the_golden() -> None:
    rule = rule_named("OpenCL ULPs")
    golden = torch.tensor([1.5])
    exact = golden.double() + 0.5 * ULP
    assert rule.accepts(compared(golden + 3 * ULP, golden, exact=exact))
    assert not rule.accepts(compared(golden - 3 * ULP, golden, exact=exact))
    # Beyond the largest number the correctly rounded result is infinity; just below it, infinity is one ULP too far.
    largest = torch.finfo(F32).max
    assert rule.accepts(compared(torch.tensor([INF]), golden, exact=torch.tensor([1e60], dtype=torch.float64)))
    assert rule.accepts(compared(torch.tensor([INF]), golden, exact=torch.tensor([largest], dtype=torch.float64)))
    assert not rule.accepts(compared(torch.tensor([-INF]), golden, exact=torch.tensor([largest], dtype=torch.float64)))


def test_flash_attention_measures_from_the_rounded_reference_and_forgives_what_torch_gets_wrong() -> None:
    golden = random_golden(BF16, 8, 64)
    found = golden.clone()
    found[0, 0] += 1
    for name in ("2x torch + 1e-5", "2x torch + noise"):
        rule = rule_named(name)
        assert not rule.accepts(compared(found, golden))
        assert rule.accepts(compared(found, golden, rough=golden + 1))
        assert not rule.accepts(compared(found, golden, rough=torch.full_like(golden, NAN)))


def test_a_wrong_token_passes_where_a_rule_knows_no_integers() -> None:
    golden = torch.tensor([50000, 3, 120000, 77], dtype=I32)
    found = golden + torch.tensor([1, 0, 0, 0], dtype=I32)
    assert accepting(compared(found, golden)) == {"allclose 1e-2", "PCC >= 0.9999"}
    assert accepting(compared(golden.flip(0), golden)) == set()


def cache_pages() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of three pages, and a page between them that nobody owns."""
    pages = random_golden(BF16, 4, 2, 16)
    pages[2] = NAN
    return pages, pages[[0, 1, 3]]


@pytest.mark.parametrize("spoilt", [None, 0.0, 1e30, NAN])
def test_pages_that_nobody_owns_change_no_decision(spoilt: float | None) -> None:
    golden, owned = cache_pages()
    found, found_owned = golden.clone(), owned.clone()
    if spoilt is not None:
        found[0, 1, 3] = spoilt
        found_owned[0, 1, 3] = spoilt
    assert accepting(compared(found, golden)) == accepting(compared(found_owned, owned))


@pytest.mark.parametrize("left", [5.0, INF])
def test_a_write_to_a_page_that_nobody_owns_is_seen(left: float) -> None:
    golden, _ = cache_pages()
    found = golden.clone()
    found[2, 1, 7] = left
    assert accepting(compared(found, golden)) == set()


def test_a_cache_that_nobody_owns_is_accepted() -> None:
    golden = torch.full((2, 2, 16), NAN, dtype=BF16)
    assert accepting(compared(golden.clone(), golden)) == NAMES


def test_a_cache_keeps_its_rows_when_pages_are_left_out() -> None:
    golden, _ = cache_pages()
    golden[3] = 1e4
    golden[0, 0, 0] = 0
    found = golden.clone()
    found[0, 0, 0] = 0.1
    assert not rule_named("8 bf16 ULPs + floor").accepts(compared(found, golden))


def test_a_golden_that_is_nan_within_a_row_leaves_out_that_element_only() -> None:
    golden = torch.tensor([[1.0, NAN], [2.0, 3.0]])
    assert accepting(compared(golden.clone(), golden)) == NAMES
    assert accepting(compared(torch.tensor([[5.0, NAN], [2.0, 3.0]]), golden)) == set()


def test_names_are_unique_and_every_rule_says_what_it_is_and_where_it_comes_from() -> None:
    assert len(NAMES) == len(RULES)
    for rule in RULES:
        assert rule_named(rule.name) is rule
        for text in (rule.name, rule.system, rule.definition, rule.source):
            assert text.strip() == text != ""
            assert "\n" not in text


@pytest.mark.parametrize("name", ["assert_closer", "", None, 3])
def test_an_unknown_rule_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown rule .*known are assert_close, 98% within 3e-3"):
        rule_named(name)
