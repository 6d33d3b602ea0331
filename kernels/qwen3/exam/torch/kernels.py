"""Torch kernels of every stage, right and wrong: what the harness is examined with.

``operations.py`` has their operations and ``choices.py`` what a legal kernel is free to do; ``layers.py`` has the layers, and
``faults/`` what a kernel is not free to do. A kernel is made by ``torch_kernel(stage, choices, fault)`` and takes the contract's
arguments and ``dims``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel, kernel
from conformance.contract.stage import Stage
from conformance.kernels.qwen3.exam.torch import layers as torch_layers
from conformance.kernels.qwen3.exam.torch.call import Call
from conformance.kernels.qwen3.exam.torch.choices import Choices
from conformance.kernels.qwen3.exam.torch.faults import sampling
from conformance.kernels.qwen3.exam.torch.hooks import FAULTS
from conformance.kernels.qwen3.exam.torch.layers import Arguments, Step
from conformance.kernels.qwen3.exam.torch.operations import BF16, Operations

Tensor = torch.Tensor


def _rms_norm(ops: Operations, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    return {"out": ops.norm(t["x"].float(), t["weight"][0], dims.eps)}


def _qkv_proj(ops: Operations, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    return {"q": ops.matmul(t["x"], t["wq"]), "k": ops.matmul(t["x"], t["wk"]), "v": ops.matmul(t["x"], t["wv"])}


def _qk_norm(ops: Operations, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    return {
        "q_out": ops.heads_normalised(t["q"], t["q_norm_weight"][0], dims),
        "k_out": ops.heads_normalised(t["k"], t["k_norm_weight"][0], dims),
    }


def _rope(ops: Operations, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    q, k = ops.maybe(ops.choices.before_rope, t["q"]), ops.maybe(ops.choices.before_rope, t["k"])
    lengths = t["seq_lens"].tolist()
    positions = [ops.at("length", torch_layers.own_length)(lengths, b) - 1 for b in range(dims.B)]
    rope_rows = [ops.rope_row(position, b, position, dims) for b, position in enumerate(positions)]
    q, k = (ops.rotated(tensor, rope_rows, t["rope_cos"], t["rope_sin"], dims) for tensor in (q, k))
    return {"q_out": q, "k_out": k}


def _kv_write(ops: Operations, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    # Updates in place by itself: what it returns is already in the caches.
    slots = t["slot_mapping"].tolist()
    for b in range(dims.B):
        page, offset = divmod(ops.at("slot", torch_layers.own_slot)(slots, b, dims), dims.BS)
        for head in range(dims.NKV):
            if not ops.at("head_written", torch_layers.every_head)(head, dims):
                continue
            row = ops.at("cache_row", torch_layers.cache_row)(page, offset, head, dims) % len(t["k_cache"])
            columns = slice(head * dims.D, (head + 1) * dims.D)
            k, v = (ops.at("result", _as_it_is)(t[name][b, columns].float()) for name in ("k", "v"))
            k, v = ops.at("new_rows", torch_layers.both)(ops.cast(k), ops.at("result_cast", ops.cast)(v))
            t["k_cache"][row], t["v_cache"][row] = k.to(BF16), v.to(BF16)
    return {}


def _attention(ops: Operations, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    step = Step(ops, t, dims)
    return {"out": torch_layers.attention(ops, t["q"].float(), step, 0, t["k_cache"], t["v_cache"], dims)}


def _o_proj(ops: Operations, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    return {"out": ops.with_residual(t["attn"], t["wo"], t["residual"].float(), "attention_sum")}


def _mlp(ops: Operations, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    activation = ops.gated(ops.matmul(t["x"], t["w_gate"]), ops.matmul(t["x"], t["w_up"]))
    return {"out": ops.maybe(ops.choices.branch, ops.matmul(activation, t["w_down"]))}


def _lm_head(ops: Operations, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    hidden = t["hidden"].float()
    return {"logits": torch_layers.lm_head(ops, hidden, hidden, t["final_norm_weight"], t["lm_head_weight"], dims)}


def _greedy_sample(ops: Operations, t: Arguments, dims: Dims) -> dict[str, Tensor]:
    argmax = ops.at("argmax", functools.partial(_argmax, ops.choices.scan))
    return {"token_ids": torch.tensor([argmax(row) for row in t["logits"]])}


def _argmax(scan: str, logits: Tensor) -> int:
    """The lowest index of the largest of ``logits[V]``, found in the chosen way."""
    if scan == "pairs":
        indices = list(range(len(logits)))
        while len(indices) > 1:
            left, right = indices[::2], indices[1::2]
            winners = [b if logits[b] > logits[a] else a for a, b in zip(left, right, strict=False)]
            indices = winners + left[len(right) :]
        return indices[0]
    if scan == "whole":
        return int(logits.argmax())
    return sampling.argmax_by_tiles(logits, backward=scan == "backward")


_STAGES: dict[str, Callable[[Operations, Arguments, Dims], dict[str, Tensor]]] = {
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


def stages() -> Sequence[str]:
    """The stages that there are torch kernels of."""
    return tuple(_STAGES)


def torch_kernel(stage: str, choices: Choices | None = None, fault: str = "") -> Kernel:
    """A torch kernel of a stage with these choices, those that the fault needs unless given, and at most one fault.

    Each has its own count of calls. Raises ``KeyError`` for a fault that the stage does not have: a misspelt one would be a right
    kernel.
    """
    known = FAULTS.by_stage[stage]
    if fault and fault not in known:
        raise KeyError(f"stage {stage} has no fault {fault!r}")
    woven = known[fault] if fault else None
    if woven is not None:
        choices = _that_show(choices) if choices else Choices(**woven.choices)
    ops = Operations(choices or Choices(), woven)
    kept: dict[str, Any] = {}
    calls = 0

    def run(*arguments: Tensor, dims: Dims) -> Tensor | None:
        nonlocal calls
        calls += 1
        names = [argument.name for argument in declared.stage.arguments]
        tensors = dict(zip(names, arguments, strict=True))
        call = Call(declared.stage, tensors, dims, calls, kept, ops, functools.partial(_run, ops, declared.stage))
        return ops.at("call", Call.run)(call)

    declared = kernel(f"qwen3/{stage}", name=f"{stage}[{fault}]" if fault else stage)(run)
    return declared


def _that_show(choices: Choices) -> Choices:
    """These choices, but for those that have no place for the faults of norms and of the running maximum."""
    root = "inverse" if choices.root == "division" else choices.root
    return dataclasses.replace(choices, root=root, gamma_first=False, lazy_maximum=False)


def _run(ops: Operations, stage: Stage, tensors: Arguments, dims: Dims) -> None:
    """Compute and store."""
    for name, value in _STAGES[stage.name](ops, tensors, dims).items():
        out, value = tensors[name], ops.at("result", _as_it_is)(value)
        out.copy_(ops.at("result_cast", ops.cast)(value) if out.dtype == BF16 else value)


def _as_it_is(x: Tensor) -> Tensor:
    return x
