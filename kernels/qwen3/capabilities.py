"""What Qwen3 kernels may declare that they serve, and how each claim is shown."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from conformance.cases.case import Case, make_case
from conformance.contract.registry import Capability
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import bits
from conformance.running.capabilities import LAYERS, Proof, batch_sizes, chain, depths, not_held, with_dims
from conformance.running.runs import Judged

#: How many seeds are tried to find data in which sequences share pages: one case in three has them, where lengths allow.
SEEDS = 40


def other_pools(proof: Proof) -> Iterator[Judged]:
    """The same sequences in another pool, larger and in another order, with pages that sequences share: the same bits.

    Where no pages can be shared (no block table, one sequence, or one page each), in another pool only.
    """
    batch = proof.batch(3)
    case = make_case(proof.key(0, batch, 1))
    if "block_table" in case.inputs and batch > 1 and case.dims.S > case.dims.BS:
        # Only full pages are shared: where sequences have few, mixed lengths may leave none.
        keys = (proof.key(index, batch, 1, longest=longest) for longest in (False, True) for index in range(SEEDS))
        shared = next(filter(_shares_pages, map(make_case, keys)), None)
        if shared is None:
            text = f"pages that sequences share: none of {2 * SEEDS} data sets has any"
            yield not_held(proof.check, case.key, f"declared capability paged_kv could not be tested with {text}")
            return
        case = shared
    first, outcome = proof("on a pool of pages in random order", case)
    yield first
    # Which pages a sequence gets depends on the size of the pool.
    larger = make_case(with_dims(case.key, NB=case.dims.NB + 5))
    second, _ = proof(
        "when the same sequences lie in other pages", larger, lambda found: _difference(case, outcome, larger, found)
    )
    yield second


def _shares_pages(case: Case) -> bool:
    table = case.inputs["block_table"]
    owned = table[table >= 0].tolist()
    return len(set(owned)) < len(owned)


def _difference(case: Case, outcome: Outcome, other: Case, found: Outcome) -> str:
    """In what two runs of the same sequences differ, as a sentence; nothing if they fill the same bits."""
    before = _filled(case, outcome)
    for name, tensor in _filled(other, found).items():
        different = bits(tensor) != bits(before[name])
        if bool(different.any()):
            return f"{name} differs in the bits of {int(different.sum())} of {different.numel()} elements from the first pool's"
    return ""


def _filled(case: Case, outcome: Outcome) -> dict[str, torch.Tensor]:
    """What a call fills, wherever it lies: its outputs, and the rows of its updated caches at their slots."""
    filled = {argument.name: outcome.outputs[argument.name] for argument in case.stage.arguments if argument.access == "out"}
    slots = case.inputs.get("slot_mapping")
    for argument in case.stage.arguments:
        if argument.access == "io" and slots is not None:
            axes = argument.axes[0]
            rows = outcome.outputs[argument.name].view(*map(case.dims.size, axes), -1)
            pages = rows.movedim((axes.index("NB"), axes.index("BS")), (0, 1))
            filled[f"{argument.name}'s new rows"] = pages[slots.long() // case.dims.BS, slots.long() % case.dims.BS]
    return filled


def logits(proof: Proof) -> Iterator[Judged]:
    """One call, from hidden states to logits."""
    judged, _ = proof("from hidden states to logits", make_case(proof.key(0, proof.batch(2), 1)))
    yield judged


CAPABILITIES = (
    Capability({"paged_kv": "reads and writes the cache through block_table and slot_mapping"}, other_pools),
    Capability(
        {"variable_batch": "one compiled program serves every user batch from 1 to its capacity, with mixed lengths"}, batch_sizes
    ),
    Capability(
        {
            "stacked_weights": "takes the weights of L layers as one tensor and slices by layer on the device",
            "fused_layers": "loops over the layers inside one program",
        },
        depths,
    ),
    Capability({"fused_lm_head": "ends in final norm and vocabulary projection on the device"}, logits),
    Capability(
        {"chunked_layers": "runs a contiguous chunk of the layers per dispatch"}, lambda proof: chain(proof, (1, LAYERS - 1))
    ),
    Capability({"host_loop": "can be driven layer by layer from the host"}, lambda proof: chain(proof, (1,) * LAYERS)),
)
