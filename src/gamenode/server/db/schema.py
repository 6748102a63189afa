"""The tables, for both databases. Instants are BIGINT nanoseconds; ids are text.

A table is written by the service of its noun alone; `events` and `audit` by the database's commit
(rule RC4).
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    text,
)

metadata: Final = MetaData()

# SQLite makes an id that is never used again only of this very type with AUTOINCREMENT.
_Serial = BigInteger().with_variant(Integer, "sqlite")

database_meta: Final = Table(
    "database_meta",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("generation", BigInteger, nullable=False),
    Column("events_purged_to", BigInteger, nullable=False),
    comment="One row: the generation, raised by a restore (rule RC6); the last event id purged.",
)

nodes: Final = Table(
    "nodes",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("display_name", Text, nullable=False),
    Column("type", String(16), nullable=False),
    Column("maintenance", String(16), nullable=False),
    Column("state_version", BigInteger, nullable=False),
    Column("online", Boolean, nullable=False),
    Column("online_since", BigInteger),
    Column("last_heartbeat_at", BigInteger),
    Column("link", String(16), nullable=False),
    Column("link_since", BigInteger),
    Column("link_cause", Text, nullable=False),
    Column("session_id", String(36), nullable=False),
    Column("session_epoch", BigInteger, nullable=False),
    Column("session_used", Boolean, nullable=False),
    Column("previous_epoch", BigInteger, nullable=False),
    # Sessions from this epoch on continue each other (rule RL3).
    Column("continuity_epoch", BigInteger, nullable=False),
    Column("stream_number", BigInteger, nullable=False),
    Column("boot_id", String(64), nullable=False),
    Column("agent_version", String(64), nullable=False),
    Column("env_names", JSON, nullable=False),
    Column("step_runtimes", JSON, nullable=False),
    # The GPU slots and host ports that it gives out.
    Column("offer", JSON, nullable=False),
    Column("labels", JSON, nullable=False),
    Column("host_labels", JSON, nullable=False),
    Column("note", Text, nullable=False),
    Column("inventory_version", BigInteger, nullable=False),
    # As the node computed it, of what it reported last.
    Column("inventory_hash", String(64), nullable=False),
    Column("registered_at", BigInteger, nullable=False),
)

inventory_versions: Final = Table(
    "inventory_versions",
    metadata,
    Column("node_id", String(63), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("collected_at", BigInteger, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
    Column("hash", String(64), nullable=False),
    Column("content", JSON, nullable=False),
    Column("failed", JSON, nullable=False),
    Column("summary", Text, nullable=False),
    PrimaryKeyConstraint("node_id", "version"),
    comment="What each node was made of, one row for each change of its stable content (B4).",
)

node_conditions: Final = Table(
    "node_conditions",
    metadata,
    Column("node_id", String(63), nullable=False),
    Column("type", String(64), nullable=False),
    Column("since", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    PrimaryKeyConstraint("node_id", "type"),
)

removed_nodes: Final = Table(
    "removed_nodes",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("session_epoch", BigInteger, nullable=False),
    Column("removed_at", BigInteger, nullable=False),
    Column("removed_by", Text, nullable=False),
    comment="A removed node's agent does not come back by itself; its epochs are not used again.",
)

state_changes: Final = Table(
    "state_changes",
    metadata,
    Column("node_id", String(63), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("target", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("requested_by", Text, nullable=False),
    Column("requested_at", BigInteger, nullable=False),
    Column("pushed_at", BigInteger),
    Column("confirmed_at", BigInteger),
    Column("remaining", Integer),
    Column("error", Text, nullable=False),
    Column("drain", Boolean, nullable=False),
    Column("end_running", Boolean, nullable=False),
    Column("deadline_at", BigInteger),
    Column("then", String(16), nullable=False),
    Column("until", BigInteger),
    PrimaryKeyConstraint("node_id", "version"),
    Index(
        "state_changes_unconfirmed",
        "node_id",
        sqlite_where=text("confirmed_at IS NULL"),
        postgresql_where=text("confirmed_at IS NULL"),
    ),
    Index(
        "state_changes_timed",
        "node_id",
        sqlite_where=text("deadline_at IS NOT NULL OR until IS NOT NULL"),
        postgresql_where=text("deadline_at IS NOT NULL OR until IS NOT NULL"),
    ),
    comment="What was wanted of a node, when it was pushed, when its agent confirmed (RM1).",
)

pipelines: Final = Table(
    "pipelines",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("status", String(16), nullable=False),
    Column("reason", String(64), nullable=False),
    Column("message", Text, nullable=False),
    Column("file", Text, nullable=False),
    Column("args", JSON, nullable=False),
    Column("envs", JSON, nullable=False),
    # What it asks of a node; pipelines that ask for the same have the same id.
    Column("demand", Text, nullable=False),
    Column("demand_id", String(64), nullable=False),
    Column("work", LargeBinary, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("node_id", String(63), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("session_epoch", BigInteger, nullable=False),
    # Of its node when it was bound there: what an earlier boot ran has ended with it.
    Column("boot_id", String(64), nullable=False),
    # Why its node refused it for now.
    Column("refusal", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("dispatched_at", BigInteger),
    Column("acknowledged_at", BigInteger),
    Column("started_at", BigInteger),
    Column("ended_at", BigInteger),
    Column("cancel_requested_at", BigInteger),
    Column("cancel_reason", Text, nullable=False),
    Column("cancel_by", Text, nullable=False),
    Column("cancel_acknowledged_at", BigInteger),
    Column("retry_of", String(36), nullable=False),
    Column("on_lost", String(16), nullable=False),
    Column("restarts", Integer, nullable=False),
    Column("extended_s", Float, nullable=False),
    # How much of that the node has in its journal.
    Column("extension_acknowledged_s", Float, nullable=False),
    # Its secret args, under the key in secrets.key.
    Column("sealed", LargeBinary),
    # What the dispatcher looks for; each costs nothing while nothing waits (rule RC3).
    Index(
        "pipelines_queued",
        text("priority DESC"),
        "created_at",
        "id",
        sqlite_where=text("status = 'PENDING' AND node_id = ''"),
        postgresql_where=text("status = 'PENDING' AND node_id = ''"),
    ),
    Index(
        "pipelines_demanding",
        "demand_id",
        sqlite_where=text("status = 'PENDING' AND node_id = ''"),
        postgresql_where=text("status = 'PENDING' AND node_id = ''"),
    ),
    Index(
        "pipelines_bound",
        "node_id",
        sqlite_where=text("node_id <> '' AND status IN ('PENDING', 'RUNNING')"),
        postgresql_where=text("node_id <> '' AND status IN ('PENDING', 'RUNNING')"),
    ),
    Index(
        "pipelines_unacknowledged",
        "node_id",
        sqlite_where=text("node_id <> '' AND status = 'PENDING' AND acknowledged_at IS NULL"),
        postgresql_where=text("node_id <> '' AND status = 'PENDING' AND acknowledged_at IS NULL"),
    ),
    Index(
        "pipelines_cancelling",
        "node_id",
        sqlite_where=text("cancel_requested_at IS NOT NULL AND cancel_acknowledged_at IS NULL"),
        postgresql_where=text("cancel_requested_at IS NOT NULL AND cancel_acknowledged_at IS NULL"),
    ),
    Index(
        "pipelines_extending",
        "node_id",
        sqlite_where=text("extended_s > extension_acknowledged_s"),
        postgresql_where=text("extended_s > extension_acknowledged_s"),
    ),
    Index(
        "pipelines_failing_when_lost",
        "node_id",
        sqlite_where=text("on_lost = 'fail' AND status IN ('PENDING', 'RUNNING')"),
        postgresql_where=text("on_lost = 'fail' AND status IN ('PENDING', 'RUNNING')"),
    ),
    Index("pipelines_newest", "created_at", "id"),
    Index(
        "pipelines_ended",
        "ended_at",
        "id",
        sqlite_where=text("ended_at IS NOT NULL"),
        postgresql_where=text("ended_at IS NOT NULL"),
    ),
    Index(
        "pipelines_sealed",
        "ended_at",
        sqlite_where=text("sealed IS NOT NULL"),
        postgresql_where=text("sealed IS NOT NULL"),
    ),
)

waiting: Final = Table(
    "waiting",
    metadata,
    Column("demand_id", String(64), primary_key=True),
    Column("message", Text, nullable=False),
    Column("reasons", JSON, nullable=False),
    comment="Why the pipelines of a demand wait, as found at the last look; no row: they do not.",
)

reservations: Final = Table(
    "reservations",
    metadata,
    Column("pipeline_id", String(36), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("node_id", String(63), nullable=False),
    # The agent has not said that it ended, whatever its pipeline's status; else only its
    # instances keep the row.
    Column("runs", Boolean, nullable=False),
    Column("concurrency_group", String(128), nullable=False),
    Column("cpu_millis", BigInteger, nullable=False),
    Column("memory_bytes", BigInteger, nullable=False),
    Column("gpu_id", String(128), nullable=False),
    Column("gpu_slots", Integer, nullable=False),
    Column("gpu_memory_bytes", BigInteger, nullable=False),
    # In the order of the file, for those that the node chose.
    Column("assigned_ports", JSON, nullable=False),
    Column("ports", JSON, nullable=False),
    Column("ports_count", Integer, nullable=False),
    Column("instance_ids", JSON, nullable=False),
    PrimaryKeyConstraint("pipeline_id", "attempt"),
    Index("reservations_by_node", "node_id"),
    Index(
        "reservations_running", "node_id", sqlite_where=text("runs"), postgresql_where=text("runs")
    ),
    Index(
        "reservations_by_group",
        "concurrency_group",
        sqlite_where=text("concurrency_group <> ''"),
        postgresql_where=text("concurrency_group <> ''"),
    ),
    comment="What dispatches, and the services they left, hold of their nodes (RA3, RC5).",
)

concurrency_groups: Final = Table(
    "concurrency_groups",
    metadata,
    Column("name", String(128), primary_key=True),
    comment="One row a group, locked by who places a pipeline of it (RC5).",
)

steps: Final = Table(
    "steps",
    metadata,
    Column("pipeline_id", String(36), nullable=False),
    Column("position", Integer, nullable=False),
    Column("name", String(63), nullable=False),
    Column("type", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("reason", String(64), nullable=False),
    Column("message", Text, nullable=False),
    Column("exit_code", Integer),
    Column("signal", Integer),
    Column("attempt", Integer, nullable=False),
    Column("run", Integer, nullable=False),
    Column("granted_from", Integer, nullable=False),
    Column("granted_to", Integer, nullable=False),
    Column("started_at", BigInteger),
    Column("ended_at", BigInteger),
    Column("instance_id", String(36), nullable=False),
    PrimaryKeyConstraint("pipeline_id", "position"),
    Index("steps_by_name", "pipeline_id", "name", unique=True),
)

tokens: Final = Table(
    "tokens",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("role", String(16), nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("expires_at", BigInteger),
    Column("last_used_at", BigInteger),
    Column("revoked_at", BigInteger),
    # A name stands in the audit log, so it means one token at a time.
    Index(
        "tokens_by_name",
        "name",
        unique=True,
        sqlite_where=text("revoked_at IS NULL"),
        postgresql_where=text("revoked_at IS NULL"),
    ),
    comment="API tokens; of their secrets, the SHA-256.",
)

idempotency_keys: Final = Table(
    "idempotency_keys",
    metadata,
    Column("caller", String(128), nullable=False),
    Column("key", String(128), nullable=False),
    Column("body_hash", String(64), nullable=False),
    Column("pipeline_id", String(36), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    # Set with the removal of its pipeline, which it outlives for a while (rule RC5).
    Column("expires_at", BigInteger),
    PrimaryKeyConstraint("caller", "key"),
    Index("idempotency_keys_by_pipeline", "pipeline_id"),
    Index(
        "idempotency_keys_expiring",
        "expires_at",
        sqlite_where=text("expires_at IS NOT NULL"),
        postgresql_where=text("expires_at IS NOT NULL"),
    ),
)

logs: Final = Table(
    "logs",
    metadata,
    Column("pipeline_id", String(36), nullable=False),
    Column("step", String(63), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("run", Integer, nullable=False),
    Column("node_id", String(63), nullable=False),
    Column("length_bytes", BigInteger, nullable=False),
    Column("stdout_bytes", BigInteger, nullable=False),
    Column("stdout_lines", BigInteger, nullable=False),
    Column("stderr_bytes", BigInteger, nullable=False),
    Column("stderr_lines", BigInteger, nullable=False),
    Column("final_length_bytes", BigInteger),
    Column("final_hash", LargeBinary),
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("pipeline_id", "step", "attempt", "run"),
)

removed_logs: Final = Table(
    "removed_logs",
    metadata,
    Column("pipeline_id", String(36), primary_key=True),
    comment="Pipelines that are gone, and whose logs' files are still to be removed (rule RC3).",
)

metric_journal: Final = Table(
    "metric_journal",
    metadata,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("node_id", String(63), nullable=False),
    Column("spool_id", String(64), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("content_hash", LargeBinary, nullable=False),
    Column("report", LargeBinary, nullable=False),
    Column("received_at", BigInteger, nullable=False),
    Index("metric_journal_by_number", "node_id", "spool_id", "sequence"),
    Index("metric_journal_by_time", "received_at"),
    sqlite_autoincrement=True,
)

events: Final = Table(
    "events",
    metadata,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("type", String(64), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("node_id", String(63), nullable=False),
    Column("entity_id", String(128), nullable=False),
    Column("status", String(32), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
    Index("events_by_time", "at"),
    sqlite_autoincrement=True,
)

audit: Final = Table(
    "audit",
    metadata,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("actor_kind", String(16), nullable=False),
    Column("actor_name", Text, nullable=False),
    Column("actor_role", String(16), nullable=False),
    Column("source", Text, nullable=False),
    Column("action", String(64), nullable=False),
    Column("target", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("code", String(64), nullable=False),
    Column("before", Text, nullable=False),
    Column("after", Text, nullable=False),
    Column("request_id", String(64), nullable=False),
    Column("link", LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)
