"""What a kernel's process and its owner tell each other, each a structure of a fixed form.

Tensors lie in the arena, where both sides find them by the stage and the dimensions (``conformance.lanes.buffers``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from conformance.contract.dims import Dims
from conformance.errors import UsageError
from conformance.lanes.base import Compiled, Outcome, PassDifference, Status, UnwrittenRead
from conformance.lanes.buffers import Guarded
from conformance.lanes.cards import Card
from conformance.outside import one_line, plain

#: Which compiler passes are compared with the tensor graph: the last one, every one, or none.
Passes = Literal["last", "all", "none"]
#: Dimensions by name, constants included; which class they are of follows from the stage.
Sizes = dict[str, int | float]
#: How many pass differences and unwritten reads of one run are told, from the first.
MOST_TOLD = 200
#: The longest text of a message, in characters.
MOST_TEXT = 8000


class Message(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """What all messages have in common: one that has other fields, or of other types, is none."""


# To the worker


class Opening(Message):
    """The first message to a worker. ``folder`` takes logs; ``scratch`` what PyPTO writes, deleted after every run."""

    search_path: tuple[str, ...]
    folder: str
    scratch: str


class OpenLane(Message):
    """Find a kernel, an attribute of a module (a file's path or a dotted name), and get ready to run it in a lane.

    ``digest``: the SHA-256 that the file had when the kernel was listed, or empty. ``card``: the one to run on, if any.
    """

    module: str
    attribute: str
    stage: str
    digest: str
    lane: str
    calculator: str | None
    device_executor: str
    card: Card | None = None


class Compile(Message):
    """Compile the kernel for runs with these sizes that follow, where that is a step of its own."""

    sizes: Sizes


class Run(Message):
    """Run the kernel on the case that lies in the arena, or only compile it.

    ``unchanged``: arguments that the kernel only reads and that hold what they held in the run before, of the same sizes: what
    lies on a card need not be placed there again.
    """

    sizes: Sizes
    passes: Passes
    unchanged: tuple[str, ...] = ()


class Probe(Message):
    """Is a card well? A worker that answers runs nothing else."""

    lane: str
    device_executor: str
    card: Card | None = None


class ListKernels(Message):
    """Which kernels does a module define? It is a file's path or a dotted name."""

    module: str


class FindKernel(Message):
    """The kernel of that name in a module, or a plain function that is to be one of ``stage``."""

    module: str
    name: str
    stage: str | None


class AskAccepts(Message):
    """Which of these dimensions does a kernel not take, and why?"""

    module: str
    attribute: str
    stage: str
    sizes: tuple[Sizes, ...]


# From the worker


class Ready(Message):
    """The worker has imported what it needs and found the kernel."""


class Result(Message):
    """A run's outcome but for its outputs, which lie in the arena. ``healthy``: the worker can run another case."""

    status: Status
    message: str
    location: str | None
    pass_differences: tuple[PassDifference, ...]
    passes_compared: int
    unwritten_reads: tuple[UnwrittenRead, ...]
    executed: bool
    seconds: float
    peak_memory: int | None
    healthy: bool
    compiled: Compiled = ""
    compiles: int = 0
    device_seconds: float | None = None
    device_error: int | None = None


class Refused(Message):
    """Not the kernel's result but its declaration is wrong, or the worker cannot do what was asked: one line for a person."""

    message: str
    #: Whether something is missing on the machine (the outcome is ``unavailable``) rather than wrong with the kernel.
    unavailable: bool = False


class Declared(Message):
    """Where a kernel is found, whether it chooses its dimensions, and the fields of its ``Declaration`` by their names."""

    module: str
    attribute: str
    chooses: bool
    stage_name: str
    name: str
    toolchain: str
    capabilities: tuple[str, ...]
    profile: str | None
    rounds: tuple[str, ...]
    precision: str
    ties: str
    capacity: int
    reorders_sums: bool
    source: str
    summary: str
    digest: str


class Listed(Message):
    """The kernels that were asked for."""

    kernels: tuple[Declared, ...]


class Reasons(Message):
    """Why a kernel refuses each of the dimensions, or ``None`` where it takes them."""

    reasons: tuple[str | None, ...]


Request = Opening | OpenLane | Compile | Run | Probe | ListKernels | FindKernel | AskAccepts
Answer = Ready | Result | Refused | Listed | Reasons
Kind = TypeVar("Kind")

#: Runs one request with the arguments of a case by name, each between its guards; they are empty where nothing is executed.
RunRequest = Callable[[Dims, Passes, dict[str, Guarded]], Outcome]


class CompilingRun(Protocol):
    """What runs a request in a lane where compiling is a step of its own."""

    def compile(self, dims: Dims) -> Outcome:
        """Compile for runs that follow."""

    def __call__(self, dims: Dims, passes: Passes, arguments: dict[str, Guarded], unchanged: tuple[str, ...] = ()) -> Outcome:
        """Run; ``unchanged`` arguments are those of the run before."""


_REQUESTS = msgspec.msgpack.Decoder(Request)  # type: ignore[var-annotated]
_ANSWERS = msgspec.msgpack.Decoder(Answer)  # type: ignore[var-annotated]


def encode(message: Message) -> bytes:
    """A message as bytes; raises ``UsageError`` for a path or name that is not Unicode, as file names may be."""
    try:
        return msgspec.msgpack.encode(message)
    except UnicodeEncodeError as error:
        raise UsageError(f"paths and names of kernels have to be UTF-8, found {one_line(error.object, 200)}") from error


def decode_request(content: bytes) -> Any:
    """The inverse for what goes to a worker; raises ``msgspec.ValidationError``."""
    return _REQUESTS.decode(content)


def decode_answer(content: bytes) -> Any:
    """The inverse for what comes from a worker; raises ``msgspec.DecodeError`` for anything else than an answer."""
    try:
        return _ANSWERS.decode(content)
    except (RecursionError, UnicodeDecodeError) as error:
        raise msgspec.DecodeError(str(error)) from error


def result_of(outcome: Outcome, *, seconds: float, peak_memory: int | None, healthy: bool) -> Result:
    """What a worker tells of a run: bounded texts, which any file can hold."""
    differences = outcome.pass_differences[:MOST_TOLD]
    reads = outcome.unwritten_reads[:MOST_TOLD]
    return Result(
        outcome.status,
        plain(outcome.message, MOST_TEXT),
        None if outcome.location is None else one_line(outcome.location, MOST_TEXT),
        tuple(dataclasses.replace(one, **_plain_texts(one)) for one in differences),
        outcome.passes_compared,
        tuple(dataclasses.replace(one, **_plain_texts(one)) for one in reads),
        outcome.executed,
        seconds,
        peak_memory,
        healthy,
        outcome.compiled,
        outcome.compiles,
        outcome.device_seconds,
        outcome.device_error,
    )


def outcome_of(result: Result, elapsed: float) -> Outcome:
    """The outcome that a result tells of, without outputs.

    Texts are made plain again: who knows who wrote them. ``elapsed`` are the seconds that its owner waited: a kernel may have set
    the clocks of its process.
    """
    return Outcome(
        result.status,
        message=plain(result.message, MOST_TEXT),
        location=None if result.location is None else one_line(result.location, MOST_TEXT),
        pass_differences=tuple(dataclasses.replace(one, **_plain_texts(one)) for one in result.pass_differences),
        passes_compared=result.passes_compared,
        unwritten_reads=tuple(dataclasses.replace(one, **_plain_texts(one)) for one in result.unwritten_reads),
        executed=result.executed,
        compiled=result.compiled,
        seconds=result.seconds if 0 <= result.seconds <= elapsed else elapsed,
        peak_memory=result.peak_memory,
        compiles=max(0, result.compiles),
        device_seconds=result.device_seconds,
        device_error=result.device_error,
    )


def _plain_texts(one: PassDifference | UnwrittenRead) -> dict[str, Any]:
    return {name: one_line(value, MOST_TEXT) for name, value in vars(one).items() if isinstance(value, str)}
