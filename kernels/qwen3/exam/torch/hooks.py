"""Where a fault is woven into the right torch kernels, and the faults that are.

Where the right kernels compute something that is easily got wrong they ask for what stands at a *hook*: usually the right
function, or a fault's, which takes the same arguments. The hooks, and the function that belongs there:

- ``operations.py``, norms: ``statistic eps eps_of root norm head_norm gamma deferred_scale``; products: ``operands sum``; the
  MLP: ``activation activation_cast``; RoPE: ``rope_row rope_tables rotation rotated_head``; attention: ``softmax_attention
  scale scores mask running_maximum exponential probabilities rescale merge_of_splits denominator``; casts: ``cast
  normalised_cast``.
- ``layers.py``, what is read and written: ``page_size length tokens_computed positions positions_read page cache_row layer_stride
  cache_layer layer_read slot token_written head_written new_rows after_write attended_caches kv_head query_heads
  keys_and_values``; layers: ``layers_run layer_input weight queries_keys_values attention_sum mlp_input mlp_residual mlp_sum``;
  the LM head: ``last_tokens head_input final_projection``; casts: ``query_cast key_cast value_cast attention_cast carried_cast``.
- ``kernels.py``: ``argmax`` of greedy sampling, ``result`` and ``result_cast`` of what any kernel returns, and ``call``, which
  has the whole call of a right kernel in its hands (``Call``) and may give it other arguments or spoil what it wrote.

So a fault is added by one function in ``faults/``: its name is the fault's, its docstring says in one line what the engineer did,
and the decorator has the hook, the kind and the stages. Another hook, for other stages, is one more function of that name.
"""

from __future__ import annotations

from conformance.exam.known_kernels import Faults

#: Every fault of the torch kernels.
FAULTS = Faults()
fault = FAULTS.declare

#: What names a mistake inside a layer that no element shows: the shape of what it adds is known.
SIGNATURES = ("signature", "pooled_signature")

# Stages that have something in common.
ROWS = ("rms_norm", "qkv_proj", "qk_norm", "rope", "attention", "paged_attention", "o_proj", "mlp", "lm_head")
NORMS = ("rms_norm", "qk_norm", "lm_head", "decode_layer")
PRODUCTS = ("qkv_proj", "o_proj", "mlp", "lm_head", "decode_layer")
ATTENTIONS = ("attention", "paged_attention")
DECODE_LAYERS = ("decode_layer", "paged_decode_layer")
CHAINS = ("decode_fwd_layers", "decode_fwd", "paged_decode_fwd", "prefill_fwd")
#: Chains that end in logits.
TO_LOGITS = ("decode_fwd", "paged_decode_fwd", "prefill_fwd")
PREFILLS = ("prefill_layer", "prefill_fwd")
ENDING_IN_LOGITS = ("decode_fwd", "paged_decode_fwd", "prefill_fwd")
ALL_LAYERS = (*DECODE_LAYERS, "prefill_layer", *CHAINS)
#: A layer and a chain of layers over contiguous caches.
CONTIGUOUS_LAYERS = ("decode_layer", "decode_fwd_layers")
#: One layer, a chain to the logits, and chunks of tokens: enough for what all layers would show alike.
LAYERS_OF_EACH_KIND = ("decode_layer", "decode_fwd", "prefill_layer")
#: Layers and chains that read pages and write to them.
PAGED_LAYERS = ("paged_decode_layer", "paged_decode_fwd", "prefill_layer")
#: What reads a block table.
BLOCK_TABLES = ("paged_attention", *PAGED_LAYERS)
