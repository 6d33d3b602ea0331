"""The Qwen3 decode contract: every stage's arguments, reference, error model and data.

Names, order, dtypes and layouts are fixed; kernels, references, generators and third-party kernels meet here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch

from conformance.contract.arguments import Argument, read, update, write
from conformance.contract.dims import Dims
from conformance.contract.registry import FullSize, Model
from conformance.contract.stage import Stage, Tensors
from conformance.kernels.qwen3 import error_model, inputs, localise, reference, steps
from conformance.kernels.qwen3.capabilities import CAPABILITIES
from conformance.kernels.qwen3.config import PRESETS
from conformance.kernels.qwen3.layout import Layout
from conformance.kernels.qwen3.mistakes import MISTAKES
from conformance.numerics.arithmetic import Arithmetic
from conformance.numerics.bounds import Profile
from conformance.numerics.ulp import Mode

bf16, f32, i32 = torch.bfloat16, torch.float32, torch.int32

CONTIGUOUS = "L*B*NKV*S D"
PAGED = "L*NB*NKV*BS D"


def _ties(tensors: Tensors, outputs: Tensors, dims: Dims) -> dict[str, torch.Tensor]:
    """Token ids whose logit is the largest, whether or not they are the lowest such index."""
    logits, ids = tensors["logits"], outputs["token_ids"].long()
    inside = (ids >= 0) & (ids < logits.shape[1])
    found = logits.gather(1, ids.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return {"token_ids": inside & (found == logits.amax(-1))}


def _outputs(
    function: Callable[..., tuple[torch.Tensor, ...]], arguments: Sequence[Argument]
) -> Callable[..., dict[str, torch.Tensor]]:
    """A reference called by name: inputs in, outputs by name, in the order of the contract."""
    given = [argument.name for argument in arguments if argument.access != "out"]
    written = [argument.name for argument in arguments if argument.access != "in"]

    def call(tensors: Tensors, dims: Dims, arithmetic: Arithmetic) -> dict[str, torch.Tensor]:
        results = function(**{name: tensors[name] for name in given}, dims=dims, a=arithmetic)
        return dict(zip(written, results, strict=True))

    return call


def _profiles(
    *roundings: str,
    casts: Sequence[Mode] = ("half_even", "half_away"),
    inside: Sequence[str] = (),
    only_together: bool = False,
) -> tuple[Profile, ...]:
    """Every combination of a stage's optional roundings with every legal cast, the contract's own points first.

    More accurate is never wrong. So each combination comes once more for kernels that keep a finer format than bf16, or fp32, at
    the places where it has no bf16; and once more for those that do so where the contract rounds ``inside`` the stage too. With
    ``only_together`` the former are left out: a rounding to bf16 that follows a finer one falls on the other side of many ties,
    and what that allows would hide mistakes.
    """
    together: tuple[Sequence[str], ...] = (inside,) if only_together else ((), inside)
    found = []
    subsets = [chosen for count in range(len(roundings) + 1) for chosen in itertools.combinations(roundings, count)]
    for is_finer, chosen, at_most_bf16 in itertools.product((False, True), subsets, together):
        finer = frozenset(roundings) - set(chosen) | set(at_most_bf16) if is_finer else frozenset[str]()
        if bool(finer) is not is_finer:
            continue
        for cast in casts:
            words = ["+".join(chosen) or "contract", *(["finer " + "+".join(sorted(finer))] if finer else []), cast]
            name = ",".join(word for word in words if word != "half_even")
            found.append(Profile(name, frozenset(chosen), cast, finer=finer))
    return tuple(dict.fromkeys(found))


#: What a kernel may declare that it rounds, besides what is legal anyway.
_DECLARABLE_OF_ROPE = {"rope tables": ("rope_cos", "rope_sin"), "rotation products": ("rotation products",)}
_DECLARABLE_OF_ATTENTION = {"scores": ("unscaled scores", "scores")}
_NORM_WEIGHTS = ("input_rms_weight", "q_norm_weight", "k_norm_weight", "post_rms_weight", "final_norm_weight")

#: Inside a layer every optional rounding may or may not happen, and the norms' division may come after the projections.
_EVERYWHERE = frozenset({"normalised", "before_rope", "projection", "probabilities", "branch", "residual", "gate", "up", "silu"})
_LAYER_PROFILES = (
    Profile("modelled", _EVERYWHERE, modelled=True),
    Profile("modelled,deferred_norm", _EVERYWHERE | {"deferred_norm"}, modelled=True),
)

_VALUE_REGIMES = ("normal", "small", "outlier", "constant", "heavy_tail", "mixed_rows", "big")
_LAYER_REGIMES = ("normal", "small", "outlier", "heavy_tail", "mixed_rows", "length_one", "long", "needle", "big")

LAYER_WEIGHTS = (
    read("input_rms_weight", "L H", f32),
    read("wq", "L*H NH*D", bf16),
    read("wk", "L*H NKV*D", bf16),
    read("wv", "L*H NKV*D", bf16),
    read("q_norm_weight", "L D", f32),
    read("k_norm_weight", "L D", f32),
    read("wo", "L*NH*D H", bf16),
    read("w_gate", "L*H I", bf16),
    read("w_up", "L*H I", bf16),
    read("w_down", "L*I H", bf16),
    read("post_rms_weight", "L H", f32),
)
_TABLES = (read("rope_cos", "S D", f32), read("rope_sin", "S D", f32))
_LENGTHS = (read("seq_lens", "B", i32),)
_PAGES = (read("block_table", "B*MB", i32), read("slot_mapping", "B", i32))
_HEAD = (read("final_norm_weight", "1 H", f32), read("lm_head_weight", "V H", bf16))
_LOGITS = (write("logits", "B V", f32),)


def _caches(shape: str) -> tuple[Argument, Argument]:
    return update("k_cache", shape, bf16), update("v_cache", shape, bf16)


_DECODE = (read("hidden_states", "B H", bf16), *LAYER_WEIGHTS)
_CONTIGUOUS_STEP = (*_DECODE, *_LENGTHS, *_TABLES, *_caches(CONTIGUOUS))
_PAGED_STEP = (*_DECODE, *_LENGTHS, *_PAGES, *_TABLES, *_caches(PAGED))
_PREFILL = (
    read("hidden_states", "T H", bf16),
    *LAYER_WEIGHTS,
    *_LENGTHS,
    read("chunk_lens", "B", i32),
    read("chunk_offsets", "B", i32),
    read("block_table", "B*MB", i32),
    read("slot_mapping", "T", i32),
    *_TABLES,
    *_caches(PAGED),
)
_HIDDEN = (write("out", "B H", bf16),)


def _stage(name: str, summary: str, arguments: tuple[Argument, ...], **keywords: object) -> Stage:
    keywords = {"capabilities": ("variable_batch",), "drawn": ("B",), **keywords}
    unknown = [regime for regime in keywords["regimes"] if regime not in inputs.REGIMES]  # type: ignore[attr-defined]
    if unknown:
        raise ValueError(f"stage {name} has regimes that no data are made for: {', '.join(unknown)}")
    declarable: dict[str, tuple[str, ...]] = keywords.setdefault("declarable", {})  # type: ignore[assignment]
    return Stage(
        model="qwen3",
        # Every operation of a bf16 module rounds, and its weights and tables are bf16.
        policies={"torch_bf16": tuple(declarable)},
        name=name,
        summary=summary,
        arguments=arguments,
        reference=_outputs(getattr(reference, name), arguments),
        error_model=getattr(error_model, name),
        make_inputs=getattr(inputs, name),
        **keywords,  # type: ignore[arg-type]
    )


RMS_NORM = _stage(
    "rms_norm",
    "bf16(rn(x, weight))",
    (read("x", "B H", bf16), read("weight", "1 H", f32), write("out", "B H", bf16)),
    regimes=_VALUE_REGIMES,
    profiles=_profiles("normalised"),
    declarable={"norm weights": ("weight",)},
)
QKV_PROJ = _stage(
    "qkv_proj",
    "three products: x @ wq, x @ wk, x @ wv",
    (
        read("x", "B H", bf16),
        read("wq", "H NH*D", bf16),
        read("wk", "H NKV*D", bf16),
        read("wv", "H NKV*D", bf16),
        write("q", "B NH*D", f32),
        write("k", "B NKV*D", f32),
        write("v", "B NKV*D", f32),
    ),
    regimes=(*_VALUE_REGIMES, "cancel"),
    profiles=_profiles(casts=("half_even",)),
    declarable={"projection": ("projection",)},
)
QK_NORM = _stage(
    "qk_norm",
    "rn of each head by itself",
    (
        read("q", "B NH*D", f32),
        read("k", "B NKV*D", f32),
        read("q_norm_weight", "1 D", f32),
        read("k_norm_weight", "1 D", f32),
        write("q_out", "B NH*D", f32),
        write("k_out", "B NKV*D", f32),
    ),
    regimes=_VALUE_REGIMES,
    profiles=_profiles("normalised", "before_rope"),
    declarable={"norm weights": ("q_norm_weight", "k_norm_weight")},
)
ROPE = _stage(
    "rope",
    "rotate-half at position seq_lens[b] - 1, then bf16",
    (
        read("q", "B NH*D", f32),
        read("k", "B NKV*D", f32),
        read("seq_lens", "B", i32),
        read("rope_cos", "S D", f32),
        read("rope_sin", "S D", f32),
        write("q_out", "B NH*D", bf16),
        write("k_out", "B NKV*D", bf16),
    ),
    regimes=(*_VALUE_REGIMES, "length_one", "long"),
    profiles=_profiles("before_rope"),
    declarable=_DECLARABLE_OF_ROPE,
    has_lengths=True,
)
KV_WRITE = _stage(
    "kv_write",
    "the cache rows of slot slot_mapping[b] become k and bf16(v)",
    (
        read("k", "B NKV*D", bf16),
        read("v", "B NKV*D", f32),
        read("slot_mapping", "B", i32),
        update("k_cache", PAGED, bf16),
        update("v_cache", PAGED, bf16),
    ),
    regimes=(*_VALUE_REGIMES, "length_one", "long"),
    profiles=_profiles(),
    drawn=("B", "NB"),
    has_lengths=True,
    capabilities=("paged_kv", "variable_batch"),
)
_ATTENTION_REGIMES = (*_VALUE_REGIMES, "cancel", "length_one", "long", "needle", "low")
_ATTENTION_PROFILES = (
    *_profiles("probabilities"),
    # The denominator sums the rounded probabilities.
    *(
        dataclasses.replace(
            profile,
            name=profile.name.replace("probabilities", "probabilities+denominator_of_rounded"),
            roundings=profile.roundings | {"denominator_of_rounded"},
        )
        for profile in _profiles("probabilities")
        if profile.roundings
    ),
)
ATTENTION = _stage(
    "attention",
    "softmax attention over the first seq_lens[b] rows of a contiguous cache",
    (
        read("q", "B NH*D", bf16),
        *_LENGTHS,
        read("k_cache", CONTIGUOUS, bf16),
        read("v_cache", CONTIGUOUS, bf16),
        write("out", "B NH*D", bf16),
    ),
    regimes=_ATTENTION_REGIMES,
    profiles=_ATTENTION_PROFILES,
    declarable=_DECLARABLE_OF_ATTENTION,
    has_lengths=True,
    examples=60,
)
PAGED_ATTENTION = _stage(
    "paged_attention",
    "softmax attention over the first seq_lens[b] rows of the pages in block_table",
    (
        read("q", "B NH*D", bf16),
        *_LENGTHS,
        read("block_table", "B*MB", i32),
        read("k_cache", PAGED, bf16),
        read("v_cache", PAGED, bf16),
        write("out", "B NH*D", bf16),
    ),
    regimes=_ATTENTION_REGIMES,
    profiles=_ATTENTION_PROFILES,
    declarable=_DECLARABLE_OF_ATTENTION,
    tags=frozenset({"paged"}),
    drawn=("B", "NB"),
    has_lengths=True,
    capabilities=("paged_kv", "variable_batch"),
    examples=60,
)
O_PROJ = _stage(
    "o_proj",
    "attn @ wo + residual",
    (read("attn", "B NH*D", bf16), read("wo", "NH*D H", bf16), read("residual", "B H", bf16), write("out", "B H", f32)),
    regimes=(*_VALUE_REGIMES, "cancel"),
    profiles=_profiles("branch"),
    declarable={"result": ("result",)},
)
MLP = _stage(
    "mlp",
    "bf16(silu(x @ w_gate) * (x @ w_up)) @ w_down",
    (
        read("x", "B H", bf16),
        read("w_gate", "H I", bf16),
        read("w_up", "H I", bf16),
        read("w_down", "I H", bf16),
        write("out", "B H", f32),
    ),
    regimes=(*_VALUE_REGIMES, "cancel"),
    profiles=_profiles("gate", "up", "silu", "branch", inside=("activation",), only_together=True),
)
_LM_HEAD_PROFILES = (
    *_profiles("normalised", inside=("final norm",)),
    # Where the division comes after the projection no normalised value is there to be rounded.
    *(
        dataclasses.replace(
            profile, name=profile.name.replace("contract", "deferred_norm"), roundings=frozenset({"deferred_norm"})
        )
        for profile in _profiles(inside=("final norm",))
    ),
)
LM_HEAD = _stage(
    "lm_head",
    "bf16(rn(hidden, final_norm_weight)) @ lm_head_weight.T",
    (read("hidden", "B H", bf16), *_HEAD, *_LOGITS),
    regimes=_VALUE_REGIMES,
    profiles=_LM_HEAD_PROFILES,
    declarable={"norm weights": ("final_norm_weight",), "logits": ("logits",)},
)
GREEDY_SAMPLE = _stage(
    "greedy_sample",
    "index of the largest logit, the lowest index on a tie",
    (read("logits", "B V", f32), write("token_ids", "B", i32)),
    regimes=(*_VALUE_REGIMES, "ties", "near_ties", "edges", "negative"),
    profiles=_profiles(casts=("half_even",)),
    ties=_ties,
)


def _layers(name: str, summary: str, arguments: tuple[Argument, ...], *drawn: str, prefill: bool = False) -> Stage:
    """A stage of one layer or more: judged as a whole, and localised by its cache rows."""
    paged, stacked, ends_in_logits = "NB" in drawn, "L" in drawn, arguments[-1].name == "logits"
    tags = {"layers": True, "chain": stacked, "paged": paged, "prefill": prefill, "logits": ends_in_logits}
    can_show = {
        "paged_kv": paged,
        "variable_batch": True,
        "stacked_weights": stacked,
        "fused_layers": stacked,
        "fused_lm_head": ends_in_logits,
        "chunked_layers": stacked and not ends_in_logits,
        "host_loop": not stacked,
    }
    return _stage(
        name,
        summary,
        arguments,
        regimes=_LAYER_REGIMES,
        profiles=_LAYER_PROFILES,
        declarable={
            "norm weights": tuple(one.name for one in arguments if one.name in _NORM_WEIGHTS),
            **_DECLARABLE_OF_ROPE,
            **_DECLARABLE_OF_ATTENTION,
            **({"logits": ("logits",)} if ends_in_logits else {}),
        },
        tags=frozenset(tag for tag, is_so in tags.items() if is_so),
        drawn=("B", *drawn),
        has_lengths=True,
        has_chunks=prefill,
        rearrange=inputs.packed_rows if prefill else None,
        sequences=_sequences if prefill else None,
        composite=True,
        mistakes=MISTAKES,
        tie_prone=("residual", "hidden states"),
        localise=localise.layers,
        capabilities=tuple(name for name, shown in can_show.items() if shown),
        chain=None if ends_in_logits else ("hidden_states", "out"),
        following=steps.following if ends_in_logits and not prefill else None,
    )


def _sequences(tensors: Tensors, dims: Dims) -> torch.Tensor:
    return Layout.of(tensors, dims).sequence


DECODE_LAYER = _layers("decode_layer", "one layer on a contiguous cache", (*_CONTIGUOUS_STEP, *_HIDDEN))
PAGED_DECODE_LAYER = _layers("paged_decode_layer", "one layer on a paged cache", (*_PAGED_STEP, *_HIDDEN), "NB")
DECODE_FWD_LAYERS = _layers(
    "decode_fwd_layers", "hidden states after L stacked layers, in one program", (*_CONTIGUOUS_STEP, *_HIDDEN), "L"
)
DECODE_FWD = _layers(
    "decode_fwd", "the whole step: L layers and the LM head, in one program", (*_CONTIGUOUS_STEP, *_HEAD, *_LOGITS), "L"
)
PAGED_DECODE_FWD = _layers(
    "paged_decode_fwd", "the whole step on a paged cache: the serving form", (*_PAGED_STEP, *_HEAD, *_LOGITS), "L", "NB"
)
PREFILL_LAYER = _layers(
    "prefill_layer",
    "one layer for a packed chunk of new tokens: causal attention over the paged cache and the chunk",
    (*_PREFILL, write("out", "T H", bf16)),
    "NB",
    prefill=True,
)
PREFILL_FWD = _layers(
    "prefill_fwd",
    "logits of each sequence's last token after L layers over a packed chunk",
    (*_PREFILL, *_HEAD, *_LOGITS),
    "L",
    "NB",
    prefill=True,
)

STAGES = (
    RMS_NORM,
    QKV_PROJ,
    QK_NORM,
    ROPE,
    KV_WRITE,
    ATTENTION,
    PAGED_ATTENTION,
    O_PROJ,
    MLP,
    LM_HEAD,
    GREEDY_SAMPLE,
    DECODE_LAYER,
    PAGED_DECODE_LAYER,
    DECODE_FWD_LAYERS,
    DECODE_FWD,
    PAGED_DECODE_FWD,
    PREFILL_LAYER,
    PREFILL_FWD,
)

#: What the dearest real-size layer takes: 11.5 GB in the interpreter (paged, 4096 rows), and its weights once more.
FULL_SIZE_BYTES = 14 << 30
#: Layers and cache rows of the fused programs: the fewest layers that make a loop, and the model's own. 40 layers of 4096 rows
#: would be a cache of 5.4 GB, and PyPTO 0.2.0 refuses to write into a tensor of more than 4 GiB.
_FULL_DEPTHS = ({"B": 16, "S": 4096, "L": 2}, {"B": 16, "S": 2048, "L": 40})


def _executed_at_full_size(stage: Stage) -> tuple[dict[str, int], ...]:
    """Single layers: the whole batch and 256 cache rows; on a paged cache one sequence is as long as the model allows.

    A prefill reads all weights for every tile of 16 tokens, and the interpreter copies what is read: a few tiles are what fits.
    """
    if "chain" in stage.tags:
        return ()
    if "prefill" in stage.tags:
        return ({"B": 2, "S": 256, "T": 18},)
    return ({"B": 16, "S": 4096 if "paged" in stage.tags else 256},)


def _compiled_at_full_size(stage: Stage) -> tuple[dict[str, int], ...]:
    return _FULL_DEPTHS if "chain" in stage.tags else ()


def _on_card_at_full_size(stage: Stage) -> tuple[dict[str, int], ...]:
    """The whole batch; every layer of a chain, on caches that PyPTO can write. One pool of pages serves all batches."""
    sizes = _FULL_DEPTHS[-1] if "chain" in stage.tags else {"B": 16}
    published = PRESETS["qwen3_14b"].replace(**sizes)
    return ({**sizes, "NB": published.B * published.MB + 8} if "paged" in stage.tags else sizes,)


MODEL = Model(
    "qwen3",
    STAGES,
    PRESETS,
    kernel_modules=tuple(f"conformance.kernels.qwen3.{stage.name}" for stage in STAGES),
    reference_modules=tuple(
        f"conformance.kernels.qwen3.{name}" for name in ("reference", "error_model", "inputs", "steps", "localise", "mistakes")
    ),
    exam_modules=("conformance.kernels.qwen3.exam",),
    random_variants="conformance.kernels.qwen3.exam.torch.catalogue:random_variant",
    suite_presets=("tiny", "narrow"),
    check_presets=("tiny", "awkward"),
    capabilities=CAPABILITIES,
    full_size=FullSize("qwen3_14b", FULL_SIZE_BYTES, _executed_at_full_size, _compiled_at_full_size, _on_card_at_full_size),
)
