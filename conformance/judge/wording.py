"""Where something is wrong, and in what shape, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from conformance.cases.case import Case
from conformance.contract.arguments import Argument
from conformance.judge.outputs import OutputPart, count_true
from conformance.judge.verdict import Finding


def extent_finding(case: Case, part: OutputPart, mask: torch.Tensor, detector: str, what: str) -> Finding:
    """A finding about the elements of a mask: how many, in what shape, and the first."""
    first = int(mask.flatten().view(torch.uint8).argmax())  # a list of all places would take eight times the mask
    index = part.index(first)
    argument = part.argument
    where = argument.where(index[-len(argument.size(case.dims)) :], case.dims)
    return Finding(
        detector,
        f"{argument.name} {what}: {pattern_in_words(part, mask)}, the first at {element_in_words(argument, index)} "
        f"({place_in_words(where)})",
        argument.name,
        index,
        where,
        count=count_true(mask),
        total=mask.numel(),
    )


def element_in_words(argument: Argument, index: Sequence[int]) -> str:
    """An element as Python writes it, such as ``out[3, 41]``."""
    return f"{argument.name}[{', '.join(str(position) for position in index)}]"


def place_in_words(where: dict[str, int]) -> str:
    """Named coordinates, such as ``row 3, head 1, lane 17``."""
    return ", ".join(f"{label.replace('_', ' ')} {position}" for label, position in where.items())


def area_in_words(part: OutputPart, row: int | None, columns: slice, width: int) -> str:
    """Some columns of one row or of all, such as ``row 3, columns 16..31``."""
    across = "" if columns == slice(0, width) else f"columns {columns.start}..{columns.stop - 1}"
    if row is None:
        return f"{across} of every row" if across else "the whole tensor"
    number = row if part.rows is None else int(part.rows[row])
    return f"row {number}, {across}" if across else f"row {number}"


def place_of_area(
    case: Case, part: OutputPart, row: int | None, columns: slice, width: int
) -> tuple[tuple[int, ...] | None, dict[str, int]]:
    """Where an area begins: the coordinates that it has, as an index and by name; none of what it is all of."""
    argument, across = part.argument, columns == slice(0, width)
    index = part.index((row or 0) * width + columns.start)[-len(argument.size(case.dims)) :]
    where = argument.where(index, case.dims)
    along = [{case.dims.label(symbol) for symbol in axis} for axis in argument.axes]
    gone = set().union(*along[:-1] if row is None else (), *along[-1:] if across else ())
    where = {label: coordinate for label, coordinate in where.items() if label not in gone}
    if row is None:
        return None, where
    return (index[:-1] or None if across else index), where


def pattern_in_words(part: OutputPart, mask: torch.Tensor) -> str:
    """How much is wrong and in what shape: all of it, whole rows, a block of columns, or scattered elements."""
    count, total = count_true(mask), mask.numel()
    if count == total:
        return f"all {total} elements"
    rows = torch.nonzero(mask.any(1)).flatten()
    columns = torch.nonzero(mask.any(0)).flatten()
    text = f"{count} of {total} elements"
    if count < len(rows) * len(columns) or count == 1:
        return f"{text}, in {len(rows)} of {mask.shape[0]} rows" if mask.shape[0] > 1 else text
    names = rows if part.rows is None else part.rows[rows]
    down = "every row" if len(rows) == mask.shape[0] else f"rows {_ranges(names.tolist())}"
    across = "" if len(columns) == mask.shape[1] else f", columns {_ranges(columns.tolist())}"
    return f"{text}: {down}{across}"


def _ranges(numbers: list[int], most: int = 4) -> str:
    """Numbers as short ranges, such as ``0..3, 8``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(low) if low == high else f"{low}..{high}" for low, high in runs[:most]]
    return ", ".join(shown) + (f" and {len(runs) - most} more" if len(runs) > most else "")
