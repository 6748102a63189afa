"""Which node a pipeline goes to, and why not the others: one pure function (F7, F10)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from gamenode.domain.node import Maintenance
from gamenode.domain.selector import Selector
from gamenode.lib.clock import Instant


class Misfit(StrEnum):
    """Why a node does not fit. The first group passes by itself, the second never."""

    OFFLINE = "OFFLINE"
    MAINTENANCE = "MAINTENANCE"
    DISABLED = "DISABLED"
    CONDITION = "CONDITION"
    BUSY = "BUSY"

    OTHER_NODE = "OTHER_NODE"
    SELECTOR = "SELECTOR"
    ENV_MISSING = "ENV_MISSING"
    SIMPLE_CLIENT = "SIMPLE_CLIENT"


WORDS: Mapping[Misfit, str] = {
    Misfit.OFFLINE: "offline",
    Misfit.MAINTENANCE: "in maintenance",
    Misfit.DISABLED: "disabled",
    Misfit.CONDITION: "kept free by a condition",
    Misfit.BUSY: "at their limit of pipelines",
    Misfit.OTHER_NODE: "not the node asked for",
    Misfit.SELECTOR: "not matching the selector",
    Misfit.ENV_MISSING: "without an env that the file declares",
    Misfit.SIMPLE_CLIENT: "simple clients, which take only work that names them",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What placement needs to know of a node."""

    node_id: str
    online: bool
    connected: bool
    """Whether work can be sent to it now."""
    simple: bool
    """Whether it is a simple client: it watches events for work that names it (rule RL4)."""
    maintenance: Maintenance
    blocked: bool
    """Whether a condition keeps new work away."""
    values: Mapping[str, Sequence[str]]
    """What a selector can ask for: labels, node fields and inventory paths."""
    env_names: frozenset[str]
    load: int
    """How many pipelines are bound to it and have not ended."""
    load_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a pipeline asks of a node."""

    node_id: str = ""
    selector: Selector = field(default_factory=Selector)
    envs_needed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedPipeline:
    """A pipeline that waits for a node."""

    id: str
    wanted_node: str
    selector: str
    envs_needed: frozenset[str]
    waiting: str
    """The reasons found at the last look."""
    position: tuple[int, Instant, str]
    """Its place in the queue: priority (higher first), then creation, then id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A node, or why there is none."""

    node_id: str | None
    misfits: Mapping[Misfit, int]
    """How many nodes were left out, by the first reason against each."""

    def explain(self) -> str:
        """Return the reasons in words, such as `12 nodes: 7 offline, 5 in maintenance`."""
        total = sum(self.misfits.values())
        if not total:
            return "no node is registered"
        parts = ", ".join(f"{count} {WORDS[why]}" for why, count in self.misfits.items())
        return f"{total} node{'s' if total != 1 else ''}: {parts}"


def misfit(demand: Demand, candidate: Candidate) -> Misfit | None:
    """Return the first reason why `candidate` cannot take the pipeline now, or None."""
    if demand.node_id and candidate.node_id != demand.node_id:
        return Misfit.OTHER_NODE
    if not demand.selector.matches(lambda key: candidate.values.get(key, ())):
        return Misfit.SELECTOR
    if not demand.envs_needed <= candidate.env_names:
        return Misfit.ENV_MISSING
    if candidate.maintenance is Maintenance.MAINTENANCE:
        return Misfit.MAINTENANCE
    if candidate.maintenance is Maintenance.DISABLED:
        return Misfit.DISABLED
    if not candidate.online:
        return Misfit.OFFLINE
    if candidate.simple and not demand.node_id:
        return Misfit.SIMPLE_CLIENT
    if not candidate.simple and not candidate.connected:
        return Misfit.OFFLINE
    if candidate.blocked:
        return Misfit.CONDITION
    return Misfit.BUSY if candidate.load >= candidate.load_max else None


def place(demand: Demand, candidates: Iterable[Candidate]) -> Decision:
    """Return the least loaded node that fits; among equals the one whose id sorts first."""
    misfits: dict[Misfit, int] = {}
    fitting: list[Candidate] = []
    for candidate in candidates:
        why = misfit(demand, candidate)
        if why is None:
            fitting.append(candidate)
        else:
            misfits[why] = misfits.get(why, 0) + 1
    best = min(fitting, key=lambda c: (c.load, c.node_id), default=None)
    return Decision(node_id=best.node_id if best else None, misfits=misfits)
