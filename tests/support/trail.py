"""What became of the server's rows, in the order of the commits: kept by the database itself.

Triggers write down each change of a status, a binding or a session, so that what the server did is
judged by a record that its code knows nothing of.
"""

from __future__ import annotations

import functools
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection
from tests.support.plane import SPEAKER, ControlPlane

from gamenode.agent.runtime import RunKey
from gamenode.domain.command import Dispatch
from gamenode.lib.clock import Instant, SystemClock
from gamenode.server.db.database import Database, DatabaseSettings

T = TypeVar("T")

_TRAIL = """
CREATE TABLE trail (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL, subject TEXT NOT NULL, was TEXT NOT NULL, became TEXT NOT NULL,
    was_bound TEXT NOT NULL, bound TEXT NOT NULL
);
CREATE TRIGGER trail_of_pipelines AFTER UPDATE ON pipelines
WHEN OLD.status <> NEW.status OR OLD.attempt <> NEW.attempt OR OLD.node_id <> NEW.node_id
    OR OLD.reason <> NEW.reason
BEGIN INSERT INTO trail (kind, subject, was, became, was_bound, bound) VALUES (
    'pipeline', NEW.id, OLD.status, NEW.status,
    OLD.node_id || '/' || OLD.attempt, NEW.node_id || '/' || NEW.attempt); END;
CREATE TRIGGER trail_of_steps AFTER UPDATE ON steps
WHEN OLD.status <> NEW.status OR OLD.attempt <> NEW.attempt OR OLD.reason <> NEW.reason
BEGIN INSERT INTO trail (kind, subject, was, became, was_bound, bound) VALUES (
    'step', NEW.pipeline_id || '/' || NEW.name, OLD.status, NEW.status, OLD.attempt, NEW.attempt);
END;
CREATE TRIGGER trail_of_grants AFTER UPDATE ON steps WHEN OLD.granted_from <> NEW.granted_from
BEGIN INSERT INTO trail (kind, subject, was, became, was_bound, bound)
SELECT 'grant', NEW.pipeline_id || '/' || NEW.name, OLD.granted_from, NEW.granted_from, '',
    node_id || '/' || attempt FROM pipelines WHERE id = NEW.pipeline_id; END;
CREATE TRIGGER trail_of_cancels AFTER UPDATE ON pipelines
WHEN OLD.cancel_requested_at IS NULL AND NEW.cancel_requested_at IS NOT NULL
BEGIN INSERT INTO trail (kind, subject, was, became, was_bound, bound)
VALUES ('cancel', NEW.id, '', NEW.cancel_requested_at, '', ''); END;
CREATE TRIGGER trail_of_fences AFTER INSERT ON node_conditions WHEN NEW.type = 'FENCED'
BEGIN INSERT INTO trail (kind, subject, was, became, was_bound, bound) VALUES (
    'fence', NEW.node_id, '', NEW.since, '', ''); END;
CREATE TRIGGER trail_of_nodes AFTER UPDATE ON nodes
WHEN OLD.session_epoch <> NEW.session_epoch OR OLD.state_version <> NEW.state_version
    OR OLD.online <> NEW.online OR OLD.link <> NEW.link
BEGIN INSERT INTO trail (kind, subject, was, became, was_bound, bound) VALUES (
    'node', NEW.id, OLD.session_id, NEW.session_id, OLD.session_epoch, NEW.session_epoch); END;
"""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a row."""

    kind: str
    """`pipeline`, `step`, `grant`, `cancel`, `fence` or `node`."""
    subject: str
    was: str
    """The status before; of a node, the session's id; of a grant, its first try."""
    became: str
    """The same, afterwards; of a cancel or a fence, its instant."""
    was_bound: str
    """`node/attempt`, of a grant too; of a step, the attempt; of a node, the session's epoch."""
    bound: str


class Bindings:
    """To which dispatch each try was granted, and which dispatches count as dead since when."""

    def __init__(self, changes: Iterable[Change]) -> None:
        """Know what `changes`, all of them in their order, tell."""
        self._grants: defaultdict[str, list[tuple[int, Dispatch]]] = defaultdict(list)
        self.fenced_at: dict[Dispatch, Instant] = {}
        """When the host of a dispatch was said to be dead, if it was (RA1)."""
        bound: defaultdict[str, set[Dispatch]] = defaultdict(set)
        for change in changes:
            if change.kind == "grant":
                node_id, _, attempt = change.bound.rpartition("/")
                dispatch = Dispatch(change.subject.partition("/")[0], int(attempt))
                self._grants[change.subject].append((int(change.became), dispatch))
                bound[node_id].add(dispatch)
            elif change.kind == "fence":
                for dispatch in bound.pop(change.subject, ()):
                    self.fenced_at[dispatch] = Instant(int(change.became))

    def of(self, run: RunKey) -> Dispatch:
        """Return by which dispatch a run came to be."""
        grants = self._grants[f"{run.pipeline_id}/{run.step}"]
        return next(d for first, d in reversed(grants) if first <= run.attempt)


def prepare(path: Path) -> None:
    """Make a server's database that keeps a trail."""
    path.write_bytes(_template())


@functools.cache
def _template() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gamenode.db"
        settings = DatabaseSettings(url=f"sqlite:///{path}")
        Database.open(settings, clock=SystemClock())._disconnect()
        with sqlite3.connect(path) as connection:
            connection.executescript(_TRAIL)
        connection.close()
        return path.read_bytes()


def read(conn: Connection, *, after: int = 0) -> list[Change]:
    """Return every change behind number `after`."""
    rows = conn.exec_driver_sql(
        "SELECT kind, subject, was, became, was_bound, bound FROM trail WHERE number > ?"
        " ORDER BY number",
        (after,),
    )
    return [Change(*row) for row in rows]


class Audit:
    """Watches the writes that a node's word causes: a superseded session must change nothing."""

    def __init__(self) -> None:
        """Have seen nothing."""
        self.violations: list[tuple[tuple[str, str], list[Change]]] = []
        """Who changed what, and must not have."""

    def watch(self, plane: ControlPlane) -> None:
        """Look at every write of this server that a session causes."""
        write = plane.database.write

        async def watched(fn: Callable[[Connection], T]) -> T:
            speaker = SPEAKER.get()
            if speaker is None:
                return await write(fn)
            return await write(lambda conn: self._audited(conn, fn, speaker))

        plane.database.write = watched  # type: ignore[method-assign]  # the test's own eyes

    def _audited(
        self, conn: Connection, fn: Callable[[Connection], T], speaker: tuple[str, str]
    ) -> T:
        node_id, session_id = speaker
        if _scalar(conn, "SELECT session_id FROM nodes WHERE id = ?", node_id) == session_id:
            return fn(conn)
        last = _scalar(conn, "SELECT coalesce(max(number), 0) FROM trail")
        result = fn(conn)
        if changes := read(conn, after=last):
            self.violations.append((speaker, changes))
        return result


def _scalar(conn: Connection, statement: str, *values: object) -> Any:
    return conn.exec_driver_sql(statement, values).scalar()
