"""Moves an older database on, with alembic."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection


def upgrade(conn: Connection, revision: str) -> None:
    """Carry out every revision up to `revision`, inside the transaction of `conn`."""
    config = Config(attributes={"connection": conn})
    config.set_main_option("script_location", str(Path(__file__).parent))
    command.upgrade(config, revision)
