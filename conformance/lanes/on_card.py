"""One kernel's runs on cards, as the judging process sees them: compile, take a card, launch, and decide whose a failure is.

Compiling comes before the card is taken, but for the first time in a process: PyPTO then starts its server on the card's AICPU
and maps the registers of its cores, which may fail where another process runs a kernel. After a failure that may be the card's, a
kernel of known result is run on it by another process (the *probe*). A card that fails is quarantined, and the case is run on
another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable

from conformance.lanes.base import Outcome
from conformance.lanes.card_pool import CardPool, NoCardError
from conformance.lanes.cards import Card
from conformance.lanes.device_compiler import CompilerUnavailableError
from conformance.lanes.device_errors import known_error
from conformance.toolchains.detection import ToolchainUnavailableError

#: A kernel after which so many cards were unusable is what is wrong: it does not get the others.
MOST_CARDS_LOST = 2


class CardRuns:
    """Decides for one kernel where its cases run, and what comes of a failure.

    ``pool()`` gives the cards. ``begin(card)`` lets the kernel's process be started for a card; ``is_set_up()`` says whether that
    has compiled there. ``probe(card)`` says why the card cannot be used, or an empty string, and raises
    ``CompilerUnavailableError`` where it is not for the card that it cannot.
    """

    def __init__(
        self,
        pool: Callable[[], CardPool],
        kernel: str,
        *,
        begin: Callable[[], object],
        is_set_up: Callable[[], bool],
        probe: Callable[[Card], str],
    ) -> None:
        self._find_pool = pool
        self._kernel = kernel
        self._begin = begin
        self._is_set_up = is_set_up
        self._probe = probe
        self.card: Card | None = None

    def run(self, compiled: Callable[[], Outcome], launched: Callable[[], Outcome]) -> Outcome:
        """The outcome of a case. ``launched`` is called while the card is held, ``compiled`` the first time in a process."""
        case = _Case(compiled, launched)
        outcome: Outcome | None = None
        pool: CardPool | None = None
        try:
            pool = self._find_pool()
            # Cards that were unusable after this kernel had run there.
            lost = pool.lost.setdefault(self._kernel, {})
            if len(lost) >= MOST_CARDS_LOST:
                return Outcome("crashed", message=f"not run again: after this kernel {_cards(lost)} could not be used")
            while outcome is None:
                outcome = self._once(pool, case, lost)
        except (NoCardError, ToolchainUnavailableError) as error:
            if pool is not None and isinstance(error, CompilerUnavailableError):
                pool.unusable = str(error)
            outcome = Outcome("unavailable", message=str(error))
        outcome.compiles, outcome.given_up = case.compiles, case.given_up
        if outcome.status == "ok":
            outcome.message = "; ".join(filter(None, [outcome.message, *case.remarks]))
        return outcome

    def _once(self, pool: CardPool, case: _Case, lost: dict[int, str]) -> Outcome | None:
        """The outcome, or ``None`` if the case must be run again."""
        card = pool.choose()
        if card != self.card:
            self.card = card
            self._begin()
        if card.number not in pool.proven:
            with pool.lock(card):
                reason = self._probe(card)
            if reason:
                pool.quarantine(card, reason)
                case.given_up[card.number] = reason
                return None
            pool.proven.add(card.number)
        with contextlib.nullcontext() if self._is_set_up() else pool.lock(card):
            outcome = case.step(case.compiled)
        if outcome.status not in ("raised", "unavailable") or outcome.device_error is not None:
            with pool.lock(card):
                if outcome.status == "ok":
                    outcome = case.step(case.launched)
                if outcome.status not in ("ok", "unavailable") and (
                    outcome.status != "raised" or outcome.device_error is not None
                ):
                    judged = self._judged(pool, card, outcome, case, lost)
                    if judged is None:
                        return None
                    outcome = judged
        outcome.card = card.number
        return outcome

    def _judged(self, pool: CardPool, card: Card, outcome: Outcome, case: _Case, lost: dict[int, str]) -> Outcome | None:
        """Whose a failure is that may be the card's; ``None`` if the case must be run again."""
        error = None if outcome.device_error is None else known_error(outcome.device_error)
        if error is not None and error.blame == "machine":
            return dataclasses.replace(outcome, status="unavailable", message=f"card {card.number}: {outcome.message}")
        reason = outcome.message
        if error is None or error.blame != "card":
            reason = self._probe(card)
            if reason:
                lost[card.number] = reason
        if reason:
            pool.quarantine(card, f"{reason}; the run before that ended so: {outcome.message}")
            case.given_up[card.number] = reason
            if len(lost) >= MOST_CARDS_LOST:
                return _finding(outcome, f"; after it {_cards(lost)} could not be used")
            case.remarks.append(f"run again: card {card.number} is used no more ({reason})")
            return None
        if error is not None and error.blame == "process" and not case.repeated:
            case.repeated = True
            case.remarks.append(f"run once more in another process: {outcome.message}")
            return None
        return _finding(outcome, "")


@dataclasses.dataclass
class _Case:
    """A case on its way: what has been done for it, and what a person should know of that."""

    compiled: Callable[[], Outcome]
    launched: Callable[[], Outcome]
    compiles: int = 0
    repeated: bool = False
    remarks: list[str] = dataclasses.field(default_factory=list)
    given_up: dict[int, str] = dataclasses.field(default_factory=dict)

    def step(self, work: Callable[[], Outcome]) -> Outcome:
        """What ``work`` comes to; compiles count also where the case has to begin anew."""
        outcome = work()
        self.compiles += outcome.compiles
        return outcome


def _cards(lost: Iterable[int]) -> str:
    return " and ".join(f"card {number}" for number in lost)


def _finding(outcome: Outcome, addition: str) -> Outcome:
    """A failure that is the kernel's: an exception on the card takes its process along."""
    status = "crashed" if outcome.status == "raised" else outcome.status
    return dataclasses.replace(outcome, status=status, message=outcome.message + addition)
