"""Modules that define kernels, imported: by a kernel's own process, and by whoever judges a callable of his own."""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import site
import sys
import sysconfig
from collections.abc import Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import TypeVar

from conformance.contract.kernel import Declaration, Kernel, unbound
from conformance.errors import UsageError
from conformance.outside import told

#: The largest file of a kernel, in bytes: an endless one is no kernel.
MOST_BYTES = 16 << 20

Declared = TypeVar("Declared", bound=Declaration)


def load_module(location: str | Path) -> ModuleType:
    """Import a kernel module by file path or dotted name; raises ``UsageError`` that says why it cannot be imported."""
    text = str(location)
    if not text.endswith(".py"):
        try:
            return importlib.import_module(text)
        except Exception as error:
            raise UsageError(f"cannot import {text}: {told(error)}") from error
    path = require_file(text)
    for module in list(sys.modules.values()):
        known = getattr(module, "__file__", None)
        # The bundled kernels are imported by way of a link.
        if isinstance(known, str) and Path(known).name == path.name and Path(known).resolve() == path.resolve():
            return module
    module_name = f"conformance_user_{path.stem}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(module_name, path, loader=_TextLoader(module_name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    folder, place = str(path.parent), _behind_standard_library()
    sys.path.insert(place, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(module_name, None)
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = str(error) if isinstance(error, UsageError) else f"does not import: {_first_line(error)}"
        raise UsageError(f"{path.name}: {reason}") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return module


def require_file(text: str) -> Path:
    """The path of a kernel's file; raises ``UsageError`` for what is none: a folder, a pipe, a device."""
    try:
        path = Path(text).resolve()
        if path.suffix != ".py":  # a link to a file of another name
            path = Path(text).absolute()
        if path.is_file():
            if path.stat().st_size > MOST_BYTES:
                raise UsageError(f"{path.name} is no kernel file: it has more than {MOST_BYTES >> 20} MiB")
            return path
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long or holds a NUL, a link to itself
        raise UsageError(f"no such kernel file: {text[:200]!r} ({error})") from error
    raise UsageError(f"no such kernel file: {text[:200]}")


def file_of(location: str) -> Path:
    """The file that a module is in, by its path or its dotted name, without importing it; raises ``UsageError``."""
    if location.endswith(".py"):
        return require_file(location)
    known = getattr(sys.modules.get(location), "__file__", None)
    if known is None:
        try:
            spec = importlib.util.find_spec(location)
        except (ImportError, ValueError) as error:
            raise UsageError(f"cannot import {location}: {error}") from error
        known = None if spec is None else spec.origin
    if known is None:
        raise UsageError(f"cannot import {location}: it has no file")
    return Path(known)


def digest_of(location: str) -> str:
    """The SHA-256 of the text of a module on disk; raises ``UsageError`` if it cannot be read."""
    path = file_of(location)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


class _TextLoader(SourceFileLoader):
    """Compiles the text on disk. Byte code that Python kept is taken for that of a text of the same size and time."""

    def get_code(self, fullname: str) -> CodeType | None:
        """The code of the text as it is now."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


_kept_get_code = SourceFileLoader.get_code


def import_anew() -> None:
    """From here on this process takes no byte code that was kept but for installed packages; for a process that runs a kernel."""
    if sys.dont_write_bytecode and SourceFileLoader.get_code is not _kept_get_code:
        return  # done before
    installed = tuple(
        {*(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")), *site.getsitepackages()}
    )

    def get_code(self: SourceFileLoader, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        return _kept_get_code(self, fullname) if path.startswith(installed) else self.source_to_code(self.get_data(path), path)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]
    sys.dont_write_bytecode = True


def _behind_standard_library() -> int:
    """Where a kernel's folder stands in ``sys.path``: a ``random.py`` beside a kernel is not Python's."""
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    places = [place for place, entry in enumerate(sys.path) if entry in standard or entry.endswith("lib-dynload")]
    return 1 + max(places, default=-1)


def _first_line(error: BaseException) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    line = f", line {traceback.tb_lineno} of {Path(traceback.tb_frame.f_code.co_filename).name}" if traceback else ""
    return f"{told(error)}{line}".replace("\n", " ")


def kernels_in(module: ModuleType) -> list[Kernel]:
    """The kernels that a module defines (not those it imports), in the order of their definition.

    Raises ``UsageError`` if two of them have one name.
    """
    # By identity: the function of a kernel may be an object that has no hash.
    found = {id(value): value for value in vars(module).values() if isinstance(value, Kernel)}
    own = [one for one in found.values() if _module_of(one) == module.__name__]
    for name, count in collections.Counter(one.id for one in own).items():
        if count > 1:
            file = Path(str(getattr(module, "__file__", module.__name__))).name
            raise UsageError(f"{file}: two kernels are named {name.partition('/')[2]!r}: give one another name=...")
    return own


def _module_of(kernel: Kernel) -> str:
    """The module that defines a kernel: of a partial that of what it was applied to, of a callable object that of its class."""
    function = unbound(kernel.function)
    return str(getattr(function, "__module__", type(function).__module__))


def find_kernel(kernels: Iterable[Declared], name: str, where: str) -> Declared:
    """The kernel of that name; raises ``UsageError`` that lists what is there."""
    known = list(kernels)
    found = [candidate for candidate in known if name in (candidate.name, candidate.id)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"kernel {name!r} is ambiguous: {' and '.join(one.id for one in found)}; say which")
    names = ", ".join(candidate.name for candidate in known) or "none"
    raise UsageError(f"no kernel {name!r} in {where}; found {names}")
