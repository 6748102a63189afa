"""Patterns for values, matched in a time that the length of the value bounds.

Python's `re` tries alternatives one after the other and can need centuries for `(a+)+b`. A pattern
comes from a file and a value from a caller, so neither may decide how long the server is busy:
these patterns become a position automaton (Glushkov) whose states are the bits of one integer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

PATTERN_LENGTH_MAX: Final = 256
VALUE_LENGTH_MAX: Final = 256
_POSITIONS_MAX: Final = 256
_STEPS_MAX: Final = 4096
_READ_MAX: Final = 256

_ONE_CHARACTER: Final = re.compile(
    # In brackets, what Python means to give another meaning some day is left out.
    r"\[\^?\]?(?:\\.|(?!--|&&|~~|\|\|)[^\[\]\\])*\]"
    r"|\\[^0-9A-Za-z]|\\[dDsSwWnrt]|[^\\()\[\]{}*+?|^$]",
    re.DOTALL,
)
_TIMES: Final = re.compile(r"[*+?]|\{([0-9]{1,3})(,)?([0-9]{1,3})?\}")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern that was read."""

    text: str
    atoms: tuple[re.Pattern[str], ...]
    """What one character must be at each position."""
    first: int
    follow: tuple[int, ...]
    last: int
    nullable: bool

    def matches(self, value: str) -> bool:
        """Return whether the whole of `value` is what the pattern describes."""
        if len(value) > VALUE_LENGTH_MAX:
            return False
        if not value:
            return self.nullable
        reachable, states = self.first, 0
        fits: dict[str, int] = {}
        for character in value:
            if character not in fits:
                fits[character] = sum(
                    1 << i for i, atom in enumerate(self.atoms) if atom.fullmatch(character)
                )
            states = reachable & fits[character]
            reachable = 0
            for position in _bits(states):
                reachable |= self.follow[position]
        return bool(states & self.last)


@lru_cache(maxsize=_READ_MAX)
def read_pattern(text: str) -> Pattern:
    r"""Return the pattern that `text` writes; it always describes the whole value.

    Characters, `.`, `[…]`, `\d \w \s`, groups, `|`, `* + ? {n} {n,} {n,m}`; `^` and `$` may
    stand at the ends. No look-around and no back-reference.

    Raises:
        ValueError: it cannot be read or is too large; says why.
    """
    if len(text) > PATTERN_LENGTH_MAX:
        raise ValueError(f"is longer than {PATTERN_LENGTH_MAX} characters")
    return _Reader(text).pattern()


class _Part(NamedTuple):
    nullable: bool
    first: int
    last: int


_EMPTY: Final = _Part(nullable=True, first=0, last=0)


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._end = len(text) - (text.endswith("$") and not text.endswith("\\$"))
        self._atoms: list[re.Pattern[str]] = []
        self._follow: list[int] = []
        self._steps = 0

    def pattern(self) -> Pattern:
        self._at = int(self._text.startswith("^"))
        whole = self._alternatives()
        if self._at < self._end:
            raise self._unreadable()
        return Pattern(
            text=self._text,
            atoms=tuple(self._atoms),
            first=whole.first,
            follow=tuple(self._follow),
            last=whole.last,
            nullable=whole.nullable,
        )

    def _alternatives(self) -> _Part:
        part = self._sequence()
        while self._at < self._end and self._text[self._at] == "|":
            self._at += 1
            other = self._sequence()
            part = _Part(
                part.nullable or other.nullable, part.first | other.first, part.last | other.last
            )
        return part

    def _sequence(self) -> _Part:
        part = _EMPTY
        while self._at < self._end and self._text[self._at] not in "|)":
            part = self._joined(part, self._repeated())
        return part

    def _repeated(self) -> _Part:
        start = self._at
        part = self._atom()
        times = _TIMES.match(self._text, self._at, self._end)
        if not times:
            return part
        end = times.end()
        least, most = _range(times)
        if most is not None and most < max(least, 1):
            raise self._unreadable()
        # Each repetition is read anew, as positions of its own.
        parts = [part]
        while len(parts) < (most or max(least, 1)):
            self._at = start
            parts.append(self._atom())
        self._at = end
        if most is None:
            self._link(parts[-1], parts[-1])
        whole = _EMPTY
        for index, each in enumerate(parts):
            optional = each._replace(nullable=each.nullable or index >= least)
            whole = self._joined(whole, optional)
        return whole

    def _atom(self) -> _Part:
        self._steps += 1
        if self._steps > _STEPS_MAX:
            raise ValueError("is too large")
        if self._text.startswith("(", self._at):
            return self._group()
        match = _ONE_CHARACTER.match(self._text, self._at, self._end)
        if not match:
            raise self._unreadable()
        if len(self._atoms) == _POSITIONS_MAX:
            raise ValueError(f"describes more than {_POSITIONS_MAX} characters")
        try:
            self._atoms.append(re.compile(match[0], re.ASCII))
        except re.error as error:
            raise self._unreadable() from error
        self._follow.append(0)
        self._at = match.end()
        bit = 1 << (len(self._atoms) - 1)
        return _Part(nullable=False, first=bit, last=bit)

    def _group(self) -> _Part:
        self._at += 3 if self._text.startswith("(?:", self._at) else 1
        part = self._alternatives()
        if self._at >= self._end or self._text[self._at] != ")":
            raise self._unreadable()
        self._at += 1
        return part

    def _joined(self, left: _Part, right: _Part) -> _Part:
        self._link(left, right)
        return _Part(
            left.nullable and right.nullable,
            left.first | (right.first if left.nullable else 0),
            right.last | (left.last if right.nullable else 0),
        )

    def _link(self, left: _Part, right: _Part) -> None:
        for position in _bits(left.last):
            self._follow[position] |= right.first

    def _unreadable(self) -> ValueError:
        rest = self._text[self._at : self._at + 12] or "its end"
        return ValueError(f"cannot be read at {rest!r}")


def _range(times: re.Match[str]) -> tuple[int, int | None]:
    match times[0]:
        case "*":
            return 0, None
        case "+":
            return 1, None
        case "?":
            return 0, 1
        case _:
            least = int(times[1])
            return least, int(times[3]) if times[3] else None if times[2] else least


def _bits(states: int) -> Iterator[int]:
    while states:
        lowest = states & -states
        yield lowest.bit_length() - 1
        states ^= lowest
