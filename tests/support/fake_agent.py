"""An agent played word by word, and what is said to a server about its work."""

from __future__ import annotations

import asyncio

from tests.support.plane import USER, ControlPlane, registration
from tests.support.time import until

from gamenode.domain.command import (
    Dispatch,
    FencedOrder,
    HeldPipeline,
    NumberedReport,
    Order,
    OrderAnswer,
    OrderOutcome,
    ServerWord,
    Statement,
)
from gamenode.domain.node import Maintenance, RegistrationAnswer
from gamenode.domain.pipeline import (
    Pipeline,
    PipelineReport,
    Report,
    ReportResult,
    Status,
    StepReport,
)
from gamenode.server.nodes.connections import AgentConnection

FILE = "name: w\nsteps: [{name: one, container: {image: a}}, {name: two, container: {image: a}}]"


class FakeAgent:
    """The agent's side of a stream, word by word."""

    def __init__(
        self, plane: ControlPlane, answer: RegistrationAnswer, connection: AgentConnection
    ) -> None:
        self.plane = plane
        self.answer = answer
        self.connection = connection
        self.words: list[ServerWord] = []

    @classmethod
    async def join(
        cls,
        plane: ControlPlane,
        node_id: str = "n1",
        *,
        held: tuple[HeldPipeline, ...] = (),
        after: FakeAgent | None = None,
        new_session: bool = False,
        boot_id: str = "boot-1",
        state_version: int = 1,
    ) -> FakeAgent:
        """Register (or go on in a session) and have a statement reconciled."""
        number = after.connection.stream_number + 1 if after is not None else 1
        if after is None or new_session:
            epoch = after.answer.session_epoch if after is not None else None
            answer = await plane.nodes.register(
                registration(node_id, boot_id=boot_id, last_session_epoch=epoch)
            )
            number = 1
        else:
            answer = after.answer
        statement = Statement(
            node_id=node_id,
            session_id=answer.session_id,
            stream_number=number,
            state_version=state_version,
            maintenance=Maintenance.NORMAL,
            held=held,
            boot_id=boot_id,
        )
        connection = await plane.nodes.attach(statement)
        assert connection is not None
        await plane.pipelines.reconcile(connection, statement)
        return cls(plane, answer, connection)

    async def heard(self) -> list[ServerWord]:
        """Return everything that was said so far."""
        try:
            async with asyncio.timeout(0.01):
                self.words += await self.connection.next_words()
        except TimeoutError:
            pass
        return self.words

    async def orders(self) -> list[Order]:
        """Return the orders that were sent so far."""
        words = await self.heard()
        return [w.order for w in words if isinstance(w, FencedOrder) and w.order is not None]

    async def take(
        self, outcome: OrderOutcome = OrderOutcome.ACCEPTED, reason: str = "", *, orders: int = 1
    ) -> Order:
        """Wait for the `orders`th order and answer it."""

        async def sent() -> bool:
            return len(await self.orders()) >= orders

        await until(sent, timeout_s=5.0, every_s=0.005)
        word = [w for w in self.words if isinstance(w, FencedOrder)][orders - 1]
        answer = OrderAnswer(outcome=outcome, reason=reason, message="because")
        self.connection.answered(word.sequence, answer)
        assert word.order is not None
        return word.order

    async def report(self, *reports: Report) -> list[ReportResult]:
        """Report, and return what is answered."""
        taken = await self.plane.service.apply(
            reports,
            node_id=self.connection.node_id,
            session=self.connection.session,
            now=self.plane.clock.now(),
        )
        assert taken is not None
        return list(taken)


def step(
    pipeline: str, status: Status, *, name: str = "one", attempt: int = 1, dispatch: int = 1
) -> StepReport:
    return StepReport(
        pipeline_id=pipeline,
        step=name,
        status=status,
        pipeline_attempt=dispatch,
        attempt=attempt,
        run=1,
    )


def whole(pipeline: str, status: Status, *, dispatch: int = 1) -> PipelineReport:
    return PipelineReport(pipeline_id=pipeline, status=status, attempt=dispatch)


def held(pipeline: str, *reports: Report, dispatch: int = 1) -> HeldPipeline:
    return HeldPipeline(
        dispatch=Dispatch(pipeline, dispatch),
        reports=tuple(
            NumberedReport(sequence=number, report=report) for number, report in enumerate(reports)
        ),
    )


async def get(plane: ControlPlane, pipeline: Pipeline | str) -> Pipeline:
    return await plane.service.get(pipeline if isinstance(pipeline, str) else pipeline.id)


async def dispatched(plane: ControlPlane, agent: FakeAgent, file: str = FILE) -> str:
    """Create a pipeline, and have the agent take it."""
    before = len(await agent.orders())
    created = await plane.create(file)
    await plane.dispatcher.sweep()
    await agent.take(orders=before + 1)
    await acknowledged(plane, created.id)
    return created.id


async def acknowledged(plane: ControlPlane, pipeline_id: str) -> None:
    async def is_acknowledged() -> bool:
        await plane.dispatcher.sweep()  # it writes down what no report has said by then
        owed = await plane.service.owed_nodes()
        unacknowledged = await plane.service.unacknowledged(list(owed.dispatches), 100)
        return all(dispatch.pipeline_id != pipeline_id for _, dispatch in unacknowledged)

    await until(is_acknowledged, timeout_s=5.0, every_s=0.005)


async def kinds(plane: ControlPlane, pipeline_id: str) -> list[str]:
    found = [event for event in await plane.events() if event.entity_id.startswith(pipeline_id)]
    return [event.type for event in found]


async def cancel(plane: ControlPlane, pipeline_id: str, *, force: bool = False) -> Pipeline:
    return await plane.pipelines.cancel(pipeline_id, reason="enough", force=force, by=USER)
