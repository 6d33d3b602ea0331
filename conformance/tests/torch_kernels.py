"""Torch kernels of the ten stages, right and wrong: what the harness is examined with.

Written from the contract with views, loops and plain fp32, and apart from ``kernels/qwen3/reference.py``, so that a mistake of
one is not shared by the other. ``Choices`` are what a legal kernel is free to do; ``FAULTS`` are what it is not. A kernel is
made by ``torch_kernel(stage, choices, fault)`` and takes the contract's arguments and ``dims``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import torch

from conformance.contract import Dims
from conformance.declaration import Kernel, kernel

Tensor = torch.Tensor

BF16 = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a legal kernel is free to choose. The defaults are the contract's own rounding points and torch's sums."""

    #: How a sum over K is ordered; ``shuffled`` adds single products in a random order, ``double`` accumulates in fp64.
    order: str = "torch"
    #: How fp32 values are cast to bf16: ``half_even`` or ``half_away``.
    cast: str = "half_even"
    #: ``rsqrt(x)``, ``1 / sqrt(x)`` times the value, or the value over ``sqrt(x)``.
    root: str = "rsqrt"
    #: ``exp`` or ``exp2`` with the scale folded into one factor.
    exponential: str = "exp"
    #: Keys per block of an online softmax; 0 for one softmax over all keys.
    block: int = 0
    #: Parts of the keys that are attended to independently and merged.
    splits: int = 1
    #: bf16 probabilities: ``no``, ``after`` normalisation, ``before`` with the unrounded denominator, ``both`` rounded.
    probabilities: str = "no"
    #: ``sigmoid``, ``exp`` (``x / (1 + exp(-x))``) or ``tanh``.
    silu: str = "sigmoid"
    #: Optional bf16 roundings.
    normalised: bool = False
    before_rope: bool = False
    gate_up: bool = False
    branch: bool = False
    #: Optional inside a layer only: projections of the norm's output, and the residual after attention.
    projection: bool = False
    residual: bool = False
    #: Inside a layer only: the norms' 1/rms is applied after the projections.
    deferred_input_norm: bool = False
    deferred_post_norm: bool = False


ORDERS = ("torch", "sequential", "reversed", "split4", "tile32", "tile64", "shuffled", "double")

#: Rounds where the Hugging Face implementation does (its RoPE apart, which the contract keeps in fp32).
HUGGING_FACE_LIKE = Choices(
    probabilities="after", normalised=True, before_rope=True, gate_up=True, branch=True, projection=True, residual=True
)

#: Which choices mean anything to a stage.
RELEVANT: dict[str, tuple[str, ...]] = {
    "rms_norm": ("order", "cast", "root", "normalised"),
    "qkv_proj": ("order",),
    "qk_norm": ("order", "cast", "root", "normalised", "before_rope"),
    "rope": ("order", "cast", "before_rope"),
    "kv_write": ("cast",),
    "attention": ("order", "cast", "exponential", "block", "splits", "probabilities"),
    "o_proj": ("order", "cast", "branch"),
    "mlp": ("order", "cast", "silu", "gate_up", "branch"),
    "decode_layer": tuple(field.name for field in dataclasses.fields(Choices)),
    "decode_fwd_layers": tuple(field.name for field in dataclasses.fields(Choices)),
}

_VALUES: dict[str, tuple[Any, ...]] = {
    "order": ORDERS,
    "cast": ("half_even", "half_away"),
    "root": ("rsqrt", "inverse", "division"),
    "exponential": ("exp", "exp2"),
    "block": (0, 16, 32, 64),
    "splits": (1, 2, 4),
    "probabilities": ("no", "after", "before", "both"),
    "silu": ("sigmoid", "exp", "tanh"),
}


def random_choices(stage: str, seed: int) -> Choices:
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
class _Maker:
    """One kernel's arithmetic: its choices, its fault, and how often it was called."""

    choices: Choices
    fault: str
    calls: int = 0

    def has(self, fault: str) -> bool:
        return self.fault == fault

    # -- arithmetic ---------------------------------------------------------------------------------------------------------

    def cast(self, x: Tensor) -> Tensor:
        """fp32 values on the bf16 grid."""
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
        if order in ("tile32", "tile64"):
            width = int(order[4:])
            parts = [terms[..., start : start + width].sum(-1) for start in range(0, count, width)]
        else:
            parts = [terms[..., index] for index in self._sequence(count)]
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def _sequence(self, count: int) -> list[int]:
        indices = list(range(count))
        if self.choices.order == "reversed":
            indices.reverse()
        if self.choices.order == "shuffled":
            random.Random(count).shuffle(indices)
        return indices

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x[M, K] @ weight[K, N]`` of bf16 values, accumulated in fp32 in the chosen order."""
        x, weight = x.float(), weight.float()
        depth = x.shape[1]
        if self.has("bf16_accumulation"):
            total = torch.zeros(x.shape[0], weight.shape[1], dtype=BF16)
            for low in range(0, depth, 32):
                total = (total.float() + x[:, low : low + 32] @ weight[low : low + 32]).to(BF16)
            return total.float()
        if self.has("last_k_tile_missing"):
            x, weight = x[:, : depth - 32], weight[: depth - 32]
            depth -= 32
        order = self.choices.order
        if order == "torch":
            return x @ weight
        if order == "double":
            return (x.double() @ weight.double()).float()
        if order == "split4":
            bounds = [depth * part // 4 for part in range(5)]
            parts = [x[:, start:stop] @ weight[start:stop] for start, stop in itertools.pairwise(bounds)]
            return (parts[2] + parts[0]) + (parts[3] + parts[1])
        if order in ("tile32", "tile64"):
            tile = int(order[4:])
            parts = [x[:, start : start + tile] @ weight[start : start + tile] for start in range(0, depth, tile)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return total
        total = torch.zeros(x.shape[0], weight.shape[1])
        for k in self._sequence(depth):
            total += x[:, k : k + 1] * weight[k]
        return total

    # -- stages: fp32 in, fp32 out, before the last cast ----------------------------------------------------------------------

    def inverse_rms(self, x: Tensor, eps: float) -> Tensor:
        eps = 1e-5 if self.has("eps_1e-5") else eps
        mean = self.products(x * x).unsqueeze(-1) / x.shape[-1]
        if self.has("row0_scale"):
            mean = mean[:1].expand_as(mean)
        if self.choices.root == "rsqrt":
            return torch.rsqrt(mean + eps)
        return 1.0 / torch.sqrt(mean + eps)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x[M, n]`` normalised by row, times ``weight[n]``."""
        if self.choices.root == "division" and not (self.has("eps_1e-5") or self.has("row0_scale")):
            normalised = x / torch.sqrt(self.products(x * x).unsqueeze(-1) / x.shape[-1] + eps)
        else:
            normalised = x * self.inverse_rms(x, eps)
        normalised = self.maybe(self.choices.normalised, normalised)
        return normalised if self.has("missing_gamma") else normalised * weight

    def heads_normalised(self, x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        if self.has("normalised_by_row"):
            count = x.shape[1] // dims.D
            return self.norm(x, weight.repeat(count), dims.eps)
        per_head = self.norm(x.reshape(-1, dims.D), weight, dims.eps).view(x.shape)
        return self.maybe(self.choices.before_rope, per_head)

    def rotated(self, x: Tensor, seq_lens: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
        half = dims.D // 2
        result = torch.empty_like(x)
        for b in range(x.shape[0]):
            position = int(seq_lens[0 if self.has("row0_length") else b]) - 1
            if self.has("position_off_by_one"):
                position = position + 1 if position + 1 < cos.shape[0] else position - 1
            c, s = cos[position], sin[position]
            if self.has("bf16_tables"):
                c, s = c.to(BF16).float(), s.to(BF16).float()
            if self.has("wrong_sign"):
                s = -s
            for head in range(x.shape[1] // dims.D):
                start = head * dims.D
                if self.has("interleaved_pairs"):
                    even, odd = x[b, start : start + dims.D : 2], x[b, start + 1 : start + dims.D : 2]
                    result[b, start : start + dims.D : 2] = even * c[:half] - odd * s[:half]
                    result[b, start + 1 : start + dims.D : 2] = odd * c[:half] + even * s[:half]
                    continue
                low, high = x[b, start : start + half], x[b, start + half : start + dims.D]
                if self.choices.order == "double":
                    low, high, c, s = low.double(), high.double(), c.double(), s.double()
                result[b, start : start + half] = (low * c[:half] - high * s[:half]).float()
                result[b, start + half : start + dims.D] = (high * c[half:] + low * s[half:]).float()
        return result

    def softmax_values(self, scores: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Unnormalised result ``[G, D]``, denominator ``[G, 1]`` and maximum ``[G, 1]`` of unscaled ``scores[G, n]``."""
        if self.choices.exponential == "exp2":
            factor, exponential = scale * math.log2(math.e), torch.exp2
        else:
            factor, exponential = scale, torch.exp
        z = scores * factor
        if self.has("bf16_scores"):
            z = z.to(BF16).float()
        groups = z.shape[0]
        block = self.choices.block or z.shape[1]
        top = torch.full((groups, 1), -math.inf)
        denominator, result = torch.zeros(groups, 1), torch.zeros(groups, values.shape[1])
        for start in range(0, z.shape[1], block):
            part = z[:, start : start + block]
            new_top = torch.maximum(top, part.amax(1, keepdim=True))
            if self.has("no_maximum"):
                new_top = torch.zeros_like(top)
            shrink = exponential(top - new_top)
            if self.has("no_rescale") and start:
                shrink = torch.ones_like(shrink)
            p = exponential(part - new_top)
            in_sum = p
            if self.choices.probabilities in ("before", "both"):
                p = self.cast(p)
            if self.choices.probabilities == "both":
                in_sum = p
            denominator = denominator * shrink + self.products(in_sum).unsqueeze(1)
            result = result * shrink + self.matmul(p, values[start : start + block])
            top = new_top
        return result, denominator, top

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, dims: Dims) -> Tensor:
        """One KV head's queries ``[G, D]`` over ``keys[n, D]``, ``values[n, D]``."""
        scale = 1.0 if self.has("scale_missing") else dims.D**-0.5
        scores = self.matmul(q, keys.T)
        length = keys.shape[0]
        if self.choices.probabilities == "after":
            p, denominator, _ = self.softmax_values(scores, torch.eye(length), scale)
            return self.matmul(self.cast(p / denominator), values)
        bounds = [length * part // self.choices.splits for part in range(self.choices.splits + 1)]
        parts = [
            self.softmax_values(scores[:, low:high], values[low:high], scale)
            for low, high in itertools.pairwise(bounds)
            if high > low
        ]
        exponential = torch.exp2 if self.choices.exponential == "exp2" else torch.exp
        top = torch.stack([part[2] for part in parts]).amax(0)
        result = sum((part[0] * exponential(part[2] - top) for part in parts), torch.zeros(1))
        denominator = sum((part[1] * exponential(part[2] - top) for part in parts), torch.zeros(1))
        return result / denominator

    def attention(self, q: Tensor, seq_lens: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims) -> Tensor:
        """``q[B, H]`` over caches of one layer, by sequence and KV head."""
        result = torch.empty(dims.B, dims.H)
        for b in range(dims.B):
            length = int(seq_lens[0 if self.has("row0_length") else b])
            first = 0
            if self.has("one_row_too_many"):
                length = min(length + 1, dims.S)
            if self.has("newest_row_dropped"):
                length = max(length - 1, 1)
            if self.has("oldest_row_dropped"):
                first = 1 if length > 1 else 0
            if self.has("whole_pages"):
                length = min(-(-length // dims.BS) * dims.BS, dims.S)
            if self.has("second_page_skipped"):
                kept = [row for row in range(length) if row // dims.BS != 1]
            for kv_head in range(dims.NKV):
                row = (b * dims.NKV + kv_head) * dims.S
                keys, values = k_cache[row + first : row + length].float(), v_cache[row + first : row + length].float()
                if self.has("second_page_skipped"):
                    keys, values = keys[kept], values[kept]
                if self.has("keys_as_values"):
                    values = keys
                if self.has("modulo_heads"):
                    heads = list(range(kv_head, dims.NH, dims.NKV))
                else:
                    heads = list(range(kv_head * dims.G, (kv_head + 1) * dims.G))
                queries = torch.stack([q[b, head * dims.D : (head + 1) * dims.D] for head in heads])
                attended = self.attend(queries, keys, values, dims)
                for position, head in enumerate(heads):
                    result[b, head * dims.D : (head + 1) * dims.D] = attended[position]
        return result

    def silu(self, x: Tensor) -> Tensor:
        if self.has("relu"):
            return torch.relu(x)
        if self.choices.silu == "tanh":
            return x * (0.5 * torch.tanh(0.5 * x) + 0.5)
        if self.choices.silu == "exp":
            return x / (1 + torch.exp(-x))
        return x * torch.sigmoid(x)

    def gated(self, gate: Tensor, up: Tensor, w_down: Tensor) -> Tensor:
        gate, up = self.maybe(self.choices.gate_up, gate), self.maybe(self.choices.gate_up, up)
        if self.has("gate_and_up_exchanged"):
            gate, up = up, gate
        activation = self.silu(gate) * up
        if not self.has("activation_not_rounded"):
            activation = self.cast(activation)
        return self.maybe(self.choices.branch, self.matmul(activation, w_down))

    def normalised_projections(self, x: Tensor, gamma: Tensor, weights: list[Tensor], eps: float, deferred: bool) -> list[Tensor]:
        if not deferred:
            normalised = self.cast(self.norm(x, gamma, eps))
            return [self.matmul(normalised, weight) for weight in weights]
        weighted = self.cast(x * gamma)
        inverse = torch.ones(1) if self.has("deferred_norm_dropped") else self.inverse_rms(x, eps)
        return [self.matmul(weighted, weight) * inverse for weight in weights]

    def layer(
        self,
        hidden: Tensor,
        weights: dict[str, Tensor],
        tables: tuple[Tensor, Tensor, Tensor],
        caches: tuple[Tensor, Tensor],
        dims: Dims,
    ) -> Tensor:
        """One layer on its own caches, which it updates; ``hidden`` and the result are fp32 before the last cast."""
        seq_lens, cos, sin = tables
        k_cache, v_cache = caches
        q, k, v = self.normalised_projections(
            hidden,
            weights["input_rms_weight"][0],
            [weights["wq"], weights["wk"], weights["wv"]],
            dims.eps,
            self.choices.deferred_input_norm or self.has("deferred_norm_dropped"),
        )
        q, k, v = (self.maybe(self.choices.projection, tensor) for tensor in (q, k, v))
        if not self.has("q_norm_missing"):
            q = self.heads_normalised(q, weights["q_norm_weight"][0], dims)
        if not self.has("k_norm_missing"):
            k = self.heads_normalised(k, weights["k_norm_weight"][0], dims)
        q, k = self.cast(self.rotated(q, seq_lens, cos, sin, dims)), self.cast(self.rotated(k, seq_lens, cos, sin, dims))
        stale = (k_cache.clone(), v_cache.clone())
        for b in range(dims.B):
            for head in range(dims.NKV):
                row = (b * dims.NKV + head) * dims.S + int(seq_lens[b]) - 1
                k_cache[row] = k[b, head * dims.D : (head + 1) * dims.D].to(BF16)
                v_cache[row] = self.cast(v[b, head * dims.D : (head + 1) * dims.D]).to(BF16)
        if self.has("other_row_overwritten") and dims.B > 1:
            # Some sequence's oldest row, which is not being written in this step unless it is its only one.
            k_cache[0] = k_cache[dims.NKV * dims.S]
        if self.has("next_row_overwritten") and int(seq_lens[0]) < dims.S:
            k_cache[int(seq_lens[0])] = k_cache[int(seq_lens[0]) - 1]
        seen = stale if self.has("attention_before_write") else (k_cache, v_cache)
        attn = self.cast(self.attention(q, seq_lens, *seen, dims))
        residual = self.maybe(self.choices.branch, self.matmul(attn, weights["wo"]))
        if not self.has("residual_missing"):
            residual = residual + hidden
        residual = self.maybe(self.choices.residual, residual)
        gate, up = self.normalised_projections(
            residual,
            weights["post_rms_weight"][0],
            [weights["w_gate"], weights["w_up"]],
            dims.eps,
            self.choices.deferred_post_norm,
        )
        return self.gated(gate, up, weights["w_down"]) + (hidden if self.has("second_residual_wrong") else residual)


#: Layer weights in the order of the contract.
LAYER_WEIGHTS = (
    "input_rms_weight",
    "wq",
    "wk",
    "wv",
    "q_norm_weight",
    "k_norm_weight",
    "wo",
    "w_gate",
    "w_up",
    "w_down",
    "post_rms_weight",
)

Arguments = dict[str, Tensor]


def _rms_norm(m: _Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    return {"out": m.norm(t["x"].float(), t["weight"][0], dims.eps)}


def _qkv_proj(m: _Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    x = t["x"][:1].expand_as(t["x"]) if m.has("row0_input") else t["x"]
    wk, wv = (t["wv"], t["wk"]) if m.has("k_and_v_exchanged") else (t["wk"], t["wv"])
    return {"q": m.matmul(x, t["wq"]), "k": m.matmul(x, wk), "v": m.matmul(x, wv)}


def _qk_norm(m: _Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    k_weight = t["q_norm_weight"] if m.has("q_weight_for_k") else t["k_norm_weight"]
    return {
        "q_out": m.heads_normalised(t["q"], t["q_norm_weight"][0], dims),
        "k_out": m.heads_normalised(t["k"], k_weight[0], dims),
    }


def _rope(m: _Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    q, k = m.maybe(m.choices.before_rope, t["q"]), m.maybe(m.choices.before_rope, t["k"])
    tables = t["seq_lens"], t["rope_cos"], t["rope_sin"]
    return {"q_out": m.rotated(q, *tables, dims), "k_out": k if m.has("k_not_rotated") else m.rotated(k, *tables, dims)}


def _kv_write(m: _Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    # Updates in place by itself: what it returns is already in the caches.
    stride = dims.BS
    for b in range(dims.B):
        slot = int(t["slot_mapping"][b])
        page, offset = slot // dims.BS, slot % dims.BS
        if m.has("next_slot"):
            offset = (offset + 1) % dims.BS
        for head in range(dims.NKV):
            row = (page * dims.NKV + head) * stride + offset
            if m.has("token_major_page"):
                row = (page * dims.BS + offset) * dims.NKV + head
            columns = slice(head * dims.D, (head + 1) * dims.D)
            k, v = t["k"][b, columns].float(), t["v"][b, columns]
            if m.has("gain"):
                k, v = k * 1.005, v * 1.005
            if not m.has("k_not_written"):
                t["k_cache"][row] = m.cast(k).to(BF16)
            if not m.has("v_not_written"):
                t["v_cache"][row] = (_truncated(v) if m.has("truncate") else m.cast(v)).to(BF16)
    if m.has("other_row_overwritten"):
        # The first row of the page of the first sequence's slot, or the one after it if that is the slot itself.
        slot = int(t["slot_mapping"][0])
        page, offset = slot // dims.BS, slot % dims.BS
        row = page * dims.NKV * dims.BS + (0 if offset else 1)
        t["v_cache"][row] = 1.0
    return {}


def _attention(m: _Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    return {"out": m.attention(t["q"].float(), t["seq_lens"], t["k_cache"], t["v_cache"], dims)}


def _o_proj(m: _Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    weight = t["wo"].T if m.has("weight_transposed") else t["wo"]
    residual = t["residual"].float()
    if m.has("row0_input"):
        residual = residual[:1].expand_as(residual)
    branch = m.maybe(m.choices.branch, m.matmul(t["attn"], weight))
    return {"out": branch if m.has("residual_missing") else branch + residual}


def _mlp(m: _Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    x = t["x"][:1].expand_as(t["x"]) if m.has("row0_input") else t["x"]
    return {"out": m.gated(m.matmul(x, t["w_gate"]), m.matmul(x, t["w_up"]), t["w_down"])}


def _decode_fwd_layers(m: _Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    one = dims.replace(L=1)
    hidden = first = t["hidden_states"].float()
    if m.has("row0_input"):
        hidden = first = first[:1].expand_as(first).clone()
    for layer in range(dims.L):

        def part(name: str, layer: int = layer) -> Tensor:
            rows = t[name].shape[0] // dims.L
            return t[name][layer * rows : (layer + 1) * rows]

        weights = {name: part(name, 0 if m.has("weights_of_layer_0") else layer) for name in LAYER_WEIGHTS}
        if m.has("layer_dropped") and layer == 1:
            continue
        if m.has("last_layer_dropped") and layer and layer == dims.L - 1:
            continue
        carried = first if m.has("carried_state_ignored") else hidden
        result = m.layer(carried, weights, (t["seq_lens"], t["rope_cos"], t["rope_sin"]), (part("k_cache"), part("v_cache")), one)
        hidden = m.cast(result)
    return {"out": hidden if m.has("last_layer_dropped") else result}


_STAGES: dict[str, Callable[[_Maker, Arguments, Dims], dict[str, Tensor]]] = {
    "rms_norm": _rms_norm,
    "qkv_proj": _qkv_proj,
    "qk_norm": _qk_norm,
    "rope": _rope,
    "kv_write": _kv_write,
    "attention": _attention,
    "o_proj": _o_proj,
    "mlp": _mlp,
    "decode_layer": _decode_fwd_layers,
    "decode_fwd_layers": _decode_fwd_layers,
}


def _truncated(x: Tensor) -> Tensor:
    """fp32 values with the bits that bf16 does not keep cut off."""
    return (x.contiguous().view(torch.int32) & -0x10000).view(torch.float32)


#: What an engineer gets wrong in any kernel, whatever it computes.
COMMON_FAULTS = (
    "zeros",
    "row_unwritten",
    "nan_element",
    "column_tile_unwritten",
    "column_tile_zeroed_once_in_three",
    "input_changed",
    "past_the_end",
    "before_the_start",
    "raises_at_batch_1",
    "returns_a_tensor",
    "rows_exchanged",
    "gain",
)

#: Without subtracting the maximum a layer is still right: Q/K norm keeps its scores far below 88.
_OF_LAYERS = (
    "echo",
    "position_off_by_one",
    "interleaved_pairs",
    "modulo_heads",
    "q_norm_missing",
    "k_norm_missing",
    "eps_1e-5",
    "missing_gamma",
    "scale_missing",
    "one_row_too_many",
    "newest_row_dropped",
    "oldest_row_dropped",
    "attention_before_write",
    "other_row_overwritten",
    "next_row_overwritten",
    "residual_missing",
    "second_residual_wrong",
    "deferred_norm_dropped",
    "gate_and_up_exchanged",
    "relu",
    "row0_length",
    "row0_scale",
    "row0_input",
    "bf16_accumulation",
    "last_k_tile_missing",
)

#: Every fault by stage.
FAULTS: dict[str, tuple[str, ...]] = {
    "rms_norm": (*COMMON_FAULTS, "truncate", "echo", "second_call_differs", "eps_1e-5", "missing_gamma", "row0_scale"),
    "qkv_proj": (
        *COMMON_FAULTS,
        "echo",
        "second_call_differs",
        "row0_input",
        "k_and_v_exchanged",
        "bf16_accumulation",
        "last_k_tile_missing",
        "bf16_result",
    ),
    "qk_norm": (
        *COMMON_FAULTS,
        "echo",
        "second_call_differs",
        "eps_1e-5",
        "missing_gamma",
        "normalised_by_row",
        "q_weight_for_k",
        "row0_scale",
    ),
    "rope": (
        *COMMON_FAULTS,
        "truncate",
        "echo",
        "interleaved_pairs",
        "position_off_by_one",
        "wrong_sign",
        "k_not_rotated",
        "bf16_tables",
        "row0_length",
    ),
    "kv_write": (
        "nan_element",
        "input_changed",
        "past_the_end",
        "before_the_start",
        "raises_at_batch_1",
        "returns_a_tensor",
        "gain",
        "truncate",
        "k_not_written",
        "v_not_written",
        "next_slot",
        "token_major_page",
        "other_row_overwritten",
    ),
    "attention": (
        *COMMON_FAULTS,
        "truncate",
        "echo",
        "modulo_heads",
        "scale_missing",
        "no_maximum",
        "one_row_too_many",
        "newest_row_dropped",
        "oldest_row_dropped",
        "whole_pages",
        "second_page_skipped",
        "keys_as_values",
        "bf16_scores",
        "bf16_accumulation",
        "row0_length",
        "no_rescale",
    ),
    "o_proj": (
        *COMMON_FAULTS,
        "echo",
        "second_call_differs",
        "residual_missing",
        "weight_transposed",
        "row0_input",
        "bf16_accumulation",
        "last_k_tile_missing",
        "bf16_result",
    ),
    "mlp": (
        *COMMON_FAULTS,
        "echo",
        "second_call_differs",
        "gate_and_up_exchanged",
        "relu",
        "activation_not_rounded",
        "row0_input",
        "bf16_accumulation",
        "last_k_tile_missing",
    ),
    # One truncation, of the result: at the end of a chain it is below the chain's own rounding noise.
    "decode_layer": (*COMMON_FAULTS, *_OF_LAYERS, "truncate_result"),
    "decode_fwd_layers": (
        *COMMON_FAULTS,
        *_OF_LAYERS,
        "carried_state_ignored",
        "layer_dropped",
        "last_layer_dropped",
        "weights_of_layer_0",
    ),
}

#: Choices that a fault needs to show at all.
_NEEDS = {"no_rescale": Choices(block=16)}


def torch_kernel(stage: str, choices: Choices | None = None, fault: str = "") -> Kernel:
    """A torch kernel of a stage with these choices and at most one fault; each has its own count of calls.

    Raises ``KeyError`` for a fault that the stage does not have: a misspelt fault would be a right kernel.
    """
    if fault and fault not in FAULTS[stage]:
        raise KeyError(f"stage {stage} has no fault {fault!r}")
    maker = _Maker(choices or _NEEDS.get(fault, Choices()), fault)
    compute = _STAGES[stage]

    def run(*arguments: Tensor, dims: Dims) -> Tensor | None:
        maker.calls += 1
        names = [argument.name for argument in declared.stage.arguments]
        tensors = dict(zip(names, arguments, strict=True))
        if fault == "raises_at_batch_1" and dims.B == 1:
            raise RuntimeError("this kernel needs at least two rows")
        if fault == "second_call_differs":
            maker.choices = dataclasses.replace(maker.choices, order="torch" if maker.calls % 2 else "reversed")
        results = compute(maker, tensors, dims)
        for name, value in results.items():
            _store(maker, tensors[name], value)
        written = [argument.name for argument in declared.stage.outputs]
        _spoil(maker, tensors, names[0], written, results, dims)
        return tensors[written[0]] if fault == "returns_a_tensor" else None

    declared = kernel(stage, name=f"{stage}[{fault}]" if fault else stage)(run)
    return declared


def _store(m: _Maker, out: Tensor, value: Tensor) -> None:
    """The last cast, and faults of it."""
    if m.has("gain"):
        value = value * 1.005
    if m.has("bf16_result"):
        value = value.to(BF16).float()
    if out.dtype == BF16:
        value = _truncated(value) if m.has("truncate") or m.has("truncate_result") else m.cast(value)
    rows = out.shape[0]
    if m.has("row_unwritten"):
        out[: rows - 1] = value[: rows - 1].to(out.dtype)
        return
    if m.has("column_tile_unwritten"):
        out[:, :16] = value[:, :16].to(out.dtype)
        out[:, 32:] = value[:, 32:].to(out.dtype)
        return
    if m.has("rows_exchanged") and rows > 1:
        value = torch.cat([value[1:2], value[:1], value[2:]])
    out.copy_(value)


def _spoil(m: _Maker, tensors: Arguments, first: str, written: list[str], results: dict[str, Tensor], dims: Dims) -> None:
    """What goes wrong after the values were right."""
    out = tensors[next(iter(results), written[0])]
    if m.has("zeros"):
        for name in results:
            tensors[name].zero_()
    elif m.has("nan_element"):
        if "slot_mapping" in tensors:
            slot = int(tensors["slot_mapping"][-1])
            out[slot // dims.BS * dims.NKV * dims.BS + slot % dims.BS, 3] = math.nan
        else:
            out[-1, 3] = math.nan
    elif m.has("column_tile_zeroed_once_in_three") and m.calls % 3 == 0:
        out[:, 16:32] = 0
    elif m.has("input_changed"):
        tensors[first][-1, -1] += 1
    elif m.has("past_the_end"):
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(1)
    elif m.has("before_the_start"):
        out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(1)
    elif m.has("echo"):
        source = next(name for name in ("residual", "hidden_states", "x", "q") if name in tensors)
        out.copy_(tensors[source])
