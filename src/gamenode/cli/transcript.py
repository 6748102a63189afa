"""A step's log on its way to the reader: from stored lines to text, raw bytes or objects."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from gamenode.cli import terminal
from gamenode.cli.output import Body, Column, Output, View, field
from gamenode.domain.log import LogLine, LogStream
from gamenode.lib.clock import Instant
from gamenode.wire import cri


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a log is to look."""

    stream: LogStream | None = None
    timestamps: bool = False
    raw: bool = False
    """The step's own bytes, and nothing else."""


LINES = View(
    columns=(
        Column("OFFSET", field("offset"), width=8),
        Column("TIME", field("time"), width=30),
        Column("STREAM", field("stream"), width=8),
        Column("TEXT", lambda line: line.get("text", line.get("base64"))),
        Column("NEXT_OFFSET", field("next_offset"), wide=True),
        Column("PARTIAL", field("partial"), wide=True),
    ),
    name=lambda line: str(line["offset"]),
)


class Transcript:
    """Writes one log after another. Takes whole lines, as they are stored."""

    def __init__(self, output: Output, style: Style, *, to_stderr: bool = False) -> None:
        """Write text to standard output, or beside a result to standard error."""
        self._output = output
        self._style = style
        self._to_stderr = to_stderr
        self._safe = not style.raw and output.on_terminal(stderr=to_stderr)
        self._rows = None
        if not (to_stderr or style.raw or output.format.for_people):
            self._rows = output.rows(LINES)
        self._unended: LogStream | None = None
        self._line_open = False
        self._coloured = False

    def write(self, lines: bytes, offset: int) -> None:
        """Write lines that begin at `offset` of their log."""
        style = self._style
        if self._rows is not None:
            for line in cri.parse(lines, offset, stream=style.stream):
                self._rows.write(body_of(line))
            return
        chosen = lines if style.stream is None else cri.select(lines, style.stream)
        if style.timestamps:
            text = self._stamped(chosen)
        else:
            text = cri.strip(chosen, records=not style.raw)
        if not text:
            return
        if self._safe:
            self._coloured = self._coloured or b"\x1b[" in text
            text = terminal.neutralise(text)
        self._output.bytes(text, to_stderr=self._to_stderr)
        self._line_open = not text.endswith(b"\n")

    def pause(self) -> None:
        """Leave a terminal as others expect it: at a line's start, without colours."""
        if self._safe and (self._line_open or self._coloured):
            reset = terminal.RESET.encode() if self._coloured else b""
            end = b"\n" if self._line_open else b""
            self._output.bytes(reset + end, to_stderr=self._to_stderr)
        self._line_open = self._coloured = False
        self._unended = None

    def _stamped(self, lines: bytes) -> bytes:
        parts: list[bytes] = []
        for line in cri.parse(lines):
            # A piece goes on where its stream stopped, unless the other stream came between.
            if self._unended is not line.stream:
                if self._unended is not None:
                    parts.append(b"\n")
                parts.append(lines[line.offset : line.offset + cri.STAMP_BYTES] + b" ")
            parts.append(line.text if line.partial else line.text + b"\n")
            self._unended = line.stream if line.partial else None
        return b"".join(parts)


def body_of(line: LogLine) -> Body:
    """Return a line in the shape of the HTTP interface."""
    body: dict[str, Any] = {
        "offset": line.offset,
        "next_offset": line.next_offset,
        "time": cri.stamp(Instant(line.at_ns)).decode(),
        "stream": str(line.stream),
        "partial": line.partial,
    }
    try:
        body["text"] = line.text.decode()
    except UnicodeDecodeError:
        body["base64"] = base64.b64encode(line.text).decode()
    return body
