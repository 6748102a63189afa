"""The server's nouns in memory, as the HTTP edge sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, cast

from starlette.types import ASGIApp

from gamenode.domain.access import Actor, ActorKind, ApiToken, Role
from gamenode.domain.command import Dispatch
from gamenode.domain.errors import ErrorCode, GameNodeError, invalid
from gamenode.domain.event import Event, EventFilter
from gamenode.domain.explanation import Explanation, survey
from gamenode.domain.inventory import Inventory, InventoryVersion
from gamenode.domain.inventory_diff import InventoryDiff, diff
from gamenode.domain.log import LogKey, LogSlice
from gamenode.domain.node import (
    Drain,
    Link,
    Maintenance,
    Node,
    NodePatch,
    NodeType,
    Offer,
    StateChange,
)
from gamenode.domain.pipeline import (
    NewPipeline,
    Pipeline,
    Reason,
    Status,
    Step,
    StepType,
    Waiting,
)
from gamenode.domain.placement import Candidate, Demand, decide
from gamenode.domain.selector import Selector
from gamenode.domain.verification import AttemptVerdict
from gamenode.lib.clock import Instant, after
from gamenode.server.api.app import ApiSettings, Nouns, create_api
from gamenode.server.api.operation import Authenticate
from gamenode.server.events.audit import AuditRecord, AuditVerdict
from gamenode.server.logs.streamer import From
from gamenode.server.pipelines.planner import Plan

NOW = Instant(1_795_557_600_123_456_789)  # 2026-11-24T22:00:00.123456789Z


class FixedClock:
    def now(self) -> Instant:
        return NOW

    def monotonic_s(self) -> float:
        return 0.0


class CountingIds:
    def __init__(self) -> None:
        self._numbers = count(1)

    def new(self) -> str:
        return pipeline_id(next(self._numbers))


def pipeline_id(number: int) -> str:
    return f"019ab000-0000-7000-8000-{number:012x}"


def make_node(node_id: str, *, online: bool = True, note: str = "") -> Node:
    return Node(
        id=node_id,
        display_name=node_id,
        type=NodeType.PHYSICAL,
        maintenance=Maintenance.NORMAL,
        state_version=1,
        state_change=None,
        online=online,
        online_since=NOW if online else None,
        last_heartbeat_at=NOW,
        link=Link.CONNECTED if online else Link.LOST,
        link_since=NOW,
        link_cause="",
        session_id="s",
        session_epoch=3,
        boot_id="b",
        agent_version="0.1.0",
        env_names=frozenset(),
        step_runtimes=frozenset(),
        offer=Offer(),
        labels={"zone": "a"},
        note=note,
        conditions=(),
        inventory=Inventory(),
        inventory_version=1,
        inventory_hash="",
        registered_at=NOW,
    )


def make_pipeline(
    number: int, *, status: Status = Status.PENDING, name: str = "hello", waiting: str = ""
) -> Pipeline:
    return Pipeline(
        id=pipeline_id(number),
        name=name,
        status=status,
        reason=Reason.NONE,
        message=waiting,
        node_id="",
        attempt=0,
        args={"IMAGE": "alpine"},
        priority=0,
        steps=(
            Step(
                name="greet",
                type=StepType.TASK,
                status=status,
                reason=Reason.NONE,
                message="",
                exit_code=None,
                signal=None,
                attempt=0,
                run=0,
                started_at=None,
                ended_at=None,
                instance_id="",
            ),
        ),
        waiting=(Waiting(reason="OFFLINE", text=waiting),) if waiting else (),
        cancel_requested_at=None,
        cancel_reason="",
        created_at=Instant(NOW + number),
        created_by="local",
        started_at=None,
        ended_at=None,
        retry_of="",
    )


class MemoryPipelines:
    """Manager and service of pipelines in one."""

    def __init__(self) -> None:
        self.pipelines: dict[str, Pipeline] = {}
        self.requests: list[tuple[NewPipeline, Actor]] = []
        self.waiters = 0
        self.fenced: list[tuple[str, str, str]] = []
        self.keys: list[str] = []
        self._keys: dict[str, str] = {}
        self._changed = asyncio.Condition()

    async def remove_node(self, node_id: str, *, force: bool, reason: str, by: Actor) -> None:
        del node_id, force, reason, by

    async def loads(self) -> Mapping[str, int]:
        return {}

    async def lingering(self) -> Mapping[str, Sequence[Dispatch]]:
        found: dict[str, list[Dispatch]] = {}
        for pipeline in self.pipelines.values():
            if pipeline.may_still_run:
                dispatch = Dispatch(pipeline.id, pipeline.attempt)
                found.setdefault(pipeline.node_id, []).append(dispatch)
        return found

    async def fence_node(self, node_id: str, *, reason: str, by: Actor) -> Node:
        self.fenced.append((node_id, reason, by.name))
        return make_node(node_id, online=False)

    async def retry(self, pipeline_id: str, *, from_failed: bool, key: str, by: Actor) -> Pipeline:
        del by
        await self.get(pipeline_id)
        self.keys.append(key)
        again = make_pipeline(len(self.pipelines) + 1, waiting="from" if from_failed else "")
        return self.add(replace(again, retry_of=pipeline_id))

    async def extend(self, pipeline_id: str, by_s: float, *, key: str, by: Actor) -> Pipeline:
        del by
        self.keys.append(key)
        pipeline = await self.get(pipeline_id)
        return self.add(replace(pipeline, extended_s=pipeline.extended_s + by_s))

    def add(self, pipeline: Pipeline) -> Pipeline:
        self.pipelines[pipeline.id] = pipeline
        return pipeline

    async def end(self, pipeline_id: str, status: Status) -> None:
        async with self._changed:
            self.pipelines[pipeline_id] = replace(self.pipelines[pipeline_id], status=status)
            self._changed.notify_all()

    async def create(self, request: NewPipeline, *, by: Actor) -> Pipeline:
        self.requests.append((request, by))
        key = request.idempotency_key
        if key and key in self._keys:
            return self.pipelines[self._keys[key]]
        pipeline = self.add(make_pipeline(len(self.pipelines) + 1))
        if key:
            self._keys[key] = pipeline.id
        return pipeline

    async def cancel(self, pipeline_id: str, *, reason: str, force: bool, by: Actor) -> Pipeline:
        pipeline = await self.get(pipeline_id)
        cancelled = replace(
            pipeline,
            cancel_requested_at=NOW,
            cancel_reason=f"{reason} by {by.name}",
            status=Status.CANCELLED if force else pipeline.status,
        )
        return self.add(cancelled)

    async def wait_ended(self, pipeline_id: str, timeout_s: float) -> Pipeline:
        pipeline = await self.get(pipeline_id)
        self.waiters += 1
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                while not self.pipelines[pipeline_id].status.terminal:
                    await self._changed.wait()
        except TimeoutError:
            return pipeline
        finally:
            self.waiters -= 1
        return self.pipelines[pipeline_id]

    async def get(self, pipeline_id: str) -> Pipeline:
        try:
            return self.pipelines[pipeline_id]
        except KeyError:
            raise GameNodeError(
                ErrorCode.PIPELINE_NOT_FOUND, f"there is no pipeline {pipeline_id}"
            ) from None

    async def list(
        self,
        *,
        status: Status | None,
        node: str,
        q: str,
        limit: int,
        before: tuple[Instant, str] | None,
    ) -> Sequence[Pipeline]:
        found = [
            pipeline
            for pipeline in self.pipelines.values()
            if (status is None or pipeline.status is status)
            and node in ("", pipeline.node_id)
            and q in pipeline.name
            and (before is None or (pipeline.created_at, pipeline.id) < before)
        ]
        return sorted(found, key=lambda p: (p.created_at, p.id), reverse=True)[:limit]


class MemoryNodes:
    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.failure: Exception | None = None

    def add(self, node: Node) -> Node:
        self.nodes[node.id] = node
        return node

    async def get(self, node_id: str) -> Node:
        if self.failure:
            raise self.failure
        try:
            return self.nodes[node_id]
        except KeyError:
            raise GameNodeError(ErrorCode.NODE_NOT_FOUND, f"there is no node {node_id}") from None

    async def list(
        self,
        *,
        online: bool | None,
        maintenance: Maintenance | None,
        selector: Selector,
        q: str,
        limit: int,
        after: str,
    ) -> Sequence[Node]:
        def values(node: Node) -> Callable[[str], Sequence[str]]:
            return lambda key: [node.labels[key]] if key in node.labels else []

        found = [
            node
            for node in self.nodes.values()
            if (online is None or node.online is online)
            and (maintenance is None or node.maintenance is maintenance)
            and selector.matches(values(node))
            and q in node.id
            and node.id > after
        ]
        return sorted(found, key=lambda node: node.id)[:limit]

    async def change_state(
        self,
        node_id: str,
        target: Maintenance,
        *,
        drain: Drain | None,
        by: Actor,
        reason: str,
        wait_s: float = 0.0,
    ) -> Node:
        del drain, by, reason, wait_s
        return self.add(replace(await self.get(node_id), maintenance=target))

    async def describe(self, node_id: str, patch: NodePatch, *, by: Actor) -> Node:
        del by
        return self.add(replace(await self.get(node_id), note=patch.note or ""))

    async def state_changes(self, node_id: str, *, limit: int) -> Sequence[StateChange]:
        await self.get(node_id)
        return [][:limit]


def _values_of_id(node_id: str, key: str) -> Sequence[str]:
    return [node_id] if key == "id" else []


class MemoryInventories:
    """Versions by node, the oldest first; a time or a missing name means the newest."""

    def __init__(self) -> None:
        self.versions_of: dict[str, list[InventoryVersion]] = {}
        self.failure: GameNodeError | None = None

    def add(self, node_id: str, inventory: Inventory, *, at: int = 0) -> InventoryVersion:
        kept = self.versions_of.setdefault(node_id, [])
        version = InventoryVersion(
            node_id=node_id,
            version=len(kept) + 1,
            collected_at=Instant(NOW + at),
            seen_at=Instant(NOW + at),
            hash="",
            inventory=inventory,
            failed=(),
            summary="",
        )
        kept.append(version)
        return version

    async def show(
        self, node_id: str, *, version: int | None = None, at: Instant | None = None
    ) -> InventoryVersion:
        del at
        kept = self.versions_of.get(node_id)
        if kept is None:
            raise GameNodeError(ErrorCode.NODE_NOT_FOUND, f"there is no node {node_id}")
        return kept[-1] if version is None else kept[version - 1]

    async def versions(
        self, node_id: str, *, limit: int, before: int | None
    ) -> Sequence[InventoryVersion]:
        newest_first = reversed(self.versions_of[node_id])
        return [one for one in newest_first if before is None or one.version < before][:limit]

    async def diff(self, node_id: str, *, from_: str, to: str) -> InventoryDiff:
        kept = self.versions_of[node_id]
        after = await self.show(node_id, version=int(to) if to else None)
        before = kept[int(from_) - 1] if from_ else kept[max(0, after.version - 2)]
        return InventoryDiff(
            node_id=node_id,
            from_version=before.version,
            to_version=after.version,
            changes=diff(before.inventory, after.inventory),
        )

    async def query(
        self,
        selector: Selector,
        *,
        at: Instant | None,
        changed_since: Instant | None,
        after: str = "",
    ) -> AsyncGenerator[InventoryVersion]:
        del at
        for node_id, kept in sorted(self.versions_of.items()):
            fits = selector.matches(partial(_values_of_id, node_id))
            since = changed_since is None or kept[-1].collected_at >= changed_since
            if node_id > after and fits and since:
                yield kept[-1]

    async def collect(self, node_id: str) -> InventoryVersion:
        if self.failure:
            raise self.failure
        return await self.show(node_id)


class MemoryLogs:
    """Logs that grow while they are read, in blocks of whole lines."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[str, str], list[bytes]] = {}
        self.ended = False
        self.readers = 0
        self._changed = asyncio.Condition()

    def add(self, pipeline_id: str, step: str, *blocks: bytes) -> None:
        self.blocks.setdefault((pipeline_id, step), []).extend(blocks)

    async def grow(self, pipeline_id: str, step: str, block: bytes) -> None:
        async with self._changed:
            self.add(pipeline_id, step, block)
            self._changed.notify_all()

    async def end(self) -> None:
        async with self._changed:
            self.ended = True
            self._changed.notify_all()

    async def open(self, pipeline_id: str, step: str, attempt: int) -> LogKey:
        if (pipeline_id, step) not in self.blocks:
            raise GameNodeError(ErrorCode.LOG_NOT_FOUND, f"step {step} has no log")
        return LogKey(pipeline_id, step, attempt or 1)

    async def start(self, key: LogKey, start: From) -> int:
        content = b"".join(self.blocks[key.pipeline_id, key.step])
        if start.offset > len(content):
            raise invalid("offset", f"the log has {len(content)} bytes")
        if start.tail is not None:
            lines = content.splitlines(keepends=True)
            return len(content) - sum(len(line) for line in lines[len(lines) - start.tail :])
        return start.offset

    async def read(self, key: LogKey, start: From, *, follow: bool) -> AsyncIterator[LogSlice]:
        blocks = self.blocks[key.pipeline_id, key.step]
        self.readers += 1
        try:
            position = at = 0
            while True:
                while at < len(blocks):
                    block = blocks[at]
                    skip = max(0, start.offset - position)
                    if block[skip:]:
                        yield LogSlice(position + skip, block[skip:])
                    position += len(block)
                    at += 1
                if not follow or self.ended:
                    return
                async with self._changed:
                    while at >= len(blocks) and not self.ended:
                        await self._changed.wait()
        finally:
            self.readers -= 1


class MemoryEvents:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.oldest = 1
        self.failure: GameNodeError | None = None
        self.readers = 0
        self._changed = asyncio.Condition()

    async def append(self, *events: Event) -> None:
        async with self._changed:
            self.events.extend(events)
            self._changed.notify_all()

    async def fail(self, error: GameNodeError) -> None:
        async with self._changed:
            self.failure = error
            self._changed.notify_all()

    async def read_after(
        self, after: int | None, *, wanted: EventFilter, limit: int
    ) -> Sequence[Event]:
        if after is not None and after < self.oldest - 1:
            raise GameNodeError(
                ErrorCode.CURSOR_EXPIRED, f"events begin at {self.oldest}, cursor {after} is older"
            )
        return [
            event for event in self.events if event.id > (after or 0) and wanted.matches(event)
        ][:limit]

    async def follow(
        self, after: int | None, wanted: EventFilter
    ) -> AsyncIterator[Sequence[Event]]:
        at = (self.events[-1].id if self.events else 0) if after is None else after
        self.readers += 1
        try:
            while True:
                async with self._changed:
                    while not self.failure and not any(event.id > at for event in self.events):
                        await self._changed.wait()
                if self.failure:
                    raise self.failure
                batch = [event for event in self.events if event.id > at]
                at = batch[-1].id
                if chosen := [event for event in batch if wanted.matches(event)]:
                    yield chosen
        finally:
            self.readers -= 1


def make_event(number: int, *, type_: str = "pipeline.created", message: str = "") -> Event:
    return Event(
        id=number,
        type=type_,
        at=NOW,
        node_id="fra-07",
        entity_id=pipeline_id(1),
        status="PENDING",
        message=message,
        data={},
    )


class MemoryTokens:
    def __init__(self) -> None:
        self.tokens: list[ApiToken] = []

    async def create(
        self, *, name: str, role: Role, ttl_s: float | None, by: Actor
    ) -> tuple[ApiToken, str]:
        token = ApiToken(
            id=pipeline_id(len(self.tokens) + 1),
            name=name,
            role=role,
            created_at=NOW,
            created_by=by.name,
            expires_at=None if ttl_s is None else after(NOW, ttl_s),
            last_used_at=None,
            revoked_at=None,
        )
        self.tokens.append(token)
        return token, "gn_secret"

    async def list(self, *, q: str, limit: int, before: str) -> Sequence[ApiToken]:
        found = [t for t in self.tokens if q in t.name and (not before or t.id < before)]
        return sorted(found, key=lambda token: token.id, reverse=True)[:limit]

    async def revoke(self, token_id: str, *, by: Actor) -> ApiToken:
        del by
        for index, token in enumerate(self.tokens):
            if token.id == token_id:
                self.tokens[index] = replace(token, revoked_at=NOW)
                return self.tokens[index]
        raise GameNodeError(ErrorCode.NOT_FOUND, f"there is no token {token_id}")


class MemoryAudit:
    """An audit log; it keeps the refused acts that it is told of."""

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []
        self.verdict = AuditVerdict(ok=True, rows=0, head="", first_bad=None)
        self.refused: list[tuple[str, str, str]] = []

    async def list(self, *, limit: int, before: int | None) -> Sequence[AuditRecord]:
        found = [record for record in self.records if before is None or record.id < before]
        return sorted(found, key=lambda record: record.id, reverse=True)[:limit]

    async def verify(self, *, known_head: str = "") -> AuditVerdict:
        del known_head
        return self.verdict

    async def record(
        self,
        error: GameNodeError,
        *,
        operation: str,
        by: Actor,
        target: str,
        reason: str = "",
        request_id: str = "",
    ) -> None:
        del by, reason, request_id
        self.refused.append((operation, target, error.code))


class MemoryPlanner:
    """Gives the answers that a test wants."""

    def __init__(self) -> None:
        self.demand = Demand()
        self.nodes: list[Candidate] = []
        self.explanations: dict[str, Explanation] = {}
        self.asked: list[NewPipeline] = []

    async def plan(self, request: NewPipeline) -> Plan:
        self.asked.append(request)
        return Plan("hello", survey(decide(self.demand, self.nodes), self.demand))

    async def explain(self, pipeline_id: str) -> Explanation:
        if pipeline_id not in self.explanations:
            raise GameNodeError(ErrorCode.PIPELINE_NOT_FOUND, f"no pipeline {pipeline_id}")
        return self.explanations[pipeline_id]


class MemoryVerifier:
    """Gives the verdict that a test wants."""

    def __init__(self) -> None:
        self.verdict = AttemptVerdict(attempts=0, nodes_asked=0, nodes_absent=(), violations=())

    async def verify(self) -> AttemptVerdict:
        return self.verdict


class MemoryErrors:
    """Reports errors to nobody."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def report(self, error: Exception, *, place: str, request_id: str = "") -> GameNodeError:
        del error, request_id
        self.places.append(place)
        return GameNodeError(ErrorCode.INTERNAL, "failed", error_id=pipeline_id(len(self.places)))


async def local_admin(_authorization: str | None, /, *, source: str) -> Actor:
    return Actor(kind=ActorKind.LOCAL, name="local", role=Role.ADMIN, source=source)


async def viewer(_authorization: str | None, /, *, source: str) -> Actor:
    return Actor(kind=ActorKind.TOKEN, name="grafana", role=Role.VIEWER, source=source)


class Api:
    """The HTTP edge over nouns in memory."""

    def __init__(
        self,
        settings: ApiSettings = ApiSettings(),  # noqa: B008 - frozen
        authenticate: Authenticate = local_admin,
        events: object | None = None,
    ) -> None:
        self.pipelines = MemoryPipelines()
        self.planner = MemoryPlanner()
        self.verifier = MemoryVerifier()
        self.nodes = MemoryNodes()
        self.inventories = MemoryInventories()
        self.logs = MemoryLogs()
        self.events = MemoryEvents()
        self.tokens = MemoryTokens()
        self.audit = MemoryAudit()
        self.errors = MemoryErrors()
        self.not_ready = ""
        self.nouns = Nouns(
            pipeline_manager=cast("Any", self.pipelines),
            pipeline_service=cast("Any", self.pipelines),
            planner=cast("Any", self.planner),
            verifier=cast("Any", self.verifier),
            nodes=cast("Any", self.nodes),
            inventories=cast("Any", self.inventories),
            logs=cast("Any", self.logs),
            events=cast("Any", events or self.events),
            tokens=cast("Any", self.tokens),
            audit=cast("Any", self.audit),
            why_not_ready=lambda: self.not_ready,
        )
        self.app: ASGIApp = create_api(
            self.nouns,
            settings=settings,
            authenticate=authenticate,
            refusals=self.audit,
            internal_errors=self.errors,
            clock=FixedClock(),
            ids=CountingIds(),
        )
