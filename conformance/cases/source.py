"""Tensors that are the same on every machine.

Every value follows from the raw integers of a counter-based generator (Philox, whose stream numpy guarantees) by integer
arithmetic and correctly rounded float64 operations: ``torch.randn``, ``exp`` and ``cos`` differ between CPUs and versions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

#: Standard deviation of ``Source.grid``: a sum of four uniform numbers in [-1, 1), 4 / 3 in variance.
GRID_STD = 2.0 / math.sqrt(3.0)

_CHUNK = 1 << 22  # values made at a time: bounds the memory beside the tensor itself


class SharedDraws:
    """What one case drew and the next draws as well, such as the weights of a large model: the very same tensors.

    It keeps the tensors of the last case alive. One that somebody has changed since is drawn anew.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], tuple[torch.Tensor, int]] = {}

    def draw(self, key: tuple[object, ...], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor of a key, which says all that it depends on."""
        tensor, changes = self._kept.get(key, (None, -1))
        if tensor is None or tensor._version != changes:
            tensor = make()
            self._kept[key] = tensor, tensor._version
        return tensor

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Forget what is none of these."""
        found = {id(tensor) for tensor in tensors}
        self._kept = {key: (tensor, changes) for key, (tensor, changes) in self._kept.items() if id(tensor) in found}


class Source:
    """Draws tensors by name. The same ``key`` and name give the same values whatever else was drawn before.

    ``seed`` is that of a case, for what only some of the cases have. ``shared``: where several cases share their large tensors.
    """

    def __init__(self, key: str, seed: int = 0, shared: SharedDraws | None = None) -> None:
        self.key, self.seed = key, seed
        self._shared = shared

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
        if self._shared is not None:
            return self._shared.draw((self.key, name, tuple(shape), scale), lambda: self._grid(name, shape, scale))
        return self._grid(name, shape, scale)

    def _grid(self, name: str, shape: Sequence[int], scale: float) -> torch.Tensor:
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
