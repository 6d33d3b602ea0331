"""The arithmetic a reference is evaluated in: how wide, and which bf16 roundings it makes."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from conformance.numerics.ulp import rounded, spacing

#: Memory that one widened chunk of a weight matrix may take, in bytes.
_CHUNK_BYTES = 128 << 20


class Arithmetic:
    """A reference calls ``wide`` on what it reads, ``round`` where the contract demands a bf16 rounding, ``optional`` where a
    legal kernel may make one, ``unrounded`` where one is tempting and wrong unless it is declared, and ``declarable`` where one
    is not even tempting; ``matmul`` widens large weights chunk by chunk.

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

    def optional(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        """A bf16 rounding that is legal and not demanded: not made here.

        ``sequences`` numbers the sequence of each row, where rows stand neither by token nor by sequence.
        """
        return tensor

    def unrounded(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        """What must stay fp32, unless the kernel declares otherwise."""
        return tensor

    def declarable(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        """The same, but no mistake that is looked for by name where a kernel declares nothing."""
        return tensor

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``x @ weight`` for a weight of any dtype, ``[K, N]``, or as many of them as ``x`` has matrices: ``[..., K, N]``.

        The weight is an input: no rounding precedes it.
        """
        return _matmul(x, weight) if weight.dim() == 2 else x @ self.wide(weight)

    def with_rows(self, tensor: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """An argument that a stage updates: ``tensor [R, D]`` with ``values [n, D]`` in ``rows [n]``."""
        return self.wide(tensor).index_put((rows,), values)


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


class _ProductsOfMatrices(torch.autograd.Function):
    """``x [..., M, K] @ matrices [..., K, N]``, by ``x`` alone differentiable.

    Several ``x`` of one ``matrices`` are multiplied as one that has more rows: ``vmap`` would repeat the matrices for each.
    """

    @staticmethod
    def forward(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        return x @ matrices

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.matrices = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        apply: Callable[..., torch.Tensor] = _ProductsOfMatrices.apply
        return apply(gradient, ctx.matrices.mT), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: torch.Tensor, matrices: torch.Tensor) -> tuple[torch.Tensor, int]:
        assert in_dims[0] is not None, "matrices are the same for all"
        assert in_dims[1] is None, "matrices are the same for all"
        several = x.movedim(in_dims[0], -2)  # [..., M, S, K]
        product = several.flatten(-3, -2) @ matrices
        return product.reshape(*several.shape[:-1], product.shape[-1]), several.dim() - 2


class _WrittenRows(Arithmetic):
    """An arithmetic that gives of an updated argument the written rows alone, in the order in which they are written."""

    def __init__(self, dtype: torch.dtype, *, rounds: bool) -> None:
        super().__init__(dtype, rounds=rounds)
        self._has_written = False

    def with_rows(self, tensor: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        self._has_written = True
        return values

    def written(self, result: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """The rows of a result that a stage writes, ``None`` for all, whether or not its reference calls ``with_rows``."""
        return result if rows is None or self._has_written else result[rows]

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if weight.dim() == 2:
            return super().matmul(x, weight)
        apply: Callable[..., torch.Tensor] = _ProductsOfMatrices.apply
        return apply(x, self.wide(weight))


class RoundingSites(_WrittenRows):
    """fp32 without rounding, remembering every place where a bf16 rounding may happen.

    Each site adds a zero that autograd can differentiate by: the derivative of a result by a site is how much one rounding
    there moves the result. ``sites`` holds (zero, value at the site, sequence of each row): ``None`` where the rows of a site are
    those of tokens, or one a sequence.
    """

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(torch.float32, rounds=False)
        self.names = names
        self.sites: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def _site(self, tensor: torch.Tensor, sequences: torch.Tensor | None) -> torch.Tensor:
        zero = torch.zeros_like(tensor, requires_grad=True)
        self.sites.append((zero, tensor.detach(), sequences))
        return tensor + zero

    def round(self, tensor: torch.Tensor, name: str = "result") -> torch.Tensor:
        return self._site(tensor, None)

    def optional(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        return self._site(tensor, sequences) if name in self.names else tensor

    unrounded = declarable = optional

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if weight.dim() > 2:
            return super().matmul(x, weight)
        apply: Callable[..., torch.Tensor] = _ProjectionWithoutCopies.apply
        return apply(x, weight)


#: What each place of one name adds to its value, in the order in which the reference comes by.
Disturbance = tuple[str, list[torch.Tensor]]


class ErrorSites(_WrittenRows):
    """float64, with all optional roundings and the contract's, with the contract's alone, or with none; what mistakes add there.

    Remembers values by the name of their place, in the order in which the reference comes by: those that are rounded or may be
    (``rounded_values``, as before that), and those that must stay fp32 (``unrounded_values``). ``names`` lists all names.
    Roundings that the kernel ``declared`` are optional ones.
    """

    def __init__(self, makes: Literal["none", "contract", "all"], declared: frozenset[str] = frozenset()) -> None:
        super().__init__(torch.float64, rounds=makes != "none")
        self._rounds_all = makes == "all"
        self._declared = declared
        self.rounded_values: dict[str, list[torch.Tensor]] = {}
        self.unrounded_values: dict[str, list[torch.Tensor]] = {}
        self.names: dict[str, None] = {}

    def round(self, tensor: torch.Tensor, name: str = "result") -> torch.Tensor:
        self._remember_rounded(tensor, name)
        return super().round(tensor)

    def optional(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        self._remember_rounded(tensor, name)
        return super().round(tensor) if self._rounds_all else tensor

    def _remember_rounded(self, tensor: torch.Tensor, name: str) -> None:
        self.names[name] = None
        self.rounded_values.setdefault(name, []).append(tensor)

    def unrounded(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        if name in self._declared:
            return self.optional(tensor, name)
        self.names[name] = None
        self.unrounded_values.setdefault(name, []).append(tensor)
        return tensor

    def declarable(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        return self.optional(tensor, name) if name in self._declared else tensor

    def truncation_errors(self, name: str) -> list[torch.Tensor]:
        """What cutting off the low bits of values costs on average: half a ULP, towards zero."""
        return [-_half_ulp(value) for value in self.rounded_values[name]]

    def rounding_errors(self, name: str) -> list[torch.Tensor]:
        """What rounding values that must stay fp32 to bf16 would add."""
        return [rounded(value, torch.bfloat16) - value for value in self.unrounded_values[name]]

    def ties(self, name: str) -> list[torch.Tensor]:
        """What rounding ties away from zero adds on average."""
        found = []
        for value in self.rounded_values[name]:
            half = _half_ulp(value)
            found.append(torch.where((value - rounded(value, torch.bfloat16)).abs() == half.abs(), half, 0.0))
        return found

    def expected_ties(self, name: str) -> list[torch.Tensor]:
        """The same of as many ties among the values of each exponent, wherever they fall in another kernel."""
        found = []
        for value, ties in zip(self.rounded_values[name], self.ties(name), strict=True):
            half = _half_ulp(value)
            _, exponents, counts = torch.unique(half.abs(), return_inverse=True, return_counts=True)
            ties_of = torch.zeros_like(counts).index_add_(0, exponents.flatten(), (ties != 0).long().flatten())
            found.append((ties_of.to(half.dtype) / counts)[exponents] * half)
        return found


def _half_ulp(value: torch.Tensor) -> torch.Tensor:
    """Half a ULP in bf16, with the value's sign."""
    return value.sign() * spacing(value, torch.bfloat16) / 2


class Disturbed(_WrittenRows):
    """float64 without rounding, with disturbances added at their places, each times its weight (``weights``, one number each)."""

    def __init__(self, disturbances: Sequence[Disturbance], weights: torch.Tensor) -> None:
        super().__init__(torch.float64, rounds=False)
        self._disturbances: dict[str, list[tuple[list[torch.Tensor], torch.Tensor]]] = {}
        for (name, errors), weight in zip(disturbances, weights.unbind(0), strict=True):
            self._disturbances.setdefault(name, []).append((errors, weight))
        self._passed: collections.Counter[str] = collections.Counter()

    def round(self, tensor: torch.Tensor, name: str = "result") -> torch.Tensor:
        place = self._passed[name]
        self._passed[name] += 1
        for errors, weight in self._disturbances.get(name, ()):
            tensor = tensor + weight * errors[place]
        return tensor

    def optional(self, tensor: torch.Tensor, name: str, sequences: torch.Tensor | None = None) -> torch.Tensor:
        return self.round(tensor, name)

    unrounded = declarable = optional
