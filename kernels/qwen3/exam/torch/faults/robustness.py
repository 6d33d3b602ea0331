"""Inputs that a kernel does not serve."""

from __future__ import annotations

import torch

from conformance.kernels.qwen3.exam.torch.call import Call
from conformance.kernels.qwen3.exam.torch.faults.results import ANY, ROW_TILE
from conformance.kernels.qwen3.exam.torch.hooks import ATTENTIONS, CONTIGUOUS_LAYERS, ROWS, TO_LOGITS, fault

Tensor = torch.Tensor


# Robustness


@fault("call", "robustness", *ANY, detectors=("raised",))
def raises_at_odd_batches(call: Call) -> None:
    """Fails for an odd batch."""
    if call.dims.B % 2:
        raise RuntimeError("this kernel takes its rows two by two")
    call.run()


@fault("call", "robustness", *ANY, detectors=("raised",))
def raises_unless_the_batch_is_full(call: Call) -> None:
    """Fails unless the batch is full."""
    if call.dims.B != 16:
        raise RuntimeError(f"expected 16 rows, got {call.dims.B}")
    call.run()


@fault("call", "robustness", *ANY, detectors=("raised",))
def raises_past_eight_rows(call: Call) -> None:
    """Fails for more than eight rows."""
    if call.dims.B > ROW_TILE:
        raise RuntimeError("this kernel takes at most eight rows")
    call.run()


_LENGTHS = ("rope", "attention", "paged_attention", "decode_layer", "paged_decode_layer", "prefill_layer")


@fault("call", "robustness", *_LENGTHS, detectors=("raised",))
def raises_at_length_one(call: Call) -> None:
    """Fails for a sequence of one token: nothing is in the cache before it."""
    if bool((call.tensors["seq_lens"] == 1).any()):
        raise RuntimeError("this kernel needs a history")
    call.run()


@fault("call", "robustness", *_LENGTHS, detectors=("raised",))
def raises_at_the_longest(call: Call) -> None:
    """Fails for a sequence of the maximum length."""
    if bool((call.tensors["seq_lens"] == call.dims.S).any()):
        raise RuntimeError("index out of range")
    call.run()


@fault("call", "robustness", "attention", "paged_attention", "decode_layer", "paged_decode_layer", detectors=("raised",))
def raises_unless_a_page_divides(call: Call) -> None:
    """Fails unless the page divides every length."""
    if bool((call.tensors["seq_lens"] % call.dims.BS).any()):
        raise RuntimeError("lengths must be multiples of the page")
    call.run()


@fault("call", "robustness", "attention", "paged_attention", "decode_layer", "paged_decode_layer", detectors=("raised",))
def raises_at_a_page_edge(call: Call) -> None:
    """Fails where a length is a multiple of the page."""
    if bool((call.tensors["seq_lens"] % call.dims.BS == 0).any()):
        raise RuntimeError("no page for position")
    call.run()


@fault("call", "robustness", "attention", "paged_attention", "decode_layer", "paged_decode_layer", detectors=("raised",))
def raises_at_mixed_lengths(call: Call) -> None:
    """Fails unless all sequences have the same length."""
    if len(set(call.tensors["seq_lens"].tolist())) > 1:
        raise RuntimeError("lengths differ")
    call.run()


@fault("call", "robustness", *ROWS, "decode_layer", detectors=("not_finite",))
def nan_for_small_rows(call: Call) -> None:
    """A row of small values divides by zero."""
    call.run()
    out = next(iter(call.outputs.values()))
    small = call.first.float().abs().amax(-1) < 1e-2
    out[small] = torch.nan


@fault("call", "robustness", *(stage for stage in ROWS if stage not in ATTENTIONS), "decode_layer", detectors=("not_finite",))
def overflows_at_large_values(call: Call) -> None:
    """Values beyond fp16's range become infinite."""
    call.run()
    out = next(iter(call.outputs.values()))
    large = call.first.float().abs().amax(-1) > 65504
    out[large] = torch.inf


@fault("call", "robustness", *ROWS, "kv_write", "greedy_sample", *CONTIGUOUS_LAYERS, *TO_LOGITS, detectors=("raised",))
def raises_at_batch_1(call: Call) -> None:
    """Fails for a batch of one."""
    if call.dims.B == 1:
        raise RuntimeError("this kernel needs at least two rows")
    call.run()


@fault("call", "robustness", *ROWS, "kv_write", "greedy_sample", *CONTIGUOUS_LAYERS, detectors=("raised",))
def returns_a_tensor(call: Call) -> Tensor:
    """Returns its result instead of only writing it."""
    call.run()
    return next(iter(call.outputs.values()))


@fault("call", "robustness", *TO_LOGITS, detectors=("raised",))
def takes_16_rows(call: Call) -> None:
    """Reads 16 rows of hidden states, whatever the batch."""
    call.tensors["hidden_states"].as_strided((16, call.dims.H), (call.dims.H, 1))
    call.run()
