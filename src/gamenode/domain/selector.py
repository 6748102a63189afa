"""The one grammar for choosing nodes: `zone=a,gpu.model~4090,!broken`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from gamenode.domain.errors import GameNodeError, invalid

Lookup = Callable[[str], Sequence[str]]
"""Returns every value that a key has; none where the key is absent. Any of them may match."""

_KEY: Final = r"[A-Za-z0-9_][A-Za-z0-9_./-]*"
_IN: Final = re.compile(rf"^({_KEY})\s+in\s+\(([^()]*)\)$")
_COMPARE: Final = re.compile(rf"^({_KEY})\s*(!=|!~|=|~)\s*(.*)$")
_PRESENT: Final = re.compile(rf"^(!?)\s*({_KEY})$")
_LENGTH_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class Term:
    """One condition on one key."""

    key: str
    operator: str
    """`present`, `absent`, `=`, `!=`, `~`, `!~` or `in`."""
    values: tuple[str, ...] = ()

    def matches(self, lookup: Lookup) -> bool:
        """Return whether the values that `lookup` finds satisfy this condition."""
        found = lookup(self.key)
        match self.operator:
            case "present":
                return bool(found)
            case "absent":
                return not found
            case "=" | "in":
                return any(value in self.values for value in found)
            case "!=":
                return all(value not in self.values for value in found)
            case "~":
                return any(self.values[0] in value for value in found)
            case _:
                return all(self.values[0] not in value for value in found)

    def __str__(self) -> str:
        """Return the term as it is written."""
        match self.operator:
            case "present":
                return self.key
            case "absent":
                return f"!{self.key}"
            case "in":
                return f"{self.key} in ({'|'.join(self.values)})"
            case _:
                return f"{self.key}{self.operator}{self.values[0]}"


@dataclass(frozen=True, slots=True)
class Selector:
    """Conditions that must all hold. An empty selector matches everything."""

    terms: tuple[Term, ...] = ()

    def matches(self, lookup: Lookup) -> bool:
        """Return whether every condition holds."""
        return all(term.matches(lookup) for term in self.terms)


def parse_selector(text: str, *, field: str = "selector") -> Selector:
    """Return the selector that `text` writes.

    Raises:
        GameNodeError: INVALID_REQUEST, naming the term that cannot be read.
    """
    if len(text) > _LENGTH_MAX:
        raise invalid(field, f"is longer than {_LENGTH_MAX} characters")
    return Selector(tuple(_parse_term(term, field) for term in _split(text)))


def _split(text: str) -> Iterable[str]:
    # Commas separate terms, but not inside the parentheses of `in (a|b)`.
    return (part.strip() for part in re.split(r",(?![^()]*\))", text) if part.strip())


def _parse_term(text: str, field: str) -> Term:
    if match := _IN.match(text):
        values = tuple(value.strip() for value in match[2].split("|"))
        return Term(match[1], "in", values)
    if match := _PRESENT.match(text):
        return Term(match[2], "absent" if match[1] else "present")
    if match := _COMPARE.match(text):
        return Term(match[1], match[2], (match[3].strip(),))
    raise _unreadable(text, field)


def _unreadable(text: str, field: str) -> GameNodeError:
    return invalid(
        field,
        f"cannot read the term {text!r}",
        advice="write key, !key, key=v, key!=v, key~part, key!~part or key in (a|b)",
    )
