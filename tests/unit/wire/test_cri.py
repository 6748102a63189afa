from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gamenode.domain.log import CRI_PREFIX_BYTES, LogPosition, LogStream
from gamenode.lib.clock import Instant
from gamenode.wire import cri

AT = Instant(1_795_557_501_123_456_789)
STAMP = b"2026-11-24T21:58:21.123456789Z"

steps = st.sampled_from([LogStream.STDOUT, LogStream.STDERR])
# Bytes that look like framing are the ones that could be taken for it.
awkward = st.sampled_from(
    [
        b"\n",
        b"\r\n",
        b"\x00\xff",
        b"Z stdout P ",
        b"Z gamenode F x",
        STAMP + b" stdout P ",
        b"\n" + STAMP + b" stderr F ",
        b"text",
    ]
)
output = st.one_of(st.binary(max_size=60), st.lists(awkward, max_size=8).map(b"".join))
blocks = st.lists(st.tuples(steps, st.integers(0, 3), output), max_size=12)


def framed(parts: list[tuple[LogStream, int, bytes]]) -> list[bytes]:
    return [cri.frame(stream, Instant(AT + tick), data) for stream, tick, data in parts]


def written(parts: list[tuple[LogStream, int, bytes]], stream: LogStream) -> bytes:
    return b"".join(data for of, _, data in parts if of is stream)


def test_a_line_looks_as_the_format_says() -> None:
    assert cri.frame(LogStream.STDERR, AT, b"one\ntwo") == (
        STAMP + b" stderr F one\n" + STAMP + b" stderr P two\n"
    )
    assert len(STAMP) == cri.STAMP_BYTES
    assert len(STAMP + b" stderr F ") == CRI_PREFIX_BYTES


@given(blocks)
def test_every_byte_comes_back_however_the_output_is_split(
    parts: list[tuple[LogStream, int, bytes]],
) -> None:
    log = b"".join(framed(parts))
    for stream in (LogStream.STDOUT, LogStream.STDERR):
        assert cri.strip(cri.select(log, stream)) == written(parts, stream)
        lines = cri.parse(log, stream=stream)
        assert b"".join(line.text + b"\n" * (not line.partial) for line in lines) == written(
            parts, stream
        )
    assert cri.strip(log) == b"".join(data for _, _, data in parts)


@given(blocks)
def test_lines_know_where_they_stand_and_when_they_were_read(
    parts: list[tuple[LogStream, int, bytes]],
) -> None:
    log = b"".join(framed(parts))
    lines = cri.parse(log, 1000)
    assert [line.offset for line in lines] == [1000, *(line.next_offset for line in lines)][
        : len(lines)
    ]
    assert not lines or lines[-1].next_offset == 1000 + len(log)
    read_at = [
        AT + tick
        for _, tick, data in parts
        for _ in cri.parse(cri.frame(LogStream.STDOUT, AT, data))
    ]
    assert [line.at_ns for line in lines] == read_at


@given(blocks)
def test_positions_derived_from_a_log_are_those_counted_while_it_was_written(
    parts: list[tuple[LogStream, int, bytes]],
) -> None:
    counted = LogPosition()
    for stream, _, data in parts:
        framed_data = cri.frame(stream, AT, data)
        counted = cri.advance(counted, stream, len(data), framed_data)
    log = b"".join(framed(parts))
    assert cri.advance_framed(LogPosition(), log) == (counted, len(log))


@given(blocks, st.binary(max_size=50).filter(lambda tail: not tail.startswith(STAMP[:2])))
def test_a_torn_end_is_not_taken_for_lines(
    parts: list[tuple[LogStream, int, bytes]], torn: bytes
) -> None:
    log = b"".join(framed(parts))
    assert cri.advance_framed(LogPosition(), log + torn)[1] == len(log)
    cut = log[: max(0, len(log) - 1)]
    assert cri.advance_framed(LogPosition(), cut)[1] == cut.rfind(b"\n") + 1


def cut(data: bytes, most: int) -> list[tuple[bytes, bytes]]:
    pieces, start = [], 0
    while start < len(data):
        end, lines = cri.frame_piece(LogStream.STDOUT, AT, data, start, most)
        pieces.append((data[start:end], lines))
        start = end
    return pieces


@given(output, st.integers(100, 300))
def test_pieces_are_the_output_and_fit_when_framed(data: bytes, most: int) -> None:
    pieces = cut(data * 5, most)
    assert b"".join(piece for piece, _ in pieces) == data * 5
    assert all(cri.strip(lines) == piece for piece, lines in pieces)
    assert all(0 < len(lines) <= most for _, lines in pieces)


def test_pieces_end_at_newlines_where_there_are_any() -> None:
    pieces = [piece for piece, _ in cut(b"some text\n" * 100 + b"end", 1000)]
    assert len(pieces) > 1
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])


def test_records_about_the_log_are_not_what_a_step_wrote() -> None:
    log = (
        cri.frame(LogStream.STDOUT, AT, b"a\n")
        + cri.frame(LogStream.GAMENODE, AT, b"dropped")
        + cri.frame(LogStream.STDOUT, AT, b"b\n")
    )
    assert cri.strip(log) == b"a\nb\n"
    assert cri.strip(log, records=True) == b"a\ndropped\nb\n"
    assert [line.stream for line in cri.parse(log)] == ["stdout", "gamenode", "stdout"]


@pytest.mark.parametrize(
    "line",
    [b"", b"\n", b"no frame\n", b"2026-02-30T00:00:00.000000000Z stdout F x\n", STAMP + b" stdout"],
)
def test_bytes_that_are_no_lines_are_given_as_they_are(line: bytes) -> None:
    lines = cri.parse(line)
    assert b"".join(parsed.text for parsed in lines) == line.removesuffix(b"\n")
    assert all(parsed.at_ns == 0 for parsed in lines)


def test_stamps_sort_as_their_instants_do() -> None:
    instants = [Instant(0), Instant(999_999_999), Instant(1_000_000_000), AT, Instant(AT + 1)]
    assert sorted(map(cri.stamp, instants)) == list(map(cri.stamp, instants))
