"""Which card a kernel runs on, and that no two kernels run on one card at a time.

A card has the number of its node, ``/dev/davinci<number>``. Who runs a kernel on it holds its lock meanwhile. The system releases
the lock when the process that holds it ends, however it ends: best the one that launches, which then cannot outlive it.
Compiling needs no card, so it comes before::

    build(...)
    with CardLock(card):
        launch(...)
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import stat
import time
from pathlib import Path

from conformance.errors import UsageError
from conformance.outside import LONGEST, one_line
from conformance.toolchains.detection import ToolchainUnavailableError
from conformance.toolchains.machine import CardNode, Machine, this_machine
from conformance.toolchains.npu import DEVICE_VARIABLE
from conformance.toolchains.npu_smi import CardProcess, card_states
from conformance.toolchains.progress import Progress

#: What schedulers say the card by.
TASK_VARIABLE = "TASK_DEVICE"
#: Where locks are, instead of ``/tmp``: containers that share cards must share the folder too.
LOCK_FOLDER_VARIABLE = "CONFORMANCE_LOCK_DIR"
#: How long a card is waited for unless told otherwise, in seconds.
WAIT_SECONDS = 600.0
#: How often a lock is tried, who uses a card is asked while it is waited for, and what is waited for is told, in seconds.
POLL_SECONDS, ASK_SECONDS, TELL_SECONDS = 0.1, 10.0, 30.0
#: A wait that is shorter is not told: runs that share a card take turns all the time.
FIRST_TOLD_SECONDS = 2.0
#: For so long nobody is asked again who uses a card, which takes a second: between the runs of a night nothing changes.
REMEMBER_SECONDS = 60.0
#: Found in the command line of every process that runs kernels for this harness, which takes the lock.
_OURS = b"conformance.lanes."

_asked_at: dict[tuple[Path, int], float] = {}


class CardUnavailableError(ToolchainUnavailableError):
    """A card that is not there, may not be used, or was busy for too long: one line."""


@dataclasses.dataclass(frozen=True)
class Card:
    """A card to run on: its number, what torch calls it (``npu:<position>``), and how long to wait for it, in seconds."""

    number: int
    position: int
    wait_seconds: float = WAIT_SECONDS


@dataclasses.dataclass(frozen=True)
class CardChoice:
    """The cards that a run may use, and which of them is this process's.

    ``asked`` are the numbers that the user gave. Without them ``TASK_DEVICE`` names the cards, or ``TILE_FWK_DEVICE_ID``, which
    counts those that torch sees, and without these every card of the machine that may be used. ``worker`` counts the processes of
    a run: each takes the next card, in turn; where they are more than cards they share by the lock.
    """

    asked: tuple[int, ...] = ()
    worker: int = 0
    wait_seconds: float = WAIT_SECONDS

    def cards(self, machine: Machine | None = None) -> tuple[Card, ...]:
        """The cards, in order.

        Raises ``UsageError`` if a variable names none, ``CardUnavailableError`` for one that is not there or not permitted.
        """
        machine = machine or this_machine()
        nodes = {node.number: node for node in machine.card_nodes()}
        numbers, source = self._named(machine)
        if not source:
            numbers = tuple(number for number, node in nodes.items() if machine.may_use(node.path)) or tuple(nodes)
        if not numbers:
            raise CardUnavailableError("no card is there: /dev/davinci0, ... are not found")
        for number in numbers:
            _require_usable(machine, nodes, number, source)
        return tuple(Card(number, nodes[number].position, self.wait_seconds) for number in numbers)

    def in_turn(self, machine: Machine | None = None) -> tuple[Card, ...]:
        """The cards, this process's first and those that it may go on with after it; raises as ``cards`` does."""
        cards = self.cards(machine)
        first = self.worker % len(cards)
        return cards[first:] + cards[:first]

    def card(self, machine: Machine | None = None) -> Card:
        """This process's card; raises as ``cards`` does."""
        return self.in_turn(machine)[0]

    def _named(self, machine: Machine) -> tuple[tuple[int, ...], str]:
        """The numbers that somebody named, and who; nobody is an empty text."""
        if self.asked:
            return self.asked, "--device"
        if task := machine.variable(TASK_VARIABLE):
            return parse_cards(task, TASK_VARIABLE), TASK_VARIABLE
        if text := machine.variable(DEVICE_VARIABLE):
            # PyPTO's programs give it to torch.npu.set_device: it counts the cards that this process sees.
            seen = {node.position: node.number for node in machine.card_nodes()}
            positions = parse_cards(text, DEVICE_VARIABLE)
            for position in positions:
                if position not in seen:
                    there = ", ".join(f"{place} (card {number})" for place, number in seen.items()) or "none"
                    raise CardUnavailableError(f"{DEVICE_VARIABLE}: there is no {position}; there are {there}")
            return tuple(seen[position] for position in positions), DEVICE_VARIABLE
        return (), ""


def choice_of(device: str, wait_seconds: float | None, worker: int = 0, *, unused: str = "") -> CardChoice:
    """What options say: numbers of cards, or an empty text, and how long to wait; raises ``UsageError``.

    ``unused`` names what is run instead, where it is nothing on a card: then neither may be given.
    """
    for option, given in (("--device", bool(device)), ("--device-wait", wait_seconds is not None)):
        if given and unused:
            raise UsageError(f"{option} is for runs on a card, and {unused} takes none")
    if wait_seconds is not None and not 0 <= wait_seconds <= LONGEST:
        raise UsageError(f"--device-wait takes seconds, at most {LONGEST:,.0f}, found {wait_seconds:g}")
    return CardChoice(parse_cards(device) if device else (), worker, WAIT_SECONDS if wait_seconds is None else wait_seconds)


def parse_cards(text: str, source: str = "--device") -> tuple[int, ...]:
    """The numbers that a text such as ``0`` or ``0,2-3`` names, each once; ``source`` says in an error who wrote it.

    Raises ``UsageError`` for anything else.
    """
    numbers: dict[int, None] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", item)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UsageError(f"{source} takes numbers of cards, such as 0 or 0,2-3, found {one_line(repr(text), 60)}")
        numbers |= dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(numbers)


def _require_usable(machine: Machine, nodes: dict[int, CardNode], number: int, source: str) -> None:
    node = nodes.get(number)
    by = f" ({source})" if source else ""
    if node is None:
        there = ", ".join(map(str, nodes)) or "none"
        visible = machine.environment.get("ASCEND_RT_VISIBLE_DEVICES")
        of = "" if visible is None else f", by ASCEND_RT_VISIBLE_DEVICES={one_line(visible, 60)}"
        raise CardUnavailableError(f"card {number} is not there{by}: the cards of this machine are {there}{of}")
    if not machine.may_use(node.path):
        mode = stat.S_IMODE(node.path.stat().st_mode)
        raise CardUnavailableError(
            f"card {number} may not be used{by}: /dev/davinci{number} has mode {mode:03o}; join the group that owns it"
        )


class CardLock:
    """Has a card for the one who holds it, among all processes of this harness on the machine, whoever's they are.

    A context manager, which can be entered again and again, not twice at a time. Entering waits until nobody holds the lock and,
    where ``npu-smi`` tells, nothing else runs on the card; ``progress`` is told what is waited for. Raises
    ``CardUnavailableError`` when that takes longer than the card's ``wait_seconds``. It is a lock of the system on a file that
    every user may open (``flock``). Who waits holds a second one, the turn, without which nobody takes the first: so a process
    that launches again and again lets another one in between.
    """

    def __init__(self, card: Card, *, machine: Machine | None = None, progress: Progress | None = None) -> None:
        self.card = card
        self._machine = machine or this_machine()
        self._progress = progress or (lambda message: None)
        folder = self._machine.variable(LOCK_FOLDER_VARIABLE)
        self.path = (Path(folder) if folder else self._machine.path("/tmp")) / f"pypto-conformance-card-{card.number}.lock"
        self._turn_path = self.path.with_suffix(".turn")
        self._descriptor = self._turn = -1

    def __enter__(self) -> CardLock:
        began = time.monotonic()
        deadline, told = began + self.card.wait_seconds, began + FIRST_TOLD_SECONDS
        ask_again = 0.0
        busy = ""
        try:
            while True:
                now = time.monotonic()
                if self._descriptor < 0 and not self._take():
                    # Somebody has the card, or waits for it since before.
                    busy = f"{self._holder() or 'another process of this harness'} runs a kernel on it"
                elif now >= ask_again:
                    busy, ask_again = self._used_by_others(), now + ASK_SECONDS
                if self._descriptor >= 0 and not busy:
                    self._turn = _closed(self._turn)
                    return self
                if now >= deadline:
                    waited = f"card {self.card.number} was busy for {self.card.wait_seconds:g} s"
                    raise CardUnavailableError(f"{waited}: {busy}; wait longer (--device-wait), or choose another (--device)")
                if now >= told:
                    told = now + TELL_SECONDS
                    self._progress(f"waiting for card {self.card.number}: {busy}")
                time.sleep(min(POLL_SECONDS, max(deadline - now, 0.001)))
        except BaseException:
            self.release()
            raise

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others have the card; releasing twice is harmless."""
        self._descriptor, self._turn = _closed(self._descriptor), _closed(self._turn)

    def _take(self) -> bool:
        """Try once, if it is this process's turn."""
        if self._turn < 0:
            self._turn = self._locked(self._turn_path)
        if self._turn >= 0:
            self._descriptor = self._locked(self.path)
        return self._descriptor >= 0

    def _locked(self, path: Path) -> int:
        """A descriptor that holds the lock of a file; -1 if somebody else does."""
        try:
            descriptor = self._open(path)
        except OSError as error:
            raise CardUnavailableError(
                f"card {self.card.number} cannot be locked: {error.strerror or error}: {path}; "
                f"set {LOCK_FOLDER_VARIABLE} to a folder that all who use the cards can write to"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody may have tidied up between opening and locking: then others lock another file.
            if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise FileNotFoundError
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} of user {os.getuid()}".encode(), 0)
        except OSError:
            return _closed(descriptor)
        return descriptor

    def _open(self, path: Path) -> int:
        # A file of another user's in a folder that everybody can write to must not be opened with O_CREAT (protected_regular).
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            self._make(path)
            descriptor = os.open(path, flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no regular file")
        return descriptor

    @staticmethod
    def _make(path: Path) -> None:
        """Make the file, and its folder if need be, for all users, whatever the umask."""
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True)
            path.parent.chmod(0o1777)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o666)
            os.fchmod(descriptor, 0o666)
            os.close(descriptor)

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                return one_line(os.read(descriptor, 100).decode("utf-8", "replace"))
            finally:
                os.close(descriptor)
        return ""

    def _used_by_others(self) -> str:
        """What else runs on the card, where that can be asked; empty if nothing does."""
        key = self._machine.root, self.card.number
        now = time.monotonic()
        if now - _asked_at.get(key, -REMEMBER_SECONDS) < REMEMBER_SECONDS:
            return ""
        state = card_states(self._machine).get(self.card.number)
        others = [process for process in (state.processes if state else ()) if not self._takes_the_lock(process)]
        if others:
            return f"npu-smi shows {', '.join(f'{one_line(process.name, 40)} ({process.pid})' for process in others[:4])}"
        _asked_at[key] = now
        return ""

    def _takes_the_lock(self, process: CardProcess) -> bool:
        for pid in (process.inner_pid, process.pid):
            with contextlib.suppress(OSError):
                if pid is not None and _OURS in self._machine.path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
        return False


def _closed(descriptor: int) -> int:
    """Close a descriptor, unless it is -1, which stands for none and is returned."""
    if descriptor >= 0:
        os.close(descriptor)
    return -1
