"""What ``npu-smi info`` tells: the driver's version, and each card's memory and processes.

It prints tables for people. Cards of the A2 have one chip, whose number is the card's; cards of the A3 have two, each with a
device number of its own (``Phy-ID``), which is that of ``/dev/davinci<number>``.
"""

from __future__ import annotations

import dataclasses
import re

from conformance.toolchains.machine import Machine


@dataclasses.dataclass(frozen=True)
class CardProcess:
    """A process that holds memory of a card, by the number that it has on the host and, in a container, there."""

    pid: int
    name: str
    inner_pid: int | None = None


@dataclasses.dataclass(frozen=True)
class CardState:
    """Memory in bytes, used and altogether, and who uses the card."""

    used: int
    total: int
    processes: tuple[CardProcess, ...] = ()

    @property
    def free(self) -> int:
        """Bytes that are not used."""
        return self.total - self.used


def card_states(machine: Machine) -> dict[int, CardState]:
    """Each card's state by its device number; empty where nobody tells."""
    return parse(machine.told_by("npu-smi", "info") or "")


def parse(text: str) -> dict[int, CardState]:
    """Read the tables; lines that are not understood are passed over."""
    memory: dict[int, tuple[int, int]] = {}
    processes: dict[int, list[CardProcess]] = {}
    numbers: dict[tuple[int, int], int] = {}
    card = -1
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        first = [int(word) for word in cells[0].split()] if re.fullmatch(r"\d+(\s+\d+)?", cells[0]) else []
        if len(cells) == 3 and (named := re.fullmatch(r"(\d+)\s+[A-Za-z0-9]*[A-Za-z]\S*", cells[0])):
            card = int(named[1])
        elif len(cells) == 3 and first and re.match(r"[0-9A-Fa-f]{4}:", cells[1]):
            number = first[1] if len(first) == 2 else card
            numbers[card, first[0]] = number
            amounts = re.findall(r"(\d+)\s*/\s*(\d+)", cells[2])
            if amounts:
                memory[number] = (int(amounts[-1][0]) << 20, int(amounts[-1][1]) << 20)
        elif len(cells) >= 4 and len(first) == 2 and cells[1].isdigit() and (first[0], first[1]) in numbers:
            inner = int(cells[4]) if len(cells) > 4 and cells[4].isdigit() else None
            processes.setdefault(numbers[first[0], first[1]], []).append(CardProcess(int(cells[1]), cells[2], inner))
    return {number: CardState(*amounts, tuple(processes.get(number, ()))) for number, amounts in memory.items()}
