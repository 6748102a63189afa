from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from random import Random

import pytest

from gamenode.agent.masking import Masker, mask, masked
from gamenode.agent.runtime import LogBlock
from gamenode.domain.log import LogStream
from gamenode.domain.secret import masked_texts
from gamenode.lib.clock import Instant

AT = Instant(1)


def whole(data: bytes, texts: Sequence[bytes]) -> bytes:
    """Mask byte by byte, as one would on paper."""
    covered = {
        at + i
        for text in texts
        for at in range(len(data))
        if data.startswith(text, at)
        for i in range(len(text))
    }
    return bytes(
        ord("*") if i in covered and byte != ord("\n") else byte for i, byte in enumerate(data)
    )


def in_pieces(data: bytes, texts: Sequence[bytes], random: Random) -> bytes:
    masker, out, at = Masker(texts), b"", 0
    while at < len(data):
        step = random.choice((1, 1, 2, 3, 7, 30))
        passed, spans = masker.feed(data[at : at + step])
        at += step
        out += passed
        # What was let go never ends within a secret: reading may go on from any such place.
        assert all(not begin < len(out) < end for begin, end in occurrences(data, texts))
        assert all(0 <= begin < end <= len(passed) for begin, end in spans)
    return out + masker.finish()[0]


def occurrences(data: bytes, texts: Sequence[bytes]) -> list[tuple[int, int]]:
    return [
        (at, at + len(text))
        for text in texts
        for at in range(len(data))
        if data.startswith(text, at)
    ]


@pytest.mark.parametrize("seed", range(300))
def test_pieces_are_masked_like_the_whole_whatever_their_borders(seed: int) -> None:
    random = Random(seed)
    alphabet = random.choice((b"ab", b"ab\n", b"abc*\n"))
    secrets = [
        bytes(random.choices(alphabet, k=random.randint(4, 12))).decode()
        for _ in range(random.randint(1, 4))
    ]
    if random.random() < 0.5:
        secrets.append(secrets[0][1:-1] + "ab")  # one within or across another
    texts = masked_texts(secrets)
    parts = [bytes(random.choices(alphabet + b"xyz ", k=random.randint(0, 9))) for _ in range(12)]
    data = b"".join(part + random.choice([*texts, b""]) for part in parts)
    out = in_pieces(data, texts, random)
    assert out == whole(data, texts)
    assert len(out) == len(data)
    assert out.count(b"\n") == data.count(b"\n")


@pytest.mark.parametrize(
    ("printed", "seen"),
    [
        (b"token=hunter22;", b"token=********;"),
        (b"hunter2 is not it, hunter22 is", b"hunter2 is not it, ******** is"),
        (b"hunter22-admin", b"**************"),  # the longer of two that begin alike
        (b"hhunter22hunter22", b"h****************"),
        (b"xyhunter22dmin", b"************in"),  # two that overlap
        (b"nothing", b"nothing"),
    ],
)
def test_secrets_that_contain_or_overlap_each_other_leave_nothing(
    printed: bytes, seen: bytes
) -> None:
    texts = masked_texts(["hunter22", "hunter22-admin", "xyhunter", "ter22dm"])
    for size in range(1, len(printed) + 1):
        masker = Masker(texts)
        pieces = [printed[i : i + size] for i in range(0, len(printed), size)]
        assert b"".join(masker.feed(p)[0] for p in pieces) + masker.finish()[0] == seen


def test_a_secret_of_many_lines_is_masked_whole_and_line_by_line() -> None:
    texts = masked_texts(["-----KEY-----\nMIIBVgIB\nAAJBAK\n-----END-----\n"])
    printed = b"cat key\n-----KEY-----\nMIIBVgIB\nAAJBAK\n-----END-----\nline: MIIBVgIB\n"
    masker = Masker(texts)
    assert masker.feed(printed)[0] + masker.finish()[0] == (
        b"cat key\n*************\n********\n******\n*************\nline: ********\n"
    )


def test_a_flood_of_secrets_that_overlap_is_not_held_back_for_ever() -> None:
    masker = Masker([b"abab"])
    passed = b"".join(masker.feed(b"ab" * 4096)[0] for _ in range(40))
    assert masker.held_bytes <= 64 * 1024
    assert set(passed) == {ord("*")}
    assert set(passed + masker.finish()[0]) == {ord("*")}


def test_an_engines_words_are_masked() -> None:
    texts = masked_texts(["hunter22"])
    assert mask("bad env A=hunter22", texts) == "bad env A=********"
    assert mask("bad env A=hunter2", texts) == "bad env A=hunter2"
    assert mask("é \udcff", ()) == "é \udcff"


class Printed:
    """Blocks that a step prints when the test says so."""

    def __init__(self) -> None:
        self.coming: asyncio.Queue[tuple[LogStream, bytes] | None] = asyncio.Queue()
        self.closed = False

    def say(self, data: bytes, stream: LogStream = LogStream.STDOUT) -> None:
        self.coming.put_nowait((stream, data))

    def end(self) -> None:
        self.coming.put_nowait(None)

    async def blocks(self) -> AsyncIterator[LogBlock]:
        try:
            while (item := await self.coming.get()) is not None:
                yield LogBlock(stream=item[0], data=item[1], at=AT)
        finally:
            self.closed = True


async def test_the_streams_are_masked_apart_and_records_pass() -> None:
    printed = Printed()
    printed.say(b"a hunt")
    printed.say(b"er22", LogStream.STDERR)
    printed.say(b"a gap\n", LogStream.GAMENODE)
    printed.say(b"er22 b hunter22 c" + b"." * 20_000)
    printed.say(b" hunt")
    printed.end()
    got = [
        (b.stream, b.data.rstrip(b"."), b.masked)
        async for b in masked(printed.blocks(), [b"hunter22"], hold_s_max=5)
    ]
    assert got == [
        (LogStream.STDOUT, b"a ", ()),
        (LogStream.STDERR, b"er22", ()),
        (LogStream.GAMENODE, b"a gap\n", ()),
        (LogStream.STDOUT, b"******** b ******** c", ((0, 8), (11, 19))),
        (LogStream.STDOUT, b" ", ()),
        (LogStream.STDOUT, b"hunt", ()),
    ]


async def test_a_prompt_is_not_held_back_and_what_follows_it_is_masked_all_the_same() -> None:
    printed = Printed()
    seen = masked(printed.blocks(), [b"hunter22"], hold_s_max=0.01)
    printed.say(b"say h")
    assert (await anext(seen)).data == b"say "
    assert (await anext(seen)).data == b"h"  # though nothing follows
    printed.say(b"unter22 ok")
    printed.end()
    assert [b.data async for b in seen] == [b"******* ok"]


async def test_a_long_beginning_of_a_secret_waits_for_what_follows() -> None:
    printed = Printed()
    seen = masked(printed.blocks(), [b"hunter22"], hold_s_max=0.001)
    printed.say(b"hunt")
    coming = asyncio.ensure_future(anext(seen))
    done, _ = await asyncio.wait({coming}, timeout=0.05)
    assert not done
    printed.say(b"er22")
    assert (await coming).data == b"********"


async def test_reading_can_be_left_at_any_await() -> None:
    printed = Printed()
    seen = masked(printed.blocks(), [b"hunter22"], hold_s_max=5)
    printed.say(b"hunt")
    coming = asyncio.ensure_future(anext(seen))
    while printed.coming.qsize():  # noqa: ASYNC110 - what changes has no event
        await asyncio.sleep(0)
    coming.cancel()
    await asyncio.gather(coming, return_exceptions=True)
    assert printed.closed


def test_a_flood_takes_no_longer_than_other_output() -> None:
    for text in (b"aaaa", b"abab", b"ababa", b"aab" * 5000):
        flood = text[:3] * (1 << 18) if text.startswith(b"aab") else text * (1 << 18)
        masker = Masker([text])
        passed = masker.feed(flood)[0] + masker.finish()[0]
        assert len(passed) == len(flood)
        assert passed.count(b"*") >= len(flood) - len(text)
