"""What a person is told of a wait that nobody can see: a first build, a card that is busy."""

from __future__ import annotations

import sys
from collections.abc import Callable

#: Is told what is waited for, in one line.
Progress = Callable[[str], None]


def print_progress(message: str) -> None:
    """Say it on standard error."""
    print(message, file=sys.stderr, flush=True)
