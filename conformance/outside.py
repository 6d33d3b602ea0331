"""What comes from outside: texts, JSON and files that others wrote, or that a typing error names, made harmless in one place.

Names and messages come from kernels under test, records from other machines and versions, paths from command lines. None of
them may reach a terminal, a page or a parser as it is.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from conformance.errors import UsageError

# What XML 1.0 forbids, what a terminal would obey (escape sequences), and what reverses the text around it (bidi overrides).
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")

#: Longest path, and longest name in one, that Linux takes, in bytes.
_LONGEST_PATH, _LONGEST_NAME = 4095, 255

#: Largest whole number and longest duration (seconds, 30 years) that are taken for measurements.
LARGEST = 2**63 - 1
LONGEST = 1e9
#: So much of the end of a log is looked at, in bytes.
LONGEST_TAIL = 64 << 10

#: How deep JSON objects of a record may lie in one another.
_DEEPEST = 8


def plain(text: object, limit: int | None = None) -> str:
    """Text without characters that XML forbids or a terminal obeys, at most ``limit`` characters long; lines stay lines."""
    whole = str(text)
    more = 0 if limit is None else len(whole) - limit
    if more > 0:
        whole = whole[:limit]
    cleaned = _UNSAFE.sub("\ufffd", whole.replace("\r\n", "\n"))
    return f"{cleaned.rstrip()} ... ({more:,} more characters)" if more > 0 else cleaned


def one_line(text: object, limit: int | None = None) -> str:
    """``plain`` text with every run of blanks and line ends turned into one blank."""
    return plain(" ".join(str(text).split()), limit)


def told(error: BaseException) -> str:
    """The class and the text of an exception that others raised; making its text may fail as well."""
    try:
        text = str(error)
    except Exception as failure:
        text = f"its text cannot be made ({type(failure).__name__})"
    return f"{type(error).__name__}: {text}"


def require_path(path: str | os.PathLike[str]) -> None:
    """Raise ``UsageError`` for what cannot be the path of a file: too long, or with a character that no path holds."""
    encoded = os.fsencode(path) if _is_encodable(os.fspath(path)) else b"\0"
    if b"\0" in encoded:
        raise UsageError(f"no file has such a name: {one_line(path, 100)}")
    if len(encoded) > _LONGEST_PATH or any(len(name) > _LONGEST_NAME for name in encoded.split(b"/")):
        raise UsageError(f"no file has so long a name: {one_line(path, 100)}")


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; raises ``OSError`` for any other.

    A pipe would be waited for without end, and a device such as ``/dev/zero`` has none.
    """
    require_path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    # Should it have become a pipe meanwhile, this does not wait for a writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes")
    return content


def read_text(path: Path, what: str, limit: int) -> str:
    """The same as UTF-8 text; raises ``UsageError``, in one line, in which ``what`` names the file."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path} is not UTF-8 text: {error.reason}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file that holds what it held before until all is written, whenever this is killed; raises ``OSError``."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.unlink(missing_ok=True)  # left by one that was killed, or something that is no file
        beside.write_text(text, encoding="utf-8", newline="\n")
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


class Fields:
    """The fields of a JSON object that others wrote; whoever asks for one gets the type asked for, or a ``ValueError``.

    Texts are ``plain``. Fields that nobody asks for are ignored: a newer version may have added them.
    """

    def __init__(self, data: object, what: str) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"not {what}")
        self._data = data

    def text(self, name: str) -> str:
        """A text, empty if it is not there."""
        value = self._data.get(name, "")
        return plain(value) if isinstance(value, str) else self._wrong(name, "a text")

    def optional_text(self, name: str) -> str | None:
        """A text, or ``None``."""
        return self.text(name) if self._data.get(name) is not None else None

    def measure(self, name: str) -> float | None:
        """A number, infinity and NaN among them, which JSON has as texts; or ``None``."""
        value = self._data.get(name)
        if value is None or value in ("inf", "nan"):
            return None if value is None else float(value)
        return self._number(name, value)

    def duration(self, name: str) -> float | None:
        """Seconds, from 0 to ``LONGEST``; or ``None``."""
        value = self._data.get(name)
        found = None if value is None else self._number(name, value)
        return found if found is None or 0 <= found <= LONGEST else self._wrong(name, "a duration in seconds")

    def moment(self, name: str) -> float:
        """Seconds since the epoch; 0 if it is not there."""
        found = self._number(name, self._data.get(name, 0.0))
        return found if 0 <= found < 2**36 else self._wrong(name, "a point in time")

    def count(self, name: str) -> int | None:
        """A whole number from 0 to ``LARGEST``, or ``None``."""
        value = self._data.get(name)
        return value if value is None or _is_count(value) else self._wrong(name, "a count")

    def counts(self, name: str) -> tuple[int, ...] | None:
        """A list of such numbers, or ``None``."""
        value = self._data.get(name)
        if value is None or (isinstance(value, (list, tuple)) and len(value) <= 32 and all(map(_is_count, value))):
            return None if value is None else tuple(value)
        return self._wrong(name, "a list of counts")

    def named_counts(self, name: str) -> dict[str, int]:
        """Such numbers by name, empty if they are not there."""
        value = self._data.get(name, {})
        if isinstance(value, dict) and len(value) <= 32 and all(map(_is_count, value.values())):
            return {plain(key): count for key, count in value.items()}
        return self._wrong(name, "counts by name")

    def texts(self, name: str) -> list[str]:
        """A list of texts, empty if it is not there."""
        value = self.items(name)
        return [plain(one) for one in value] if all(isinstance(one, str) for one in value) else self._wrong(name, "texts")

    def items(self, name: str) -> list[Any]:
        """A list of anything, empty if it is not there."""
        value = self._data.get(name, [])
        return value if isinstance(value, list) else self._wrong(name, "a list")

    def tree(self, name: str) -> dict[str, Any]:
        """An object of anything but depth, empty if it is not there."""
        value = self._data.get(name, {})
        return _shallow(value, _DEEPEST) if isinstance(value, dict) else self._wrong(name, "an object")  # type: ignore[no-any-return]

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # a whole number may be too large
                if math.isfinite(float(value)):
                    return float(value)
        return self._wrong(name, "a number")

    def _wrong(self, name: str, expected: str) -> NoReturn:
        raise ValueError(f"{name} is not {expected}: {one_line(repr(self._data.get(name)), 60)}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _shallow(value: object, depth: int) -> Any:
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, (Mapping, list)):
        if not depth:
            raise ValueError("objects lie too deep in one another")
        if isinstance(value, list):
            return [_shallow(one, depth - 1) for one in value]
        return {plain(name): _shallow(one, depth - 1) for name, one in value.items()}
    return value


def tail_of(path: Path) -> str:
    """The end of a log that somebody may still write to, at most ``LONGEST_TAIL`` bytes; empty if it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LONGEST_TAIL))
            return file.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
    except OSError:
        return ""
