"""Casts to bf16 that truncate, or round away from zero. Inside a layer what they add is within every element's allowance."""

from __future__ import annotations

import torch

from conformance.kernels.qwen3.exam.torch.hooks import ALL_LAYERS, CHAINS, LAYERS_OF_EACH_KIND, SIGNATURES, fault
from conformance.kernels.qwen3.exam.torch.operations import raised, truncated

Tensor = torch.Tensor


#: Where a single stage, or all of a layer, shows a truncation otherwise.
_NAMED_BY = {
    "casts": ("spread", *SIGNATURES),
    "normalised": ("element", *SIGNATURES),
    "activation": ("element", *SIGNATURES),
}

for _name, _hook, _what, _stages in (
    ("casts", "cast", "every cast", ALL_LAYERS),
    ("normalised", "normalised_cast", "the cast of a norm's output", ("lm_head", *ALL_LAYERS)),
    ("queries", "query_cast", "the cast of the rotated queries", ALL_LAYERS),
    ("keys", "key_cast", "the cast of the rotated keys", ALL_LAYERS),
    ("values", "value_cast", "the cast of values", ALL_LAYERS),
    ("attention", "attention_cast", "the cast of the attention's result", ALL_LAYERS),
    ("activation", "activation_cast", "the cast of the activation", ("mlp", *ALL_LAYERS)),
    ("carried_state", "carried_cast", "the cast of the hidden states between layers", CHAINS),
):
    _truncates = "casts_truncate" if _name == "casts" else f"{_name}_truncated"
    _named_by = _NAMED_BY.get(_name, SIGNATURES)
    fault(_hook, "precision", *_stages, name=_truncates, summary=f"{_what} to bf16 truncates", detectors=_named_by)(truncated)
    _few = [stage for stage in _stages if stage in LAYERS_OF_EACH_KIND]
    _away = f"{_what} to bf16 rounds away from zero"
    fault(_hook, "precision", *_few, name=f"{_name}_rounded_up", summary=_away, detectors=SIGNATURES)(raised)
