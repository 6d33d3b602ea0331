"""The Qwen3 decode stages in torch: one function a stage, a layer and a model as their composition.

Every function takes the contract's inputs by name and returns its outputs, in the dtype of ``arithmetic``: with ``EXACT`` the
float64 oracle, with ``CONTRACT`` the bf16 rounding points as well. Shapes are the contract's; ``D`` is the head dimension.
"""

from __future__ import annotations

import torch

from conformance.arithmetic import Arithmetic
from conformance.contract import Dims

Tensor = torch.Tensor

#: A layer's weights, in the order of the contract's arguments.
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


def normalise(x: Tensor, weight: Tensor, eps: float, a: Arithmetic) -> Tensor:
    """``rn(x, w) = x * rsqrt(mean(x * x) + eps) * w`` over the last axis."""
    normalised = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return a.optional(normalised, "normalised") * a.wide(weight)


def rms_norm(x: Tensor, weight: Tensor, *, dims: Dims, a: Arithmetic) -> tuple[Tensor]:
    """``bf16(rn(x, weight))``, ``[B, H]``."""
    return (a.round(normalise(a.wide(x), weight, dims.eps, a)),)


def qkv_proj(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, *, dims: Dims, a: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
    """Three products: ``[B, NH*D]``, ``[B, NKV*D]``, ``[B, NKV*D]``."""
    x = a.wide(x)
    return a.matmul(x, wq), a.matmul(x, wk), a.matmul(x, wv)


def qk_norm(
    q: Tensor, k: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, *, dims: Dims, a: Arithmetic
) -> tuple[Tensor, Tensor]:
    """``rn`` of each head of ``D`` values by itself."""

    def heads(x: Tensor, weight: Tensor) -> Tensor:
        per_head = a.wide(x).reshape(x.shape[0], -1, dims.D)
        return a.optional(normalise(per_head, weight, dims.eps, a), "before_rope").reshape(x.shape)

    return heads(q, q_norm_weight), heads(k, k_norm_weight)


def rope(
    q: Tensor, k: Tensor, seq_lens: Tensor, rope_cos: Tensor, rope_sin: Tensor, *, dims: Dims, a: Arithmetic
) -> tuple[Tensor, Tensor]:
    """Rotate-half of every head at position ``seq_lens[b] - 1``, then bf16."""
    position = seq_lens.long() - 1
    cos, sin = a.wide(rope_cos[position]).unsqueeze(1), a.wide(rope_sin[position]).unsqueeze(1)  # [B, 1, D]

    def rotate(x: Tensor) -> Tensor:
        low, high = a.wide(x).reshape(x.shape[0], -1, dims.D).chunk(2, -1)
        cos_low, cos_high = cos.chunk(2, -1)
        sin_low, sin_high = sin.chunk(2, -1)
        rotated = torch.cat([low * cos_low - high * sin_low, high * cos_high + low * sin_high], -1)
        return a.round(rotated.reshape(x.shape))

    return rotate(q), rotate(k)


def kv_write(
    k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, *, dims: Dims, a: Arithmetic
) -> tuple[Tensor, Tensor]:
    """The row of each KV head at slot ``slot_mapping[b]`` becomes ``k`` and ``bf16(v)``; every other row stays."""
    rows = paged_rows(slot_mapping, dims)
    return (
        a.wide(k_cache).index_put((rows,), a.wide(k).reshape(-1, dims.D)),
        a.wide(v_cache).index_put((rows,), a.round(a.wide(v)).reshape(-1, dims.D)),
    )


def attention(q: Tensor, seq_lens: Tensor, k_cache: Tensor, v_cache: Tensor, *, dims: Dims, a: Arithmetic) -> tuple[Tensor]:
    """Softmax attention over the first ``seq_lens[b]`` cache rows; query head ``h`` reads KV head ``h // G``; bf16."""
    keys, values = contiguous(k_cache, dims)[0], contiguous(v_cache, dims)[0]  # [B, NKV, S, D]
    heads = []
    for b, length in enumerate(seq_lens.tolist()):
        grouped = a.wide(q[b]).reshape(dims.NKV, dims.G, dims.D)
        scores = grouped @ a.wide(keys[b, :, :length]).transpose(1, 2) * dims.scale  # [NKV, G, length]
        weights = a.optional(torch.softmax(scores, -1), "probabilities", sequence=b)
        heads.append((weights @ a.wide(values[b, :, :length])).reshape(dims.H))
    return (a.round(torch.stack(heads)),)


def o_proj(attn: Tensor, wo: Tensor, residual: Tensor, *, dims: Dims, a: Arithmetic) -> tuple[Tensor]:
    """``attn @ wo + residual``, ``[B, H]``."""
    return (a.optional(a.matmul(a.wide(attn), wo), "branch") + a.wide(residual),)


def mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, dims: Dims, a: Arithmetic) -> tuple[Tensor]:
    """``bf16(silu(x @ w_gate) * (x @ w_up)) @ w_down``, ``[B, H]``."""
    x = a.wide(x)
    gate = a.optional(a.matmul(x, w_gate), "gate_up")
    up = a.optional(a.matmul(x, w_up), "gate_up")
    activation = a.round(torch.nn.functional.silu(gate) * up)
    return (a.optional(a.matmul(activation, w_down), "branch"),)


def decode_layer(
    hidden_states: Tensor,
    input_rms_weight: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    wo: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    post_rms_weight: Tensor,
    seq_lens: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    dims: Dims,
    a: Arithmetic,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer on contiguous caches of that layer; returns the updated caches, then the hidden states."""
    (x,) = rms_norm(hidden_states, input_rms_weight, dims=dims, a=a)
    q, k, v = qkv_proj(x, wq, wk, wv, dims=dims, a=a)
    q, k, v = (a.optional(tensor, "projection") for tensor in (q, k, v))
    q, k = qk_norm(q, k, q_norm_weight, k_norm_weight, dims=dims, a=a)
    q, k = rope(q, k, seq_lens, rope_cos, rope_sin, dims=dims, a=a)
    rows = current_rows(seq_lens, dims)
    k_cache = a.wide(k_cache).index_put((rows,), k.reshape(-1, dims.D))
    v_cache = a.wide(v_cache).index_put((rows,), a.round(v).reshape(-1, dims.D))
    (attn,) = attention(q, seq_lens, k_cache, v_cache, dims=dims, a=a)
    (residual,) = o_proj(attn, wo, hidden_states, dims=dims, a=a)
    residual = a.optional(residual, "residual")
    y = a.round(normalise(residual, post_rms_weight, dims.eps, a))
    (branch,) = mlp(y, w_gate, w_up, w_down, dims=dims, a=a)
    return k_cache, v_cache, a.round(branch + residual)


def decode_fwd_layers(
    hidden_states: Tensor,
    input_rms_weight: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    wo: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    post_rms_weight: Tensor,
    seq_lens: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    dims: Dims,
    a: Arithmetic,
) -> tuple[Tensor, Tensor, Tensor]:
    """``L`` layers, stacked along the first axis of weights and caches."""
    hidden = a.wide(hidden_states)
    k_parts, v_parts = [], []
    for layer in range(dims.L):

        def of(stacked: Tensor, layer: int = layer) -> Tensor:
            return layer_of(stacked, layer, dims.L)

        k_part, v_part, hidden = decode_layer(
            hidden,
            of(input_rms_weight),
            of(wq),
            of(wk),
            of(wv),
            of(q_norm_weight),
            of(k_norm_weight),
            of(wo),
            of(w_gate),
            of(w_up),
            of(w_down),
            of(post_rms_weight),
            seq_lens,
            rope_cos,
            rope_sin,
            of(k_cache),
            of(v_cache),
            dims=dims.replace(L=1),
            a=a,
        )
        k_parts.append(k_part)
        v_parts.append(v_part)
    return torch.cat(k_parts), torch.cat(v_parts), hidden


def layer_of(stacked: Tensor, layer: int, layers: int) -> Tensor:
    """The rows of one layer of a tensor whose first axis stacks ``layers`` layers."""
    rows = stacked.shape[0] // layers
    return stacked[layer * rows : (layer + 1) * rows]


def contiguous(cache: Tensor, dims: Dims) -> Tensor:
    """A contiguous cache as ``[L, B, NKV, S, D]``."""
    return cache.reshape(-1, dims.B, dims.NKV, dims.S, dims.D)


def current_rows(seq_lens: Tensor, dims: Dims, layer: int = 0) -> Tensor:
    """Rows of a contiguous cache that hold each sequence's current position, all KV heads: ``[B * NKV]``, by sequence."""
    sequence = torch.arange(dims.B).unsqueeze(1)
    head = torch.arange(dims.NKV).unsqueeze(0)
    position = (seq_lens.long() - 1).unsqueeze(1)
    return ((((layer * dims.B + sequence) * dims.NKV + head) * dims.S) + position).reshape(-1)


def paged_rows(slot_mapping: Tensor, dims: Dims, layer: int = 0) -> Tensor:
    """Rows of a paged cache at each sequence's slot, all KV heads: ``[B * NKV]``, by sequence."""
    slot = slot_mapping.long().unsqueeze(1)
    page, offset = slot // dims.BS, slot % dims.BS
    head = torch.arange(dims.NKV).unsqueeze(0)
    return (((layer * dims.NB + page) * dims.NKV + head) * dims.BS + offset).reshape(-1)
