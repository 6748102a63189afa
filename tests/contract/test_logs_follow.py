"""Readers of logs: each byte once and in order, from any place, until the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio
from tests.support.logs import KEY, NODE

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import LogKey, LogPosition, LogStream, relative_path
from gamenode.lib.clock import Instant, SystemClock
from gamenode.server.db.database import Database
from gamenode.server.logs.manager import LogManager, ManagerSettings
from gamenode.server.logs.media.files import LogFiles
from gamenode.server.logs.service import LogService, LogSettings, set_final
from gamenode.server.logs.streamer import From, LogStreamer, StreamerSettings
from gamenode.wire import cri

OpenDatabase = Callable[..., Awaitable[Database]]
START = From()


class Setup:
    """A log service, its readers' manager, and the step that it asks about."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.folder = folder
        files = LogFiles(folder)
        self.service = LogService(database, files, settings=LogSettings())
        self.streamer = LogStreamer(
            self.service,
            files,
            clock=SystemClock(),
            settings=StreamerSettings(
                block_bytes_max=512, line_bytes_max=2048, sweep_s=0.05, incomplete_s=0.1
            ),
        )
        self.finished = False
        self.live: list[bool] = []
        self.manager = LogManager(
            self.service,
            self.streamer,
            steps=self,
            on_live=self._on_live,
            settings=ManagerSettings(followers_max=200),
        )
        self.length = 0
        self.log = b""
        self.position = LogPosition()

    async def log_key(self, pipeline_id: str, step: str, attempt: int) -> LogKey:
        return LogKey(pipeline_id, step, attempt or 1)

    async def is_finished(self, key: LogKey) -> bool:
        assert key == KEY
        return self.finished

    def _on_live(self, pipeline_id: str, step: str, *, live: bool) -> None:
        assert (pipeline_id, step) == (KEY.pipeline_id, KEY.step)
        self.live.append(live)

    async def print(
        self, data: bytes, stream: LogStream = LogStream.STDOUT, at: int | None = None
    ) -> None:
        now = SystemClock().now()
        framed = cri.frame(stream, Instant(at) if at is not None else now, data)
        await self.append(framed)

    async def append(self, framed: bytes) -> None:
        await self.service.append(
            KEY,
            node_id=NODE,
            offset=len(self.log),
            chunk=framed,
            checksum=cri.checksum(framed),
            position=self.position,
            now=SystemClock().now(),
        )
        self.log += framed

    async def end(self, length_bytes: int | None = None) -> None:
        final = len(self.log) if length_bytes is None else length_bytes
        await self.database.write(
            lambda conn: set_final(
                conn,
                KEY,
                node_id=NODE,
                length_bytes=final,
                sha256=b"",
                now=SystemClock().now(),
            )
        )
        self.finished = True
        await self.manager.ended(KEY)

    async def read(self, start: From = START, *, follow: bool = False) -> bytes:
        return b"".join(
            [piece.data async for piece in self.manager.read(KEY, start, follow=follow)]
        )


@pytest_asyncio.fixture
async def setup(
    sqlite_url: str, open_database: OpenDatabase, tmp_path: Path
) -> AsyncIterator[Setup]:
    setup = Setup(await open_database(sqlite_url), tmp_path / "logs")
    async with asyncio.timeout(20):
        yield setup
    await setup.service.close()
    setup.streamer.close()


async def test_followers_see_every_byte_once_and_in_order_while_chunks_come(setup: Setup) -> None:
    random = Random(1)

    async def follow(delay: Callable[[], int]) -> bytes:
        seen = b""
        async with aclosing(setup.manager.read(KEY, START, follow=True)) as slices:
            async for piece in slices:
                assert piece.offset == len(seen)
                assert piece.data.endswith(b"\n")
                seen += piece.data
                for _ in range(delay()):
                    await asyncio.sleep(0)
        return seen

    followers = [
        asyncio.create_task(follow(lambda: random.randrange(40) if random.random() < 0.3 else 0))
        for _ in range(10)
    ]
    late: list[asyncio.Task[bytes]] = []
    for number in range(100):
        text = b"%d " % number + random.randbytes(random.randrange(300)) + b"\n"
        await setup.print(text, random.choice([LogStream.STDOUT, LogStream.STDERR]))
        if number % 30 == 0:
            late.append(asyncio.create_task(follow(lambda: 0)))
    await setup.end()
    for seen in await asyncio.gather(*followers, *late):
        assert seen == setup.log


async def test_a_stopping_server_breaks_followers_off_and_never_ends_a_log_that_goes_on(
    setup: Setup,
) -> None:
    await setup.print(b"first\n")
    async with aclosing(setup.manager.read(KEY, START, follow=True)) as slices:
        seen = (await anext(slices)).data
        setup.streamer.end_followers()
        with pytest.raises(GameNodeError) as broken:
            await anext(slices)
    assert broken.value.code is ErrorCode.UNAVAILABLE
    await setup.end()
    assert seen == setup.log == await setup.read(follow=True)  # a whole log has its own end


async def test_one_stalled_reader_stops_none_of_a_hundred(setup: Setup) -> None:
    await setup.print(b"first\n")
    stalled = setup.manager.read(KEY, START, follow=True)
    assert (await anext(stalled)).data == setup.log
    followers = [asyncio.create_task(setup.read(follow=True)) for _ in range(99)]
    for number in range(20):
        await setup.print(b"%d\n" % number * 50)
    await setup.end()
    assert set(await asyncio.gather(*followers)) == {setup.log}
    first = len(setup.log) - len(b"".join([piece.data async for piece in stalled]))
    assert first == len(cri.frame(LogStream.STDOUT, Instant(0), b"first\n"))


async def test_a_log_is_followed_from_before_its_first_byte(setup: Setup) -> None:
    following = asyncio.create_task(setup.read(follow=True))
    await asyncio.sleep(0.01)
    await setup.print(b"hello\n")
    await setup.end()
    assert await following == setup.log


@pytest.mark.parametrize("printed", [True, False])
async def test_following_ends_with_a_step_that_gave_no_length(
    setup: Setup, *, printed: bool
) -> None:
    if printed:
        await setup.print(b"hello\n")
    following = asyncio.create_task(setup.read(follow=True))
    await asyncio.sleep(0.01)
    setup.finished = True  # nobody tells: the sweep finds it
    assert await following == setup.log


async def test_bytes_that_come_just_before_the_end_are_followed(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def finished_after_a_last_line(key: LogKey) -> bool:
        if b"last" not in setup.log:
            await setup.print(b"last\n")
        return key == KEY

    monkeypatch.setattr(setup, "is_finished", finished_after_a_last_line)
    assert b"last" in await setup.read(follow=True)


async def test_following_ends_at_once_when_the_log_is_complete(setup: Setup) -> None:
    streamer = LogStreamer(
        setup.service,
        LogFiles(setup.folder),
        clock=SystemClock(),
        settings=StreamerSettings(sweep_s=60.0, incomplete_s=60.0),
    )
    await setup.print(b"hello\n")

    async def follow() -> bytes:
        return b"".join([p.data async for p in streamer.follow(KEY, START, setup.is_finished)])

    following = asyncio.create_task(follow())
    await asyncio.sleep(0.01)
    await setup.end()
    assert await following == await follow() == setup.log
    streamer.close()


async def test_following_waits_for_the_rest_of_a_log_and_not_for_ever(setup: Setup) -> None:
    await setup.print(b"hello\n")
    await setup.end(length_bytes=len(setup.log) * 2)
    following = asyncio.create_task(setup.read(follow=True))
    await asyncio.sleep(0.02)
    assert not following.done()
    await setup.print(b"hello\n")
    assert await following == setup.log
    other = await setup.read(From(offset=10), follow=True)
    assert other == setup.log[len(setup.log) // 2 :]


async def test_following_an_incomplete_log_ends(setup: Setup) -> None:
    await setup.print(b"hello\n")
    await setup.end(length_bytes=1000)
    assert await setup.read(follow=True) == setup.log


async def test_the_node_is_told_when_the_first_follower_comes_and_the_last_goes(
    setup: Setup,
) -> None:
    await setup.print(b"hello\n")
    first = setup.manager.read(KEY, START, follow=True)
    second = setup.manager.read(KEY, START, follow=True)
    await anext(first)
    await anext(second)
    assert setup.live == [True]
    assert setup.manager.is_live(KEY.pipeline_id, KEY.step)
    await first.aclose()
    assert setup.live == [True]
    await second.aclose()
    assert setup.live == [True, False]
    assert not setup.manager.is_live(KEY.pipeline_id, KEY.step)
    await setup.read()
    assert setup.live == [True, False]


async def test_followers_are_bounded(setup: Setup) -> None:
    await setup.print(b"hello\n")
    followers = [setup.manager.read(KEY, START, follow=True) for _ in range(201)]
    for follower in followers[:200]:
        await anext(follower)
    with pytest.raises(GameNodeError) as refused:
        await anext(followers[200])
    assert refused.value.code is ErrorCode.RESOURCE_EXHAUSTED
    for follower in followers:
        await follower.aclose()


async def test_a_log_of_which_nothing_is_known_is_empty(setup: Setup) -> None:
    assert await setup.read() == b""


async def numbered(setup: Setup, lines: int = 60) -> list[bytes]:
    """Print lines a second apart, stderr every third, and return them as they are stored."""
    for number in range(lines):
        stream = LogStream.STDERR if number % 3 == 0 else LogStream.STDOUT
        await setup.print(b"line %d\n" % number, stream, at=(1000 + number) * 10**9)
    return setup.log.splitlines(keepends=True)


async def test_reading_starts_at_the_first_line_from_an_offset_on(setup: Setup) -> None:
    lines = await numbered(setup)
    offset = 0
    for number, line in enumerate(lines):
        assert await setup.read(From(offset=offset)) == b"".join(lines[number:])
        assert await setup.read(From(offset=offset + 1)) == b"".join(lines[number + 1 :])
        offset += len(line)
    with pytest.raises(GameNodeError, match="offset"):
        await setup.read(From(offset=offset + 1))
    with pytest.raises(GameNodeError, match="offset"):
        await setup.read(From(offset=-1))


@pytest.mark.parametrize("tail", [0, 1, 7, 59, 60, 61, 1000])
async def test_the_tail_is_the_last_lines(setup: Setup, tail: int) -> None:
    lines = await numbered(setup)
    assert await setup.read(From(tail=tail)) == b"".join(lines[max(0, 60 - tail) :])


@pytest.mark.parametrize("tail", [1, 5, 20, 30])
async def test_the_tail_of_one_stream_counts_its_lines_only(setup: Setup, tail: int) -> None:
    await numbered(setup)
    log = await setup.read(From(tail=tail, stream=LogStream.STDERR))
    errors = cri.strip(cri.select(log, LogStream.STDERR)).splitlines()
    every = [b"line %d" % number for number in range(0, 60, 3)]
    assert errors == every[-tail:]


async def test_a_line_in_pieces_is_one_line_of_the_tail(setup: Setup) -> None:
    for piece in (b"before\n", b"one ", b"line ", b"in four ", b"pieces\n", b"not ended"):
        await setup.print(piece)
    assert cri.strip(await setup.read(From(tail=1))) == b"not ended"
    assert cri.strip(await setup.read(From(tail=2))) == b"one line in four pieces\nnot ended"


async def test_a_tail_is_found_behind_lines_longer_than_a_block(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gamenode.server.logs.streamer._TAIL_BYTES", 64)
    for number in range(6):
        await setup.print(b"%d" % number * 150 + b"\n")
    for tail in range(8):
        text = cri.strip(await setup.read(From(tail=tail)))
        assert text == b"".join(b"%d" % n * 150 + b"\n" for n in range(max(0, 6 - tail), 6))


async def test_reading_starts_at_the_first_line_since_an_instant(setup: Setup) -> None:
    lines = await numbered(setup)
    for number in range(60):
        for since, first in ((1000 + number, number), (1000.5 + number, number + 1)):
            start = From(since=Instant(round(since * 10**9)))
            assert await setup.read(start) == b"".join(lines[first:])
    assert await setup.read(From(since=Instant(0))) == setup.log


async def test_the_latest_of_several_places_counts(setup: Setup) -> None:
    lines = await numbered(setup)
    start = From(offset=len(lines[0]), tail=10, since=Instant(1055 * 10**9))
    assert await setup.read(start) == b"".join(lines[55:])


async def test_slices_are_whole_lines_unless_one_is_too_long(setup: Setup) -> None:
    await setup.print(b"a" * 400 + b"\n" + b"b" * 1500 + b"\n" + b"c" * 3000 + b"\nd\n")
    slices = [piece async for piece in setup.manager.read(KEY, START, follow=False)]
    assert b"".join(piece.data for piece in slices) == setup.log
    assert [piece.offset for piece in slices] == [0, *(p.next_offset for p in slices[:-1])]
    whole = [piece.data.endswith(b"\n") for piece in slices]
    assert whole.count(False) == 1
    assert all(len(piece.data) <= 2048 for piece in slices)


async def test_a_damaged_log_is_readable_up_to_the_damage(setup: Setup) -> None:
    for number in range(100):
        await setup.print(b"line %d\n" % number)
    path = setup.folder / f"{relative_path(KEY)}.log"
    with path.open("rb+") as file:
        file.truncate(2000)
    slices = setup.manager.read(KEY, START, follow=False)
    seen = [await anext(slices) for _ in range(4)]
    assert b"".join(piece.data for piece in seen) == setup.log[: seen[-1].next_offset]
    with pytest.raises(GameNodeError, match="damaged"):
        await anext(slices)
    assert 2000 - 512 < seen[-1].next_offset <= 2000
