"""The data a Qwen3 stage is judged on, by regime. No single regime shows every fault; each docstring says what its own shows.

Norm weights are around 1 with spread 0.3, every layer different, and in most cases bf16 numbers; projections are scaled so that
each sublayer contributes about as much as the residual stream brings (a fault in a branch of a few percent would drown in honest
rounding). Rows of a cache that must not be read hold finite garbage where a legal kernel may multiply them by a zero probability,
NaN where none may.
"""

from __future__ import annotations

import torch

from conformance.cases.source import Source
from conformance.contract.dims import Dims
from conformance.kernels.qwen3 import reference
from conformance.kernels.qwen3.layout import Layout, contiguous
from conformance.kernels.qwen3.rotation import rotation_table
from conformance.numerics.arithmetic import EXACT

Tensor = torch.Tensor
Inputs = dict[str, Tensor]

REGIMES: dict[str, str] = {
    "normal": "bell-shaped values of unit size",
    "small": "activations near 1e-3, and so in a layer what its norms are given: only here does eps matter",
    "outlier": "2% of the channels 100 times larger: a lost channel or a narrow format shows",
    "cancel": "sums that nearly cancel: a lost or doubled partial sum shows, and accumulation in bf16",
    "constant": "every value of a row equal: errors cannot average out",
    "heavy_tail": "rare values 30 times the rest; a layer's gates over 88",
    "mixed_rows": "every row of another magnitude: a value taken from another row shows",
    "length_one": "every sequence at its first token",
    "long": "every sequence near the maximum length",
    "needle": "one key dominates: the first, the last, at a page's edge, or just past the end, where it must not be seen",
    "ties": "the largest logit at several places: the lowest index is right",
    "near_ties": "two largest logits one step of fp32 apart: a comparison in a narrower format shows",
    "edges": "the largest logit in the first or last column, or beside a tile's edge",
    "negative": "all logits negative, some rows near -1e4 or -1e31: a padded column, or where a maximum starts, would win",
    "low": "every score of some heads far below zero: a running maximum that starts at zero or at -100 makes all of them vanish",
    "big": "values near 1e5, scores or a layer's gates over 88: overflow, clamps, softmax without subtracting the maximum",
}

BF16 = torch.bfloat16
#: In one case of so many, by its seed, norm weights are fp32 numbers that bf16 cannot hold.
WIDE_WEIGHTS = 3
#: Contents of cache rows past a sequence's length.
GARBAGE_KEY, GARBAGE_VALUE = 1e2, 1e4
#: The score of a key that a layer's query singles out, in every other sequence: above 88, where exp overflows in fp32.
NEEDLE_SCORE = 100.0


def _shaped(x: Tensor, regime: str, source: Source, name: str) -> Tensor:
    """Activations ``[B, n]`` (float64) in the manner of a regime."""
    if regime == "small":
        return x * 1e-3
    if regime == "outlier":
        chosen = source.permutation(name + ".outliers", x.shape[-1])[: max(1, x.shape[-1] // 50)]
        x = x.clone()
        x[:, chosen] *= 100
        return x
    if regime == "constant":
        return x[:, :1].expand_as(x).clone()
    if regime == "heavy_tail":
        return x / (source.uniform(name + ".tail", x.shape) * 0.999 + 0.001).sqrt()
    if regime == "mixed_rows":
        order = source.permutation(name + ".rows", x.shape[0])
        magnitude = torch.tensor([10.0 ** -(rank % 5) for rank in order], dtype=torch.float64)
        return x * magnitude.unsqueeze(1)
    if regime == "big":
        return x * 1e5
    return x


def _activations(source: Source, name: str, shape: tuple[int, ...], regime: str) -> Tensor:
    return _shaped(source.normal(name, shape), regime, source, name)


def _norm_weight(source: Source, name: str, shape: tuple[int, ...]) -> Tensor:
    """Checkpoints hold them in bf16, and so do these in most cases: a kernel that does so too loses nothing there."""
    weight = (1 + 0.3 * source.normal(name, shape)).float()
    return weight if source.seed % WIDE_WEIGHTS == 1 else weight.to(BF16).float()


def _weight(source: Source, name: str, depth: int, width: int, gain: float = 1.0, layers: int = 1) -> Tensor:
    return source.grid(name, (layers * depth, width), gain * depth**-0.5)


def rms_norm(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    weight = _norm_weight(source, "weight", (1, dims.H))
    x = _activations(source, "x", (dims.B, dims.H), regime)
    return {"x": x.to(BF16), "weight": weight}


def _cancelling_pairs(x: Tensor, *weights: Tensor) -> Tensor:
    # Neighbouring channels see the same weights and carry nearly opposite values: each product's partner all but cancels it.
    x = x.clone()
    pairs = x.shape[-1] // 2 * 2
    x[:, 1:pairs:2] = -x[:, 0:pairs:2] * (1 + 2.0**-6)
    for weight in weights:
        weight[1:pairs:2] = weight[0:pairs:2]
    return x


def qkv_proj(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    x = _activations(source, "x", (dims.B, dims.H), regime)
    widths = {"wq": dims.NH * dims.D, "wk": dims.NKV * dims.D, "wv": dims.NKV * dims.D}
    weights = {name: _weight(source, name, dims.H, width) for name, width in widths.items()}
    if regime == "cancel":
        x = _cancelling_pairs(x, *weights.values())
    return {"x": x.to(BF16), **weights}


def qk_norm(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    return {
        "q": _activations(source, "q", (dims.B, dims.NH * dims.D), regime).float(),
        "k": _activations(source, "k", (dims.B, dims.NKV * dims.D), regime).float(),
        "q_norm_weight": _norm_weight(source, "q_norm_weight", (1, dims.D)),
        "k_norm_weight": _norm_weight(source, "k_norm_weight", (1, dims.D)),
    }


def _rope_tables(dims: Dims) -> Inputs:
    cosine, sine = rotation_table(dims.S, dims.D, dims.theta)
    return {"rope_cos": cosine.float(), "rope_sin": sine.float()}


def rope(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    return {
        "q": _activations(source, "q", (dims.B, dims.NH * dims.D), regime).float(),
        "k": _activations(source, "k", (dims.B, dims.NKV * dims.D), regime).float(),
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        **_rope_tables(dims),
    }


def _every_size(source: Source, name: str, shape: tuple[int, ...]) -> Tensor:
    """Finite bf16 values of all exponents alike, subnormals too: rows that must keep their bits pass through no other format."""
    infinity = 0x7F80
    magnitude = (source.uniform(name, shape) * infinity).to(torch.int16)
    sign = (source.uniform(name + ".sign", shape) < 0.5).to(torch.int16) << 15
    return (magnitude | sign).view(BF16)


def kv_write(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    pages_of = [-(-length // dims.BS) for length in seq_lens]
    # The last page belongs to nobody: indexing with -1 would read it.
    free = source.permutation("pages", dims.NB - 1)
    slots, owned = [], []
    for length, pages in zip(seq_lens, pages_of, strict=True):
        mine, free = free[:pages], free[pages:]
        owned.extend(mine)
        slots.append(mine[-1] * dims.BS + (length - 1) % dims.BS)
    caches = {}
    for name in ("k_cache", "v_cache"):
        shape = (dims.L, dims.NB, dims.NKV * dims.BS, dims.D)
        cache = torch.full(shape, float("nan"), dtype=BF16)
        cache[:, owned] = _every_size(source, name, (dims.L, len(owned), dims.NKV * dims.BS, dims.D))
        caches[name] = cache.view(-1, dims.D)
    return {
        "k": _activations(source, "k", (dims.B, dims.NKV * dims.D), regime).to(BF16),
        "v": _activations(source, "v", (dims.B, dims.NKV * dims.D), regime).float(),
        "slot_mapping": torch.tensor(slots, dtype=torch.int32),
        **caches,
    }


def _history(
    source: Source, name: str, dims: Dims, valid: list[int], scale: float, garbage: float, regime: str = "normal"
) -> Tensor:
    """A contiguous cache ``[L*B*NKV*S, D]``: ``valid[b]`` rows of history for each sequence, garbage after them."""
    shape = (dims.L, dims.B, dims.NKV, dims.S, dims.D)
    cache = source.grid(name, shape, scale)
    if regime in ("small", "outlier", "heavy_tail", "constant"):
        flat = cache.reshape(-1, dims.D).double()
        cache = _shaped(flat, regime, source, name).to(BF16).view(shape)
    elif regime == "big":
        cache = (cache.double() * 1e5).to(BF16)
    stale = torch.arange(dims.S).unsqueeze(0) >= torch.tensor(valid).unsqueeze(1)  # [B, S]
    filler = (source.grid(name + ".garbage", shape, 1.0).float() * garbage).to(BF16)
    return torch.where(stale.view(1, dims.B, 1, dims.S, 1), filler, cache).view(-1, dims.D)


def attention(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    valid = list(seq_lens)
    on_values = regime if regime in ("small", "outlier", "heavy_tail", "constant", "big") else "normal"
    k_cache = _history(source, "k_cache", dims, valid, 1.0, GARBAGE_KEY)
    v_cache = _history(source, "v_cache", dims, valid, 1.0, GARBAGE_VALUE, on_values)
    q = source.normal("q", (dims.B, dims.NH * dims.D))
    if regime == "big":
        q = q * 40
    elif regime in ("small", "heavy_tail", "mixed_rows"):
        q = _shaped(q, regime, source, "q")
    if regime == "low":
        # Keys have a common part, and every other head asks for its opposite: scores near -340 (D = 32) or -680 (D = 128).
        common = 1.5 * (source.grid("common", (dims.D,), 1.0).double().sign() + 0.5).sign()
        k_cache = (k_cache.double() + common).to(BF16)
        heads = q.view(dims.B, dims.NH, dims.D)
        heads[:, 1::2] = -40 * common.sign() * (1 + 0.1 * heads[:, 1::2])
    if regime == "cancel" and dims.S > 1:
        # Neighbouring positions share a key and carry opposite values; only an odd last one is left over.
        keys, values = (contiguous(cache, dims) for cache in (k_cache, v_cache))
        for b, length in enumerate(valid):
            pairs = length // 2 * 2
            keys[:, b, :, 1:pairs:2] = keys[:, b, :, 0:pairs:2]
            values[:, b, :, 1:pairs:2] = -values[:, b, :, 0:pairs:2]
    if regime == "needle":
        keys = contiguous(k_cache, dims)[0].double()
        heads = q.view(dims.B, dims.NKV, dims.G, dims.D)
        spots = _needle_positions(dims, seq_lens, source)
        for b, per_head in enumerate(spots):
            for head, position in enumerate(per_head):
                kv_head, member = divmod(head, dims.G)
                key = keys[b, kv_head, position]
                # 1.2 times the key scores far above any other key; a garbage key is brought down to the size of a real one.
                heads[b, kv_head, member] = key * (1.2 if position < valid[b] else 1.2 / GARBAGE_KEY)
    return {
        "q": q.to(BF16),
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "k_cache": k_cache,
        "v_cache": v_cache,
    }


def _needle_positions(dims: Dims, seq_lens: tuple[int, ...], source: Source) -> list[list[int]]:
    """For every sequence and query head, which position's key dominates; position ``seq_len`` is just past the end."""
    shift = source.integers("needle", 0, 1 << 20, dims.B)
    chosen = []
    for length, offset in zip(seq_lens, shift, strict=True):
        edge = (length - 1) // dims.BS * dims.BS  # the first row of the last page
        spots = [length - 1, 0, edge, max(edge - 1, 0), min(length, dims.S - 1), max(length - 2, 0)]
        chosen.append([spots[(head + offset) % len(spots)] for head in range(dims.NH)])
    return chosen


def o_proj(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    attended = dims.NH * dims.D
    wo = _weight(source, "wo", attended, dims.H)
    attn = _activations(source, "attn", (dims.B, attended), regime).to(BF16)
    residual = _activations(source, "residual", (dims.B, dims.H), regime).to(BF16)
    if regime == "cancel":
        attn = source.grid("attn", (dims.B, attended), 1.0)
        residual = -EXACT.matmul(attn.double(), wo).to(BF16)
    return {"attn": attn, "wo": wo, "residual": residual}


def mlp(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    x = _activations(source, "x", (dims.B, dims.H), regime)
    w_gate, w_up = (_weight(source, name, dims.H, dims.I) for name in ("w_gate", "w_up"))
    w_down = _weight(source, "w_down", dims.I, dims.H)
    if regime == "cancel":
        x = _cancelling_pairs(x, w_gate, w_up)
    return {"x": x.to(BF16), "w_gate": w_gate, "w_up": w_up, "w_down": w_down}


def _layer_weights(dims: Dims, regime: str, source: Source) -> Inputs:
    L, H, D = dims.L, dims.H, dims.D
    # What norms are given is small, before heads and in the residual.
    small = 1e-3 if regime == "small" else 1.0
    w_gate, w_down = _weight(source, "w_gate", H, dims.I, 1.0, L), _weight(source, "w_down", dims.I, H, 2 * small, L)
    if regime in ("big", "heavy_tail"):
        # Norms keep whatever comes before them small: only the gates can become large, and what follows makes up for it. Beside
        # a residual near 1e5 alone, whose last rounding drowns the branch, a clamped gate would hardly show.
        w_gate[:, ::8] *= 64
        w_down[::8] /= 64
    return {
        "input_rms_weight": _norm_weight(source, "input_rms_weight", (L, H)),
        "wq": _weight(source, "wq", H, dims.NH * D, small, L),
        "wk": _weight(source, "wk", H, dims.NKV * D, small, L),
        "wv": _weight(source, "wv", H, dims.NKV * D, 1.0, L),
        "q_norm_weight": _norm_weight(source, "q_norm_weight", (L, D)),
        "k_norm_weight": _norm_weight(source, "k_norm_weight", (L, D)),
        # Attention averages values and so shrinks them; wo makes up for it.
        "wo": _weight(source, "wo", dims.NH * D, H, 2 * small, L),
        "w_gate": w_gate,
        "w_up": _weight(source, "w_up", H, dims.I, 1.0, L),
        "w_down": w_down,
        "post_rms_weight": _norm_weight(source, "post_rms_weight", (L, H)),
        **_rope_tables(dims),
    }


def decode_fwd_layers(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    inputs = _layer_weights(dims, regime, source)
    inputs["hidden_states"] = _activations(source, "hidden_states", (dims.B, dims.H), regime).to(BF16)
    inputs["seq_lens"] = torch.tensor(seq_lens, dtype=torch.int32)
    # The current position's row is stale until the layer writes it.
    past = [length - 1 for length in seq_lens]
    inputs["k_cache"] = _history(source, "k_cache", dims, past, 2.0, GARBAGE_KEY)
    inputs["v_cache"] = _history(source, "v_cache", dims, past, 1.0, GARBAGE_VALUE)
    if regime == "needle":
        _plant_needles(inputs, Layout.of(inputs, dims), past, source)
    return inputs


def _plant_needles(inputs: Inputs, layout: Layout, past: list[int], source: Source) -> None:
    """Make keys of the first layer's history that the queries of the last tokens single out, one position a KV head.

    ``past[b]`` rows of history were there before this step.
    """
    dims, last = layout.dims, layout.last
    first = reference.weights_of(inputs, 0, dims)
    (x,) = reference.rms_norm(inputs["hidden_states"][last], first["input_rms_weight"], dims=dims, a=EXACT)
    q, k, _ = reference.qkv_proj(x, first["wq"], first["wk"], first["wv"], dims=dims, a=EXACT)
    q, k = reference.qk_norm(q, k, first["q_norm_weight"], first["k_norm_weight"], dims=dims, a=EXACT)
    tables = inputs["rope_cos"], inputs["rope_sin"]
    q, _ = reference.rope(q, k, layout.seq_lens, *tables, dims=dims, a=EXACT)
    heads = q.view(dims.B, dims.NKV, dims.G, dims.D)
    keys = contiguous(inputs["k_cache"], dims)
    seq_lens = tuple(layout.seq_lens.tolist())
    for b, spots in enumerate(_needle_positions(dims, seq_lens, source)):
        for kv_head in range(dims.NKV):
            position = spots[kv_head * dims.G]
            if not past[b] <= position < seq_lens[b]:  # those rows are the layer's own to write
                query = heads[b, kv_head, 0]
                factor = 1.5 if b % 2 else NEEDLE_SCORE / (dims.scale * float(query.square().sum()))
                keys[0, b, kv_head, position] = (factor * query).to(BF16)


def lm_head(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    return {"hidden": _activations(source, "hidden", (dims.B, dims.H), regime).to(BF16), **_head_weights(dims, source)}


def _head_weights(dims: Dims, source: Source) -> Inputs:
    return {
        "final_norm_weight": _norm_weight(source, "final_norm_weight", (1, dims.H)),
        "lm_head_weight": source.grid("lm_head_weight", (dims.V, dims.H), dims.H**-0.5),
    }


def greedy_sample(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    logits = _activations(source, "logits", (dims.B, dims.V), regime).float()
    largest = logits.amax(-1)
    if regime == "ties":
        # The largest logit stands at several places, some of them next to a tile's edge, the first among the highest indices.
        for b in range(dims.B):
            count = source.integers(f"ties.count/{b}", 2, 4, 1)[0]
            edges = [16 * place - source.integers(f"ties.side/{b}/{place}", 0, 1, 1)[0] for place in range(1, dims.V // 16)]
            places = [*source.integers(f"ties/{b}", 0, dims.V - 1, count), dims.V - 1]
            places += [edges[pick % len(edges)] for pick in source.integers(f"ties.edge/{b}", 0, 1 << 20, 2)] if edges else []
            logits[b, places] = largest[b]
    elif regime == "near_ties":
        # One step of fp32 apart: whoever compares in a narrower format takes the first of them; and where logits are small,
        # whoever compares probabilities.
        logits[0::2] *= 1e-3
        largest = logits.amax(-1)
        places = source.integers("near_ties", 0, dims.V - 1, 2 * dims.B)
        for b, (first, second) in enumerate(zip(places[::2], places[1::2], strict=True)):
            low, high = sorted((first, second))
            logits[b, low] = largest[b]
            logits[b, high] = torch.nextafter(largest[b], torch.tensor(float("inf")))
    elif regime == "edges":
        # The largest in the last column, the first one, or beside a tile's edge.
        spots = [dims.V - 1, 0, min(dims.V - 1, 511), min(dims.V - 1, 512), dims.V // 2, max(dims.V - 2, 0)]
        shift = source.integers("edges", 0, 5, 1)[0]
        for b in range(dims.B):
            logits[b, spots[(b + shift) % len(spots)]] = largest[b] + 1
    elif regime == "negative":
        # What a padded column holds, zero, would be larger than any of them, and so would a maximum that starts at some -1e30.
        # The first row shows all of this, so that a batch of one does.
        magnitude = torch.tensor([(1e31, 1e4, 1.0)[b % 3] for b in range(dims.B)])
        logits = -(logits.abs() + 1) * magnitude.unsqueeze(1)
    return {"logits": logits}


def decode_fwd(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    return {**decode_fwd_layers(dims, seq_lens, regime, source), **_head_weights(dims, source)}


# Paged caches: the contiguous data of the same case, cut into pages


def _pages(dims: Dims, seq_lens: tuple[int, ...], written: list[int], source: Source) -> Tensor:
    """A block table ``[B, MB]``: every sequence's pages in random order, ``-1`` past its last one.

    The last page belongs to nobody: indexing with -1 would read it. In two cases of three, sequences share the pages that start
    their histories, as after a common prompt: whole pages only, and none that this step writes to. ``written[b]`` is the first
    position that the step writes.
    """
    free = source.permutation("pages", dims.NB - 1)
    table = torch.full((dims.B, dims.MB), -1, dtype=torch.int32)
    shared = source.integers("shared", 0, 2, 1)[0] != 1
    first = 0
    for b, length in enumerate(seq_lens):
        count = -(-length // dims.BS)
        table[b, :count] = torch.tensor(free[:count], dtype=torch.int32)
        free = free[count:]
        common = min(written[b], written[first]) // dims.BS
        if shared and b > 0 and common > 0:
            free += table[b, :common].tolist()
            table[b, :common] = table[first, :common]
    return table


def _paged(
    inputs: Inputs, dims: Dims, seq_lens: tuple[int, ...], source: Source, chunk_lens: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """The inputs with their contiguous caches cut into pages of a pool, and the block table.

    Pages that nobody owns hold NaN.
    """
    written = [length - chunk for length, chunk in zip(seq_lens, chunk_lens or (1,) * dims.B, strict=True)]
    table = _pages(dims, seq_lens, written, source)
    paged = dict(inputs)
    beyond = dims.MB * dims.BS - dims.S
    for name, garbage in (("k_cache", GARBAGE_KEY), ("v_cache", GARBAGE_VALUE)):
        by_sequence = contiguous(inputs[name], dims)  # [L, B, NKV, S, D]
        if beyond:
            shape = (dims.L, dims.B, dims.NKV, beyond, dims.D)
            filler = (source.grid(name + ".beyond", shape, 1.0).float() * garbage).to(BF16)
            by_sequence = torch.cat([by_sequence, filler], 3)
        pieces = by_sequence.view(dims.L, dims.B, dims.NKV, dims.MB, dims.BS, dims.D).permute(0, 1, 3, 2, 4, 5)
        cache = torch.full((dims.L, dims.NB, dims.NKV, dims.BS, dims.D), float("nan"), dtype=BF16)
        for b in reversed(range(dims.B)):  # a shared page holds what its first owner wrote
            owned = table[b][table[b] >= 0].long()
            cache[:, owned] = pieces[:, b, : len(owned)]
        paged[name] = cache.view(-1, dims.D)
    return {**paged, "block_table": table.view(-1)}


def _slots(table: Tensor, positions: Tensor, sequence: Tensor, dims: Dims) -> Tensor:
    """The cache slot of each token: ``[N]`` i32."""
    pages = table.view(dims.B, dims.MB)[sequence, positions // dims.BS].long()
    return (pages * dims.BS + positions % dims.BS).to(torch.int32)


def paged_attention(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    return _paged(attention(dims, seq_lens, regime, source), dims, seq_lens, source)


def _decode_paged(inputs: Inputs, dims: Dims, seq_lens: tuple[int, ...], source: Source) -> Inputs:
    paged = _paged(inputs, dims, seq_lens, source)
    position = paged["seq_lens"].long() - 1
    paged["slot_mapping"] = _slots(paged["block_table"], position, torch.arange(dims.B), dims)
    return paged


def paged_decode_layer(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    return _decode_paged(decode_fwd_layers(dims, seq_lens, regime, source), dims, seq_lens, source)


def paged_decode_fwd(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source) -> Inputs:
    return _decode_paged(decode_fwd(dims, seq_lens, regime, source), dims, seq_lens, source)


def prefill_layer(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source, *, chunk_lens: tuple[int, ...]) -> Inputs:
    # Chunks are packed without gaps, in any order of the sequences.
    offsets, start = [0] * dims.B, 0
    for b in source.permutation("packing", dims.B):
        offsets[b] = start
        start += chunk_lens[b]
    inputs = _layer_weights(dims, regime, source)
    inputs["hidden_states"] = _activations(source, "hidden_states", (dims.T, dims.H), regime).to(BF16)
    for name, lengths in (("seq_lens", seq_lens), ("chunk_lens", chunk_lens), ("chunk_offsets", offsets)):
        inputs[name] = torch.tensor(lengths, dtype=torch.int32)
    past = [length - chunk for length, chunk in zip(seq_lens, chunk_lens, strict=True)]
    inputs["k_cache"] = _history(source, "k_cache", dims, past, 2.0, GARBAGE_KEY)
    inputs["v_cache"] = _history(source, "v_cache", dims, past, 1.0, GARBAGE_VALUE)
    layout = Layout.of(inputs, dims)
    if regime == "needle":
        _plant_needles(inputs, layout, past, source)
    paged = _paged(inputs, dims, seq_lens, source, chunk_lens)
    paged["slot_mapping"] = _slots(paged["block_table"], layout.length - 1, layout.sequence, dims)
    return paged


def prefill_fwd(dims: Dims, seq_lens: tuple[int, ...], regime: str, source: Source, *, chunk_lens: tuple[int, ...]) -> Inputs:
    return {**prefill_layer(dims, seq_lens, regime, source, chunk_lens=chunk_lens), **_head_weights(dims, source)}


def packed_rows(inputs: Inputs, dims: Dims, rows: tuple[int, ...]) -> Inputs:
    """A prefill's arguments by token or chunk, for the chosen sequences in the order given; their chunks follow one another."""
    offsets, counts = inputs["chunk_offsets"].tolist(), inputs["chunk_lens"].tolist()
    tokens = torch.cat([torch.arange(offsets[b], offsets[b] + counts[b]) for b in rows])
    starts = [sum(counts[b] for b in rows[:place]) for place in range(len(rows))]
    return {
        "hidden_states": inputs["hidden_states"][tokens],
        "slot_mapping": inputs["slot_mapping"][tokens],
        "chunk_offsets": torch.tensor(starts, dtype=torch.int32),
    }


decode_layer = decode_fwd_layers
