"""Where kernels come from: a user's file, an importable module, or the bundled ones of the installed models."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from conformance.contract.kernel import Kernel
from conformance.contract.registry import models
from conformance.errors import UsageError


def load_module(location: str | Path) -> ModuleType:
    """Import a kernel module by file path or dotted name; raises ``UsageError`` that says why it cannot be imported."""
    text = str(location)
    if not text.endswith(".py"):
        try:
            return importlib.import_module(text)
        except Exception as error:
            raise UsageError(f"cannot import {text}: {type(error).__name__}: {error}") from error
    path = Path(text).resolve()
    if not path.is_file():
        raise UsageError(f"no such kernel file: {text}")
    for module in list(sys.modules.values()):
        known = getattr(module, "__file__", None)
        # The bundled kernels are imported by way of a link.
        if known and Path(known).name == path.name and Path(known).resolve() == path:
            return module
    module_name = f"conformance_user_{path.stem}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(module_name, None)
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = str(error) if isinstance(error, UsageError) else f"does not import: {_first_line(error)}"
        raise UsageError(f"{path.name}: {reason}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _first_line(error: BaseException) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    line = f", line {traceback.tb_lineno} of {Path(traceback.tb_frame.f_code.co_filename).name}" if traceback else ""
    return f"{type(error).__name__}: {error}{line}".replace("\n", " ")


def kernels_in(module: ModuleType) -> list[Kernel]:
    """The kernels that a module defines (not those it imports), in the order of their definition."""
    found = [value for value in vars(module).values() if isinstance(value, Kernel)]
    return [found_kernel for found_kernel in dict.fromkeys(found) if found_kernel.function.__module__ == module.__name__]


def bundled_kernels() -> list[Kernel]:
    """The kernels that come with the installed models, in the order of their contracts."""
    return [kernel for model in models() for name in model.kernel_modules for kernel in kernels_in(load_module(name))]


def find_kernel(kernels: Iterable[Kernel], name: str, where: str) -> Kernel:
    """The kernel of that name; raises ``UsageError`` that lists what is there."""
    known = list(kernels)
    found = [candidate for candidate in known if name in (candidate.name, candidate.id)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"kernel {name!r} is ambiguous: {' and '.join(one.id for one in found)}; say which")
    names = ", ".join(candidate.name for candidate in known) or "none"
    raise UsageError(f"no kernel {name!r} in {where}; found {names}")
