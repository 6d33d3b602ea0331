"""Every code block of the README and of docs/ does what the text says: python runs, commands run or at least parse.

What follows a block's language says how it is taken:

- ``python``: executed, in order within a file, in one namespace and one folder.
- ``python`` or ``toml`` that begins with ``# NAME``, a file: saved there, for the blocks that follow to use.
- ``diff`` that begins with ``--- NAME``: applied to that file of a copy of the repository, in which commands run from then on.
  The lines that it says are there must be there, once.
- ``console``: each line is a command, run in that folder, with exit code 0. ``console exit=N``: with another one.
  ``console parse``: what is too dear to run; programs, commands and options must exist.
- ``output``: what the block before it prints; numbers may differ by a twentieth, as they do between processors.
- ``text``: no code. Any language with ``no-run: REASON``: code that cannot be run here; how much there is of it is counted below.

``python -m conformance.tests.test_docs docs/NAME.md ...`` writes what the blocks print into the documents, after a message was
changed on purpose.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from conformance.cli import main as conformance_command
from conformance.contract import registry

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
LANGUAGES = ("python", "toml", "diff", "console", "output", "text")
#: Blocks that are not run, by document. A new one needs a reason in its info string, and a line here.
NOT_RUN: dict[str, int] = {"nightly.md": 1}

_FENCE = re.compile(r"^```(?P<language>[a-z]*)(?: (?P<info>[^\n]*))?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, what its info string says besides, its text, and the place of the text in the document."""

    language: str
    info: str
    code: str
    start: int
    line: int

    @property
    def is_run(self) -> bool:
        """Whether the block is executed, compared or parsed."""
        return not self.info.startswith("no-run:")


def blocks_of(text: str) -> list[Block]:
    """The blocks of a document, in order."""
    return [
        Block(match["language"], match["info"] or "", match["code"], match.start("code"), text.count("\n", 0, match.start()) + 1)
        for match in _FENCE.finditer(text)
    ]


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """The working directory, and what can be imported from it; no module or model of it is left behind."""
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
        registry.models.cache_clear()


@dataclasses.dataclass
class Document:
    """One document being run: the names its python blocks share, the folder that they share, and what the last block printed."""

    path: Path
    folder: Path
    names: dict[str, Any] = dataclasses.field(default_factory=lambda: {"__name__": "document"})

    def outputs(self) -> Iterator[tuple[Block, str]]:
        """Run every block; yields each ``output`` block with what the block before it printed."""
        printed = ""
        with _inside(self.folder):
            for block in blocks_of(self.path.read_text()):
                if block.language == "output" and block.is_run:
                    yield block, printed
                elif block.is_run:
                    try:
                        printed = self._printed(block)
                    except BaseException as error:
                        raise AssertionError(f"{self.path.name}:{block.line}: {type(error).__name__}: {error}") from error

    def _printed(self, block: Block) -> str:
        named = re.match(r"# (\S+\.(?:py|toml))\n", block.code)
        if named is not None:
            self._save(named[1], block.code)
        elif block.language == "diff":
            self._apply(block.code)
        elif block.language == "python":
            return self._python(block)
        elif block.language == "console":
            commands = block.code.replace("\\\n", " ").splitlines()
            words = [shlex.split(command, comments=True) for command in commands]
            if block.info == "parse":
                for command in filter(None, words):
                    require_options(command)
            else:
                return "".join(self._command(command, _number(block.info, "exit")) for command in filter(None, words))
        return ""

    def _save(self, name: str, code: str) -> None:
        compile(code if name.endswith(".py") else "", name, "exec")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists(), f"{name} is there already"
        path.write_text(code)

    def _apply(self, diff: str) -> None:
        if not (self.folder / "conformance").exists():
            ignore = shutil.ignore_patterns("__pycache__", "tests")
            for name in ("conformance", "kernels", "reports", "fixtures"):
                shutil.copytree(ROOT / name, self.folder / name, symlinks=True, ignore=ignore, dirs_exist_ok=True)
        header, *lines = diff.splitlines()
        path = self.folder / header.removeprefix("--- ")
        before, after = ("\n".join(line[1:] for line in lines if line[:1] != other) for other in "+-")
        text = path.read_text()
        assert text.count(before) == 1, f"{path.name} has these lines {text.count(before)} times:\n{before}"
        path.write_text(text.replace(before, after))

    def _python(self, block: Block) -> str:
        # Kernels say where they are defined: tracebacks and replay commands need the file.
        file = self.folder / f"{self.path.stem}_{block.line}.py"
        file.write_text(block.code)
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            exec(compile(block.code, str(file), "exec"), self.names)
        return stdout.getvalue()

    def _command(self, words: list[str], code: int) -> str:
        """What a command of ours prints; it must end with that exit code. Other programs are not run."""
        program, *arguments = _without_environment(words)
        if program == "pip" and arguments == ["install", "--editable", "."]:
            self._install()
            return ""
        is_script = program == "python" and (self.folder / arguments[0]).is_file()
        assert is_script or program == "conformance", f"{program} is not run here: mark the block 'parse' or 'no-run: REASON'"
        if is_script or (self.folder / "conformance").exists():
            environment = {**os.environ, "PYTHONPATH": str(self.folder)}
            command = [sys.executable, *([] if is_script else ["-m", "conformance.cli"]), *arguments]
            found = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
            exit_code, output = found.returncode, found.stdout + found.stderr
        else:
            result = CliRunner().invoke(conformance_command, arguments)
            exit_code, output = result.exit_code, result.output
        assert exit_code == code, f"{shlex.join(words)}: exit code {exit_code}, expected {code}\n{output}"
        return output

    def _install(self) -> None:
        """What an editable install of the folder's ``pyproject.toml`` leaves for entry points to be found by."""
        text = (self.folder / "pyproject.toml").read_text()
        information = self.folder / "installed.egg-info"
        information.mkdir()
        (information / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 0\n")
        groups = re.findall(r'^\[project\.entry-points\."(.+)"\]\n((?:.+\n?)*)', text, re.MULTILINE)
        assert groups, "pyproject.toml has no entry points"
        lines = [f"[{group}]\n{entries.replace(chr(34), '')}" for group, entries in groups]
        (information / "entry_points.txt").write_text("\n".join(lines))
        registry.models.cache_clear()


def _number(info: str, name: str) -> int:
    return int(info.removeprefix(f"{name}=")) if info.startswith(f"{name}=") else 0


def _without_environment(words: list[str]) -> list[str]:
    """A command without the folder of its program."""
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


def require_options(words: list[str]) -> None:
    """Fail if the program, its command or one of its options does not exist."""
    program, *arguments = _without_environment(words)
    if program == "conformance":
        name, *rest = arguments
        command = conformance_command.commands[name]
        command.make_context(name, rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in arguments:
            variable, equals, value = word.partition("=")
            if equals:
                assert re.search(rf"\$\({variable}\)", (ROOT / "Makefile").read_text()), f"make knows no {variable}"
                _require_options(_pytest_help(), shlex.split(value) if variable == "OPTIONS" else [])
            else:
                assert word in targets, f"make has no target {word}"
    elif program == "pytest":
        _require_options(_pytest_help(), arguments)
    elif program == "python" and arguments[:1] == ["-m"]:
        assert importlib.util.find_spec(arguments[1]) is not None, f"there is no module {arguments[1]}"
        if arguments[1] == "pytest":
            _require_options(_pytest_help(), arguments[2:])
        else:
            command = importlib.import_module(f"{arguments[1]}.command").main
            command.make_context(arguments[1], arguments[2:])
    else:
        raise AssertionError(f"{program} cannot be parsed here: mark the block 'no-run: REASON'")


@functools.cache
def _pytest_help() -> str:
    return subprocess.run([sys.executable, "-m", "pytest", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _require_options(known: str, words: list[str]) -> None:
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", known), f"there is no option {option}"


def _parts(text: str) -> tuple[list[str], list[float]]:
    """The words of a text, with a placeholder for each number, and the numbers."""
    number = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"
    return re.sub(number, "#", text).split(), [float(found) for found in re.findall(number, text)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_runs_and_prints_what_the_text_says(path: Path, tmp_path: Path) -> None:
    for block, printed in Document(path, tmp_path).outputs():
        words, numbers = _parts(printed)
        assert words == _parts(block.code)[0], f"{path.name}:{block.line}: the block before it prints otherwise"
        assert numbers == pytest.approx(_parts(block.code)[1], rel=0.05), f"{path.name}:{block.line}"


def test_every_block_says_what_it_is_and_those_that_are_not_run_are_counted() -> None:
    not_run: dict[str, int] = {}
    for path in DOCUMENTS:
        text = path.read_text()
        assert text.count("```") == 2 * len(blocks_of(text)), f"{path.name}: a fence that is not one of a block"
        for block in blocks_of(text):
            assert block.language in LANGUAGES, f"{path.name}:{block.line}: a block needs one of {', '.join(LANGUAGES)}"
            if not block.is_run:
                assert block.info.removeprefix("no-run:").strip(), f"{path.name}:{block.line}: no reason is given"
                not_run[path.name] = not_run.get(path.name, 0) + 1
    assert not_run == NOT_RUN


def _anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\\(.)", r"\1", heading).lower()).replace(" ", "-") for heading in headings}


#: Documents whose links are checked, and whose code is not run.
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/constants.md", "benchmarks/mutation.md")]


@pytest.mark.parametrize("path", DOCUMENTS + OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", path.read_text())):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in _anchors(file.read_text()), f"{path.name} links to {target}"


def test_sections_of_the_rule_that_the_code_cites_exist() -> None:
    known = set(re.findall(r"^#+ (.+)$", (ROOT / "docs" / "rule.md").read_text(), re.MULTILINE))
    for folder in ("conformance", "kernels", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            for section in re.findall(r"docs/rule\.md, ([A-Z][A-Za-z0-9 ]*\w)", file.read_text()):
                if file != Path(__file__):
                    assert section in known, f"{file.relative_to(ROOT)} cites docs/rule.md, {section}"


#: Folders at the top of the repository, which links in ``conformance/`` lead to.
LINKED = ("kernels", "reports", "fixtures")


def _imports(part: str) -> set[str]:
    """The parts of ``conformance/`` that one imports, but for type annotations."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    folder = ROOT / "conformance" / part
    for file in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        visit(ast.parse(file.read_text()))
    return {name.split(".")[1] for name in found if name.startswith("conformance.")} - {part, "__version__", *LINKED}


def test_the_architectures_table_of_imports_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\w, ]*)\|$", text, re.MULTILINE)
    table = {part: set(filter(None, imports.strip().split(", "))) for part, imports in rows}
    parts = {path.stem for path in (ROOT / "conformance").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert table.keys() == parts - {"__init__", "cli", "plugin", "tests", *LINKED}
    assert table == {part: _imports(part) for part in table}
    assert all(imported in list(table)[:place] for place, part in enumerate(table) for imported in table[part]), "see the order"


def rewrite(paths: list[Path]) -> None:
    """Write what the blocks print into these documents, all of them if none is given."""
    for path in paths or DOCUMENTS:
        with tempfile.TemporaryDirectory() as folder:
            text = path.read_text()
            for block, printed in reversed(list(Document(path, Path(folder)).outputs())):
                text = text[: block.start] + printed + text[block.start + len(block.code) :]
            path.write_text(text)


if __name__ == "__main__":
    rewrite([Path(name).resolve() for name in sys.argv[1:]])
