"""Ctrl-C and requests to end: the first ends what is done and leaves time to keep what there is, further ones change nothing."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """The signal that came, if any did."""

    def __init__(self) -> None:
        self._before = {number: signal.getsignal(number) for number in _NUMBERS}
        # What is ignored anyway, as in the background of a script or below nohup, stays so.
        self._before = {number: handler for number, handler in self._before.items() if handler not in (None, signal.SIG_IGN)}
        #: The number of the signal; 0 if none came.
        self.number = 0

    @property
    def exit_code(self) -> int:
        """The exit code of a process that was interrupted, as shells count: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.number or signal.SIGINT)

    def ignore(self) -> None:
        """From here on nothing is interrupted: what there is is being kept."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def raise_pending(self) -> None:
        """Raise ``KeyboardInterrupt`` if a signal came whose exception got lost: in a destructor, or in a foreign callback."""
        if self.number:
            raise KeyboardInterrupt

    def begin(self) -> None:
        """Turn the first signal into ``KeyboardInterrupt``."""
        for number in self._before:
            signal.signal(number, self._interrupt)

    def end(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: object) -> None:
        # Some send two, as `timeout` does: the second must not lose what the first one leaves.
        self.ignore()
        self.number = number
        raise KeyboardInterrupt


_current: Interrupts | None = None


@contextlib.contextmanager
def interrupted_once() -> Iterator[Interrupts]:
    """Signals that end a process interrupt what is done here once, with ``KeyboardInterrupt``.

    Inside another such block this is the same one: after its end a signal is still not raised a second time. Only a main thread
    gets signals; in another nothing changes.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or Interrupts()
        return
    _current = Interrupts()
    _current.begin()
    try:
        yield _current
    finally:
        _current.end()
        _current = None
