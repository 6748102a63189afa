"""Keeps secrets out of logs: every byte of one that a step prints becomes `*` (rule RG3).

Masking stands between a run's output and its spool, so no later reader can undo it. It never moves
a byte: lengths, line breaks and offsets are those of what was printed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Final

from gamenode.agent.runtime import LogBlock
from gamenode.domain.log import LogStream
from gamenode.domain.secret import VALUE_BYTES_MIN

Span = tuple[int, int]
"""From a byte up to another one."""

_HELD_BYTES_MAX: Final = 64 * 1024
"""Beyond it a row of secrets that overlap is passed on in parts."""
_INLINE_BYTES_MAX: Final = 16 * 1024
"""Longer blocks are masked on a thread."""


class Masker:
    """Masks one stream of bytes, in pieces as they come.

    All its pieces together are what masking the whole would give. Bytes that may begin a secret are
    held back until more tells, so what was let go never ends within a secret.
    """

    def __init__(self, texts: Sequence[bytes]) -> None:
        """Mask `texts`, none of which is empty."""
        self._texts = texts
        self._rows: dict[bytes, re.Pattern[bytes]] = {}
        self._held = b""
        self._seen_bytes = 0
        """How much of the beginning of `_held` was let go before."""
        self._covered_bytes = 0
        """How much of its beginning belongs to a secret that began before it."""

    @property
    def held_bytes(self) -> int:
        """How many bytes are held back."""
        return len(self._held) - self._seen_bytes

    def feed(self, data: bytes) -> tuple[bytes, list[Span]]:
        """Take what was printed; return what can be let go, and which parts of it are masked."""
        raw = self._held + data
        spans = self._find(raw)
        keep = self._begun(raw)
        last = next((span for span in reversed(spans) if span[0] < keep), None)
        self._covered_bytes = 0
        if last is not None and keep < last[1]:
            if len(raw) - last[0] <= _HELD_BYTES_MAX:
                keep = last[0]
            else:
                self._covered_bytes = last[1] - keep
        return self._let_go(raw, max(keep, self._seen_bytes), spans, keep_from=keep)

    def let_go_short(self) -> bytes:
        """Return what is held if it is too short to tell a secret: nobody shall wait for it."""
        if self.held_bytes >= VALUE_BYTES_MIN or self._covered_bytes:
            return b""
        short = self._held[self._seen_bytes :]
        self._seen_bytes = len(self._held)
        return short

    def finish(self) -> tuple[bytes, list[Span]]:
        """Return the rest: nothing follows."""
        spans = self._find(self._held)
        return self._let_go(self._held, len(self._held), spans, keep_from=len(self._held))

    def _let_go(
        self, raw: bytes, end: int, spans: list[Span], *, keep_from: int
    ) -> tuple[bytes, list[Span]]:
        begin = self._seen_bytes
        masked = bytearray(raw[begin:end])
        inside = [(max(a, begin) - begin, min(b, end) - begin) for a, b in spans if a < end]
        inside = [(a, b) for a, b in inside if a < b]
        for a, b in inside:
            masked[a:b] = _stars(masked[a:b])
        self._held = raw[keep_from:]
        self._seen_bytes = max(0, begin - keep_from)
        return bytes(masked), inside

    def _find(self, raw: bytes) -> list[Span]:
        """Return where secrets are, in order; those that overlap are one span."""
        found = [(0, self._covered_bytes)] if self._covered_bytes else []
        for text in self._texts:
            at = raw.find(text)
            while at >= 0:
                end = at + self._row_bytes(text, raw, at)
                found.append((at, end))
                at = raw.find(text, end - len(text) + 1)
        found.sort()
        spans: list[Span] = []
        for begin, end in found:
            if spans and begin < spans[-1][1]:
                spans[-1] = (spans[-1][0], max(spans[-1][1], end))
            else:
                spans.append((begin, end))
        return spans

    def _row_bytes(self, text: bytes, raw: bytes, at: int) -> int:
        """Return how long a row of `text`, found at `at`, is: each overlaps the next by the most.

        Without rows, a flood of `aaaa` would be looked at once for each of its bytes.
        """
        row = self._rows.get(text)
        if row is None:
            period = text[-_period(text) :]
            row = self._rows[text] = re.compile(b"(?:%b)*+" % re.escape(period))
        match = row.match(raw, at + len(text))
        assert match is not None
        return match.end() - at

    def _begun(self, raw: bytes) -> int:
        """Return from where on the bytes may be the beginning of a secret that goes on."""
        first = len(raw)
        for text in self._texts:
            at = raw.find(text[:1], max(0, len(raw) - len(text) + 1), first)
            while at >= 0 and not text.startswith(raw[at:]):
                at = raw.find(text[:1], at + 1, first)
            first = min(first, at) if at >= 0 else first
        return first


def _period(text: bytes) -> int:
    """Return by how many bytes, at least, `text` can be moved to lie upon itself."""
    borders = [0] * len(text)
    border = 0
    for at in range(1, len(text)):
        while border and text[at] != text[border]:
            border = borders[border - 1]
        border += text[at] == text[border]
        borders[at] = border
    return len(text) - border


def _stars(part: bytes | bytearray) -> bytes:
    # Line breaks stay: an engine's log is resumed by lines.
    return b"\n".join(b"*" * len(line) for line in part.split(b"\n"))


def mask(text: str, texts: Sequence[bytes]) -> str:
    """Return `text`, such as an engine's words for a failure, without secrets."""
    if not texts:
        return text
    masker = Masker(texts)
    raw = text.encode(errors="surrogateescape")
    masked = masker.feed(raw)[0] + masker.finish()[0]
    # Stars may stand for a part of what was no text; then each byte of it was masked as well.
    return masked.decode(errors="replace")


async def masked(
    blocks: AsyncIterator[LogBlock], texts: Sequence[bytes], *, hold_s_max: float
) -> AsyncIterator[LogBlock]:
    """Yield `blocks` with `texts` masked in each of the two streams.

    The beginning of a secret is held back, but a short one at most for `hold_s_max`: it may be all
    that a step prints before it waits.
    """
    maskers = {stream: Masker(texts) for stream in (LogStream.STDOUT, LogStream.STDERR)}
    coming: asyncio.Future[LogBlock] | None = None
    try:
        block: LogBlock | None = None
        while True:
            coming = asyncio.ensure_future(anext(blocks))
            if any(masker.held_bytes for masker in maskers.values()):
                await asyncio.wait({coming}, timeout=hold_s_max)
                if not coming.done() and block is not None:
                    for stream, masker in maskers.items():
                        if short := masker.let_go_short():
                            yield LogBlock(stream=stream, data=short, at=block.at)
            try:
                block = await coming
            except StopAsyncIteration:
                break
            if block.stream is LogStream.GAMENODE:
                yield block
                continue
            masker, data = maskers[block.stream], block.data
            if len(data) <= _INLINE_BYTES_MAX:
                passed, spans = masker.feed(data)
            else:
                passed, spans = await asyncio.to_thread(masker.feed, data)
            if passed:
                yield LogBlock(stream=block.stream, data=passed, at=block.at, masked=tuple(spans))
        for stream, masker in maskers.items():
            rest, spans = masker.finish()
            if rest and block is not None:
                yield LogBlock(stream=stream, data=rest, at=block.at, masked=tuple(spans))
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})
            _ = coming.cancelled() or coming.exception()
        if isinstance(blocks, AsyncGenerator):
            await blocks.aclose()
