"""What a machine can run, and what there is to judge: the text of ``conformance doctor`` and ``conformance list``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from conformance.reports import text


class Found(Protocol):
    """One thing that a lane needs: whether it is there, what was found, and what to do if it is not."""

    @property
    def name(self) -> str: ...
    @property
    def ok(self) -> bool: ...
    @property
    def found(self) -> str: ...
    @property
    def advice(self) -> str: ...


def doctor(lines: Iterable[Found]) -> str:
    """A line for each thing, ``ok`` or ``--`` before it, and under what is missing what to do. Paths stay whole."""
    told = []
    for line in lines:
        told.append(f"{'ok' if line.ok else '--'}  {line.name:<12} {text.one_line(line.found)}")
        if not line.ok and line.advice:
            told.append(f"    {'':<12} {text.one_line(line.advice)}")
    return "\n".join(told)


def stage_entry(
    name: str,
    summary: str,
    arguments: Sequence[str],
    kernels: Mapping[str, tuple[str, Sequence[str], Sequence[str]]],
    declarable: Sequence[str] = (),
) -> str:
    """A stage with its arguments, what may be declared of a kernel's numbers, and its kernels.

    ``kernels`` maps name to (toolchain, lanes, capabilities).
    """
    lines = [f"{name}: {summary}"]
    lines += textwrap.wrap(", ".join(arguments), 78, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    if declarable:
        told = f"may be declared: {', '.join(declarable)}"
        lines += textwrap.wrap(told, 78, initial_indent="  ", subsequent_indent="   ", break_on_hyphens=False)
    for kernel, (toolchain, lanes, capabilities) in kernels.items():
        able = f"; {' '.join(capabilities)}" if capabilities else ""
        lines.append(f"  - {kernel} ({toolchain}: {' '.join(lanes)}{able})")
    return "\n".join(lines)
