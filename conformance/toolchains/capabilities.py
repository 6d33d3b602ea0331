"""What an installed ``pypto`` has of the names that the lanes use, told from its text without importing it.

The lanes use names of PyPTO that are nobody's promise. Versions that are packed with CANN move them, change what an option means,
and compile in another way by default; a version string says nothing of that, and importing a version whose native libraries
do not load says less.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

_ENTRY = "frontend/parser/entry.py"
_JIT = "JitCallableWrapper"

#: What every lane uses: where it is, and its name there; ``Class.name`` is a method, or an attribute of the class or its objects.
_EVERYWHERE = (
    ("runtime.py", "_pto_verify_datas"),
    ("runtime.py", "RunMode"),
    *(
        (_ENTRY, f"{_JIT}.{name}")
        for name in (
            "_kernel_module_cache",
            "_runtime_options",
            "_host_options",
            "_verify_options",
            "_debug_options",
            "_cached_signature",
            "_cached_non_tensor_defaults",
            "_original_func",
        )
    ),
)
#: What a lane uses besides: a simulated call ends in the cost model unless that method is replaced, and the interpreter is
#: handed its arguments by another, with a calculator that was built before; on a card a compile ends where its launch would ask
#: for a workspace.
_BESIDES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "compile_only": ((_ENTRY, f"{_JIT}._run_with_cpu"),),
    "interpret": (
        (_ENTRY, f"{_JIT}._run_with_cpu"),
        (_ENTRY, f"{_JIT}._setup_verify_data"),
        (_ENTRY, "_pto_to_tensor_data"),
        ("_utils.py", "BuildOnlineManager"),
    ),
    "device": ((_ENTRY, f"{_JIT}.alloc"), (_ENTRY, f"{_JIT}.compile")),
}


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a version has and lacks.

    - ``lacks``: by lane, the names that it uses and this version has not.
    - ``new_ir``: what ``jit(new_ir=...)`` is by default; ``None`` where there is no such choice.
    - ``checks_attributes``: ``runtime_debug_mode=3`` compares arguments with annotations. Elsewhere it means something else.
    - ``checks_contiguity``: every call refuses arguments that are not contiguous, not only one that compiles.
    - ``builds_on_import``: its native module is compiled for this Python when it is imported for the first time.
    """

    lacks: Mapping[str, tuple[str, ...]]
    new_ir: bool | None = None
    checks_attributes: bool = False
    checks_contiguity: bool = False
    builds_on_import: bool = False

    @property
    def remarks(self) -> tuple[str, ...]:
        """What differs from the version that all lanes know, each in a few words."""
        remarks = [f"{lane} lacks {', '.join(names)}" for lane, names in self.lacks.items() if names]
        if self.new_ir is not None:
            remarks.append(f"jit(new_ir={self.new_ir}) by default")
        if not self.checks_attributes:
            remarks.append("has no option that compares arguments with annotations")
        if self.checks_contiguity:
            remarks.append("checks contiguity at every call")
        if self.builds_on_import:
            remarks.append("builds its native module when first imported (cmake, Python's headers, pybind11)")
        return tuple(remarks)


@functools.lru_cache(maxsize=8)
def look_at(package: Path) -> Capabilities:
    """Look at the text of a ``pypto`` package; what cannot be read or parsed is missing."""
    files = {file: _Names.of(package / file) for file in (_ENTRY, "runtime.py", "_utils.py", "_build_online.py")}
    entry = files[_ENTRY]
    lacks = {
        lane: tuple(f"{file}: {name}" for file, name in (*_EVERYWHERE, *besides) if name not in files[file].names)
        for lane, besides in _BESIDES.items()
    }
    return Capabilities(
        lacks,
        new_ir=entry.defaults.get("jit", {}).get("new_ir"),
        checks_attributes="DebugMode.CHECKATTR" in entry.names,
        checks_contiguity="is_contiguous" in entry.called,
        builds_on_import="BuildOnlinePyptoImplManager" in files["_build_online.py"].names
        and not any(package.glob("pypto_impl*.so"))
        and not any(package.glob("pypto_impl/*.so")),
    )


@dataclasses.dataclass(frozen=True)
class _Names:
    """What a module's text defines: names and ``Class.name``, functions' defaults that are plain values, methods it calls."""

    names: frozenset[str] = frozenset()
    defaults: Mapping[str, Mapping[str, bool]] = dataclasses.field(default_factory=dict)
    called: frozenset[str] = frozenset()

    @classmethod
    def of(cls, path: Path) -> _Names:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            return cls()
        names = set(_bound(tree.body))
        defaults: dict[str, Mapping[str, bool]] = {}
        for statement in tree.body:
            if isinstance(statement, ast.ClassDef):
                members = {*_bound(statement.body), *_set_on_self(statement)}
                names |= {f"{statement.name}.{member}" for member in members}
            elif isinstance(statement, ast.FunctionDef):
                given = zip(statement.args.kwonlyargs, statement.args.kw_defaults, strict=True)
                defaults[statement.name] = {
                    argument.arg: value.value
                    for argument, value in given
                    if isinstance(value, ast.Constant) and isinstance(value.value, bool)
                }
        called = {
            node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        return cls(frozenset(names), defaults, frozenset(called))


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """The names that statements bind: definitions, assignments, imports."""
    for statement in body:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
            yield statement.name
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in statement.names)


def _set_on_self(definition: ast.ClassDef) -> Iterator[str]:
    for node in ast.walk(definition):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name
