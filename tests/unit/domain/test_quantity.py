from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.quantity import (
    DURATION_PATTERN,
    SIZE_PATTERN,
    parse_duration,
    parse_size,
    parse_time,
)
from gamenode.lib.clock import NANOSECONDS_PER_S, Instant

NOW = Instant(1_772_366_400 * NANOSECONDS_PER_S)  # 2026-03-01T12:00:00Z
HOUR = 3600 * NANOSECONDS_PER_S


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90.0),
        ("15m", 900.0),
        ("1h30m", 5400.0),
        ("2d", 172_800.0),
        ("7d12h", 648_000.0),
        ("500ms", 0.5),
        ("1m500ms", 60.5),
        ("1.5h", 5400.0),
        ("0s", 0.0),
        ("0.3s", 0.3),
        (" 5s ", 5.0),
        ("36500d", 36_500 * 86_400.0),
    ],
)
def test_a_duration_is_read_as_written(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "5",
            "-5s",
            "s",
            "1x",
            "30m1h",
            "1h1h",
            "1 h",
            "1h 30m",
            "1.s",
            ".5s",
            "٣s",
            "36501d",
        ),
        *("1e3s", "inf", "nan", "9" * 100 + "s", "1s\n\n2s"),
    ],
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(GameNodeError) as refusal:
        parse_duration(text, field="timeout")
    assert refusal.value.code is ErrorCode.INVALID_REQUEST
    assert refusal.value.violations[0].field == "timeout"


def test_a_duration_without_a_unit_is_advised_one() -> None:
    with pytest.raises(GameNodeError) as refusal:
        parse_duration("30")
    assert refusal.value.hint == "write 30s"


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("512m", 512 * 1024**2),
        ("2g", 2 * 1024**3),
        ("6GiB", 6 * 1024**3),
        ("1.5G", 3 * 1024**3 // 2),
        ("64 MB", 64 * 1024**2),
        ("1k", 1024),
        ("1kb", 1024),
        ("10b", 10),
        ("4096", 4096),
        ("0", 0),
        ("2T", 2 * 1024**4),
        ("1PiB", 1024**5),
    ],
)
def test_a_size_is_read_as_written(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "m", "-1m", "1x", "1ib", "1.5b", "0.3k", "1 2m", "9" * 30, "9999999P", "1e3", "٣m"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(GameNodeError) as refusal:
        parse_size(text, field="memory")
    assert refusal.value.violations[0].field == "memory"


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("now", NOW),
        ("-2h", NOW - 2 * HOUR),
        ("2h", NOW - 2 * HOUR),
        ("+2h", NOW + 2 * HOUR),
        ("2026-03-01T12:00:00Z", NOW),
        ("2026-03-01t13:00:00+01:00", NOW),
        ("2026-03-01 12:00:00.123456789Z", NOW + 123_456_789),
        ("2026-03-01T12:00:00.5Z", NOW + 500_000_000),
        ("1970-01-01T00:00:00Z", 0),
        ("9999-12-31T23:59:59-23:59", 253_402_387_139 * NANOSECONDS_PER_S),
    ],
)
def test_a_time_is_read_as_written(text: str, at: int) -> None:
    assert parse_time(text, NOW) == at


@pytest.mark.parametrize(
    "text",
    [
        *("", "yesterday", "--2h", "-+2h", "2026-03-01", "2026-03-01T12:00:00", "x" * 10_000),
        *("1969-12-31T23:59:59Z", "-36500d", "2026-03-01T12:00:00.1234567890Z"),
        "2026-02-30T00:00:00Z",
    ],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(GameNodeError) as refusal:
        parse_time(text, NOW, field="since")
    assert refusal.value.violations[0].field == "since"


@given(
    st.tuples(*[st.integers(0, 999)] * 5).filter(any),
)
def test_a_duration_is_the_sum_of_its_parts(parts: tuple[int, ...]) -> None:
    text = "".join(
        f"{n}{unit}" for n, unit in zip(parts, ("d", "h", "m", "s", "ms"), strict=True) if n
    )
    milliseconds = sum(
        n * factor
        for n, factor in zip(parts, (86_400_000, 3_600_000, 60_000, 1_000, 1), strict=True)
    )
    assert parse_duration(text) == milliseconds / 1000


@given(st.text(max_size=80) | st.from_regex(DURATION_PATTERN) | st.from_regex(SIZE_PATTERN))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_duration, parse_size, lambda t: parse_time(t, NOW)):
        with suppress(GameNodeError):
            parse(text)


@given(
    st.text(alphabet="0123456789.dhms", max_size=12) | st.text(alphabet="019.kmgtpib ", max_size=8)
)
def test_the_published_patterns_refuse_nothing_that_is_read(text: str) -> None:
    for parse, pattern in ((parse_duration, DURATION_PATTERN), (parse_size, SIZE_PATTERN)):
        try:
            parse(text)
        except GameNodeError:
            continue
        assert re.search(pattern, text.strip())
