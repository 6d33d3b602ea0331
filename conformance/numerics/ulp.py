"""Units in the last place of bf16, fp16 and fp32, computed exactly on float64 tensors by their bits.

A floored ``log2`` is wrong just below powers of two, so exponents are read from the representation (docs/rule.md, Spacing).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from conformance.errors import UsageError

Mode = Literal["half_even", "half_away", "truncate"]

_EXPONENT_MASK = 0x7FF
_MANTISSA_BITS = 52
_BIAS = 1023


@dataclasses.dataclass(frozen=True)
class Format:
    """A binary floating-point format: stored mantissa bits, smallest normal exponent, largest finite value."""

    mantissa_bits: int
    min_exponent: int
    largest: float


FORMATS: dict[torch.dtype, Format] = {
    torch.bfloat16: Format(7, -126, float(torch.finfo(torch.bfloat16).max)),
    torch.float16: Format(10, -14, float(torch.finfo(torch.float16).max)),
    torch.float32: Format(23, -126, float(torch.finfo(torch.float32).max)),
}


def format_of(dtype: torch.dtype) -> Format:
    """The format of a dtype; raises ``UsageError`` for one that has no ULP here."""
    if dtype not in FORMATS:
        raise UsageError(f"no ULP is defined for {dtype}; known are {', '.join(str(known) for known in FORMATS)}")
    return FORMATS[dtype]


def spacing(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of ``dtype`` at each float64 value: ``2**(max(e, e_min) - p)`` with ``2**e <= |value| < 2**(e+1)``.

    Zero and subnormal values have the spacing of the smallest normal ones; infinities and NaN give the largest exponent's.
    """
    kind = format_of(dtype)
    biased = (value.view(torch.int64) >> _MANTISSA_BITS).bitwise_and_(_EXPONENT_MASK)
    biased.clamp_(min=kind.min_exponent + _BIAS).sub_(kind.mantissa_bits)
    return biased.bitwise_left_shift_(_MANTISSA_BITS).view(torch.float64)


def rounded(value: torch.Tensor, dtype: torch.dtype, mode: Mode = "half_even") -> torch.Tensor:
    """Each float64 value rounded once to ``dtype`` and kept as float64; overflow gives infinity, as a cast does.

    Rounding float64 to bf16 through fp32 rounds twice, which goes wrong next to ties; this does not.
    """
    return rounded_at(value, spacing(value, dtype), dtype, mode)


def rounded_at(value: torch.Tensor, ulp: torch.Tensor, dtype: torch.dtype, mode: Mode) -> torch.Tensor:
    """``rounded`` for values whose spacing is known."""
    steps = value / ulp  # exact: a division by a power of two
    if mode == "half_even":
        steps = torch.round(steps)
    elif mode == "half_away":
        steps = torch.copysign(torch.floor(steps.abs() + 0.5), value)
    else:
        steps = torch.trunc(steps)
    result = steps * ulp
    beyond = result.abs() > format_of(dtype).largest
    return torch.where(beyond, torch.copysign(torch.full_like(result, float("inf")), value), result)


def distance(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``|found - expected|`` in ULPs of ``dtype`` at the larger of the two; NaN where either is not finite."""
    larger = torch.maximum(found.abs(), expected.abs())
    return (found - expected).abs() / spacing(larger, dtype)
