"""Faults around a call of a right kernel: what it is given, what becomes of its results, what it keeps from call to call.

They know nothing of what the stage computes, so most of them are faults of every stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import Stage
from conformance.lanes.buffers import bits
from kernels.qwen3.exam.torch.registry import ATTENTIONS, ROWS, fault

Tensor = torch.Tensor

#: Stages with results to spoil: all of the single ones, and a layer, a chain and an LM head of those that are not.
_RESULTS = (*ROWS, "decode_layer", "paged_decode_fwd")
#: The same with token ids.
_ANY = (*_RESULTS, "greedy_sample")
#: Rows and columns that a kernel takes together.
ROW_TILE, COLUMN_TILE = 8, 32


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a kernel that is right by itself.

    ``number`` counts calls from 1; ``kept`` is the kernel's own, from call to call; ``compute`` writes the results of the tensors
    that it is given into those of them that are outputs.
    """

    stage: Stage
    tensors: dict[str, Tensor]
    dims: Dims
    number: int
    kept: dict[str, Any]
    compute: Callable[[dict[str, Tensor], Dims], None]

    def run(self, **other: Tensor) -> None:
        """Compute and write the results, with other tensors in the place of some."""
        self.compute({**self.tensors, **other}, self.dims)

    @property
    def outputs(self) -> dict[str, Tensor]:
        """What the kernel fills: its outputs, or the caches if it has no others."""
        filled = {one.name: self.tensors[one.name] for one in self.stage.outputs if one.access == "out"}
        return filled or {one.name: self.tensors[one.name] for one in self.stage.outputs}

    @property
    def read(self) -> dict[str, Tensor]:
        """The tensors that the kernel only reads."""
        return {one.name: self.tensors[one.name] for one in self.stage.arguments if one.access == "in"}

    @property
    def first(self) -> Tensor:
        """The first input."""
        return next(iter(self.read.values()))

    def elsewhere(self) -> dict[str, Tensor]:
        """The results in buffers of the kernel's own; the caches are updated."""
        buffers = {name: torch.empty_like(tensor) for name, tensor in self.outputs.items()}
        self.run(**buffers)
        return buffers


# Rows


@fault("call", "indexing", *_ANY)
def last_row_repeated(call: Call) -> None:
    """The last row of the batch is a copy of the one before it."""
    call.run()
    for out in call.outputs.values():
        out[-1] = out[-2 if len(out) > 1 else -1]


@fault("call", "indexing", *_ANY)
def rows_in_reverse(call: Call) -> None:
    """Results are stored in the reverse order of the batch."""
    for name, result in call.elsewhere().items():
        call.tensors[name].copy_(result.flip(0))


@fault("call", "indexing", *_ANY)
def first_row_for_all(call: Call) -> None:
    """Only the first row is right, every other repeats it: works for a batch of one only."""
    for name, result in call.elsewhere().items():
        call.tensors[name].copy_(result[:1].expand_as(result))


@fault("call", "indexing", *_ANY)
def rows_past_the_eighth_repeat(call: Call) -> None:
    """The row index wraps after eight rows."""
    for name, result in call.elsewhere().items():
        call.tensors[name].copy_(result[torch.arange(len(result)) % ROW_TILE])


@fault("call", "unwritten", *_ANY)
def rows_past_the_eighth_unwritten(call: Call) -> None:
    """Only the first eight rows are written."""
    for name, result in call.elsewhere().items():
        call.tensors[name][:ROW_TILE] = result[:ROW_TILE]


@fault("call", "unwritten", *_ANY)
def partial_tile_of_rows_unwritten(call: Call) -> None:
    """Rows that do not fill a tile of two are not written."""
    for name, result in call.elsewhere().items():
        whole = len(result) // 2 * 2
        call.tensors[name][:whole] = result[:whole]


@fault("call", "unwritten", *_RESULTS)
def partial_tile_of_rows_zero(call: Call) -> None:
    """Rows that do not fill a tile of four are zero."""
    call.run()
    for out in call.outputs.values():
        out[len(out) // 4 * 4 :] = 0


@fault("call", "unwritten", *_ANY)
def full_batch_only(call: Call) -> None:
    """Nothing is written unless the batch is full."""
    results = call.elsewhere()
    for name, result in results.items():
        if call.dims.B == 16:
            call.tensors[name].copy_(result)


@fault("call", "unwritten", *_RESULTS)
def first_row_unwritten(call: Call) -> None:
    """The loop over rows starts at the second."""
    for name, result in call.elsewhere().items():
        call.tensors[name][1:] = result[1:]


# Columns


@fault("call", "unwritten", *_RESULTS)
def last_column_unwritten(call: Call) -> None:
    """The last column is not written."""
    for name, result in call.elsewhere().items():
        call.tensors[name][:, :-1] = result[:, :-1]


@fault("call", "unwritten", *_RESULTS, dims={"preset": "awkward"})
def tail_columns_unwritten(call: Call) -> None:
    """Columns that do not fill a tile of 128 are not written."""
    for name, result in call.elsewhere().items():
        whole = result.shape[1] // 128 * 128
        call.tensors[name][:, :whole] = result[:, :whole]


@fault("call", "unwritten", *_RESULTS, dims={"preset": "awkward"})
def tail_columns_zero(call: Call) -> None:
    """Columns that do not fill a tile of 128 are zero."""
    call.run()
    for out in call.outputs.values():
        out[:, out.shape[1] // 128 * 128 :] = 0


@fault("call", "unwritten", *_RESULTS)
def second_half_of_columns_unwritten(call: Call) -> None:
    """Half of the work is dropped: the second half of the columns is not written."""
    for name, result in call.elsewhere().items():
        half = result.shape[1] // 2
        call.tensors[name][:, :half] = result[:, :half]


@fault("call", "unwritten", *_RESULTS)
def last_row_last_tile_unwritten(call: Call) -> None:
    """The very last tile of the last row is not written."""
    for name, result in call.elsewhere().items():
        call.tensors[name][:-1] = result[:-1]
        call.tensors[name][-1, :-COLUMN_TILE] = result[-1, :-COLUMN_TILE]


@fault("call", "unwritten", *_RESULTS)
def second_output_unwritten(call: Call) -> None:
    """Of several results only the first is written; of one, every second column."""
    results = call.elsewhere()
    for index, (name, result) in enumerate(results.items()):
        if len(results) == 1:
            call.tensors[name][:, ::2] = result[:, ::2]
        elif index == 0:
            call.tensors[name].copy_(result)


@fault("call", "indexing", *_RESULTS)
def column_tile_repeated(call: Call) -> None:
    """The second tile of columns repeats the first."""
    call.run()
    for out in call.outputs.values():
        out[:, COLUMN_TILE : 2 * COLUMN_TILE] = out[:, :COLUMN_TILE].clone()


@fault("call", "indexing", *_RESULTS)
def column_tiles_exchanged(call: Call) -> None:
    """The first two tiles of columns are exchanged."""
    call.run()
    for out in call.outputs.values():
        first = out[:, :COLUMN_TILE].clone()
        out[:, :COLUMN_TILE] = out[:, COLUMN_TILE : 2 * COLUMN_TILE].clone()
        out[:, COLUMN_TILE : 2 * COLUMN_TILE] = first


@fault("call", "value", *_RESULTS)
def column_tile_doubled(call: Call) -> None:
    """One tile of columns is added twice."""
    call.run()
    for out in call.outputs.values():
        out[:, COLUMN_TILE : 2 * COLUMN_TILE] *= 2


@fault("call", "indexing", *_RESULTS)
def column_tile_of_the_next_row(call: Call) -> None:
    """One tile of columns is stored with the rows one off."""
    call.run()
    for out in call.outputs.values():
        out[:, -COLUMN_TILE:] = out[:, -COLUMN_TILE:].roll(1, 0)


@fault("call", "indexing", *_RESULTS)
def columns_shifted(call: Call) -> None:
    """Results are stored one column too far."""
    call.run()
    for out in call.outputs.values():
        out.copy_(out.roll(1, 1))


@fault("call", "value", *_RESULTS)
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


# Memory


@fault("call", "memory", *_ANY)
def rows_of_a_full_batch_written(call: Call) -> None:
    """The kernel writes one tile of rows more than the batch has."""
    call.run()
    for out in call.outputs.values():
        width = out.numel() // len(out)
        out.as_strided((min(width, 256),), (1,), out.storage_offset() + out.numel()).fill_(0)


@fault("call", "memory", *_ANY)
def input_cleared(call: Call) -> None:
    """The input's buffer is used for something else afterwards."""
    call.run()
    call.first.zero_()


@fault("call", "memory", *_RESULTS)
def result_computed_in_the_input(call: Call) -> None:
    """The output is aliased with the input: results are written there first."""
    call.run()
    out = next(iter(call.outputs.values()))
    target = call.first.view(-1)
    count = min(target.numel(), out.numel())
    target[:count] = out.reshape(-1)[:count].to(target.dtype)


@fault("call", "memory", *_RESULTS)
def last_input_overwritten(call: Call) -> None:
    """An element of the last input, a weight or a table, is used as scratch and not restored."""
    call.run()
    last = list(call.read.values())[-1]
    last.view(-1)[0] += 1


@fault("call", "memory", *_RESULTS)
def one_buffer_for_two_results(call: Call) -> None:
    """Two results, or the two halves of one, share a buffer, and the later one overwrites the earlier."""
    call.run()
    outs = list(call.outputs.values())
    if len(outs) > 1:
        width = min(outs[0].shape[1], outs[1].shape[1])
        outs[0][:, :width] = outs[1][:, :width]
    else:
        half = outs[0].shape[1] // 2
        outs[0][:, :half] = outs[0][:, half : 2 * half]


@fault("call", "memory", *_RESULTS)
def added_to_what_was_there(call: Call) -> None:
    """The result is added to what the output held, which nobody cleared."""
    for name, result in call.elsewhere().items():
        call.tensors[name].add_(result)


@fault("call", "memory", "kv_write", "paged_decode_layer", "decode_layer", "prefill_layer")
def cache_page_cleared(call: Call) -> None:
    """The cache is cleared where it is not yet in use."""
    call.run()
    call.tensors["v_cache"][-1] = 0


@fault("call", "memory", "kv_write", "paged_decode_layer", "decode_layer")
def cache_of_values_scaled(call: Call) -> None:
    """The cache of values is rounded again as a whole, with the old rows."""
    call.run()
    cache = call.tensors["v_cache"]
    bits(cache).bitwise_and_(-2)


@fault("call", "memory", "kv_write")
def caches_through_fp16(call: Call) -> None:
    """Pages are read, changed and written back in fp16, with the old rows."""
    call.run()
    for name in ("k_cache", "v_cache"):
        cache = call.tensors[name]
        kept = ~cache.isnan()
        cache[kept] = cache[kept].half().to(cache.dtype)


# From call to call


@fault("call", "nondeterminism", *_ANY)
def result_of_the_call_before(call: Call) -> None:
    """A result is returned before it is ready: the output holds that of the call before."""
    for name, result in call.elsewhere().items():
        before = call.kept.get(name)
        call.tensors[name].copy_(result if before is None or before.shape != result.shape else before)
        call.kept[name] = result


@fault("call", "nondeterminism", *_RESULTS)
def accumulator_kept(call: Call) -> None:
    """The accumulator is cleared at the first call only."""
    for name, result in call.elsewhere().items():
        before = call.kept.get(name)
        total = result if before is None or before.shape != result.shape else before + result
        call.tensors[name].copy_(total)
        call.kept[name] = total


@fault("call", "nondeterminism", *_ANY)
def first_result_kept(call: Call) -> None:
    """Results are cached by shape, as a captured graph with its inputs baked in does."""
    for name, result in call.elsewhere().items():
        call.tensors[name].copy_(call.kept.setdefault(f"{name}/{tuple(result.shape)}", result))


@fault("call", "nondeterminism", *_ANY)
def first_input_kept(call: Call) -> None:
    """The first input of a shape is kept and used in every later call."""
    name = next(iter(call.read))
    kept = call.kept.setdefault(f"{name}/{tuple(call.first.shape)}", call.first.clone())
    call.run(**{name: kept})


@fault("call", "nondeterminism", "rms_norm", "qk_norm", "qkv_proj", "o_proj", "mlp", "lm_head", "decode_layer")
def first_weight_kept(call: Call) -> None:
    """The weights of the first call are kept on the device and used in every later one."""
    kept = {
        name: call.kept.setdefault(f"{name}/{tuple(tensor.shape)}", tensor.clone())
        for name, tensor in call.read.items()
        if name.startswith("w") or name.endswith("weight")
    }
    call.run(**kept)


@fault("call", "nondeterminism", "rope", "attention", "paged_attention", "decode_layer", "paged_decode_layer")
def lengths_of_the_call_before(call: Call) -> None:
    """The lengths that were copied to the device are those of the call before."""
    before = call.kept.get("seq_lens")
    call.kept["seq_lens"] = call.tensors["seq_lens"].clone()
    if before is None or before.shape != call.tensors["seq_lens"].shape:
        before = call.tensors["seq_lens"]
    # Never longer than the history is, nor in pages that are not there.
    call.run(seq_lens=torch.minimum(before, call.tensors["seq_lens"]))


@fault("call", "nondeterminism", "paged_attention", "paged_decode_layer")
def block_table_of_the_call_before(call: Call) -> None:
    """The block table on the device is that of the step before."""
    table = call.tensors["block_table"]
    before = call.kept.get("block_table")
    call.kept["block_table"] = table.clone()
    if before is not None and before.shape == table.shape:
        table = torch.where((table >= 0) & (before >= 0) & (before < call.dims.NB), before, table)
    call.run(block_table=table)


@fault("call", "nondeterminism", *_RESULTS)
def tile_of_the_call_before(call: Call) -> None:
    """A race leaves one tile of columns from the call before in a static buffer."""
    call.run()
    for name, out in call.outputs.items():
        tile = out[:, -COLUMN_TILE:].clone()
        before = call.kept.get(name)
        if before is not None and before.shape == tile.shape:
            out[:, -COLUMN_TILE:] = before
        call.kept[name] = tile


@fault("call", "nondeterminism", *_ANY)
def every_second_call_unwritten(call: Call) -> None:
    """Every second call of the kernel returns before it has written the last row."""
    for name, result in call.elsewhere().items():
        last = len(result) - (call.number % 2 == 0)
        call.tensors[name][:last] = result[:last]


@fault("call", "nondeterminism", *_RESULTS)
def element_lost_once_in_seven(call: Call) -> None:
    """A race leaves one element unwritten in one call of seven."""
    for name, result in call.elsewhere().items():
        lost = result.clone()
        if call.number % 7 == 0:
            lost[-1, 5] = call.tensors[name][-1, 5]
        call.tensors[name].copy_(lost)


@fault("call", "nondeterminism", *_RESULTS)
def last_bit_changes(call: Call) -> None:
    """Sums by atomic additions: the last bit of a result depends on the call."""
    call.run()
    for out in call.outputs.values():
        if call.number % 2:
            bits(out)[0, 0] ^= 1


@fault("call", "nondeterminism", *_RESULTS)
def output_buffer_kept(call: Call) -> None:
    """The first call's output buffer is kept, and later calls write there."""
    outputs = call.outputs
    kept = call.kept.setdefault(str(call.dims), outputs)
    call.run(**kept)


# Robustness


@fault("call", "robustness", *_ANY)
def raises_at_odd_batches(call: Call) -> None:
    """Fails for an odd batch."""
    if call.dims.B % 2:
        raise RuntimeError("this kernel takes its rows two by two")
    call.run()


@fault("call", "robustness", *_ANY)
def raises_unless_the_batch_is_full(call: Call) -> None:
    """Fails unless the batch is full."""
    if call.dims.B != 16:
        raise RuntimeError(f"expected 16 rows, got {call.dims.B}")
    call.run()


@fault("call", "robustness", *_ANY)
def raises_past_eight_rows(call: Call) -> None:
    """Fails for more than eight rows."""
    if call.dims.B > ROW_TILE:
        raise RuntimeError("this kernel takes at most eight rows")
    call.run()


_LENGTHS = ("rope", "attention", "paged_attention", "decode_layer", "paged_decode_layer", "prefill_layer")


@fault("call", "robustness", *_LENGTHS)
def raises_at_length_one(call: Call) -> None:
    """Fails for a sequence of one token: nothing is in the cache before it."""
    if bool((call.tensors["seq_lens"] == 1).any()):
        raise RuntimeError("this kernel needs a history")
    call.run()


@fault("call", "robustness", *_LENGTHS)
def raises_at_the_longest(call: Call) -> None:
    """Fails for a sequence of the maximum length."""
    if bool((call.tensors["seq_lens"] == call.dims.S).any()):
        raise RuntimeError("index out of range")
    call.run()


@fault("call", "robustness", "attention", "paged_attention", "decode_layer", "paged_decode_layer")
def raises_unless_a_page_divides(call: Call) -> None:
    """Fails unless the page divides every length."""
    if bool((call.tensors["seq_lens"] % call.dims.BS).any()):
        raise RuntimeError("lengths must be multiples of the page")
    call.run()


@fault("call", "robustness", "attention", "paged_attention", "decode_layer", "paged_decode_layer")
def raises_at_a_page_edge(call: Call) -> None:
    """Fails where a length is a multiple of the page."""
    if bool((call.tensors["seq_lens"] % call.dims.BS == 0).any()):
        raise RuntimeError("no page for position")
    call.run()


@fault("call", "robustness", "attention", "paged_attention", "decode_layer", "paged_decode_layer")
def raises_at_mixed_lengths(call: Call) -> None:
    """Fails unless all sequences have the same length."""
    if len(set(call.tensors["seq_lens"].tolist())) > 1:
        raise RuntimeError("lengths differ")
    call.run()


@fault("call", "robustness", *ROWS, "decode_layer")
def nan_for_small_rows(call: Call) -> None:
    """A row of small values divides by zero."""
    call.run()
    out = next(iter(call.outputs.values()))
    small = call.first.float().abs().amax(-1) < 1e-2
    out[small] = torch.nan


@fault("call", "robustness", *(stage for stage in ROWS if stage not in ATTENTIONS), "decode_layer")
def overflows_at_large_values(call: Call) -> None:
    """Values beyond fp16's range become infinite."""
    call.run()
    out = next(iter(call.outputs.values()))
    large = call.first.float().abs().amax(-1) > 65504
    out[large] = torch.inf


@fault("call", "nondeterminism", *_RESULTS)
def gives_up_on_the_first_call(call: Call) -> None:
    """The first call only warms up and writes nothing."""
    if call.number > 1:
        call.run()
