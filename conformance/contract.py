"""What a stage computes: its arguments, its torch reference, its error model and the data it is judged on.

A contract knows nothing of PyPTO or pytest. The stages of a model are declared in ``kernels/<model>/contract.py`` and found
through the entry-point group ``conformance.models``, so this package imports nothing of ``kernels``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from conformance.errors import UsageError

if TYPE_CHECKING:
    from conformance.bounds import Bounds, Profile
    from conformance.data import Source

ENTRY_POINT_GROUP = "conformance.models"

Access = Literal["in", "out", "io"]

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.int32: "i32",
}

#: What one step along a factor of a symbolic shape means to a person.
FACTOR_LABELS: dict[str, str] = {
    "B": "row",
    "L": "layer",
    "NH": "head",
    "NKV": "kv_head",
    "D": "lane",
    "S": "position",
    "NB": "page",
    "BS": "offset",
    "MB": "page_index",
    "H": "column",
    "I": "column",
    "V": "column",
    "T": "token",
    "1": "row",
}


@dataclasses.dataclass(frozen=True)
class Dims:
    """The dimensions of one model and of one case; the symbols are those of the Qwen3 decode contract.

    ``NH``, ``NKV``, ``D``, ``I``, ``V``, ``S`` and ``BS`` are fixed by the model; ``B``, ``L`` and ``NB`` vary from case to case,
    and so does ``T``, the tokens of a prefill; it is 1 for stages that take one token a sequence.
    Raises ``UsageError`` if a value is not positive or if the heads cannot be shared evenly.
    """

    B: int
    NH: int
    NKV: int
    D: int
    I: int  # noqa: E741  the contract's symbol
    V: int
    L: int
    S: int
    BS: int
    NB: int
    T: int = 1
    #: Hidden size. ``NH * D`` unless given, and then it follows the heads when they are replaced.
    H: int = 0
    eps: float = 1e-6
    theta: float = 1e6

    def __post_init__(self) -> None:
        if self.H == 0 and all(isinstance(value, int) for value in (self.NH, self.D)):
            object.__setattr__(self, "H", self.NH * self.D)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("eps", "theta"):
                if not (isinstance(value, (int, float)) and value > 0):
                    raise UsageError(f"dimension {field.name} must be a positive number, found {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"dimension {field.name} must be a positive whole number, found {value!r}")
        if self.NH % self.NKV:
            raise UsageError(f"NH must be a multiple of NKV (query heads share KV heads), found NH={self.NH}, NKV={self.NKV}")
        if self.D % 2:
            raise UsageError(f"D must be even (RoPE rotates two halves), found D={self.D}")

    @property
    def G(self) -> int:  # noqa: N802  the contract's symbol
        """Query heads that share one KV head."""
        return self.NH // self.NKV

    @property
    def MB(self) -> int:  # noqa: N802
        """Pages a sequence can have, ``ceil(S / BS)``."""
        return -(-self.S // self.BS)

    @property
    def scale(self) -> float:
        """The attention scale, ``D ** -0.5``."""
        return 1.0 / math.sqrt(self.D)

    def replace(self, **changes: Any) -> Dims:
        """A copy with some dimensions changed; raises ``UsageError`` for a name that is not a dimension."""
        known = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise UsageError(f"unknown dimension {name!r}; known are {', '.join(sorted(known))}")
        if self.H == self.NH * self.D and {"NH", "D"} & changes.keys():
            changes = {"H": 0, **changes}
        return dataclasses.replace(self, **changes)


@functools.cache
def _factors(symbolic_shape: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(axis.split("*")) for axis in symbolic_shape.split())


@dataclasses.dataclass(frozen=True)
class Argument:
    """One tensor of a stage.

    ``shape`` is symbolic: axes parted by blanks, each a product of dimension symbols, as in ``"B NH*D"``. The factors also
    say where an element is: column 130 of ``NH*D`` is lane 2 of head 2 if ``D`` is 64.
    """

    name: str
    shape: str
    dtype: torch.dtype
    access: Access

    def size(self, dims: Dims) -> tuple[int, ...]:
        """The concrete shape at ``dims``."""
        return tuple(math.prod(_symbol(symbol, dims) for symbol in axis) for axis in _factors(self.shape))

    def where(self, index: Sequence[int], dims: Dims) -> dict[str, int]:
        """Names for the coordinates of an element, such as ``{"row": 3, "head": 1, "lane": 17}``."""
        named: dict[str, int] = {}
        for position, axis in zip(index, _factors(self.shape), strict=True):
            coordinates: list[tuple[str, int]] = []
            for symbol in reversed(axis):
                position, coordinate = divmod(position, _symbol(symbol, dims))
                coordinates.append((FACTOR_LABELS[symbol], coordinate))
            if axis != ("1",):
                named.update(reversed(coordinates))
        return named

    def describe(self) -> str:
        """The declaration as the contract writes it, such as ``out out[B,H] bf16``."""
        prefix = "" if self.access == "in" else f"{self.access} "
        return f"{prefix}{self.name}[{','.join(self.shape.split())}] {DTYPE_NAMES[self.dtype]}"


def _symbol(symbol: str, dims: Dims) -> int:
    return int(symbol) if symbol.isdigit() else int(getattr(dims, symbol))


def read(name: str, shape: str, dtype: torch.dtype) -> Argument:
    """An input that a kernel reads and must not change."""
    return Argument(name, shape, dtype, "in")


def write(name: str, shape: str, dtype: torch.dtype) -> Argument:
    """An output that a kernel fills."""
    return Argument(name, shape, dtype, "out")


def update(name: str, shape: str, dtype: torch.dtype) -> Argument:
    """A tensor that a kernel reads and changes in part; every element it may not change must keep its bits."""
    return Argument(name, shape, dtype, "io")


Tensors = Mapping[str, torch.Tensor]
Mistake = Callable[[Tensors, "Dims"], tuple[Tensors, "Dims"]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The contract of one stage.

    ``reference(inputs, dims, arithmetic)`` returns every output by name, computed as the formulas say with the roundings that
    ``arithmetic`` applies. ``error_model(inputs, dims, profile)`` returns for every output the value, variance and worst case of
    a correct kernel's error. ``make_inputs(dims, seq_lens, regime, source)`` returns the inputs of a case.
    """

    name: str
    summary: str
    arguments: tuple[Argument, ...]
    reference: Callable[..., dict[str, torch.Tensor]]
    error_model: Callable[[Tensors, Dims, Profile], dict[str, Bounds]]
    make_inputs: Callable[[Dims, tuple[int, ...], str, Source], dict[str, torch.Tensor]]
    regimes: tuple[str, ...]
    profiles: tuple[Profile, ...]
    #: Dimensions that a case draws, besides what the preset fixes.
    drawn: tuple[str, ...] = ("B",)
    #: Whether a case draws one sequence length per row.
    has_lengths: bool = False
    #: Whether a sequence brings several tokens, ``chunk_lens[b]`` of its ``seq_lens[b]``: a prefill.
    has_chunks: bool = False
    #: ``rearrange(inputs, dims, rows)`` gives what follows the chosen sequences and is not simply by ``B``.
    rearrange: Callable[[Tensors, Dims, tuple[int, ...]], dict[str, torch.Tensor]] | None = None
    #: ``sequences(inputs, dims)`` says which sequence each row of a composite stage's outputs belongs to, if not row by row.
    sequences: Callable[[Tensors, Dims], torch.Tensor] | None = None
    #: What a kernel of this stage can show that it serves: of the capabilities in ``conformance.capabilities``.
    capabilities: tuple[str, ...] = ()
    #: The input and the output by which one call's result is the next one's start, if layers can be run one after another.
    chain: tuple[str, str] | None = None
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
    #: ``localise(inputs, outputs, dims) -> list of sentences`` says which part of a composite stage went wrong first.
    localise: Callable[[Tensors, Tensors, Dims], list[str]] | None = None

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


@dataclasses.dataclass(frozen=True)
class Model:
    """The stages and presets of one model, as an entry point of ``conformance.models`` names it."""

    name: str
    stages: tuple[Stage, ...]
    presets: Mapping[str, Dims]
    #: Dotted names of the modules that hold the bundled kernels.
    kernel_modules: tuple[str, ...] = ()
    #: Dotted names of the modules whose ``SUBJECTS`` are kernels with known verdicts, for the exam.
    exam_modules: tuple[str, ...] = ()
    #: The presets that the suites run, and the one that only a machine with much memory can execute.
    suite_presets: tuple[str, ...] = ()
    full_size_preset: str = ""


@functools.lru_cache(maxsize=1)
def models() -> tuple[Model, ...]:
    """Every installed model, loaded on first use."""
    found = [entry.load() for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)]
    unique = {model.name: model for model in found}
    if not unique:
        raise UsageError(
            f"no model found: expected an entry point in group {ENTRY_POINT_GROUP!r}; install the project (pip install -e .)"
        )
    return tuple(unique[name] for name in sorted(unique))


def stages() -> dict[str, Stage]:
    """Every stage by name, in the order of its contract."""
    return {stage.name: stage for model in models() for stage in model.stages}


def stage_named(name: str) -> Stage:
    """The stage of that name; raises ``UsageError`` that lists the known ones."""
    known = stages()
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"unknown stage {name!r}; known are {', '.join(known)}")
    return known[name]


def presets() -> dict[str, Dims]:
    """Every preset by name."""
    return {name: dims for model in models() for name, dims in model.presets.items()}


def preset_named(name: str) -> Dims:
    """The preset of that name; raises ``UsageError`` that lists the known ones."""
    known = presets()
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"unknown preset {name!r}; known are {', '.join(known)}")
    return known[name]
