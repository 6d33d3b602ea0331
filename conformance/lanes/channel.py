"""Messages between a kernel's process and its owner: data of a fixed form, over a socket.

A kernel shares its process with the code that answers for it. So nothing that comes from there is executed (no pickle), and a
message has a mark, the number of the request it answers, a length that is limited, and a checksum: what a stray write or a copy
of the process leaves in the socket is not taken for an answer.
"""

from __future__ import annotations

import select
import socket
import struct
import time
import zlib
from collections.abc import Iterable

#: Mark, request number, length of the content in bytes, its CRC-32.
_HEADER = struct.Struct("<4sQII")
_MARK = b"KCW1"
#: The longest content, in bytes. Tensors go another way; the texts of an answer are bounded far below this.
MOST_BYTES = 8 << 20


def readable(descriptors: Iterable[int], seconds: float | None) -> list[int]:
    """Those that have something to read, or are at their end, within so many seconds; without end for ``None``.

    Not select(2), which takes no descriptor beyond 1023: a process that judges may have that many files open.
    """
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(None if seconds is None else 1000 * seconds)]


class ChannelError(Exception):
    """What was received is no message; the text says what it is, as a clause."""


class Channel:
    """One end of a socket that messages are sent through."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(True)
        self._received = bytearray()

    def send(self, number: int, content: bytes) -> None:
        """Send one message; raises ``OSError`` if the other end is closed, ``ValueError`` for one that is too long."""
        if len(content) > MOST_BYTES:
            raise ValueError(f"a message has at most {MOST_BYTES} bytes, this one {len(content)}")
        self._socket.sendall(_HEADER.pack(_MARK, number, len(content), zlib.crc32(content)) + content)

    def receive(self, seconds: float | None = None) -> tuple[int, bytes] | None:
        """The next message's request number and content; ``None`` if it is not there, whole, within so many seconds.

        Raises ``ChannelError`` for what is no message and ``EOFError`` at the end.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            message = self._whole()
            if message is not None:
                return message
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not readable([self._socket.fileno()], left):
                return None
            part = self._socket.recv(1 << 16)
            if not part:
                raise ChannelError("it ended in the middle of a message") if self._received else EOFError
            self._received += part

    def _whole(self) -> tuple[int, bytes] | None:
        if not self._received:
            return None
        if not _MARK.startswith(self._received[: len(_MARK)]) and not self._received.startswith(_MARK):
            raise ChannelError(f"it begins with {bytes(self._received[:16])!r}")
        if len(self._received) < _HEADER.size:
            return None
        _, number, length, checksum = _HEADER.unpack_from(self._received)
        if length > MOST_BYTES:
            raise ChannelError(f"it announces {length} bytes, and at most {MOST_BYTES} are taken")
        end = _HEADER.size + length
        if len(self._received) < end:
            return None
        content = bytes(self._received[_HEADER.size : end])
        if zlib.crc32(content) != checksum:
            raise ChannelError("its checksum is wrong")
        del self._received[:end]
        return number, content

    @property
    def has_more(self) -> bool:
        """Whether something has come that nobody asked for: between an answer and the next request there must be nothing."""
        return bool(self._received) or bool(readable([self._socket.fileno()], 0))

    def close(self) -> None:
        """Close this end; closing twice is harmless."""
        self._socket.close()
