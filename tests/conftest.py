"""Fixtures for every test."""

from tests.support.databases import (
    database_url,
    open_database,
    postgres_server,
    postgres_url,
    sqlite_url,
)
from tests.support.engine import engine, podman
from tests.support.registry import registry

__all__ = [
    "database_url",
    "engine",
    "open_database",
    "podman",
    "postgres_server",
    "postgres_url",
    "registry",
    "sqlite_url",
]
