"""Small Qwen3 models of ``transformers``, the implementation that nobody here wrote: made in code, without a download."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from conformance.cases.source import Source
from conformance.contract.dims import Dims

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

#: What the modules call a layer's weights, by the contract's names.
LAYER_MODULES = {
    "input_rms_weight": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "q_norm_weight": "self_attn.q_norm",
    "k_norm_weight": "self_attn.k_norm",
    "wo": "self_attn.o_proj",
    "post_rms_weight": "post_attention_layernorm",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}


def qwen3_model(dims: Dims, *, tied: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """A ``Qwen3ForCausalLM`` of these dimensions, ready to be called, with weights that make every part of it matter.

    What ``transformers`` initialises with (norm weights of one, projections of 0.02) would hide faults: attention would be flat
    and a missing norm weight invisible. ``transformers`` is imported here: it takes seconds, and collecting tests must not.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Qwen3Config(
        vocab_size=dims.V,
        hidden_size=dims.H,
        intermediate_size=dims.I,
        num_hidden_layers=dims.L,
        num_attention_heads=dims.NH,
        num_key_value_heads=dims.NKV,
        head_dim=dims.D,
        max_position_embeddings=dims.S,
        rms_norm_eps=dims.eps,
        rope_parameters={"rope_type": "default", "rope_theta": dims.theta},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model = Qwen3ForCausalLM(config).double().eval()
    source = Source("transformers")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = source.normal(name, parameter.shape)
            if parameter.dim() == 1:
                values = 1 + 0.3 * values
            elif "embed_tokens" not in name or tied:
                values *= 2 * parameter.shape[1] ** -0.5
            parameter.copy_(values)
    return model.to(dtype)


@contextlib.contextmanager
def wide_steps() -> Iterator[None]:
    """Within it ``transformers`` normalises and takes its softmax in float64; otherwise in fp32 whatever the model's dtype."""
    from transformers.models.qwen3 import modeling_qwen3

    class Wide(types.ModuleType):
        """torch, as that module's code sees it, with another meaning of one name."""

        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    with mock.patch.object(modeling_qwen3, "torch", Wide("torch")):
        yield
