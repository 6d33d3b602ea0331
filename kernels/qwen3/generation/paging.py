"""The host's side of a paged KV cache: which sequence holds which pages, as a serving stack keeps it.

A pool knows page numbers and lengths, not contents. Sequences that begin alike may share pages (``fork``); a shared page is
copied before one of them writes to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from conformance.contract.dims import Dims
from conformance.errors import UsageError


class PageCopy(NamedTuple):
    """The contents of page ``source`` must be copied to page ``target``, in every layer of both caches."""

    source: int
    target: int


class OutOfPagesError(UsageError):
    """A pool has not as many free pages as are needed; it is as it was before. ``needed`` and ``free`` say how many."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"out of pages: {needed} needed, {free} free; finish a sequence first, or make a larger pool")
        self.needed = needed
        self.free = free


@dataclasses.dataclass
class _Sequence:
    """What one sequence holds: its tokens so far, and its pages in order."""

    length: int
    pages: list[int]


class PagePool:
    """Hands out the ``pages`` physical pages of a cache, ``page_size`` tokens each, and takes them back.

    ``pages`` and ``page_size`` are ``NB`` and ``BS`` of the contract. The last page is never handed out: the contract wants one
    that nobody owns, and the ``-1`` past the end of a row of the block table would index it. Sequences are named by numbers
    that are never used again. Whatever raises leaves the pool as it was. Raises ``UsageError`` unless there are two pages.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        if _positive("pages", pages) < 2:
            raise UsageError(f"a pool needs at least 2 pages, since the last is never handed out, found {pages}")
        self.pages = pages
        self.page_size = _positive("page_size", page_size)
        # Taken from the end, so the highest come first: a block table is not the identity by accident.
        self._free = list(range(pages - 1))
        self._reference_counts = [0] * pages
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0

    @property
    def free_pages(self) -> int:
        """How many pages can still be handed out."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """How many pages ``tokens`` tokens fill, the last perhaps in part."""
        return -(-_positive("tokens", tokens) // self.page_size)

    def can_admit(self, tokens: int) -> bool:
        """Whether ``admit(tokens)`` would succeed."""
        return self.pages_for(tokens) <= len(self._free)

    def admit(self, tokens: int) -> int:
        """A new sequence with room for ``tokens`` tokens; its length is ``tokens``. Raises ``OutOfPagesError``."""
        return self._add(_Sequence(tokens, self._allocate(self.pages_for(tokens))))

    def append(self, sequence: int, tokens: int = 1) -> list[PageCopy]:
        """Lengthen a sequence by ``tokens`` tokens; raises ``OutOfPagesError``.

        If its last page is shared and only partly filled, the sequence gets another in its place: the caller makes the copies
        that are returned (``copy_pages``), in the order of the calls, before it writes any row.
        """
        entry = self._entry(sequence)
        length = entry.length + _positive("tokens", tokens)
        more = self.pages_for(length) - len(entry.pages)
        partly = entry.length % self.page_size != 0
        copied = partly and self._is_shared(entry.pages[-1])
        taken = self._allocate(more + copied)
        copies = []
        if copied:
            copies.append(PageCopy(entry.pages[-1], taken.pop(0)))
            entry.pages[-1] = copies[0].target
            self._release(copies[0].source)
        entry.pages += taken
        entry.length = length
        return copies

    def fork(self, sequence: int, tokens: int | None = None) -> int:
        """A second sequence with the same first ``tokens`` tokens (all of them if ``None``), on the same pages.

        Neither writes to a page while both hold it, so the rows of those tokens must have been written before. Raises
        ``UsageError`` if the sequence is shorter than ``tokens``.
        """
        entry = self._entry(sequence)
        length = entry.length if tokens is None else _positive("tokens", tokens)
        if length > entry.length:
            raise UsageError(f"sequence {sequence} has {entry.length} tokens: cannot fork its first {length}")
        shared = entry.pages[: self.pages_for(length)]
        for page in shared:
            self._reference_counts[page] += 1
        return self._add(_Sequence(length, shared))

    def finish(self, sequence: int) -> None:
        """Forget a sequence and free the pages that no other holds. Their contents stay until someone writes to them."""
        for page in self._entry(sequence).pages:
            self._release(page)
        del self._sequences[sequence]

    def length(self, sequence: int) -> int:
        """How many tokens a sequence has room for: its ``seq_lens`` entry."""
        return self._entry(sequence).length

    def pages_of(self, sequence: int) -> list[int]:
        """The pages of a sequence, in order."""
        return list(self._entry(sequence).pages)

    def slots(self, sequence: int, first: int, last: int) -> list[int]:
        """The cache slots of the positions ``first`` up to ``last``, ``last`` itself left out: entries of ``slot_mapping``.

        Raises ``UsageError`` unless ``0 <= first <= last <= length``.
        """
        entry = self._entry(sequence)
        if not 0 <= first <= last <= entry.length:
            raise UsageError(f"sequence {sequence} has the positions 0 up to {entry.length}, asked for {first} up to {last}")
        size = self.page_size
        return [entry.pages[position // size] * size + position % size for position in range(first, last)]

    def block_table(self, sequences: Sequence[int], MB: int) -> torch.Tensor:
        """The pages of each sequence in order, ``-1`` past its last: ``[len(sequences) * MB]`` int32.

        Raises ``UsageError`` if one has more than ``MB`` pages.
        """
        table = torch.full((len(sequences), MB), -1, dtype=torch.int32)
        for row, sequence in enumerate(sequences):
            pages = self._entry(sequence).pages
            if len(pages) > MB:
                raise UsageError(f"sequence {sequence} has {len(pages)} pages, more than the {MB} of a block table's row")
            table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return table.view(-1)

    def _entry(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            what = "is finished" if isinstance(sequence, int) and 0 <= sequence < self._next else "was never admitted"
            known = ", ".join(map(str, self._sequences)) or "none"
            raise UsageError(f"sequence {sequence} {what}; live sequences: {known}")
        return self._sequences[sequence]

    def _add(self, entry: _Sequence) -> int:
        sequence = self._next
        self._next += 1
        self._sequences[sequence] = entry
        return sequence

    def _allocate(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfPagesError(count, len(self._free))
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._reference_counts[page] = 1
        return taken

    def _release(self, page: int) -> None:
        self._reference_counts[page] -= 1
        if self._reference_counts[page] == 0:
            self._free.append(page)

    def _is_shared(self, page: int) -> bool:
        return self._reference_counts[page] > 1


def copy_pages(cache: torch.Tensor, copies: Iterable[PageCopy], dims: Dims) -> None:
    """Copy whole pages within a paged cache ``[L*NB*NKV*BS, D]``, all layers and heads, one copy after the other, in place.

    Raises ``UsageError`` for a cache of another shape and for a page that it has not.
    """
    expected = (dims.L * dims.NB * dims.NKV * dims.BS, dims.D)
    if tuple(cache.shape) != expected:
        raise UsageError(f"a paged cache of these dimensions is {list(expected)}, found {list(cache.shape)}")
    by_page = cache.view(dims.L, dims.NB, dims.NKV * dims.BS, dims.D)
    for source, target in copies:
        if not (0 <= source < dims.NB and 0 <= target < dims.NB):
            raise UsageError(f"cannot copy page {source} to page {target}: the cache has the pages 0 to {dims.NB - 1}")
        by_page[:, target] = by_page[:, source]


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be a positive whole number, found {value!r}")
    return value
