"""Tensors that are the same on every machine.

Every value follows from the raw integers of a counter-based generator (Philox, whose stream numpy guarantees) by integer
arithmetic and correctly rounded float64 operations: ``torch.randn``, ``exp`` and ``cos`` differ between CPUs and versions.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

#: Standard deviation of ``Source.grid``: a sum of four uniform numbers in [-1, 1), 4 / 3 in variance.
GRID_STD = 2.0 / math.sqrt(3.0)

_CHUNK = 1 << 22  # values made at a time: bounds the memory beside the tensor itself


class Source:
    """Draws tensors by name. The same ``key`` and name give the same values whatever else was drawn before."""

    def __init__(self, key: str) -> None:
        self.key = key

    def _generator(self, name: str) -> np.random.Philox:
        digest = hashlib.blake2b(f"{self.key}/{name}".encode(), digest_size=16).digest()
        return np.random.Philox(key=int.from_bytes(digest, "little"))

    def normal(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Bell-shaped float64 values with mean 0 and standard deviation 1, at most 3.5: sums of four 16-bit integers."""
        count = math.prod(shape)
        raw = self._generator(name).random_raw(count).view(np.uint16).reshape(count, 4)
        centred = raw.sum(axis=1, dtype=np.int64) * 2 - 4 * 0xFFFF
        return torch.from_numpy(centred / (65536.0 * GRID_STD)).reshape(tuple(shape))

    def grid(self, name: str, shape: Sequence[int], scale: float) -> torch.Tensor:
        """bf16 values with standard deviation ``scale * GRID_STD``: sums of four bytes, scaled by a power of two.

        Sums of their products are exact in float64, in any order, so that data computed from them (a residual that cancels a
        projection) is the same everywhere too. ``scale`` is rounded to the nearest power of two.
        """
        factor = 2.0 ** (round(math.log2(scale)) - 7)
        count = math.prod(shape)
        generator = self._generator(name)
        result = torch.empty(count, dtype=torch.bfloat16)
        for start in range(0, count, _CHUNK):
            size = min(_CHUNK, count - start)
            words = generator.random_raw(-(-size // 2)).view(np.uint32)[:size]
            # The four bytes of each word, added two and two.
            pairs = (words & np.uint32(0x00FF00FF)) + ((words >> np.uint32(8)) & np.uint32(0x00FF00FF))
            sums = ((pairs + (pairs >> np.uint32(16))) & np.uint32(0xFFFF)).astype(np.int32) - 510
            result[start : start + size] = torch.from_numpy(sums).float().mul_(factor)
        return result.view(tuple(shape))

    def uniform(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """float64 values in [0, 1), multiples of ``2**-32``."""
        count = math.prod(shape)
        raw = self._generator(name).random_raw(count) >> np.uint64(32)
        return torch.from_numpy(raw.astype(np.float64) * 2.0**-32).reshape(tuple(shape))

    def integers(self, name: str, low: int, high: int, count: int) -> list[int]:
        """``count`` whole numbers in ``low..high``, both included."""
        span = high - low + 1
        raw = self._generator(name).random_raw(count)
        return [low + int(value) % span for value in np.atleast_1d(raw)]

    def permutation(self, name: str, count: int) -> list[int]:
        """The numbers ``0..count-1`` in random order: the order of ``count`` raw 64-bit draws."""
        raw = self._generator(name).random_raw(count)
        return [int(index) for index in np.argsort(raw, kind="stable")]


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
