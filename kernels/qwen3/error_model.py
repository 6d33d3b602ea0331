"""How far a correct kernel of each Qwen3 stage may stray: the reference again, in the algebra of ``conformance.numerics.bounds``.

Each function takes the contract's inputs, the dimensions and a profile of roundings, and returns the bounds of every output
before its last cast. The composition is that of ``reference.py``, step by step.
"""

from __future__ import annotations

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import Tensors, layer_of
from conformance.kernels.qwen3 import reference
from conformance.kernels.qwen3.layout import Layout, paged_rows
from conformance.kernels.qwen3.reference import weights_of
from conformance.numerics import bounds
from conformance.numerics.arithmetic import EXACT
from conformance.numerics.attention import NewRows
from conformance.numerics.attention import attention as attention_bounds
from conformance.numerics.bounds import Bounds, Profile


def rms_norm(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``out``: normalisation and gamma."""
    return {"out": bounds.rms_norm(bounds.exact(inputs["x"]), inputs["weight"], dims.eps, profile)}


def qkv_proj(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``q``, ``k``, ``v``: products of exact operands."""
    x = bounds.exact(inputs["x"])
    return {
        name: bounds.optional_rounding(bounds.projection(x, inputs["w" + name]), profile, "projection")
        for name in ("q", "k", "v")
    }


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


def _rotated(x: Bounds, length: torch.Tensor, tables: Tensors, dims: Dims, profile: Profile) -> Bounds:
    shape = x.value.shape
    position = length.long() - 1
    cosine, sine = tables["rope_cos"][position].unsqueeze(1), tables["rope_sin"][position].unsqueeze(1)
    return bounds.rotate_half(x.reshape(shape[0], -1, dims.D), cosine, sine, profile).reshape(*shape)


def rope(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``q_out``, ``k_out``: rotate-half."""
    found = {}
    for name in ("q", "k"):
        given = bounds.optional_rounding(bounds.exact(inputs[name]), profile, "before_rope")
        found[f"{name}_out"] = _rotated(given, inputs["seq_lens"], inputs, dims, profile)
    return found


def kv_write(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """The written rows of both caches: a copy of ``k``, one cast of ``v``."""
    rows = paged_rows(inputs["slot_mapping"], dims)
    return {f"{name}_cache": _at_rows(bounds.exact(inputs[name].reshape(-1, dims.D)), rows) for name in ("k", "v")}


def _at_rows(estimate: Bounds, rows: torch.Tensor) -> Bounds:
    return Bounds(estimate.value, estimate.variance, estimate.worst, rows=rows)


def attention(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``out``: attention over exact caches."""
    layout = Layout.of(inputs, dims)
    query = bounds.exact(inputs["q"].reshape(dims.B, dims.NH, dims.D))
    estimate = attention_bounds(
        query,
        *_histories(layout, inputs["k_cache"], inputs["v_cache"]),
        layout.length.tolist(),
        dims.scale,
        profile,
        want_correlation=True,
    )
    flat = estimate.reshape(dims.B, dims.NH * dims.D)
    return {"out": Bounds(flat.value, flat.variance, flat.worst, correlation=estimate.correlation)}


#: Pages or one contiguous piece: the arithmetic is the same.
paged_attention = attention


def _histories(layout: Layout, k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For every token the keys and values of its sequence, ``[NKV, seq_len, D]``."""
    of_sequence = [layout.histories(cache) for cache in (k_cache, v_cache)]
    keys, values = ([histories[b] for b in layout.sequence.tolist()] for histories in of_sequence)
    return keys, values


def _output_projection(attn: Bounds, wo: torch.Tensor, residual: Bounds, profile: Profile) -> Bounds:
    product = bounds.projection(attn, wo)
    if profile.makes("branch") and not profile.modelled:
        return bounds.add(bounds.optional_rounding(product, profile, "branch"), residual)
    # A sum in any order: the residual may be its first term, as where a product is accumulated onto what lies there.
    return bounds.accumulated_onto(residual, bounds.optional_rounding(product, profile, "branch"), wo.shape[0])


def o_proj(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``out``: projection plus residual."""
    attn, residual = bounds.exact(inputs["attn"]), bounds.exact(inputs["residual"])
    return {"out": bounds.optional_rounding(_output_projection(attn, inputs["wo"], residual, profile), profile, "result")}


def _mlp_of(gate: Bounds, up: Bounds, w_down: torch.Tensor, profile: Profile) -> Bounds:
    gate = bounds.optional_rounding(gate, profile, "gate")
    up = bounds.optional_rounding(up, profile, "up")
    activation = bounds.rounding(bounds.silu_times(gate, up, profile), profile, "activation")
    return bounds.optional_rounding(bounds.projection(activation, w_down), profile, "branch")


def mlp(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``out``: SwiGLU."""
    x = bounds.exact(inputs["x"])
    gate, up = (bounds.projection(x, inputs[name]) for name in ("w_gate", "w_up"))
    return {"out": _mlp_of(gate, up, inputs["w_down"], profile)}


def head(hidden: Bounds, inputs: Tensors, dims: Dims, profile: Profile) -> Bounds:
    """Logits ``[N, V]`` of hidden states ``[N, H]``, before their cast to fp32."""
    (logits,) = bounds.norm_and_projections(
        hidden, inputs["final_norm_weight"], [inputs["lm_head_weight"].T], dims.eps, profile, "final norm"
    )
    return bounds.optional_rounding(logits, profile, "logits")


def lm_head(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``logits``: final norm and vocabulary projection."""
    return {"logits": head(bounds.exact(inputs["hidden"]), inputs, dims, profile)}


def greedy_sample(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """``token_ids``: an index, exact."""
    (token_ids,) = reference.greedy_sample(inputs["logits"], dims=dims, a=EXACT)
    return {"token_ids": bounds.exact(token_ids)}


def _layer(
    hidden: Bounds, weights: Tensors, caches: list[torch.Tensor], tables: Tensors, layout: Layout, profile: Profile
) -> tuple[Bounds, Bounds, Bounds]:
    """The new key rows and value rows ``[N, NKV, D]`` and the hidden states ``[N, H]``, each before its cast."""
    dims, tokens = layout.dims, hidden.value.shape[0]
    q, k, v = bounds.norm_and_projections(
        hidden, weights["input_rms_weight"], [weights["wq"], weights["wk"], weights["wv"]], dims.eps, profile, "input norm"
    )
    q, k, v = (bounds.optional_rounding(tensor, profile, "projection") for tensor in (q, k, v))
    q = _rotated(_heads_normalised(q, weights["q_norm_weight"], dims, profile), layout.length, tables, dims, profile)
    k = _rotated(_heads_normalised(k, weights["k_norm_weight"], dims, profile), layout.length, tables, dims, profile)
    q, k_row, v_row = (tensor.reshape(tokens, heads, dims.D) for tensor, heads in ((q, dims.NH), (k, dims.NKV), (v, dims.NKV)))
    attn = attention_bounds(
        bounds.rounding(q, profile),
        *_histories(layout, *caches),
        layout.length.tolist(),
        dims.scale,
        profile,
        _new_rows(bounds.rounding(k_row, profile), bounds.rounding(v_row, profile), layout),
    ).reshape(tokens, dims.NH * dims.D)
    residual = _output_projection(bounds.rounding(attn, profile), weights["wo"], hidden, profile)
    residual = bounds.optional_rounding(residual, profile, "residual", tie_prone=True)
    gate, up = bounds.norm_and_projections(
        residual, weights["post_rms_weight"], [weights["w_gate"], weights["w_up"]], dims.eps, profile, "post norm"
    )
    branch = _mlp_of(gate, up, weights["w_down"], profile)
    return k_row, v_row, bounds.add(branch, residual)


def _new_rows(key: Bounds, value: Bounds, layout: Layout) -> list[NewRows]:
    """For every token the rows that its sequence's tokens up to itself have just written, of ``[N, NKV, D]``."""
    found: list[NewRows] = [None] * len(layout.sequence)  # type: ignore[list-item]
    for b in range(layout.dims.B):
        own = torch.nonzero(layout.sequence == b).flatten()
        own = own[layout.length[own].argsort()]
        of_key, of_value = (part[own].map(lambda tensor: tensor.transpose(0, 1)) for part in (key, value))
        for place, token in enumerate(own.tolist()):
            found[token] = NewRows(of_key[:, : place + 1], of_value[:, : place + 1])
    return found


def decode_fwd_layers(inputs: Tensors, dims: Dims, profile: Profile) -> dict[str, Bounds]:
    """The cache rows that every layer writes, and ``out`` after the last one; or ``logits``, where there is an LM head."""
    hidden = bounds.exact(inputs["hidden_states"])
    layout = Layout.of(inputs, dims.replace(L=1))
    written = Layout.of(inputs, dims)
    k_rows, v_rows, rows = [], [], []
    for layer in range(dims.L):
        caches = [layer_of(inputs[name], layer, dims.L) for name in ("k_cache", "v_cache")]
        if layer:
            hidden = bounds.rounding(hidden, profile)
        k_row, v_row, hidden = _layer(hidden, weights_of(inputs, layer, dims), caches, inputs, layout, profile)
        k_rows.append(k_row.reshape(-1, dims.D))
        v_rows.append(v_row.reshape(-1, dims.D))
        rows.append(written.rows(layer))

    def stacked(parts: list[Bounds]) -> Bounds:
        joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("value", "variance", "worst")]
        return Bounds(joined[0], joined[1], joined[2], rows=torch.cat(rows))

    found = {"k_cache": stacked(k_rows), "v_cache": stacked(v_rows)}
    if "lm_head_weight" not in inputs:
        return {**found, "out": hidden}
    last = bounds.rounding(hidden[layout.last], profile)
    return {**found, "logits": head(last, inputs, dims, profile)}


# As in the reference, the layouts say what differs; one layer is a chain of one.
decode_layer = paged_decode_layer = prefill_layer = decode_fwd_layers
decode_fwd = paged_decode_fwd = prefill_fwd = decode_fwd_layers
