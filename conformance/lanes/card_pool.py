"""The cards of this process's run: which are left, which are proven, and which one is used next."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from conformance.errors import UnavailableError
from conformance.lanes.cards import Card, CardChoice, CardLock
from conformance.toolchains.progress import print_progress


class NoCardError(UnavailableError):
    """No card is left."""


@dataclasses.dataclass
class CardPool:
    """Cards in the order in which they are used; ``lock(card)`` is a context in which no other process uses the card.

    By their numbers: ``quarantined`` has the reason of each card that is used no more in this run, ``proven`` those that passed
    the probe.
    """

    cards: Sequence[Card]
    lock: Callable[[Card], AbstractContextManager[object]] = CardLock
    quarantined: dict[int, str] = dataclasses.field(default_factory=dict)
    proven: set[int] = dataclasses.field(default_factory=set)
    #: By kernel, the cards that could not be used after it had run there, each with the reason.
    lost: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)
    #: Why none can be used, whichever it is.
    unusable: str = ""

    def choose(self) -> Card:
        """The first card that is left; raises ``NoCardError`` with every card's reason."""
        if self.unusable:
            raise NoCardError(self.unusable)
        for card in self.cards:
            if card.number not in self.quarantined:
                return card
        reasons = "; ".join(f"card {number}: {reason}" for number, reason in self.quarantined.items())
        raise NoCardError(f"no card is left: {reasons}")

    def quarantine(self, card: Card, reason: str) -> None:
        """Use a card no more in this run."""
        self.quarantined.setdefault(card.number, reason)
        self.proven.discard(card.number)


_POOLS: dict[tuple[int, CardChoice], CardPool] = {}


def card_pool(choice: CardChoice) -> CardPool:
    """This process's pool of the cards of a run; a process that was forked has one of its own.

    Raises as ``CardChoice.cards`` does.
    """
    key = os.getpid(), choice
    if key not in _POOLS:
        _POOLS[key] = CardPool(choice.in_turn(), functools.partial(CardLock, progress=print_progress))
    return _POOLS[key]
