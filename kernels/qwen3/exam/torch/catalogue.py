"""The exam's kernels in torch: every fault with its class and what an engineer did, and the legal variants by name.

Faults are in ``kernels.py`` (``FAULTS``). Those that are a function of their own say what they are where they stand
(``registry.py``); ``DESCRIBED`` does it for those that are woven into the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping

from conformance.contract.registry import stage_named
from conformance.exam.known_kernels import Kind, KnownKernel
from kernels.qwen3.exam.torch.arithmetic import HUGGING_FACE_LIKE
from kernels.qwen3.exam.torch.kernels import FAULTS, RELEVANT, Choices, random_choices, torch_kernel
from kernels.qwen3.exam.torch.registry import REGISTERED

#: Class and summary of the faults that are woven into the kernels, by class.
_WOVEN: dict[Kind, dict[str, str]] = {
    "value": {
        "gain": "every result is half a percent too large",
        "zeros": "the kernel was launched on an empty grid and its buffer cleared: all results are zero",
        "echo": "the input was copied to the output and nothing computed",
        "eps_1e-5": "eps is 1e-5 instead of the model's 1e-6",
        "missing_gamma": "the norm's weight is not applied",
        "row0_scale": "the 1/rms of the first row is used for every row",
        "normalised_by_row": "q and k are normalised over the whole row instead of head by head",
        "wrong_sign": "RoPE turns the other way: the sine has the wrong sign",
        "k_not_rotated": "RoPE is applied to q only",
        "scale_missing": "scores are not multiplied by D**-0.5",
        "relu": "ReLU instead of SiLU",
        "gate_and_up_exchanged": "SiLU is applied to the up projection, and the gate multiplied",
        "residual_missing": "the residual is not added",
        "second_residual_wrong": "the layer's input, not the state after attention, is added to the MLP's result",
        "final_norm_missing": "the LM head is applied to hidden states that were not normalised",
        "q_norm_missing": "queries are not normalised by head",
        "k_norm_missing": "keys are not normalised by head",
        "deferred_norm_dropped": "the deferred 1/rms of the input norm is never applied",
        "keys_as_values": "probabilities are multiplied by the keys instead of the values",
        "masked_scores_are_zero": "masked scores are set to zero instead of minus infinity, and so get a weight",
        "not_causal": "every token of a chunk sees the whole chunk",
        "only_itself_seen": "a token attends to itself only",
        "history_ignored": "a chunk attends to itself only, not to what the cache holds",
        "chunk_not_seen": "a chunk attends to the cache's history only",
        "highest_index_on_a_tie": "of equal logits the last one wins",
        "tie_goes_to_the_next_tile": "a later tile wins a tie: its maximum is compared with >=",
        "maximum_starts_at_minus_10": "the running maximum starts at -10, and a row of lower logits has no winner",
        "no_rescale": "online softmax: what was summed before is not rescaled when the maximum grows",
    },
    "indexing": {
        "rows_exchanged": "the first two rows of the batch are exchanged",
        "row0_input": "every row reads the first row's input",
        "row0_length": "the first sequence's length is used for every sequence",
        "k_and_v_exchanged": "the weights of k and v are exchanged",
        "q_weight_for_k": "k is normalised with q's weight",
        "interleaved_pairs": "RoPE rotates neighbouring pairs, as GPT-J does, instead of halves",
        "position_off_by_one": "RoPE is taken at position seq_len instead of seq_len - 1",
        "weight_transposed": "a square weight is used transposed",
        "weight_not_transposed": "the LM head's weight is reinterpreted as [H, V] instead of transposed",
        "modulo_heads": "query head h reads KV head h % NKV instead of h // G",
        "slot_of_the_row_before": "a row is written to the slot of the row before it",
        "next_slot": "rows are written one slot too far",
        "token_major_page": "pages are addressed by token, then head, instead of head, then token",
        "one_row_too_many": "attention reads one row past the sequence's end",
        "newest_row_dropped": "attention stops before the newest row",
        "oldest_row_dropped": "attention starts at the second row",
        "second_page_skipped": "the loop over pages jumps from the first to the third",
        "whole_pages": "the last page is read to its end and not masked",
        "partial_page_dropped": "only whole pages are attended to",
        "newest_row_dropped_at_a_page_edge": "the newest row is lost where the length is a multiple of the page",
        "stale_page": "the first row of a new page is not attended to",
        "shared_page_skipped": "a page that two sequences share is attended to by the later one only",
        "identity_block_table": "the block table is ignored: page j of sequence b is taken to be b * MB + j",
        "transposed_block_table": "the block table is read as [MB, B]",
        "page_off_by_one": "page j + 1 is read for page j",
        "page_of_the_next_sequence": "the first page is the next sequence's",
        "unowned_page": "the last page is read from one that nobody owns",
        "page_size_16": "the page size is a constant, 16",
        "vocabulary_shifted": "logits are stored one column too far",
        "last_tile_repeated": "the last, partial tile of the vocabulary repeats the tile before it",
        "state_of_the_row_before": "the LM head reads the hidden state of the row before",
        "tail_rows_wrong": "a partial tile of rows is filled with the first row",
        "last_tile_ignored": "the maximum is not looked for in the last tile",
        "index_within_the_tile": "the index counts from the start of its tile",
        "index_off_by_one": "the index counts from one",
        "padded_column_wins": "a padded column that holds zero takes part in the maximum",
        "weights_of_layer_0": "every layer uses the first layer's weights",
        "caches_of_layer_0": "every layer reads and writes the first layer's rows of the cache",
        "layer_stride_of_pages_in_use": "a layer's pages start after the pages in use, not after NB",
        "causal_from_zero": "the causal mask counts from the chunk's start instead of the sequence's",
        "position_of_the_first": "every token of a chunk is rotated to the position of its first",
        "position_from_zero": "positions of a chunk start from zero, whatever the cache holds",
        "offsets_ignored": "chunks are taken to lie in the order of the sequences",
        "slots_consecutive": "slots after a chunk's first are counted up instead of looked up",
        "first_token": "logits are those of a chunk's first token",
        "last_row_of_the_pack": "logits are those of the last packed row, for every sequence",
        "first_page_overwritten": "a token's row is written to its sequence's first page",
    },
    "unwritten": {
        "row_unwritten": "the last row is not written",
        "column_tile_unwritten": "one tile of columns is not written",
        "last_tile_unwritten": "the vocabulary's partial last tile is not written",
        "last_tile_zeroed": "the vocabulary's partial last tile is cleared instead of computed",
        "half_the_vocabulary_zero": "the second half of the vocabulary is never computed and holds zeros",
        "k_not_written": "keys are not written to the cache",
        "v_not_written": "values are not written to the cache",
        "rows_of_the_last_token_only": "of a chunk only the last token's key and value are written",
        "one_too_few_at_a_page_edge": "a chunk that ends with a page loses its last row in the cache",
        "second_half_dropped": "of a long chunk only the first half is computed",
    },
    "memory": {
        "input_changed": "an element of the input is changed",
        "past_the_end": "one element behind the output is written",
        "before_the_start": "one element before the output is written",
        "other_row_overwritten": "a cache row of another position is overwritten",
        "next_row_overwritten": "the cache row after the newest is written too",
        "minus_one_dereferenced": "entries -1 of the block table are read as pages",
    },
    "precision": {
        "truncate": "the cast to bf16 truncates",
        "truncate_result": "the last cast to bf16 truncates",
        "bf16_accumulation": "partial sums are kept in bf16",
        "bf16_result": "an fp32 result is rounded to bf16",
        "bf16_scores": "attention scores are rounded to bf16",
        "bf16_tables": "RoPE tables are kept in bf16",
        "activation_not_rounded": "the activation is not rounded to bf16 before the down projection",
        "normalised_not_rounded": "the normalised hidden state is not rounded to bf16 before the LM head",
        "compared_in_bf16": "logits are compared in bf16",
    },
    "dependency": {
        "attention_before_write": "attention reads the cache before the new row is in it",
        "last_k_tile_missing": "the last tile of a sum over K is not waited for and missing",
        "carried_state_ignored": "every layer reads the chain's initial value instead of the layer before it",
        "layer_dropped": "the second layer is skipped",
        "last_layer_dropped": "the loop over layers ends one too early",
        "head_on_the_last_layers_input": "the LM head reads the state before the last layer",
    },
    "nondeterminism": {
        "column_tile_zeroed_once_in_three": "a race clears a tile of columns in one call of three",
        "second_call_differs": "every second call sums in another order",
    },
    "robustness": {
        "raises_at_batch_1": "fails for a batch of one",
        "returns_a_tensor": "returns its result instead of only writing it",
        "nan_element": "one element of the last row is NaN",
        "one_row_nan": "the last row is NaN",
        "takes_16_rows": "reads 16 rows of hidden states, whatever the batch",
        "no_maximum": "softmax without subtracting the maximum, which overflows",
        "maximum_starts_at_zero": "the running maximum starts at zero: below it everything vanishes",
    },
}

#: Every fault's class and summary.
DESCRIBED: dict[str, tuple[Kind, str]] = {
    **{name: (kind, summary) for kind, faults in _WOVEN.items() for name, summary in faults.items()},
    **{found.name: (found.kind, found.summary) for found in REGISTERED.values()},
}


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
    "gate_up_rounded": _variant("rounds gate and up before their product", gate=True, up=True),
    "mlp_roundings": _variant("rounds gate, up and the MLP's result", gate=True, up=True, branch=True),
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


#: Faults that ``tiny`` does not show: its pages, widths and vocabulary are whole numbers of tiles.
_SHOWN_BY_AWKWARD = ("page_size_16", "last_tile_unwritten", "last_tile_zeroed", "last_tile_repeated")


def dims_of(stage: str, fault: str = "") -> dict[str, str | int]:
    """Dimensions at which a fault shows, small ones where there are layers; those of a legal kernel without a fault."""
    dims: dict[str, str | int] = {"preset": "awkward" if fault in _SHOWN_BY_AWKWARD else "tiny"}
    contract = stage_named(stage)
    if contract.composite:
        dims["S"] = 48
    if "L" in contract.drawn:
        dims["L"] = 2
    if contract.has_chunks:
        dims["T"] = 24
    if fault in REGISTERED:
        dims.update(REGISTERED[fault].dims)
    return dims


def _subject(
    stage: str, name: str, kind: Kind | None, summary: str, choices: Choices | None, fault: str, dims: Mapping[str, str | int]
) -> KnownKernel:
    make = functools.partial(torch_kernel, stage, choices, fault)
    return KnownKernel(stage, name, kind, summary, make, dims=types.MappingProxyType(dict(dims)))


@functools.cache
def torch_subjects() -> tuple[KnownKernel, ...]:
    """Every fault of every stage, and every named variant that means something to it."""
    found = []
    for stage, faults in FAULTS.items():
        for name in faults:
            kind, summary = DESCRIBED[name]
            found.append(_subject(stage, name, kind, summary, None, name, dims_of(stage, name)))
        for name, variant in variants_of(stage).items():
            found.append(_subject(stage, name, None, variant.summary, variant.choices, "", dims_of(stage)))
    return tuple(found)


#: As many heads as Qwen3-14B has, small ones. What heads have in common adds up: four of them do not show it.
_MANY_HEADS: dict[str, str | int] = {"NH": 40, "NKV": 8, "D": 16}


def random_variant(stage: str, index: int, seed: int = 0) -> KnownKernel:
    """The random legal combination ``index`` of a seed and a stage, as one subject of all combinations.

    One time in eight round the stage's regimes it is made for ``awkward``, one in 32 for many heads (single stages: the
    rest of a layer does not depend on their number); both take several times as long.
    """
    choices = random_choices(stage, f"{seed}/{index}")
    contract = stage_named(stage)
    dims = dims_of(stage)
    turn = index // len(contract.regimes)
    if turn % 8 == 1:
        dims["preset"] = "awkward"
    elif turn % 32 == 3 and not contract.composite:
        dims.update(_MANY_HEADS)
    return _subject(stage, "random_combinations", None, "legal choices combined at random", choices, "", dims)
