"""Legal PyPTO kernels that compute otherwise than the bundled ones: other tiles, orders, formulas and optional roundings."""

from __future__ import annotations

from typing import Any

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.pypto.softmax import block_step, read_whole_blocks, rounded
from conformance.kernels.qwen3.exam.pypto.weaving import legal

Tensor = Any
Scalar = Any


# Tiles


@legal.edits("rms_norm", "qk_norm", "rope", "decode_layer")
def small_vector_tiles(fragments: Any) -> None:
    """Vector tiles hold an eighth of what they could."""
    fragments.VECTOR_TILE_ELEMENTS = 1024


@legal.edits("qkv_proj", "mlp", "lm_head", "decode_layer")
def small_cube_tiles(fragments: Any) -> None:
    """Products go by cube tiles of 16 x 64 x 64."""

    def set_cube_tiles(rows: int, inner: int, columns: int) -> None:
        fragments.pypto.set_cube_tile_shapes([16, 16], [64, 64], [64, 64])

    fragments.set_cube_tiles = set_cube_tiles


@legal.edits("prefill_layer")
def tiles_of_4_tokens(fragments: Any) -> None:
    """A prefill takes 4 tokens through the layer at a time."""

    def tile_tokens(dims: Dims) -> int:
        return 4

    fragments.tile_tokens = tile_tokens


# Norms


@legal.edits("rms_norm", "qk_norm", "lm_head", "decode_layer")
def rsqrt(fragments: Any) -> None:
    """The norm multiplies by rsqrt, and sums before it divides by the count."""
    pypto = fragments.pypto

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = pypto.mul(pypto.sum(pypto.mul(x, x), -1, True), 1.0 / x.shape[-1])
        return pypto.mul(pypto.mul(x, pypto.rsqrt(pypto.add(mean_square, eps))), weight)

    fragments.rms_norm = rms_norm


@legal.edits("rms_norm")
def inverse(fragments: Any) -> None:
    """The norm multiplies by one over the root, and by gamma first."""
    pypto = fragments.pypto

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = pypto.sum(pypto.mul(pypto.mul(x, x), 1.0 / x.shape[-1]), -1, True)
        return pypto.mul(pypto.mul(x, weight), pypto.reciprocal(pypto.sqrt(pypto.add(mean_square, eps))))

    fragments.rms_norm = rms_norm


@legal.edits("rms_norm", "qk_norm", "lm_head")
def normalised_rounded(fragments: Any) -> None:
    """The normalised value is rounded to bf16 before gamma."""
    pypto = fragments.pypto

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = pypto.sum(pypto.mul(pypto.mul(x, x), 1.0 / x.shape[-1]), -1, True)
        return pypto.mul(rounded(fragments, pypto.div(x, pypto.sqrt(pypto.add(mean_square, eps)))), weight)

    fragments.rms_norm = rms_norm


@legal.edits("lm_head")
def deferred_norm(fragments: Any) -> None:
    """The logits are divided by the root mean square, not the hidden states."""
    pypto = fragments.pypto

    def lm_head(hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, dims: Dims) -> Tensor:
        fragments.set_vector_tiles(dims.B, dims.H)
        x = pypto.cast(hidden, pypto.DT_FP32)
        mean_square = pypto.sum(pypto.mul(pypto.mul(x, x), 1.0 / dims.H), -1, True)
        root = pypto.sqrt(pypto.add(mean_square, dims.eps))
        weighted = pypto.cast(pypto.mul(x, final_norm_weight), pypto.DT_BF16)
        fragments.set_cube_tiles(dims.B, dims.H, dims.V)
        logits = pypto.matmul(weighted, lm_head_weight, pypto.DT_FP32, b_trans=True)
        fragments.set_vector_tiles(dims.B, dims.V)
        return pypto.div(logits, root)

    fragments.lm_head = lm_head


@legal.computes("lm_head")
def normalised_in_fp32(
    fragments: Any, hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, logits: Tensor, dims: Dims
) -> None:
    """The normalised states go into the product in fp32."""
    pypto = fragments.pypto
    fragments.set_vector_tiles(dims.B, dims.H)
    normalised = fragments.rms_norm(pypto.cast(hidden, pypto.DT_FP32), final_norm_weight, dims.eps)
    fragments.set_vector_tiles(dims.V, dims.H)
    wide = pypto.cast(lm_head_weight, pypto.DT_FP32)
    pypto.set_cube_tile_shapes([16, 16], [64, 64], [64, 64])
    logits[:] = pypto.matmul(normalised, wide, pypto.DT_FP32, b_trans=True)


@legal.edits("decode_layer", name="deferred_norm")
def deferred_input_norm(fragments: Any) -> None:
    """q, k and v are divided by the root mean square of the layer's input, not the input."""
    pypto = fragments.pypto

    def before_attention(hidden_states: Tensor, weights: Any, dims: Dims, layer: Scalar = 0) -> tuple[Tensor, Tensor, Tensor]:
        fragments.set_vector_tiles(dims.B, dims.H)
        x = pypto.cast(hidden_states, pypto.DT_FP32)
        mean_square = pypto.sum(pypto.mul(pypto.mul(x, x), 1.0 / dims.H), -1, True)
        root = pypto.sqrt(pypto.add(mean_square, dims.eps))
        weighted = pypto.cast(pypto.mul(x, fragments.layer_rows(weights.input_rms_weight, layer)), pypto.DT_BF16)
        fragments.set_cube_tiles(dims.B, dims.H, dims.NH * dims.D)
        q, k, v = (
            pypto.div(pypto.matmul(weighted, fragments.layer_rows(weight, layer, dims.H), pypto.DT_FP32), root)
            for weight in (weights.wq, weights.wk, weights.wv)
        )
        return q, k, v

    fragments.before_attention = before_attention


# Rotation


@legal.edits("rope", "decode_layer")
def rounded_before_rope(fragments: Any) -> None:
    """q and k are rounded to bf16 between norm and rotation."""
    right = fragments.rotate

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
        fragments.set_vector_tiles(dims.B, x.shape[1])
        return right(rounded(fragments, x), cos, sin, dims)

    fragments.rotate = rotate


@legal.edits("rope")
def second_half_of_the_tables(fragments: Any) -> None:
    """Sine and cosine are read from the second half of the tables' rows."""
    pypto, right = fragments.pypto, fragments.rope_rows

    def rope_rows(
        rope_cos: Tensor, rope_sin: Tensor, seq_lens: Tensor, dims: Dims, batch: Scalar | None = None
    ) -> tuple[Tensor, Tensor]:
        half = dims.D // 2
        fragments.set_vector_tiles(dims.S, dims.D)
        second = (pypto.mul(pypto.view(table, [dims.S, half], [0, half]), 1.0) for table in (rope_cos, rope_sin))
        rows: tuple[Tensor, Tensor] = right(*second, seq_lens, dims, batch)
        return rows

    fragments.rope_rows = rope_rows


# Attention


def _blocks_of(rows: int) -> Any:
    def edit(fragments: Any) -> None:
        def block_rows(dims: Dims) -> int:
            return min(rows, dims.S)

        fragments.block_rows = block_rows

    return edit


@legal.edits("attention")
def blocks_of_8(fragments: Any) -> None:
    """Attention reads 8 rows at a time."""
    _blocks_of(8)(fragments)


@legal.edits("attention", "decode_layer")
def blocks_of_16(fragments: Any) -> None:
    """Attention reads 16 rows at a time."""
    _blocks_of(16)(fragments)


@legal.edits("attention")
def one_block(fragments: Any) -> None:
    """Attention reads all rows at once: an ordinary softmax."""
    _blocks_of(1 << 20)(fragments)


@legal.edits("attention", "paged_attention")
def probabilities_in_fp32(fragments: Any) -> None:
    """The probabilities are not rounded: the second product is one of fp32 values."""
    fragments.attend_block = block_step(fragments, rounded=False)


@legal.edits("attention", "paged_attention")
def denominator_of_rounded(fragments: Any) -> None:
    """The denominator adds up the rounded probabilities."""
    fragments.attend_block = block_step(fragments, sums_rounded=True)


@legal.edits("attention")
def rounded_after_division(fragments: Any) -> None:
    """All rows are one block, and the probabilities are divided by their sum before they are rounded."""
    _blocks_of(1 << 20)(fragments)
    fragments.attend_block = block_step(fragments, normalised_first=True)


def _low_score(fragments: Any, seen: Tensor) -> Tensor:
    """0 where a score is seen, and a large negative number where it is not."""
    pypto = fragments.pypto
    return pypto.mul(pypto.sub(seen, 1.0), -fragments.NO_SCORE)


@legal.edits("paged_attention")
def whole_pages_masked_by_adding(fragments: Any) -> None:
    """The last page is read to its end, and a large negative number added to the scores past the sequence's."""
    pypto = fragments.pypto
    read_whole_blocks(fragments, lambda scores, seen: pypto.add(scores, _low_score(fragments, seen)))


@legal.edits("paged_attention")
def whole_pages_masked_by_replacing(fragments: Any) -> None:
    """The last page is read to its end, and the scores past the sequence's are replaced by a large negative number."""
    pypto = fragments.pypto
    read_whole_blocks(fragments, lambda scores, seen: pypto.add(pypto.mul(scores, seen), _low_score(fragments, seen)))


@legal.edits("paged_attention")
def pages_backwards(fragments: Any) -> None:
    """Pages are visited from the last to the first."""
    pypto = fragments.pypto
    read_whole_blocks(fragments, lambda scores, seen: pypto.add(scores, _low_score(fragments, seen)), backwards=True)


# Writing to the cache


@legal.computes("kv_write")
def rows_in_another_order(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """The last sequence comes first, and values before keys."""
    pypto = fragments.pypto
    fragments.set_vector_tiles(dims.B, dims.NKV * dims.D)
    rounded = pypto.cast(v, pypto.DT_BF16)
    for source, cache in ((rounded, v_cache), (k, k_cache)):
        for b in reversed(range(dims.B)):
            for kv_head in reversed(range(dims.NKV)):
                slot = slot_mapping[b]
                row = fragments.page_row(dims, 0, slot // dims.BS, kv_head) + slot % dims.BS
                pypto.assemble(pypto.view(source, [1, dims.D], [b, kv_head * dims.D]), [row, 0], cache)


@legal.computes("kv_write")
def loop_over_sequences(
    fragments: Any, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, dims: Dims
) -> None:
    """A loop on the device writes one sequence's rows a trip."""
    pypto = fragments.pypto
    cache = fragments.PagedCache(None, None, k_cache, v_cache)
    fragments.set_vector_tiles(dims.B, dims.NKV * dims.D)
    fragments.write_slots(k, pypto.cast(v, pypto.DT_BF16), slot_mapping, dims.B, cache, dims)


# Projections


def _by_k_parts(fragments: Any, x: Tensor, weight: Tensor, parts: int) -> Tensor:
    """``x @ weight`` as products over ``parts`` parts of K, added up in fp32 from the last to the first."""
    pypto, total = fragments.pypto, None
    depth = x.shape[1] // parts
    for part in reversed(range(parts)):
        product = pypto.matmul(
            pypto.view(x, [x.shape[0], depth], [0, part * depth]),
            pypto.view(weight, [depth, weight.shape[1]], [part * depth, 0]),
            pypto.DT_FP32,
        )
        total = product if total is None else pypto.add(total, product)
    return total


@legal.computes("qkv_proj")
def k_in_four_parts(
    fragments: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, q: Tensor, k: Tensor, v: Tensor, dims: Dims
) -> None:
    """Each product is the sum of four, over the parts of K from the last to the first."""
    fragments.set_cube_tiles(dims.B, dims.H, dims.NKV * dims.D)
    fragments.set_vector_tiles(dims.B, dims.H)
    for weight, out in ((wq, q), (wk, k), (wv, v)):
        out[:] = _by_k_parts(fragments, x, weight, 4)


@legal.computes("o_proj")
def k_in_eight_parts(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The product is the sum of eight, added to the residual at the end."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.NH * dims.D, dims.H)
    fragments.set_vector_tiles(dims.B, dims.H)
    out[:] = pypto.add(pypto.cast(residual, pypto.DT_FP32), _by_k_parts(fragments, attn, wo, 8))


@legal.computes("o_proj")
def branch_rounded(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """The product is rounded to bf16 before the residual is added."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.NH * dims.D, dims.H)
    fragments.set_vector_tiles(dims.B, dims.H)
    product = pypto.matmul(attn, wo, pypto.DT_BF16)
    out[:] = pypto.add(pypto.cast(product, pypto.DT_FP32), pypto.cast(residual, pypto.DT_FP32))


@legal.computes("o_proj")
def column_by_column(fragments: Any, attn: Tensor, wo: Tensor, residual: Tensor, out: Tensor, dims: Dims) -> None:
    """A loop makes 64 columns of the result a trip."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.NH * dims.D, 64)
    fragments.set_vector_tiles(dims.B, 64)
    for tile in pypto.loop(dims.H // 64, name="COLUMNS", idx_name="tile"):
        product = pypto.matmul(attn, pypto.view(wo, [dims.NH * dims.D, 64], [0, tile * 64]), pypto.DT_FP32)
        carried = pypto.cast(pypto.view(residual, [dims.B, 64], [0, tile * 64]), pypto.DT_FP32)
        pypto.assemble(pypto.add(product, carried), [0, tile * 64], out)


# The MLP


@legal.edits("mlp", "decode_layer")
def sigmoid(fragments: Any) -> None:
    """silu is the gate times its sigmoid."""
    pypto = fragments.pypto

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return pypto.cast(pypto.mul(pypto.mul(gate, pypto.sigmoid(gate)), up), pypto.DT_BF16)

    fragments.gated = gated


@legal.edits("mlp")
def up_first(fragments: Any) -> None:
    """Gate and up are multiplied first, and then by one over ``1 + exp(-gate)``."""
    pypto = fragments.pypto

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        sigmoid = pypto.reciprocal(pypto.add(pypto.exp(pypto.mul(gate, -1.0)), 1.0))
        return pypto.cast(pypto.mul(pypto.mul(gate, up), sigmoid), pypto.DT_BF16)

    fragments.gated = gated


@legal.edits("mlp", "decode_layer")
def gate_and_up_rounded(fragments: Any) -> None:
    """Gate and up are rounded to bf16 before their product."""
    right = fragments.gated

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return right(rounded(fragments, gate), rounded(fragments, up))

    fragments.gated = gated


@legal.computes("mlp", name="branch_rounded")
def mlp_branch_rounded(fragments: Any, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, out: Tensor, dims: Dims) -> None:
    """The last product is rounded to bf16."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.H, dims.I)
    gate, up = pypto.matmul(x, w_gate, pypto.DT_FP32), pypto.matmul(x, w_up, pypto.DT_FP32)
    fragments.set_vector_tiles(dims.B, dims.I)
    activation = fragments.gated(gate, up)
    fragments.set_cube_tiles(dims.B, dims.I, dims.H)
    fragments.set_vector_tiles(dims.B, dims.H)
    out[:] = pypto.cast(pypto.matmul(activation, w_down, pypto.DT_BF16), pypto.DT_FP32)


@legal.computes("mlp")
def activation_in_fp32(fragments: Any, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, out: Tensor, dims: Dims) -> None:
    """The activation goes into the last product in fp32."""
    pypto = fragments.pypto
    fragments.set_cube_tiles(dims.B, dims.H, dims.I)
    gate, up = pypto.matmul(x, w_gate, pypto.DT_FP32), pypto.matmul(x, w_up, pypto.DT_FP32)
    fragments.set_vector_tiles(dims.B, dims.I)
    activation = pypto.mul(pypto.div(gate, pypto.add(pypto.exp(pypto.mul(gate, -1.0)), 1.0)), up)
    fragments.set_vector_tiles(dims.I, dims.H)
    wide = pypto.cast(w_down, pypto.DT_FP32)
    pypto.set_cube_tile_shapes([16, 16], [64, 64], [64, 64])
    out[:] = pypto.matmul(activation, wide, pypto.DT_FP32)


# Layers


@legal.edits("decode_layer", "decode_fwd_layers")
def roundings_of_hugging_face(fragments: Any) -> None:
    """bf16 wherever Hugging Face's model has it: projections, normalised values, heads' norms, branches, residual."""
    pypto, before, heads, right_gated = (
        fragments.pypto,
        fragments.before_attention,
        fragments.norm_heads,
        fragments.gated,
    )
    normalised_rounded(fragments)
    fragments.attend_block = block_step(fragments, sums_rounded=True)

    def before_attention(hidden_states: Tensor, weights: Any, dims: Dims, layer: Scalar = 0) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (rounded(fragments, x) for x in before(hidden_states, weights, dims, layer))
        return q, k, v

    def norm_heads(x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        normalised = heads(x, weight, dims)
        fragments.set_vector_tiles(dims.B, x.shape[1])
        return rounded(fragments, normalised)

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return right_gated(rounded(fragments, gate), rounded(fragments, up))

    def after_attention(attended: Tensor, hidden_states: Tensor, weights: Any, dims: Dims, layer: Scalar = 0) -> Tensor:
        B, H, I, Q = dims.B, dims.H, dims.I, dims.NH * dims.D  # noqa: E741  the contract's symbol
        fragments.set_vector_tiles(B, H)
        fragments.set_cube_tiles(B, Q, H)
        projected = pypto.matmul(attended, fragments.layer_rows(weights.wo, layer, Q), pypto.DT_FP32)
        hidden = pypto.cast(hidden_states, pypto.DT_FP32)
        residual = rounded(fragments, pypto.add(rounded(fragments, projected), hidden))
        weight = fragments.layer_rows(weights.post_rms_weight, layer)
        y = pypto.cast(fragments.rms_norm(residual, weight, dims.eps), pypto.DT_BF16)
        fragments.set_cube_tiles(B, H, I)
        gate = pypto.matmul(y, fragments.layer_rows(weights.w_gate, layer, H), pypto.DT_FP32)
        up = pypto.matmul(y, fragments.layer_rows(weights.w_up, layer, H), pypto.DT_FP32)
        fragments.set_vector_tiles(B, I)
        activation = fragments.gated(gate, up)
        fragments.set_cube_tiles(B, I, H)
        fragments.set_vector_tiles(B, H)
        branch = pypto.matmul(activation, fragments.layer_rows(weights.w_down, layer, I), pypto.DT_FP32)
        return pypto.cast(pypto.add(rounded(fragments, branch), residual), pypto.DT_BF16)

    fragments.before_attention, fragments.norm_heads, fragments.gated = before_attention, norm_heads, gated
    fragments.after_attention = after_attention


@legal.edits("paged_decode_layer")
def one_write_a_trip(fragments: Any) -> None:
    """A loop writes the rows of one sequence a trip, and attention visits the pages from the last to the first."""
    pypto = fragments.pypto

    def write_slots(k: Tensor, v: Tensor, slot_mapping: Tensor, batch: Scalar, cache: Any, dims: Dims, layer: Scalar = 0) -> None:
        for b in pypto.loop(batch, name="WRITE", idx_name="b"):
            fragments.set_vector_tiles(1, dims.NKV * dims.D)
            for kv_head in range(dims.NKV):
                row = fragments.page_row(dims, layer, slot_mapping[b] // dims.BS, kv_head) + slot_mapping[b] % dims.BS
                pypto.assemble(pypto.view(k, [1, dims.D], [b, kv_head * dims.D]), [row, 0], cache.k_cache)
                pypto.assemble(pypto.view(v, [1, dims.D], [b, kv_head * dims.D]), [row, 0], cache.v_cache)

    fragments.write_slots = write_slots


# The head, and sampling


@legal.computes("lm_head", dims={"B": 3, "V": 512})
def loop_over_the_vocabulary(
    fragments: Any, hidden: Tensor, final_norm_weight: Tensor, lm_head_weight: Tensor, logits: Tensor, dims: Dims
) -> None:
    """A loop makes the logits of 128 tokens a trip."""
    pypto, width = fragments.pypto, 128
    fragments.set_vector_tiles(dims.B, dims.H)
    normalised = pypto.tensor([dims.B, dims.H], pypto.DT_BF16, "normalised")
    normalised[:] = pypto.cast(fragments.rms_norm(pypto.cast(hidden, pypto.DT_FP32), final_norm_weight, dims.eps), pypto.DT_BF16)
    fragments.set_cube_tiles(dims.B, dims.H, width)
    for tile in pypto.loop(dims.V // width, name="VOCABULARY", idx_name="tile"):
        weight = pypto.view(lm_head_weight, [width, dims.H], [tile * width, 0])
        pypto.assemble(pypto.matmul(normalised, weight, pypto.DT_FP32, b_trans=True), [0, tile * width], logits)


@legal.edits("greedy_sample")
def by_tiles(fragments: Any) -> None:
    """Tiles of 128 logits are looked at one after the other, and a later one wins only with a larger logit."""
    pypto = fragments.pypto

    def first_largest(x: Tensor) -> Tensor:
        rows, columns = x.shape
        numbers = fragments.column_numbers(columns)
        fragments.set_vector_tiles(rows, 128)
        best = index = None
        for start in range(0, columns, 128):
            width = min(128, columns - start)
            tile = pypto.mul(pypto.view(x, [rows, width], [0, start]), 1.0)
            own = pypto.view(numbers, [1, width], [0, start])
            largest = pypto.amax(tile, -1, True)
            place = pypto.amin(pypto.where(pypto.eq(tile, largest), own, float(columns)), -1, True)
            if best is None:
                best, index = largest, place
                continue
            index = pypto.where(pypto.gt(largest, best), place, index)
            best = pypto.maximum(best, largest)
        return pypto.cast(index, pypto.DT_INT32)

    fragments.first_largest = first_largest
