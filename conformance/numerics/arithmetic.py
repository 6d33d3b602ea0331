"""The arithmetic a reference is evaluated in: how wide, and which bf16 roundings it makes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from conformance.numerics.ulp import rounded, spacing

#: Memory that one widened chunk of a weight matrix may take, in bytes.
_CHUNK_BYTES = 128 << 20


class Arithmetic:
    """A reference calls ``wide`` on what it reads, ``round`` where the contract demands a bf16 rounding, ``optional`` where a
    legal kernel may make one and ``unrounded`` where one is tempting and wrong; ``matmul`` widens large weights chunk by chunk.

    The names say what it is that is rounded.
    """

    def __init__(self, dtype: torch.dtype, *, rounds: bool) -> None:
        self.dtype = dtype
        self.rounds = rounds

    def wide(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the arithmetic's dtype."""
        return tensor.to(self.dtype)

    def round(self, tensor: torch.Tensor, name: str = "result") -> torch.Tensor:
        """A bf16 rounding that the contract demands (half-even)."""
        if not self.rounds:
            return tensor
        if self.dtype == torch.float64:
            return rounded(tensor, torch.bfloat16)  # a cast would go through fp32 and round twice
        return tensor.to(torch.bfloat16).to(self.dtype)

    def optional(self, tensor: torch.Tensor, name: str, sequence: int | None = None) -> torch.Tensor:
        """A bf16 rounding that is legal and not demanded: not made here. ``sequence`` is whose it is, if of one alone."""
        return tensor

    def unrounded(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """What must stay fp32."""
        return tensor

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``x @ weight`` for a weight of any dtype."""
        return _matmul(x, weight)


def _chunks(weight: torch.Tensor, dtype: torch.dtype) -> list[slice]:
    columns = max(1, _CHUNK_BYTES // (torch.empty((), dtype=dtype).element_size() * weight.shape[0]))
    return [slice(start, start + columns) for start in range(0, weight.shape[1], columns)]


def _matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    parts = [x @ weight[:, part].to(x.dtype) for part in _chunks(weight, x.dtype)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


#: The oracle: float64, no rounding.
EXACT = Arithmetic(torch.float64, rounds=False)
#: float64 with the contract's bf16 rounding points: what a perfect kernel returns.
CONTRACT = Arithmetic(torch.float64, rounds=True)
#: fp32 with the contract's rounding points: an ordinary implementation.
SINGLE = Arithmetic(torch.float32, rounds=True)


class _ProjectionWithoutCopies(torch.autograd.Function):
    # Autograd would keep each widened weight for the backward pass; a real-size layer's are 1.3 GB.

    # Gradients of several sums are taken at a time.
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _matmul(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        weight: torch.Tensor = ctx.weight
        parts = [gradient[:, part] @ weight[:, part].to(gradient.dtype).T for part in _chunks(weight, gradient.dtype)]
        return functools.reduce(torch.add, parts), None


class RoundingSites(Arithmetic):
    """fp32 without rounding, remembering every place where a bf16 rounding may happen.

    Each site adds a zero that autograd can differentiate by: the derivative of a result by a site is how much one rounding
    there moves the result. ``sites`` holds (zero, value at the site, sequence): the first axis of a site is the batch unless
    it belongs to one sequence alone.
    """

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(torch.float32, rounds=False)
        self.names = names
        self.sites: list[tuple[torch.Tensor, torch.Tensor, int | None]] = []

    def _site(self, tensor: torch.Tensor, sequence: int | None) -> torch.Tensor:
        zero = torch.zeros_like(tensor, requires_grad=True)
        self.sites.append((zero, tensor.detach(), sequence))
        return tensor + zero

    def round(self, tensor: torch.Tensor, name: str = "result") -> torch.Tensor:
        return self._site(tensor, None)

    def optional(self, tensor: torch.Tensor, name: str, sequence: int | None = None) -> torch.Tensor:
        return self._site(tensor, sequence) if name in self.names else tensor

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        apply: Callable[..., torch.Tensor] = _ProjectionWithoutCopies.apply
        return apply(x, weight)


class Sites(Arithmetic):
    """The contract's arithmetic, with all optional roundings or none, remembering what it comes by.

    By name, in the order in which the reference comes by: ``ties`` holds of each rounding, made or optional, what rounding its
    ties away from zero adds on average, and ``errors`` of what must stay fp32 what rounding it to bf16 would add.
    """

    def __init__(self, *, rounds_all: bool) -> None:
        super().__init__(torch.float64, rounds=True)
        self._rounds_all = rounds_all
        self.ties: dict[str, list[torch.Tensor]] = {}
        self._halves: dict[str, list[torch.Tensor]] = {}
        self.errors: dict[str, list[torch.Tensor]] = {}

    def round(self, tensor: torch.Tensor, name: str = "result") -> torch.Tensor:
        nearest, half = super().round(tensor), spacing(tensor, torch.bfloat16) / 2
        half = half.copysign(tensor)
        self.ties.setdefault(name, []).append(torch.where((tensor - nearest).abs() == half.abs(), half, 0.0))
        self._halves.setdefault(name, []).append(half)
        return nearest

    def optional(self, tensor: torch.Tensor, name: str, sequence: int | None = None) -> torch.Tensor:
        nearest = self.round(tensor, name)
        return nearest if self._rounds_all else tensor

    def even_ties(self, name: str) -> list[torch.Tensor]:
        """What ``ties`` holds, of as many ties among the values of each exponent, wherever they fall in another kernel."""
        found = []
        for ties, halves in zip(self.ties[name], self._halves[name], strict=True):
            _, exponents = torch.unique(halves.abs(), return_inverse=True)
            often = [float((ties[exponents == one] != 0).double().mean()) for one in range(int(exponents.max()) + 1)]
            found.append(torch.tensor(often, dtype=halves.dtype)[exponents] * halves)
        return found

    def unrounded(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        self.errors.setdefault(name, []).append(rounded(tensor, torch.bfloat16) - tensor)
        return tensor


class Truncating(Arithmetic):
    """float64 without rounding, but for the places of one name, where a bf16 rounding may happen: there the value is half a ULP
    smaller in magnitude, which is what cutting off its low bits costs on average."""

    def __init__(self, name: str) -> None:
        super().__init__(torch.float64, rounds=False)
        self.name = name

    def round(self, tensor: torch.Tensor, name: str = "result") -> torch.Tensor:
        return tensor - tensor.sign() * spacing(tensor, torch.bfloat16) / 2 if name == self.name else tensor

    def optional(self, tensor: torch.Tensor, name: str, sequence: int | None = None) -> torch.Tensor:
        return self.round(tensor, name)


class Disturbed(Arithmetic):
    """float64 without rounding, with errors added at the places of one name (``Sites.ties``, ``Sites.errors``)."""

    def __init__(self, name: str, errors: Iterable[torch.Tensor]) -> None:
        super().__init__(torch.float64, rounds=False)
        self.name = name
        self._errors = iter(errors)

    def round(self, tensor: torch.Tensor, name: str = "result") -> torch.Tensor:
        return tensor + next(self._errors) if name == self.name else tensor

    def optional(self, tensor: torch.Tensor, name: str, sequence: int | None = None) -> torch.Tensor:
        return self.round(tensor, name)

    def unrounded(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        return self.round(tensor, name)
