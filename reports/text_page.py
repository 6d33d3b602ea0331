"""A page of text for a terminal, made of rich's texts and tables: plain where it is piped, with ANSI colours where asked for."""

from __future__ import annotations

import io
import re

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


class TextPage:
    """Lines and tables, ``width`` columns wide. Whatever comes from a kernel has to be cleaned before (``reports.text``)."""

    def __init__(self, width: int) -> None:
        self.width = width
        #: Each with whether it may be longer than the page is wide.
        self._parts: list[tuple[RenderableType, bool]] = []

    def line(self, *parts: str | tuple[str, str], indent: int = 0) -> None:
        """Text and (text, style), broken where it is too long."""
        self._add(Text.assemble(*parts, overflow="fold"), indent)

    def blank(self) -> None:
        """An empty line."""
        self.line()

    def wrapped(self, content: str, *, indent: int = 0, style: str = "") -> None:
        """A paragraph."""
        self.line((content, style), indent=indent)

    def whole(self, content: str, *, indent: int = 0, style: str = "") -> None:
        """A line that is not broken, however long: one that scripts look for."""
        self._parts.append((Text(" " * indent + content, style), True))

    def section(self, title: str, style: str = "bold") -> None:
        """A title, with an empty line before it."""
        self.blank()
        self.line((title, style))

    def table(self, table: Table, indent: int = 0) -> None:
        """A table, as wide as it needs to be."""
        self._add(table, indent)

    def command(self, command: str, indent: int) -> None:
        """A command over as many lines as it needs, each but the last ended so that a shell reads on."""
        blanks = " " * indent
        head, option, case = command.partition(" --case ")
        if cell_len(blanks + command) <= self.width or not option:
            lines = [blanks + command]
        else:
            lines = [f"{blanks}{head} \\", f"{blanks}    --case {case}"]
        for line in lines:
            self.whole(line, style="bold")

    def finish(self, colour: bool) -> str:
        """The page as text, each line ended."""
        output = io.StringIO()
        console = Console(
            file=output,
            width=self.width,
            force_terminal=colour,
            color_system="standard" if colour else None,
            highlight=False,
            markup=False,
            emoji=False,
        )
        for part, whole in self._parts:
            console.print(part, soft_wrap=whole)
        return "".join(f"{_without_blank_end(line)}\n" for line in output.getvalue().split("\n")[:-1])

    def _add(self, part: RenderableType, indent: int) -> None:
        self._parts.append((Padding(part, (0, 0, 0, indent), expand=False) if indent else part, False))


_BLANK_END = re.compile(r"(?: |\x1b\[[0-9;]*m)+$")


def _without_blank_end(line: str) -> str:
    """A line without the blanks at its end that fill a column; colours are still ended."""
    return _BLANK_END.sub(lambda found: found.group().replace(" ", ""), line)
