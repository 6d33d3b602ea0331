"""The Qwen3 decode stages in torch: one function a stage, a layer and a model as their composition.

Every stage's function takes the contract's inputs by name and returns its outputs, in the dtype of ``arithmetic``: with ``EXACT``
the float64 oracle, with ``CONTRACT`` the bf16 rounding points as well. Shapes are the contract's; ``D`` is the head dimension.
"""

from __future__ import annotations

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import Tensors, layer_of
from conformance.kernels.qwen3.layout import Layout, paged_rows
from conformance.numerics.arithmetic import Arithmetic

Tensor = torch.Tensor

#: Elements of keys, of values or of scores that attention takes at a time: 64 MB in float64.
BLOCK_ELEMENTS = 8 << 20

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


def normalise(x: Tensor, weight: Tensor, eps: float, a: Arithmetic, name: str) -> Tensor:
    """``rn(x, w) = x * rsqrt(mean(x * x) + eps) * w`` over the last axis; ``name`` is the norm's."""
    normalised = x * a.unrounded(torch.rsqrt((x * x).mean(-1, keepdim=True) + eps), f"1/rms of the {name}")
    return a.optional(normalised, "normalised") * a.unrounded(a.wide(weight), f"weight of the {name}")


def rms_norm(x: Tensor, weight: Tensor, *, dims: Dims, a: Arithmetic, name: str = "input norm") -> tuple[Tensor]:
    """``bf16(rn(x, weight))``, ``[B, H]``; ``name`` tells a model's norms apart."""
    return (a.round(normalise(a.wide(x), weight, dims.eps, a, name), name),)


def qkv_proj(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, *, dims: Dims, a: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
    """Three products: ``[B, NH*D]``, ``[B, NKV*D]``, ``[B, NKV*D]``."""
    x = a.wide(x)
    return a.matmul(x, wq), a.matmul(x, wk), a.matmul(x, wv)


def qk_norm(
    q: Tensor, k: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, *, dims: Dims, a: Arithmetic
) -> tuple[Tensor, Tensor]:
    """``rn`` of each head of ``D`` values by itself."""

    def heads(x: Tensor, weight: Tensor, name: str) -> Tensor:
        per_head = a.wide(x).reshape(x.shape[0], -1, dims.D)
        return a.optional(normalise(per_head, weight, dims.eps, a, name), "before_rope").reshape(x.shape)

    return heads(q, q_norm_weight, "q norm"), heads(k, k_norm_weight, "k norm")


def rope(
    q: Tensor, k: Tensor, seq_lens: Tensor, rope_cos: Tensor, rope_sin: Tensor, *, dims: Dims, a: Arithmetic
) -> tuple[Tensor, Tensor]:
    """Rotate-half of every head at position ``seq_lens[b] - 1``, then bf16."""
    position = seq_lens.long() - 1
    cos, sin = a.wide(rope_cos[position]).unsqueeze(1), a.wide(rope_sin[position]).unsqueeze(1)  # [B, 1, D]

    def rotate(x: Tensor, name: str) -> Tensor:
        low, high = a.wide(x).reshape(x.shape[0], -1, dims.D).chunk(2, -1)
        cos_low, cos_high = cos.chunk(2, -1)
        sin_low, sin_high = sin.chunk(2, -1)
        pairs = ((low, cos_low), (high, sin_low), (high, cos_high), (low, sin_high))
        first, second, third, fourth = (a.declarable(half * table, "rotation products") for half, table in pairs)
        rotated = torch.cat([first - second, third + fourth], -1)
        return a.round(rotated.reshape(x.shape), name)

    return rotate(q, "rotated q"), rotate(k, "rotated k")


def kv_write(
    k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, *, dims: Dims, a: Arithmetic
) -> tuple[Tensor, Tensor]:
    """The row of each KV head at slot ``slot_mapping[b]`` becomes ``k`` and ``bf16(v)``; every other row stays."""
    rows = paged_rows(slot_mapping, dims)
    return (
        a.with_rows(k_cache, rows, a.wide(k).reshape(-1, dims.D)),
        a.with_rows(v_cache, rows, a.round(a.wide(v), "v").reshape(-1, dims.D)),
    )


def attend(
    q: Tensor,
    layout: Layout,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    dims: Dims,
    a: Arithmetic,
    new_rows: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention of every token over its rows of one layer's caches; query head ``h`` reads KV head ``h // G``; bf16.

    ``q [N, NH*D]``; the result has its shape. ``new_rows`` are the tokens' own rows ``[N, NKV*D]`` of keys and values, and stand
    for those in the caches.
    """
    queries = a.wide(q).reshape(-1, dims.NKV, dims.G, dims.D)
    parts, places = [], []
    for block in layout.blocks(BLOCK_ELEMENTS):
        length = layout.length[block.tokens].unsqueeze(-1)  # [s, t, 1]
        cached = layout.seq_lens[block.sequences] - (0 if new_rows is None else block.own.shape[1])
        keys, values = (a.wide(layout.history(cache, block.sequences, cached)) for cache in (k_cache, v_cache))
        query = queries[block.tokens]  # [s, t, NKV, G, D]
        query = query.transpose(1, 2).flatten(2, 3)  # [s, NKV, t*G, D]
        scores = a.matmul(query, keys.transpose(2, 3))
        position = torch.arange(keys.shape[2])
        seen = (position < length) & (position < cached.view(-1, 1, 1))  # [s, t, n]
        if new_rows is not None:
            own_keys, own_values = (rows.reshape(-1, dims.NKV, dims.D)[block.own] for rows in new_rows)  # [s, m, NKV, D]
            scores = torch.cat([scores, query @ own_keys.permute(0, 2, 3, 1)], -1)
            seen = torch.cat([seen, cached.view(-1, 1, 1) + torch.arange(block.own.shape[1]) < length], -1)
        mask = seen.unsqueeze(1).repeat_interleave(dims.G, 2)  # [s, 1, t*G, n + m]
        scores = a.declarable(torch.where(mask, scores, 0.0), "unscaled scores", block.sequences)
        scores = a.unrounded(scores * dims.scale, "scores", block.sequences)
        visible = torch.where(mask, scores, -torch.inf)
        exponentials = torch.exp(visible - visible.detach().amax(-1, keepdim=True))
        denominator = a.unrounded(exponentials.sum(-1, keepdim=True), "softmax denominator")
        weights = a.optional(exponentials / denominator, "probabilities", block.sequences)
        attended = a.matmul(weights[..., : keys.shape[2]], values)
        if new_rows is not None:
            attended = attended + weights[..., keys.shape[2] :] @ own_values.transpose(1, 2)
        by_token = attended.reshape(*attended.shape[:2], -1, dims.G, dims.D).transpose(1, 2)  # [s, t, NKV, G, D]
        parts.append(by_token.flatten(0, 1).flatten(1))
        places.append(block.tokens.flatten())
    return a.round(torch.cat(parts).index_select(0, torch.cat(places).argsort()), "attention")


def attention(q: Tensor, seq_lens: Tensor, k_cache: Tensor, v_cache: Tensor, *, dims: Dims, a: Arithmetic) -> tuple[Tensor]:
    """Softmax attention over the first ``seq_lens[b]`` rows of a contiguous cache; bf16."""
    return (attend(q, Layout.of({"seq_lens": seq_lens}, dims), k_cache, v_cache, dims=dims, a=a),)


def paged_attention(
    q: Tensor, seq_lens: Tensor, block_table: Tensor, k_cache: Tensor, v_cache: Tensor, *, dims: Dims, a: Arithmetic
) -> tuple[Tensor]:
    """Softmax attention over the first ``seq_lens[b]`` rows of the pages that ``block_table`` names; bf16."""
    layout = Layout.of({"seq_lens": seq_lens, "block_table": block_table}, dims)
    return (attend(q, layout, k_cache, v_cache, dims=dims, a=a),)


def o_proj(attn: Tensor, wo: Tensor, residual: Tensor, *, dims: Dims, a: Arithmetic) -> tuple[Tensor]:
    """``attn @ wo + residual``, ``[B, H]``."""
    return (a.optional(a.matmul(a.wide(attn), wo), "branch") + a.wide(residual),)


def mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, dims: Dims, a: Arithmetic) -> tuple[Tensor]:
    """``bf16(silu(x @ w_gate) * (x @ w_up)) @ w_down``, ``[B, H]``; ``silu`` may be rounded too."""
    x = a.wide(x)
    gate = a.optional(a.matmul(x, w_gate), "gate")
    up = a.optional(a.matmul(x, w_up), "up")
    silu = a.optional(gate * a.unrounded(torch.sigmoid(gate), "sigmoid"), "silu")
    activation = a.round(silu * up, "activation")
    return (a.optional(a.matmul(activation, w_down), "branch"),)


def lm_head(hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, *, dims: Dims, a: Arithmetic) -> tuple[Tensor]:
    """``bf16(rn(hidden, final_norm_weight)) @ lm_head_weight.T``, ``[B, V]``."""
    (normalised,) = rms_norm(hidden, final_norm_weight, dims=dims, a=a, name="final norm")
    return (a.declarable(a.matmul(normalised, lm_head_weight.T), "logits"),)


def greedy_sample(logits: Tensor, *, dims: Dims, a: Arithmetic) -> tuple[Tensor]:
    """Index of the largest logit, the lowest index on a tie, ``[B]``."""
    largest = logits == logits.amax(-1, keepdim=True)
    index = torch.arange(logits.shape[-1]).expand_as(largest)
    return (a.wide(torch.where(largest, index, logits.shape[-1]).amin(-1)),)


def layer(
    hidden: Tensor, weights: Tensors, tables: Tensors, layout: Layout, k_cache: Tensor, v_cache: Tensor, *, a: Arithmetic
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer for the ``N`` tokens of a dispatch; returns the updated caches of that layer, then the hidden states ``[N, H]``.

    ``weights`` holds that layer's, ``tables`` ``rope_cos`` and ``rope_sin``.
    """
    dims = layout.dims
    (x,) = rms_norm(hidden, weights["input_rms_weight"], dims=dims, a=a)
    q, k, v = qkv_proj(x, weights["wq"], weights["wk"], weights["wv"], dims=dims, a=a)
    q, k, v = (a.optional(tensor, "projection") for tensor in (q, k, v))
    q, k = qk_norm(q, k, weights["q_norm_weight"], weights["k_norm_weight"], dims=dims, a=a)
    q, k = rope(q, k, layout.length, tables["rope_cos"], tables["rope_sin"], dims=dims, a=a)
    rows = layout.rows()
    v = a.round(v, "v")
    attn = attend(q, layout, k_cache, v_cache, dims=dims, a=a, new_rows=(k, v))
    k_cache, v_cache = (a.with_rows(cache, rows, new.reshape(-1, dims.D)) for cache, new in ((k_cache, k), (v_cache, v)))
    (residual,) = o_proj(attn, weights["wo"], hidden, dims=dims, a=a)
    residual = a.optional(residual, "residual")
    y = a.round(normalise(residual, weights["post_rms_weight"], dims.eps, a, "post norm"), "post norm")
    (branch,) = mlp(y, weights["w_gate"], weights["w_up"], weights["w_down"], dims=dims, a=a)
    return k_cache, v_cache, a.round(branch + residual, "hidden states")


def weights_of(inputs: Tensors, index: int, dims: Dims) -> dict[str, Tensor]:
    """One layer's weights."""
    return {name: layer_of(inputs[name], index, dims.L) for name in LAYER_WEIGHTS}


def stacked_layers(*, dims: Dims, a: Arithmetic, **inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``L`` layers, stacked along the first axis of weights and caches; returns the caches, then the hidden states ``[N, H]``.

    Takes the arguments of any stage of layers by name: contiguous or paged, decode or prefill.
    """
    layout = Layout.of(inputs, dims.replace(L=1))
    hidden = a.wide(inputs["hidden_states"])
    k_parts, v_parts = [], []
    for index in range(dims.L):
        caches = (layer_of(inputs[name], index, dims.L) for name in ("k_cache", "v_cache"))
        k_part, v_part, hidden = layer(hidden, weights_of(inputs, index, dims), inputs, layout, *caches, a=a)
        k_parts.append(k_part)
        v_parts.append(v_part)
    return torch.cat(k_parts), torch.cat(v_parts), hidden


def whole_step(*, dims: Dims, a: Arithmetic, **inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``L`` layers, then the LM head on each sequence's last token; returns the caches, then the logits ``[B, V]``."""
    k_cache, v_cache, hidden = stacked_layers(dims=dims, a=a, **inputs)
    last = hidden[Layout.of(inputs, dims).last]
    (logits,) = lm_head(last, inputs["final_norm_weight"], inputs["lm_head_weight"], dims=dims, a=a)
    return k_cache, v_cache, logits


# One reference a stage, by the stage's name: what differs between them is in their layouts.
decode_layer = paged_decode_layer = prefill_layer = decode_fwd_layers = stacked_layers
decode_fwd = paged_decode_fwd = prefill_fwd = whole_step
