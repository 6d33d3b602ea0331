"""The one exception that is meant for a person at a keyboard."""

from __future__ import annotations


class UsageError(ValueError):
    """What was asked for cannot be done as asked.

    The message is one line that says what was expected, what was found and what to do. The command prints it
    without a traceback and exits with code 2.
    """


class UnavailableError(UsageError):
    """What was asked for needs something that this machine has not: a toolchain, a compiler, an NPU."""
