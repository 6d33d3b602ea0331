"""Buffers that tell what a kernel did to them: poisoned outputs between guard regions.

Outputs are filled with a bit pattern that no computation yields, so that an element that was never written is known even
where the right answer is 0. Guards before and after keep the alignment that NPU copies want.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import Stage
from conformance.errors import UsageError

#: Guard regions are whole multiples of this, in bytes, so that a guarded output is as aligned as an unguarded one.
GUARD_ALIGNMENT = 512
#: A tile of 128 by 128 in fp32: what a kernel writes that goes one tile too far. It takes 0.03 ms an argument and case more than
#: 1 KiB does.
GUARD_BYTES = 128 * 128 * 4

#: Quiet NaNs with a payload that arithmetic does not produce, and integers that are no index.
_PATTERNS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.bfloat16: (torch.int16, 0x7FD5),
    torch.float16: (torch.int16, 0x7ED5),
    torch.float32: (torch.int32, 0x7FD5A5A5),
    torch.int32: (torch.int32, -0x5A5A5A5B),
    torch.int64: (torch.int64, -0x5A5A5A5B5A5A5A5B),
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers; raises ``UsageError`` for a dtype that no contract uses."""
    if tensor.dtype not in _PATTERNS:
        raise UsageError(f"no poison is defined for {tensor.dtype}")
    return tensor.view(_PATTERNS[tensor.dtype][0])


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor in place with its dtype's poison and return it."""
    bits(tensor).fill_(_PATTERNS[tensor.dtype][1])
    return tensor


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """A boolean tensor: which elements still hold the poison, bit for bit."""
    return bits(tensor) == _PATTERNS[tensor.dtype][1]


def _all_poison(tensor: torch.Tensor) -> bool:
    """Whether every element holds the poison, of a one-dimensional tensor; told fast, from as few large numbers as there are."""
    whole = tensor.numel() * tensor.element_size() // 8
    if tensor.data_ptr() % 8 or not whole:
        return bool(poisoned(tensor).all())
    per_word = 8 // tensor.element_size()
    word = poison(torch.empty(per_word, dtype=tensor.dtype, device=tensor.device)).view(torch.int64)
    words = tensor[: whole * per_word].view(torch.int64)
    return bool((words == word).all()) and bool(poisoned(tensor[whole * per_word :]).all())


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit (so that NaN equals itself and 0.0 differs from -0.0)."""
    return left.dtype == right.dtype and left.shape == right.shape and _equal_bits(left, right)


def _equal_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    # As few large numbers the memory is compared faster than as elements.
    if all(tensor.is_contiguous() and tensor.nbytes % 8 == 0 and tensor.data_ptr() % 8 == 0 for tensor in (left, right)):
        return torch.equal(left.flatten().view(torch.int64), right.flatten().view(torch.int64))
    return torch.equal(bits(left), bits(right))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch uses one thread, whatever the caller or a kernel set.

    Small operators lose time in a thread pool, and beside a busy worker process its threads spin: 22 s for 4 s of work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Memory(Protocol):
    """Memory that tensors are views of."""

    def view(self, offset: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        """So many elements from byte ``offset`` on, which is a multiple of ``GUARD_ALIGNMENT``; the memory reaches that far."""


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A contiguous tensor of one dtype with guard regions on both sides of it in the same storage."""

    storage: torch.Tensor
    tensor: torch.Tensor

    @classmethod
    def over(cls, storage: torch.Tensor, shape: tuple[int, ...]) -> Guarded:
        """The tensor of that shape in a one-dimensional storage of the size that ``guarded_bytes`` says."""
        before = GUARD_BYTES // storage.element_size()
        return cls(storage, storage[before : before + _count(shape)].view(shape))

    def poison_guards(self) -> None:
        """Fill what lies around the tensor with poison."""
        before, after = self._bounds
        poison(self.storage[:before])
        poison(self.storage[after:])

    @property
    def _bounds(self) -> tuple[int, int]:
        before = GUARD_BYTES // self.storage.element_size()
        return before, before + self.tensor.numel()

    def damage(self) -> str | None:
        """Where a guard was overwritten, as a sentence, or ``None``."""
        before, after = self._bounds
        if all(_all_poison(guard) for guard in (self.storage[:before], self.storage[after:])):
            return None
        left = torch.nonzero(~poisoned(self.storage[:before]))
        right = torch.nonzero(~poisoned(self.storage[after:]))
        parts = []
        if len(left):
            parts.append(f"{len(left)} elements before the start, the nearest {before - int(left[-1])} before it")
        if len(right):
            parts.append(f"{len(right)} elements past the end, the nearest {int(right[0]) + 1} past it")
        return " and ".join(parts)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def guarded_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """How much memory a tensor takes with its guards, in bytes: a multiple of ``GUARD_ALIGNMENT``."""
    size = _count(shape) * dtype.itemsize
    return 2 * GUARD_BYTES + size + -size % GUARD_ALIGNMENT


def case_bytes(stage: Stage, dims: Dims) -> int:
    """How much memory the arguments of a case take, in bytes."""
    return sum(guarded_bytes(argument.size(dims), argument.dtype) for argument in stage.arguments)


def places(stage: Stage, dims: Dims) -> dict[str, int]:
    """Where each argument of a case begins with its guards, in bytes."""
    sizes = [guarded_bytes(argument.size(dims), argument.dtype) for argument in stage.arguments]
    starts = itertools.accumulate(sizes, initial=0)
    return {argument.name: start for argument, start in zip(stage.arguments, starts, strict=False)}


def lay_out(memory: Memory, stage: Stage, dims: Dims) -> dict[str, Guarded]:
    """The arguments of a case in memory of ``case_bytes`` bytes, one after another, each between guards; nothing is written.

    The process that judges and the one that runs the kernel both find them so.
    """
    found: dict[str, Guarded] = {}
    for argument, offset in zip(stage.arguments, places(stage, dims).values(), strict=True):
        size = guarded_bytes(argument.size(dims), argument.dtype)
        storage = memory.view(offset, argument.dtype, size // argument.dtype.itemsize)
        guarded = Guarded.over(storage, argument.size(dims))
        if argument.access == "in" and guarded.tensor.numel():
            # A view by itself, which ends where the input does: torch refuses to read past it, which would show in no output.
            exact = memory.view(offset + GUARD_BYTES, argument.dtype, guarded.tensor.numel())
            guarded = Guarded(storage, exact.view(guarded.tensor.shape))
        found[argument.name] = guarded
    return found


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a kernel left in the arguments of a case: copies of what it may write, and where it wrote what it may not.

    ``changed_inputs`` has how many elements of an input differ, ``guard_damage`` where what lies around an argument does.
    """

    outputs: dict[str, torch.Tensor]
    changed_inputs: dict[str, int]
    guard_damage: dict[str, str]


@one_thread()
def fill(arguments: Mapping[str, Guarded], stage: Stage, inputs: Mapping[str, torch.Tensor], held: Collection[str] = ()) -> None:
    """Put a case's inputs where its arguments lie, and poison into everything else: outputs and guards.

    ``held`` names the arguments that lie there already, between guards that nobody has overwritten.
    """
    for argument in stage.arguments:
        if argument.name in held:
            continue
        guarded = arguments[argument.name]
        if argument.access == "out":
            poison(guarded.storage)
        else:
            guarded.poison_guards()
            guarded.tensor.copy_(inputs[argument.name])


@one_thread()
def contents(arguments: Mapping[str, Guarded], stage: Stage, inputs: Mapping[str, torch.Tensor]) -> Contents:
    """What a kernel left there. The judging process looks itself: a kernel could change what its own process says of it."""
    changed: dict[str, int] = {}
    for argument in stage.arguments:
        if argument.access == "in":
            before, now = inputs[argument.name], arguments[argument.name].tensor
            if not same_bits(before, now):
                changed[argument.name] = int((bits(before) != bits(now)).sum())
    return Contents(
        # Copies: the next case reuses the memory.
        {argument.name: arguments[argument.name].tensor.clone() for argument in stage.arguments if argument.access != "in"},
        changed,
        {name: where for name, guarded in arguments.items() if (where := guarded.damage()) is not None},
    )
