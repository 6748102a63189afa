"""The server's side of logs, on both databases: what was answered is there after a restart."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from tests.support.logs import KEY, NODE, chunks

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import AppendAnswer, LogKey, LogPosition, LogStream, relative_path
from gamenode.lib.clock import SystemClock
from gamenode.server.db.database import Database
from gamenode.server.logs.media.files import LogFiles
from gamenode.server.logs.service import LogService, LogSettings, set_final
from gamenode.wire import cri

OpenDatabase = Callable[..., Awaitable[Database]]

LOG = chunks(
    [
        (LogStream.STDOUT, b"one\n"),
        (LogStream.STDERR, b"two\n"),
        (LogStream.STDOUT, b"three\nfour"),
        (LogStream.STDOUT, b"!\n"),
    ]
)
BYTES = b"".join(chunk for _, chunk, _ in LOG)
ENDS = [offset + len(chunk) for offset, chunk, _ in LOG]


class Setup:
    """A log service that can be restarted on its folder and database."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.folder = folder
        self.services: list[LogService] = []
        self.restart()

    def restart(self, settings: LogSettings | None = None) -> LogService:
        files = LogFiles(self.folder)
        self.service = LogService(self.database, files, settings=settings or LogSettings())
        self.services.append(self.service)
        return self.service

    @property
    def path(self) -> Path:
        return self.folder / f"{relative_path(KEY)}.log"

    async def append(
        self, offset: int, chunk: bytes, position: LogPosition, key: LogKey = KEY
    ) -> AppendAnswer:
        return await self.service.append(
            key,
            node_id=NODE,
            offset=offset,
            chunk=chunk,
            checksum=cri.checksum(chunk),
            position=position,
            now=SystemClock().now(),
        )

    async def append_all(self) -> None:
        for offset, chunk, position in LOG:
            await self.append(offset, chunk, position)

    async def ask(self, key: LogKey = KEY) -> AppendAnswer:
        return await self.append(0, b"", LogPosition(), key)

    async def set_final(self, length_bytes: int, sha256: bytes) -> None:
        await self.database.write(
            lambda conn: set_final(
                conn,
                KEY,
                node_id=NODE,
                length_bytes=length_bytes,
                sha256=sha256,
                now=SystemClock().now(),
            )
        )
        await self.service.ended(KEY)


@pytest_asyncio.fixture
async def setup(
    database_url: str, open_database: OpenDatabase, tmp_path: Path
) -> AsyncIterator[Setup]:
    setup = Setup(await open_database(database_url), tmp_path / "logs")
    yield setup
    for service in setup.services:
        await service.close()


def expected(number: int) -> AppendAnswer:
    """Return the answer after the first `number` chunks."""
    if number == 0:
        return AppendAnswer(next_offset=0, position=LogPosition(), hash=sha256(b""))
    return AppendAnswer(
        next_offset=ENDS[number - 1],
        position=LOG[number - 1][2],
        hash=sha256(BYTES[: ENDS[number - 1]]),
    )


def sha256(log: bytes) -> bytes:
    return hashlib.sha256(log).digest()


async def test_each_answer_tells_where_to_go_on_and_what_stands_before(setup: Setup) -> None:
    assert await setup.ask() == expected(0)
    assert not setup.folder.exists()
    for number, sent in enumerate(LOG, 1):
        assert await setup.append(*sent) == expected(number)
    assert await setup.ask() == expected(4)
    assert setup.path.read_bytes() == BYTES


async def test_chunks_sent_together_are_taken_in_turn(setup: Setup) -> None:
    answers = await asyncio.gather(*(setup.append(*sent) for sent in LOG))
    assert answers == [expected(number) for number in range(1, 5)]


async def test_bytes_that_are_stored_already_are_skipped(setup: Setup) -> None:
    await setup.append(*LOG[0])
    assert await setup.append(*LOG[0]) == expected(1)
    overlapping = LOG[0][1] + LOG[1][1]
    assert await setup.append(0, overlapping, LOG[1][2]) == expected(2)
    assert await setup.append(*LOG[0]) == expected(2)
    assert setup.path.read_bytes() == BYTES[: ENDS[1]]


async def test_a_gap_is_not_stored(setup: Setup) -> None:
    assert await setup.append(*LOG[1]) == expected(0)
    await setup.append(*LOG[0])
    assert await setup.append(*LOG[3]) == expected(1)
    assert setup.path.read_bytes() == BYTES[: ENDS[0]]


async def test_a_wrong_checksum_is_refused_and_nothing_stored(setup: Setup) -> None:
    with pytest.raises(GameNodeError, match="checksum") as refused:
        await setup.service.append(
            KEY,
            node_id=NODE,
            offset=0,
            chunk=b"x",
            checksum=1,
            position=LogPosition(),
            now=SystemClock().now(),
        )
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert await setup.ask() == expected(0)


async def test_another_nodes_log_is_refused(setup: Setup) -> None:
    await setup.append(*LOG[0])
    with pytest.raises(GameNodeError) as refused:
        await setup.service.append(
            KEY,
            node_id="node-2",
            offset=0,
            chunk=b"",
            checksum=0,
            position=LogPosition(),
            now=SystemClock().now(),
        )
    assert refused.value.code is ErrorCode.PERMISSION_DENIED


@pytest.mark.parametrize("name", ["../etc", "a/b", "..", ""])
async def test_names_that_are_none_never_become_a_path(setup: Setup, name: str) -> None:
    for key in (LogKey(name, "build", 1), LogKey("abcd", name, 1)):
        with pytest.raises(GameNodeError) as refused:
            await setup.ask(key)
        assert refused.value.code is ErrorCode.INVALID_REQUEST


async def test_a_restarted_server_answers_as_before(setup: Setup) -> None:
    await setup.append(*LOG[0])
    await setup.append(*LOG[1])
    setup.restart()
    assert await setup.ask() == expected(2)
    assert await setup.append(*LOG[2]) == expected(3)


async def test_a_file_is_cut_to_what_was_answered(setup: Setup) -> None:
    await setup.append(*LOG[0])
    with setup.path.open("ab") as file:
        file.write(b"written, then the power went")
    setup.restart()
    assert await setup.append(*LOG[1]) == expected(2)
    assert setup.path.read_bytes() == BYTES[: ENDS[1]]


async def test_a_file_that_no_row_knows_of_is_cut_to_nothing(setup: Setup) -> None:
    setup.path.parent.mkdir(parents=True)
    setup.path.write_bytes(b"written, then the power went")
    assert await setup.append(*LOG[0]) == expected(1)
    assert setup.path.read_bytes() == BYTES[: ENDS[0]]


@pytest.mark.parametrize("left", [0, 5, None])
async def test_a_file_that_is_too_short_is_damage_and_never_padded(
    setup: Setup, caplog: pytest.LogCaptureFixture, left: int | None
) -> None:
    await setup.append_all()
    setup.restart()
    if left is None:
        setup.path.unlink()
    else:
        with setup.path.open("rb+") as file:
            file.truncate(left)
    with caplog.at_level(logging.ERROR):
        answer = await setup.append(ENDS[3], b"more", LOG[3][2])
    assert answer.stop
    assert answer.next_offset == ENDS[3]
    assert [record.event for record in caplog.records] == ["log.damaged"]  # type: ignore[attr-defined]
    assert (setup.path.read_bytes() if left is not None else b"") == BYTES[: left or 0]


async def test_a_full_disk_is_a_clean_refusal_and_the_log_goes_on_afterwards(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gamenode")
    await setup.append(*LOG[0])
    write = __import__("os").pwritev

    def half(descriptor: int, pieces: list[memoryview], offset: int) -> int:
        write(descriptor, [pieces[0][:5]], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.pwritev", half)
        for _ in range(2):
            with pytest.raises(GameNodeError) as refused:
                await setup.append(*LOG[1])
            assert refused.value.code is ErrorCode.STORAGE_FULL
            assert refused.value.retry_after_s
    assert await setup.append(*LOG[1]) == expected(2)
    assert setup.path.read_bytes() == BYTES[: ENDS[1]]
    said = [record.event for record in caplog.records]  # type: ignore[attr-defined] # ours
    assert said == ["logs.full", "logs.writable"]


async def test_what_could_not_be_synced_is_not_answered(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("os.fdatasync", broken)
        with pytest.raises(GameNodeError) as refused:
            await setup.append(*LOG[0])
    assert refused.value.code is ErrorCode.UNAVAILABLE
    assert await setup.ask() == expected(0)
    assert await setup.append(*LOG[0]) == expected(1)


async def test_what_could_not_be_committed_is_not_answered(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    await setup.append(*LOG[0])

    async def failing(_: object) -> None:
        raise GameNodeError(ErrorCode.STORAGE_FULL, "the disk is full", retry_after_s=1.0)

    with monkeypatch.context() as patched:
        patched.setattr(setup.database, "write", failing)
        with pytest.raises(GameNodeError):
            await setup.append(*LOG[1])
    assert await setup.ask() == expected(1)
    assert await setup.append(*LOG[1]) == expected(2)
    assert setup.path.read_bytes() == BYTES[: ENDS[1]]


@pytest.mark.parametrize("known_before", [True, False])
async def test_a_log_takes_bytes_up_to_its_final_length_and_none_beyond(
    setup: Setup, *, known_before: bool
) -> None:
    if known_before:
        await setup.append(*LOG[0])
    await setup.set_final(ENDS[1], sha256(BYTES[: ENDS[1]]))
    await setup.append(*LOG[0])
    assert await setup.append(*LOG[1]) == expected(2)
    for _ in range(2):
        with pytest.raises(GameNodeError) as refused:
            await setup.append(*LOG[2])
        assert refused.value.code is ErrorCode.CONFLICT
    stored = await setup.service.stored(KEY)
    assert stored is not None
    assert stored.complete


async def test_a_final_length_that_only_the_row_knows_counts_too(setup: Setup) -> None:
    await setup.append(*LOG[0])
    other = Setup(setup.database, setup.folder)
    setup.services += other.services
    await other.set_final(ENDS[0], b"")
    with pytest.raises(GameNodeError) as first:
        await setup.append(*LOG[1])
    with pytest.raises(GameNodeError) as second:
        await setup.append(*LOG[1])
    assert [first.value.code, second.value.code] == [ErrorCode.UNAVAILABLE, ErrorCode.CONFLICT]
    assert setup.path.read_bytes() == BYTES[: ENDS[0]]


async def test_the_first_final_length_counts(setup: Setup) -> None:
    await setup.append(*LOG[0])
    await setup.set_final(ENDS[0], b"1" * 32)
    await setup.set_final(5000, b"2" * 32)
    stored = await setup.service.refresh(KEY)
    assert stored is not None
    assert (stored.final_length_bytes, stored.final_hash) == (ENDS[0], b"1" * 32)


async def test_a_hash_that_differs_from_the_nodes_is_reported(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    await setup.append_all()
    await setup.set_final(ENDS[3], sha256(BYTES))
    assert not caplog.records
    setup.restart()
    await setup.ask()
    setup.service._lanes[KEY].log.hash.update(b"a flipped bit")  # type: ignore[union-attr]
    await setup.service.ended(KEY)
    assert [record.event for record in caplog.records] == ["log.hash_differs"]  # type: ignore[attr-defined]


async def test_a_log_sent_with_a_status_is_stored_once(setup: Setup) -> None:
    now = SystemClock().now()
    first = await setup.service.store_inline(KEY, NODE, b"a\nb\n", now=now)
    again = await setup.service.store_inline(KEY, NODE, b"a\nb\n", now=now)
    assert first == again
    end = await setup.service.store_inline(KEY, NODE, b"a\nb\nc", now=now)
    log = setup.path.read_bytes()
    assert cri.strip(log) == b"a\nb\nc"
    assert (end.length_bytes, end.hash, end.complete) == (len(log), sha256(log), True)


async def test_only_so_many_logs_are_kept_open(setup: Setup) -> None:
    setup.restart(LogSettings(open_max=3))
    keys = [replace(KEY, attempt=attempt) for attempt in range(1, 9)]
    for sent in LOG:
        for key in keys:
            await setup.append(*sent, key)
    assert len(setup.service._lanes) == 3
    for key in keys:
        assert await setup.ask(key) == expected(4)


async def test_a_log_over_its_limit_is_not_wanted_any_more(setup: Setup) -> None:
    setup.restart(LogSettings(log_bytes_max=ENDS[0]))
    assert await setup.append(*LOG[0]) == expected(1)
    assert await setup.append(*LOG[1]) == replace(expected(1), stop=True)


async def test_what_waits_to_be_written_is_bounded(setup: Setup) -> None:
    setup.restart(LogSettings(waiting_bytes_max=len(LOG[0][1]) + 5))
    outcomes = await asyncio.gather(*(setup.append(*s) for s in LOG), return_exceptions=True)
    assert outcomes[0] == expected(1)
    for outcome in outcomes[1:]:
        assert isinstance(outcome, GameNodeError)
        assert outcome.code is ErrorCode.RESOURCE_EXHAUSTED
        assert outcome.retry_after_s
    assert await setup.append(*LOG[1]) == expected(2)


async def test_a_caller_that_goes_away_does_not_undo_its_chunk(setup: Setup) -> None:
    calling = asyncio.create_task(setup.append(*LOG[0]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert await setup.append(*LOG[1]) == expected(2)
