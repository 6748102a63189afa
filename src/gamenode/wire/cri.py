r"""The CRI log line format, in which logs are stored and sent.

A line is `2026-11-24T21:58:21.123456789Z stdout F text\n`: when it was read, the stream, a tag,
the text. Tag F: the step ended the line. Tag P: it did not (yet); the newline is ours, and the text
goes on in the stream's next line. So every byte that a step wrote comes back, in order.

Bytes that were read together share one instant, so a block is framed by one replacement and
stripped by slicing at a constant width, without looking at its lines one by one.
"""

from __future__ import annotations

import re
import time
from calendar import timegm
from dataclasses import replace
from typing import Final

import xxhash

from gamenode.domain.log import CRI_PREFIX_BYTES, LogLine, LogPosition, LogStream
from gamenode.lib.clock import NANOSECONDS_PER_S, Instant

STAMP_BYTES: Final = 30
"""Length of the instant that a line begins with; stamps sort as text as they do in time."""

_SECOND_BYTES: Final = 19

_PREFIX: Final = re.compile(
    rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) (stdout|stderr|gamenode) ([FP]) "
)
# What makes a line other than `<stamp> std... F `, found fast by its leading literal. It may also
# stand inside a text: who finds it looks whether it begins at a line's 30th byte.
_UNUSUAL: Final = re.compile(rb"Z (?:stdout P |stderr P |gamenode [FP] )")
_STREAMS: Final = {stream.encode(): stream for stream in LogStream}
_NEWLINE: Final = ord("\n")
_UNUSUAL_COLUMN: Final = STAMP_BYTES - 1


def checksum(chunk: bytes) -> int:
    """Return the checksum that a chunk travels with: XXH3-64."""
    return xxhash.xxh3_64_intdigest(chunk)


def stamp(at: Instant) -> bytes:
    """Return an instant as it stands in a line: RFC 3339, UTC, nine digits."""
    seconds, nanoseconds = divmod(at, NANOSECONDS_PER_S)
    return b"%b.%09dZ" % (
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode(),
        nanoseconds,
    )


def frame(stream: LogStream, at: Instant, data: bytes) -> bytes:
    """Return `data`, all read at one instant from one stream, as lines."""
    if not data:
        return b""
    lead = b"%b %b " % (stamp(at), stream.encode())
    prefix = lead + b"F "
    end = data.rfind(b"\n") + 1
    pieces: list[bytes | memoryview] = []
    if end:
        whole = data if end == len(data) else data[:end]
        # The last newline draws a prefix behind it that no line follows.
        pieces += [prefix, memoryview(whole.replace(b"\n", b"\n" + prefix))[: -len(prefix)]]
    if end < len(data):
        pieces += [lead, b"P ", memoryview(data)[end:], b"\n"]
    return b"".join(pieces)


def frame_piece(
    stream: LogStream, at: Instant, data: bytes, start: int, framed_bytes_max: int
) -> tuple[int, bytes]:
    """Frame as much of `data` from `start` on as fits; return where it ends, and the lines.

    Cut at a newline, but for a line that is too long by itself.
    """
    # Lines of 70 bytes and more fit at the first try.
    size = framed_bytes_max * 5 // 8
    while True:
        end = min(len(data), start + size)
        if end < len(data):
            end = data.rfind(b"\n", start, end) + 1 or end
        framed = frame(stream, at, data[start:end])
        if len(framed) <= framed_bytes_max:
            return end, framed
        size = max(1, (end - start) * framed_bytes_max // len(framed) * 15 // 16)


def advance(
    position: LogPosition, stream: LogStream, data_bytes: int, framed: bytes
) -> LogPosition:
    """Return how far the streams have been read after `data_bytes` of one, framed as `framed`."""
    # Each ended line adds a prefix; a last one that is not ended adds a newline as well.
    lines = (len(framed) - data_bytes) // CRI_PREFIX_BYTES
    if framed and (len(framed) - data_bytes) % CRI_PREFIX_BYTES:
        lines -= 1
    match stream:
        case LogStream.STDOUT:
            return replace(
                position,
                stdout_bytes=position.stdout_bytes + data_bytes,
                stdout_lines=position.stdout_lines + lines,
            )
        case LogStream.STDERR:
            return replace(
                position,
                stderr_bytes=position.stderr_bytes + data_bytes,
                stderr_lines=position.stderr_lines + lines,
            )
        case LogStream.GAMENODE:
            return position


def advance_framed(position: LogPosition, framed: bytes) -> tuple[LogPosition, int]:
    """Return how far the streams have been read after these lines, and how many bytes are lines.

    It ends at the first byte that no whole, well-formed line explains: a file that was cut by a
    power loss may end anyhow.
    """
    count = {LogStream.STDOUT: [0, 0], LogStream.STDERR: [0, 0], LogStream.GAMENODE: [0, 0]}
    start = 0
    while (end := framed.find(b"\n", start) + 1) and (match := _PREFIX.match(framed, start, end)):
        counted = count[_STREAMS[match[2]]]
        whole = match[3] == b"F"
        counted[0] += end - match.end() - (not whole)
        counted[1] += whole
        start = end
    stdout, stderr = count[LogStream.STDOUT], count[LogStream.STDERR]
    reached = LogPosition(
        stdout_bytes=position.stdout_bytes + stdout[0],
        stdout_lines=position.stdout_lines + stdout[1],
        stderr_bytes=position.stderr_bytes + stderr[0],
        stderr_lines=position.stderr_lines + stderr[1],
    )
    return reached, start


def parse(block: bytes, offset: int = 0, *, stream: LogStream | None = None) -> list[LogLine]:
    """Return the lines of a block that begins at `offset` of its log; of one stream if asked.

    A last line may lack its newline. A line that is not in the format comes back whole, as one of
    the stream `gamenode` without a time, since the bytes are an agent's word.
    """
    lines: list[LogLine] = []
    start = 0
    prefix, line_stream, partial, at = b"", LogStream.GAMENODE, False, 0
    while start < len(block):
        end = block.find(b"\n", start) + 1 or len(block)
        text_end = end - 1 if block[end - 1] == _NEWLINE else end
        # Lines that were read together share their prefix.
        if not prefix or not block.startswith(prefix, start, text_end):
            match = _PREFIX.match(block, start, text_end)
            read_at = _instant(match[1]) if match is not None else None
            if match is None or read_at is None:
                prefix, line_stream, partial, at = b"", LogStream.GAMENODE, False, 0
            else:
                prefix, line_stream, partial = match[0], _STREAMS[match[2]], match[3] == b"P"
                at = read_at
        if stream is None or line_stream is stream:
            text = block[start + len(prefix) : text_end]
            lines.append(
                LogLine(
                    at_ns=at,
                    stream=line_stream,
                    partial=partial,
                    text=text,
                    offset=offset + start,
                    next_offset=offset + end,
                )
            )
        start = end
    return lines


def strip(block: bytes, *, records: bool = False) -> bytes:
    """Return what the steps wrote, byte for byte, from a block of whole lines.

    With `records`, lines about the log itself (drops, gaps) are in it too, each a line of its own.
    """
    parts: list[bytes] = []
    start = 0
    for match in _UNUSUAL.finditer(block):
        line = match.start() - _UNUSUAL_COLUMN
        if line < start or (line > 0 and block[line - 1] != _NEWLINE):
            continue  # it stands inside a text
        parts.append(_strip_usual(block[start:line]))
        end = block.find(b"\n", match.end()) + 1 or len(block)
        if match[0].startswith(b"Z std"):
            parts.append(block[match.end() : end - 1])
        elif records:
            parts.append(block[match.end() : end])
        start = end
    if not parts:
        return _strip_usual(block)
    parts.append(_strip_usual(block[start:]))
    return b"".join(parts)


def select(block: bytes, stream: LogStream) -> bytes:
    """Return the lines of one stream, still framed, from a block of whole lines."""
    wanted = b"Z %b " % stream.encode()
    others = [b"Z %b " % other.encode() for other in LogStream if other is not stream]
    if not any(other in block for other in others):
        return block
    width = _UNUSUAL_COLUMN
    lines = [line for line in block.split(b"\n") if line.startswith(wanted, width)]
    return b"\n".join([*lines, b""]) if lines else b""


def _strip_usual(block: bytes) -> bytes:
    width = CRI_PREFIX_BYTES
    return b"\n".join([line[width:] for line in block.split(b"\n")])


def _instant(stamped: bytes) -> Instant | None:
    try:
        second = time.strptime(stamped[:_SECOND_BYTES].decode(), "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return None  # such as the 30th of February
    return Instant(timegm(second) * NANOSECONDS_PER_S + int(stamped[_SECOND_BYTES + 1 : -1]))
