"""From one decode step to the next: the greedy token goes in, every sequence is longer by it."""

from __future__ import annotations

import math

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import Tensors
from conformance.kernels.qwen3.inputs import BF16, GARBAGE_KEY, GARBAGE_VALUE


def following(inputs: Tensors, outputs: Tensors, dims: Dims) -> dict[str, torch.Tensor] | None:
    """The inputs of the step after one that had ``inputs`` and left ``outputs``.

    The embedding is the LM head's weight, as in the models that tie them, brought to unit size; so no other weights are needed.
    The caches are those that were left. A page that a sequence begins is one that nobody owns, cleared of the NaN that is there.
    ``None`` where a sequence cannot be longer, or no page is left.
    """
    lengths = inputs["seq_lens"] + 1
    if int(lengths.max()) > dims.S:
        return None
    tokens = outputs["logits"].argmax(-1)
    # By a power of two, as the weight was scaled: nothing is rounded.
    embedded = (inputs["lm_head_weight"][tokens].float() * 2.0 ** round(math.log2(dims.H) / 2)).to(BF16)
    caches = {name: outputs[name] for name in ("k_cache", "v_cache")}
    found = {**inputs, **caches, "hidden_states": embedded, "seq_lens": lengths}
    if "block_table" not in inputs:
        return found
    table = inputs["block_table"].view(dims.B, dims.MB).clone()
    # The last page belongs to nobody: indexing with -1 would read it.
    free = sorted(set(range(dims.NB - 1)) - set(table.flatten().tolist()))
    positions = lengths.long() - 1
    for b in (positions % dims.BS == 0).nonzero().flatten().tolist():
        if not free:
            return None
        page = free.pop(0)
        table[b, int(positions[b]) // dims.BS] = page
        for name, garbage in (("k_cache", GARBAGE_KEY), ("v_cache", GARBAGE_VALUE)):
            caches[name].view(dims.L, dims.NB, dims.NKV * dims.BS, dims.D)[:, page] = garbage
    pages = table[torch.arange(dims.B), positions // dims.BS].long()
    slots = (pages * dims.BS + positions % dims.BS).to(torch.int32)
    return {**found, "block_table": table.flatten(), "slot_mapping": slots}
