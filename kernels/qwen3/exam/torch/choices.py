"""What a legal kernel is free to choose: which choices mean something to a stage, and combinations of them at random."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from conformance.kernels.qwen3.exam.torch.hooks import ENDING_IN_LOGITS, PREFILLS


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a legal kernel is free to choose. The defaults are the contract's own rounding points and torch's sums."""

    #: How a sum over K is ordered; ``shuffled`` adds single products in a random order, ``pairwise`` by a tree of halves,
    #: ``compensated`` with Kahan's correction, ``double`` accumulates in fp64.
    order: str = "torch"
    #: How fp32 values are cast to bf16: ``half_even`` or ``half_away``.
    cast: str = "half_even"
    #: Whether products are computed for whole tiles of 16 rows, the last one padded.
    padded: bool = False
    #: ``rsqrt(x)``, ``1 / sqrt(x)`` or ``sqrt(1 / x)`` times the value, or the value over ``sqrt(x)``.
    root: str = "rsqrt"
    #: Whether each square is divided by n before they are summed.
    mean_of_terms: bool = False
    #: Whether gamma is applied before 1/rms.
    gamma_first: bool = False
    #: Whether a projection's sum starts from the residual instead of being added to it.
    residual_first: bool = False
    #: ``exp`` or ``exp2`` with the scale folded into one factor.
    exponential: str = "exp"
    #: Whether the scale is applied to q, in fp32, instead of the scores.
    scaled_queries: bool = False
    #: Keys per block of an online softmax; 0 for one softmax over all keys.
    block: int = 0
    #: Parts of the keys that are attended to independently and merged.
    splits: int = 1
    #: What a part is merged by: its unnormalised result and ``maximum``, or its result and the logarithm of its sum (``logsum``).
    merge: str = "maximum"
    #: Whether the running maximum is left as it is until a score exceeds it by ``operations.LAZY``.
    lazy_maximum: bool = False
    #: In which order pages of keys are visited: ``forward``, ``backward`` or ``shuffled``.
    visit: str = "forward"
    #: Whether the last page is read to its end and masked: a large negative number is added to the scores past the sequence's
    #: end (``add``) or takes their place (``replace``).
    whole_page: str = "no"
    #: Prefill only: queries of one chunk that are attended for together, under a causal mask; 0 for the whole chunk.
    queries: int = 1
    #: bf16 probabilities: ``no``, ``after`` normalisation, ``before`` with the unrounded denominator, ``both`` rounded; ``fp16``
    #: ones before it.
    probabilities: str = "no"
    #: ``sigmoid``, ``exp`` (``x / (1 + exp(-x))``) or ``tanh``.
    silu: str = "sigmoid"
    #: Optional bf16 roundings; the normalised value may be rounded to ``fp16`` as well.
    normalised: bool | str = False
    before_rope: bool = False
    gate: bool = False
    up: bool = False
    silu_rounded: bool = False
    branch: bool = False
    #: What the contract's own roundings inside a stage are made to, of a norm's output and the activation: ``bf16``, ``tf32`` or
    #: ``fp32``; with ``tf32`` gate, up and SiLU are too, if they are not bf16.
    inside: str = "bf16"
    #: Optional inside a layer only: projections of the norm's output, and the residual after attention.
    projection: bool = False
    residual: bool = False
    #: Inside a layer only: the norms' 1/rms is applied after the projections.
    deferred_input_norm: bool = False
    deferred_post_norm: bool = False
    #: The same for the final norm, before the LM head.
    deferred_final_norm: bool = False
    #: How the largest logit is looked for: all at once, tile by tile from either end, or by pairs.
    scan: str = "whole"


ORDERS = (
    "torch",
    "sequential",
    "reversed",
    "split4",
    "tile16",
    "tile32",
    "tile64",
    "tile128",
    "shuffled",
    "pairwise",
    "compensated",
    "double",
)

#: Rounds where the Hugging Face implementation does (its RoPE apart, which the contract keeps in fp32).
HUGGING_FACE_LIKE = Choices(
    probabilities="after",
    normalised=True,
    before_rope=True,
    gate=True,
    up=True,
    silu_rounded=True,
    branch=True,
    projection=True,
    residual=True,
)

_ATTENTION = (
    "order",
    "padded",
    "cast",
    "exponential",
    "scaled_queries",
    "block",
    "splits",
    "merge",
    "lazy_maximum",
    "visit",
    "whole_page",
    "probabilities",
)


def _of_layers(stage: str) -> tuple[str, ...]:
    """Every choice, but for those that belong to other stages."""
    without = {"scan"} if stage in ENDING_IN_LOGITS else {"scan", "deferred_final_norm"}
    if stage not in PREFILLS:
        without.add("queries")
    return tuple(field.name for field in dataclasses.fields(Choices) if field.name not in without)


#: Which choices mean anything to a stage.
RELEVANT: dict[str, tuple[str, ...]] = {
    "rms_norm": ("order", "cast", "root", "mean_of_terms", "gamma_first", "normalised"),
    "qkv_proj": ("order", "padded"),
    "qk_norm": ("order", "cast", "root", "mean_of_terms", "gamma_first", "normalised", "before_rope"),
    "rope": ("order", "cast", "before_rope"),
    "kv_write": ("cast",),
    "attention": _ATTENTION,
    "paged_attention": _ATTENTION,
    "o_proj": ("order", "padded", "residual_first", "cast", "branch"),
    "mlp": ("order", "padded", "cast", "silu", "gate", "up", "silu_rounded", "branch", "inside"),
    "lm_head": ("order", "padded", "cast", "root", "mean_of_terms", "gamma_first", "normalised", "deferred_final_norm", "inside"),
    "greedy_sample": ("scan",),
    **{
        stage: _of_layers(stage)
        for stage in (
            "decode_layer",
            "paged_decode_layer",
            "decode_fwd_layers",
            "decode_fwd",
            "paged_decode_fwd",
            "prefill_layer",
            "prefill_fwd",
        )
    },
}

_VALUES: dict[str, tuple[Any, ...]] = {
    "normalised": (False, True, "fp16"),
    "inside": ("bf16", "tf32", "fp32"),
    "order": ORDERS,
    "cast": ("half_even", "half_away"),
    "root": ("rsqrt", "inverse", "root_of_inverse", "division"),
    "exponential": ("exp", "exp2"),
    "block": (0, 8, 16, 32, 64, 128),
    "splits": (1, 2, 4),
    "merge": ("maximum", "logsum"),
    "visit": ("forward", "backward", "shuffled"),
    "whole_page": ("no", "add", "replace"),
    "queries": (1, 3, 16, 0),
    "probabilities": ("no", "after", "before", "both", "fp16"),
    "silu": ("sigmoid", "exp", "tanh"),
    "scan": ("whole", "tiles", "backward", "pairs"),
}


def random_choices(stage: str, seed: int | str) -> Choices:
    """A random legal combination for a stage, the same for the same seed."""
    draw = random.Random(f"{stage}/{seed}")
    return Choices(**{name: draw.choice(_VALUES.get(name, (False, True))) for name in RELEVANT[stage]})


def single_choices(stage: str) -> list[Choices]:
    """The default, then each choice that matters to a stage changed by itself."""
    found = [Choices()]
    for name in RELEVANT[stage]:
        default = getattr(Choices(), name)
        found += [Choices(**{name: value}) for value in _VALUES.get(name, (False, True)) if value != default]
    return found
