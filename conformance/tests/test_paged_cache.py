"""The bookkeeping of a paged cache together with kernels that read it: a state machine beside every sequence's plain history.

After each step every live sequence is attended to over its pages, and judged by the attention over its contiguous history.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from conformance.cases.case import Case
from conformance.cases.key import CaseKey
from conformance.cases.source import Source
from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel, kernel
from conformance.contract.registry import preset_named, stage_named
from conformance.errors import UsageError
from conformance.judge.judgement import judge
from conformance.judge.oracle import Oracle
from conformance.kernels.qwen3.generation.paging import OutOfPagesError, PageCopy, PagePool, copy_pages
from conformance.kernels.qwen3.inputs import GARBAGE_KEY, GARBAGE_VALUE
from conformance.kernels.qwen3.layout import Layout, contiguous, paged_rows
from conformance.kernels.qwen3.paged_attention import paged_attention
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import same_bits
from conformance.lanes.eager import run_eager
from conformance.lanes.process import KernelProcess

Tensor = torch.Tensor
Run = Callable[[Case], Outcome]

BF16 = torch.bfloat16
STEPS = 20
#: Small pages and few of them: a prompt has several, and a handful of sequences exhausts the pool.
DIMS = preset_named("tiny").replace(NH=4, NKV=2, D=16, BS=4, S=24, NB=14, L=1, B=5)


# Kernels: plain torch, right and wrong


class PagedAttention:
    """Attention over the pages that the block table names, in fp32; what its faulty kin do otherwise are its methods."""

    def pages(self, table: Tensor, b: int, count: int, dims: Dims) -> list[int]:
        return [int(page) for page in table[b, :count]]

    def rows(self, length: int) -> int:
        return length

    def contents(self, which: str, cache: Tensor, page: int, *, full: bool) -> Tensor:
        """The rows of one page, ``[NKV, BS, D]``."""
        return cache[page]

    def __call__(
        self, q: Tensor, seq_lens: Tensor, block_table: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, *, dims: Dims
    ) -> None:
        table = block_table.view(dims.B, dims.MB)
        for b, length in enumerate(seq_lens.tolist()):
            pages = self.pages(table, b, -(-length // dims.BS), dims)
            history = []
            for which, cache in (("k", k_cache), ("v", v_cache)):
                by_page = cache.view(dims.NB, dims.NKV, dims.BS, dims.D)
                parts = [self.contents(which, by_page, page, full=(j + 1) * dims.BS <= length) for j, page in enumerate(pages)]
                history.append(torch.cat(parts, 1)[:, : self.rows(length)].float())
            grouped = q[b].float().view(dims.NKV, dims.G, dims.D)
            probabilities = torch.softmax(grouped @ history[0].transpose(1, 2) * dims.D**-0.5, -1)
            out[b] = (probabilities @ history[1]).view(-1).to(BF16)


class IgnoresTheBlockTable(PagedAttention):
    def pages(self, table: Tensor, b: int, count: int, dims: Dims) -> list[int]:
        return [(b * dims.MB + j) % dims.NB for j in range(count)]


class ReadsARowTooMany(PagedAttention):
    def rows(self, length: int) -> int:
        return length + 1  # at a page's end, where there is no further row, it is right


class KeepsFullPages(PagedAttention):
    """Holds on to what it read of a full page, which its sequence cannot change any more; but pages get other owners."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int], Tensor] = {}

    def contents(self, which: str, cache: Tensor, page: int, *, full: bool) -> Tensor:
        return self.kept.setdefault((which, page), cache[page].clone()) if full else cache[page]


# Pools with faults


class HandsOutASharedPage(PagePool):
    """After a copy it takes the page that was copied from to be free. Its count hides that: it goes by what is owned."""

    @property
    def free_pages(self) -> int:
        return self.pages - 1 - len({page for sequence in self._sequences for page in self.pages_of(sequence)})

    def append(self, sequence: int, tokens: int = 1) -> list[PageCopy]:
        copies = super().append(sequence, tokens)
        self._free += [copy.source for copy in copies]
        return copies


class ForgetsToCopy(PagePool):
    def _is_shared(self, page: int) -> bool:
        return False


class FreesSharedPages(PagePool):
    def finish(self, sequence: int) -> None:
        for page in self.pages_of(sequence):
            self._reference_counts[page] = 1
        super().finish(sequence)


class LosesPages(PagePool):
    """A page that was shared once is never free again."""

    def fork(self, sequence: int, tokens: int | None = None) -> int:
        forked = super().fork(sequence, tokens)
        self._reference_counts[self.pages_of(forked)[0]] += 1
        return forked


# The machine


@functools.cache
def rows_of(name: str) -> Tensor:
    """K or V rows of every token that a run can write: ``[tokens, NKV, D]``; no two tokens have the same."""
    return Source("paged_cache").normal(name, (STEPS * DIMS.S, DIMS.NKV, DIMS.D)).to(BF16)


@functools.cache
def untouched(name: str, garbage: float) -> Tensor:
    """A cache that nobody has written to: finite garbage, and NaN in the page that is never handed out."""
    shape = (DIMS.NB, DIMS.NKV, DIMS.BS, DIMS.D)
    cache = (Source("paged_cache").normal(f"{name}.untouched", shape) * garbage).to(BF16)
    cache[-1] = float("nan")
    return cache.view(-1, DIMS.D)


class PagedCache(RuleBasedStateMachine):
    """A pool and real caches, and beside them the tokens of every live sequence in order.

    Freed pages keep their rows, as on a device, until their next owner writes to them. Each token has K and V rows of its own,
    so equal rows mean the same token, and two sequences have tokens in common only through a fork.
    """

    pool_type: ClassVar[type[PagePool]] = PagePool
    kernel_type: ClassVar[Callable[[], Any]] = PagedAttention
    #: What is looked at after a step: page numbers and cache rows, the kernel's results, or both.
    looks_at: ClassVar[tuple[str, ...]] = ("pages", "attention")
    #: What came up in the runs of a class.
    seen: ClassVar[Counter[str]] = Counter()

    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.pool_type(DIMS.NB, DIMS.BS)
        self.kernel, self.run = self.new_kernel()
        self.caches = {
            "k_cache": untouched("k_cache", GARBAGE_KEY).clone(),
            "v_cache": untouched("v_cache", GARBAGE_VALUE).clone(),
        }
        self.history: dict[int, list[int]] = {}
        self.written = 0
        #: The pages that the last write went to.
        self.written_pages: set[int] = set()
        self.freed: set[int] = set()
        self.steps = 0

    def new_kernel(self) -> tuple[Kernel, Run]:
        """The kernel and what runs it; anew for every run of the machine, since a kernel may remember."""
        function = type(self).kernel_type()
        made = kernel("paged_attention", name=type(function).__name__, profile="contract")(function)
        return made, functools.partial(run_eager, made)

    @precondition(lambda self: len(self.history) < DIMS.B)
    @rule(target=live, tokens=st.integers(1, DIMS.S))
    def admit(self, tokens: int) -> Any:
        expected = self.pool.can_admit(tokens)
        try:
            sequence = self.pool.admit(tokens)
        except OutOfPagesError:
            assert not expected
            self.seen["refused a prompt"] += 1
            return multiple()
        assert expected
        self.history[sequence] = []
        self.seen["reused a page"] += not self.freed.isdisjoint(self.pool.pages_of(sequence))
        self._write(sequence, tokens)
        return sequence

    @rule(sequence=live, tokens=st.just(1) | st.integers(2, 2 * DIMS.BS))
    def append(self, sequence: int, tokens: int) -> None:
        before = len(self.history[sequence])
        tokens = min(tokens, DIMS.S - before)
        if tokens == 0:
            return
        pages, free = self.pool.pages_of(sequence), self.pool.free_pages
        copied = before % DIMS.BS != 0 and len(self._holders(pages[-1])) > 1
        needed = self.pool.pages_for(before + tokens) - len(pages) + copied
        try:
            copies = self.pool.append(sequence, tokens)
        except OutOfPagesError as refusal:
            asked = refusal.needed
            if "pages" in self.looks_at:
                assert asked == needed > free, f"{needed} pages are needed, {free} free; refused for want of {asked}"
            self.seen["refused a token"] += 1
            return
        self.seen["copied a page"] += len(copies)
        for cache in self.caches.values():
            copy_pages(cache, copies, DIMS)
        self._write(sequence, tokens)

    @precondition(lambda self: len(self.history) < DIMS.B)
    @rule(target=live, sequence=live, tokens=st.none() | st.integers(1, DIMS.S), more=st.integers(0, 2))
    def fork(self, sequence: int, tokens: int | None, more: int) -> int:
        """Fork a sequence or its first tokens, and often let the fork grow at once: while both live, that takes a copy."""
        history = self.history[sequence]
        if tokens is not None:
            tokens = min(tokens, len(history))
        forked = self.pool.fork(sequence, tokens)
        self.history[forked] = history[:tokens]
        if more:
            self.append(forked, more)
        return forked

    @rule(sequence=consumes(live))
    def finish(self, sequence: int) -> None:
        pages = self.pool.pages_of(sequence)
        self.pool.finish(sequence)
        del self.history[sequence]
        kept = [page for page in pages if self._holders(page)]
        self.seen["kept a shared page"] += len(kept)
        self.freed |= set(pages) - set(kept)

    @invariant()
    def is_consistent(self) -> None:
        if "pages" in self.looks_at:
            self._no_page_is_owned_twice()
            self._pages_hold_the_history()
        if "attention" in self.looks_at:
            self._attention_is_that_of_the_history()

    def _holders(self, page: int) -> list[int]:
        return [sequence for sequence in self.history if page in self.pool.pages_of(sequence)]

    def _write(self, sequence: int, tokens: int) -> None:
        """New tokens at the end of a sequence: their rows into the caches, their numbers into the history."""
        start = len(self.history[sequence])
        numbers = list(range(self.written, self.written + tokens))
        self.written += tokens
        slots = self.pool.slots(sequence, start, start + tokens)
        self.written_pages = {slot // DIMS.BS for slot in slots}
        rows = paged_rows(torch.tensor(slots), DIMS)
        for name, cache in self.caches.items():
            cache[rows] = rows_of(name)[numbers].view(-1, DIMS.D)
        self.history[sequence] += numbers

    def _no_page_is_owned_twice(self) -> None:
        pages = {sequence: self.pool.pages_of(sequence) for sequence in self.history}
        for sequence, own in pages.items():
            length = len(self.history[sequence])
            assert self.pool.length(sequence) == length
            assert len(own) == self.pool.pages_for(length), f"{len(own)} pages hold the {length} tokens of sequence {sequence}"
            assert len(set(own)) == len(own), f"sequence {sequence} has a page twice: {own}"
            assert all(0 <= page < DIMS.NB - 1 for page in own), f"sequence {sequence} has a page that is not to be had: {own}"
            for other, history in self.history.items():
                common = len(set(self.history[sequence]) & set(history))
                for page in set(own) & set(pages[other]):
                    place = own.index(page)
                    rows_end = min(length, len(history), (place + 1) * DIMS.BS)
                    # Only through a fork: at the same place, and all rows that both have in the page are of tokens in common.
                    shared = place == pages[other].index(page) and rows_end <= common
                    assert shared, f"page {page} is owned by sequences {sequence} and {other}"
                    self.seen["shared a page"] += sequence < other
        for page in self.written_pages:
            holders = self._holders(page)
            assert len(holders) == 1, f"page {page} was written to and is held by sequences {holders}"
        self.written_pages = set()
        owned = {page for own in pages.values() for page in own}
        free, rest = self.pool.free_pages, DIMS.NB - 1 - len(owned)
        assert free == rest, f"{len(owned)} pages are owned, so {rest} are free; the pool says {free}"

    def _live_case(self) -> Case:
        """The state as a case of ``paged_attention``, with a query for every live sequence."""
        sequences = list(self.history)
        dims = DIMS.replace(B=len(sequences))
        inputs = {
            "q": Source("paged_cache").normal(f"q/{self.steps}", (dims.B, dims.NH * dims.D)).to(BF16),
            "seq_lens": torch.tensor([self.pool.length(sequence) for sequence in sequences], dtype=torch.int32),
            "block_table": self.pool.block_table(sequences, dims.MB),
            **self.caches,
        }
        key = CaseKey("paged_attention", "tiny", "normal", self.steps)
        return Case(key, stage_named(key.stage), dims, inputs)

    def _pages_hold_the_history(self) -> None:
        if not self.history:
            return
        case = self._live_case()
        layout = Layout.of(case.inputs, case.dims)
        for b, (sequence, numbers) in enumerate(self.history.items()):
            for name in self.caches:
                found, expected = layout.histories(case.inputs[name])[b], rows_of(name)[numbers].transpose(0, 1)
                assert same_bits(found, expected), f"the pages of sequence {sequence} do not hold its history in {name}"

    def _attention_is_that_of_the_history(self) -> None:
        if not self.history:
            return
        case = self._live_case()
        self.steps += 1
        self.seen[f"{case.dims.B} sequences"] += 1
        # The oracle never sees a page: it is the contiguous stage, on the tokens that the model remembers.
        plain = {"q": case.inputs["q"], "seq_lens": torch.tensor([len(numbers) for numbers in self.history.values()])}
        for name in self.caches:
            plain[name] = torch.full((case.dims.B * DIMS.NKV * DIMS.S, DIMS.D), float("nan"), dtype=BF16)
            for b, numbers in enumerate(self.history.values()):
                contiguous(plain[name], case.dims)[0, b, :, : len(numbers)] = rows_of(name)[numbers].transpose(0, 1)
        oracle = Oracle(Case(case.key, stage_named("attention"), case.dims, plain))
        verdict = judge(case, self.run(case), profile=self.kernel.profile, oracle=oracle)
        assert verdict.ok, "attention over the pages is not that over the history: " + "; ".join(
            f"{finding.detector}: {finding.message}" for finding in verdict.findings
        )


def explore(machine: type[PagedCache], examples: int, steps: int = STEPS) -> None:
    """Drive a machine, the same way every time; what it finds is not made smaller, which takes longer than finding it."""
    machine.seen = Counter()
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


def variant(**attributes: Any) -> type[PagedCache]:
    """The machine with another pool, kernel or view."""
    return type("VariantOfPagedCache", (PagedCache,), attributes)


def test_attention_over_pages_is_attention_over_the_history_after_every_step() -> None:
    machine = variant()
    explore(machine, examples=30)
    events = ("refused a prompt", "refused a token", "reused a page", "copied a page", "shared a page", "kept a shared page")
    for event in (*events, "1 sequences", f"{DIMS.B} sequences"):
        assert machine.seen[event] >= 5, f"{event}: {machine.seen[event]} times in the whole run"


@pytest.fixture(scope="module")
def bundled() -> Iterator[KernelProcess]:
    """The kernel that comes with the project, through the interpreter, in one process for all runs."""
    with KernelProcess(paged_attention, "interpret") as process:
        yield process


def test_the_bundled_kernel_serves_sequences_that_come_grow_fork_and_go(bundled: KernelProcess) -> None:
    run = functools.partial(bundled.run, passes="none")
    machine = variant(new_kernel=lambda self: (paged_attention, run))
    explore(machine, examples=6, steps=15)
    assert bundled.starts == 1
    for event in ("reused a page", "copied a page", "shared a page", "1 sequences", "3 sequences"):
        assert machine.seen[event], f"{event}: not once in the whole run"


# The machine finds what is wrong


#: Which of the ways to have one page in two places comes up first is up to the search.
TWO_PLACES = r"page \d+ (is owned|was written to and is held) by sequences|sequence \d+ has a page twice"
FAULTY_POOLS = {
    HandsOutASharedPage: TWO_PLACES,
    ForgetsToCopy: TWO_PLACES,
    FreesSharedPages: r"\d+ pages are owned, so \d+ are free; the pool says \d+",
    LosesPages: r"\d+ pages are owned, so \d+ are free; the pool says \d+",
}


@pytest.mark.parametrize("pool_type", FAULTY_POOLS)
def test_a_faulty_pool_is_found_by_its_bookkeeping(pool_type: type[PagePool]) -> None:
    with pytest.raises(AssertionError, match=FAULTY_POOLS[pool_type]):
        explore(variant(pool_type=pool_type, looks_at=("pages",)), examples=100, steps=10)


@pytest.mark.parametrize("pool_type", [HandsOutASharedPage, ForgetsToCopy, FreesSharedPages])
def test_a_page_with_two_owners_is_found_by_the_attention_alone(pool_type: type[PagePool]) -> None:
    with pytest.raises(AssertionError, match="attention over the pages is not that over the history"):
        explore(variant(pool_type=pool_type, looks_at=("attention",)), examples=100, steps=10)


@pytest.mark.parametrize("kernel_type", [IgnoresTheBlockTable, ReadsARowTooMany, KeepsFullPages])
def test_a_faulty_kernel_is_found(kernel_type: type[PagedAttention]) -> None:
    with pytest.raises(AssertionError, match=r"attention over the pages is not that over the history: (element|not_finite): "):
        explore(variant(kernel_type=kernel_type), examples=100, steps=10)


# The pool by itself


def test_pages_come_from_the_pool_and_go_back_to_it() -> None:
    pool = PagePool(6, 4)
    assert pool.free_pages == 5, "the last page is never handed out"
    one, other = pool.admit(5), pool.admit(4)
    assert (pool.length(one), pool.length(other), pool.free_pages) == (5, 4, 2)
    assert len({*pool.pages_of(one), *pool.pages_of(other)} - {5}) == 3
    assert pool.can_admit(8)
    assert not pool.can_admit(9)
    pool.finish(one)
    assert pool.can_admit(16)
    third = pool.admit(16)
    assert third not in (one, other)
    assert pool.free_pages == 0
    pool.finish(third)
    pool.finish(other)
    assert pool.free_pages == 5


def test_a_sequence_grows_page_by_page() -> None:
    pool = PagePool(6, 4)
    sequence = pool.admit(3)
    (first,) = pool.pages_of(sequence)
    assert pool.append(sequence) == []
    assert pool.pages_of(sequence) == [first]
    assert pool.append(sequence, 5) == []
    assert (pool.length(sequence), len(pool.pages_of(sequence)), pool.free_pages) == (9, 3, 2)
    assert pool.pages_of(sequence)[0] == first


def test_a_shared_page_is_copied_when_the_first_of_its_holders_fills_it() -> None:
    pool = PagePool(8, 4)
    original = pool.admit(6)
    fork = pool.fork(original)
    whole, partly = pool.pages_of(original)
    assert (pool.pages_of(fork), pool.length(fork), pool.free_pages) == ([whole, partly], 6, 5)
    (copy,) = pool.append(fork)
    assert (copy.source, pool.pages_of(fork)) == (partly, [whole, copy.target])
    assert copy.target not in (whole, partly)
    assert pool.append(original) == [], "the page is its own again"
    assert pool.pages_of(original) == [whole, partly]
    pool.finish(original)
    assert (pool.pages_of(fork), pool.free_pages) == ([whole, copy.target], 5)


def test_a_prefix_is_forked_with_the_pages_it_needs() -> None:
    pool = PagePool(8, 4)
    original = pool.admit(11)
    whole, inside = pool.fork(original, 8), pool.fork(original, 5)
    pages = pool.pages_of(original)
    assert (pool.pages_of(whole), pool.pages_of(inside), pool.free_pages) == (pages[:2], pages[:2], 4)
    assert pool.append(whole) == [], "a full page is not written to again"
    assert [copy.source for copy in pool.append(inside, 4)] == [pages[1]]
    assert pool.append(original) == [], "its own last page is not shared"


def test_what_does_not_fit_changes_nothing() -> None:
    pool = PagePool(5, 4)
    original = pool.admit(10)
    fork = pool.fork(original)
    pages = pool.pages_of(original)
    with pytest.raises(OutOfPagesError, match="out of pages: 2 needed, 1 free") as refused:
        pool.append(fork, 3)  # a copy of the last page and one more
    assert (refused.value.needed, refused.value.free) == (2, 1)
    with pytest.raises(OutOfPagesError, match="5 needed, 1 free"):
        pool.admit(17)
    assert (pool.pages_of(original), pool.pages_of(fork), pool.length(fork), pool.free_pages) == (pages, pages, 10, 1)
    assert len(pool.append(fork, 2)) == 1


def test_block_table_and_slots_name_the_rows_of_the_contract() -> None:
    pool = PagePool(9, 4)
    long, short = pool.admit(9), pool.admit(1)
    first, second, third = pool.pages_of(long)
    table = pool.block_table([short, long], MB=4)
    assert (table.dtype, table.tolist()) == (torch.int32, [*pool.pages_of(short), -1, -1, -1, first, second, third, -1])
    assert pool.slots(long, 3, 9) == [first * 4 + 3, *range(second * 4, second * 4 + 4), third * 4]
    assert pool.slots(long, 9, 9) == []


def test_pages_are_copied_in_every_layer_and_in_order() -> None:
    dims = DIMS.replace(L=2, NB=4)
    cache = torch.arange(float(dims.L * dims.NB * dims.NKV * dims.BS * dims.D)).view(-1, dims.D)
    before = cache.clone().view(dims.L, dims.NB, -1)
    copy_pages(cache, [PageCopy(0, 2), PageCopy(2, 1)], dims)
    after = cache.view(dims.L, dims.NB, -1)
    for page, source in enumerate((0, 0, 0, 3)):
        assert torch.equal(after[:, page], before[:, source]), page


def _finished() -> None:
    pool = PagePool(4, 4)
    pool.finish(pool.admit(1))
    pool.admit(1)
    pool.append(0)


MISUSES: dict[str, Callable[[], object]] = {
    "a pool needs at least 2 pages, since the last is never handed out, found 1": lambda: PagePool(1, 4),
    "page_size must be a positive whole number, found 0": lambda: PagePool(4, 0),
    "tokens must be a positive whole number, found 0": lambda: PagePool(4, 4).admit(0),
    "tokens must be a positive whole number, found True": lambda: PagePool(4, 4).can_admit(True),
    "sequence 0 was never admitted; live sequences: none": lambda: PagePool(4, 4).length(0),
    "sequence 0 is finished; live sequences: 1": _finished,
    "sequence 0 has 2 tokens: cannot fork its first 3": lambda: (pool := PagePool(4, 4)).fork(pool.admit(2), 3),
    "sequence 0 has the positions 0 up to 2, asked for 0 up to 3": lambda: (pool := PagePool(4, 4)).slots(pool.admit(2), 0, 3),
    "sequence 0 has 3 pages, more than the 2 of a block table's row": lambda: (pool := PagePool(4, 4)).block_table(
        [pool.admit(9)], MB=2
    ),
    "a paged cache of these dimensions is [112, 16], found [3, 16]": lambda: copy_pages(torch.zeros(3, 16), [], DIMS),
    "cannot copy page 0 to page 14: the cache has the pages 0 to 13": lambda: copy_pages(
        torch.zeros(112, 16), [PageCopy(0, 14)], DIMS
    ),
}


@pytest.mark.parametrize("message", MISUSES)
def test_misuse_is_told_in_one_line(message: str) -> None:
    with pytest.raises(UsageError) as misused:
        MISUSES[message]()
    assert str(misused.value) == message
