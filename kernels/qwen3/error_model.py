"""How far a correct kernel of each Qwen3 stage may stray: the reference again, in the algebra of ``conformance.bounds``.

Each function takes the contract's inputs, the dimensions and a profile of roundings, and returns the bounds of every output
before its last cast. The composition is that of ``reference.py``, step by step.
"""

from __future__ import annotations

import torch

from conformance import bounds
from conformance.bounds import Bounds, NewRow, Profile
from conformance.contract import Dims, Tensors
from kernels.qwen3.reference import LAYER_WEIGHTS, contiguous, current_rows, layer_of, paged_rows


def rms_norm(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``out``: normalisation and gamma."""
    return {"out": bounds.rms_norm(bounds.exact(inputs["x"]), inputs["weight"], dims.eps, profile)}


def qkv_proj(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``q``, ``k``, ``v``: products of exact operands."""
    x = bounds.exact(inputs["x"])
    return {name: bounds.projection(x, inputs["w" + name]) for name in ("q", "k", "v")}


def _heads_normalised(x: Bounds, weight: torch.Tensor, dims: Dims, profile: Profile) -> Bounds:
    shape = x.value.shape
    normalised = bounds.rms_norm(x.reshape(shape[0], -1, dims.D), weight, dims.eps, profile)
    return bounds.optional_rounding(normalised, profile, "before_rope").reshape(*shape)


def qk_norm(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``q_out``, ``k_out``: RMSNorm by head."""
    return {
        f"{name}_out": _heads_normalised(bounds.exact(inputs[name]), inputs[f"{name}_norm_weight"], dims, profile)
        for name in ("q", "k")
    }


def _rotated(x: Bounds, inputs: Tensors, dims: Dims) -> Bounds:
    shape = x.value.shape
    position = inputs["seq_lens"].long() - 1
    cosine, sine = inputs["rope_cos"][position].unsqueeze(1), inputs["rope_sin"][position].unsqueeze(1)
    return bounds.rotate_half(x.reshape(shape[0], -1, dims.D), cosine, sine).reshape(*shape)


def rope(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``q_out``, ``k_out``: rotate-half."""
    return {
        f"{name}_out": _rotated(bounds.optional_rounding(bounds.exact(inputs[name]), profile, "before_rope"), inputs, dims)
        for name in ("q", "k")
    }


def kv_write(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """The written rows of both caches: a copy of ``k``, one cast of ``v``."""
    rows = paged_rows(inputs["slot_mapping"], dims)
    return {f"{name}_cache": _at_rows(bounds.exact(inputs[name].reshape(-1, dims.D)), rows) for name in ("k", "v")}


def _at_rows(estimate: Bounds, rows: torch.Tensor) -> Bounds:
    return Bounds(estimate.value, estimate.variance, estimate.worst, rows=rows)


def attention(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``out``: attention over exact caches."""
    query = bounds.exact(inputs["q"].reshape(dims.B, dims.NH, dims.D))
    keys, values = (contiguous(inputs[name], dims)[0] for name in ("k_cache", "v_cache"))
    estimate = bounds.attention(query, keys, values, inputs["seq_lens"].tolist(), dims.scale, profile, want_correlation=True)
    flat = estimate.reshape(dims.B, dims.H)
    return {"out": Bounds(flat.value, flat.variance, flat.worst, correlation=estimate.correlation)}


def _output_projection(attn: Bounds, wo: torch.Tensor, residual: Bounds, profile: Profile) -> Bounds:
    return bounds.add(bounds.optional_rounding(bounds.projection(attn, wo), profile, "branch"), residual)


def o_proj(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``out``: projection plus residual."""
    attn, residual = bounds.exact(inputs["attn"]), bounds.exact(inputs["residual"])
    return {"out": _output_projection(attn, inputs["wo"], residual, profile)}


def _mlp_of(gate: Bounds, up: Bounds, w_down: torch.Tensor, profile: Profile) -> Bounds:
    gate = bounds.optional_rounding(gate, profile, "gate_up")
    up = bounds.optional_rounding(up, profile, "gate_up")
    activation = bounds.rounding(bounds.silu_times(gate, up), profile)
    return bounds.optional_rounding(bounds.projection(activation, w_down), profile, "branch")


def mlp(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``out``: SwiGLU."""
    x = bounds.exact(inputs["x"])
    gate, up = (bounds.projection(x, inputs[name]) for name in ("w_gate", "w_up"))
    return {"out": _mlp_of(gate, up, inputs["w_down"], profile)}


def _layer(
    hidden: Bounds, weights: Tensors, caches: tuple[torch.Tensor, torch.Tensor], inputs: Tensors, dims: Dims, profile: Profile
) -> tuple[Bounds, Bounds, Bounds]:
    """The new key rows and value rows ``[B, NKV, D]`` and the hidden states ``[B, H]``, each before its cast."""
    q, k, v = bounds.norm_and_projections(
        hidden, weights["input_rms_weight"], [weights["wq"], weights["wk"], weights["wv"]], dims.eps, profile
    )
    q, k, v = (bounds.optional_rounding(tensor, profile, "projection") for tensor in (q, k, v))
    q = _rotated(_heads_normalised(q, weights["q_norm_weight"], dims, profile), inputs, dims)
    k = _rotated(_heads_normalised(k, weights["k_norm_weight"], dims, profile), inputs, dims)
    q, k_row, v_row = (tensor.reshape(dims.B, heads, dims.D) for tensor, heads in ((q, dims.NH), (k, dims.NKV), (v, dims.NKV)))
    attn = bounds.attention(
        bounds.rounding(q, profile),
        contiguous(caches[0], dims)[0],
        contiguous(caches[1], dims)[0],
        inputs["seq_lens"].tolist(),
        dims.scale,
        profile,
        NewRow(bounds.rounding(k_row, profile), bounds.rounding(v_row, profile)),
    ).reshape(dims.B, dims.H)
    residual = _output_projection(bounds.rounding(attn, profile), weights["wo"], hidden, profile)
    residual = bounds.optional_rounding(residual, profile, "residual", tie_prone=True)
    gate, up = bounds.norm_and_projections(
        residual, weights["post_rms_weight"], [weights["w_gate"], weights["w_up"]], dims.eps, profile
    )
    branch = _mlp_of(gate, up, weights["w_down"], profile)
    return k_row, v_row, bounds.add(branch, residual)


def decode_fwd_layers(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """The cache rows that every layer writes, and ``out`` after the last one."""
    hidden = bounds.exact(inputs["hidden_states"])
    k_rows, v_rows, rows = [], [], []
    one = dims.replace(L=1)
    for layer in range(dims.L):
        weights = {name: layer_of(inputs[name], layer, dims.L) for name in LAYER_WEIGHTS}
        caches = (layer_of(inputs["k_cache"], layer, dims.L), layer_of(inputs["v_cache"], layer, dims.L))
        if layer:
            hidden = bounds.rounding(hidden, profile)
        k_row, v_row, hidden = _layer(hidden, weights, caches, inputs, one, profile)
        k_rows.append(k_row.reshape(-1, dims.D))
        v_rows.append(v_row.reshape(-1, dims.D))
        rows.append(current_rows(inputs["seq_lens"], dims, layer))
    written = torch.cat(rows)

    def stacked(parts: list[Bounds]) -> Bounds:
        joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("value", "variance", "worst")]
        return Bounds(joined[0], joined[1], joined[2], rows=written)

    return {"k_cache": stacked(k_rows), "v_cache": stacked(v_rows), "out": hidden}


#: One layer is a chain of one.
decode_layer = decode_fwd_layers
