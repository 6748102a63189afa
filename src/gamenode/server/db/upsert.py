"""INSERT statements that bear with a row that is there, for both databases."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Insert, Table
from sqlalchemy.dialects import postgresql, sqlite


def insert_new(conn: Connection, table: Table) -> Insert:
    """Return an INSERT that leaves a row alone whose key is there already."""
    if conn.dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


def insert_or_replace(conn: Connection, table: Table, columns: Sequence[str]) -> Insert:
    """Return an INSERT that gives a row whose key is there already these columns anew."""
    key = list(table.primary_key.columns)
    if conn.dialect.name == "postgresql":
        to_postgres = postgresql.insert(table)
        return to_postgres.on_conflict_do_update(
            index_elements=key, set_={name: to_postgres.excluded[name] for name in columns}
        )
    to_sqlite = sqlite.insert(table)
    return to_sqlite.on_conflict_do_update(
        index_elements=key, set_={name: to_sqlite.excluded[name] for name in columns}
    )
