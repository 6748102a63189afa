"""Brings a database to this program's schema.

Alembic is imported only to move an older database on: a new one is made from `schema.metadata` and
stamped, and a current one costs one query.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    Column,
    Connection,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    insert,
    inspect,
    select,
)

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.server.db import schema
from gamenode.server.db.engines import DatabaseEngine

HEAD: Final = "0001"
"""The newest revision. Revisions are four digits, so that a later one sorts after."""

# Alembic's own table, as alembic itself makes it.
_version: Final = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


def migrate(conn: Connection, engine: DatabaseEngine) -> None:
    """Bring the schema to `HEAD`, in one transaction. Safe when several servers start at once.

    Raises:
        GameNodeError: CONFLICT; a newer program wrote this database, one of other tables, or no
            GameNode did.
    """
    if _revision(conn) == HEAD:
        _check_tables(conn)
        return
    conn.exec_driver_sql(engine.begin_write)
    try:
        engine.lock_migrations(conn)
        _migrate_locked(conn)
    except BaseException:
        conn.exec_driver_sql("ROLLBACK")
        raise
    conn.exec_driver_sql("COMMIT")


def _migrate_locked(conn: Connection) -> None:
    revision = _revision(conn)
    if revision is None:
        _create(conn)
    elif revision > HEAD:
        raise GameNodeError(
            ErrorCode.CONFLICT,
            f"the database has revision {revision}, and this program knows none after {HEAD}",
            hint="run the newer GameNode, or restore a backup that this one has made",
        )
    elif revision < HEAD:
        from gamenode.server.db.migrations.upgrade import upgrade  # noqa: PLC0415 - slow to import

        upgrade(conn, HEAD)


def _revision(conn: Connection) -> str | None:
    """Return the schema's revision; None for an empty database."""
    tables = inspect(conn).get_table_names()
    if _version.name in tables:
        revision: str = conn.execute(select(_version.c.version_num)).scalar_one()
        return revision
    if tables:
        raise GameNodeError(
            ErrorCode.CONFLICT,
            "the database holds tables that are not GameNode's",
            hint="give GameNode a database of its own",
        )
    return None


def _check_tables(conn: Connection) -> None:
    """Refuse a database whose tables are not this program's, before a statement fails on one.

    Until the first release a revision may change without a new number.
    """
    held = {
        table: {column["name"] for column in columns}
        for (_, table), columns in inspect(conn).get_multi_columns().items()
    }
    other = [
        table.name
        for table in schema.metadata.sorted_tables
        if held.get(table.name) != {column.name for column in table.columns}
    ]
    if other:
        raise GameNodeError(
            ErrorCode.CONFLICT,
            "the database was made by another build of GameNode, whose tables were different: "
            + ", ".join(other),
            hint="go on with that build, or begin anew with an empty data folder or database",
        )


def _create(conn: Connection) -> None:
    schema.metadata.create_all(conn, checkfirst=False)
    conn.execute(insert(schema.database_meta).values(id=1, generation=1, events_purged_to=0))
    _version.create(conn)
    conn.execute(insert(_version).values(version_num=HEAD))
