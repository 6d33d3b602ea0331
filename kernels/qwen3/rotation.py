"""The RoPE tables, the same on every machine: no machine's ``cos`` is involved."""

from __future__ import annotations

import functools

import numpy as np
import torch

_FRACTION_BITS = 96  # fixed-point precision of the rotation table: far beyond float64's


@functools.lru_cache(maxsize=8)
def rotation_table(positions: int, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of ``position * theta**(-2i / head_dim)``, float64, shape ``[positions, head_dim]``, halves equal.

    Computed in fixed-point integers: the base angle's sine and cosine by their series, powers by complex multiplication of two
    short tables, so that no machine's ``cos`` is involved. Callers must not change the tensors, which are shared.
    """
    one = 1 << _FRACTION_BITS
    half = head_dim // 2
    fine = 64
    coarse = -(-positions // fine)
    cosine = np.empty((positions, half))
    sine = np.empty((positions, half))
    for pair in range(half):
        step = _unit_rotation(_power(theta, 2 * pair, head_dim), one)
        low = _rotations(step, fine, one)
        high = _rotations(_multiply(low[-1], step, one), coarse, one)
        low_c, low_s = (np.array([value[part] / one for value in low]) for part in (0, 1))
        high_c, high_s = (np.array([value[part] / one for value in high])[:, None] for part in (0, 1))
        cosine[:, pair] = (high_c * low_c - high_s * low_s).reshape(-1)[:positions]
        sine[:, pair] = (high_s * low_c + high_c * low_s).reshape(-1)[:positions]
    return tuple(torch.from_numpy(np.concatenate([part, part], axis=1)) for part in (cosine, sine))  # type: ignore[return-value]


def _power(theta: float, numerator: int, denominator: int) -> int:
    # theta ** (-numerator / denominator) as fixed point, by the decimal module: correctly rounded and the same everywhere.
    import decimal

    with decimal.localcontext() as context:
        context.prec = 50
        value = (decimal.Decimal(theta).ln() * decimal.Decimal(-numerator) / decimal.Decimal(denominator)).exp()
        return int(value * (1 << _FRACTION_BITS))


def _unit_rotation(angle: int, one: int) -> tuple[int, int]:
    term, cosine, sine, order = one, 0, 0, 0
    while term:
        if order % 2 == 0:
            cosine += term if order % 4 == 0 else -term
        else:
            sine += term if order % 4 == 1 else -term
        order += 1
        term = term * angle // (one * order)
    return cosine, sine


def _multiply(left: tuple[int, int], right: tuple[int, int], one: int) -> tuple[int, int]:
    return (left[0] * right[0] - left[1] * right[1]) // one, (left[0] * right[1] + left[1] * right[0]) // one


def _rotations(step: tuple[int, int], count: int, one: int) -> list[tuple[int, int]]:
    values = [(one, 0)]
    for _ in range(count - 1):
        values.append(_multiply(values[-1], step, one))
    return values
