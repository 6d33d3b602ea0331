"""The installed models, their stages and their presets, found through the entry-point group ``conformance.models``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Mapping

from conformance.contract.dims import Dims
from conformance.contract.stage import Stage
from conformance.errors import UsageError

ENTRY_POINT_GROUP = "conformance.models"


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
