"""The operations of the torch kernels that the harness is examined with.

Written from the contract in plain fp32, and apart from ``kernels/qwen3/reference.py``, so that a mistake of one is not shared by
the other. What a kernel may choose is in ``choices.py``; what it gets wrong stands at a *hook* (``hooks.py``).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from conformance.contract.dims import Dims
from conformance.exam.known_kernels import Fault
from conformance.kernels.qwen3.exam.torch.choices import Choices

Tensor = torch.Tensor
#: Of some keys: the unnormalised result, the denominator and the maximum.
Part = tuple[Tensor, Tensor, Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])

BF16 = torch.bfloat16
#: What an additive mask adds to a score that must not be seen.
HIDDEN = -1e30
#: Terms below which ``pairwise`` products do not split a sum further.
PAIRWISE = 16
#: By how much a score may exceed a lazy maximum: exp of it is far from overflow.
LAZY = 8.0
#: Rows of a tile that ``Choices.padded`` fills up.
ROW_TILE = 16


@dataclasses.dataclass
class Operations:
    """The operations of one kernel of a stage: what it chose, and its fault, if any."""

    choices: Choices
    fault: Fault | None = None

    def at(self, hook: str, right: Function) -> Function:
        """What stands at a hook: the fault's function, or the right one."""
        if self.fault is not None and self.fault.hook == hook:
            return self.fault.function  # type: ignore[return-value]
        return right

    # -- sums, products and casts -----------------------------------------------------------------------------------------------

    def cast(self, x: Tensor) -> Tensor:
        """fp32 values on the bf16 grid."""
        return self.at("cast", self._cast)(x)

    def _cast(self, x: Tensor) -> Tensor:
        if self.choices.cast == "half_away":
            # Adding half a ULP to the magnitude's bits carries into the next value up; the low half is then dropped.
            raised = x.contiguous().view(torch.int32) + 0x8000
            return torch.where(torch.isfinite(x), (raised & -0x10000).view(torch.float32), x)
        return x.to(BF16).float()

    def maybe(self, rounds: bool | str, x: Tensor) -> Tensor:
        """A rounding to bf16, or to the format named, that a kernel is free to make."""
        if isinstance(rounds, str):
            return in_format(x, rounds)
        return self.cast(x) if rounds else x

    def cast_inside(self, x: Tensor) -> Tensor:
        """What the contract rounds inside a stage, in the chosen format."""
        return self.cast(x) if self.choices.inside == "bf16" else in_format(x, self.choices.inside)

    def sum_of_terms(self, terms: Tensor) -> Tensor:
        """Sum of fp32 ``terms[..., K]`` over the last axis, in the chosen order."""
        count = terms.shape[-1]
        order = self.choices.order
        if order == "torch":
            return terms.sum(-1)
        if order == "double":
            return terms.double().sum(-1).float()
        if order == "split4":
            parts = [terms[..., start::4].sum(-1) for start in range(4)]
            return (parts[3] + parts[1]) + (parts[0] + parts[2])
        if order == "pairwise":
            while terms.shape[-1] > 1:
                half = terms.shape[-1] // 2
                terms = torch.cat([terms[..., :half] + terms[..., half : 2 * half], terms[..., 2 * half :]], -1)
            return terms[..., 0]
        if order.startswith("tile"):
            width = int(order[4:])
            parts = [terms[..., start : start + width].sum(-1) for start in range(0, count, width)]
        else:
            parts = [terms[..., index] for index in self._term_order(count)]
        return self._sequential_sum(parts)

    def _sequential_sum(self, parts: Iterable[Tensor]) -> Tensor:
        """The sum of ``parts``, one after another; ``compensated`` adds the rounding errors in too."""
        parts = iter(parts)
        total = next(parts).clone()
        lost = torch.zeros_like(total)
        for part in parts:
            if self.choices.order == "compensated":
                part = part - lost
                raised = total + part
                total, lost = raised, (raised - total) - part
            else:
                total += part
        return total

    def _term_order(self, count: int) -> list[int]:
        indices = list(range(count))
        if self.choices.order == "reversed":
            indices.reverse()
        if self.choices.order == "shuffled":
            random.Random(count).shuffle(indices)
        return indices

    def matmul(self, x: Tensor, weight: Tensor, start: Tensor | None = None) -> Tensor:
        """``x[M, K] @ weight[K, N]`` of bf16 values, accumulated in fp32 in the chosen order, onto ``start[M, N]`` if given."""
        x, weight = self.at("operands", _as_they_are)(x.float(), weight.float())
        rows = x.shape[0]
        if self.choices.padded:
            x, start = _padded(x), None if start is None else _padded(start)
        if start is not None:
            return self._sequential_sum([start, *self._partial_sums(x, weight)])[:rows]
        return self.at("sum", self._product)(x, weight)[:rows]

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._sequential_sum(self._partial_sums(x, weight))

    def _partial_sums(self, x: Tensor, weight: Tensor) -> Iterator[Tensor]:
        """Partial sums of a product that are added one after another: single terms, tiles, or all of it."""
        depth, order = x.shape[1], self.choices.order
        if order == "torch":
            yield x @ weight
        elif order == "double":
            yield (x.double() @ weight.double()).float()
        elif order == "split4":
            bounds = [depth * part // 4 for part in range(5)]
            parts = [x[:, start:stop] @ weight[start:stop] for start, stop in itertools.pairwise(bounds)]
            yield (parts[2] + parts[0]) + (parts[3] + parts[1])
        elif order == "pairwise":
            yield self._halves(x, weight)
        elif order.startswith("tile"):
            tile = int(order[4:])
            yield from (x[:, start : start + tile] @ weight[start : start + tile] for start in range(0, depth, tile))
        else:
            yield from (x[:, k : k + 1] * weight[k] for k in self._term_order(depth))

    def with_residual(self, x: Tensor, weight: Tensor, residual: Tensor, hook: str) -> Tensor:
        """``x @ weight + residual``, the sum rounded before the residual, or started from it, if so chosen.

        ``hook`` is that of the sum of the product and the residual.
        """
        if self.choices.residual_first and not self.choices.branch:
            return self.matmul(x, weight, residual)
        return self.at(hook, torch.add)(self.maybe(self.choices.branch, self.matmul(x, weight)), residual)

    def _halves(self, x: Tensor, weight: Tensor) -> Tensor:
        half = x.shape[1] // 2
        if half < PAIRWISE:
            return x @ weight
        return self._halves(x[:, :half], weight[:half]) + self._halves(x[:, half:], weight[half:])

    # -- stages: fp32 in, fp32 out, before the last cast ----------------------------------------------------------------------

    def mean_square(self, x: Tensor) -> Tensor:
        """The mean of the squares of each row, ``[..., 1]``."""
        if self.choices.mean_of_terms:
            return self.sum_of_terms(x * x * (1 / x.shape[-1])).unsqueeze(-1)
        return self.sum_of_terms(x * x).unsqueeze(-1) / x.shape[-1]

    def inverse_root(self, mean: Tensor, eps: float) -> Tensor:
        """``1 / sqrt(mean + eps)``."""
        if self.choices.root == "rsqrt":
            return torch.rsqrt(mean + eps)
        if self.choices.root == "root_of_inverse":
            return torch.sqrt(1.0 / (mean + eps))
        return 1.0 / torch.sqrt(mean + eps)

    def inverse_rms(self, x: Tensor, eps: float) -> Tensor:
        """The factor ``[..., 1]`` that normalises each row of ``x``."""
        eps = self.at("eps", float)(eps)
        mean = self.at("statistic", self.mean_square)(x)
        return self.at("root", self.inverse_root)(mean, eps)

    def eps_of(self, norm: str, dims: Dims) -> float:
        """Of one of a layer's norms, or of the final one, by name."""
        return self.at("eps_of", _model_eps)(norm, dims)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x[M, n]`` normalised by row, times ``weight[n]``."""
        return self.at("norm", self._norm)(x, weight, eps)

    def _norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if self.choices.root == "division":
            normalised = x / torch.sqrt(self.mean_square(x) + eps)
        else:
            inverse = self.inverse_rms(x, eps)
            if self.choices.gamma_first and not self.choices.normalised:
                return x * weight * inverse
            normalised = x * inverse
        normalised = self.maybe(self.choices.normalised, normalised)
        return self.at("gamma", torch.mul)(normalised, weight)

    def heads_normalised(self, x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        """Every head of ``x[N, heads*D]`` normalised by itself, times ``weight[D]``."""
        return self.maybe(self.choices.before_rope, self.at("head_norm", self._head_norm)(x, weight, dims))

    def _head_norm(self, x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        return self.norm(x.reshape(-1, dims.D), weight, dims.eps).view(x.shape)

    def rope_row(self, position: int, row: int, first: int, dims: Dims) -> int:
        """The row of the RoPE tables for a position, of a token in this row of the batch whose chunk starts at ``first``."""
        return self.at("rope_row", _position)(position, row, first, dims)

    def rotated(self, x: Tensor, rope_rows: list[int], cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
        """Every head of ``x[N, heads*D]`` rotated by the tables' row ``rope_rows[i]``."""
        count, half = x.shape[1] // dims.D, dims.D // 2
        heads = x.reshape(len(rope_rows), count, dims.D)
        rows = [self.at("rope_tables", _table_rows)(cos, sin, row) for row in rope_rows]
        c, s = (torch.stack(table).unsqueeze(1) for table in zip(*rows, strict=True))
        turned = torch.cat(self.at("rotation", self._rotation)(heads[..., :half], heads[..., half:], c, s), -1)
        kept = [head for head in range(count) if not self.at("rotated_head", _every_head)(head, count)]
        turned[:, kept] = heads[:, kept]
        return turned.view(x.shape)

    def _rotation(self, low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves ``[N, heads, D/2]`` of all heads rotated; ``c`` and ``s[N, 1, D]`` are rows of the tables."""
        if self.choices.order == "double":
            low, high, c, s = low.double(), high.double(), c.double(), s.double()
        half = low.shape[-1]
        return (low * c[..., :half] - high * s[..., :half]).float(), (high * c[..., half:] + low * s[..., half:]).float()

    def softmax_values(self, scores: Tensor, values: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Unnormalised result ``[M, D]``, denominator ``[M, 1]`` and maximum ``[M, 1]`` of unscaled ``scores[M, n]``.

        Scores where ``hidden[M, n]`` is true are masked.
        """
        if self.choices.exponential == "exp2":
            factor, exponential = scale * math.log2(math.e), torch.exp2
        else:
            factor, exponential = scale, self.at("exponential", torch.exp)
        if self.choices.scaled_queries:
            factor /= scale  # the queries bring it
        z = self.at("scores", _as_it_is)(scores * factor)
        if bool(hidden.any()):
            adds = self.choices.whole_page == "add"
            masked = z + hidden * HIDDEN if adds else torch.where(hidden, torch.finfo(z.dtype).min, z)
            z = self.at("mask", _masked)(z, hidden, masked)
        groups = z.shape[0]
        block = self.choices.block or z.shape[1]
        top = torch.full((groups, 1), -math.inf)
        denominator, result = torch.zeros(groups, 1), torch.zeros(groups, values.shape[1])
        for start in range(0, z.shape[1], block):
            part = z[:, start : start + block]
            new_top = self.at("running_maximum", self._running_maximum)(top, part)
            shrink = exponential(top - new_top)
            p = exponential(part - new_top)
            in_sum, p = p, self.at("probabilities", _as_it_is)(p)
            if self.choices.probabilities in ("before", "both"):
                p = self.cast(p)
            elif self.choices.probabilities == "fp16":
                p = in_format(p, "fp16")
            if self.choices.probabilities == "both":
                in_sum = p
            shrink_sum, shrink_result = self.at("rescale", _both_shrink)(shrink, start)
            denominator = denominator * shrink_sum + self.sum_of_terms(in_sum).unsqueeze(1)
            result = result * shrink_result + self.matmul(p, values[start : start + block])
            top = new_top
        return result, denominator, top

    def _running_maximum(self, top: Tensor, part: Tensor) -> Tensor:
        """The maximum ``[M, 1]`` after a block of scores ``part[M, n]``, from the one before it."""
        new_top = torch.maximum(top, part.amax(1, keepdim=True))
        return torch.where(new_top > top + LAZY, new_top, top) if self.choices.lazy_maximum else new_top

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
        """Queries ``[M, D]`` of one KV head over ``keys[n, D]``, ``values[n, D]``, but for those that are ``hidden[M, n]``."""
        return self.at("softmax_attention", self._attend)(q, keys, values, hidden, dims)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
        scale = self.at("scale", _scale)(dims)
        scores = self.matmul(q * scale if self.choices.scaled_queries else q, keys.T)
        length = keys.shape[0]
        if self.choices.probabilities == "after":
            p, denominator, _ = self.softmax_values(scores, torch.eye(length), hidden, scale)
            return self.matmul(self.cast(p / denominator), values)
        bounds = [length * part // self.choices.splits for part in range(self.choices.splits + 1)]
        parts = [
            self.softmax_values(scores[:, low:high], values[low:high], hidden[:, low:high], scale)
            for low, high in itertools.pairwise(bounds)
            if high > low
        ]
        result, denominator = self.at("merge_of_splits", self._merged)(parts)
        return self.at("denominator", torch.div)(result, denominator)

    def _merged(self, parts: list[Part]) -> tuple[Tensor, Tensor]:
        """Result and denominator of parts that were attended to independently, brought to their common maximum."""
        exponential, logarithm = (torch.exp2, torch.log2) if self.choices.exponential == "exp2" else (torch.exp, torch.log)
        if self.choices.merge == "logsum":
            parts = [(part[0] / part[1], torch.ones(1), part[2] + logarithm(part[1])) for part in parts]
        top = torch.stack([part[2] for part in parts]).amax(0)
        result = sum((part[0] * exponential(part[2] - top) for part in parts), torch.zeros(1))
        denominator = sum((part[1] * exponential(part[2] - top) for part in parts), torch.zeros(1))
        return result, denominator

    def silu(self, x: Tensor) -> Tensor:
        """``x * sigmoid(x)``, by the chosen formula."""
        if self.choices.silu == "tanh":
            return x * (0.5 * torch.tanh(0.5 * x) + 0.5)
        if self.choices.silu == "exp":
            return x / (1 + torch.exp(-x))
        return x * torch.sigmoid(x)

    def _activation(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._kept(self.choices.silu_rounded, self.silu(gate)) * up

    def _kept(self, rounds: bool, x: Tensor) -> Tensor:
        """A value inside the MLP: rounded to bf16, or as all that is finer is kept."""
        return self.cast(x) if rounds else in_format(x, self.choices.inside)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the down projection is applied to, in bf16."""
        gate, up = self._kept(self.choices.gate, gate), self._kept(self.choices.up, up)
        return self.at("activation_cast", self.cast_inside)(self.at("activation", self._activation)(gate, up))

    def normalised_projections(self, x: Tensor, gamma: Tensor, weights: list[Tensor], eps: float, deferred: bool) -> list[Tensor]:
        """``bf16(rn(x, gamma))`` by each weight ``[in, out]``, or the same with the factor 1/rms applied afterwards."""
        if not deferred:
            normalised = self.at("normalised_cast", self.cast_inside)(self.norm(x, gamma, eps))
            return [self.matmul(normalised, weight) for weight in weights]
        weighted = self.cast_inside(x * gamma)
        inverse = self.at("deferred_scale", self.inverse_rms)(x, eps)
        return [self.matmul(weighted, weight) * inverse for weight in weights]


def _model_eps(norm: str, dims: Dims) -> float:
    return dims.eps


def in_format(x: Tensor, name: str) -> Tensor:
    """fp32 values rounded to a format that is finer than bf16, ``fp16`` or ``tf32`` (ten bits of mantissa); else as they are."""
    if name == "fp16":
        return x.to(torch.float16).float()
    if name == "tf32":
        return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return x


def truncated(x: Tensor) -> Tensor:
    """fp32 values with the bits that bf16 does not keep cut off."""
    return (x.contiguous().view(torch.int32) & -0x10000).view(torch.float32)


def raised(x: Tensor) -> Tensor:
    """fp32 values with the bits that bf16 does not keep rounded away from zero."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _padded(x: Tensor) -> Tensor:
    """``x`` with rows of zeros after its own, up to a whole tile."""
    return torch.cat([x, torch.zeros(-x.shape[0] % ROW_TILE, x.shape[1])])


# What stands at a hook by default


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _as_they_are(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x, weight


def _position(position: int, row: int, first: int, dims: Dims) -> int:
    return position


def _table_rows(cos: Tensor, sin: Tensor, row: int) -> tuple[Tensor, Tensor]:
    return cos[row], sin[row]


def _every_head(head: int, count: int) -> bool:
    return True


def _scale(dims: Dims) -> float:
    return 1 / math.sqrt(dims.D)


def _masked(z: Tensor, hidden: Tensor, masked: Tensor) -> Tensor:
    return masked


def _both_shrink(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    return shrink, shrink
