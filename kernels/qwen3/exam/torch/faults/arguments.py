"""Faults of what a right kernel is given: another tensor, or the same one reordered."""

from __future__ import annotations

import torch

from conformance.kernels.qwen3.exam.torch.call import Call
from conformance.kernels.qwen3.exam.torch.hooks import CONTIGUOUS_LAYERS, PAGED_LAYERS, PREFILLS, fault

Tensor = torch.Tensor


def _rows_by_sequence(call: Call) -> list[slice]:
    """The rows of each sequence's new tokens: of a prefill a chunk, otherwise one."""
    if "chunk_lens" not in call.tensors:
        return [slice(b, b + 1) for b in range(call.dims.B)]
    starts, counts = call.tensors["chunk_offsets"].tolist(), call.tensors["chunk_lens"].tolist()
    return [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]


# Arguments


@fault("call", "indexing", "decode_fwd", "paged_decode_fwd", "prefill_fwd")
def final_norm_by_the_input_norms_weight(call: Call) -> None:
    """The final norm is applied with the last layer's input norm's weight."""
    call.run(final_norm_weight=call.tensors["input_rms_weight"][-1:])


@fault("call", "indexing", "decode_fwd_layers", "paged_decode_fwd", "prefill_fwd")
def second_norm_by_the_input_norms_weight(call: Call) -> None:
    """The second norm of a layer is applied with the input norm's weight."""
    call.run(post_rms_weight=call.tensors["input_rms_weight"])


@fault("call", "value", "rope", "decode_layer", "paged_decode_layer", "prefill_layer")
def one_table_for_both(call: Call) -> None:
    """The cosine's table is passed for the sine's too."""
    call.run(rope_sin=call.tensors["rope_cos"])


@fault("call", "indexing", "rope", "attention", "paged_attention", "decode_layer", "paged_decode_layer")
def length_one_too_small(call: Call) -> None:
    """Lengths are taken to be the position of the newest token."""
    call.run(seq_lens=(call.tensors["seq_lens"] - 1).clamp_min(1))


@fault("call", "indexing", "attention", "paged_attention", "decode_layer", "paged_decode_layer")
def lengths_shifted(call: Call) -> None:
    """Lengths are read from an array with a leading zero, one entry off."""
    lengths = call.tensors["seq_lens"]
    call.run(seq_lens=torch.minimum(lengths.roll(1), lengths))


@fault("call", "value", "o_proj")
def residual_halved(call: Call) -> None:
    """The residual is halved, as for a sum over two devices."""
    call.run(residual=call.tensors["residual"] / 2)


@fault("call", "value", "o_proj")
def residual_added_by_two_splits(call: Call) -> None:
    """Each of two parts of split-K adds the residual."""
    call.run(residual=call.tensors["residual"] * 2)


@fault("call", "indexing", "o_proj")
def residual_of_another_row(call: Call) -> None:
    """The residual is that of the row before."""
    call.run(residual=call.tensors["residual"].roll(1, 0))


@fault("call", "indexing", "o_proj")
def heads_of_attention_interleaved(call: Call) -> None:
    """The result of attention is read as [D, NH] instead of [NH, D]."""
    heads = call.tensors["attn"].view(call.dims.B, call.dims.NH, call.dims.D)
    call.run(attn=heads.transpose(1, 2).reshape(call.dims.B, -1))


@fault("call", "indexing", "qkv_proj", "o_proj", "mlp", "lm_head", "greedy_sample", *CONTIGUOUS_LAYERS)
def row0_input(call: Call) -> None:
    """Every row reads the first row's input."""
    name = "residual" if call.stage.name == "o_proj" else next(iter(call.read))
    call.run(**{name: call.tensors[name][:1].expand_as(call.tensors[name])})


@fault("call", "indexing", "qkv_proj")
def k_and_v_exchanged(call: Call) -> None:
    """The weights of k and v are exchanged."""
    call.run(wk=call.tensors["wv"], wv=call.tensors["wk"])


@fault("call", "indexing", "qk_norm")
def q_weight_for_k(call: Call) -> None:
    """k is normalised with q's weight."""
    call.run(k_norm_weight=call.tensors["q_norm_weight"])


@fault("call", "indexing", "o_proj")
def weight_transposed(call: Call) -> None:
    """A square weight is used transposed."""
    wo = call.tensors["wo"]
    call.run(wo=wo.T.reshape(wo.shape))


@fault("call", "indexing", "lm_head")
def weight_not_transposed(call: Call) -> None:
    """The LM head's weight is reinterpreted as [H, V] instead of transposed."""
    call.run(lm_head_weight=call.tensors["lm_head_weight"].reshape(call.dims.H, call.dims.V).T)


@fault("call", "unwritten", "kv_write", detectors=("stale_row",))
def k_not_written(call: Call) -> None:
    """Keys are not written to the cache."""
    call.run(k_cache=call.tensors["k_cache"].clone())


@fault("call", "unwritten", "kv_write", detectors=("stale_row",))
def v_not_written(call: Call) -> None:
    """Values are not written to the cache."""
    call.run(v_cache=call.tensors["v_cache"].clone())


@fault("call", "value", "rope", detectors=("echo",))
def k_not_rotated(call: Call) -> None:
    """RoPE is applied to q only."""
    call.run()
    call.tensors["k_out"].copy_(call.tensors["k"])


@fault("call", "indexing", *PREFILLS)
def offsets_ignored(call: Call) -> None:
    """Chunks are taken to lie in the order of the sequences."""
    counts = call.tensors["chunk_lens"]
    call.run(chunk_offsets=(counts.cumsum(0) - counts).to(counts.dtype))


@fault("call", "indexing", *PAGED_LAYERS, detectors=("out_of_bounds",))
def first_page_overwritten(call: Call) -> None:
    """A token's row is written to its sequence's first page."""
    slots, table = call.tensors["slot_mapping"].clone(), call.tensors["block_table"]
    for sequence, rows in enumerate(_rows_by_sequence(call)):
        slots[rows] = table[sequence * call.dims.MB] * call.dims.BS + slots[rows] % call.dims.BS
    call.run(slot_mapping=slots)


@fault("call", "indexing", *PREFILLS, detectors=("out_of_bounds",))
def slots_consecutive(call: Call) -> None:
    """Slots after a chunk's first are counted up instead of looked up."""
    slots = call.tensors["slot_mapping"].clone()
    for rows in _rows_by_sequence(call):
        slots[rows] = slots[rows][0] + torch.arange(len(slots[rows]), dtype=slots.dtype)
    call.run(slot_mapping=slots)
