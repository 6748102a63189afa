"""Fixtures for every test."""

from tests.support.databases import (
    database_url,
    open_database,
    postgres_server,
    postgres_url,
    sqlite_url,
)

__all__ = ["database_url", "open_database", "postgres_server", "postgres_url", "sqlite_url"]
