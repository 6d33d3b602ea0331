"""The exam's kernels in torch: every fault of every stage, the legal variants by name, and random combinations of choices."""

from __future__ import annotations

import dataclasses
import functools
import types

from conformance.contract.registry import stage_named
from conformance.exam.known_kernels import Fault, KnownKernel
from conformance.kernels.qwen3.exam.torch.choices import HUGGING_FACE_LIKE, RELEVANT, Choices, random_choices
from conformance.kernels.qwen3.exam.torch.hooks import FAULTS
from conformance.kernels.qwen3.exam.torch.kernels import stages, torch_kernel


@dataclasses.dataclass(frozen=True)
class Variant:
    """A legal way to compute a stage."""

    choices: Choices
    summary: str


def _variant(summary: str, **choices: object) -> Variant:
    return Variant(Choices(**choices), summary)  # type: ignore[arg-type]


#: Legal variants by name: one choice, or several that go together in kernels that exist.
VARIANTS: dict[str, Variant] = {
    "contract": _variant("the contract's own rounding points"),
    "sequential": _variant("sums term by term", order="sequential"),
    "reversed": _variant("sums term by term from the end", order="reversed"),
    "shuffled": _variant("sums terms in a random order", order="shuffled"),
    "split_k": _variant("sums four interleaved or consecutive parts apart", order="split4"),
    "k_tiles_of_32": _variant("sums tiles of 32 terms", order="tile32"),
    "k_tiles_of_64": _variant("sums tiles of 64 terms", order="tile64"),
    "k_tiles_of_16": _variant("sums tiles of 16 terms", order="tile16"),
    "k_tiles_of_128": _variant("sums tiles of 128 terms", order="tile128"),
    "pairwise": _variant("sums by a tree of halves", order="pairwise"),
    "compensated": _variant("sums term by term with Kahan's correction", order="compensated"),
    "padded_rows": _variant("products of whole tiles of 16 rows, the last one padded", padded=True),
    "padded_rows_split_k": _variant("the same in split-K", padded=True, order="split4"),
    "padded_rows_small_tiles": _variant("the same in tiles of 16 terms", padded=True, order="tile16"),
    "fp64": _variant("accumulates in fp64", order="double"),
    "half_away": _variant("casts round halves away from zero", cast="half_away"),
    "half_away_split_k": _variant("split-K, casts round halves away from zero", order="split4", cast="half_away"),
    "half_away_fp64": _variant("fp64 sums, casts round halves away from zero", order="double", cast="half_away"),
    "inverse_root": _variant("1 / sqrt instead of rsqrt", root="inverse"),
    "root_of_inverse": _variant("sqrt of the inverse instead of rsqrt", root="root_of_inverse"),
    "squares_divided_first": _variant("squares are divided by n before they are summed", mean_of_terms=True),
    "gamma_first": _variant("gamma is applied before 1/rms", gamma_first=True),
    "gamma_first_half_away": _variant(
        "the same with scaled squares and half-away casts", gamma_first=True, mean_of_terms=True, cast="half_away"
    ),
    "residual_first": _variant("a projection is accumulated onto the residual by tiles", residual_first=True, order="tile32"),
    "residual_first_by_terms": _variant("the same term by term", residual_first=True, order="sequential"),
    "residual_first_from_the_end": _variant("the same from the end", residual_first=True, order="reversed", padded=True),
    "divided_by_root": _variant("divides by the root", root="division"),
    "normalised_rounded": _variant("rounds the normalised value before gamma", normalised=True),
    "normalised_rounded_half_away": _variant("the same with half-away casts", normalised=True, cast="half_away"),
    "divided_and_rounded": _variant("divides by the root and rounds before gamma", root="division", normalised=True),
    "before_rope": _variant("rounds q and k between norm and RoPE", before_rope=True),
    "twice_before_rope": _variant("rounds the normalised heads, and again before RoPE", normalised=True, before_rope=True),
    "branch_rounded": _variant("rounds a projection before the residual", branch=True),
    "branch_rounded_split_k": _variant("split-K, rounded before the residual", branch=True, order="split4"),
    "gate_rounded": _variant("rounds the gate alone", gate=True),
    "up_rounded": _variant("rounds up alone", up=True),
    "silu_rounded": _variant("rounds gate, up and the activated gate", gate=True, up=True, silu_rounded=True),
    "silu_alone_rounded": _variant("rounds the activated gate alone", silu_rounded=True),
    "inside_in_fp32": _variant("keeps fp32 where the contract rounds inside a stage", inside="fp32"),
    "inside_in_tf32": _variant("keeps tf32 where the contract rounds inside a stage, and in all of the MLP", inside="tf32"),
    "normalised_in_fp16": _variant("rounds the normalised value to fp16 before gamma", normalised="fp16"),
    "gate_up_rounded": _variant("rounds gate and up before their product", gate=True, up=True),
    "mlp_roundings": _variant("rounds gate, up and the MLP's result", gate=True, up=True, branch=True),
    "all_mlp_roundings": _variant("rounds all that the MLP computes", gate=True, up=True, silu_rounded=True, branch=True),
    "silu_by_exp": _variant("x / (1 + exp(-x))", silu="exp"),
    "silu_by_tanh": _variant("SiLU by tanh", silu="tanh"),
    "silu_by_exp_rounded": _variant("x / (1 + exp(-x)) of rounded gates", silu="exp", gate=True, up=True),
    "exp2": _variant("exp2 with log2(e) in the scale", exponential="exp2"),
    "scaled_queries": _variant("the scale is applied to q in fp32", scaled_queries=True),
    "scaled_queries_exp2": _variant(
        "the same, exp2, online softmax", scaled_queries=True, exponential="exp2", block=64, probabilities="before"
    ),
    "online_8": _variant("online softmax, blocks of 8 keys", block=8),
    "online_128": _variant("online softmax, blocks of 128 keys", block=128),
    "online_16": _variant("online softmax, blocks of 16 keys", block=16),
    "online_32": _variant("online softmax, blocks of 32 keys", block=32),
    "online_64": _variant("online softmax, blocks of 64 keys", block=64),
    "flash": _variant("online softmax, exp2, bf16 probabilities", block=32, exponential="exp2", probabilities="before"),
    "flash_rounded_denominator": _variant(
        "online softmax, bf16 probabilities and the sum of those", block=32, exponential="exp2", probabilities="both"
    ),
    "flash_decoding": _variant("four parts of the keys, merged", splits=4, block=16, exponential="exp2"),
    "two_splits": _variant("two parts of the keys, merged", splits=2),
    "merged_by_logsum": _variant("four parts, normalised each, merged by the logarithms of their sums", splits=4, merge="logsum"),
    "merged_by_logsum_exp2": _variant(
        "the same with exp2 and bf16 probabilities",
        splits=2,
        merge="logsum",
        exponential="exp2",
        block=16,
        probabilities="both",
    ),
    "lazy_maximum": _variant("online softmax that rescales only when it must", block=16, lazy_maximum=True),
    "lazy_maximum_rounded": _variant(
        "the same with bf16 probabilities over pages in any order",
        block=8,
        lazy_maximum=True,
        probabilities="before",
        visit="shuffled",
    ),
    "splits_rounded": _variant("four parts, bf16 probabilities", splits=4, probabilities="before"),
    "probabilities_after": _variant("rounds normalised probabilities", probabilities="after"),
    "probabilities_before": _variant("rounds probabilities, not their sum", probabilities="before"),
    "probabilities_in_fp16": _variant("keeps probabilities in fp16", probabilities="fp16"),
    "flash_fp16": _variant("online softmax, exp2, fp16 probabilities", block=32, exponential="exp2", probabilities="fp16"),
    "probabilities_both": _variant("rounds probabilities before they are summed", probabilities="both"),
    "backward_pages": _variant("pages from the last to the first", visit="backward"),
    "shuffled_pages": _variant("pages in any order", visit="shuffled"),
    "masked_by_addition": _variant("last page read to its end, a large negative number added", whole_page="add"),
    "masked_by_selection": _variant("last page read to its end, scores replaced", whole_page="replace"),
    "flash_backward": _variant(
        "online softmax over pages from the last, bf16 probabilities", block=16, visit="backward", probabilities="both"
    ),
    "padded_flash": _variant(
        "online softmax over whole pages, masked by addition", block=32, whole_page="add", probabilities="before"
    ),
    "padded_splits": _variant("parts of whole pages, masked by selection", splits=2, block=16, whole_page="replace"),
    "projection_rounded": _variant("rounds q, k and v of a layer", projection=True),
    "residual_rounded": _variant("rounds the residual after attention", residual=True),
    "residual_and_branch_rounded": _variant("rounds projections and their residual", residual=True, branch=True),
    "deferred_input_norm": _variant("applies the input norm's 1/rms after the projections", deferred_input_norm=True),
    "deferred_post_norm": _variant("applies the second norm's 1/rms after gate and up", deferred_post_norm=True),
    "deferred_norms": _variant("applies both norms' 1/rms after", deferred_input_norm=True, deferred_post_norm=True),
    "deferred_final_norm": _variant("applies the final norm's 1/rms to the logits", deferred_final_norm=True),
    "deferred_final_norm_split_k": _variant("the same over split-K", deferred_final_norm=True, order="split4"),
    "deferred_final_norm_padded": _variant("the same over padded rows", deferred_final_norm=True, padded=True),
    "deferred_split_k": _variant(
        "split-K, both norms deferred, 1 / sqrt",
        order="split4",
        deferred_input_norm=True,
        deferred_post_norm=True,
        root="inverse",
    ),
    "deferred_flash": _variant(
        "norms deferred, online softmax with bf16 probabilities from the last page, half-away casts",
        deferred_input_norm=True,
        deferred_post_norm=True,
        block=32,
        probabilities="both",
        visit="backward",
        cast="half_away",
    ),
    "hugging_face": Variant(HUGGING_FACE_LIKE, "rounds where Hugging Face's model does"),
    "hugging_face_flash": Variant(
        dataclasses.replace(HUGGING_FACE_LIKE, probabilities="both", block=64, exponential="exp2", order="tile64"),
        "Hugging Face's roundings, online softmax",
    ),
    "hugging_face_half_away": Variant(
        dataclasses.replace(HUGGING_FACE_LIKE, cast="half_away", silu="exp", order="split4"),
        "Hugging Face's roundings, half-away casts, split-K",
    ),
    "rounded_pages_backward": _variant(
        "every rounding but the residual's, pages from the last",
        normalised=True,
        before_rope=True,
        gate=True,
        up=True,
        branch=True,
        projection=True,
        visit="backward",
    ),
    "chunk_at_once": _variant("all queries of a chunk together, under a causal mask", queries=0),
    "queries_by_16": _variant("16 queries of a chunk together", queries=16, block=16),
    "queries_by_3": _variant("three queries together, whole pages", queries=3, whole_page="replace"),
    "chunked_flash": _variant(
        "blocks of queries and of keys, bf16 probabilities", queries=16, block=32, probabilities="before", whole_page="add"
    ),
    "scan_by_tiles": _variant("the maximum tile by tile", scan="tiles"),
    "scan_backward": _variant("the maximum tile by tile from the end", scan="backward"),
    "scan_by_pairs": _variant("the maximum by a tree of pairs", scan="pairs"),
}


def variants_of(stage: str) -> dict[str, Variant]:
    """The variants all of whose choices mean something to a stage."""
    right = Choices()
    return {
        name: variant
        for name, variant in VARIANTS.items()
        if all(
            field.name in RELEVANT[stage] or getattr(variant.choices, field.name) == getattr(right, field.name)
            for field in dataclasses.fields(Choices)
        )
    }


def dims_of(stage: str, fault: str = "") -> dict[str, str | int]:
    """Dimensions at which a fault shows, small ones where there are layers; those of a legal kernel without a fault."""
    dims: dict[str, str | int] = {"preset": "tiny"}
    contract = stage_named(f"qwen3/{stage}")
    if contract.composite:
        dims["S"] = 48
    if "L" in contract.drawn:
        dims["L"] = 2
    if contract.has_chunks:
        dims["T"] = 24
    if fault:
        dims.update(FAULTS.by_stage[stage][fault].dims)
    return dims


def _faulty(stage: str, fault: Fault) -> KnownKernel:
    return KnownKernel(
        stage,
        fault.name,
        fault.kind,
        fault.summary,
        functools.partial(torch_kernel, stage, fault=fault.name),
        dims=types.MappingProxyType(dims_of(stage, fault.name)),
        detectors=fault.detectors,
        rounds=fault.rounds,
    )


def _legal(stage: str, name: str, summary: str, choices: Choices, dims: dict[str, str | int]) -> KnownKernel:
    make = functools.partial(torch_kernel, stage, choices)
    return KnownKernel(stage, name, None, summary, make, dims=types.MappingProxyType(dims))


@functools.cache
def torch_kernels() -> tuple[KnownKernel, ...]:
    """Every fault of every stage, and every named variant that means something to it."""
    found = []
    if unknown := set(FAULTS.by_stage) - set(stages()):
        raise ValueError(f"faults are declared of stages that there are not: {', '.join(sorted(unknown))}")
    for stage in stages():
        found += [_faulty(stage, fault) for fault in FAULTS.of(stage)]
        found += [
            _legal(stage, name, variant.summary, variant.choices, dims_of(stage)) for name, variant in variants_of(stage).items()
        ]
    return tuple(found)


#: As many heads as Qwen3-14B has, small ones. What heads have in common adds up: four of them do not show it.
_MANY_HEADS: dict[str, str | int] = {"NH": 40, "NKV": 8, "D": 16}


def random_variant(stage: str, index: int, seed: int = 0) -> KnownKernel:
    """The random legal combination ``index`` of a seed and a stage, as one kernel of all combinations.

    One time in eight round the stage's regimes it is made for ``awkward``, one in 32 for many heads (single stages: the
    rest of a layer does not depend on their number); both take several times as long.
    """
    contract = stage_named(f"qwen3/{stage}")
    dims = dims_of(stage)
    turn = index // len(contract.regimes)
    if turn % 8 == 1:
        dims["preset"] = "awkward"
    elif turn % 32 == 3 and not contract.composite:
        dims.update(_MANY_HEADS)
    choices = random_choices(stage, f"{seed}/{index}")
    return _legal(stage, "random_combinations", "legal choices combined at random", choices, dims)
