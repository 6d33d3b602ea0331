"""The installed models, their stages and their presets, found through the entry-point group ``conformance.models``.

The harness imports no model by name. A stage or a preset is named ``model/name``; the name alone will do while no other model has
one that is called so. A preset that belongs to a stage is looked up in the stage's model, where its name is unique.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.stage import Stage
from conformance.errors import UsageError

ENTRY_POINT_GROUP = "conformance.models"


@dataclasses.dataclass(frozen=True)
class Capability:
    """What kernels may declare that they serve: a mechanism, or several that the same runs prove.

    ``meanings`` has each name and what a kernel does that has it. ``proof(trial)`` yields the judged runs that show it
    (``conformance.running.capabilities``).
    """

    meanings: Mapping[str, str]
    proof: Callable[[Any], Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class FullSize:
    """How the suites judge kernels at a model's real size, on a machine that has ``memory`` bytes for it.

    ``executed(stage)`` and ``compiled(stage)`` give the overrides of ``preset`` with which kernels of a stage are executed, and
    compiled only: once with each, not at all with none. What an interpreter would copy for hours can still be compiled, and
    executed on a card: ``on_card(stage)`` gives the overrides there.
    """

    preset: str
    memory: int
    executed: Callable[[Stage], Sequence[Mapping[str, int]]]
    compiled: Callable[[Stage], Sequence[Mapping[str, int]]]
    on_card: Callable[[Stage], Sequence[Mapping[str, int]]] = lambda stage: ()


@dataclasses.dataclass(frozen=True)
class Model:
    """Everything of one model, as an entry point of ``conformance.models`` names it.

    Raises ``ValueError`` if a stage says that it belongs to another model, or if two stages have one name.
    """

    name: str
    stages: tuple[Stage, ...]
    presets: Mapping[str, Dims]
    #: What its kernels may declare that they serve, in the order in which it is proven.
    capabilities: tuple[Capability, ...] = ()
    #: The largest batch of the contract.
    largest_batch: int = 16
    #: Dotted names of the modules that hold the bundled kernels.
    kernel_modules: tuple[str, ...] = ()
    #: Dotted names of the modules that say what is right: reference, error model, data. A kernel's process does not have them.
    reference_modules: tuple[str, ...] = ()
    #: Dotted names of the modules whose ``KNOWN_KERNELS`` are kernels with known verdicts, for the exam.
    exam_modules: tuple[str, ...] = ()
    #: ``"module:function"`` of ``random_variant(stage, index, seed)``, which returns a legal kernel that makes its choices
    #: at random, the same for the same arguments. The exam has none of a model that leaves it out.
    random_variants: str = ""
    #: The presets that the suites run.
    suite_presets: tuple[str, ...] = ()
    #: The presets that a check draws its cases from where none is named, in turn. What a kernel serves is proven at the first.
    check_presets: tuple[str, ...] = ("tiny",)
    full_size: FullSize | None = None

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        for stage in self.stages:
            if stage.model != self.name:
                raise ValueError(f"stage {stage.id} is not of model {self.name}")
            if names.count(stage.name) > 1:
                raise ValueError(f"model {self.name} has two stages named {stage.name}")

    @property
    def meanings(self) -> dict[str, str]:
        """Every capability by name, with what a kernel does that has it."""
        return {name: meaning for capability in self.capabilities for name, meaning in capability.meanings.items()}


@functools.lru_cache(maxsize=1)
def models() -> tuple[Model, ...]:
    """Every installed model, loaded on first use; raises ``UsageError`` if there is none, or if two have one name."""
    found: dict[str, tuple[str, Model]] = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        model = entry.load()
        before, _ = found.setdefault(model.name, (entry.value, model))
        if before != entry.value:  # the same one may be listed twice: installed, and in the checkout
            raise UsageError(f"two models are named {model.name!r}, {before} and {entry.value}: uninstall one")
    if not found:
        raise UsageError(
            f"no model found: expected an entry point in group {ENTRY_POINT_GROUP!r}; install the project (pip install -e .)"
        )
    return tuple(found[name][1] for name in sorted(found))


def model_named(name: str) -> Model:
    """The model of that name; raises ``UsageError`` that lists the known ones."""
    for model in models():
        if model.name == name:
            return model
    raise UsageError(f"unknown model {name!r}; known are {', '.join(model.name for model in models())}")


def capability_meanings() -> dict[str, str]:
    """The capabilities of all models by name, with what a kernel does that has it."""
    return {name: meaning for model in models() for name, meaning in model.meanings.items()}


def names_in_short(ids: Iterable[str]) -> dict[str, str]:
    """What each ``model/name`` is called: the name alone, while no other model has one that is called so."""
    ids = list(ids)
    names = [one.partition("/")[2] for one in ids]
    return {one: name if names.count(name) == 1 else one for one, name in zip(ids, names, strict=True)}


def chosen_name(name: object, known: Iterable[str], what: str) -> str:
    """The one of ``known`` (each ``model/name``) that a name means; raises ``UsageError`` if it is none, or several."""
    known = list(known)
    found = [one for one in known if name in (one, one.partition("/")[2])]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{what} {name!r} is ambiguous: {' and '.join(found)}; say which")
    raise UsageError(f"unknown {what} {name!r}; known are {', '.join(names_in_short(known).values())}")


def stages() -> dict[str, Stage]:
    """Every stage by its name, or by ``model/name`` where several models have the name; in the order of the contracts."""
    found = {stage.id: stage for model in models() for stage in model.stages}
    names = names_in_short(found)
    return {names[one]: stage for one, stage in found.items()}


def short_name(stage: Stage) -> str:
    """What a stage is called: its name, or ``model/name`` where several models have the name."""
    return names_in_short(one.id for model in models() for one in model.stages).get(stage.id, stage.name)


def stage_named(name: str) -> Stage:
    """The stage of that name, or of ``model/name``; raises ``UsageError`` if there is none, or several."""
    found = {stage.id: stage for model in models() for stage in model.stages}
    return found[chosen_name(name, found, "stage")]


def presets() -> dict[str, Dims]:
    """Every preset by its name, or by ``model/name`` where several models have the name."""
    found = {f"{model.name}/{name}": dims for model in models() for name, dims in model.presets.items()}
    names = names_in_short(found)
    return {names[one]: dims for one, dims in found.items()}


def preset_named(name: str, model: str | None = None) -> Dims:
    """The preset of that name, or of ``model/name``, of one model or of all.

    Raises ``UsageError`` if there is none, or several.
    """
    among = models() if model is None else (model_named(model),)
    found = {f"{one.name}/{preset}": dims for one in among for preset, dims in one.presets.items()}
    return found[chosen_name(name, found, "preset" if model is None or len(models()) == 1 else f"preset of model {model}")]
