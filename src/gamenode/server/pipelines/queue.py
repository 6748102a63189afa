"""Rows of what waits for a node, and of why: functions of a connection.

Pipelines that ask for the same share a demand: it is judged once a look, and its reasons are one
row, however many of them wait.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

import msgspec
from sqlalchemy import (
    Connection,
    and_,
    bindparam,
    delete,
    exists,
    func,
    literal_column,
    or_,
    select,
)

from gamenode.domain.pipeline import Waiting
from gamenode.domain.placement import Demand, Explained
from gamenode.lib.clock import Instant
from gamenode.server.db import schema
from gamenode.server.db.upsert import insert_or_replace

_pipelines: Final = schema.pipelines.c
_reasons: Final = schema.waiting.c


def pack_demand(demand: Demand) -> tuple[str, str]:
    """Return a demand as a row keeps it: its id, the same for equal demands, and its text."""
    packed = msgspec.json.encode(demand, order="deterministic")
    return sha256(packed).hexdigest(), packed.decode()


@lru_cache(maxsize=4096)
def unpack_demand(packed: str) -> Demand:
    """Return the demand that a row keeps."""
    return msgspec.json.decode(packed, type=Demand)


@dataclass(frozen=True, slots=True)
class Queued:
    """A pipeline that waits for a node."""

    id: str
    demand_id: str
    position: tuple[int, Instant, str]
    """Its place in the queue: priority (higher first), then creation, then id."""


_QUEUED: Final = (
    _pipelines.status == literal_column("'PENDING'"),
    _pipelines.node_id == literal_column("''"),
)
_DEMAND_IDS: Final = select(_pipelines.demand_id).where(*_QUEUED).distinct()
_DEMAND: Final = (
    select(_pipelines.demand)
    .where(*_QUEUED, _pipelines.demand_id == bindparam("of_demand"))
    .limit(1)
)


def queued_demands(conn: Connection, known: Mapping[str, Demand]) -> dict[str, Demand]:
    """Return each distinct demand of what waits for a node, by id; `known` need not be read."""
    found: dict[str, Demand] = {}
    for demand_id in conn.scalars(_DEMAND_IDS).all():
        demand = known.get(demand_id)
        if demand is None:
            packed = conn.scalar(_DEMAND, {"of_demand": demand_id})
            if packed is None:
                continue  # it was bound meanwhile
            demand = unpack_demand(packed)
        found[demand_id] = demand
    return found


_NEXT: Final = (
    select(_pipelines.id, _pipelines.demand_id, _pipelines.priority, _pipelines.created_at)
    .where(*_QUEUED, _pipelines.demand_id.not_in(bindparam("of_hidden", expanding=True)))
    .order_by(_pipelines.priority.desc(), _pipelines.created_at, _pipelines.id)
    .limit(bindparam("limit_to"))
)
_NEXT_BEHIND: Final = _NEXT.where(
    or_(
        _pipelines.priority < bindparam("of_priority"),
        and_(
            _pipelines.priority == bindparam("of_priority"),
            _pipelines.created_at > bindparam("of_created_at"),
        ),
        and_(
            _pipelines.priority == bindparam("of_priority"),
            _pipelines.created_at == bindparam("of_created_at"),
            _pipelines.id > bindparam("of_pipeline"),
        ),
    )
)


def queued(
    conn: Connection, hidden: Collection[str], limit: int, after: Queued | None
) -> list[Queued]:
    """Return what waits behind `after`, but for some demands: higher priority first, then older."""
    of: dict[str, object] = {"limit_to": limit, "of_hidden": list(hidden)}
    if after is not None:
        priority, created_at, pipeline_id = after.position
        of |= {
            "of_priority": priority,
            "of_created_at": created_at,
            "of_pipeline": pipeline_id,
        }
    rows = conn.execute(_NEXT if after is None else _NEXT_BEHIND, of)
    return [Queued(row.id, row.demand_id, (row.priority, row.created_at, row.id)) for row in rows]


def demand(conn: Connection, pipeline_id: str) -> Demand:
    """Return what a pipeline asks for."""
    return unpack_demand(
        conn.execute(select(_pipelines.demand).where(_pipelines.id == pipeline_id)).scalar_one()
    )


def place(conn: Connection, pipeline_id: str) -> tuple[int, int]:
    """Return how many wait before a pipeline that waits for a node, and how many wait in all."""
    its = schema.pipelines.alias().c
    before = exists().where(
        its.id == pipeline_id,
        or_(
            _pipelines.priority > its.priority,
            and_(
                _pipelines.priority == its.priority,
                or_(
                    _pipelines.created_at < its.created_at,
                    and_(_pipelines.created_at == its.created_at, _pipelines.id < its.id),
                ),
            ),
        ),
    )
    waiting = select(func.count()).select_from(schema.pipelines).where(*_QUEUED)
    return conn.scalar(waiting.where(before)) or 0, conn.scalar(waiting) or 0


def explained(conn: Connection) -> dict[str, Explained]:
    """Return why the pipelines of each demand wait, as it was written down."""
    rows = conn.execute(select(schema.waiting))
    return {row.demand_id: (row.message, unpack_waiting(row.reasons)) for row in rows}


def explain(conn: Connection, reasons: Mapping[str, Explained], gone: Collection[str]) -> None:
    """Write down why the pipelines of these demands wait, and that those of others do not."""
    if gone:
        conn.execute(delete(schema.waiting).where(_reasons.demand_id.in_(gone)))
    if reasons:
        conn.execute(
            insert_or_replace(conn, schema.waiting, ("message", "reasons")),
            [
                {
                    "demand_id": demand_id,
                    "message": message,
                    "reasons": msgspec.to_builtins(entries),
                }
                for demand_id, (message, entries) in reasons.items()
            ],
        )


def unpack_waiting(reasons: Any) -> tuple[Waiting, ...]:
    """Return the reasons that a row keeps."""
    return msgspec.convert(reasons, tuple[Waiting, ...])
