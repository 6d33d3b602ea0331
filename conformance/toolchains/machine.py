"""A machine as the harness looks at it: its files below a root, its environment, and the programs that its ``PATH`` names.

Everything that is asked of a machine goes through ``Machine``, so that a folder can stand for one that is not here.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

#: A folder to look in instead of ``/``, for ``/dev`` and for what a driver installs.
ROOT_VARIABLE = "CONFORMANCE_MACHINE_ROOT"
#: How long a program that only tells something may take, in seconds.
COMMAND_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class DoctorLine:
    """One thing that a lane needs: whether it is there, what was found, and what to do if it is not."""

    name: str
    ok: bool
    found: str
    advice: str = ""

    @property
    def problem(self) -> str:
        """What is wrong with it, in one line; empty if nothing is."""
        return "" if self.ok else f"{self.name} {self.found}" + (f" ({self.advice})" if self.advice else "")


@dataclasses.dataclass(frozen=True)
class CardNode:
    """A card: its number, as in ``/dev/davinci<number>``, and what torch calls it, its position among those that it sees."""

    number: int
    position: int
    path: Path


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where to look. ``search_path`` is where packages are looked for, ``None`` for where Python does.

    ``user`` is the number of a user without groups whose access to files is asked for; ``None`` is this process's.
    """

    root: Path
    environment: Mapping[str, str]
    search_path: Sequence[str] | None = None
    user: int | None = None

    def path(self, absolute: str) -> Path:
        """A path of the machine."""
        return self.root / absolute.lstrip("/")

    def variable(self, name: str) -> str:
        """An environment variable; empty if it is not set."""
        return self.environment.get(name, "")

    def program(self, name: str) -> str | None:
        """Where ``PATH`` finds a program."""
        return shutil.which(name, path=self.variable("PATH"))

    def told_by(self, *command: str) -> str | None:
        """What a program prints; ``None`` where it is not there, fails or takes too long."""
        program = self.program(command[0])
        if program is None:
            return None
        try:
            done = subprocess.run(
                [program, *command[1:]],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COMMAND_SECONDS,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout if done.returncode == 0 else None

    def has_package(self, name: str) -> bool:
        """Whether Python would find a package; it is not imported."""
        try:
            return (
                importlib.machinery.PathFinder.find_spec(name, None if self.search_path is None else [*self.search_path])
                is not None
            )
        except (ImportError, ValueError):
            return False

    def version_of(self, *names: str) -> str:
        """The version of an installed distribution, by the first of its names that is known; empty if none is."""
        for name in names:
            found = (
                importlib.metadata.distributions(name=name)
                if self.search_path is None
                else importlib.metadata.distributions(name=name, path=[*self.search_path])
            )
            for distribution in found:
                return str(distribution.version)
        return ""

    def may_use(self, path: Path) -> bool:
        """Whether the user may read from and write to a file."""
        if self.user is None:
            return os.access(path, os.R_OK | os.W_OK)
        status = path.stat()
        bits = status.st_mode >> (6 if status.st_uid == self.user else 0)
        return self.user == 0 or bits & 0o6 == 0o6

    def card_nodes(self) -> tuple[CardNode, ...]:
        """The cards that torch sees: the nodes of the driver in order, or those of ``ASCEND_RT_VISIBLE_DEVICES`` among them."""
        folder = self.path("/dev")
        numbers = sorted(
            int(match[1]) for path in folder.glob("davinci[0-9]*") if (match := re.fullmatch(r"davinci(\d+)", path.name))
        )
        visible = self.environment.get("ASCEND_RT_VISIBLE_DEVICES")
        if visible is not None:
            numbers = [numbers[place] for place in _places(visible, len(numbers))]
        return tuple(CardNode(number, place, folder / f"davinci{number}") for place, number in enumerate(numbers))


def _places(text: str, count: int) -> list[int]:
    """The positions in a list of devices. CANN reads it up to the first that is none; one that does not rise shows no card."""
    places: list[int] = []
    read = re.match(r"[0-9,]*", text)
    for item in (read[0] if read else "").split(","):
        if not item:
            break
        if places and int(item) <= places[-1]:
            return []
        if int(item) >= count:
            break
        places.append(int(item))
    return places


def this_machine() -> Machine:
    """The machine that this process runs on, or the folder that ``CONFORMANCE_MACHINE_ROOT`` names in its place."""
    return Machine(Path(os.environ.get(ROOT_VARIABLE) or "/"), dict(os.environ))
