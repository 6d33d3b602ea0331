"""Texts from outside, of a kernel's process, a record or a file: what is shown of them is bounded, and printable in one way."""

from __future__ import annotations

import re

#: Line ends, which stay, are the only control characters that a text may hold. Left are no escape sequence, no bidirectional
#: override (it shows a name as another), and no half of a surrogate pair, which no file can hold.
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
#: A terminal's escape sequences: control sequences, commands to its title bar, and single letters.
_ESCAPES = re.compile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|[@-Z\\\\^_])")
#: How much of a text is kept unless its owner says otherwise, in characters.
MOST_CHARACTERS = 8000


def plain(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text without escape sequences and control characters, of at most so many characters."""
    # Cut first: what a kernel says may be as long as its memory is large.
    cut = text[: 2 * most].replace("\r\n", "\n").replace("\t", " ")
    kept = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", _ESCAPES.sub("", cut))
    return kept if len(kept) <= most and len(text) <= 2 * most else kept[: most - 3] + "..."


def plain_line(text: str, most: int = MOST_CHARACTERS) -> str:
    """The same in one line."""
    return " ".join(plain(text, most).split())
