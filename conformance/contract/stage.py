"""What one stage computes: its arguments, its torch reference, its error model and the data it is judged on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from conformance.contract.arguments import Argument
from conformance.contract.dims import Dims
from conformance.numerics.bounds import Bounds, Profile

Tensors = Mapping[str, torch.Tensor]
Mistake = Callable[[Tensors, "Dims"], tuple[Tensors, "Dims"]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The contract of one stage.

    ``reference(inputs, dims, arithmetic)`` returns every output by name, computed as the formulas say with the roundings that
    ``arithmetic`` (``conformance.numerics.arithmetic``) applies. ``error_model(inputs, dims, profile)`` returns for every output
    the value, variance and worst case of a correct kernel's error. ``make_inputs(dims, seq_lens, regime, source)`` returns the
    inputs of a case, drawn from ``source`` (``conformance.cases.source``) alone.
    """

    #: The model's name and the stage's: together they are unique.
    model: str
    name: str
    summary: str
    arguments: tuple[Argument, ...]
    reference: Callable[..., dict[str, torch.Tensor]]
    error_model: Callable[[Tensors, Dims, Profile], dict[str, Bounds]]
    make_inputs: Callable[..., dict[str, torch.Tensor]]
    regimes: tuple[str, ...]
    profiles: tuple[Profile, ...]
    #: What the stage is, in words that the model and its kernels may go by (``paged``, ``prefill``); the harness reads none.
    tags: frozenset[str] = frozenset()
    #: Axes that a case draws, of the roles ``batch``, ``depth`` and ``pages``; all others are the preset's.
    drawn: tuple[str, ...] = ()
    #: Whether a case draws one sequence length per row.
    has_lengths: bool = False
    #: Whether a sequence brings several tokens, ``chunk_lens[b]`` of its ``seq_lens[b]``: a prefill.
    has_chunks: bool = False
    #: ``rearrange(inputs, dims, rows)`` gives what follows the chosen sequences and does not simply go by the batch axis.
    rearrange: Callable[[Tensors, Dims, tuple[int, ...]], dict[str, torch.Tensor]] | None = None
    #: ``sequences(inputs, dims)`` says which sequence each row of a composite stage's outputs belongs to, if not row by row.
    sequences: Callable[[Tensors, Dims], torch.Tensor] | None = None
    #: What a kernel of this stage can show that it serves: names among the model's ``capabilities``.
    capabilities: tuple[str, ...] = ()
    #: The input and the output by which one call's result is the next one's start, if layers can be run one after another.
    chain: tuple[str, str] | None = None
    #: ``following(inputs, outputs, dims)`` gives the inputs of the step after one that left ``outputs``, if a call is a step that
    #: others follow; ``None`` where it was the last that is possible.
    following: Callable[[Tensors, Tensors, Dims], dict[str, torch.Tensor] | None] | None = None
    #: A layer or a chain of layers: judged with every optional rounding modelled, and localised.
    composite: bool = False
    #: So many stratified cases show every fault of the exam's catalogue with 99.9%: the default number of examples, which the
    #: profiles of the suites follow. Measured by ``conformance exam --full``, which fails where it is less than 99%; at least 50.
    examples: int = 50
    #: Mistakes that a composite stage's outputs are searched for, besides truncations, by what they are, as a clause:
    #: ``mistake(inputs, dims)`` returns the inputs and dimensions with which a correct kernel would compute the same.
    mistakes: Mapping[str, Mistake] = dataclasses.field(default_factory=dict, hash=False)
    #: Names of the reference's roundings, in a composite stage, that often fall on a tie: of sums of two bf16 values.
    tie_prone: tuple[str, ...] = ()
    #: Roundings to bf16 that are legal for a kernel that declares them (docs/rule.md, Declared precision), by the name that it
    #: declares: the inputs that it rounds, or the reference's names of the places.
    declarable: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, hash=False)
    #: What each policy of precision declares.
    policies: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, hash=False)
    #: ``ties(inputs, outputs, dims)`` marks, by output, the elements that name another one of equals than the contract does: a
    #: kernel may declare that it takes any of them.
    ties: Callable[[Tensors, Tensors, Dims], dict[str, torch.Tensor]] | None = None
    #: ``localise(inputs, outputs, dims) -> list of sentences`` says which part of a composite stage went wrong first.
    localise: Callable[[Tensors, Tensors, Dims], list[str]] | None = None

    @property
    def id(self) -> str:
        """``model/name``, which no other stage has."""
        return f"{self.model}/{self.name}"

    def argument(self, name: str) -> Argument:
        """The argument of that name; raises ``KeyError``."""
        for argument in self.arguments:
            if argument.name == name:
                return argument
        raise KeyError(name)

    @property
    def inputs(self) -> tuple[Argument, ...]:
        """Arguments whose contents a case supplies: the inputs and the updated ones."""
        return tuple(argument for argument in self.arguments if argument.access != "out")

    @property
    def outputs(self) -> tuple[Argument, ...]:
        """Arguments that a kernel writes, wholly or in part."""
        return tuple(argument for argument in self.arguments if argument.access != "in")


def layer_of(stacked: torch.Tensor, layer: int, layers: int, count: int = 1) -> torch.Tensor:
    """The rows of ``count`` layers from ``layer`` on, of a tensor whose first axis stacks ``layers`` of them."""
    rows = stacked.shape[0] // layers
    return stacked[layer * rows : (layer + count) * rows]
