"""ULP arithmetic against exhaustive bf16, against torch's casts and against ml_dtypes."""

from __future__ import annotations

import math

import pytest
import torch

from conformance.errors import UsageError
from conformance.numerics.ulp import FORMATS, distance, rounded, spacing

BF16 = torch.bfloat16
F16 = torch.float16


def every_finite_bf16() -> torch.Tensor:
    """All finite bf16 values, as float64."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(BF16).double()
    return values[torch.isfinite(values)]


def positive_bf16() -> torch.Tensor:
    """All finite bf16 values from 0, ascending, as float64."""
    return torch.arange(0, 0x7F80, dtype=torch.int32).to(torch.int16).view(BF16).double()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_spacing_is_the_distance_to_the_next_value_up(dtype: torch.dtype) -> None:
    largest_bits = {BF16: 0x7F7F, F16: 0x7BFF}[dtype]
    values = torch.arange(0, largest_bits + 1, dtype=torch.int32).to(torch.int16).view(dtype).double()
    assert torch.equal(spacing(values[:-1], dtype), values[1:] - values[:-1])
    assert torch.equal(spacing(-values[:-1], dtype), values[1:] - values[:-1])


def test_spacing_agrees_with_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = every_finite_bf16()
    import numpy as np

    theirs = np.spacing(values.numpy().astype(ml_dtypes.bfloat16)).astype(np.float64)
    inner = np.isfinite(theirs) & (theirs != 0)
    assert inner.mean() > 0.99
    assert np.array_equal(np.abs(theirs[inner]), spacing(values, BF16).numpy()[inner])


@pytest.mark.parametrize("exponent", [-100, -1, 0, 1, 10, 127])
def test_spacing_just_below_a_power_of_two_is_the_lower_one(exponent: int) -> None:
    power = 2.0**exponent
    values = torch.tensor([math.nextafter(power, 0), power, math.nextafter(power, math.inf)], dtype=torch.float64)
    assert spacing(values, BF16).tolist() == [power * 2.0**-8, power * 2.0**-7, power * 2.0**-7]


@pytest.mark.parametrize(("dtype", "smallest"), [(BF16, 2.0**-133), (F16, 2.0**-24), (torch.float32, 2.0**-149)])
def test_spacing_of_zero_and_subnormals_is_the_smallest_value(dtype: torch.dtype, smallest: float) -> None:
    normal = 2.0 ** FORMATS[dtype].min_exponent
    values = torch.tensor([0.0, -0.0, smallest, normal / 2, normal, 1e-300], dtype=torch.float64)
    assert set(spacing(values, dtype).tolist()) == {smallest}


def test_spacing_does_not_change_its_argument() -> None:
    values = torch.tensor([1.0, 3.0, 1e-40], dtype=torch.float64)
    spacing(values, BF16)
    assert values.tolist() == [1.0, 3.0, 1e-40]


def test_half_even_is_torchs_cast_at_every_tie_and_around_it() -> None:
    low = positive_bf16()[:-1]
    high = positive_bf16()[1:]
    ties = (low + high) / 2  # exact in fp32, so torch rounds once
    for values in (
        ties,
        torch.nextafter(ties.float(), low.float()).double(),
        torch.nextafter(ties.float(), high.float()).double(),
    ):
        for signed in (values, -values):
            assert torch.equal(rounded(signed, BF16), signed.float().to(BF16).double())


def test_half_away_takes_every_tie_up_and_nothing_else() -> None:
    low, high = positive_bf16()[:-1], positive_bf16()[1:]
    ties = (low + high) / 2
    below = ties - (high - low) * 2.0**-20
    assert torch.equal(rounded(ties, BF16, "half_away"), high)
    assert torch.equal(rounded(-ties, BF16, "half_away"), -high)
    assert torch.equal(rounded(below, BF16, "half_away"), low)


def test_truncation_drops_everything_below_the_last_place() -> None:
    low, high = positive_bf16()[:-1], positive_bf16()[1:]
    for part in (0.0, 0.25, 0.5, 1 - 2.0**-20):
        values = low + (high - low) * part
        assert torch.equal(rounded(values, BF16, "truncate"), low)
        assert torch.equal(rounded(-values, BF16, "truncate"), -low)


def test_values_between_two_ties_are_rounded_once() -> None:
    # Just above a tie by less than fp32 can hold: through fp32 it would fall on the tie and then to even.
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert rounded(value, BF16).item() == 1 + 2.0**-7
    assert value.float().to(BF16).item() == 1.0


@pytest.mark.parametrize("mode", ["half_even", "half_away"])
def test_overflow_gives_infinity_from_the_midpoint_on(mode: str) -> None:
    largest = FORMATS[BF16].largest
    midpoint = largest + float(spacing(torch.tensor([largest], dtype=torch.float64), BF16)) / 2
    values = torch.tensor([largest, math.nextafter(midpoint, 0), midpoint, -midpoint, 1e300], dtype=torch.float64)
    assert rounded(values, BF16, mode).tolist() == [largest, largest, math.inf, -math.inf, math.inf]  # type: ignore[arg-type]


def test_fp16_rounding_is_torchs_cast() -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(20000, generator=generator) * 10 ** (torch.rand(20000, generator=generator) * 12 - 9)).double()
    assert torch.equal(rounded(values, F16), values.float().to(F16).double())


def test_distance_counts_ulps_of_the_larger_value() -> None:
    found = torch.tensor([1.0, 1.0, 2.0, 1 - 2.0**-8], dtype=torch.float64)
    expected = torch.tensor([1.0, 1 + 2.0**-7, 2 - 2.0**-7, 1.0], dtype=torch.float64)
    assert distance(found, expected, BF16).tolist() == [0.0, 1.0, 0.5, 0.5]


def test_a_dtype_without_ulps_is_refused_in_one_line() -> None:
    with pytest.raises(
        UsageError, match=r"^no ULP is defined for torch\.int32; known are torch\.bfloat16, torch\.float16, torch\.float32$"
    ) as error:
        spacing(torch.zeros(1, dtype=torch.float64), torch.int32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_beyond_the_largest_value_by_half_a_step_is_infinite(dtype: torch.dtype) -> None:
    largest = torch.tensor(torch.finfo(dtype).max, dtype=torch.float64)
    tie = largest + spacing(largest, dtype) / 2
    below = torch.nextafter(tie, torch.zeros((), dtype=torch.float64))
    found = rounded(torch.stack([largest, below, tie, -below, -tie]), dtype)
    assert found.tolist() == [float(largest), float(largest), math.inf, -float(largest), -math.inf]
