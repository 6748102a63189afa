"""Durations, sizes and times as people write them: one reading for file, command line and API."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from gamenode.domain.errors import invalid
from gamenode.lib.clock import NANOSECONDS_PER_S, Instant

DURATION_MAX_S: Final = 36_500 * 86_400
"""A hundred years; an instant that far from today still fits 64 bits."""

SIZE_MAX_BYTES: Final = 2**63 - 1

DURATION_PATTERN: Final = (
    r"^(?=[0-9])([0-9]+(\.[0-9]+)?d)?([0-9]+(\.[0-9]+)?h)?([0-9]+(\.[0-9]+)?m(?!s))?"
    r"([0-9]+(\.[0-9]+)?s)?([0-9]+(\.[0-9]+)?ms)?$"
)
"""What `parse_duration` reads, for schemas."""

SIZE_PATTERN: Final = r"^[0-9]+(\.[0-9]+)?\s*([bB]|[kKmMgGtTpP]([bB]|[iI][bB])?)?$"
"""What `parse_size` reads, for schemas."""

_DURATION: Final = re.compile(DURATION_PATTERN, re.ASCII)
_DURATION_PART: Final = re.compile(r"([0-9]+)(?:\.([0-9]+))?(ms|[dhms])", re.ASCII)
_NANOSECONDS: Final = {
    "d": 86_400 * NANOSECONDS_PER_S,
    "h": 3_600 * NANOSECONDS_PER_S,
    "m": 60 * NANOSECONDS_PER_S,
    "s": NANOSECONDS_PER_S,
    "ms": NANOSECONDS_PER_S // 1000,
}

_SIZE: Final = re.compile(r"([0-9]+)(?:\.([0-9]+))?\s*([a-zA-Z]*)", re.ASCII)
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_POWERS_OF_1024: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}

_RFC_3339: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})",
    re.ASCII,
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LENGTH_MAX: Final = 64


def parse_duration(text: str, *, field: str = "duration") -> float:
    """Return the seconds that `text` writes: `90s`, `10m`, `1h30m`, `7d`, `500ms`, `1.5h`.

    Each unit stands once, the larger first.

    Raises:
        GameNodeError: INVALID_REQUEST, for `field`.
    """
    return _nanoseconds(text, field) / NANOSECONDS_PER_S


def parse_size(text: str, *, field: str = "size") -> int:
    """Return the bytes that `text` writes: `512m`, `2g`, `6GiB`, `1.5G`, `4096`.

    Every unit is a power of 1024, as in the Compose specification: `k`, `kb` and `KiB` are one.

    Raises:
        GameNodeError: INVALID_REQUEST, for `field`.
    """
    text = text.strip()
    if len(text) > _LENGTH_MAX or not re.match(SIZE_PATTERN, text, re.ASCII):
        raise invalid(
            field, f"{_shown(text)} is not a size", advice="write a size such as 512m, 2g or 6GiB"
        )
    match = _SIZE.fullmatch(text)
    assert match
    whole, fraction, unit = match[1], match[2] or "", match[3].lower()
    shift = 10 * _POWERS_OF_1024[unit.removesuffix("b").removesuffix("i")]
    scaled = int(whole + fraction) << shift
    parts: int = 10 ** len(fraction)
    size_bytes, rest = divmod(scaled, parts)
    if rest:
        raise invalid(field, f"{_shown(text)} is not a whole number of bytes")
    if size_bytes > SIZE_MAX_BYTES:
        raise invalid(field, f"{_shown(text)} is too large")
    return size_bytes


def size_text(size_bytes: int) -> str:
    """Return a size as people write it, in the largest unit that it reaches: `1.5GiB`."""
    power = 0
    while power + 1 < len(_UNITS) and size_bytes >= 1024 ** (power + 1):
        power += 1
    return f"{round(size_bytes / 1024**power, 2):g}{_UNITS[power]}"


def span(seconds: float) -> str:
    """Return a length of time in about two digits: `0.4s`, `12s`, `3m`, `2h`, `9d`."""
    if seconds < 10:  # noqa: PLR2004 - below ten, a second's tenths are of interest
        return f"{seconds:.1f}s"
    for unit_s, unit, unit_max in ((1, "s", 120), (60, "m", 120), (3600, "h", 48)):
        if seconds < unit_s * unit_max:
            return f"{int(seconds // unit_s)}{unit}"
    return f"{int(seconds // 86400)}d"


def parse_time(text: str, now: Instant, *, field: str = "time") -> Instant:
    """Return the instant that `text` names.

    It is `now`, an RFC 3339 time with its offset (`2026-03-01T12:00:00.5Z`; up to nine digits of a
    second are kept), or a duration from `now`: `-2h` and plain `2h` are past, `+2h` is to come.

    Raises:
        GameNodeError: INVALID_REQUEST, for `field`.
    """
    text = text.strip()
    if text == "now":
        return now
    if match := _RFC_3339.fullmatch(text):
        return _absolute(match, text, field)
    unsigned = text.removeprefix("-") if text.startswith("-") else text.removeprefix("+")
    if len(text) > _LENGTH_MAX or not _DURATION.match(unsigned):
        raise invalid(
            field,
            f"{_shown(text)} is not a time",
            advice="write a time such as 2026-03-01T12:00:00Z, or -2h for two hours ago",
        )
    distance = _nanoseconds(unsigned, field)
    return _since_1970(now + distance if text.startswith("+") else now - distance, text, field)


def _nanoseconds(text: str, field: str) -> int:
    # Whole nanoseconds throughout: 0.1s + 0.2s in floats would not be 300ms.
    text = text.strip()
    if len(text) > _LENGTH_MAX or not _DURATION.match(text):
        raise invalid(
            field,
            f"{_shown(text)} is not a duration",
            advice=f"write {text}s"
            if text.isdecimal()
            else "write a duration such as 90s or 1h30m",
        )
    total = 0
    for whole, fraction, unit in _DURATION_PART.findall(text):
        total += int(whole + fraction) * _NANOSECONDS[unit] // 10 ** len(fraction)
    if total > DURATION_MAX_S * NANOSECONDS_PER_S:
        raise invalid(field, f"{_shown(text)} is longer than 36500d")
    return total


def _absolute(match: re.Match[str], text: str, field: str) -> Instant:
    date, time, fraction, offset = match[1], match[2], match[3] or "", match[4].upper()
    try:
        moment = datetime.fromisoformat(f"{date}T{time}{offset.replace('Z', '+00:00')}")
    except ValueError as error:
        raise invalid(field, f"{_shown(text)} is not a time: {error}") from error
    whole_s = (moment - _EPOCH) // timedelta(seconds=1)
    return _since_1970(whole_s * NANOSECONDS_PER_S + int(fraction.ljust(9, "0")), text, field)


def _since_1970(nanoseconds: int, text: str, field: str) -> Instant:
    if nanoseconds < 0:
        raise invalid(field, f"{_shown(text)} is before 1970")
    return Instant(nanoseconds)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LENGTH_MAX else text[: _LENGTH_MAX - 1] + "…")
