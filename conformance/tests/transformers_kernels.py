"""Stages computed by the modules of ``transformers`` in bf16, as engineers run them, wrapped as kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel, kernel
from conformance.tests.transformers_models import LAYER_MODULES, qwen3_model

Tensor = torch.Tensor


def _model(t: dict[str, Tensor], dims: Dims, attention: str, frequencies_in_bf16: bool) -> Any:
    """The whole model in bf16 with the weights of a case."""
    model = qwen3_model(dims, dtype=torch.bfloat16)
    model.config._attn_implementation = attention
    if not frequencies_in_bf16:
        # A model that is loaded in bf16 keeps them in fp32; one that is converted to it does not.
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for name, module in LAYER_MODULES.items():
                weight = t[name].view(dims.L, -1, t[name].shape[-1])[index]
                layer.get_submodule(module).weight.copy_(weight.T if weight.shape[0] > 1 else weight[0])
        if "final_norm_weight" in t:
            model.model.norm.weight.copy_(t["final_norm_weight"][0])
            model.lm_head.weight.copy_(t["lm_head_weight"])
    return model


def _cache(t: dict[str, Tensor], dims: Dims, b: int, length: int) -> Any:
    """The history of a sequence, ``length`` rows of every layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index in range(dims.L):
        keys, values = (t[name].view(dims.L, dims.B, dims.NKV, dims.S, dims.D)[index, b, :, :length] for name in CACHES)
        cache.update(keys.unsqueeze(0).clone(), values.unsqueeze(0).clone(), index)
    return cache


CACHES = ("k_cache", "v_cache")


def _keep(cache: Any, t: dict[str, Tensor], dims: Dims, b: int, position: int) -> None:
    for index in range(dims.L):
        for name, rows in zip(CACHES, (cache.layers[index].keys, cache.layers[index].values), strict=True):
            t[name].view(dims.L, dims.B, dims.NKV, dims.S, dims.D)[index, b, :, position] = rows[0, :, position]


def _decode_layer(t: dict[str, Tensor], dims: Dims, **how: Any) -> None:
    layer = _model(t, dims, **how).model.layers[0]
    for b, length in enumerate(t["seq_lens"].tolist()):
        cache = _cache(t, dims, b, length - 1)
        position = slice(length - 1, length)
        tables = tuple(t[name][position].to(torch.bfloat16).unsqueeze(0) for name in ("rope_cos", "rope_sin"))
        hidden = layer(t["hidden_states"][b].view(1, 1, -1), past_key_values=cache, position_embeddings=tables)
        t["out"][b] = hidden.view(-1)
        _keep(cache, t, dims, b, length - 1)


def _decode_fwd(t: dict[str, Tensor], dims: Dims, **how: Any) -> None:
    model = _model(t, dims, **how)
    for b, length in enumerate(t["seq_lens"].tolist()):
        cache = _cache(t, dims, b, length - 1)
        hidden = t["hidden_states"][b].view(1, 1, -1)
        result = model(inputs_embeds=hidden, past_key_values=cache, position_ids=torch.tensor([[length - 1]]))
        t["logits"][b] = result.logits.view(-1)
        _keep(cache, t, dims, b, length - 1)


_STAGES: dict[str, Callable[..., None]] = {"decode_layer": _decode_layer, "decode_fwd": _decode_fwd}


def transformers_kernel(stage: str, attention: str, *, frequencies_in_bf16: bool = False, **declared: Any) -> Kernel:
    """``decode_layer`` or ``decode_fwd`` by ``transformers``, its attention ``eager`` or ``sdpa``, which declares this."""

    def run(*arguments: Tensor, dims: Dims) -> None:
        names = [argument.name for argument in made.stage.arguments]
        with torch.no_grad():
            tensors = dict(zip(names, arguments, strict=True))
            _STAGES[stage](tensors, dims, attention=attention, frequencies_in_bf16=frequencies_in_bf16)

    made = kernel(f"qwen3/{stage}", name=f"transformers_{attention}", **declared)(run)
    return made
