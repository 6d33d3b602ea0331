"""What a kernel declares that it serves, put to the test.

A capability is a mechanism that a serving stack needs and that values alone do not show: a kernel may compute a full batch of one
size rightly and serve nothing else. Each claim is proven by a number of judged runs. Where one of them fails, or where the stage
has no means to show it, a finding of the detector ``capability`` says that the claim does not hold.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch

from conformance.cases.case import Case, make_case, make_inputs
from conformance.cases.key import CaseKey
from conformance.cases.source import Source
from conformance.cases.space import Space
from conformance.contract.dims import Dims
from conformance.contract.kernel import CAPABILITIES, Kernel
from conformance.contract.stage import layer_of
from conformance.judge.judgement import judge
from conformance.judge.verdict import Finding, Verdict
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import bits
from conformance.running.check import MOST_LOST, Judged, Runner, is_lost

#: What the ``check`` of these runs begins with; the names of the capabilities follow, joined by ``+``.
CHECK_PREFIX = "capability:"
#: User batches that one build has to serve besides its capacity: one alone, few, and one that fills no tile.
BATCHES = (1, 3, 7)
#: Layers of a chain: a first, a middle and a last one.
LAYERS = 3
#: How many seeds are tried to find data in which sequences share pages: one case in three has them, where lengths allow.
SEEDS = 40


def prove(kernel: Kernel, space: Space, run: Runner) -> Iterator[Judged]:
    """Put every capability that the kernel declares to the test, on cases of ``space``'s preset.

    ``run`` executes: a capability is nothing that compiling shows. A proof ends with its first run that fails, and all of them
    end when too many runs crash or time out.
    """
    lost = 0
    for names, proof in _PROOFS.items():
        claimed = [name for name in names if name in kernel.capabilities]
        if not claimed:
            continue
        check = CHECK_PREFIX + "+".join(claimed)
        impossible = [name for name in claimed if name not in kernel.stage.capabilities]
        if impossible:
            for name in impossible:
                reason = f"{name} ({CAPABILITIES[name]}): the arguments of {kernel.stage_name} cannot show it"
                yield _not_held(CHECK_PREFIX + name, space.largest, reason)
            continue
        for judged in proof(_Trial(kernel, space, run, check)):
            lost += is_lost(judged)
            yield judged
            if lost >= MOST_LOST:
                return
            if not judged.verdict.ok:
                break


def proven(check: str) -> tuple[str, ...]:
    """The capabilities that a run is evidence of, from its ``check``; none for any other run."""
    return tuple(check.removeprefix(CHECK_PREFIX).split("+")) if check.startswith(CHECK_PREFIX) else ()


def _not_held(check: str, key: CaseKey, reason: str, outcome: Outcome | None = None) -> Judged:
    return Judged(check, key, Verdict((Finding("capability", reason),)), outcome or Outcome("ok"))


@dataclasses.dataclass(frozen=True)
class _Trial:
    """The runs of one proof."""

    kernel: Kernel
    space: Space
    run: Runner
    check: str

    def __call__(self, about: str, case: Case, like: tuple[Case, Outcome] | None = None) -> tuple[Judged, Outcome]:
        """Judge one run; what is wrong with it becomes one finding that begins with the claim and ``about``.

        With ``like`` what the kernel fills must be the same as in that run, bit for bit: its outputs, and the cache rows.
        """
        names = proven(self.check)
        claim, several = " and ".join(names), len(names) > 1
        refusal = self.kernel.refusal(case.dims)
        if refusal is not None:
            outcome = Outcome("ok")
            return _not_held(
                self.check, case.key, f"{claim} {'are' if several else 'is'} not shown {about}: {refusal}", outcome
            ), outcome
        outcome = self.run(case, "last")
        verdict = judge(case, outcome, profile=self.kernel.profile)
        message = verdict.findings[0].message if verdict.findings else _difference(case, outcome, like)
        bare = dataclasses.replace(outcome, outputs={})
        if message:
            label = f" ({verdict.findings[0].detector})" if verdict.findings else ""
            verb = "do" if several else "does"
            return _not_held(self.check, case.key, f"{claim} {verb} not hold {about}{label}: {message}", bare), outcome
        return Judged(self.check, case.key, verdict, bare), outcome

    @property
    def free(self) -> Space:
        """The model without the sizes that the caller pinned: those are the proof's to vary."""
        model = tuple((name, value) for name, value in self.space.pinned if name not in ("B", "L", "NB"))
        return dataclasses.replace(self.space, pinned=model)

    @property
    def capacity(self) -> int:
        """The largest batch that the kernel serves and a case can have."""
        return min(self.kernel.capacity, self.free.limit.B)

    def batch(self, wanted: int) -> int:
        """As many sequences as wanted, or as the kernel takes: one that is made for a full batch has other claims to show."""
        others: list[int] = [self.space.limit.B, *range(self.free.limit.B, 0, -1)]
        for batch in [wanted, *others]:
            if self.kernel.refusal(self.key(0, batch, 1).dims) is None:
                return batch
        return wanted

    def key(self, index: int, batch: int, layers: int, *, longest: bool = False) -> CaseKey:
        """A case of mixed lengths, or of sequences that are full with their latest token; everything follows from ``index``."""
        stage, space = self.space.stage, self.free
        source = Source(f"capability/{stage.name}/{space.preset}/{index}")
        lengths: tuple[int, ...] = ()
        chunks: tuple[int, ...] = ()
        if stage.has_lengths:
            edges = space.length_boundaries()
            drawn = source.integers("length", 2, space.limit.S, batch) if space.limit.S > 1 else [1] * batch
            lengths = tuple(edges[(index + b) % len(edges)] if b % 2 else length for b, length in enumerate(drawn))
        if stage.has_chunks:
            chunks = space.chunks(source.integers("chunk", 1, 2 * space.limit.BS, batch), lengths)
        if longest:
            lengths, chunks = (space.limit.S,) * len(lengths), (1,) * len(chunks)
        regime = "normal" if "normal" in stage.regimes else stage.regimes[0]
        return space.key(regime, index, B=batch, L=layers, spare_pages=0, seq_lens=lengths, chunk_lens=chunks)


def _difference(case: Case, outcome: Outcome, like: tuple[Case, Outcome] | None) -> str:
    if like is not None:
        before = _filled(*like)
        for name, tensor in _filled(case, outcome).items():
            different = bits(tensor) != bits(before[name])
            if bool(different.any()):
                return f"{int(different.sum())} of {different.numel()} elements of {name} are not the same bits"
    return ""


def _filled(case: Case, outcome: Outcome) -> dict[str, torch.Tensor]:
    """What a call fills, wherever it lies: its outputs, and the rows of its updated caches at their slots."""
    filled = {argument.name: outcome.outputs[argument.name] for argument in case.stage.arguments if argument.access == "out"}
    slots = case.inputs.get("slot_mapping")
    for argument in case.stage.arguments:
        if argument.access == "io" and slots is not None:
            axes = argument.shape.split()[0].split("*")
            rows = outcome.outputs[argument.name].view(*(getattr(case.dims, axis) for axis in axes), -1)
            pages = rows.movedim((axes.index("NB"), axes.index("BS")), (0, 1))
            filled[f"{argument.name}'s new rows"] = pages[slots.long() // case.dims.BS, slots.long() % case.dims.BS]
    return filled


def _with(key: CaseKey, **overrides: int) -> CaseKey:
    return dataclasses.replace(key, overrides=tuple({**dict(key.overrides), **overrides}.items()))


def _other_pools(trial: _Trial) -> Iterator[Judged]:
    """The same sequences in another pool, larger and in another order, with pages that sequences share: the same bits.

    Where no pages can be shared (no block table, one sequence, or one page each), in another pool only.
    """
    batch = trial.batch(3)
    case = make_case(trial.key(0, batch, 1))
    if "block_table" in case.inputs and batch > 1 and case.dims.S > case.dims.BS:
        # Only full pages are shared: where sequences have few, mixed lengths may leave none.
        keys = (trial.key(index, batch, 1, longest=longest) for longest in (False, True) for index in range(SEEDS))
        shared = next(filter(_shares_pages, map(make_case, keys)), None)
        if shared is None:
            yield _not_held(trial.check, case.key, "paged_kv is not shown with pages that sequences share: no data has any")
            return
        case = shared
    first, outcome = trial("on a pool of pages in random order", case)
    yield first
    # Which pages a sequence gets depends on the size of the pool.
    larger = make_case(_with(case.key, NB=case.dims.NB + 5))
    second, _ = trial("when the same sequences lie in other pages", larger, (case, outcome))
    yield second


def _shares_pages(case: Case) -> bool:
    table = case.inputs["block_table"]
    owned = table[table >= 0].tolist()
    return len(set(owned)) < len(owned)


def _batches(trial: _Trial) -> Iterator[Judged]:
    """One build for every user batch: 1, 3, 7 and the capacity, with mixed lengths in a pool of one size."""
    capacity = trial.capacity
    for index, batch in enumerate(sorted({*BATCHES, capacity})):
        if batch > capacity:
            continue
        key = trial.key(index, batch, 1)
        if "NB" in trial.space.stage.drawn:
            key = _with(key, NB=1 + capacity * trial.space.limit.MB)
        judged, _ = trial(f"with a batch of {batch} in the build made for {trial.kernel.capacity}", make_case(key))
        yield judged


def _depths(trial: _Trial) -> Iterator[Judged]:
    """One layer and several, every layer with weights and a cache of its own."""
    for layers in (1, LAYERS):
        about = "with one layer" if layers == 1 else f"with {layers} layers"
        judged, _ = trial(about, make_case(_with(trial.key(layers, trial.batch(2), layers), L=layers)))
        yield judged


def _logits(trial: _Trial) -> Iterator[Judged]:
    judged, _ = trial("from hidden states to logits", make_case(trial.key(0, trial.batch(2), 1)))
    yield judged


def _chain(trial: _Trial, chunks: tuple[int, ...]) -> Iterator[Judged]:
    """Chunks of a deeper model one after another, each on its rows of weights and caches and on the result of the one before.

    Each call is judged by what a correct kernel makes of the inputs that it was really given.
    """
    stage = trial.space.stage
    assert stage.chain is not None
    start, result = stage.chain
    key = trial.key(0, trial.batch(2), 1)
    deep = key.dims.replace(L=sum(chunks))
    inputs = make_inputs(stage, key, deep)
    state = inputs[start]
    for first, count in zip(itertools.accumulate((0, *chunks)), chunks, strict=False):
        part = {name: _layers(tensor, name, first, count, trial, deep) for name, tensor in inputs.items()}
        case = Case(key, stage, deep.replace(L=count), {**part, start: state})
        last = first + count - 1
        about = f"at layer {first} of {deep.L}" if count == 1 else f"at layers {first} to {last} of {deep.L}"
        judged, outcome = trial(about, case)
        yield judged
        state = outcome.outputs[result]


def _layers(tensor: torch.Tensor, name: str, first: int, count: int, trial: _Trial, dims: Dims) -> torch.Tensor:
    """The rows of some layers, where the first axis stacks layers."""
    if "L" not in trial.space.stage.argument(name).shape.split()[0].split("*"):
        return tensor
    return layer_of(tensor, first, dims.L, count).contiguous()


_PROOFS: dict[tuple[str, ...], Callable[[_Trial], Iterator[Judged]]] = {
    ("paged_kv",): _other_pools,
    ("variable_batch",): _batches,
    ("stacked_weights", "fused_layers"): _depths,
    ("fused_lm_head",): _logits,
    ("chunked_layers",): lambda trial: _chain(trial, (1, LAYERS - 1)),
    ("host_loop",): lambda trial: _chain(trial, (1,) * LAYERS),
}
