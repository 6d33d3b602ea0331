"""What a kernel declares that it serves, put to the test.

A capability is a mechanism that a serving stack needs and that values alone do not show: a kernel may compute a full batch of one
size rightly and serve nothing else. Each claim is proven by a number of judged runs. Where one of them fails, or where the stage
has no means to show it, a finding of the detector ``capability`` says that the claim does not hold.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from conformance.cases.case import Case, make_case, make_inputs
from conformance.cases.key import CaseKey
from conformance.cases.source import Source
from conformance.cases.space import Space
from conformance.contract.dims import Dims
from conformance.contract.kernel import Declaration
from conformance.contract.registry import model_named
from conformance.contract.stage import layer_of
from conformance.judge.judgement import judge
from conformance.judge.verdict import Finding, Verdict
from conformance.lanes.base import Outcome
from conformance.running.runs import MOST_LOST, Judged, Runner, is_lost

#: What the ``check`` of these runs begins with; the names of the capabilities follow, joined by ``+``.
CHECK_PREFIX = "capability:"
#: User batches that one build has to serve besides its capacity: one alone, few, and one that fills no tile.
BATCHES = (1, 3, 7)
#: Layers of a chain: a first, a middle and a last one.
LAYERS = 3


def prove(kernel: Declaration, space: Space, run: Runner) -> Iterator[Judged]:
    """Put every capability that the kernel declares to the test, on cases of ``space``'s preset.

    ``run`` executes: a capability is nothing that compiling shows. A proof ends with its first run that fails, and all of them
    end when too many runs crash or time out.
    """
    lost = 0
    for capability in model_named(kernel.stage.model).capabilities:
        claimed = [name for name in capability.meanings if name in kernel.capabilities]
        if not claimed:
            continue
        check = CHECK_PREFIX + "+".join(claimed)
        impossible = [name for name in claimed if name not in kernel.stage.capabilities]
        if impossible:
            for name in impossible:
                reason = (
                    f"{kernel.stage.name} has no arguments that {name} ({capability.meanings[name]}) concerns: declare it no more"
                )
                yield not_held(CHECK_PREFIX + name, space.largest, reason)
            continue
        for judged in capability.proof(Proof(kernel, space, run, check)):
            lost += is_lost(judged)
            yield judged
            if lost >= MOST_LOST:
                return
            if not judged.verdict.ok:
                break


def proven(check: str) -> tuple[str, ...]:
    """The capabilities that a run is evidence of, from its ``check``; none for any other run."""
    return tuple(check.removeprefix(CHECK_PREFIX).split("+")) if check.startswith(CHECK_PREFIX) else ()


def not_held(check: str, key: CaseKey, reason: str, outcome: Outcome | None = None) -> Judged:
    """A judged run that refutes a claim, with the reason as its one finding."""
    return Judged(check, key, Verdict((Finding("capability", reason),)), outcome or Outcome("ok"))


@dataclasses.dataclass(frozen=True)
class Proof:
    """The runs of one proof."""

    kernel: Declaration
    space: Space
    run: Runner
    check: str

    def __call__(self, about: str, case: Case, difference: Callable[[Outcome], str] | None = None) -> tuple[Judged, Outcome]:
        """Judge one run; what is wrong with it becomes one finding that begins with the claim and ``about``.

        ``difference`` says what else is wrong with a run that is right by itself, if anything: nothing, or a sentence.
        """
        names = proven(self.check)
        several = len(names) > 1
        claim = f"declared {'capabilities' if several else 'capability'} {' and '.join(names)}"
        refusal = self.kernel.refusal(case.dims)
        if refusal is not None:
            outcome = Outcome("ok")
            text = f"{claim} could not be tested {about}: the kernel refuses the dimensions: {refusal}"
            return not_held(self.check, case.key, text, outcome), outcome
        outcome = self.run(case, "last")
        verdict = judge(case, outcome, **self.kernel.judged_by)
        message = verdict.findings[0].message if verdict.findings else ""
        if not message and difference is not None:
            message = difference(outcome)
        bare = dataclasses.replace(outcome, outputs={})
        if message:
            label = f" ({verdict.findings[0].detector})" if verdict.findings else ""
            verb = "do" if several else "does"
            return not_held(self.check, case.key, f"{claim} {verb} not hold {about}{label}: {message}", bare), outcome
        return Judged(self.check, case.key, verdict, bare), outcome

    @property
    def free(self) -> Space:
        """The model without the sizes that the caller pinned: those are the proof's to vary."""
        varied = {self.space.limit.symbol(role) for role in ("batch", "depth", "pages")}
        model = tuple((name, value) for name, value in self.space.pinned if name not in varied)
        return dataclasses.replace(self.space, pinned=model)

    @property
    def capacity(self) -> int:
        """The largest batch that the kernel serves and a case can have."""
        return min(self.kernel.capacity, self.free.limit.batch)

    def batch(self, wanted: int) -> int:
        """As many sequences as wanted, or as the kernel takes: one that is made for a full batch has other claims to show."""
        others: list[int] = [self.space.limit.batch, *range(self.free.limit.batch, 0, -1)]
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
            most = space.limit.length
            drawn = source.integers("length", 2, most, batch) if most > 1 else [1] * batch
            lengths = tuple(edges[(index + b) % len(edges)] if b % 2 else length for b, length in enumerate(drawn))
        if stage.has_chunks:
            chunks = space.chunks(source.integers("chunk", 1, 2 * space.limit.page_size, batch), lengths)
        if longest:
            lengths, chunks = (space.limit.length,) * len(lengths), (1,) * len(chunks)
        regime = "normal" if "normal" in stage.regimes else stage.regimes[0]
        return space.key(regime, index, batch=batch, depth=layers, spare_pages=0, seq_lens=lengths, chunk_lens=chunks)


def with_dims(key: CaseKey, **overrides: int) -> CaseKey:
    """The key with some dimensions changed."""
    return dataclasses.replace(key, overrides=tuple({**dict(key.overrides), **overrides}.items()))


def batch_sizes(proof: Proof) -> Iterator[Judged]:
    """One build for every user batch: 1, 3, 7 and the capacity, with mixed lengths in a pool of one size."""
    capacity = proof.capacity
    for index, batch in enumerate(sorted({*BATCHES, capacity})):
        if batch > capacity:
            continue
        key = proof.key(index, batch, 1)
        limit = proof.space.limit
        if limit.symbol("pages") in proof.space.stage.drawn:
            key = with_dims(key, **{limit.symbol("pages"): 1 + capacity * limit.pages_per_sequence})
        judged, _ = proof(f"with a batch of {batch} in the build made for {proof.kernel.capacity}", make_case(key))
        yield judged


def depths(proof: Proof) -> Iterator[Judged]:
    """One layer and several, every layer with weights and a cache of its own."""
    for layers in (1, LAYERS):
        about = "with one layer" if layers == 1 else f"with {layers} layers"
        key = proof.key(layers, proof.batch(2), layers)
        judged, _ = proof(about, make_case(with_dims(key, **{key.dims.symbol("depth"): layers})))
        yield judged


def chain(proof: Proof, chunks: Sequence[int]) -> Iterator[Judged]:
    """Chunks of a deeper model one after another, each on its rows of weights and caches and on the result of the one before.

    Each call is judged by what a correct kernel makes of the inputs that it was really given.
    """
    stage = proof.space.stage
    assert stage.chain is not None
    start, result = stage.chain
    key = proof.key(0, proof.batch(2), 1)
    deep = key.dims.resized(depth=sum(chunks))
    inputs = make_inputs(stage, key, deep)
    state = inputs[start]
    for first, count in zip(itertools.accumulate((0, *chunks)), chunks, strict=False):
        part = {name: _layers(tensor, name, first, count, proof, deep) for name, tensor in inputs.items()}
        case = Case(key, stage, deep.resized(depth=count), {**part, start: state})
        last = first + count - 1
        about = f"at layer {first} of {deep.depth}" if count == 1 else f"at layers {first} to {last} of {deep.depth}"
        judged, outcome = proof(about, case)
        yield judged
        state = outcome.outputs[result]


def _layers(tensor: torch.Tensor, name: str, first: int, count: int, proof: Proof, dims: Dims) -> torch.Tensor:
    """The rows of some layers, where the first axis stacks layers."""
    if dims.symbol("depth") not in proof.space.stage.argument(name).axes[0]:
        return tensor
    return layer_of(tensor, first, dims.depth, count).contiguous()
