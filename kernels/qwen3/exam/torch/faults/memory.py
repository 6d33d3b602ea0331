"""Faults of memory: inputs that change, writes to what is not the kernel's to write."""

from __future__ import annotations

import torch

from conformance.kernels.qwen3.exam.torch.call import Call
from conformance.kernels.qwen3.exam.torch.faults.results import ANY, RESULTS
from conformance.kernels.qwen3.exam.torch.hooks import CONTIGUOUS_LAYERS, ROWS, fault
from conformance.kernels.qwen3.exam.torch.layers import Step
from conformance.lanes.buffers import bits

Tensor = torch.Tensor


# Memory


@fault("call", "memory", *ANY, detectors=("out_of_bounds",))
def rows_of_a_full_batch_written(call: Call) -> None:
    """The kernel writes one tile of rows more than the batch has."""
    call.run()
    for out in call.outputs.values():
        width = out.numel() // len(out)
        out.as_strided((min(width, 256),), (1,), out.storage_offset() + out.numel()).fill_(0)


@fault("call", "memory", *ANY, detectors=("changed_input",))
def input_cleared(call: Call) -> None:
    """The input's buffer is used for something else afterwards."""
    call.run()
    call.first.zero_()


@fault("call", "memory", *RESULTS, detectors=("changed_input",))
def result_computed_in_the_input(call: Call) -> None:
    """The output is aliased with the input: results are written there first."""
    call.run()
    out = next(iter(call.outputs.values()))
    target = call.first.view(-1)
    count = min(target.numel(), out.numel())
    target[:count] = out.reshape(-1)[:count].to(target.dtype)


@fault("call", "memory", *RESULTS, detectors=("changed_input",))
def last_input_overwritten(call: Call) -> None:
    """An element of the last input, a weight or a table, is used as scratch and not restored."""
    call.run()
    last = list(call.read.values())[-1]
    last.view(-1)[0] += 1


@fault("call", "memory", *RESULTS)
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


@fault("call", "memory", *RESULTS, detectors=("unwritten", "not_finite"))
def added_to_what_was_there(call: Call) -> None:
    """The result is added to what the output held, which nobody cleared."""
    for name, result in call.elsewhere().items():
        call.tensors[name].add_(result)


@fault("call", "memory", "kv_write", "paged_decode_layer", "decode_layer", "prefill_layer", detectors=("out_of_bounds",))
def cache_page_cleared(call: Call) -> None:
    """The cache is cleared where it is not yet in use."""
    call.run()
    call.tensors["v_cache"][-1] = 0


@fault("call", "memory", "kv_write", "paged_decode_layer", "decode_layer", detectors=("out_of_bounds", "element"))
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


@fault("call", "memory", *ROWS, "kv_write", "greedy_sample", *CONTIGUOUS_LAYERS, detectors=("changed_input",))
def input_changed(call: Call) -> None:
    """An element of the input is changed."""
    call.run()
    call.first[-1, -1] += 1


@fault("call", "memory", *ROWS, "kv_write", "greedy_sample", *CONTIGUOUS_LAYERS, detectors=("out_of_bounds",))
def past_the_end(call: Call) -> None:
    """One element behind the output is written."""
    call.run()
    out = next(iter(call.outputs.values()))
    out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(1)


@fault("call", "memory", *ROWS, "kv_write", "greedy_sample", *CONTIGUOUS_LAYERS, detectors=("out_of_bounds",))
def before_the_start(call: Call) -> None:
    """One element before the output is written."""
    call.run()
    out = next(iter(call.outputs.values()))
    out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(1)


@fault("after_write", "memory", *CONTIGUOUS_LAYERS, detectors=("out_of_bounds",))
def other_row_overwritten(step: Step, layer: int, k_cache: Tensor, v_cache: Tensor) -> None:
    """A cache row of another position is overwritten."""
    # Some sequence's oldest row, which is not being written in this step unless it is its only one.
    if step.dims.B > 1:
        k_cache[step.row(layer, 0, 0, 0)] = k_cache[step.row(layer, 1, 0, 0)]


@fault("call", None, "kv_write", name="other_row_overwritten")
def other_row_of_a_page_overwritten(call: Call) -> None:
    """A row of the first slot's page is overwritten: its first one, or the second if the slot itself is the first."""
    call.run()
    page, offset = divmod(int(call.tensors["slot_mapping"][0]), call.dims.BS)
    call.tensors["v_cache"][page * call.dims.NKV * call.dims.BS + (0 if offset else 1)] = 1.0


@fault("after_write", "memory", *CONTIGUOUS_LAYERS, detectors=("out_of_bounds",))
def next_row_overwritten(step: Step, layer: int, k_cache: Tensor, v_cache: Tensor) -> None:
    """The cache row after the newest is written too."""
    position = step.seq_lens[0]
    if position < step.dims.S and position % step.dims.BS:
        k_cache[step.row(layer, 0, position, 0)] = k_cache[step.row(layer, 0, position - 1, 0)]
