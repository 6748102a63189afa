"""Writes that are one group for certain."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from gamenode.server.db.database import Database
from gamenode.server.db.group_commit import Work

_HOLD_S = 30.0


class HeldWriter:
    """Keeps the writer busy: `async with HeldWriter(database)`. What is written meanwhile waits."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._gate = threading.Event()

    async def __aenter__(self) -> None:
        self._holding = asyncio.create_task(
            self._database.write(lambda _: self._gate.wait(_HOLD_S))
        )
        await asyncio.sleep(0)  # the task's first step hands the work to the writer

    async def __aexit__(self, *_: object) -> None:
        self._gate.set()
        await self._holding


async def write_together(database: Database, *works: Work) -> list[Any]:
    """Write all `works` in one group; return the result or the exception of each."""
    async with HeldWriter(database):
        tasks = [asyncio.create_task(database.write(work)) for work in works]
        await asyncio.sleep(0)
    return await asyncio.gather(*tasks, return_exceptions=True)
