"""A kernel's process has no reference: a kernel that looks for the right answer there finds none.

A worker needs of a stage what a kernel is called with: its arguments and dimensions. What computes the right answer, the data and
what is allowed is taken out of it before a kernel's code runs, and cannot be imported again. This stops what is easy, by accident
or not (docs/trust.md); Python has no walls inside a process.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from conformance.contract.registry import ENTRY_POINT_GROUP, models

#: The fields of a stage that say what is right, and on what data that is judged.
_FIELDS = ("reference", "error_model", "make_inputs", "mistakes", "localise")
_REASON = "is not to be had in a kernel's process: a kernel computes its result by itself"


class _Locked(MetaPathFinder):
    """Refuses to import some modules."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Raise ``ImportError`` for those; leave all others to the usual finders."""
        if fullname in self._names:
            raise ImportError(f"{fullname} {_REASON}")
        return None


def lock_references() -> None:
    """Take the references, error models and data of all models out of this process; a second call does nothing."""
    if any(isinstance(finder, _Locked) for finder in sys.meta_path):
        return
    locked: set[str] = set()
    for model in models():
        for stage in model.stages:
            for field in _FIELDS:
                value = getattr(stage, field)
                locked |= {str(function.__module__) for function in _functions(value) if hasattr(function, "__module__")}
                if value is not None:
                    object.__setattr__(stage, field, {} if isinstance(value, Mapping) else _absent)
    locked |= {name for model in models() for name in model.reference_modules}
    locked |= {entry.value.partition(":")[0] for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    # A small model may have its kernels in the file of its contract.
    locked -= {name for model in models() for name in model.kernel_modules}
    for name in locked:
        if sys.modules.pop(name, None) is not None:
            package, _, last = name.rpartition(".")
            if hasattr(sys.modules.get(package), last):
                delattr(sys.modules[package], last)
    sys.meta_path.insert(0, _Locked(frozenset(locked)))


def _functions(value: Any) -> Iterator[Any]:
    """The functions that a field of a stage holds, below what wraps them."""
    if isinstance(value, functools.partial):
        yield from _functions(value.func)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _functions(one)
    elif callable(value):
        yield value


def _absent(*arguments: Any, **keywords: Any) -> Any:
    raise RuntimeError(f"what a stage computes {_REASON}")
