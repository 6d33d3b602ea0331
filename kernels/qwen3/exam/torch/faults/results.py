"""Faults of what a kernel leaves of its results: rows and columns that are lost, exchanged, or in the wrong format."""

from __future__ import annotations

import math

import torch

from conformance.kernels.qwen3.exam.torch.call import Call
from conformance.kernels.qwen3.exam.torch.helpers import rounded
from conformance.kernels.qwen3.exam.torch.hooks import (
    ALL_LAYERS,
    ATTENTIONS,
    CONTIGUOUS_LAYERS,
    ROWS,
    SIGNATURES,
    TO_LOGITS,
    fault,
)
from conformance.kernels.qwen3.exam.torch.operations import BF16, truncated

Tensor = torch.Tensor

#: Stages with results to spoil: all of the single ones, and a layer, a chain and an LM head of those that are not.
RESULTS = (*ROWS, "decode_layer", "paged_decode_fwd")
#: The same with token ids.
ANY = (*RESULTS, "greedy_sample")
#: Rows and columns that a kernel takes together.
ROW_TILE, COLUMN_TILE = 8, 32


@fault(
    "call",
    "value",
    *ROWS,
    "greedy_sample",
    *CONTIGUOUS_LAYERS,
    "paged_decode_layer",
    "decode_fwd",
    "prefill_layer",
    detectors=("all_zeros", "element"),
)
def zeros(call: Call) -> None:
    """The kernel was launched on an empty grid and its buffer cleared: all results are zero."""
    call.run()
    for out in call.outputs.values():
        out.zero_()


@fault("result", "value", *ROWS, "kv_write", *ALL_LAYERS, detectors=("element", "spread", *SIGNATURES))
def gain(value: Tensor) -> Tensor:
    """Every result is half a percent too large."""
    return value * 1.005


@fault(
    "result",
    "precision",
    "qkv_proj",
    "o_proj",
    "lm_head",
    *TO_LOGITS,
    detectors=("element", *SIGNATURES),
    rounds=("projection", "result", "logits"),
)
def bf16_result(value: Tensor) -> Tensor:
    """An fp32 result is rounded to bf16."""
    return rounded(value, BF16)


@fault("result_cast", "precision", "rms_norm", "rope", "kv_write", *ATTENTIONS, detectors=("element", "bias"))
def truncate(value: Tensor) -> Tensor:
    """The cast to bf16 truncates."""
    return truncated(value)


@fault(
    "result_cast",
    "precision",
    *CONTIGUOUS_LAYERS,
    "paged_decode_layer",
    "prefill_layer",
    detectors=("spread", *SIGNATURES),
)
def truncate_result(value: Tensor) -> Tensor:
    """The last cast to bf16 truncates."""
    return truncated(value)


@fault(
    "call", "value", *(stage for stage in ROWS if stage != "lm_head"), *CONTIGUOUS_LAYERS, "prefill_layer", detectors=("echo",)
)
def echo(call: Call) -> None:
    """The input was copied to the output and nothing computed."""
    call.run()
    source = call.tensors[next(name for name in ("residual", "hidden_states", "x", "q") if name in call.tensors)]
    out = next(iter(call.outputs.values()))
    width = min(out.shape[1], source.shape[1])
    out[:, :width] = source[:, :width]


@fault("call", "indexing", *ROWS, "greedy_sample", *CONTIGUOUS_LAYERS)
def rows_exchanged(call: Call) -> None:
    """The first two rows of the batch are exchanged."""
    for name, result in call.elsewhere().items():
        call.tensors[name].copy_(torch.cat([result[1:2], result[:1], result[2:]]))


@fault("call", "unwritten", *ROWS, "greedy_sample", *CONTIGUOUS_LAYERS, *TO_LOGITS, "prefill_layer", detectors=("unwritten",))
def row_unwritten(call: Call) -> None:
    """The last row is not written."""
    for name, result in call.elsewhere().items():
        call.tensors[name][:-1] = result[:-1]


@fault("call", "unwritten", *ROWS, *CONTIGUOUS_LAYERS, detectors=("unwritten",))
def column_tile_unwritten(call: Call) -> None:
    """One tile of columns is not written."""
    for name, result in call.elsewhere().items():
        call.tensors[name][:, :16] = result[:, :16]
        call.tensors[name][:, 32:] = result[:, 32:]


@fault("call", "robustness", *ROWS, *CONTIGUOUS_LAYERS, detectors=("not_finite",))
def nan_element(call: Call) -> None:
    """One element of the last row is NaN."""
    call.run()
    next(iter(call.outputs.values()))[-1, 3] = math.nan


@fault("call", None, "kv_write", name="nan_element")
def nan_in_a_written_row(call: Call) -> None:
    """One element of the last row that was written is NaN."""
    call.run()
    page, offset = divmod(int(call.tensors["slot_mapping"][-1]), call.dims.BS)
    call.tensors["k_cache"][page * call.dims.NKV * call.dims.BS + offset, 3] = math.nan


@fault("call", "nondeterminism", *ROWS, *CONTIGUOUS_LAYERS)
def column_tile_zeroed_once_in_three(call: Call) -> None:
    """A race clears a tile of columns in one call of three."""
    call.run()
    if call.number % 3 == 0:
        next(iter(call.outputs.values()))[:, 16:32] = 0


# Rows


@fault("call", "indexing", *ANY)
def last_row_repeated(call: Call) -> None:
    """The last row of the batch is a copy of the one before it."""
    call.run()
    for out in call.outputs.values():
        out[-1] = out[-2 if len(out) > 1 else -1]


@fault("call", "indexing", *ANY)
def rows_in_reverse(call: Call) -> None:
    """Results are stored in the reverse order of the batch."""
    for name, result in call.elsewhere().items():
        call.tensors[name].copy_(result.flip(0))


@fault("call", "indexing", *ANY)
def first_row_for_all(call: Call) -> None:
    """Only the first row is right, every other repeats it: works for a batch of one only."""
    for name, result in call.elsewhere().items():
        call.tensors[name].copy_(result[:1].expand_as(result))


@fault("call", "indexing", *ANY)
def rows_past_the_eighth_repeat(call: Call) -> None:
    """The row index wraps after eight rows."""
    for name, result in call.elsewhere().items():
        call.tensors[name].copy_(result[torch.arange(len(result)) % ROW_TILE])


@fault("call", "unwritten", *ANY, detectors=("unwritten",))
def rows_past_the_eighth_unwritten(call: Call) -> None:
    """Only the first eight rows are written."""
    for name, result in call.elsewhere().items():
        call.tensors[name][:ROW_TILE] = result[:ROW_TILE]


@fault("call", "unwritten", *ANY, detectors=("unwritten",))
def partial_tile_of_rows_unwritten(call: Call) -> None:
    """Rows that do not fill a tile of two are not written."""
    for name, result in call.elsewhere().items():
        whole = len(result) // 2 * 2
        call.tensors[name][:whole] = result[:whole]


@fault("call", "unwritten", *RESULTS, detectors=("all_zeros",))
def partial_tile_of_rows_zero(call: Call) -> None:
    """Rows that do not fill a tile of four are zero."""
    call.run()
    for out in call.outputs.values():
        out[len(out) // 4 * 4 :] = 0


@fault("call", "unwritten", *ANY, detectors=("unwritten",))
def full_batch_only(call: Call) -> None:
    """Nothing is written unless the batch is full."""
    results = call.elsewhere()
    for name, result in results.items():
        if call.dims.B == 16:
            call.tensors[name].copy_(result)


@fault("call", "unwritten", *RESULTS, detectors=("unwritten",))
def first_row_unwritten(call: Call) -> None:
    """The loop over rows starts at the second."""
    for name, result in call.elsewhere().items():
        call.tensors[name][1:] = result[1:]


# Columns


@fault("call", "unwritten", *RESULTS, detectors=("unwritten",))
def last_column_unwritten(call: Call) -> None:
    """The last column is not written."""
    for name, result in call.elsewhere().items():
        call.tensors[name][:, :-1] = result[:, :-1]


@fault("call", "unwritten", *RESULTS, dims={"preset": "awkward"}, detectors=("unwritten",))
def tail_columns_unwritten(call: Call) -> None:
    """Columns that do not fill a tile of 128 are not written."""
    for name, result in call.elsewhere().items():
        whole = result.shape[1] // 128 * 128
        call.tensors[name][:, :whole] = result[:, :whole]


@fault("call", "unwritten", *RESULTS, dims={"preset": "awkward"})
def tail_columns_zero(call: Call) -> None:
    """Columns that do not fill a tile of 128 are zero."""
    call.run()
    for out in call.outputs.values():
        out[:, out.shape[1] // 128 * 128 :] = 0


@fault("call", "unwritten", *RESULTS, detectors=("unwritten",))
def second_half_of_columns_unwritten(call: Call) -> None:
    """Half of the work is dropped: the second half of the columns is not written."""
    for name, result in call.elsewhere().items():
        half = result.shape[1] // 2
        call.tensors[name][:, :half] = result[:, :half]


@fault("call", "unwritten", *RESULTS, detectors=("unwritten",))
def last_row_last_tile_unwritten(call: Call) -> None:
    """The very last tile of the last row is not written."""
    for name, result in call.elsewhere().items():
        call.tensors[name][:-1] = result[:-1]
        call.tensors[name][-1, :-COLUMN_TILE] = result[-1, :-COLUMN_TILE]


@fault("call", "unwritten", *RESULTS, detectors=("unwritten",))
def second_output_unwritten(call: Call) -> None:
    """Of several results only the first is written; of one, every second column."""
    results = call.elsewhere()
    for index, (name, result) in enumerate(results.items()):
        if len(results) == 1:
            call.tensors[name][:, ::2] = result[:, ::2]
        elif index == 0:
            call.tensors[name].copy_(result)


@fault("call", "indexing", *RESULTS)
def column_tile_repeated(call: Call) -> None:
    """The second tile of columns repeats the first."""
    call.run()
    for out in call.outputs.values():
        out[:, COLUMN_TILE : 2 * COLUMN_TILE] = out[:, :COLUMN_TILE].clone()


@fault("call", "indexing", *RESULTS)
def column_tiles_exchanged(call: Call) -> None:
    """The first two tiles of columns are exchanged."""
    call.run()
    for out in call.outputs.values():
        first = out[:, :COLUMN_TILE].clone()
        out[:, :COLUMN_TILE] = out[:, COLUMN_TILE : 2 * COLUMN_TILE].clone()
        out[:, COLUMN_TILE : 2 * COLUMN_TILE] = first


@fault("call", "value", *RESULTS)
def column_tile_doubled(call: Call) -> None:
    """One tile of columns is added twice."""
    call.run()
    for out in call.outputs.values():
        out[:, COLUMN_TILE : 2 * COLUMN_TILE] *= 2


@fault("call", "indexing", *RESULTS)
def column_tile_of_the_next_row(call: Call) -> None:
    """One tile of columns is stored with the rows one off."""
    call.run()
    for out in call.outputs.values():
        out[:, -COLUMN_TILE:] = out[:, -COLUMN_TILE:].roll(1, 0)


@fault("call", "indexing", *RESULTS)
def columns_shifted(call: Call) -> None:
    """Results are stored one column too far."""
    call.run()
    for out in call.outputs.values():
        out.copy_(out.roll(1, 1))


@fault("call", "value", *RESULTS)
def one_element_wrong(call: Call) -> None:
    """A single element, at the corner of four tiles, is half as large again."""
    call.run()
    for out in call.outputs.values():
        out[len(out) // 2, COLUMN_TILE - 1] *= 1.5


@fault("call", "value", *ROWS)
def one_lane_negated(call: Call) -> None:
    """One column has the wrong sign."""
    call.run()
    for out in call.outputs.values():
        out[:, 17] *= -1
