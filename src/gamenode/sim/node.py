"""One simulated node: a host that stays, and an agent on it that comes and goes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from random import Random

from gamenode.agent.app import Agent
from gamenode.agent.journal import Journal
from gamenode.agent.policy import OpenPolicy
from gamenode.agent.runtime import RunKey
from gamenode.agent.runtime.fake import FakeHost, FakeRuntime
from gamenode.agent.settings import AgentSettings
from gamenode.lib.clock import Clock
from gamenode.sim.faults import Fault, FaultKind
from gamenode.sim.host import MadeUpHost, SkewedClock
from gamenode.sim.judge import Judge
from gamenode.sim.link import SimulatedLink


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all simulated nodes share."""

    settings: AgentSettings
    judge: Judge
    clock: Clock
    random: Random
    pool: Executor


class SimulatedNode:
    """A node of a simulated fleet."""

    def __init__(
        self, number: int, around: Surroundings, *, delay_s_max: float = 0.0, skew_s: float = 0.0
    ) -> None:
        """Be node `number`, not started yet; late by `delay_s_max`, its clock off by `skew_s`."""
        self.node_id = f"sim-{number:05d}"
        self.struck = False
        """Whether a fault lies on it now."""
        self._around = around
        self._delay_s_max = delay_s_max
        self._clock = SkewedClock(around.clock, skew_s) if skew_s else around.clock
        self._settings = replace(
            around.settings, agent=replace(around.settings.agent, node_id=self.node_id)
        )
        self._collector = MadeUpHost(number, self._clock)
        # The host: what an agent that is killed leaves behind.
        self._host = FakeHost(clock=self._clock)
        self._journal = Journal(None, pool=around.pool)
        self._link: SimulatedLink | None = None
        self._agent: Agent | None = None
        around.judge.add(self.node_id, skewed=bool(skew_s))

    @property
    def starts(self) -> Sequence[RunKey]:
        """Return every run that came to run here."""
        return self._host.starts

    def start(self) -> None:
        """Start the agent."""
        around = self._around
        self._link = SimulatedLink(
            self.node_id,
            self._settings.agent.server,
            self._settings.link,
            judge=around.judge,
            clock=around.clock,
            random=around.random,
            delay_s_max=self._delay_s_max,
        )
        self._agent = Agent(
            self._settings,
            clock=self._clock,
            random=around.random,
            runtime=FakeRuntime(self._host),
            link=self._link,
            collector=self._collector,
            journal=self._journal,
            policy=OpenPolicy(),  # made-up hosts have no owner
            pool=around.pool,
        )
        self._agent.start().add_done_callback(self._ended)

    async def strike(self, fault: Fault, pause: Callable[[float], Awaitable[None]]) -> None:
        """Lay a fault on the node, for as long as `pause` takes. Not to be cancelled."""
        assert self._link is not None
        self.struck = True
        judge = self._around.judge
        try:
            judge.cut(self.node_id, fault.kind, silent=fault.kind is FaultKind.SILENCE)
            match fault.kind:
                case FaultKind.PARTITION:
                    await self._link.cut()
                    await pause(fault.duration_s)
                    judge.healed(self.node_id)
                    await self._link.heal()
                case FaultKind.SILENCE:
                    self._link.still()
                    await pause(fault.duration_s)
                    judge.healed(self.node_id)
                    await self._link.heal()
                case FaultKind.KILL:
                    await self._kill()
                    await pause(fault.duration_s)
                    judge.healed(self.node_id)
                    self.start()
                case FaultKind.SLOW | FaultKind.SKEW:
                    raise ValueError(f"{fault.kind} does not come and go")
        finally:
            self.struck = False

    async def stop(self) -> None:
        """Let the agent leave, and the host go."""
        agent, self._agent = self._agent, None
        if agent is not None:
            await agent.stop("the simulation ends")
        await self._journal.close()

    async def _kill(self) -> None:
        """End the agent without a word of goodbye; host and journal stay."""
        agent, self._agent = self._agent, None
        assert agent is not None
        assert self._link is not None
        await self._link.cut()
        await agent.stop()

    def _ended(self, session: asyncio.Task[None]) -> None:
        if not session.cancelled() and (error := session.exception()) is not None:
            self._around.judge.died(self.node_id, error)
