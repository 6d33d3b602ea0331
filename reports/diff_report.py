"""What a replacement changes, for a person: two kernels side by side, capability by capability, and what that comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.table import Table
from rich.text import Text

from conformance.contract.registry import capability_meanings, stages
from conformance.reports import text
from conformance.reports.text_page import TextPage

_STYLES = {"LOST": "bold red", "gained": "green", "": ""}


class KernelFacts(Protocol):
    """What is known of one kernel: ``conformance.running.diff.KernelSummary`` has it."""

    @property
    def kernel(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def runs(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def detectors(self) -> Sequence[str]: ...
    @property
    def share(self) -> float | None: ...
    @property
    def errors(self) -> Sequence[str]: ...
    @property
    def capacity(self) -> int: ...
    @property
    def refuted(self) -> Mapping[str, str]: ...
    def status(self, capability: str) -> str:
        """``yes``, ``no``, ``fails`` or ``not shown``."""


class Replacement(Protocol):
    """Two kernels, of which ``new`` takes the place of ``old``; capabilities lost, gained, and claimed but not tested."""

    @property
    def old(self) -> KernelFacts: ...
    @property
    def new(self) -> KernelFacts: ...
    @property
    def capabilities(self) -> Sequence[str]: ...
    @property
    def lost(self) -> Sequence[str]: ...
    @property
    def gained(self) -> Sequence[str]: ...
    @property
    def open(self) -> Sequence[str]: ...


def render(comparison: Replacement, width: int = 100, *, colour: bool = False) -> str:
    """Both kernels' verdicts, a table of capabilities before and after, and why each lost one is lost; no line end behind it.

    What is lost is told on a line of its own, however long, so that scripts find it.
    """
    old, new = comparison.old, comparison.new
    page = TextPage(width)
    for side, one in (("OLD", old), ("NEW", new)):
        page.whole(text.one_line(f"{side} {one.kernel} ({one.stage}): {verdict(one)}"))
    if old.stage != new.stage:
        page.whole(_changed_arguments(old.stage, new.stage), indent=4)
    for side, one in (("OLD", old), ("NEW", new)):
        for reason in one.errors:
            page.whole(f"{side} could not run: {text.one_line(reason)}", indent=4)
    meanings = capability_meanings()
    rows = [(name, old.status(name), new.status(name)) for name in comparison.capabilities]
    rows = [row for row in rows if row[1:] != ("no", "no")]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=bool(rows), header_style="")
    for title, room in (("capability", 17), ("before", 10), ("after", 10), ("", 0)):
        table.add_column(title, no_wrap=True, min_width=room)
    for name, before, after in rows:
        mark = "LOST" if name in comparison.lost else "gained" if name in comparison.gained else ""
        table.add_row(name, before, after, Text(mark, _STYLES[mark]))
    if old.share is not None and new.share is not None:
        table.add_row("allowance used", f"{old.share:.2f}", f"{new.share:.2f}", "")
    if table.row_count:
        page.table(table, indent=2)
    for name in comparison.lost:
        reason = new.refuted.get(name, f"{new.kernel} does not declare it")
        if new.status(name) in ("yes", "not shown"):
            reason = f"variable_batch {old.capacity} -> {new.capacity}"
        page.whole(text.one_line(f"lost: {name} ({meanings.get(name, 'of a model that is not installed')}): {reason}"))
    for name, reason in new.refuted.items():
        if name not in comparison.lost:
            page.whole(text.one_line(f"not held: {name}: {reason}"))
    for name in comparison.open:
        page.whole(f"not shown: {name}: no run put it to the test")
    return page.finish(colour).rstrip("\n")


def verdict(kernel: KernelFacts) -> str:
    """The outcome of a kernel's cases in a few words."""
    if not kernel.runs:
        return "not judged"
    if kernel.failed:
        return f"FAILED {kernel.failed} of {text.number(kernel.runs, 'run')} ({', '.join(kernel.detectors)})"
    used = "" if kernel.share is None else f", at most {kernel.share:.2f} of the allowance used"
    return f"passed {text.number(kernel.runs, 'run')}{used}"


def conclusion(comparisons: Sequence[Replacement]) -> str:
    """What all of them come to, the gravest first: something lost, then findings, then what could not be judged."""
    lost = sum(len(one.lost) for one in comparisons)
    untested = sum(len(one.open) for one in comparisons)
    claims = f"{_capabilities(untested)} {'was' if untested == 1 else 'were'} not put to the test" if untested else ""
    if lost:
        return f"serves less: {_capabilities(lost)} lost"
    if any(one.new.failed or one.new.refuted for one in comparisons):
        return f"the new kernel has findings, and {claims}" if claims else "nothing is lost, but the new kernel has findings"
    if claims:
        return claims
    if any(not one.new.runs or one.new.errors for one in comparisons):
        return "not everything could be judged"
    return "nothing is lost"


def _capabilities(count: int) -> str:
    return text.number(count, "capability", "capabilities")


def _changed_arguments(old: str, new: str) -> str:
    known = stages()
    names = [{argument.name for argument in known[stage].arguments} if stage in known else set() for stage in (old, new)]
    gone, come = sorted(names[0] - names[1]), sorted(names[1] - names[0])
    parts = [f"no longer takes {', '.join(gone)}"] if gone else []
    parts += [f"now takes {', '.join(come)}"] if come else []
    return f"another stage: {' and '.join(parts) or 'the same arguments'}"
