"""One node's life with its server: register, keep a stream, beat, obey, deliver every report.

A broken connection is nothing special: the work goes on, reports wait, and the next stream opens
with a statement of everything that is held (rule RL1).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from gamenode.agent.inventory_reporter import InventoryReporter
from gamenode.agent.journal import Journal
from gamenode.agent.link import AgentStream, Link, LinkError
from gamenode.agent.runner import Runner
from gamenode.agent.uploader import LogUploader
from gamenode.domain.command import (
    Acknowledged,
    CancelOrder,
    Closed,
    CloseReason,
    CollectOrder,
    Dispatch,
    FencedOrder,
    FollowLog,
    HeldPipeline,
    NumberedReport,
    Order,
    OrderAnswer,
    OrderOutcome,
    ServerWord,
    Statement,
    VerifyOrder,
    Welcome,
)
from gamenode.domain.node import (
    ConditionType,
    Heartbeat,
    HeartbeatResult,
    Maintenance,
    Registration,
    RegistrationAnswer,
    generation_of,
)
from gamenode.domain.pipeline import PipelineReport, Reason, Report, StepReport
from gamenode.lib.backoff import Backoff
from gamenode.lib.clock import Clock
from gamenode.lib.tasks import Supervisor, Wake

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """Intervals and bounds of the session (C2, RL5)."""

    heartbeat_retries: int = 3
    """How often a heartbeat that was not answered is sent again."""
    heartbeat_retry_s: float = 5.0
    """The wait before that."""
    welcome_timeout_s: float = 30.0
    """How long the server's first word on a stream is waited for."""
    reconnect_first_s: float = 0.2
    """The wait before a second try at a session; it doubles with each."""
    reconnect_most_s: float = 5.0
    """The longest such wait while the node may still be online."""
    reconnect_most_long_s: float = 15.0
    """The longest wait once the server has been away for longer than the heartbeat timeout."""
    settled_s: float = 1.0
    """A stream that lasted so long is replaced at once; one that broke sooner counts as a failure,
    like one that never was."""
    reports_per_message_max: int = 500
    """Reports that go out in one message."""


class Outbox:
    """Reports in order, each kept until it is acknowledged."""

    def __init__(self, *, in_flight_max: int = 500) -> None:
        """Hold nothing; let at most `in_flight_max` wait for their acknowledgement at the server.

        More would be held there, and keep heartbeats from being read (P14).
        """
        self._in_flight_max = in_flight_max
        self._sequence = 0
        self._unacknowledged: dict[int, tuple[Dispatch, NumberedReport]] = {}
        self._of_dispatch: dict[Dispatch, dict[int, NumberedReport]] = {}
        self._sent_to = 0
        self._in_flight = 0
        self._instances_due = False
        self.wake = Wake()

    def instances_changed(self) -> None:
        """Have the server told which instances live, after the reports taken so far."""
        self._instances_due = True
        self.wake.ring()

    def take_instances_due(self) -> bool:
        """Return whether that has to be told, and count it as told."""
        due, self._instances_due = self._instances_due, False
        return due

    def report(self, dispatch: Dispatch, report: Report) -> None:
        """Take a report; it goes out after those taken before.

        One that still waits is not taken twice, however often its dispatch starts over. How far a
        pull is goes out once the word before it has arrived, so that a server that is away does not
        let them heap up.
        """
        waiting = self._of_dispatch.setdefault(dispatch, {})
        if _is_pull(report) and any(_is_pull(numbered.report) for numbered in waiting.values()):
            return
        if any(numbered.report == report for numbered in waiting.values()):
            return
        self._sequence += 1
        numbered = NumberedReport(sequence=self._sequence, report=report)
        self._unacknowledged[self._sequence] = (dispatch, numbered)
        waiting[self._sequence] = numbered
        self.wake.ring()

    def of(self, dispatch: Dispatch) -> tuple[NumberedReport, ...]:
        """Return what is not acknowledged of one dispatch."""
        return tuple(self._of_dispatch.get(dispatch, {}).values())

    def state(self) -> Mapping[Dispatch, tuple[NumberedReport, ...]]:
        """Return the reports that go out with a statement, by dispatch, and count them as sent.

        The oldest ones, as many as may be in flight: after days away all of them could be more than
        one message holds. The others follow on the stream.
        """
        stated: dict[Dispatch, list[NumberedReport]] = {}
        oldest = list(self._unacknowledged.items())[: self._in_flight_max]
        for _, (dispatch, numbered) in oldest:
            stated.setdefault(dispatch, []).append(numbered)
        self._sent_to = oldest[-1][0] if oldest else self._sequence
        self._in_flight = len(oldest)
        return {dispatch: tuple(reports) for dispatch, reports in stated.items()}

    def unsent(self, most: int) -> list[NumberedReport]:
        """Return the next reports to send, and count them as sent."""
        batch: list[NumberedReport] = []
        most = min(most, self._in_flight_max - self._in_flight)
        while len(batch) < most and self._sent_to < self._sequence:
            self._sent_to += 1
            if (entry := self._unacknowledged.get(self._sent_to)) is not None:
                batch.append(entry[1])
        self._in_flight += len(batch)
        return batch

    def acknowledge(self, sequence: int) -> tuple[Dispatch, Report] | None:
        """Forget a report; return what it was, or None for one that is not known (any more)."""
        entry = self._unacknowledged.pop(sequence, None)
        if entry is None:
            return None
        self._in_flight -= sequence <= self._sent_to
        dispatch, numbered = entry
        waiting = self._of_dispatch[dispatch]
        del waiting[sequence]
        if not waiting:
            del self._of_dispatch[dispatch]
        self.wake.ring()  # there is room for another one
        return dispatch, numbered.report


def _is_pull(report: Report) -> bool:
    return isinstance(report, StepReport) and report.reason is Reason.PULLING


class Session:
    """Registers the node, and holds its stream for as long as the agent lives."""

    def __init__(
        self,
        *,
        link: Link,
        journal: Journal,
        runner: Runner,
        uploader: LogUploader,
        outbox: Outbox,
        inventory: InventoryReporter,
        registration: Callable[[int | None], Awaitable[Registration]],
        conditions: Callable[[], Awaitable[Mapping[ConditionType, str]]],
        clock: Clock,
        random: Random,
        settings: SessionSettings,
    ) -> None:
        """Be ready to run; `registration` collects what the node says of itself."""
        self._link = link
        self._journal = journal
        self._runner = runner
        self._uploader = uploader
        self._outbox = outbox
        self._inventory = inventory
        self._registration = registration
        self._conditions = conditions
        self._clock = clock
        self._random = random
        self._settings = settings
        self._supervisor = Supervisor()
        self._node_id = ""
        self._boot_id = ""
        self._continued = True
        """Whether the server takes this session for the one before; until its first welcome."""
        self._answer: RegistrationAnswer | None = None
        self._epoch = journal.last_session_epoch()
        self._stream_number = 0
        self._stream: AgentStream | None = None
        self._last_sequence = 0
        self._followed: set[tuple[str, str]] = set()
        self._last_success_s = clock.monotonic_s()
        self._leaving = False
        self._beat_answered = asyncio.Event()
        self._round_trip_s: float | None = None

    async def run(self) -> None:
        """Register and hold a stream, again and again, until cancelled or left."""
        failures = 0
        while not self._leaving:
            retry_after_s = 0.0
            begun_s = self._clock.monotonic_s()
            try:
                if self._answer is None:
                    await self._register()
                closed = await self._hold_stream()
                retry_after_s = closed.retry_after_s
                if closed.reason is CloseReason.REGISTER_AGAIN:
                    self._answer = None
                if closed.reason is CloseReason.SUPERSEDED:
                    # Somebody else speaks for this node: never a race of two (rule RL3).
                    self._answer = None
                    retry_after_s = max(retry_after_s, self._settings.reconnect_most_long_s)
                failures += 1
            except LinkError as error:
                failures += 1
                _log.log(
                    logging.INFO if failures == 1 else logging.WARNING,
                    "no stream to the server: %s",
                    error,
                    extra={"event": "link.broken", "failures": failures},
                )
                if not error.transient:
                    self._answer = None
            except (OSError, sqlite3.Error) as error:
                # A full disk must not end the agent: what runs has to be looked after.
                failures += 1
                _log.warning(
                    "this host does not let the agent register: %s",
                    error,
                    extra={"event": "session.failed", "failures": failures},
                )
            lasted_s = self._last_success_s - begun_s
            if lasted_s >= self._settings.settled_s:
                failures = min(failures, 1)
            await asyncio.sleep(max(retry_after_s, self._delay_s(failures)))

    @property
    def active(self) -> bool:
        """Return whether the server is reached, and wants more of this node than heartbeats."""
        return self._stream is not None and self._runner.state[1] is not Maintenance.DISABLED

    async def leave(self, reason: str) -> None:
        """Say goodbye, so that the node is offline at once and not after a grace."""
        self._leaving = True
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                await stream.goodbye(reason)
            except LinkError:
                return

    async def close(self) -> None:
        """End what this session started."""
        await self._supervisor.close()

    def _delay_s(self, failures: int) -> float:
        """Return the wait before the next attempt: none at first, then growing (rule RL5)."""
        if failures <= 1:
            return 0.0
        timeout_s = self._answer.heartbeat_timeout_s if self._answer else 45.0
        recent = self._clock.monotonic_s() - self._last_success_s < timeout_s
        most_s = self._settings.reconnect_most_s
        if not recent:
            most_s = self._settings.reconnect_most_long_s
        backoff = Backoff(first_s=self._settings.reconnect_first_s, most_s=most_s)
        return backoff.delay_s(failures - 1, self._random)

    async def _register(self) -> None:
        registration = await self._registration(self._epoch)
        answer = await self._link.register(registration)
        if not answer.session_id:
            raise LinkError(f"registration refused: {answer.message}", transient=False)
        # A restored server does not know the newest session; the journal is no older for that.
        self._continued = answer.continuation or (
            self._epoch is not None
            and generation_of(answer.session_epoch) > generation_of(self._epoch)
        )
        # On disk before it is used: a crash in between costs one unused epoch, which the server
        # allows for; the other order would lose continuity (rule RL3).
        await self._journal.open_session(answer.session_epoch, continued=self._continued)
        self._epoch = answer.session_epoch
        self._answer = answer
        self._node_id = registration.node_id
        self._boot_id = registration.boot_id
        self._stream_number = 0
        self._inventory.registered()
        self._uploader.obey_chunk_bytes_max(answer.log_chunk_bytes_max)
        _log.info(
            "registered: %s",
            answer.message,
            extra={"event": "session.opened", "epoch": answer.session_epoch},
        )

    async def _hold_stream(self) -> Closed:
        """Open a stream and live with it; return why the server closed it.

        Raises:
            LinkError: it broke.
        """
        answer = self._answer
        assert answer is not None
        self._stream_number += 1
        state_version, maintenance = self._runner.state
        stated = self._outbox.state()
        statement = Statement(
            node_id=self._node_id,
            session_id=answer.session_id,
            stream_number=self._stream_number,
            state_version=state_version,
            maintenance=maintenance,
            held=tuple(
                HeldPipeline(dispatch=dispatch, reports=stated.get(dispatch, ()))
                for dispatch in self._runner.held()
            ),
            boot_id=self._boot_id,
            instances=self._runner.living_instances(),
        )
        self._last_sequence = 0
        stream = await self._link.open(statement)
        side = Supervisor()
        try:
            async with asyncio.timeout(self._settings.welcome_timeout_s):
                first = await stream.read()
            if isinstance(first, Closed):
                return first
            if not isinstance(first, Welcome):
                raise LinkError("the server did not welcome the statement", transient=True)
            self._stream = stream
            self._welcomed(first)
            self._inventory.connected()
            broken = asyncio.Event()
            _ = side.start("reports", self._send_reports(stream, broken))
            _ = side.start("heartbeats", self._beat(stream, answer, broken))
            _ = side.start("broken", self._close_when(stream, broken))
            while True:
                word = await stream.read()
                self._last_success_s = self._clock.monotonic_s()
                if isinstance(word, Closed):
                    _log.info(
                        "the server closed the stream: %s",
                        word.message or word.reason,
                        extra={"event": "link.closed", "reason": word.reason},
                    )
                    return word
                if isinstance(word, HeartbeatResult) and not word.counted:
                    return Closed(reason=CloseReason.REGISTER_AGAIN, message=word.message)
                self._hear(stream, word)
        except TimeoutError as error:
            raise LinkError("no welcome in time", transient=True) from error
        finally:
            self._stream = None
            await side.close()
            await stream.close()

    def _welcomed(self, welcome: Welcome) -> None:
        self._last_success_s = self._clock.monotonic_s()
        # Who follows what, the server says anew on every stream.
        for followed in list(self._followed):
            self._set_live(followed, live=False)
        if not self._continued:
            # Of what is held now, and not again on this session's later streams.
            self._runner.abandon()
            self._continued = True
        ends = [self._end(dispatch) for dispatch in welcome.unwanted]
        _ = self._supervisor.start("welcome", self._settle(ends))

    async def _settle(self, ends: Sequence[asyncio.Task[None]]) -> None:
        """Let what is held go on, once all that the server does not want has been ended."""
        if ends:
            await asyncio.wait(ends)
        self._runner.confirm()

    def _hear(self, stream: AgentStream, word: ServerWord | None) -> None:
        match word:
            case FencedOrder():
                self._obey(stream, word)
            case Acknowledged():
                self._acknowledged(word)
            case HeartbeatResult():
                self._beat_answered.set()
                if word.send_inventory:
                    self._inventory.resend()
            case FollowLog():
                self._set_live((word.pipeline_id, word.step), live=word.live)
            case Welcome() | Closed() | None:
                pass

    def _set_live(self, followed: tuple[str, str], *, live: bool) -> None:
        if live:
            self._followed.add(followed)
        else:
            self._followed.discard(followed)
        self._uploader.set_live(*followed, live=live)

    def _obey(self, stream: AgentStream, fenced: FencedOrder) -> None:
        """Carry out an order of the newest stream, once (rule RL2)."""
        if (fenced.session_epoch, fenced.stream_number) != (self._epoch, self._stream_number):
            return
        if fenced.sequence <= self._last_sequence:
            return
        self._last_sequence = fenced.sequence
        # Owned by the session, not by the stream: an order half written to the journal must not
        # be cancelled because the connection broke.
        name = f"order {fenced.sequence}"
        _ = self._supervisor.start(name, self._carry_out(stream, fenced.sequence, fenced.order))

    async def _carry_out(self, stream: AgentStream, sequence: int, order: Order | None) -> None:
        match order:
            case None:
                answer = OrderAnswer(
                    outcome=OrderOutcome.REFUSED,
                    reason=Reason.UNSUPPORTED,
                    message="this agent does not know such an order: upgrade it",
                )
            case CollectOrder():
                answer = self._collect()
            case VerifyOrder():
                answer = await self._runner.state_attempts()
            case _:
                answer = await self._runner.take(order)
        try:
            await stream.answer(sequence, answer)
        except LinkError:
            return  # the next statement says what is held

    def _collect(self) -> OrderAnswer:
        if not self.active:
            return OrderAnswer(
                outcome=OrderOutcome.REFUSED,
                reason=Reason.NODE_DISABLED,
                message="a disabled node collects nothing: enable it first",
            )
        self._inventory.ask()
        return OrderAnswer(outcome=OrderOutcome.ACCEPTED)

    def _acknowledged(self, word: Acknowledged) -> None:
        for sequence, result in word.results:
            entry = self._outbox.acknowledge(sequence)
            if entry is None:
                continue
            dispatch, report = entry
            if isinstance(report, PipelineReport) and report.status.terminal:
                self._runner.release(dispatch)
            elif result.stop:
                _ = self._end(dispatch)

    def _end(self, dispatch: Dispatch) -> asyncio.Task[None]:
        order = CancelOrder(
            dispatch=dispatch,
            reason=Reason.CANCELLED_BY_USER,
            message="the server does not want it any more",
            force=True,
        )
        return self._supervisor.start(f"end {dispatch.pipeline_id}", self._cancel(order))

    async def _cancel(self, order: CancelOrder) -> None:
        if order.dispatch in self._runner.held():
            await self._runner.cancel(order)

    async def _send_reports(self, stream: AgentStream, broken: asyncio.Event) -> None:
        try:
            while True:
                batch = self._outbox.unsent(self._settings.reports_per_message_max)
                if batch:
                    await stream.report(batch)
                elif self._outbox.take_instances_due():
                    # Said as it is at this place among the reports: whose end was reported before
                    # has left here all that it leaves.
                    await stream.instances(self._runner.living_instances())
                else:
                    await self._outbox.wake.wait(60.0)
        except LinkError:
            broken.set()

    async def _beat(
        self, stream: AgentStream, answer: RegistrationAnswer, broken: asyncio.Event
    ) -> None:
        """Send heartbeats; one without an answer is sent again, and then the stream is given up."""
        try:
            while True:
                if not await self._one_beat(stream, answer):
                    _log.warning("heartbeats without answer", extra={"event": "link.silent"})
                    broken.set()
                    return
                await asyncio.sleep(answer.heartbeat_interval_s)
        except LinkError:
            broken.set()

    async def _one_beat(self, stream: AgentStream, answer: RegistrationAnswer) -> bool:
        conditions = await self._conditions()
        for _ in range(1 + self._settings.heartbeat_retries):
            self._beat_answered.clear()
            sent_s = self._clock.monotonic_s()
            await stream.heartbeat(
                Heartbeat(
                    node_id=self._node_id,
                    session_id=answer.session_id,
                    sent_at=self._clock.now(),
                    round_trip_s=self._round_trip_s,
                    inventory_hash=self._inventory.reported_hash,
                    conditions=conditions,
                )
            )
            try:
                async with asyncio.timeout(self._settings.heartbeat_retry_s):
                    await self._beat_answered.wait()
            except TimeoutError:
                continue
            self._round_trip_s = self._clock.monotonic_s() - sent_s
            return True
        return False

    @staticmethod
    async def _close_when(stream: AgentStream, broken: asyncio.Event) -> None:
        await broken.wait()
        await stream.close()
