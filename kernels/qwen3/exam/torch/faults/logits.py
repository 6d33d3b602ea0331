"""Faults of the LM head: its input, its final norm, and the logits."""

from __future__ import annotations

import math

import torch

from conformance.kernels.qwen3.exam.torch.call import Call
from conformance.kernels.qwen3.exam.torch.hooks import TO_LOGITS, fault
from conformance.kernels.qwen3.exam.torch.layers import Step
from conformance.kernels.qwen3.exam.torch.operations import Operations

Tensor = torch.Tensor

#: Columns of the logits that an LM head computes at a time; 500, the vocabulary of ``awkward``, is not a multiple of it.
VOCABULARY_TILE = 64


@fault("call", "indexing", "lm_head", "decode_fwd")
def vocabulary_tiles_exchanged(call: Call) -> None:
    """The LM head reads the second tile of the vocabulary's rows first."""
    weight = call.tensors["lm_head_weight"]
    call.run(lm_head_weight=torch.cat([weight[64:128], weight[:64], weight[128:]]))


@fault("call", "value", "lm_head", "decode_fwd")
def logits_scaled(call: Call) -> None:
    """Logits are scaled by the root of the hidden size, as tied embeddings of another model are."""
    call.run()
    call.tensors["logits"].mul_(call.dims.H**-0.5)


@fault("call", "value", "lm_head", "decode_fwd")
def logits_normalised(call: Call) -> None:
    """Logarithms of probabilities are returned instead of logits."""
    call.run()
    call.tensors["logits"].copy_(torch.log_softmax(call.tensors["logits"], -1))


@fault("call", "value", "lm_head")
def logits_capped(call: Call) -> None:
    """Logits are capped softly at 30, as another model's are."""
    call.run()
    call.tensors["logits"].copy_(30 * torch.tanh(call.tensors["logits"] / 30))


@fault("call", "indexing", "lm_head", "decode_fwd")
def vocabulary_shifted(call: Call) -> None:
    """Logits are stored one column too far."""
    call.run()
    call.tensors["logits"].copy_(call.tensors["logits"].roll(1, 1))


@fault("call", "unwritten", "lm_head", *TO_LOGITS)
def half_the_vocabulary_zero(call: Call) -> None:
    """The second half of the vocabulary is never computed and holds zeros."""
    call.run()
    call.tensors["logits"][:, call.dims.V // 2 :] = 0


@fault("call", "robustness", *TO_LOGITS, detectors=("not_finite",))
def one_row_nan(call: Call) -> None:
    """The last row is NaN."""
    call.run()
    call.tensors["logits"][-1] = math.nan


@fault("call", "indexing", "lm_head", *TO_LOGITS)
def tail_rows_wrong(call: Call) -> None:
    """A partial tile of rows is filled with the first row."""
    call.run()
    logits = call.tensors["logits"]
    logits[len(logits) // 4 * 4 :] = logits[:1]


@fault("call", "unwritten", "lm_head", dims={"preset": "awkward"}, detectors=("unwritten",))
def last_tile_unwritten(call: Call) -> None:
    """The vocabulary's partial last tile is not written."""
    whole = call.dims.V // VOCABULARY_TILE * VOCABULARY_TILE
    for name, result in call.elsewhere().items():
        call.tensors[name][:, :whole] = result[:, :whole]


@fault("call", "unwritten", "lm_head", "decode_fwd", dims={"preset": "awkward"})
def last_tile_zeroed(call: Call) -> None:
    """The vocabulary's partial last tile is cleared instead of computed."""
    call.run()
    call.tensors["logits"][:, call.dims.V // VOCABULARY_TILE * VOCABULARY_TILE :] = 0


@fault("call", "indexing", "lm_head", dims={"preset": "awkward"})
def last_tile_repeated(call: Call) -> None:
    """The last, partial tile of the vocabulary repeats the tile before it."""
    call.run()
    whole = call.dims.V // VOCABULARY_TILE * VOCABULARY_TILE
    logits = call.tensors["logits"]
    logits[:, whole:] = logits[:, whole - VOCABULARY_TILE : call.dims.V - VOCABULARY_TILE]


@fault("final_projection", "value", "lm_head", *TO_LOGITS)
def final_norm_missing(ops: Operations, hidden: Tensor, gamma: Tensor, weight: Tensor, eps: float, deferred: bool) -> Tensor:
    """The LM head is applied to hidden states that were not normalised."""
    return ops.matmul(ops.cast(hidden), weight)


@fault("head_input", "indexing", "lm_head", *TO_LOGITS)
def state_of_the_row_before(hidden: Tensor, before: Tensor) -> Tensor:
    """The LM head reads the hidden state of the row before."""
    return hidden.roll(1, 0)


@fault("head_input", "dependency", *TO_LOGITS)
def head_on_the_last_layers_input(hidden: Tensor, before: Tensor) -> Tensor:
    """The LM head reads the state before the last layer."""
    return before


@fault("last_tokens", "indexing", "prefill_fwd")
def first_token(step: Step) -> list[int]:
    """Logits are those of a chunk's first token."""
    return [chunk[0].row for chunk in step.chunks]


@fault("last_tokens", "indexing", "prefill_fwd")
def last_row_of_the_pack(step: Step) -> list[int]:
    """Logits are those of the last packed row, for every sequence."""
    return [max(token.row for token in step.tokens)] * step.dims.B
