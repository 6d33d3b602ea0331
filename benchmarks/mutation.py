"""Which changes of the judge its tests notice: ``python -m benchmarks.mutation``; mutation.md tells what was found.

mutmut makes the changes, as ``[tool.mutmut]`` in ``pyproject.toml`` says, and keeps the results: ``mutmut results`` and ``mutmut
show NAME`` work in ``build/mutation``. Left to itself it would start pytest anew for every change, which takes most of the time.
Here the tests are collected once; each change is tried in a fork, which runs the tests that reach it until one fails: the one
that noticed the last change of the same function, then the fastest.

mutmut leaves decorated functions and constants alone. So decorators are taken off in the copy that it works on, and constants
are doubled and halved. A second run goes on where the first one ended, and tries again what no test noticed. Arguments are
patterns of names, such as ``'*ulp*'``, and options for pytest.
"""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import functools
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).parents[1]
COPY = ROOT / "build" / "mutation"
COPIED = ("conformance", "benchmarks", "conftest.py", "pyproject.toml")
MODULES = (
    "conformance.numerics.ulp",
    "conformance.numerics.attention",
    "conformance.numerics.bounds",
    "conformance.judge.elements",
    "conformance.judge.judgement",
    "conformance.judge.limits",
    "conformance.judge.oracle",
    "conformance.judge.outputs",
    "conformance.judge.signatures",
    "conformance.judge.statistics",
    "conformance.judge.structure",
    "conformance.judge.wording",
    "conformance.judge.matched_filters",
    "conformance.judge.sensitivity",
)
#: What mutmut writes for a change that no test reaches, that no test notices, that one does, and that never ends.
NO_TESTS, SURVIVED, KILLED, TIMEOUT = 33, 0, 1, 36
#: What a change has that is to be tried.
UNSETTLED = (None, NO_TESTS, SURVIVED)
#: Seconds of CPU after which a change is taken to never end.
PATIENCE = 150


def undecorated(source: str) -> str:
    """The same module with decorators of functions applied in statements of their own."""
    lines = source.splitlines()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.decorator_list]
    for node in sorted(functions, key=lambda node: -node.lineno):
        (decorator,) = node.decorator_list
        assert node.end_lineno is not None
        lines.insert(node.end_lineno, f"{' ' * node.col_offset}{node.name} = {ast.unparse(decorator)}({node.name})")
        del lines[decorator.lineno - 1]
    return "\n".join(lines) + "\n"


def generate() -> None:
    """Copy what the tests read to the working directory, and let mutmut write every change beside the original."""
    changed = {f"{module.rpartition('.')[2]}.py" for module in MODULES}
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, name, dirs_exist_ok=True, ignore=lambda folder, names: changed & set(names))
        else:
            shutil.copy2(ROOT / name, name)
    for module in MODULES:
        path = Path(*module.split(".")).with_suffix(".py")
        source = undecorated((ROOT / path).read_text())
        if not path.exists() or path.read_text() != source:  # mutmut goes by the time of the last change
            path.write_text(source)
    shutil.rmtree("mutants/conformance/tests", ignore_errors=True)
    from mutmut import __main__ as mutmut

    Path("mutants").mkdir(exist_ok=True)
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.create_mutants(1)


def changed_constants() -> Iterator[tuple[str, str, object]]:
    """Every number of a module doubled and halved, and every limit of a format moved: module, constant, value."""
    for name in MODULES:
        for constant, value in list(vars(importlib.import_module(name)).items()):
            if constant.strip("_").isupper() and isinstance(value, int | float):
                for factor in (2, 0.5):
                    yield name, constant, type(value)(value * factor)
    formats = importlib.import_module("conformance.numerics.ulp").FORMATS
    for dtype, kind in formats.items():
        for field in dataclasses.fields(kind):
            number = getattr(kind, field.name)
            for other in (number / 2, number * 2) if field.name == "largest" else (number - 1, number + 1):
                yield "conformance.numerics.ulp", "FORMATS", {**formats, dtype: dataclasses.replace(kind, **{field.name: other})}


class Runner:
    """A plugin that runs the collected tests once per change instead of once."""

    def __init__(self, patterns: list[str]) -> None:
        self.patterns = patterns

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Try every change that no test has noticed yet: there may be other tests now."""
        from mutmut.mutation.data import SourceFileMutationData
        from mutmut.mutation.trampoline import set_mutant_under_test
        from mutmut.utils.format_utils import mangled_name_from_mutant_name

        tests, everything = self.reached(session)
        gc.freeze()
        assert self.tried(everything[:50], lambda: None) == SURVIVED, "the tests fail with no change"
        for module in MODULES:
            data = SourceFileMutationData(path=Path(*module.split(".")).with_suffix(".py"))
            data.load()
            names = sorted(name for name, code in data.exit_code_by_key.items() if code in UNSETTLED and self.wanted(name))
            random.Random(0).shuffle(names)  # a run that was ended early has tried a sample
            for number, name in enumerate(names, 1):
                reaching = tests.get(mangled_name_from_mutant_name(name), [])
                code = self.tried(reaching, functools.partial(set_mutant_under_test, name))
                data.exit_code_by_key[name] = code
                if code != KILLED:
                    print(name, code, flush=True)
                if number % 50 == 0 or number == len(names):
                    data.save()
                    print(f"{module}: {number} of {len(names)}", flush=True)
        file = Path("mutants/constants.json")
        known = json.loads(file.read_text()) if file.exists() else {}
        for module, constant, value in changed_constants():
            name = f"{module}.{constant} = {value}"
            if known.get(name) in UNSETTLED and self.wanted(name):
                change = functools.partial(setattr, importlib.import_module(module), constant, value)
                known[name] = self.tried(everything, change)
                file.write_text(json.dumps(known, indent=4))
                if known[name] != KILLED:
                    print(name, known[name], flush=True)
        return True

    def wanted(self, name: str) -> bool:
        """Whether a change is one of those asked for."""
        return not self.patterns or any(fnmatch.fnmatch(name, pattern) for pattern in self.patterns)

    @staticmethod
    def reached(session: pytest.Session) -> tuple[dict[str, list[pytest.Item]], list[pytest.Item]]:
        """Which tests reach which function, and all of them; the fastest first. Every one must pass."""
        from mutmut.mutation.trampoline import set_mutant_under_test
        from mutmut.state import state

        set_mutant_under_test("stats")
        seconds: dict[str, float] = {}
        reached: defaultdict[str, list[pytest.Item]] = defaultdict(list)
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            state()._stats.clear()
            began = time.process_time()
            reports = runtestprotocol(item, log=False, nextitem=following)
            seconds[item.nodeid] = time.process_time() - began
            assert not any(report.failed for report in reports), reports
            for name in state()._stats:
                reached[name].append(item)
        set_mutant_under_test("")
        for items in reached.values():
            items.sort(key=lambda item: seconds[item.nodeid])
        return reached, sorted(session.items, key=lambda item: seconds[item.nodeid])

    @staticmethod
    def tried(items: list[pytest.Item], change: Callable[[], None]) -> int:
        """What becomes of a change, in a child of this process."""
        if not items:
            return NO_TESTS
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE + 1))
            change()
            for number, (item, following) in enumerate(zip(items, [*items[1:], None], strict=True)):
                if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
                    os.write(writer, str(number).encode())
                    os._exit(KILLED)
            os._exit(SURVIVED)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        noticed = os.read(reader, 20)
        os.close(reader)
        if noticed:
            items.insert(0, items.pop(int(noticed)))
        return TIMEOUT if code == -signal.SIGXCPU else min(1, abs(code))


def main(arguments: list[str]) -> None:
    """Generate the changes, try them and say what became of them."""
    COPY.mkdir(parents=True, exist_ok=True)
    os.chdir(COPY)
    os.environ["MUTANT_UNDER_TEST"] = "mutant_generation"
    generate()
    from mutmut.configuration import config

    selection = [word if word.startswith("-") else f"mutants/{word}" for word in config().pytest_add_cli_args_test_selection]
    sys.path[:] = [str(COPY / "mutants"), *(place for place in sys.path if Path(place or ROOT).resolve() != ROOT)]
    # Nobody reads why a test failed, and to tell it takes two seconds.
    options = ["-q", "-p", "no:cacheprovider", "--rootdir=mutants", "--assert=plain", "--tb=native"]
    options += [word for word in arguments if word.startswith("-")]
    patterns = [word for word in arguments if not word.startswith("-")]
    code = pytest.main([*options, *selection], plugins=[Runner(patterns)])
    assert code in (0, 5), code


if __name__ == "__main__":
    main(sys.argv[1:])
