"""The arithmetic of the torch kernels that the harness is examined with, and what a legal kernel is free to choose in it.

Written from the contract in plain fp32, and apart from ``kernels/qwen3/reference.py``, so that a mistake of one is not shared by
the other. What a kernel gets wrong here is named by its ``fault``; the faults are listed in ``kernels.py``.
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
from kernels.qwen3.exam.torch.registry import at

Tensor = torch.Tensor
#: Of some keys: the unnormalised result, the denominator and the maximum.
Part = tuple[Tensor, Tensor, Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])

BF16 = torch.bfloat16
#: What an additive mask adds to a score that must not be seen.
HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a legal kernel is free to choose. The defaults are the contract's own rounding points and torch's sums."""

    #: How a sum over K is ordered; ``shuffled`` adds single products in a random order, ``pairwise`` by a tree of halves,
    #: ``compensated`` with Kahan's correction, ``double`` accumulates in fp64.
    order: str = "torch"
    #: How fp32 values are cast to bf16: ``half_even`` or ``half_away``.
    cast: str = "half_even"
    #: Whether products are computed for whole tiles of 16 rows, the last one padded.
    padded: bool = False
    #: ``rsqrt(x)``, ``1 / sqrt(x)`` or ``sqrt(1 / x)`` times the value, or the value over ``sqrt(x)``.
    root: str = "rsqrt"
    #: Whether each square is divided by n before they are summed.
    mean_of_terms: bool = False
    #: Whether gamma is applied before 1/rms.
    gamma_first: bool = False
    #: Whether a projection's sum starts from the residual instead of being added to it.
    residual_first: bool = False
    #: ``exp`` or ``exp2`` with the scale folded into one factor.
    exponential: str = "exp"
    #: Whether the scale is applied to q, in fp32, instead of the scores.
    scaled_queries: bool = False
    #: Keys per block of an online softmax; 0 for one softmax over all keys.
    block: int = 0
    #: Parts of the keys that are attended to independently and merged.
    splits: int = 1
    #: What a part is merged by: its unnormalised result and ``maximum``, or its result and the logarithm of its sum (``logsum``).
    merge: str = "maximum"
    #: Whether the running maximum is left as it is until a score exceeds it by ``LAZY``.
    lazy_maximum: bool = False
    #: In which order pages of keys are visited: ``forward``, ``backward`` or ``shuffled``.
    visit: str = "forward"
    #: Whether the last page is read to its end and masked: a large negative number is added to the scores past the sequence's
    #: end (``add``) or takes their place (``replace``).
    whole_page: str = "no"
    #: Prefill only: queries of one chunk that are attended for together, under a causal mask; 0 for the whole chunk.
    queries: int = 1
    #: bf16 probabilities: ``no``, ``after`` normalisation, ``before`` with the unrounded denominator, ``both`` rounded.
    probabilities: str = "no"
    #: ``sigmoid``, ``exp`` (``x / (1 + exp(-x))``) or ``tanh``.
    silu: str = "sigmoid"
    #: Optional bf16 roundings.
    normalised: bool = False
    before_rope: bool = False
    gate: bool = False
    up: bool = False
    branch: bool = False
    #: Optional inside a layer only: projections of the norm's output, and the residual after attention.
    projection: bool = False
    residual: bool = False
    #: Inside a layer only: the norms' 1/rms is applied after the projections.
    deferred_input_norm: bool = False
    deferred_post_norm: bool = False
    #: The same for the final norm, before the LM head.
    deferred_final_norm: bool = False
    #: How the largest logit is looked for: all at once, tile by tile from either end, or by pairs.
    scan: str = "whole"


ORDERS = (
    "torch",
    "sequential",
    "reversed",
    "split4",
    "tile16",
    "tile32",
    "tile64",
    "tile128",
    "shuffled",
    "pairwise",
    "compensated",
    "double",
)
#: Terms below which ``pairwise`` products do not split a sum further.
PAIRWISE = 16
#: By how much a score may exceed a lazy maximum: exp of it is far from overflow.
LAZY = 8.0
#: Rows of a tile that ``Choices.padded`` fills up.
ROW_TILE = 16

#: Rounds where the Hugging Face implementation does (its RoPE apart, which the contract keeps in fp32).
HUGGING_FACE_LIKE = Choices(
    probabilities="after", normalised=True, before_rope=True, gate=True, up=True, branch=True, projection=True, residual=True
)

_ATTENTION = (
    "order",
    "padded",
    "cast",
    "exponential",
    "scaled_queries",
    "block",
    "splits",
    "merge",
    "lazy_maximum",
    "visit",
    "whole_page",
    "probabilities",
)


def _of_layers(stage: str) -> tuple[str, ...]:
    """Every choice, but for those that belong to other stages."""
    ends_in_logits = stage.endswith("_fwd")
    without = {"scan"} if ends_in_logits else {"scan", "deferred_final_norm"}
    if not stage.startswith("prefill_"):
        without.add("queries")
    return tuple(field.name for field in dataclasses.fields(Choices) if field.name not in without)


#: Which choices mean anything to a stage.
RELEVANT: dict[str, tuple[str, ...]] = {
    "rms_norm": ("order", "cast", "root", "mean_of_terms", "gamma_first", "normalised"),
    "qkv_proj": ("order", "padded"),
    "qk_norm": ("order", "cast", "root", "mean_of_terms", "gamma_first", "normalised", "before_rope"),
    "rope": ("order", "cast", "before_rope"),
    "kv_write": ("cast",),
    "attention": _ATTENTION,
    "paged_attention": _ATTENTION,
    "o_proj": ("order", "padded", "residual_first", "cast", "branch"),
    "mlp": ("order", "padded", "cast", "silu", "gate", "up", "branch"),
    "lm_head": ("order", "padded", "cast", "root", "mean_of_terms", "gamma_first", "normalised", "deferred_final_norm"),
    "greedy_sample": ("scan",),
    **{
        stage: _of_layers(stage)
        for stage in (
            "decode_layer",
            "paged_decode_layer",
            "decode_fwd_layers",
            "decode_fwd",
            "paged_decode_fwd",
            "prefill_layer",
            "prefill_fwd",
        )
    },
}

_VALUES: dict[str, tuple[Any, ...]] = {
    "order": ORDERS,
    "cast": ("half_even", "half_away"),
    "root": ("rsqrt", "inverse", "root_of_inverse", "division"),
    "exponential": ("exp", "exp2"),
    "block": (0, 8, 16, 32, 64, 128),
    "splits": (1, 2, 4),
    "merge": ("maximum", "logsum"),
    "visit": ("forward", "backward", "shuffled"),
    "whole_page": ("no", "add", "replace"),
    "queries": (1, 3, 16, 0),
    "probabilities": ("no", "after", "before", "both"),
    "silu": ("sigmoid", "exp", "tanh"),
    "scan": ("whole", "tiles", "backward", "pairs"),
}


def random_choices(stage: str, seed: int | str) -> Choices:
    """A random legal combination for a stage, the same for the same seed."""
    draw = random.Random(f"{stage}/{seed}")
    return Choices(**{name: draw.choice(_VALUES.get(name, (False, True))) for name in RELEVANT[stage]})


def single_choices(stage: str) -> list[Choices]:
    """The default, then each choice that matters to a stage changed by itself."""
    found = [Choices()]
    for name in RELEVANT[stage]:
        default = getattr(Choices(), name)
        found += [Choices(**{name: value}) for value in _VALUES.get(name, (False, True)) if value != default]
    return found


@dataclasses.dataclass
class Maker:
    """One kernel's arithmetic: its choices, its fault, and how often it was called."""

    choices: Choices
    fault: str
    calls: int = 0

    def has(self, fault: str) -> bool:
        return self.fault == fault

    def at(self, hook: str, right: Function) -> Function:
        """What stands at a hook: the fault's own function, or the right one."""
        return at(hook, self.fault, right)

    # -- arithmetic ---------------------------------------------------------------------------------------------------------

    def cast(self, x: Tensor) -> Tensor:
        """fp32 values on the bf16 grid."""
        return self.at("cast", self._cast)(x)

    def _cast(self, x: Tensor) -> Tensor:
        if self.choices.cast == "half_away":
            # Adding half a ULP to the magnitude's bits carries into the next value up; the low half is then dropped.
            raised = x.contiguous().view(torch.int32) + 0x8000
            return torch.where(torch.isfinite(x), (raised & -0x10000).view(torch.float32), x)
        return x.to(BF16).float()

    def maybe(self, rounds: bool, x: Tensor) -> Tensor:
        return self.cast(x) if rounds else x

    def products(self, terms: Tensor) -> Tensor:
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
            parts = [terms[..., index] for index in self._sequence(count)]
        return self._in_turn(parts)

    def _in_turn(self, parts: Iterable[Tensor]) -> Tensor:
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

    def _sequence(self, count: int) -> list[int]:
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
            return self._in_turn([start, *self._partial_sums(x, weight)])[:rows]
        return self.at("sum", self._product)(x, weight)[:rows]

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.has("bf16_accumulation"):
            total = torch.zeros(x.shape[0], weight.shape[1], dtype=BF16)
            for low in range(0, x.shape[1], 32):
                total = (total.float() + x[:, low : low + 32] @ weight[low : low + 32]).to(BF16)
            return total.float()
        if self.has("last_k_tile_missing"):
            x, weight = x[:, : x.shape[1] - 32], weight[: x.shape[1] - 32]
        return self._in_turn(self._partial_sums(x, weight))

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
            yield from (x[:, k : k + 1] * weight[k] for k in self._sequence(depth))

    def with_residual(self, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """``x @ weight + residual``, the sum rounded before the residual, or started from it, if so chosen."""
        if self.choices.residual_first and not self.choices.branch:
            return self.matmul(x, weight, residual)
        return self.maybe(self.choices.branch, self.matmul(x, weight)) + residual

    def _halves(self, x: Tensor, weight: Tensor) -> Tensor:
        half = x.shape[1] // 2
        if half < PAIRWISE:
            return x @ weight
        return self._halves(x[:, :half], weight[:half]) + self._halves(x[:, half:], weight[half:])

    # -- stages: fp32 in, fp32 out, before the last cast ----------------------------------------------------------------------

    def mean_square(self, x: Tensor) -> Tensor:
        if self.choices.mean_of_terms:
            return self.products(x * x * (1 / x.shape[-1])).unsqueeze(-1)
        return self.products(x * x).unsqueeze(-1) / x.shape[-1]

    def inverse_root(self, mean: Tensor, eps: float) -> Tensor:
        if self.choices.root == "rsqrt":
            return torch.rsqrt(mean + eps)
        if self.choices.root == "root_of_inverse":
            return torch.sqrt(1.0 / (mean + eps))
        return 1.0 / torch.sqrt(mean + eps)

    def inverse_rms(self, x: Tensor, eps: float) -> Tensor:
        eps = self.at("eps", float)(1e-5 if self.has("eps_1e-5") else eps)
        mean = self.at("statistic", self.mean_square)(x)
        if self.has("row0_scale"):
            mean = mean[:1].expand_as(mean)
        return self.at("root", self.inverse_root)(mean, eps)

    def eps_of(self, norm: str, dims: Dims) -> float:
        """Of one of a layer's norms, or of the final one, by name."""
        return self.at("eps_of", _model_eps)(norm, dims)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x[M, n]`` normalised by row, times ``weight[n]``."""
        return self.at("norm", self._norm)(x, weight, eps)

    def _norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if self.choices.root == "division" and not self.fault:
            normalised = x / torch.sqrt(self.mean_square(x) + eps)
        else:
            inverse = self.inverse_rms(x, eps)
            if self.choices.gamma_first and not self.fault and not self.choices.normalised:
                return x * weight * inverse
            normalised = x * inverse
        normalised = self.maybe(self.choices.normalised, normalised)
        return normalised if self.has("missing_gamma") else self.at("gamma", torch.mul)(normalised, weight)

    def heads_normalised(self, x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        if self.has("normalised_by_row"):
            count = x.shape[1] // dims.D
            return self.norm(x, weight.repeat(count), dims.eps)
        per_head = self.norm(x.reshape(-1, dims.D), weight, dims.eps).view(x.shape)
        return self.maybe(self.choices.before_rope, per_head)

    def angle(self, position: int, row: int, dims: Dims) -> int:
        """The row of the RoPE tables for a position, of a token in this row of the batch."""
        position = self.at("angle", _position)(position, row, dims)
        if self.has("position_off_by_one"):
            return position + 1 if position + 1 < dims.S else position - 1
        return position

    def rotated(self, x: Tensor, angles: list[int], cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
        """Every head of ``x[N, heads*D]`` rotated by the tables' row ``angles[i]``."""
        count, half = x.shape[1] // dims.D, dims.D // 2
        heads = x.reshape(len(angles), count, dims.D)
        rows = [self.at("tables", _table_rows)(cos, sin, position) for position in angles]
        c, s = (torch.stack(table).unsqueeze(1) for table in zip(*rows, strict=True))
        if self.has("bf16_tables"):
            c, s = c.to(BF16).float(), s.to(BF16).float()
        if self.has("wrong_sign"):
            s = -s
        if self.has("interleaved_pairs"):
            even, odd = heads[..., ::2], heads[..., 1::2]
            c, s = c[..., :half], s[..., :half]
            return torch.stack([even * c - odd * s, odd * c + even * s], -1).view(x.shape)
        turned = torch.cat(self.at("turn", self._turn)(heads[..., :half], heads[..., half:], c, s), -1)
        kept = [head for head in range(count) if not self.at("rotated_head", _every_head)(head, count)]
        turned[:, kept] = heads[:, kept]
        return turned.view(x.shape)

    def _turn(self, low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
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
        if self.has("bf16_scores"):
            z = z.to(BF16).float()
        if bool(hidden.any()):
            adds = self.choices.whole_page == "add"
            replacement = 0.0 if self.has("masked_scores_are_zero") else torch.finfo(z.dtype).min
            masked = z + hidden * HIDDEN if adds else torch.where(hidden, replacement, z)
            z = self.at("mask", _masked)(z, hidden, masked)
        groups = z.shape[0]
        block = self.choices.block or z.shape[1]
        top = torch.full((groups, 1), 0.0 if self.has("maximum_starts_at_zero") else -math.inf)
        denominator, result = torch.zeros(groups, 1), torch.zeros(groups, values.shape[1])
        for start in range(0, z.shape[1], block):
            part = z[:, start : start + block]
            new_top = torch.maximum(top, part.amax(1, keepdim=True))
            if self.choices.lazy_maximum and not self.fault:
                new_top = torch.where(new_top > top + LAZY, new_top, top)
            if self.has("no_maximum"):
                new_top = torch.zeros_like(top)
            shrink = exponential(top - new_top)
            if self.has("no_rescale") and start:
                shrink = torch.ones_like(shrink)
            p = exponential(part - new_top)
            in_sum, p = p, self.at("probabilities", _as_it_is)(p)
            if self.choices.probabilities in ("before", "both"):
                p = self.cast(p)
            if self.choices.probabilities == "both":
                in_sum = p
            shrink_sum, shrink_result = self.at("carry", _both_shrink)(shrink, start)
            denominator = denominator * shrink_sum + self.products(in_sum).unsqueeze(1)
            result = result * shrink_result + self.matmul(p, values[start : start + block])
            top = new_top
        return result, denominator, top

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
        """Queries ``[M, D]`` of one KV head over ``keys[n, D]``, ``values[n, D]``, but for those that are ``hidden[M, n]``."""
        return self.at("attend", self._attend)(q, keys, values, hidden, dims)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, dims: Dims) -> Tensor:
        scale = 1.0 if self.has("scale_missing") else self.at("scale", _scale)(dims)
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
        result, denominator = self.at("merge", self._merged)(parts)
        return self.at("quotient", torch.div)(result, denominator)

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
        if self.has("relu"):
            return torch.relu(x)
        if self.choices.silu == "tanh":
            return x * (0.5 * torch.tanh(0.5 * x) + 0.5)
        if self.choices.silu == "exp":
            return x / (1 + torch.exp(-x))
        return x * torch.sigmoid(x)

    def _activation(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.silu(gate) * up

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the down projection is applied to, in bf16."""
        gate, up = self.maybe(self.choices.gate, gate), self.maybe(self.choices.up, up)
        if self.has("gate_and_up_exchanged"):
            gate, up = up, gate
        activation = self.at("activation", self._activation)(gate, up)
        if not self.has("activation_not_rounded"):
            activation = self.at("activated", self.cast)(activation)
        return activation

    def normalised_projections(self, x: Tensor, gamma: Tensor, weights: list[Tensor], eps: float, deferred: bool) -> list[Tensor]:
        """``bf16(rn(x, gamma))`` by each weight ``[in, out]``, or the same with the factor 1/rms applied afterwards."""
        if not deferred:
            normalised = self.norm(x, gamma, eps)
            if not self.has("normalised_not_rounded"):
                normalised = self.at("normalised_cast", self.cast)(normalised)
            return [self.matmul(normalised, weight) for weight in weights]
        weighted = self.cast(x * gamma)
        inverse = torch.ones(1) if self.has("deferred_norm_dropped") else self.inverse_rms(x, eps)
        return [self.matmul(weighted, weight) * inverse for weight in weights]


def _model_eps(norm: str, dims: Dims) -> float:
    return dims.eps


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


def _position(position: int, row: int, dims: Dims) -> int:
    return position


def _table_rows(cos: Tensor, sin: Tensor, position: int) -> tuple[Tensor, Tensor]:
    return cos[position], sin[position]


def _every_head(head: int, count: int) -> bool:
    return True


def _scale(dims: Dims) -> float:
    return 1 / math.sqrt(dims.D)


def _masked(z: Tensor, hidden: Tensor, masked: Tensor) -> Tensor:
    return masked


def _both_shrink(shrink: Tensor, start: int) -> tuple[Tensor, Tensor]:
    return shrink, shrink
