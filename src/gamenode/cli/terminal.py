"""Text for a terminal: how wide it is, its colours, and what it must not be told."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Mapping
from typing import Final

import click

from gamenode.domain.errors import ErrorCode, GameNodeError

# What a text from elsewhere may hold beside its letters: tabs, ends of lines, and colours (SGR).
_SGR: Final = r"\x1b\[[0-9;:]*m"
_CONTROL: Final = re.compile(
    rf"({_SGR})|(\r?\n|\t)|([\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069])"
)
_CONTROL_IN_CELL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_PLAIN: Final = re.compile(rb"[^\x00-\x08\x0b-\x1f\x7f-\xff]*")

RESET: Final = "\x1b[0m"
BOLD: Final = "1"
DIM: Final = "2"
RED: Final = "31"

_COLOURS: Final[Mapping[str, str]] = {
    "COMPLETED": "32",
    "online": "32",
    "connected": "32",
    "RUNNING": "36",
    "PENDING": "33",
    "CANCELLED": "33",
    "reconnecting": "33",
    "maintenance": "33",
    "FAILED": RED,
    "offline": RED,
    "lost": RED,
    "disabled": RED,
}


def colour_of(word: str) -> str:
    """Return the SGR code of a status word; empty for a word without a colour of its own."""
    return _COLOURS.get(word, "")


def paint(text: str, code: str) -> str:
    """Return `text` in the colour of an SGR code, if there is one."""
    return f"\x1b[{code}m{text}{RESET}" if code else text


def neutralise(text: bytes) -> bytes:
    r"""Return `text` for a terminal: colours stay, every other control sequence is only shown.

    `\x1b]0;title\x07` becomes `^[]0;title^G`; bytes that are not UTF-8 become U+FFFD.
    """
    if _PLAIN.fullmatch(text):
        return text
    return _CONTROL.sub(_shown_unless_harmless, text.decode(errors="replace")).encode()


def one_line(text: str) -> str:
    """Return `text` without any control character, so that it can stand in one line of a table."""
    return _CONTROL_IN_CELL.sub(lambda match: _shown(match[0]), text)


def width_of(text: str) -> int:
    """Return how many columns `text` takes, with no control characters in it."""
    if text.isascii():
        return len(text)
    return sum(_width(character) for character in text)


def cut(text: str, columns: int) -> str:
    """Return `text` in at most `columns` columns; what was cut off leaves an ellipsis."""
    if width_of(text) <= columns:
        return text
    kept: list[str] = []
    room = columns - 1
    for character in text:
        room -= _width(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(kept) + "…"


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def _shown_unless_harmless(match: re.Match[str]) -> str:
    return _shown(match[3]) if match[3] else match[0]


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:  # noqa: PLR2004 - the last of the ASCII controls is 0x1f
        return "^" + chr(code + 0x40)
    if code == 0x7F:  # noqa: PLR2004 - DEL
        return "^?"
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"  # noqa: PLR2004 - one byte


def confirm(question: str, *, yes: bool) -> None:
    """Ask whether to go on, unless `yes`; where nobody can be asked, refuse.

    Raises:
        GameNodeError: INVALID_REQUEST, there is no terminal to ask on.
        click.Abort: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise GameNodeError(
            ErrorCode.INVALID_REQUEST,
            question,
            hint="nobody can be asked here: say --yes if that is wanted",
        )
    click.confirm(f"{question}; go on?", abort=True, err=True)
