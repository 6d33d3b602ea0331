"""Results that depend on memory which nothing wrote, found in the compiled graph: nothing is executed.

What ``pypto.assemble`` leaves out of a buffer holds whatever the memory held before. PyPTO's interpreter reads 0.0 there, which
happens to be right where padding should be zero; a device has garbage. So the garbage is followed through the *tensor graph*,
which is what the front end makes of a kernel before it is cut into tiles, and reported where it gets into an argument. Garbage
that is read and dropped again (rows that only pad a tile) is no fault.

Only what is certain is said; taken to be clean are

* what an operation that is not listed below makes of garbage;
* what is viewed, or assembled, at an offset that is not a constant, unless all that is assembled into an argument is garbage;
* what lies beyond the first element along an axis whose valid extent is not a constant;
* a buffer that is written by anything but ASSEMBLE, or that shares its memory with another tensor;
* all that is written in a loop with branches, or with a number of trips that is not a constant, once the function ends in
  which it was written;
* an argument that several functions write, since one may repair what another spoiled.

What a kernel leaves unwritten in an argument itself, only a lane that executes can see.

Layout of ``program.json`` (found by experiment with PyPTO 0.2.0, compiled up to ``TENSOR_GRAPH``): a *function* has operations in
the order of execution, either calls of other functions or work on tensors. A loop is a function that calls one function for each
path through its body. A tensor that outlives a function has a *slot*; ``incasts`` and ``outcasts`` give the slots of the tensors
that a function is given and leaves. In one function all writes to a tensor come before all reads of it: PyPTO refuses the rest.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import Stage
from conformance.lanes.base import Outcome, UnwrittenRead
from conformance.lanes.pypto.runtime import Runtime

#: The parts of the graph, as PyPTO writes them.
Function = dict[str, Any]
Operation = dict[str, Any]

#: Operations each of whose elements depends on the elements of the inputs in the same place, broadcast.
_ELEMENTWISE = re.compile("(ADD|SUB|MUL|DIV|MAX|MIN)S?|MAXIMUM|MINIMUM|ABS|EXP|LN|SQRT|RECIPROCAL|CAST|EXPAND|REGISTER_COPY")
#: Operations that join all elements along one axis.
_REDUCTION = re.compile("ROW(SUM|MAX|MIN)_SINGLE")
#: Trips of a loop that are followed, until what it carries stays the same.
MOST_TRIPS = 4


def look_at_graph(outcome: Outcome, runtime: Runtime, jit: Any, stage: Stage, dims: Dims) -> None:
    """Compile a kernel up to its tensor graph and add what shows there to its outcome; the memory of arguments is never touched.

    A graph that cannot be read is no fault of the kernel's: the outcome then says that it was not looked at.
    """
    arguments = [torch.empty(argument.size(dims), dtype=argument.dtype) for argument in stage.arguments]
    with runtime.output_folder(sum(argument.nbytes for argument in arguments)) as folder:
        runtime.call(jit, arguments, stage="TENSOR_GRAPH")
        try:
            (path,) = folder.glob("output/output_*/program.json")
            outcome.unwritten_reads = find_unwritten_reads(path, [argument.name for argument in stage.arguments])
        except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
            outcome.message = (
                "reads of memory that nothing wrote were not looked for: the compiled graph is not as this version of PyPTO "
                f"is known to write it ({type(error).__name__}: {error})"
            )


def find_unwritten_reads(program: Path, arguments: Sequence[str]) -> tuple[UnwrittenRead, ...]:
    """What a ``program.json`` of a tensor graph shows; ``arguments`` are the names of the kernel's parameters, in order."""
    return _Program(json.loads(program.read_bytes()), arguments).reads()


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where garbage comes from: a buffer, and the first read of what nothing wrote in it."""

    buffer: str
    written: str
    read: str = ""
    count: int = 0
    total: int = 0
    location: str | None = None


@dataclasses.dataclass(frozen=True)
class _Garbage:
    """The elements of a tensor that hold garbage, or were computed from it."""

    mask: torch.Tensor
    source: _Source


#: What is known of each slot that was written so far: garbage, or ``None`` where it is clean or not known.
_State = dict[int, _Garbage | None]


class _Program:
    """A whole program, followed in the order of its calls."""

    def __init__(self, program: dict[str, Any], arguments: Sequence[str]) -> None:
        self._functions: dict[str, Function] = {function["hash"]: function for function in program["functions"]}
        (self._entry,) = (function for function in program["functions"] if function["func_magicname"] == "PROGRAM_ENTRY")
        # Two functions of one text cannot be told apart by a call, so nothing could be said of either.
        self._readable = len(self._functions) == len(program["functions"])
        self._graphs = {key: _Graph(function) for key, function in self._functions.items()}
        self._arguments = self._slots_of(arguments)
        self._writers: collections.Counter[int] = collections.Counter()
        self._raw: collections.Counter[int] = collections.Counter()
        self._carried: set[str] = set()
        for graph in self._graphs.values():
            self._raw.update({tensor["rawtensor"] for tensor in graph.tensors.values()})
            self._carried.update(graph.name(magic) for magic in (*graph.given, *graph.left))
            if not graph.calls:
                self._writers.update({slot for slots in graph.left.values() for slot in slots})
        self._found: list[UnwrittenRead] = []

    def reads(self) -> tuple[UnwrittenRead, ...]:
        """One for each buffer and argument that it reaches."""
        if self._readable:
            self._follow(self._entry, {})
        return tuple({(read.message, read.location): read for read in self._found}.values())

    def _slots_of(self, arguments: Sequence[str]) -> dict[int, str]:
        """The slots of the arguments: consecutive, and lower than that of any tensor that the kernel makes itself."""
        first = [
            slot - arguments.index(graph.name(magic))
            for graph in self._graphs.values()
            for magic, slots in (*graph.given.items(), *graph.left.items())
            for slot in slots
            if graph.name(magic) in arguments
        ]
        return {min(first) + position: name for position, name in enumerate(arguments)} if first else {}

    def _follow(self, function: Function, state: _State) -> None:
        graph = self._graphs[function["hash"]]
        if not graph.calls:
            self._perform(graph, state)
            return
        callees = [self._functions[call["calleehash"]] for call in graph.calls]
        trips = _trips(function)
        if trips is None:
            for callee in callees:
                self._follow(callee, state)
        elif len(callees) == 1 and trips > 0:
            self._repeat(callees[0], trips, state)
        else:
            # Some path, some number of times: any of what is written in it may have been written before.
            unknown = dict.fromkeys(self._written_in(function), None)
            for callee in callees:
                self._follow(callee, {**state, **unknown})
            state.update(unknown)

    def _repeat(self, body: Function, trips: int, state: _State) -> None:
        """Follow a loop until one more trip changes nothing; what holds in that trip holds in the last one too."""
        start = len(self._found)
        for _ in range(min(trips, MOST_TRIPS)):
            del self._found[start:]
            before = dict(state)
            self._follow(body, state)
            if _same(before, state):
                return
        if trips > MOST_TRIPS:
            del self._found[start:]
            state.update(dict.fromkeys(self._written_in(body), None))

    def _written_in(self, function: Function) -> set[int]:
        graph = self._graphs[function["hash"]]
        slots = {slot for slots in graph.left.values() for slot in slots}
        return slots.union(*(self._written_in(self._functions[call["calleehash"]]) for call in graph.calls))

    def _perform(self, graph: _Graph, state: _State) -> None:
        """Follow the garbage through one function."""
        garbage: dict[int, _Garbage] = {}

        def keep(magic: int, found: _Garbage | None) -> None:
            found = graph.within_valid(magic, found)
            if found is not None:
                garbage[magic] = found

        for magic, slots in graph.given.items():
            keep(magic, self._given(graph, magic, slots, state))
        for magic in graph.tensors.keys() - graph.given.keys() - graph.writers.keys():
            keep(magic, self._fresh(graph, magic))
        done: collections.Counter[int] = collections.Counter()
        for operation in graph.operations:
            for magic in operation["ooperands"]:
                done[magic] += 1
                writers = graph.writers[magic]
                if done[magic] < len(writers):
                    continue  # more is to come
                if all(writer["opcode"] == "ASSEMBLE" for writer in writers):
                    keep(magic, self._assembled(graph, magic, garbage, state))
                elif len(writers) == 1:
                    keep(magic, _result(graph, operation, magic, garbage))
        for magic, slots in graph.left.items():
            for slot in slots:
                name = self._arguments.get(slot)
                if name is None:
                    state[slot] = garbage.get(magic)
                elif magic in garbage and self._writers[slot] == 1:
                    self._found.append(_unwritten_read(garbage[magic].source, name))

    def _is_argument(self, slot: int) -> bool:
        return slot <= max(self._arguments, default=-1)

    def _given(self, graph: _Graph, magic: int, slots: Sequence[int], state: _State) -> _Garbage | None:
        known = [state.get(slot) for slot in slots]
        if len(known) != 1 or known[0] is None or list(known[0].mask.shape) != graph.shape(magic):
            return None
        return known[0]

    def _fresh(self, graph: _Graph, magic: int) -> _Garbage | None:
        """A buffer that nothing wrote yet, if it is certainly one: it has its memory, and its name, for itself."""
        raw = graph.tensors[magic]["rawtensor"]
        if graph.raw_uses[raw] > 1 or self._raw[raw] > 1 or graph.name(magic) in self._carried - {""}:
            return None
        return graph.garbage(magic, torch.ones(graph.shape(magic), dtype=torch.bool))

    def _assembled(self, graph: _Graph, magic: int, garbage: dict[int, _Garbage], state: _State) -> _Garbage | None:
        """What a tensor holds once all of its pieces are written."""
        slots = graph.left.get(magic, ())
        argument = any(self._is_argument(slot) for slot in slots)
        pieces = [
            (graph.box(writer, writer["ioperands"][0], magic), garbage.get(writer["ioperands"][0]))
            for writer in graph.writers[magic]
        ]
        spoiled = [piece for _, piece in pieces if piece is not None]
        if argument and not spoiled:
            return None
        if any(box is None for box, _ in pieces):
            return spoiled[0] if argument and len(spoiled) == len(pieces) else None
        before: _Garbage | None = None
        if magic not in graph.given and not argument:
            if not slots:
                before = self._fresh(graph, magic)
            elif len(slots) == 1:
                unwritten = graph.garbage(magic, torch.ones(graph.shape(magic), dtype=torch.bool))
                before = state.get(slots[0], unwritten)
        mask = torch.zeros(graph.shape(magic), dtype=torch.bool)
        if before is not None:
            mask |= before.mask
        # Where a clean piece and a spoiled one overlap the clean one counts: which is written last is not known.
        for box, piece in sorted(pieces, key=lambda entry: entry[1] is None):
            assert box is not None
            mask[box] = False if piece is None else piece.mask[tuple(slice(extent) for extent in mask[box].shape)]
        if not mask.any():
            return None
        if spoiled:
            return _Garbage(mask, spoiled[0].source)
        if before is not None and before.source.read:
            return _Garbage(mask, before.source)
        return graph.garbage(magic, mask)


class _Graph:
    """One function, by tensor."""

    def __init__(self, function: Function) -> None:
        self.operations: list[Operation] = function["operations"]
        self.calls = [operation for operation in self.operations if operation["opcode"] == "CALL"]
        self.tensors: dict[int, dict[str, Any]] = {tensor["magic"]: tensor for tensor in function["tensors"]}
        self.given: dict[int, list[int]] = dict(function["incasts"])
        self.left: dict[int, list[int]] = dict(function["outcasts"])
        self.writers: dict[int, list[Operation]] = collections.defaultdict(list)
        for operation in self.operations:
            for magic in operation["ooperands"]:
                self.writers[magic].append(operation)
        self.raw_uses = collections.Counter(tensor["rawtensor"] for tensor in self.tensors.values())
        self._symbols: dict[int, str] = {raw["rawmagic"]: raw.get("symbol") or "" for raw in function["rawtensors"]}

    def shape(self, magic: int) -> list[int]:
        return list(self.tensors[magic]["shape"])

    def name(self, magic: int) -> str:
        """What a tensor is called in the kernel's text; empty if PyPTO does not say."""
        return self._symbols.get(self.tensors[magic]["rawtensor"], "")

    def garbage(self, magic: int, mask: torch.Tensor) -> _Garbage:
        """A buffer in which nothing wrote what ``mask`` says."""
        name = self.name(magic) or "a buffer without a name"
        return _Garbage(mask, _Source(f"{name} {self.shape(magic)}", _extent(~mask)))

    def within_valid(self, magic: int, found: _Garbage | None) -> _Garbage | None:
        """Without what lies outside the extent of the tensor that is in use; of an unknown extent the first element is."""
        if found is None:
            return None
        valid = self.tensors[magic].get("dynvalidshape") or []
        if len(valid) == found.mask.dim():
            extents = [extent if extent is not None else 1 for extent in map(_constant, valid)]
            inside = tuple(slice(extent) for extent in extents)
            kept = torch.zeros_like(found.mask)
            kept[inside] = found.mask[inside]
            found = dataclasses.replace(found, mask=kept)
        return found if found.mask.any() else None

    def box(self, operation: Operation, part: int, whole: int) -> tuple[slice, ...] | None:
        """Where a VIEW or an ASSEMBLE reads or writes ``part`` of ``whole``; ``None`` if that is not a constant."""
        offset = _offset(operation.get("attr") or [])
        shape = self.shape(part)
        if offset is None or not len(offset) == len(shape) == len(self.shape(whole)):
            return None
        return tuple(slice(start, start + extent) for start, extent in zip(offset, shape, strict=True))


def _result(graph: _Graph, operation: Operation, magic: int, garbage: dict[int, _Garbage]) -> _Garbage | None:
    """What an operation other than ASSEMBLE makes of the garbage in its inputs; ``None`` where that is not certain."""
    spoiled = [(place, garbage[operand]) for place, operand in enumerate(operation["ioperands"]) if operand in garbage]
    if not spoiled or len(operation["ooperands"]) != 1:
        return None
    opcode, attributes, shape = operation["opcode"], operation.get("op_attr") or {}, graph.shape(magic)
    box = graph.box(operation, magic, operation["ioperands"][0]) if opcode == "VIEW" else None
    mask = torch.zeros(shape, dtype=torch.bool)
    for place, found in spoiled:
        reached: torch.Tensor | None = None
        if box is not None and list(found.mask[box].shape) == shape:
            reached = found.mask[box]
        elif _ELEMENTWISE.fullmatch(opcode):
            reached = found.mask
        elif opcode == "RESHAPE" and found.mask.numel() == mask.numel():
            reached = found.mask.reshape(shape)
        elif _REDUCTION.fullmatch(opcode) and attributes.get("op_attr_AXIS") in range(found.mask.dim()):
            reached = found.mask.any(attributes["op_attr_AXIS"], keepdim=True)
        elif opcode == "A_MUL_B" and place < 2 and found.mask.dim() == 2:
            # A row of the left matrix reaches a row of the product, a column of the right one a column of it.
            matrix = found.mask.T if attributes.get(("op_attr_trans_a", "op_attr_trans_b")[place]) else found.mask
            reached = matrix.any(1 - place, keepdim=True)
        if reached is not None and _broadcasts(reached.shape, shape):
            mask |= reached
    if not mask.any():
        return None
    return _Garbage(mask, _seen_by(operation, spoiled[0][1], box))


def _seen_by(operation: Operation, found: _Garbage, box: tuple[slice, ...] | None) -> _Source:
    """The source of garbage with what this operation, if it is the first one to read it, tells of the read."""
    source = found.source
    file, line = operation.get("file"), operation.get("line")
    # Operations that PyPTO adds have no line, and those of its own helpers one that is no help.
    location = f"{file}:{line}" if file and line and "/site-packages/pypto/" not in file else None
    if source.read:
        return dataclasses.replace(source, location=source.location or location)
    whole = tuple(slice(0, extent) for extent in found.mask.shape)
    if box == whole:
        return source  # the same tensor under another name
    part = found.mask[box or whole]
    return dataclasses.replace(source, read=_text(box or whole), count=int(part.sum()), total=part.numel(), location=location)


def _unwritten_read(source: _Source, argument: str) -> UnwrittenRead:
    read = f"read in {source.read}" if source.read else "read as a whole"
    rest = f"{source.count} of the {source.total} elements read hold" if source.read else "the rest holds"
    message = (
        f"{source.buffer} is written {source.written} and {read}: {rest} whatever the memory held before, "
        f"and {argument} depends on it"
    )
    return UnwrittenRead(argument, message, source.location, source.count, source.total)


def _same(one: _State, other: _State) -> bool:
    def alike(first: _Garbage | None, second: _Garbage | None) -> bool:
        if first is None or second is None:
            return first is second
        return torch.equal(first.mask, second.mask)

    return one.keys() == other.keys() and all(alike(found, other[slot]) for slot, found in one.items())


def _broadcasts(given: Sequence[int], shape: Sequence[int]) -> bool:
    return len(given) == len(shape) and all(one in (1, extent) for one, extent in zip(given, shape, strict=True))


def _trips(function: Function) -> int | None:
    """How often a loop goes round, 0 if that is not a constant; ``None`` for a function that is no loop."""
    bounds = function.get("dynamic")
    if bounds is None:
        return None
    begin, end, step = (_constant(bounds.get(name)) for name in ("begin", "end", "step"))
    if begin is None or end is None or not step:
        return 0
    return max(0, -(-(end - begin) // step))


def _constant(expression: Any) -> int | None:
    """The value of an expression of the graph: ``[0, value]`` is a constant, anything else is computed on the device."""
    if isinstance(expression, list) and len(expression) == 2 and expression[0] == 0 and isinstance(expression[1], int):
        return expression[1]
    return None


def _offset(attribute: Sequence[Any]) -> list[int] | None:
    """The constant offset in the attribute of a VIEW or an ASSEMBLE, ``[kind, n, n numbers, m, m expressions, ...]``.

    The expressions are what counts; an operation that the front end adds has the numbers only.
    """
    if len(attribute) < 3 or not isinstance(attribute[1], int):
        return None
    numbers = list(attribute[2 : 2 + attribute[1]])
    rest = list(attribute[2 + attribute[1] :])
    if not rest or rest[0] == 0:
        return numbers
    constants = [_constant(expression) for expression in rest[1 : 1 + rest[0]]]
    return [one for one in constants if one is not None] if None not in constants else None


def _extent(written: torch.Tensor) -> str:
    """Where something is written, in words."""
    if not written.any():
        return "nowhere"
    places = written.nonzero()
    box = tuple(slice(low, high + 1) for low, high in zip(places.amin(0).tolist(), places.amax(0).tolist(), strict=True))
    return f"in {_text(box)}" if bool(written[box].all()) else f"in {len(places)} elements of {_text(box)}"


def _text(box: Sequence[slice]) -> str:
    return f"[{', '.join(f'{part.start}:{part.stop}' for part in box)}]"
