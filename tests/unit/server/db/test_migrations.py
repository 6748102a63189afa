from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, create_engine, inspect, make_url, text

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import SystemClock
from gamenode.server.db import migrations, schema
from gamenode.server.db.database import Database, DatabaseSettings
from gamenode.server.db.migrations.upgrade import upgrade


def connect(url: str) -> Connection:
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return create_engine(parsed, poolclass=NullPool).connect()


def open_at(url: str) -> Database:
    return Database.open(DatabaseSettings(url=url), clock=SystemClock())


def shape(conn: Connection) -> dict[str, Any]:
    found = inspect(conn)
    return {
        table: (
            [{**column, "type": str(column["type"])} for column in found.get_columns(table)],
            found.get_pk_constraint(table),
            [
                {**index, "dialect_options": list(map(str, index["dialect_options"].values()))}
                for index in found.get_indexes(table)
            ],
        )
        for table in sorted(found.get_table_names())
    }


def test_the_head_is_the_newest_revision() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [migrations.HEAD]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_created_and_an_upgraded_database_are_the_same(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    urls = [f"sqlite:///{tmp_path / name}" for name in ("created", "upgraded")]
    if kind == "postgresql":
        server = request.getfixturevalue("postgres_server")
        urls = [server.new_database(), server.new_database()]
    await open_at(urls[0]).aclose()
    with connect(urls[1]) as conn:
        upgrade(conn, migrations.HEAD)
        conn.commit()
    with connect(urls[0]) as created, connect(urls[1]) as upgraded:
        assert shape(created) == shape(upgraded)
        for table in ("alembic_version", "database_meta"):
            rows = text(f"SELECT * FROM {table}")
            assert created.execute(rows).all() == upgraded.execute(rows).all()
    await open_at(urls[1]).aclose()


async def test_a_new_database_has_every_table(database_url: str) -> None:
    await open_at(database_url).aclose()
    with connect(database_url) as conn:
        assert set(schema.metadata.tables) < set(inspect(conn).get_table_names())


async def test_a_newer_database_is_refused_and_stays_as_it_is(database_url: str) -> None:
    await open_at(database_url).aclose()
    with connect(database_url) as conn:
        conn.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        conn.commit()
    with pytest.raises(GameNodeError, match="9999") as refused:
        open_at(database_url)
    assert refused.value.code is ErrorCode.CONFLICT
    assert refused.value.hint
    with connect(database_url) as conn:
        assert conn.scalar(text("SELECT version_num FROM alembic_version")) == "9999"


async def test_a_database_of_another_build_is_refused_with_advice(database_url: str) -> None:
    await open_at(database_url).aclose()
    with connect(database_url) as conn:
        conn.execute(text("ALTER TABLE nodes DROP COLUMN note"))
        conn.commit()
    with pytest.raises(GameNodeError, match=r"another build.*nodes") as refused:
        open_at(database_url)
    assert refused.value.code is ErrorCode.CONFLICT
    assert "empty data folder" in refused.value.hint


def test_a_database_of_another_program_is_refused_and_stays_as_it_is(database_url: str) -> None:
    with connect(database_url) as conn:
        conn.execute(text("CREATE TABLE theirs (id INTEGER)"))
        conn.commit()
    with pytest.raises(GameNodeError) as refused:
        open_at(database_url)
    assert refused.value.code is ErrorCode.CONFLICT
    with connect(database_url) as conn:
        assert inspect(conn).get_table_names() == ["theirs"]


def test_a_database_that_cannot_be_reached_is_unavailable(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/absent/x.db", f"postgresql://x@/x?host={tmp_path}"):
        with pytest.raises(GameNodeError) as refused:
            open_at(url)
        assert refused.value.code is ErrorCode.UNAVAILABLE
        assert "cannot be opened: " in refused.value.message


@pytest.mark.parametrize("url", ["nonsense", "mysql://x/y", "sqlite://", "sqlite:///:memory:"])
def test_a_url_that_cannot_work_is_refused_with_advice(url: str) -> None:
    with pytest.raises(GameNodeError) as refused:
        open_at(url)
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert "sqlite:///" in refused.value.hint


def test_opening_sqlite_imports_neither_alembic_nor_psycopg(sqlite_url: str) -> None:
    program = f"""
import sys
from gamenode.lib.clock import SystemClock
from gamenode.server.db.database import Database, DatabaseSettings
for _ in range(2):
    Database.open(DatabaseSettings(url={sqlite_url!r}), clock=SystemClock())
sys.exit(" ".join({{"alembic", "psycopg"}} & set(sys.modules)) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(Path(migrations.__file__).parents[4])},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
