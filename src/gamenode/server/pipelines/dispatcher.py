"""Brings waiting pipelines to nodes, and wanted ends to the nodes that must carry them out.

Both are rows first (rule RC3): loops that events wake, and that look by themselves every two
seconds, carry them out. A lost wake-up costs latency, never work.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gamenode.domain.command import (
    CancelOrder,
    Dispatch,
    ExecuteOrder,
    ExtendOrder,
    FollowLog,
    OrderAnswer,
    OrderOutcome,
    WantedEnd,
    WantedExtension,
)
from gamenode.domain.errors import GameNodeError
from gamenode.domain.event import Event, EventType
from gamenode.domain.pipeline import Reason
from gamenode.domain.placement import Candidate, Demand, Explained, Pass
from gamenode.lib.clock import Clock
from gamenode.lib.tasks import Supervisor, Wake, until_one_ends
from gamenode.server.logs.manager import LogManager
from gamenode.server.nodes.connections import AgentConnection
from gamenode.server.nodes.manager import NodeManager
from gamenode.server.pipelines.service import GamePipelineGRPCService, QueueMark

_log = logging.getLogger(__name__)
_PASSING: Final = frozenset({"BUSY", "JOURNAL", "STATE_VERSION"})
"""Reasons of a refusal that go by; the pipeline waits for another turn."""
_ENDS: Final = frozenset(
    {EventType.PIPELINE_COMPLETED, EventType.PIPELINE_FAILED, EventType.PIPELINE_CANCELLED}
)
"""After these a node can take more."""
_QUEUED: Final = frozenset({EventType.PIPELINE_CREATED, EventType.PIPELINE_RESTARTED})
_OWED: Final = frozenset(
    {
        EventType.PIPELINE_CANCEL_REQUESTED,
        EventType.PIPELINE_CANCELLED,
        EventType.PIPELINE_EXTENDED,
    }
)
"""After these a node must hear something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherSettings:
    """Intervals and bounds of dispatch."""

    sweep_interval_s: float = 2.0
    """How often it is looked for work that no wake-up told of."""
    batch_max: int = 256
    """How many waiting pipelines are looked at together."""
    answer_timeout_s: float = 15.0
    """How long an agent's answer to one command is waited for."""
    refused_wait_s: float = 1.0
    """How long a pipeline waits after a node refused it for now."""


class TaskDispatcher:
    """Places, binds and sends."""

    def __init__(
        self,
        *,
        service: GamePipelineGRPCService,
        nodes: NodeManager,
        logs: LogManager,
        clock: Clock,
        settings: DispatcherSettings,
    ) -> None:
        """Do nothing until `run`."""
        self._service = service
        self._nodes = nodes
        self._logs = logs
        self._clock = clock
        self._settings = settings
        self._supervisor = Supervisor(expected=GameNodeError)
        self._queue_wake = Wake()
        self._owed_wake = Wake()
        self._some_wait = True
        self._mark: QueueMark | None = None
        self._demands: Mapping[str, Demand] = {}
        self._explained: Mapping[str, Explained] | None = None
        self._not_before_s: dict[str, float] = {}
        self._sending: set[Dispatch] = set()
        self._accepted: set[Dispatch] = set()
        self._cancelling: set[Dispatch] = set()
        self._extending: set[Dispatch] = set()
        self._more_owed = False
        """Whether a look was cut off by its bound: the next one follows the first answer."""

    def wake(self) -> None:
        """Look at everything again: a node may have become able to take work, or to hear."""
        self._queue_wake.ring()
        self._owed_wake.ring()

    def hear(self, happened: Sequence[Event]) -> None:
        """Look at what these events may have changed."""
        types = {event.type for event in happened}
        if types & _QUEUED or (self._some_wait and types & _ENDS):
            self._queue_wake.ring()
        if types & _OWED:
            self._owed_wake.ring()

    def look_again(self) -> None:
        """Look at what waits again: something was freed on a node."""
        if self._some_wait:
            self._queue_wake.ring()

    async def run(self) -> None:
        """Place and cancel until cancelled: a new pipeline never waits for what others are owed."""

        async def place() -> None:
            while True:
                await self._place_when_due()

        async def send() -> None:
            while True:
                await self._owed_wake.wait(self._settings.sweep_interval_s)
                await self._send_owed()

        await until_one_ends(place(), send())

    async def sweep(self) -> None:
        """Place what waits, and send what agents have not acknowledged."""
        await self._place_queued()
        await self._send_owed()

    async def _send_owed(self) -> None:
        self._more_owed = False
        owed = await self._service.owed_nodes()
        await self._send_unacknowledged(self._reachable(owed.dispatches))
        await self._send_cancels(self._reachable(owed.ends))
        await self._send_extensions(self._reachable(owed.extensions))

    def _reachable(self, node_ids: Iterable[str]) -> list[str]:
        """Return who can be sent something now; the others are told when they are back."""
        return [node_id for node_id in node_ids if self._nodes.connection(node_id) is not None]

    async def close(self) -> None:
        """Stop waiting for answers; the next statement of each agent says what it holds."""
        await self._supervisor.close()

    def send(self, node_id: str, order: ExecuteOrder) -> None:
        """Send a bound pipeline to its node, in the background.

        Without a stream nothing happens now: the pipeline is sent again, or found, when the node's
        next statement is reconciled.
        """
        connection = self._nodes.connection(node_id)
        if connection is not None and order.dispatch not in self._sending:
            for step in order.steps:
                self.tell_followed(connection, order.dispatch.pipeline_id, step.name)
            self._sending.add(order.dispatch)
            name = f"execute {order.dispatch.pipeline_id}"
            _ = self._supervisor.start(name, self._execute(node_id, order))

    def tell_followed(self, connection: AgentConnection, pipeline_id: str, step: str) -> None:
        """Tell an agent that somebody follows a step's log already."""
        if self._logs.is_live(pipeline_id, step):
            connection.say(FollowLog(pipeline_id=pipeline_id, step=step, live=True))

    def follow_log(self, pipeline_id: str, step: str, *, live: bool) -> None:
        """Have the node of a pipeline send a step's log line by line, or no more."""
        name = f"follow {pipeline_id}/{step}"
        _ = self._supervisor.start(name, self._follow_log(pipeline_id, step, live=live))

    async def _follow_log(self, pipeline_id: str, step: str, *, live: bool) -> None:
        pipeline = await self._service.get(pipeline_id)
        connection = self._nodes.connection(pipeline.node_id)
        if connection is not None and self._logs.is_live(pipeline_id, step) is live:
            connection.say(FollowLog(pipeline_id=pipeline_id, step=step, live=live))

    async def _place_when_due(self) -> None:
        """Wait until something may have changed for what waits, and place what fits.

        While nothing changes this is one cheap query now and then: what rang no bell, as a lost
        wake-up, shows in the mark.
        """
        rung = await self._queue_wake.wait(self._until_next_look_s())
        now_s = self._clock.monotonic_s()
        due = any(at_s <= now_s for at_s in self._not_before_s.values())
        if rung or due or await self._service.queue_mark() != self._mark:
            await self._place_queued()

    def _until_next_look_s(self) -> float:
        """Return how long to wait: until the sweep, or until a refused pipeline's turn."""
        now_s = self._clock.monotonic_s()
        turns = (at_s - now_s for at_s in self._not_before_s.values())
        return max(0.0, min(self._settings.sweep_interval_s, *turns, math.inf))

    async def _place_queued(self) -> None:
        """Bind what fits, in the order of the queue; what cannot be placed hides nothing.

        A demand that no node can meet is judged once, however many pipelines have it.
        """
        now_s = self._clock.monotonic_s()
        self._not_before_s = {
            pipeline_id: at_s for pipeline_id, at_s in self._not_before_s.items() if at_s > now_s
        }
        # An end that comes in between must not be missed.
        self._some_wait = True
        queue = await self._service.queue(self._demands)
        self._mark, self._demands = queue.mark, queue.demands
        look = Pass(self._nodes.candidates(queue.reserved) if queue.demands else (), queue.running)
        stuck: dict[str, Explained] = {}
        left = await self._place(look, stuck) if queue.demands else False
        await self._explain(stuck)
        self._some_wait = left or bool(stuck)

    async def _place(self, look: Pass, stuck: dict[str, Explained]) -> bool:
        """Bind what fits, and explain in `stuck` what does not; return whether more is left."""
        left, last, full = False, None, True
        while full:
            hidden = list(stuck) if len(stuck) <= self._settings.batch_max else []
            waiting = await self._service.queued(hidden, self._settings.batch_max, last)
            full = len(waiting) == self._settings.batch_max
            last = waiting[-1] if waiting else None
            binding = []
            for queued in waiting:
                demand = self._demands.get(queued.demand_id)
                if queued.id in self._not_before_s or demand is None:
                    left = True  # its turn comes; or it came after the demands were read
                elif queued.demand_id not in stuck:
                    await asyncio.sleep(0)  # heartbeats come first, however much waits (P14)
                    decision = look.place(demand)
                    if decision.unsupported:
                        binding.append(self._refuse(queued.id, decision.explain()))
                    elif decision.node_id is None:
                        stuck[queued.demand_id] = (decision.explain(), decision.waiting())
                    else:
                        node = look.candidate(decision.node_id)
                        binding.append(self._bind(queued.id, demand, node))
            left |= not all(await asyncio.gather(*binding))
        return left

    async def _explain(self, reasons: Mapping[str, Explained]) -> None:
        """Write down what has changed of why pipelines wait."""
        try:
            if self._explained is None:
                self._explained = dict(await self._service.explained())
            known = self._explained
            news = {each: why for each, why in reasons.items() if known.get(each) != why}
            gone = known.keys() - reasons.keys()
            if news or gone:
                await self._service.explain_waiting(news, gone)
                self._explained = reasons
        except GameNodeError as error:
            # Words for people: they must not hold up what can be done without the disk.
            _log.warning(
                "why pipelines wait was not written down: %s",
                error,
                extra={"event": "pipeline.waiting_unwritten"},
            )

    async def _bind(self, pipeline_id: str, demand: Demand, node: Candidate) -> bool:
        try:
            order = await self._service.bind(pipeline_id, demand, node, now=self._clock.now())
        except GameNodeError as error:
            _log.warning(
                "not dispatched: %s",
                error,
                extra={"event": "pipeline.bind_failed", "pipeline_id": pipeline_id},
            )
            order = None
        if order is None:
            # It waits no more, or the node has changed; that it is looked at again costs little.
            self._wait_a_turn(pipeline_id)
            return False
        self.send(node.node_id, order)
        return True

    async def _refuse(self, pipeline_id: str, message: str) -> bool:
        """End what no node can run as it is written; return whether it is settled."""
        try:
            await self._service.refuse(
                pipeline_id, Reason.UNSUPPORTED, message, now=self._clock.now()
            )
        except GameNodeError as error:
            _log.warning(
                "not ended: %s",
                error,
                extra={"event": "pipeline.refuse_failed", "pipeline_id": pipeline_id},
            )
            self._wait_a_turn(pipeline_id)
            return False
        return True

    def _wait_a_turn(self, pipeline_id: str) -> None:
        """Look at a pipeline again after a while, without being woken."""
        at_s = self._clock.monotonic_s() + self._settings.refused_wait_s
        self._not_before_s[pipeline_id] = at_s

    async def _execute(self, node_id: str, order: ExecuteOrder) -> None:
        try:
            answer = await self._ask(node_id, order)
            if answer is None:
                return
            now = self._clock.now()
            if answer.outcome is not OrderOutcome.REFUSED:
                # Its first report comes in a moment, most of the time, and says the same. Where
                # none has come by the next sweep, that writes it down.
                self._accepted.add(order.dispatch)
                self._answered()
            elif answer.reason in _PASSING:
                self._wait_a_turn(order.dispatch.pipeline_id)
                await self._service.requeue(
                    order.dispatch, f"node {node_id}: {answer.message}", now=now
                )
                self._queue_wake.ring()  # the look that follows knows when its turn comes
            else:
                try:
                    reason = Reason(answer.reason)
                except ValueError:
                    reason = Reason.REFUSED
                await self._service.fail(order.dispatch, reason, answer.message, now=now)
        finally:
            self._sending.discard(order.dispatch)

    async def _send_unacknowledged(self, node_ids: Sequence[str]) -> None:
        """Send again what was bound while its node's stream was not open yet.

        Harmless where the agent has it: it answers that it is a repeat. What its journal may have
        forgotten is settled when its statement is reconciled, before the stream opens.
        """
        accepted, self._accepted = self._accepted, set()
        if not node_ids:
            return
        bound = await self._service.unacknowledged(node_ids, self._settings.batch_max)
        self._note_full(len(bound))
        if taken := [dispatch for _, dispatch in bound if dispatch in accepted]:
            await self._service.acknowledge(taken, now=self._clock.now())
        for node_id, dispatch in bound:
            if dispatch in accepted or dispatch in self._accepted:
                continue
            if dispatch not in self._sending and self._nodes.connection(node_id) is not None:
                order = await self._service.order(dispatch)
                if order is not None:
                    self.send(node_id, order)

    async def _send_cancels(self, node_ids: Sequence[str]) -> None:
        if not node_ids:
            return
        cancelling = await self._service.cancelling(node_ids, self._settings.batch_max)
        self._note_full(len(cancelling))
        for wanted in cancelling:
            if wanted.dispatch in self._cancelling:
                continue
            self._cancelling.add(wanted.dispatch)
            name = f"cancel {wanted.dispatch.pipeline_id}"
            _ = self._supervisor.start(name, self._cancel(wanted))

    async def _cancel(self, wanted: WantedEnd) -> None:
        try:
            order = CancelOrder(
                dispatch=wanted.dispatch,
                reason=wanted.cause,
                message=wanted.reason,
                # It has ended here already, by force: nothing of it may go on there.
                force=wanted.status.terminal,
            )
            if await self._ask(wanted.node_id, order) is not None:
                await self._service.acknowledge_cancel(
                    wanted.dispatch, forced=order.force, now=self._clock.now()
                )
                self._answered()
        finally:
            self._cancelling.discard(wanted.dispatch)

    async def _send_extensions(self, node_ids: Sequence[str]) -> None:
        if not node_ids:
            return
        extending = await self._service.extending(node_ids, self._settings.batch_max)
        self._note_full(len(extending))
        for wanted in extending:
            dispatch = wanted.order.dispatch
            if dispatch in self._extending:
                continue
            self._extending.add(dispatch)
            _ = self._supervisor.start(f"extend {dispatch.pipeline_id}", self._extend(wanted))

    async def _extend(self, wanted: WantedExtension) -> None:
        try:
            # Refused is an answer too: it has ended there, or its time was up already.
            if await self._ask(wanted.node_id, wanted.order) is not None:
                await self._service.acknowledge_extension(wanted.order)
                self._answered()
        finally:
            self._extending.discard(wanted.order.dispatch)

    def _note_full(self, found: int) -> None:
        self._more_owed |= found == self._settings.batch_max

    def _answered(self) -> None:
        """Look on where more is owed than one look takes; many at once must not wait for sweeps."""
        if self._more_owed:
            self._owed_wake.ring()

    async def _ask(
        self, node_id: str, order: ExecuteOrder | CancelOrder | ExtendOrder
    ) -> OrderAnswer | None:
        connection = self._nodes.connection(node_id)
        if connection is None:
            return None
        try:
            return await connection.ask(order, timeout_s=self._settings.answer_timeout_s)
        except GameNodeError as error:
            _log.info(
                "no answer to an order: %s",
                error,
                extra={"event": "order.unanswered", "node_id": node_id},
            )
            return None
