"""What a compiler pass did to the results, function by function, from the files that PyPTO's interpreter leaves.

PyPTO cuts a kernel into *functions* (straight pieces between loops and branches), interprets each on the tensor graph, and then
interprets what a pass made of it from the same inputs. Its own verdict is not used: it forgives a share of wrong elements,
takes NaN for agreement with anything, and, once pass 27 has cut a function into subgraphs, looks at the first tile of a
result only: the saved result then has the *valid shape* of one tile. So results are put together here from what each
operation of the executed graph copies out, tile by tile, and compared with what the tensor graph's function gave.

Layout, in ``output_*`` (found by experiment with PyPTO 0.2.0, operations' tensors saved):

``verify_*/verify_result_brief.csv``
    One line per (pass, function, loop trip, result): the files of the pass's result and of the tensor graph's.
``verify_*/verify_result_metadata.csv``
    One line per executed operation, in order: which raw tensor it wrote, where (``offset``), and the files of its inputs,
    of which only those are written that are read here (``conformance.toolchains.dumps``). A subgraph may be shared by functions;
    ``callopRawMagic`` is then the caller's raw tensor.
``verify_*/verify_exception.log``
    Interpretations that threw have no line anywhere else.
``program.json``
    Which tensors are a function's results (``outcasts``), in the order of the brief table's ``output0``, ``output1``, ...
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import torch

from conformance.lanes.base import PassDifference

#: The last of the 37 passes: what code is generated from.
LAST_PASS = "CodegenPreproc"
TENSOR_GRAPH = "tensor_graph"

DTYPES: dict[str, torch.dtype] = {
    "DT_FP32": torch.float32,
    "DT_BF16": torch.bfloat16,
    "DT_FP16": torch.float16,
    "DT_INT64": torch.int64,
    "DT_INT32": torch.int32,
    "DT_INT16": torch.int16,
    "DT_INT8": torch.int8,
    "DT_UINT8": torch.uint8,
    "DT_BOOL": torch.bool,
}


@dataclasses.dataclass(frozen=True)
class PassComparison:
    """What ``compare_passes`` found; ``compared`` counts (pass, function, loop trip, result)."""

    differences: tuple[PassDifference, ...]
    compared: int


@dataclasses.dataclass(frozen=True)
class _Write:
    """One operation's write to a raw tensor: ``path`` holds a tile of ``shape`` that goes to ``offset``."""

    operation: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    #: The extent of the written tensor that is in use.
    whole: tuple[int, ...]


class UnreadableError(Exception):
    """The interpreter's files are not laid out as they were found to be: the comparison cannot be made."""


def compare_passes(output: Path) -> PassComparison:
    """Compare every pass that was interpreted with the tensor graph.

    ``output`` is an ``output_*`` folder of a run with ``pass_verify_save_tensor``. A result that is missing, has another shape,
    or cannot be compared counts as a difference: agreement is only what was seen.
    """
    (folder,) = output.glob("verify_*")
    table = _Operations(folder)
    results = _results(output / "program.json")
    differences: list[PassDifference] = []
    compared = 0
    seen: dict[str, set[tuple[str, str]]] = defaultdict(set)
    thrown: set[tuple[str, str]] = set()
    for compiler_pass, function, message in _exceptions(folder / "verify_exception.log"):
        thrown.add((compiler_pass, function))
        differences.append(PassDifference(compiler_pass, function, "", "", math.inf, 0, 0, message))
    rows = [row for row in _rows(folder / "verify_result_brief.csv") if row["passName"] != TENSOR_GRAPH]
    expected = _expected(folder, rows)
    for row in rows:
        compiler_pass, function, loop = row["passName"], row["verifyType"], row["loopInfo"]
        seen[compiler_pass].add((function, loop))
        index = int(row["ioflag"].removeprefix("output"))
        raw, name = table.result(results, function, index)
        try:
            found = _compare_result(folder, row, expected[function, loop, row["ioflag"]], table, raw)
            compared += 1
        except UnreadableError as error:
            found = (math.inf, 0, 0, f"could not be compared: {error}")
        if found is not None:
            worst, count, total, what = found
            label = name or f"result {index}"
            message = f"{compiler_pass}: {label} of {function} at {loop}: {what}"
            differences.append(PassDifference(compiler_pass, function, name, loop, worst, count, total, message))
    passes = sorted(seen) or [path.name for path in folder.glob("Pass_*")] or [LAST_PASS]
    for compiler_pass in passes:
        for function, loop in sorted(table.executed - seen[compiler_pass]):
            if (compiler_pass, function) not in thrown and results.get(function):
                message = (
                    f"{compiler_pass}: {function} at {loop} was executed on the tensor graph and left no result after the pass"
                )
                differences.append(PassDifference(compiler_pass, function, "", loop, math.inf, 0, 0, message))
    differences.sort(key=lambda difference: difference.compiler_pass)
    return PassComparison(tuple(differences), compared)


def _expected(folder: Path, rows: list[dict[str, str]]) -> dict[tuple[str, str, str], Path]:
    """The file of what the tensor graph gave, by (function, loop trip, result).

    It is written anew for every pass, cut to one tile where an earlier pass has changed the valid shape: the largest is whole.
    """
    found: dict[tuple[str, str, str], Path] = {}
    sizes: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = row["verifyType"], row["loopInfo"], row["ioflag"]
        path = folder / row["passName"] / row["goldenTensor"]
        size = path.stat().st_size if path.is_file() else 0
        if size > sizes.get(key, -1):
            found[key], sizes[key] = path, size
    return found


def _compare_result(
    folder: Path, row: dict[str, str], reference: Path, table: _Operations, raw: str
) -> tuple[float, int, int, str] | None:
    """Worst difference, elements that differ, out of how many, and a sentence; ``None`` if the pass gave the same result."""
    compiler_pass, function, loop = row["passName"], row["verifyType"], row["loopInfo"]
    dtype = _dtype(row["outputDtype"])
    saved, changed = _bytes(reference, dtype), _bytes(folder / compiler_pass / row["outputTensor"], dtype)
    share = table.share(function, row["outputDtype"])
    shape = _shape(row["outputShape"])
    if saved == changed and math.prod(shape) * dtype.itemsize == len(saved):
        return None  # nearly all results are bit-equal
    expected, actual = torch.frombuffer(saved, dtype=dtype), torch.frombuffer(changed, dtype=dtype)
    if math.prod(shape) == expected.numel() == actual.numel():
        return _difference(actual.view(shape), expected.view(shape), share)
    references = table.writes(TENSOR_GRAPH, function, loop, raw)
    if math.prod(shape) != expected.numel() and references:
        shape = references[-1].whole
    if math.prod(shape) != expected.numel():
        raise UnreadableError(f"the tensor graph's result has {expected.numel()} elements, its shape is {list(shape)}")
    expected = expected.view(shape)
    if actual.numel() == expected.numel():
        return _difference(actual.view(shape), expected, share)
    if _shape(row["outputShape"]) != shape and math.prod(_shape(row["outputValidShape"])) > expected.numel():
        total = expected.numel()
        return math.inf, total, total, f"its shape is {row['outputValidShape']}, the tensor graph's {list(shape)}"
    if not raw:
        raise UnreadableError("the program does not say which tensor it is, and only its first tile was saved")
    writes = table.writes(compiler_pass, function, loop, raw)
    if not writes:
        return math.inf, expected.numel(), expected.numel(), "nothing writes it after the pass"
    assembled = expected.clone()
    for write in writes:
        region = _region(write, shape)
        assembled[region] = _read(folder / compiler_pass / write.path, _dtype(write.dtype)).view(write.shape).to(dtype)
    found = _difference(assembled, expected, share)
    if found is None and references:
        # What neither side writes is the same by construction; what only one of them writes is not.
        before, after = _coverage(references, shape), _coverage(writes, shape)
        unlike = int((before != after).sum())
        if unlike:
            lost = int((before & ~after).sum())
            return math.inf, unlike, expected.numel(), f"{lost} elements are no longer written, {unlike - lost} are written anew"
    return found


# How far a pass may move an element, as a share of its own magnitude plus its row's root mean square.
#
# A pass may cut a sum into other pieces, and nothing else: the same operations on the same inputs give the same bits. Measured on
# the ten kernels (tiny and awkward dimensions, all regimes, 2000 comparisons): functions without a sum are bit-equal without
# exception. With one (matrix product, row sum), fp32 results moved by at most 6e-6 of the row's root mean square. Where a
# 16-bit value is rounded in between, or is the result, a sum beside a tie may move it by one unit in its last place, 2**-7 of
# itself at most, and the result by as much where that one value dominates (measured: 8e-4). What is wrong moves by far more.
EXACT = 0.0
REORDERED = 2.0**-12
REORDERED_AND_ROUNDED = 2.0**-7

_SUM = re.compile(r"MUL_?B|MUL_?ACC|SUM|PROD|MEAN|VAR")
_ASSEMBLES = frozenset({"ASSEMBLE", "ASSEMBLE_SSA"})
_MOVES = _ASSEMBLES | {"VIEW", "RESHAPE", "COPY_IN", "COPY_OUT"}
_NARROW = frozenset({"DT_BF16", "DT_FP16"})


def _difference(actual: torch.Tensor, expected: torch.Tensor, share: float) -> tuple[float, int, int, str] | None:
    # Bytes, not values: a cache's stale rows are NaN, which is equal to nothing.
    if torch.equal(actual.flatten().view(torch.uint8), expected.flatten().view(torch.uint8)):
        return None
    same = actual == expected
    distance = (actual.double() - expected.double()).abs()
    if expected.is_floating_point():
        same |= actual.isnan() & expected.isnan()
        size = torch.where(expected.isfinite(), expected.double().abs(), 0.0)
        row = size.square().mean(-1, keepdim=True).sqrt() if size.dim() else size
        # NaN and infinity on one side only compare as false, and so differ.
        same |= distance <= share * (size + row)
    count = int((~same).sum())
    if not count:
        return None
    distance = torch.where(same, 0.0, distance.nan_to_num(math.inf, math.inf, math.inf))
    position = int(distance.argmax())
    worst = float(distance.flatten()[position])
    index = [int(part) for part in torch.unravel_index(torch.tensor(position), expected.shape)]
    was, became = expected.flatten()[position].item(), actual.flatten()[position].item()
    total = expected.numel()
    return worst, count, total, f"{count} of {total} elements differ, the worst at {index}: {was:.6g} became {became:.6g}"


class _Operations:
    """The table of executed operations: which functions ran, and what wrote to which raw tensor."""

    def __init__(self, folder: Path) -> None:
        self.executed: set[tuple[str, str]] = set()
        self._written: dict[tuple[str, str, str, str], list[dict[str, str]]] = defaultdict(list)
        self._raw: dict[tuple[str, str], str] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._sums: set[str] = set()
        self._rounds: set[str] = set()
        for row in _rows(folder / "verify_result_metadata.csv", after_passes="COPY_OUT"):
            compiler_pass, function, loop = row["passName"], row["verifyType"], row["loopInfo"]
            raw = row["callopRawMagic"] or row["rawTensorMagic"]
            if compiler_pass == TENSOR_GRAPH:
                self.executed.add((function, loop))
                self._raw[function, row["tensorMagic"]] = raw
                self._names[function, raw] = row["outputSymbol"]
                if _SUM.search(row["opCode"]):
                    self._sums.add(function)
                if row["outputDtype"] in _NARROW and row["opCode"] not in _MOVES:
                    self._rounds.add(function)
                if row["opCode"] not in _ASSEMBLES:
                    continue
            elif row["opCode"] != "COPY_OUT":
                continue
            self._written[compiler_pass, function, loop, raw].append(row)

    def writes(self, compiler_pass: str, function: str, loop: str, raw: str) -> list[_Write]:
        """What wrote to a raw tensor in one execution of a function, in order.

        What is written is an operation's first input; a second one is what was there before, where pieces are assembled one by
        one.
        """
        return [
            _Write(
                operation=row["opCode"],
                path=Path(row["inputTensors"].split(", ")[0]),
                dtype=row["inputDtype"].split(", ")[0],
                shape=_shape(row["inputValidShape"].partition("]")[0]),
                offset=_shape(row["offset"]),
                whole=_shape(row["outputValidShape"]),
            )
            for row in self._written.get((compiler_pass, function, loop, raw), ())
        ]

    def share(self, function: str, dtype: str) -> float:
        """How far a pass may move a function's result of that dtype."""
        if function not in self._sums:
            return EXACT
        rounds = function in self._rounds or dtype in _NARROW
        return REORDERED_AND_ROUNDED if rounds else REORDERED

    def result(self, results: dict[str, list[str]], function: str, index: int) -> tuple[str, str]:
        """The raw tensor of a function's result and its name in the kernel's text; empty where they are not known."""
        tensors = results.get(function, [])
        raw = self._raw.get((function, tensors[index]), "") if index < len(tensors) else ""
        return raw, self._names.get((function, raw), "")


_FUNCTION = re.compile(rb'"func_magicname":\s*"([^"]*)"|"outcasts":\s*(\[\s*\[[-0-9,\[\]\s]*\])')


def _results(program: Path) -> dict[str, list[str]]:
    """The tensors that are each function's results, from the program's text.

    It grows to hundreds of megabytes for real sizes, so it is scanned for the two fields rather than parsed. A function's name
    comes before its results because its fields are sorted.
    """
    found: dict[str, list[str]] = {}
    name = ""
    for match in _FUNCTION.finditer(program.read_bytes()):
        if match[1] is not None:
            name = match[1].decode()
        else:
            found.setdefault(name, [str(entry[0]) for entry in json.loads(match[2])])
    return found


_THROWN = re.compile(r"VerifyPass failed for function (\S+), pass (\w+) \(passIndex: (\d+)[^)]*\): *(.*)")


def _exceptions(log: Path) -> Iterator[tuple[str, str, str]]:
    """(pass, function, sentence) of each interpretation that threw."""
    if not log.is_file():
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for position, line in enumerate(lines):
        match = _THROWN.search(line)
        if match is None:
            if "VerifyPass failed" in line or line.startswith("[VERIFY]"):
                yield "unknown pass", "unknown function", f"interpreting after a pass failed: {line.strip()}"
            continue
        function, name, number, cause = match.groups()
        compiler_pass = f"Pass_{int(number):02d}_{name}"
        cause = cause or (lines[position + 1].strip() if position + 1 < len(lines) else "")
        yield compiler_pass, function, f"{compiler_pass}: what it made of {function} cannot be interpreted: {cause}"


def _rows(path: Path, after_passes: str = "") -> Iterator[dict[str, str]]:
    """The lines of a table by column; of what was executed after a pass only lines with that text."""
    if not path.is_file():
        return
    head, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    names = next(csv.reader([head]), [])
    if after_passes and "passName" in names:
        # To read a line as CSV is what takes the time. No column up to this one is quoted.
        column = names.index("passName")
        lines = [line for line in lines if after_passes in line or TENSOR_GRAPH in line.split(",", column + 1)[column:][:1]]
    # Not csv.DictReader, which is as slow again. A line that is cut off lacks what comes last.
    for line in filter(None, csv.reader(lines)):
        yield dict(zip_longest(names, line, fillvalue=""))


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.strip("[] ").split(",") if part.strip())
    except ValueError as error:
        raise UnreadableError(f"{text!r} is no shape") from error


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UnreadableError(f"unknown dtype {name}")
    return DTYPES[name]


def _read(path: Path, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(_bytes(path, dtype), dtype=dtype)


def _bytes(path: Path, dtype: torch.dtype) -> bytearray:
    try:
        with open(path, "rb", buffering=0) as file:
            data = bytearray(file.read())
    except OSError as error:
        raise UnreadableError(f"{path.name} is missing") from error
    if not data or len(data) % dtype.itemsize:
        raise UnreadableError(f"{path.name} has {len(data)} bytes, no whole number of {dtype} elements")
    return data


def _region(write: _Write, shape: tuple[int, ...]) -> tuple[slice, ...]:
    inside = len(write.offset) == len(shape) == len(write.shape) and all(
        start >= 0 and start + extent <= size for start, extent, size in zip(write.offset, write.shape, shape, strict=True)
    )
    if not inside:
        raise UnreadableError(
            f"{write.operation} writes {list(write.shape)} at {list(write.offset)} of a result of shape {list(shape)}"
        )
    return tuple(slice(start, start + extent) for start, extent in zip(write.offset, write.shape, strict=True))


def _coverage(writes: list[_Write], shape: tuple[int, ...]) -> torch.Tensor:
    covered = torch.zeros(shape, dtype=torch.bool)
    for write in writes:
        covered[_region(write, shape)] = True
    return covered
