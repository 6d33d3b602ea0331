"""Torch kernels of every stage, right and wrong: what the harness is examined with.

``arithmetic.py`` has their arithmetic and ``Choices``, what a legal kernel is free to do; ``layers.py`` the layers.
``FAULTS`` are what a kernel is not free to do. A kernel is made by ``torch_kernel(stage, choices, fault)`` and takes the
contract's arguments and ``dims``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel, kernel
from conformance.contract.stage import Stage
from kernels.qwen3.exam.torch import layers as torch_layers
from kernels.qwen3.exam.torch import of_places, of_values  # noqa: F401  they register their faults
from kernels.qwen3.exam.torch.arithmetic import (
    BF16,
    HUGGING_FACE_LIKE,
    RELEVANT,
    Choices,
    Maker,
    random_choices,
    single_choices,
    truncated,
)
from kernels.qwen3.exam.torch.layers import LAYER_WEIGHTS, Arguments, Step
from kernels.qwen3.exam.torch.of_calls import Call
from kernels.qwen3.exam.torch.registry import REGISTERED, faults_of

__all__ = [
    "FAULTS",
    "HUGGING_FACE_LIKE",
    "LAYER_WEIGHTS",
    "RELEVANT",
    "Choices",
    "random_choices",
    "single_choices",
    "torch_kernel",
]

Tensor = torch.Tensor

#: Columns that ``greedy_sample`` looks at together.
SCAN_TILE = 48
#: Where a running maximum must not start: below it lie logits too.
_STARTS = {"maximum_starts_at_zero": 0.0, "maximum_starts_at_minus_10": -10.0}


def _rms_norm(m: Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    return {"out": m.norm(t["x"].float(), t["weight"][0], dims.eps)}


def _qkv_proj(m: Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    x = t["x"][:1].expand_as(t["x"]) if m.has("row0_input") else t["x"]
    wk, wv = (t["wv"], t["wk"]) if m.has("k_and_v_exchanged") else (t["wk"], t["wv"])
    return {"q": m.matmul(x, t["wq"]), "k": m.matmul(x, wk), "v": m.matmul(x, wv)}


def _qk_norm(m: Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    k_weight = t["q_norm_weight"] if m.has("q_weight_for_k") else t["k_norm_weight"]
    return {
        "q_out": m.heads_normalised(t["q"], t["q_norm_weight"][0], dims),
        "k_out": m.heads_normalised(t["k"], k_weight[0], dims),
    }


def _rope(m: Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    q, k = m.maybe(m.choices.before_rope, t["q"]), m.maybe(m.choices.before_rope, t["k"])
    lengths = t["seq_lens"].tolist()
    angles = [m.angle(lengths[0 if m.has("row0_length") else b] - 1, b, dims) for b in range(dims.B)]
    tables = t["rope_cos"], t["rope_sin"]
    k = k if m.has("k_not_rotated") else m.rotated(k, angles, *tables, dims)
    return {"q_out": m.rotated(q, angles, *tables, dims), "k_out": k}


def _kv_write(m: Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    # Updates in place by itself: what it returns is already in the caches.
    slots = t["slot_mapping"].tolist()
    for b in range(dims.B):
        slot = m.at("slot", operator.getitem)(slots, b - 1 if m.has("slot_of_the_row_before") else b)
        page, offset = slot // dims.BS, slot % dims.BS
        if m.has("next_slot"):
            offset = (offset + 1) % dims.BS
        for head in range(dims.NKV):
            if not m.at("head_written", _every_head)(head, dims):
                continue
            row = m.at("cell", torch_layers.cell)(page, offset, head, dims) % len(t["k_cache"])
            if m.has("token_major_page"):
                row = (page * dims.BS + offset) * dims.NKV + head
            columns = slice(head * dims.D, (head + 1) * dims.D)
            k, v = t["k"][b, columns].float(), t["v"][b, columns]
            if m.has("gain"):
                k, v = k * 1.005, v * 1.005
            k, v = m.at("written", _both)(m.cast(k), truncated(v) if m.has("truncate") else m.cast(v))
            if not m.has("k_not_written"):
                t["k_cache"][row] = k.to(BF16)
            if not m.has("v_not_written"):
                t["v_cache"][row] = v.to(BF16)
    if m.has("other_row_overwritten"):
        # The first row of the page of the first sequence's slot, or the one after it if that is the slot itself.
        slot = int(t["slot_mapping"][0])
        page, offset = slot // dims.BS, slot % dims.BS
        row = page * dims.NKV * dims.BS + (0 if offset else 1)
        t["v_cache"][row] = 1.0
    return {}


def _every_head(head: int, dims: Dims) -> bool:
    return True


def _both(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k, v


def _attention(m: Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    step = Step(m, t, dims)
    return {"out": torch_layers.attention(m, t["q"].float(), step, 0, t["k_cache"], t["v_cache"], dims)}


def _o_proj(m: Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    weight = t["wo"].T if m.has("weight_transposed") else t["wo"]
    residual = t["residual"].float()
    if m.has("row0_input"):
        residual = residual[:1].expand_as(residual)
    if m.has("residual_missing"):
        return {"out": m.matmul(t["attn"], weight)}
    return {"out": m.with_residual(t["attn"], weight, residual)}


def _mlp(m: Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    x = t["x"][:1].expand_as(t["x"]) if m.has("row0_input") else t["x"]
    activation = m.gated(m.matmul(x, t["w_gate"]), m.matmul(x, t["w_up"]))
    return {"out": m.maybe(m.choices.branch, m.matmul(activation, t["w_down"]))}


def _lm_head(m: Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    return {"logits": torch_layers.lm_head(m, t["hidden"].float(), t["final_norm_weight"], t["lm_head_weight"], dims)}


def _greedy_sample(m: Maker, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    largest = m.at("winner", functools.partial(_largest, m))
    rows = [largest(t["logits"][0 if m.has("row0_input") else b]) for b in range(dims.B)]
    return {"token_ids": torch.tensor(rows)}


def _largest(m: Maker, logits: Tensor) -> int:
    """The lowest index of the largest of ``logits[V]``, found in the chosen way."""
    width, scan = logits.shape[0], m.choices.scan
    if m.has("compared_in_bf16"):
        logits = logits.to(BF16).float()
    if m.has("highest_index_on_a_tie"):
        return width - 1 - int(logits.flip(0).argmax())
    if m.has("padded_column_wins"):
        logits = torch.cat([logits, torch.zeros(1)])
    if m.fault in ("tie_goes_to_the_next_tile", "index_within_the_tile", "last_tile_ignored", *_STARTS):
        scan = "tiles"
    if scan == "pairs":
        indices = list(range(width))
        while len(indices) > 1:
            left, right = indices[::2], indices[1::2]
            winners = [b if logits[b] > logits[a] else a for a, b in zip(left, right, strict=False)]
            indices = winners + left[len(right) :]
        return indices[0]
    if scan == "whole":
        index = int(logits.argmax())
        return index + 1 if m.has("index_off_by_one") else index
    starts = list(range(0, width, SCAN_TILE))
    if m.has("last_tile_ignored"):
        starts = starts[:-1]
    best, best_index = _STARTS.get(m.fault, -math.inf), 0
    for start in reversed(starts) if scan == "backward" else starts:
        tile = logits[start : start + SCAN_TILE]
        place = int(tile.argmax())
        largest = float(tile[place])
        wins_ties = scan == "backward" or m.has("tie_goes_to_the_next_tile")
        if largest > best or (wins_ties and largest == best):
            best, best_index = largest, place if m.has("index_within_the_tile") else start + place
    return best_index


_STAGES: dict[str, Callable[[Maker, Arguments, Dims], dict[str, Tensor]]] = {
    "rms_norm": _rms_norm,
    "qkv_proj": _qkv_proj,
    "qk_norm": _qk_norm,
    "rope": _rope,
    "kv_write": _kv_write,
    "attention": _attention,
    "o_proj": _o_proj,
    "mlp": _mlp,
    "paged_attention": _attention,
    "lm_head": _lm_head,
    "greedy_sample": _greedy_sample,
    "decode_layer": torch_layers.layers,
    "paged_decode_layer": torch_layers.layers,
    "decode_fwd_layers": torch_layers.layers,
    "decode_fwd": torch_layers.layers,
    "paged_decode_fwd": torch_layers.layers,
    "prefill_layer": torch_layers.layers,
    "prefill_fwd": torch_layers.layers,
}


#: What an engineer gets wrong in any kernel, whatever it computes.
COMMON_FAULTS = (
    "zeros",
    "row_unwritten",
    "nan_element",
    "column_tile_unwritten",
    "column_tile_zeroed_once_in_three",
    "input_changed",
    "past_the_end",
    "before_the_start",
    "raises_at_batch_1",
    "returns_a_tensor",
    "rows_exchanged",
    "gain",
)

#: What an engineer gets wrong about keys and values, however they lie.
_OF_ATTENTION = (
    "modulo_heads",
    "scale_missing",
    "one_row_too_many",
    "newest_row_dropped",
    "oldest_row_dropped",
    "row0_length",
)

_OF_LAYERS = (
    *_OF_ATTENTION,
    "no_maximum",
    "echo",
    "position_off_by_one",
    "interleaved_pairs",
    "q_norm_missing",
    "k_norm_missing",
    "eps_1e-5",
    "missing_gamma",
    "attention_before_write",
    "other_row_overwritten",
    "next_row_overwritten",
    "residual_missing",
    "second_residual_wrong",
    "deferred_norm_dropped",
    "gate_and_up_exchanged",
    "relu",
    "row0_scale",
    "row0_input",
    "bf16_accumulation",
    "last_k_tile_missing",
)

#: Of reading pages: where they are, and which of them there are.
_OF_BLOCK_TABLES = (
    "identity_block_table",
    "transposed_block_table",
    "page_off_by_one",
    "page_of_the_next_sequence",
    "unowned_page",
    "minus_one_dereferenced",
    "token_major_page",
    "page_size_16",
)
_OF_PAGE_EDGES = (
    "stale_page",
    "whole_pages",
    "partial_page_dropped",
    "newest_row_dropped_at_a_page_edge",
    "second_page_skipped",
    "shared_page_skipped",
)

#: Of writing to pages.
_OF_SLOTS = ("next_slot", "slot_of_the_row_before", "first_page_overwritten")

#: Of a chain of layers.
_OF_CHAINS = ("carried_state_ignored", "layer_dropped", "last_layer_dropped", "weights_of_layer_0", "caches_of_layer_0")

#: Of the LM head that a chain ends in.
_OF_HEADS = ("final_norm_missing", "head_on_the_last_layers_input", "state_of_the_row_before", "half_the_vocabulary_zero")

#: Of what stays fp32 inside a layer.
_OF_ROUNDINGS = ("bf16_tables", "bf16_scores")

#: Of a batch that is not full.
_OF_BATCHES = ("one_row_nan", "tail_rows_wrong", "takes_16_rows", "row_unwritten", "raises_at_batch_1")

#: Of several new tokens a sequence.
_OF_PREFILL = (
    "not_causal",
    "causal_from_zero",
    "history_ignored",
    "chunk_not_seen",
    "only_itself_seen",
    "position_of_the_first",
    "position_from_zero",
    "offsets_ignored",
    "rows_of_the_last_token_only",
    "slots_consecutive",
    "one_too_few_at_a_page_edge",
    "second_half_dropped",
)

#: The faults that are woven into the kernels, by stage.
_WOVEN: dict[str, tuple[str, ...]] = {
    "rms_norm": (*COMMON_FAULTS, "truncate", "echo", "second_call_differs", "eps_1e-5", "missing_gamma", "row0_scale"),
    "qkv_proj": (
        *COMMON_FAULTS,
        "echo",
        "second_call_differs",
        "row0_input",
        "k_and_v_exchanged",
        "bf16_accumulation",
        "last_k_tile_missing",
        "bf16_result",
    ),
    "qk_norm": (
        *COMMON_FAULTS,
        "echo",
        "second_call_differs",
        "eps_1e-5",
        "missing_gamma",
        "normalised_by_row",
        "q_weight_for_k",
        "row0_scale",
    ),
    "rope": (
        *COMMON_FAULTS,
        "truncate",
        "echo",
        "interleaved_pairs",
        "position_off_by_one",
        "wrong_sign",
        "k_not_rotated",
        "bf16_tables",
        "row0_length",
    ),
    "kv_write": (
        "nan_element",
        "input_changed",
        "past_the_end",
        "before_the_start",
        "raises_at_batch_1",
        "returns_a_tensor",
        "gain",
        "truncate",
        "slot_of_the_row_before",
        "k_not_written",
        "v_not_written",
        "next_slot",
        "token_major_page",
        "other_row_overwritten",
    ),
    "attention": (
        *COMMON_FAULTS,
        "truncate",
        "echo",
        *_OF_ATTENTION,
        "no_maximum",
        "whole_pages",
        "second_page_skipped",
        "keys_as_values",
        "bf16_scores",
        "bf16_accumulation",
        "no_rescale",
    ),
    "paged_attention": (
        *COMMON_FAULTS,
        "truncate",
        "echo",
        *_OF_ATTENTION,
        *_OF_BLOCK_TABLES,
        *_OF_PAGE_EDGES,
        "no_maximum",
        "maximum_starts_at_zero",
        "masked_scores_are_zero",
        "keys_as_values",
        "bf16_accumulation",
        "no_rescale",
    ),
    "o_proj": (
        *COMMON_FAULTS,
        "echo",
        "second_call_differs",
        "residual_missing",
        "weight_transposed",
        "row0_input",
        "bf16_accumulation",
        "last_k_tile_missing",
        "bf16_result",
    ),
    "mlp": (
        *COMMON_FAULTS,
        "echo",
        "second_call_differs",
        "gate_and_up_exchanged",
        "relu",
        "activation_not_rounded",
        "row0_input",
        "bf16_accumulation",
        "last_k_tile_missing",
    ),
    "lm_head": (
        *COMMON_FAULTS,
        "second_call_differs",
        "missing_gamma",
        "final_norm_missing",
        "eps_1e-5",
        "row0_scale",
        "row0_input",
        "state_of_the_row_before",
        "tail_rows_wrong",
        "weight_not_transposed",
        "normalised_not_rounded",
        "bf16_accumulation",
        "last_k_tile_missing",
        "bf16_result",
        "vocabulary_shifted",
        "half_the_vocabulary_zero",
        "last_tile_unwritten",
        "last_tile_zeroed",
        "last_tile_repeated",
    ),
    "greedy_sample": (
        "zeros",
        "row_unwritten",
        "input_changed",
        "past_the_end",
        "before_the_start",
        "raises_at_batch_1",
        "returns_a_tensor",
        "rows_exchanged",
        "row0_input",
        "highest_index_on_a_tie",
        "tie_goes_to_the_next_tile",
        "compared_in_bf16",
        "padded_column_wins",
        "maximum_starts_at_zero",
        "maximum_starts_at_minus_10",
        "last_tile_ignored",
        "index_within_the_tile",
        "index_off_by_one",
    ),
    "decode_layer": (*COMMON_FAULTS, *_OF_LAYERS, *_OF_ROUNDINGS, "truncate_result"),
    "decode_fwd_layers": (*COMMON_FAULTS, *_OF_LAYERS, *_OF_CHAINS, *_OF_ROUNDINGS, "truncate_result"),
    "paged_decode_layer": (
        "zeros",
        "gain",
        "truncate_result",
        *_OF_ROUNDINGS,
        "eps_1e-5",
        "attention_before_write",
        *_OF_BLOCK_TABLES,
        *_OF_PAGE_EDGES,
        *_OF_SLOTS,
    ),
    "decode_fwd": (
        "zeros",
        "gain",
        "bf16_result",
        *_OF_ROUNDINGS,
        *_OF_BATCHES,
        *_OF_CHAINS,
        *_OF_HEADS,
        "last_tile_zeroed",
        "vocabulary_shifted",
    ),
    "paged_decode_fwd": (
        "gain",
        "bf16_result",
        *_OF_ROUNDINGS,
        *_OF_BATCHES,
        *_OF_CHAINS,
        *_OF_HEADS,
        *_OF_BLOCK_TABLES,
        *_OF_SLOTS,
        "layer_stride_of_pages_in_use",
    ),
    "prefill_layer": (
        "gain",
        "truncate_result",
        *_OF_ROUNDINGS,
        "zeros",
        "row_unwritten",
        "echo",
        "attention_before_write",
        *_OF_BLOCK_TABLES,
        "stale_page",
        "whole_pages",
        *_OF_SLOTS,
        *_OF_PREFILL,
    ),
    "prefill_fwd": (
        "gain",
        "bf16_result",
        *_OF_ROUNDINGS,
        *_OF_BATCHES,
        *_OF_CHAINS,
        *_OF_HEADS,
        *_OF_PREFILL,
        "first_token",
        "last_row_of_the_pack",
        "layer_stride_of_pages_in_use",
    ),
}

#: Every fault by stage: those, and the ones that are a function of their own.
FAULTS: dict[str, tuple[str, ...]] = {stage: (*woven, *faults_of(stage)) for stage, woven in _WOVEN.items()}

#: Choices that a fault needs to show at all.
_NEEDS = {
    "no_rescale": Choices(block=16),
    "masked_scores_are_zero": Choices(whole_page="replace"),
    **{found.name: Choices(**found.choices) for found in REGISTERED.values() if found.choices},
}


def torch_kernel(stage: str, choices: Choices | None = None, fault: str = "") -> Kernel:
    """A torch kernel of a stage with these choices and at most one fault; each has its own count of calls.

    Raises ``KeyError`` for a fault that the stage does not have: a misspelt fault would be a right kernel.
    """
    if fault and fault not in FAULTS[stage]:
        raise KeyError(f"stage {stage} has no fault {fault!r}")
    maker = Maker(choices or _NEEDS.get(fault, Choices()), fault)
    kept: dict[str, Any] = {}

    def run(*arguments: Tensor, dims: Dims) -> Tensor | None:
        maker.calls += 1
        names = [argument.name for argument in declared.stage.arguments]
        tensors = dict(zip(names, arguments, strict=True))
        if fault == "raises_at_batch_1" and dims.B == 1:
            raise RuntimeError("this kernel needs at least two rows")
        if fault == "second_call_differs":
            maker.choices = dataclasses.replace(maker.choices, order="torch" if maker.calls % 2 else "reversed")
        call = Call(declared.stage, tensors, dims, maker.calls, kept, functools.partial(_run, maker, declared.stage))
        maker.at("call", Call.run)(call)
        return next(iter(call.outputs.values())) if fault == "returns_a_tensor" else None

    declared = kernel(stage, name=f"{stage}[{fault}]" if fault else stage)(run)
    return declared


def _run(maker: Maker, stage: Stage, tensors: Arguments, dims: Dims) -> None:
    """Compute, store, and spoil what has been stored if that is the fault."""
    results = _STAGES[stage.name](maker, tensors, dims)
    for name, value in results.items():
        _store(maker, tensors[name], value)
    written = [argument.name for argument in stage.outputs]
    _spoil(maker, tensors, stage.arguments[0].name, written, results, dims)


def _store(m: Maker, out: Tensor, value: Tensor) -> None:
    """The last cast, and faults of it."""
    if m.has("gain"):
        value = value * 1.005
    if m.has("bf16_result"):
        value = value.to(BF16).float()
    if out.dtype == BF16:
        value = truncated(value) if m.has("truncate") or m.has("truncate_result") else m.cast(value)
    rows = out.shape[0]
    if m.has("row_unwritten"):
        out[: rows - 1] = value[: rows - 1].to(out.dtype)
        return
    if m.has("column_tile_unwritten"):
        out[:, :16] = value[:, :16].to(out.dtype)
        out[:, 32:] = value[:, 32:].to(out.dtype)
        return
    if m.has("last_tile_unwritten"):
        whole = out.shape[1] // torch_layers.VOCABULARY_TILE * torch_layers.VOCABULARY_TILE
        out[:, :whole] = value[:, :whole]
        return
    if m.has("rows_exchanged") and rows > 1:
        value = torch.cat([value[1:2], value[:1], value[2:]])
    out.copy_(value)


def _spoil(m: Maker, tensors: Arguments, first: str, written: list[str], results: dict[str, Tensor], dims: Dims) -> None:
    """What goes wrong after the values were right."""
    out = tensors[next(iter(results), written[0])]
    if m.has("zeros"):
        for name in results:
            tensors[name].zero_()
    elif m.has("nan_element"):
        if not results:  # kv_write
            slot = int(tensors["slot_mapping"][-1])
            out[slot // dims.BS * dims.NKV * dims.BS + slot % dims.BS, 3] = math.nan
        else:
            out[-1, 3] = math.nan
    elif m.has("column_tile_zeroed_once_in_three") and m.calls % 3 == 0:
        out[:, 16:32] = 0
    elif m.has("input_changed"):
        tensors[first][-1, -1] += 1
    elif m.has("past_the_end"):
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(1)
    elif m.has("before_the_start"):
        out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(1)
    elif m.has("echo"):
        source = next(name for name in ("residual", "hidden_states", "x", "q") if name in tensors)
        out.copy_(tensors[source])
