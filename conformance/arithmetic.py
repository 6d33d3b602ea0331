"""The arithmetic a reference is evaluated in: how wide, and which bf16 roundings it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from conformance.ulp import rounded, spacing

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

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return _matmul(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        weight: torch.Tensor = ctx.weight
        total = torch.zeros(gradient.shape[0], weight.shape[0], dtype=gradient.dtype)
        for part in _chunks(weight, gradient.dtype):
            total += gradient[:, part] @ weight[:, part].to(gradient.dtype).T
        return total, None


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


class Mistaken(Arithmetic):
    """float64 without rounding, but for what a wrong kernel does at the places of one name.

    Where a bf16 rounding may happen the value is half a ULP smaller in magnitude: what cutting off its low bits costs on average.
    What must stay fp32 is rounded to bf16, from its exact value; a kernel's own differs by the roundings before it, so that the
    signature of bf16 scores is more than such a kernel adds. ``names`` collects the names that a reference has, and which of them
    must stay fp32.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__(torch.float64, rounds=False)
        self.name = name
        self.names: dict[str, bool] = {}

    def round(self, tensor: torch.Tensor, name: str = "result") -> torch.Tensor:
        self.names[name] = False
        return tensor - tensor.sign() * spacing(tensor, torch.bfloat16) / 2 if name == self.name else tensor

    def optional(self, tensor: torch.Tensor, name: str, sequence: int | None = None) -> torch.Tensor:
        return self.round(tensor, name)

    def unrounded(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        self.names[name] = True
        return rounded(tensor, torch.bfloat16) if name == self.name else tensor
