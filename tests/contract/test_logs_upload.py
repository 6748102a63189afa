"""The agent's uploader against the server's service: whatever happens between them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio
from tests.support.logs import KEY, DirectLink, LossyLink, Output

from gamenode.agent.masking import Masker, masked
from gamenode.agent.runtime import LogBlock
from gamenode.agent.spool.logs import LogSpool
from gamenode.agent.uploader import LogLink, LogUploader, UploaderSettings
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import AppendAnswer, LogEnd, LogKey, LogPosition, LogStream, relative_path
from gamenode.domain.secret import masked_texts
from gamenode.server.db.database import Database
from gamenode.server.logs.media.files import LogFiles
from gamenode.server.logs.service import LogService, LogSettings
from gamenode.wire import cri

QUICK = UploaderSettings(
    idle_interval_s=0.02,
    chunk_bytes_max=4096,
    retry_first_s=0.002,
    retry_most_s=0.01,
)
EMPTY = LogEnd(length_bytes=0, hash=hashlib.sha256(b"").digest(), complete=True)

OpenDatabase = Callable[..., Awaitable[Database]]


class Setup:
    """A server, and agents that come and go on one spool folder."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder
        self.server = self.restarted_server()
        self.agents: list[LogUploader] = []

    @property
    def spool_folder(self) -> Path:
        return self._folder / "spool"

    @property
    def log_file(self) -> Path:
        return self._folder / "logs" / f"{relative_path(KEY)}.log"

    def restarted_server(self) -> LogService:
        return LogService(self._database, LogFiles(self._folder / "logs"), settings=LogSettings())

    def agent(self, link: LogLink, settings: UploaderSettings = QUICK) -> LogUploader:
        agent = LogUploader(
            link=link,
            spool=LogSpool(self.spool_folder, segment_bytes=8192),
            settings=settings,
            random=Random(1),
        )
        self.agents.append(agent)
        return agent

    def stored(self) -> bytes:
        return self.log_file.read_bytes()

    def stored_bytes(self) -> int:
        return self.log_file.stat().st_size if self.log_file.exists() else 0

    def spool_files(self) -> list[Path]:
        return sorted(path for path in self.spool_folder.rglob("*") if path.is_file())


@pytest_asyncio.fixture
async def setup(
    sqlite_url: str, open_database: OpenDatabase, tmp_path: Path
) -> AsyncIterator[Setup]:
    setup = Setup(await open_database(sqlite_url), tmp_path)
    yield setup
    for agent in setup.agents:
        await agent.close()
    await setup.server.close()


def noise(random: Random, blocks: int) -> Output:
    output = Output()
    for number in range(blocks):
        stream = random.choice([LogStream.STDOUT, LogStream.STDERR])
        ending = random.choice([b"\n", b"", b"\r\n"])
        output.print(b"%d " % number + random.randbytes(random.randrange(900)) + ending, stream)
    return output


def assert_exact(setup: Setup, output: Output) -> None:
    log = setup.stored()
    for stream in (LogStream.STDOUT, LogStream.STDERR):
        assert cri.strip(cri.select(log, stream)) == output.written(stream)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what changes has no event
            await asyncio.sleep(0.001)


async def test_a_step_that_prints_nothing_costs_no_file_and_no_call(setup: Setup) -> None:
    link = DirectLink(setup.server)
    agent = setup.agent(link)
    agent.begin(KEY, Output().end().source)
    assert await agent.finish(KEY, 5.0) == EMPTY
    await agent.forget(KEY)
    assert link.calls == []
    assert setup.spool_files() == []


@pytest.mark.parametrize("new", [True, False])
async def test_the_end_tells_length_and_hash_of_what_the_server_has(
    setup: Setup, *, new: bool
) -> None:
    link = DirectLink(setup.server)
    agent = setup.agent(link)
    output = noise(Random(2), 50).end()
    agent.begin(KEY, output.source, new=new)
    end = await agent.finish(KEY, 5.0)
    assert_exact(setup, output)
    log = setup.stored()
    assert end == LogEnd(length_bytes=len(log), hash=hashlib.sha256(log).digest(), complete=True)
    assert (link.calls[0][1] == 0) is not new, "only one who may have sent before asks first"
    assert all(length <= QUICK.chunk_bytes_max for _, length in link.calls)
    assert setup.spool_files() != []
    await agent.forget(KEY)
    assert setup.spool_files() == []


@pytest.mark.parametrize("seed", range(12))
async def test_no_byte_is_lost_or_doubled_on_a_bad_line(setup: Setup, seed: int) -> None:
    random = Random(seed)
    agent = setup.agent(LossyLink(setup.server, random))
    output = noise(random, 80).end()
    agent.begin(KEY, output.source, new=True)
    end = await agent.finish(KEY, 20.0)
    assert_exact(setup, output)
    assert end.complete
    assert end.hash == hashlib.sha256(setup.stored()).digest()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("loss", ["nothing", "the end of the spool", "the whole spool", "zeros"])
async def test_no_byte_is_lost_or_doubled_when_agents_restart(
    setup: Setup, seed: int, loss: str
) -> None:
    random = Random(seed)
    output = Output()
    for part in range(4):
        for number in range(20):
            stream = random.choice([LogStream.STDOUT, LogStream.STDERR])
            output.print(b"%d.%d " % (part, number) + random.randbytes(600) + b"\n", stream)
        agent = setup.agent(LossyLink(setup.server, random, loss_ratio=0.1))
        agent.begin(KEY, output.source)
        agent.begin(KEY, output.source)
        # Somewhere in what was printed last; less than that is sure to come, frames included.
        target = setup.stored_bytes() + random.randrange(12_000)
        await until(lambda target=target: setup.stored_bytes() >= target)  # type: ignore[misc]
        await agent.close()
        lose(setup, loss, random)
    output.end()
    agent = setup.agent(DirectLink(setup.server))
    agent.begin(KEY, output.source)
    end = await agent.finish(KEY, 10.0)
    assert_exact(setup, output)
    assert end == LogEnd(
        length_bytes=len(setup.stored()),
        hash=hashlib.sha256(setup.stored()).digest(),
        complete=True,
    )


SECRETS = masked_texts(["correct-horse-battery", "-----KEY-----\nMIIBVgIBADAN\n-----END-----\n"])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("loss", ["nothing", "the end of the spool", "the whole spool"])
async def test_no_secret_reaches_the_server_wherever_agents_go_on_reading(
    setup: Setup, seed: int, loss: str
) -> None:
    random = Random(seed)
    output = Output()

    def source(position: LogPosition, live: asyncio.Event) -> AsyncIterator[LogBlock]:
        blocks = (
            LogBlock(stream=block.stream, data=block.data, at=block.at)
            async for block in output.source(position, live)
        )
        return masked(blocks, SECRETS, hold_s_max=0.001)

    for _ in range(4):
        for _ in range(20):
            stream = random.choice([LogStream.STDOUT, LogStream.STDERR])
            # Long lines too: they are parted where there is no end of a line.
            between = [b"correct", b"-----KEY", b"\n" if seed % 2 else b"horse "]
            words = random.choices([*(SECRETS if seed % 2 else SECRETS[1:2]), *between], k=600)
            output.print(b"".join(words), stream)
        agent = setup.agent(LossyLink(setup.server, random, loss_ratio=0.1))
        agent.begin(KEY, source)
        target = setup.stored_bytes() + random.randrange(12_000)
        await until(lambda target=target: setup.stored_bytes() >= target)  # type: ignore[misc]
        await agent.close()
        lose(setup, loss, random)
    output.end()
    agent = setup.agent(DirectLink(setup.server))
    agent.begin(KEY, source)
    await agent.finish(KEY, 10.0)
    log = setup.stored()
    for stream in (LogStream.STDOUT, LogStream.STDERR):
        uploaded = cri.strip(cri.select(log, stream))
        masker = Masker(SECRETS)
        assert uploaded == masker.feed(output.written(stream))[0] + masker.finish()[0]
        assert not any(text in uploaded for text in SECRETS)


def lose(setup: Setup, loss: str, random: Random) -> None:
    """Do to the spool what a power loss may do: nothing of it was fsynced."""
    files = setup.spool_files()
    match loss:
        case "the end of the spool" if files:
            size = files[-1].stat().st_size
            with files[-1].open("rb+") as file:
                file.truncate(random.randrange(size + 1))
        case "the whole spool":
            for file_path in files:
                file_path.unlink()
        case "zeros" if files:
            with files[-1].open("ab") as file:
                file.write(bytes(300))
        case _:
            pass


async def test_after_a_restart_what_is_in_the_spool_is_not_read_again(setup: Setup) -> None:
    down = Unreachable()
    first = setup.agent(down)
    output = noise(Random(3), 30)
    first.begin(KEY, output.source)
    await until(lambda: spooled(setup) >= 30)
    await first.close()
    spooled_bytes = b"".join(path.read_bytes() for path in setup.spool_files())
    second = setup.agent(DirectLink(setup.server))
    second.begin(KEY, output.end().source)
    await second.finish(KEY, 5.0)
    assert setup.stored().startswith(spooled_bytes)
    assert_exact(setup, output)


def spooled(setup: Setup) -> int:
    return sum(path.read_bytes().count(b"\n") for path in setup.spool_files())


class Unreachable:
    """A line that is down."""

    async def append_logs(
        self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
    ) -> AppendAnswer:
        del key, offset, chunk, position
        raise GameNodeError(ErrorCode.UNAVAILABLE, "no way to the server")


async def test_finish_tells_what_it_knows_when_the_server_cannot_be_reached(setup: Setup) -> None:
    class Repaired(DirectLink):
        down = True

        async def append_logs(
            self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
        ) -> AppendAnswer:
            if self.down:
                raise GameNodeError(ErrorCode.UNAVAILABLE, "no way to the server")
            return await super().append_logs(key, offset, chunk, position)

    link = Repaired(setup.server)
    agent = setup.agent(link)
    output = noise(Random(4), 5).end()
    agent.begin(KEY, output.source, new=True)
    known = await agent.finish(KEY, 0.05)
    assert not known.complete
    link.down = False
    await agent.finish(KEY, 5.0)
    log = setup.stored()
    assert known == LogEnd(length_bytes=len(log), hash=hashlib.sha256(log).digest(), complete=False)
    assert_exact(setup, output)


async def test_a_full_spool_leaves_the_output_where_it_is(setup: Setup) -> None:
    settings = replace(QUICK, spool_bytes_max=10_000)
    link = DirectLink(setup.server)
    down = Unreachable()
    output = Output((LogStream.STDOUT, b"x" * 999 + b"\n") for _ in range(100)).end()
    agent = setup.agent(down, settings)
    agent.begin(KEY, output.source, new=True)
    known = await agent.finish(KEY, 0.2)
    assert known == LogEnd(length_bytes=None, hash=b"", complete=False)
    assert sum(path.stat().st_size for path in setup.spool_files()) < 10_000 + 4096
    await agent.close()
    agent = setup.agent(link, settings)
    agent.begin(KEY, output.source)
    assert (await agent.finish(KEY, 5.0)).complete
    assert_exact(setup, output)


async def test_what_goes_beyond_a_logs_limit_is_dropped_and_a_record_says_so(setup: Setup) -> None:
    agent = setup.agent(DirectLink(setup.server), replace(QUICK, log_bytes_max=20_000))
    output = Output((LogStream.STDOUT, b"x" * 999 + b"\n") for _ in range(100)).end()
    agent.begin(KEY, output.source, new=True)
    end = await agent.finish(KEY, 5.0)
    log = setup.stored()
    assert end.complete
    assert output.written().startswith(cri.strip(log))
    assert 20_000 <= len(log) < 22_000
    (record,) = cri.parse(log, stream=LogStream.GAMENODE)
    assert b"20000 bytes" in record.text
    assert record.next_offset == len(log)


@pytest.mark.parametrize("code", [ErrorCode.PIPELINE_NOT_FOUND, ErrorCode.PERMISSION_DENIED])
async def test_nothing_more_is_sent_of_a_log_that_is_not_wanted(
    setup: Setup, code: ErrorCode
) -> None:
    class Unwanted(DirectLink):
        async def append_logs(
            self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
        ) -> AppendAnswer:
            if offset < 10_000:
                return await super().append_logs(key, offset, chunk, position)
            raise GameNodeError(code, "it never will be")

    agent = setup.agent(Unwanted(setup.server))
    agent.begin(KEY, noise(Random(5), 80).source, new=True)
    end = await agent.finish(KEY, 5.0)
    assert end.complete
    await agent.forget(KEY)
    assert setup.spool_files() == []


async def test_no_chunk_is_longer_than_the_server_takes(setup: Setup) -> None:
    agent = setup.agent(link := DirectLink(setup.server), replace(QUICK, chunk_bytes_max=65536))
    for told, longest in ((4096, 4096), (1 << 20, 65536), (0, 65536)):
        agent.obey_chunk_bytes_max(told)
        assert agent._shared.chunk_bytes_max == longest
    agent.obey_chunk_bytes_max(4096)
    output = noise(Random(5), 80)
    agent.begin(KEY, output.source, new=True)
    assert (await finished(agent, output)).complete
    assert max(length for _, length in link.calls) <= 4096
    assert_exact(setup, output)


async def test_a_server_that_went_back_gets_the_log_again_from_there(setup: Setup) -> None:
    link = DirectLink(setup.server)
    agent = setup.agent(link)
    output = noise(Random(6), 40)
    agent.begin(KEY, output.source, new=True)
    await until(lambda: setup.log_file.exists() and len(setup.stored()) > 10_000)
    await asyncio.sleep(0.05)
    # Another server, restored from an empty backup.
    link.service = LogService(
        setup._database, LogFiles(setup._folder / "restored"), settings=LogSettings()
    )
    await setup._database.write(lambda conn: conn.exec_driver_sql("DELETE FROM logs") and None)
    output.print(b"more\n")
    assert (await finished(agent, output)).complete
    restored = (setup._folder / "restored" / f"{relative_path(KEY)}.log").read_bytes()
    assert cri.strip(cri.select(restored, LogStream.STDOUT)) == output.written()
    await link.service.close()


async def finished(agent: LogUploader, output: Output) -> LogEnd:
    output.end()
    return await agent.finish(KEY, 5.0)


async def test_a_quiet_step_is_uploaded_in_intervals_and_a_followed_one_at_once(
    setup: Setup,
) -> None:
    link = DirectLink(setup.server)
    agent = setup.agent(link, replace(QUICK, idle_interval_s=60.0))
    output = Output([(LogStream.STDOUT, b"first\n")])
    agent.begin(KEY, output.source, new=True)
    await until(lambda: spooled(setup) == 1)
    await asyncio.sleep(0.02)
    assert link.calls == []
    agent.set_live(KEY.pipeline_id, KEY.step, live=True)
    await until(lambda: len(link.calls) == 1)
    output.print(b"second\n")
    await until(lambda: len(link.calls) == 2)
    agent.set_live(KEY.pipeline_id, KEY.step, live=False)
    output.print(b"third\n")
    await until(lambda: spooled(setup) == 3)
    await asyncio.sleep(0.02)
    assert len(link.calls) == 2
    assert (await finished(agent, output)).complete


async def test_an_unwritable_spool_delays_the_log_and_loses_nothing(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = 0

    def full(*_: object) -> int:
        nonlocal failed
        failed += 1
        raise OSError(28, "No space left on device")

    agent = setup.agent(DirectLink(setup.server))
    output = noise(Random(7), 20).end()
    with monkeypatch.context() as patched:
        patched.setattr("os.pwrite", full)
        agent.begin(KEY, output.source, new=True)
        await until(lambda: failed > 2)
    assert (await agent.finish(KEY, 5.0)).complete
    assert_exact(setup, output)
