"""Faults from call to call: something is kept, lost or decided by a race."""

from __future__ import annotations

import dataclasses

import torch

from conformance.kernels.qwen3.exam.torch.call import Call
from conformance.kernels.qwen3.exam.torch.faults.results import ANY, COLUMN_TILE, RESULTS
from conformance.kernels.qwen3.exam.torch.hooks import PRODUCTS, fault
from conformance.lanes.buffers import bits

Tensor = torch.Tensor


# From call to call


@fault("call", "nondeterminism", *ANY)
def result_of_the_call_before(call: Call) -> None:
    """A result is returned before it is ready: the output holds that of the call before."""
    for name, result in call.elsewhere().items():
        before = call.kept.get(name)
        call.tensors[name].copy_(result if before is None or before.shape != result.shape else before)
        call.kept[name] = result


@fault("call", "nondeterminism", *RESULTS)
def accumulator_kept(call: Call) -> None:
    """The accumulator is cleared at the first call only."""
    for name, result in call.elsewhere().items():
        before = call.kept.get(name)
        total = result if before is None or before.shape != result.shape else before + result
        call.tensors[name].copy_(total)
        call.kept[name] = total


@fault("call", "nondeterminism", *ANY)
def first_result_kept(call: Call) -> None:
    """Results are cached by shape, as a captured graph with its inputs baked in does."""
    for name, result in call.elsewhere().items():
        call.tensors[name].copy_(call.kept.setdefault(f"{name}/{tuple(result.shape)}", result))


@fault("call", "nondeterminism", *ANY)
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


@fault("call", "nondeterminism", *RESULTS)
def tile_of_the_call_before(call: Call) -> None:
    """A race leaves one tile of columns from the call before in a static buffer."""
    call.run()
    for name, out in call.outputs.items():
        tile = out[:, -COLUMN_TILE:].clone()
        before = call.kept.get(name)
        if before is not None and before.shape == tile.shape:
            out[:, -COLUMN_TILE:] = before
        call.kept[name] = tile


@fault("call", "nondeterminism", *ANY, detectors=("nondeterministic",))
def every_second_call_unwritten(call: Call) -> None:
    """Every second call of the kernel returns before it has written the last row."""
    for name, result in call.elsewhere().items():
        last = len(result) - (call.number % 2 == 0)
        call.tensors[name][:last] = result[:last]


@fault("call", "nondeterminism", *RESULTS, detectors=("unwritten", "nondeterministic"))
def element_lost_once_in_seven(call: Call) -> None:
    """A race leaves one element unwritten in one call of seven."""
    for name, result in call.elsewhere().items():
        lost = result.clone()
        if call.number % 7 == 0:
            lost[-1, 5] = call.tensors[name][-1, 5]
        call.tensors[name].copy_(lost)


@fault("call", "nondeterminism", *RESULTS, detectors=("nondeterministic", "element"))
def last_bit_changes(call: Call) -> None:
    """Sums by atomic additions: the last bit of a result depends on the call."""
    call.run()
    for out in call.outputs.values():
        if call.number % 2:
            bits(out)[0, 0] ^= 1


@fault("call", "nondeterminism", *RESULTS, detectors=("nondeterministic",))
def output_buffer_kept(call: Call) -> None:
    """The first call's output buffer is kept, and later calls write there."""
    outputs = call.outputs
    kept = call.kept.setdefault(str(call.dims), outputs)
    call.run(**kept)


@fault("call", "nondeterminism", *RESULTS, detectors=("unwritten", "nondeterministic"))
def gives_up_on_the_first_call(call: Call) -> None:
    """The first call only warms up and writes nothing."""
    if call.number > 1:
        call.run()


@fault("call", "nondeterminism", "rms_norm", "qk_norm", *PRODUCTS[:4], detectors=("nondeterministic",))
def second_call_differs(call: Call) -> None:
    """Every second call sums in another order."""
    order = "torch" if call.number % 2 else "reversed"
    call.operations.choices = dataclasses.replace(call.operations.choices, order=order)
    call.run()
