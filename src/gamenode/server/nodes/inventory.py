"""Rows of inventory versions: functions of a connection, without rules or commits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Row, delete, func, insert, select, update

from gamenode.domain.inventory import CollectionFailure, Inventory, InventoryVersion
from gamenode.lib.clock import Instant
from gamenode.server.db import schema

_nodes: Final = schema.nodes.c
_versions: Final = schema.inventory_versions.c


def get(conn: Connection, node_id: str, version: int) -> InventoryVersion | None:
    """Return a version, or None."""
    row = conn.execute(
        select(schema.inventory_versions).where(
            _versions.node_id == node_id, _versions.version == version
        )
    ).first()
    return _version(row) if row is not None else None


def newest(
    conn: Connection, node_id: str, *, at: Instant | None = None, below: int | None = None
) -> InventoryVersion | None:
    """Return the newest version, of those that there were `at` a time and are `below` another."""
    query = select(schema.inventory_versions).where(_versions.node_id == node_id)
    if at is not None:
        query = query.where(_versions.collected_at <= at)
    if below is not None:
        query = query.where(_versions.version < below)
    row = conn.execute(query.order_by(_versions.version.desc()).limit(1)).first()
    return _version(row) if row is not None else None


def versions(
    conn: Connection, node_id: str, *, limit: int, before: int | None
) -> list[InventoryVersion]:
    """Return versions of a node, newest first, from behind `before` on."""
    query = select(schema.inventory_versions).where(_versions.node_id == node_id)
    if before is not None:
        query = query.where(_versions.version < before)
    rows = conn.execute(query.order_by(_versions.version.desc()).limit(limit))
    return [_version(row) for row in rows]


def of_nodes(
    conn: Connection,
    node_ids: Sequence[str],
    *,
    at: Instant | None,
    changed_since: Instant | None,
) -> list[InventoryVersion]:
    """Return the newest version (`at` a time) of each of some nodes, by node."""
    other = schema.inventory_versions.alias()
    newest_then = select(func.max(other.c.version)).where(other.c.node_id == _versions.node_id)
    if at is not None:
        newest_then = newest_then.where(other.c.collected_at <= at)
    query = select(schema.inventory_versions).where(
        _versions.node_id.in_(node_ids), _versions.version == newest_then.scalar_subquery()
    )
    if changed_since is not None:
        query = query.where(_versions.collected_at >= changed_since)
    return [_version(row) for row in conn.execute(query.order_by(_versions.node_id))]


def add(conn: Connection, version: InventoryVersion, *, given_hash: str) -> None:
    """Add a version, and make it its node's newest."""
    conn.execute(
        insert(schema.inventory_versions).values(
            node_id=version.node_id,
            version=version.version,
            collected_at=version.collected_at,
            **_seen(version),
            summary=version.summary,
        )
    )
    _point(conn, version, given_hash)


def refresh(conn: Connection, version: InventoryVersion, *, given_hash: str) -> None:
    """Write down that a version's content was seen again, and what moved by itself."""
    conn.execute(
        update(schema.inventory_versions)
        .where(_versions.node_id == version.node_id, _versions.version == version.version)
        .values(**_seen(version))
    )
    _point(conn, version, given_hash)


def trim(conn: Connection, node_id: str, *, up_to: int) -> None:
    """Drop the oldest versions, `up_to` included."""
    conn.execute(
        delete(schema.inventory_versions).where(
            _versions.node_id == node_id, _versions.version <= up_to
        )
    )


def _point(conn: Connection, version: InventoryVersion, given_hash: str) -> None:
    conn.execute(
        update(schema.nodes)
        .where(_nodes.id == version.node_id)
        .values(inventory_version=version.version, inventory_hash=given_hash)
    )


def _seen(version: InventoryVersion) -> dict[str, object]:
    return {
        "seen_at": version.seen_at,
        "hash": version.hash,
        "content": msgspec.to_builtins(version.inventory),
        "failed": msgspec.to_builtins(version.failed),
    }


def _version(row: Row[Any]) -> InventoryVersion:
    return InventoryVersion(
        node_id=row.node_id,
        version=row.version,
        collected_at=row.collected_at,
        seen_at=row.seen_at,
        hash=row.hash,
        inventory=msgspec.convert(row.content, Inventory),
        failed=msgspec.convert(row.failed, tuple[CollectionFailure, ...]),
        summary=row.summary,
    )
