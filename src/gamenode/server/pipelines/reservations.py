"""Rows of what is taken on nodes: functions of a connection.

A dispatch takes what it was given in the transaction that binds it. Only the agent's word frees it
(rule RA3): the end it states, its refusal, a statement that lacks it. Where a service lives on,
its instances keep what the dispatch had; the place in the concurrency group is free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import (
    Connection,
    Integer,
    Select,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal_column,
    select,
    update,
)

from gamenode.domain.command import Dispatch
from gamenode.domain.container import HostPort
from gamenode.domain.placement import Assignment, Demand, GpuReserved, Reserved, host_ports
from gamenode.server.db import schema
from gamenode.server.db.upsert import insert_new

_held: Final = schema.reservations.c
_groups: Final = schema.concurrency_groups.c
_OF_DISPATCH: Final = and_(
    _held.pipeline_id == bindparam("of_pipeline"), _held.attempt == bindparam("of_attempt")
)
_ON_NODE: Final = _held.node_id == bindparam("of_node")


# What is taken


def reserve(
    conn: Connection,
    dispatch: Dispatch,
    *,
    node_id: str,
    demand: Demand,
    assignment: Assignment,
    instance_ids: Sequence[str],
) -> None:
    """Take on a node what a dispatch was given there; `instance_ids` are what it may leave."""
    gpu = demand.gpu
    conn.execute(
        insert(schema.reservations),
        [
            {
                "pipeline_id": dispatch.pipeline_id,
                "attempt": dispatch.attempt,
                "node_id": node_id,
                "runs": True,
                "concurrency_group": demand.group.name if demand.group is not None else "",
                "cpu_millis": demand.cpu_millis,
                "memory_bytes": demand.memory_bytes,
                "gpu_id": assignment.gpu_id,
                "gpu_slots": gpu.slots if gpu is not None else 0,
                "gpu_memory_bytes": gpu.memory_bytes if gpu is not None else 0,
                "assigned_ports": list(assignment.ports),
                "ports": msgspec.to_builtins(host_ports(demand, assignment)),
                "ports_count": len(demand.ports) + len(assignment.ports),
                "instance_ids": list(instance_ids),
            }
        ],
    )


_ASSIGNMENT: Final = select(_held.gpu_id, _held.assigned_ports).where(_OF_DISPATCH)


def assignment(conn: Connection, dispatch: Dispatch) -> Assignment | None:
    """Return what a dispatch was given by name; None once it holds nothing any more."""
    row = conn.execute(_ASSIGNMENT, _of(dispatch)).first()
    return Assignment(gpu_id=row.gpu_id, ports=tuple(row.assigned_ports)) if row else None


_SUMS: Final = select(
    _held.node_id,
    func.sum(_held.runs.cast(Integer)).label("pipelines"),
    func.sum(_held.cpu_millis).label("cpu_millis"),
    func.sum(_held.memory_bytes).label("memory_bytes"),
).group_by(_held.node_id)
_GPUS: Final = (
    select(
        _held.node_id,
        _held.gpu_id,
        func.sum(_held.gpu_slots).label("slots"),
        func.sum(_held.gpu_memory_bytes).label("memory_bytes"),
    )
    .where(_held.gpu_id != literal_column("''"))
    .group_by(_held.node_id, _held.gpu_id)
)
_PORTS: Final = select(_held.node_id, _held.ports).where(_held.ports_count > literal_column("0"))


_Queries = tuple[Select[Any], Select[Any], Select[Any]]
_EVERYWHERE: Final[_Queries] = (_SUMS, _GPUS, _PORTS)


def reserved(conn: Connection) -> dict[str, Reserved]:
    """Return what is taken on each node; a node that is absent is empty."""
    return _reserved(conn, _EVERYWHERE, {})


_HERE: Final[_Queries] = (
    _SUMS.where(_ON_NODE),
    _GPUS.where(_ON_NODE),
    _PORTS.where(_ON_NODE),
)


def reserved_on(conn: Connection, node_id: str) -> Reserved:
    """Return what is taken on one node."""
    return _reserved(conn, _HERE, {"of_node": node_id}).get(node_id, Reserved())


def _reserved(conn: Connection, queries: _Queries, of: Mapping[str, object]) -> dict[str, Reserved]:
    sums, gpus, ports = queries
    gpus_on: dict[str, dict[str, GpuReserved]] = {}
    for row in conn.execute(gpus, of):
        on_node = gpus_on.setdefault(row.node_id, {})
        on_node[row.gpu_id] = GpuReserved(int(row.slots), int(row.memory_bytes))
    ports_on: dict[str, set[HostPort]] = {}
    for row in conn.execute(ports, of):
        ports_on.setdefault(row.node_id, set()).update(_host_ports(row.ports))
    return {
        row.node_id: Reserved(
            pipelines=int(row.pipelines),
            cpu_millis=int(row.cpu_millis),
            memory_bytes=int(row.memory_bytes),
            gpus=gpus_on.get(row.node_id, {}),
            ports=frozenset(ports_on.get(row.node_id, ())),
        )
        for row in conn.execute(sums, of)
    }


def _host_ports(stored: Iterable[Mapping[str, Any]]) -> Iterable[HostPort]:
    return (HostPort(**port) for port in stored)


_LOADS: Final = (
    select(_held.node_id, func.count().label("load")).where(_held.runs).group_by(_held.node_id)
)


def loads(conn: Connection) -> dict[str, int]:
    """Return how many dispatches may run on each node."""
    return {row.node_id: row.load for row in conn.execute(_LOADS)}


_IN_GROUPS: Final = (
    select(_held.concurrency_group, func.count().label("running"))
    .where(_held.concurrency_group != literal_column("''"))
    .group_by(_held.concurrency_group)
)


def running(conn: Connection) -> dict[str, int]:
    """Return how many dispatches of each concurrency group may run."""
    return {row.concurrency_group: row.running for row in conn.execute(_IN_GROUPS)}


_LOCK_GROUP: Final = (
    select(_groups.name).where(_groups.name == bindparam("of_group")).with_for_update()
)
_IN_GROUP: Final = (
    select(func.count())
    .select_from(schema.reservations)
    .where(
        _held.concurrency_group == bindparam("of_group"),
        _held.concurrency_group != literal_column("''"),
    )
)


def lock_group(conn: Connection, name: str) -> int:
    """Keep others out of a concurrency group until the commit; return how many of it may run."""
    conn.execute(insert_new(conn, schema.concurrency_groups), [{"name": name}])
    conn.execute(_LOCK_GROUP, {"of_group": name})
    return conn.scalar(_IN_GROUP, {"of_group": name}) or 0


# What is freed


_RELEASE: Final = delete(schema.reservations).where(_OF_DISPATCH)
_STOPPED: Final = (
    update(schema.reservations).where(_OF_DISPATCH).values(runs=False, concurrency_group="")
)
_INSTANCES: Final = select(_held.instance_ids).where(_OF_DISPATCH)


def release(conn: Connection, dispatch: Dispatch) -> None:
    """Free what a dispatch holds: nothing of it runs on its node, nor ever will."""
    conn.execute(_RELEASE, _of(dispatch))


def end(conn: Connection, dispatch: Dispatch) -> None:
    """Free what a dispatch holds that its agent has ended; a service may keep its part.

    Which of its instances live, the agent says after it knows that the end is on disk.
    """
    if conn.scalar(_INSTANCES, _of(dispatch)):
        conn.execute(_STOPPED, _of(dispatch))
    else:
        conn.execute(_RELEASE, _of(dispatch))


def release_node(conn: Connection, node_id: str) -> None:
    """Free everything on a node that is dead or gone."""
    conn.execute(delete(schema.reservations).where(_held.node_id == node_id))


def settle(
    conn: Connection, node_id: str, stays: Collection[Dispatch], living: Collection[str]
) -> bool:
    """Free what nothing lives of, by an agent's statement of all that lives; return if any was.

    `stays` are the dispatches that it holds, or is going to be sent.
    """
    freed = False
    rows = conn.execute(select(schema.reservations).where(_held.node_id == node_id)).all()
    for row in rows:
        dispatch = Dispatch(row.pipeline_id, row.attempt)
        if dispatch in stays:
            continue
        if not set(row.instance_ids).isdisjoint(living):
            freed |= row.runs
            conn.execute(_STOPPED, _of(dispatch))
        else:
            freed = True
            conn.execute(_RELEASE, _of(dispatch))
    return freed


def settle_ended(conn: Connection, node_id: str, living: Collection[str]) -> bool:
    """Free what ended services of ended dispatches kept; return whether there was any."""
    rows = conn.execute(
        select(_held.pipeline_id, _held.attempt, _held.instance_ids).where(
            _held.node_id == node_id, _held.runs.is_(False)
        )
    ).all()
    ended = [row for row in rows if set(row.instance_ids).isdisjoint(living)]
    for row in ended:
        conn.execute(_RELEASE, _of(Dispatch(row.pipeline_id, row.attempt)))
    return bool(ended)


def count(conn: Connection) -> int:
    """Return how many reservations there are."""
    return conn.scalar(select(func.count()).select_from(schema.reservations)) or 0


def _of(dispatch: Dispatch) -> dict[str, object]:
    return {"of_pipeline": dispatch.pipeline_id, "of_attempt": dispatch.attempt}
