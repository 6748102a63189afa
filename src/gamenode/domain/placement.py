"""Which node a pipeline goes to, what it gets there, and why not to the others (F7, F10).

One pure function, `decide`, serves `plan`, `explain`, the dispatcher and the transaction that
binds. `Pass` is the same over a whole queue: what one pipeline was given, the next does not find.

The policy: among the nodes that fit, the one with the fewest pipelines now; among equals the one
whose id sorts first. On the node, the GPU with the fewest free slots that fits, so that whole GPUs
stay free for who needs many slots; and the lowest free ports of the node's range.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from gamenode.domain.container import FILE_KEYS, HONOURED, HostPort, PortRange
from gamenode.domain.inventory import Inventory
from gamenode.domain.node import ConditionType, Maintenance, Offer
from gamenode.domain.pipeline import GpuDemand, Group, Waiting
from gamenode.domain.quantity import size_text
from gamenode.domain.selector import Selector


class Misfit(StrEnum):
    """Why a pipeline cannot go to a node, for programs."""

    # These never pass by themselves: somebody must change the node, or the file.
    OTHER_NODE = "OTHER_NODE"
    SELECTOR = "SELECTOR"
    ENV_MISSING = "ENV_MISSING"
    SIMPLE_CLIENT = "SIMPLE_CLIENT"
    UNSUPPORTED = "UNSUPPORTED"
    CPU_TOTAL = "CPU_TOTAL"
    MEMORY_TOTAL = "MEMORY_TOTAL"
    GPU_TOTAL = "GPU_TOTAL"
    PORTS_TOTAL = "PORTS_TOTAL"

    # These do.
    MAINTENANCE = "MAINTENANCE"
    DISABLED = "DISABLED"
    OFFLINE = "OFFLINE"
    CONDITION = "CONDITION"
    BUSY = "BUSY"
    CPU = "CPU"
    MEMORY = "MEMORY"
    GPU_SLOTS = "GPU_SLOTS"
    GPU_MEMORY = "GPU_MEMORY"
    PORT = "PORT"
    PORTS = "PORTS"
    GROUP = "GROUP"

    @property
    def permanent(self) -> bool:
        """Whether waiting does not help."""
        return self in _PERMANENT


_JUDGED_MAX: Final = 64
"""Verdicts on all nodes are kept for so many demands, so that a pass needs little memory."""

_PERMANENT: Final = frozenset(
    {
        Misfit.OTHER_NODE,
        Misfit.SELECTOR,
        Misfit.ENV_MISSING,
        Misfit.SIMPLE_CLIENT,
        Misfit.UNSUPPORTED,
        Misfit.CPU_TOTAL,
        Misfit.MEMORY_TOTAL,
        Misfit.GPU_TOTAL,
        Misfit.PORTS_TOTAL,
    }
)

_WORDS: Final[Mapping[Misfit, tuple[str, str]]] = {
    Misfit.OTHER_NODE: ("is not the node asked for", "are not the node asked for"),
    Misfit.SELECTOR: ("does not match {}", "do not match {}"),
    Misfit.ENV_MISSING: ("does not define the env {}", "do not define the env {}"),
    Misfit.SIMPLE_CLIENT: ("takes only work that names it", "take only work that names them"),
    Misfit.UNSUPPORTED: ("cannot honour {}", "cannot honour {}"),
    Misfit.CPU_TOTAL: ("has fewer than {} CPUs", "have fewer than {} CPUs"),
    Misfit.MEMORY_TOTAL: ("has less than {} of memory", "have less than {} of memory"),
    Misfit.GPU_TOTAL: ("has no GPU with {}", "have no GPU with {}"),
    Misfit.PORTS_TOTAL: ("does not give out {}", "do not give out {}"),
    Misfit.MAINTENANCE: ("in maintenance", "in maintenance"),
    Misfit.DISABLED: ("disabled", "disabled"),
    Misfit.OFFLINE: ("offline", "offline"),
    Misfit.CONDITION: ("has the condition {}", "have the condition {}"),
    Misfit.BUSY: ("at its limit of pipelines", "at their limit of pipelines"),
    Misfit.CPU: ("has fewer than {} CPUs free", "have fewer than {} CPUs free"),
    Misfit.MEMORY: ("has less than {} of memory free", "have less than {} of memory free"),
    Misfit.GPU_SLOTS: ("has no {}", "have no {}"),
    Misfit.GPU_MEMORY: ("has no GPU with {} free", "have no GPU with {} free"),
    Misfit.PORT: ("has port {} in use", "have port {} in use"),
    Misfit.PORTS: ("has fewer than {} free", "have fewer than {} free"),
    Misfit.GROUP: ("{}", "{}"),
}
"""For one node and for several; what was asked for stands in the braces."""


# What a node has, and what is taken of it


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCapacity:
    """A GPU that is given out."""

    id: str
    slots: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a node has in all; what it did not say, it does not have."""

    cpu_millis: int = 0
    """Thousandths of a CPU, as the operating system counts them."""
    memory_bytes: int = 0
    gpus: tuple[GpuCapacity, ...] = ()
    ports: PortRange | None = None
    """The host ports that are given out to who names none."""


def capacity_of(inventory: Inventory, offer: Offer) -> Capacity:
    """Return what a node has in all. A GPU without a UUID is not given out: by it, it is named."""
    hardware = inventory.hardware
    cpus = sum(cpu.threads or cpu.cores or 0 for cpu in hardware.cpu)
    gpus = (
        GpuCapacity(
            id=gpu.uuid,
            slots=offer.gpu_slots_by_id.get(gpu.uuid, offer.gpu_slots),
            memory_bytes=gpu.memory_bytes or 0,
        )
        for gpu in hardware.gpu
        if gpu.uuid
    )
    return Capacity(
        cpu_millis=cpus * 1000,
        memory_bytes=hardware.memory.total_bytes or 0,
        gpus=tuple(gpu for gpu in gpus if gpu.slots),
        ports=offer.ports,
    )


@dataclass(frozen=True, slots=True)
class GpuReserved:
    """What is taken of one GPU."""

    slots: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """What is taken on one node, by dispatches that may run and by services that live on."""

    pipelines: int = 0
    """Dispatches whose end the agent has not stated."""
    cpu_millis: int = 0
    memory_bytes: int = 0
    gpus: Mapping[str, GpuReserved] = field(default_factory=dict)
    ports: frozenset[HostPort] = frozenset()


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
    conditions: tuple[ConditionType, ...]
    """Those that keep new work away."""
    values: Mapping[str, Sequence[str]]
    """What a selector can ask for: labels, node fields and inventory paths."""
    env_names: frozenset[str]
    runtimes: frozenset[str]
    """What runs its steps; empty: it did not say."""
    load_max: int
    """How many pipelines it takes at once."""
    capacity: Capacity = Capacity()
    reserved: Reserved = field(default_factory=Reserved)


# What a pipeline asks for, and what it gets


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a pipeline asks for. Two pipelines that ask for the same have equal demands."""

    node_id: str = ""
    selector: Selector = field(default_factory=Selector)
    envs_needed: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    """The fields of `ContainerSpec` that its steps use, and not every runtime honours."""
    cpu_millis: int = 0
    memory_bytes: int = 0
    gpu: GpuDemand | None = None
    ports: tuple[HostPort, ...] = ()
    """Host ports by number."""
    dynamic_ports: tuple[str, ...] = ()
    """The protocols of the host ports that the node chooses, in the order of the file."""
    group: Group | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a dispatch is given by name on its node."""

    gpu_id: str = ""
    ports: tuple[int, ...] = ()
    """One for each of the demand's `dynamic_ports`."""


# Verdicts


@dataclass(frozen=True, slots=True)
class Objection:
    """One reason against a node, or against any of them."""

    misfit: Misfit
    asked: str = ""
    """What was asked for: the same for every node with this objection."""
    found: str = ""
    """What there is instead, where that helps: of this node alone."""

    def text(self, nodes: int = 1) -> str:
        """Return it in words that follow a number of nodes, such as `do not match zone=a`."""
        return _WORDS[self.misfit][nodes != 1].format(self.asked)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one node fits."""

    node_id: str
    objections: tuple[Objection, ...] = ()
    """Everything against it, what never passes first; none: it fits."""
    assignment: Assignment = field(default_factory=Assignment)
    """What the pipeline would get there, where it fits."""

    @property
    def never(self) -> bool:
        """Whether waiting does not help: the node can never take the pipeline as it is."""
        return bool(self.objections) and self.objections[0].misfit.permanent


Explained = tuple[str, tuple[Waiting, ...]]
"""Why something waits: in one line, and reason by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A node and what is given there, or why there is none."""

    node_id: str | None
    assignment: Assignment
    verdicts: tuple[Verdict, ...]
    """Of every node, in the order of the candidates."""
    group: Objection | None = None
    """The concurrency group is full: that holds for every node."""

    @property
    def never(self) -> bool:
        """Whether no node that is known can ever take it as they are now."""
        return bool(self.verdicts) and all(verdict.never for verdict in self.verdicts)

    @property
    def unsupported(self) -> bool:
        """Whether only what runtimes honour keeps it from every node that it could go to.

        Then waiting is of no use, and the file is what has to change.
        """
        return self.never and any(
            {o.misfit for o in verdict.objections if o.misfit.permanent} == {Misfit.UNSUPPORTED}
            for verdict in self.verdicts
        )

    def waiting(self, named_max: int = 20) -> tuple[Waiting, ...]:
        """Return why it waits: one entry for each first objection; none where it has a node.

        At most `named_max` nodes are named in each.
        """
        return self.against(named_max) if self.node_id is None else ()

    def against(self, named_max: int = 20) -> tuple[Waiting, ...]:
        """Return what speaks against nodes, whether or not there is another one: as `waiting`."""
        against: dict[tuple[Misfit, str], list[str]] = {}
        for verdict in self.verdicts:
            if verdict.objections:
                first = verdict.objections[0]
                against.setdefault((first.misfit, first.asked), []).append(verdict.node_id)
        entries = [
            Waiting(
                reason=misfit,
                text=Objection(misfit, asked).text(len(nodes)),
                nodes=tuple(nodes[:named_max]),
                nodes_total=len(nodes),
                passes=not misfit.permanent,
            )
            for (misfit, asked), nodes in against.items()
        ]
        if self.group is not None:
            entries.insert(0, Waiting(reason=self.group.misfit, text=self.group.text()))
        return tuple(entries)

    def explain(self) -> str:
        """Return the reasons in words: `12 nodes: 7 do not match zone=a, 5 in maintenance`."""
        return summary(self.waiting(named_max=0), len(self.verdicts))


def summary(waiting: Sequence[Waiting], nodes_total: int) -> str:
    """Return why something waits in one line; empty where nothing speaks against it."""
    against = [entry for entry in waiting if entry.nodes_total]
    parts = [entry.text for entry in waiting if not entry.nodes_total]
    if against:
        counts = ", ".join(f"{entry.nodes_total} {entry.text}" for entry in against)
        parts.append(f"{nodes_total} node{'s' if nodes_total != 1 else ''}: {counts}")
    elif not nodes_total:
        parts.append("no node is registered")
    return "; ".join(parts)


# The function


def decide(
    demand: Demand, candidates: Iterable[Candidate], running: Mapping[str, int] | None = None
) -> Decision:
    """Return the node for one pipeline, or why there is none.

    `running` says how many pipelines of each concurrency group run.
    """
    return Pass(candidates, running or {}).place(demand)


class Pass:
    """One pass over a queue, in its order: what was given out is not given out again.

    Within a pass nothing becomes free. So a demand that was not met is not met any more, and of one
    that was, only nodes that something was placed on since are judged again.
    """

    def __init__(self, candidates: Iterable[Candidate], running: Mapping[str, int]) -> None:
        """Begin with what is reserved now, and how many pipelines of each group run."""
        self._candidates = {candidate.node_id: candidate for candidate in candidates}
        self._running = dict(running)
        self._placed_on: list[str] = []
        self._judged: dict[Demand, tuple[dict[str, Verdict], int]] = {}

    def candidate(self, node_id: str) -> Candidate:
        """Return a node, with what was given out counted as taken."""
        return self._candidates[node_id]

    def place(self, demand: Demand) -> Decision:
        """Return the node for the next pipeline, and count what it is given as taken."""
        verdicts = self._verdicts(demand)
        group = _group_objection(demand, self._running)
        best = None
        if group is None:
            best = min(
                (verdict for verdict in verdicts.values() if not verdict.objections),
                key=lambda v: (self._candidates[v.node_id].reserved.pipelines, v.node_id),
                default=None,
            )
        if best is None:
            del self._judged[demand]
        else:
            self._take(demand, self._candidates[best.node_id], best.assignment)
        return Decision(
            node_id=best.node_id if best is not None else None,
            assignment=best.assignment if best is not None else Assignment(),
            verdicts=tuple(verdicts.values()),
            group=group,
        )

    def _take(self, demand: Demand, node: Candidate, assignment: Assignment) -> None:
        reserved = with_reserved(node.reserved, demand, assignment)
        self._candidates[node.node_id] = replace(node, reserved=reserved)
        self._placed_on.append(node.node_id)
        if demand.group is not None:
            name = demand.group.name
            self._running[name] = self._running.get(name, 0) + 1

    def _verdicts(self, demand: Demand) -> dict[str, Verdict]:
        if demand in self._judged:
            verdicts, seen = self._judged[demand]
            again: Iterable[str] = set(self._placed_on[seen:])
        else:
            if len(self._judged) >= _JUDGED_MAX:
                self._judged.clear()
            verdicts, again = {}, self._candidates
        for node_id in again:
            verdicts[node_id] = judge(demand, self._candidates[node_id])
        self._judged[demand] = verdicts, len(self._placed_on)
        return verdicts


def with_reserved(reserved: Reserved, demand: Demand, assignment: Assignment) -> Reserved:
    """Return what is taken once a demand was met."""
    gpus = reserved.gpus
    if demand.gpu is not None:
        taken = gpus.get(assignment.gpu_id, GpuReserved())
        more = GpuReserved(
            taken.slots + demand.gpu.slots, taken.memory_bytes + demand.gpu.memory_bytes
        )
        gpus = {**gpus, assignment.gpu_id: more}
    return Reserved(
        pipelines=reserved.pipelines + 1,
        cpu_millis=reserved.cpu_millis + demand.cpu_millis,
        memory_bytes=reserved.memory_bytes + demand.memory_bytes,
        gpus=gpus,
        ports=reserved.ports.union(host_ports(demand, assignment)),
    )


def host_ports(demand: Demand, assignment: Assignment) -> tuple[HostPort, ...]:
    """Return the host ports that a pipeline has on its node, named and assigned."""
    assigned = zip(assignment.ports, demand.dynamic_ports, strict=True)
    return (*demand.ports, *(HostPort(port, protocol) for port, protocol in assigned))


def judge(demand: Demand, node: Candidate) -> Verdict:
    """Return whether one node fits now, with everything against it."""
    objections = [*_permanent(demand, node), *_passing(demand, node)]
    if objections:
        return Verdict(node.node_id, tuple(objections))
    gpu = _gpu_for(demand.gpu, node) if demand.gpu is not None else None
    ports = _free_ports(demand, node) or ()
    return Verdict(
        node.node_id, assignment=Assignment(gpu_id=gpu.id if gpu is not None else "", ports=ports)
    )


def _group_objection(demand: Demand, running: Mapping[str, int]) -> Objection | None:
    group = demand.group
    if group is None or running.get(group.name, 0) < group.limit:
        return None
    count = running[group.name]
    return Objection(
        Misfit.GROUP, f"concurrency group {group.name}: {count} of {group.limit} running"
    )


def _permanent(demand: Demand, node: Candidate) -> Iterator[Objection]:
    if demand.node_id and node.node_id != demand.node_id:
        yield Objection(Misfit.OTHER_NODE)
    for term in demand.selector.terms:
        if not term.matches(lambda key: node.values.get(key, ())):
            yield Objection(Misfit.SELECTOR, str(term))
    for name in sorted(demand.envs_needed - node.env_names):
        yield Objection(Misfit.ENV_MISSING, name)
    if node.simple and not demand.node_id:
        yield Objection(Misfit.SIMPLE_CLIENT)
    if unsupported := _unsupported(demand.keys, node.runtimes):
        yield Objection(Misfit.UNSUPPORTED, ", ".join(unsupported))
    capacity = node.capacity
    if demand.cpu_millis > capacity.cpu_millis:
        yield Objection(Misfit.CPU_TOTAL, _cpus(demand.cpu_millis), _cpus(capacity.cpu_millis))
    if demand.memory_bytes > capacity.memory_bytes:
        yield Objection(
            Misfit.MEMORY_TOTAL, size_text(demand.memory_bytes), size_text(capacity.memory_bytes)
        )
    if demand.gpu is not None and not _large_enough(demand.gpu, node):
        yield Objection(Misfit.GPU_TOTAL, _gpu_text(demand.gpu))
    wanted, given = len(demand.dynamic_ports), len(capacity.ports or ())
    if wanted > given:
        yield Objection(Misfit.PORTS_TOTAL, _ports_text(wanted), _ports_text(given))


def _passing(demand: Demand, node: Candidate) -> Iterator[Objection]:
    if node.maintenance is Maintenance.MAINTENANCE:
        yield Objection(Misfit.MAINTENANCE)
    if node.maintenance is Maintenance.DISABLED:
        yield Objection(Misfit.DISABLED)
    if not node.online or not (node.simple or node.connected):
        yield Objection(Misfit.OFFLINE)
    for condition in node.conditions:
        yield Objection(Misfit.CONDITION, condition)
    capacity, reserved = node.capacity, node.reserved
    if reserved.pipelines >= node.load_max:
        yield Objection(Misfit.BUSY, found=f"{reserved.pipelines} of {node.load_max}")
    free_millis = capacity.cpu_millis - reserved.cpu_millis
    if free_millis < demand.cpu_millis <= capacity.cpu_millis:
        yield Objection(Misfit.CPU, _cpus(demand.cpu_millis), f"{_cpus(free_millis)} free")
    free_bytes = capacity.memory_bytes - reserved.memory_bytes
    if free_bytes < demand.memory_bytes <= capacity.memory_bytes:
        yield Objection(
            Misfit.MEMORY, size_text(demand.memory_bytes), f"{size_text(max(free_bytes, 0))} free"
        )
    if demand.gpu is not None and (large := _large_enough(demand.gpu, node)):
        yield from _gpu_taken(demand.gpu, large, node.reserved)
    for port in demand.ports:
        if any(port.meets(taken) for taken in reserved.ports):
            yield Objection(Misfit.PORT, str(port))
    if len(demand.dynamic_ports) <= len(capacity.ports or ()) and _free_ports(demand, node) is None:
        yield Objection(Misfit.PORTS, _ports_text(len(demand.dynamic_ports)))


def _unsupported(keys: frozenset[str], runtimes: frozenset[str]) -> list[str]:
    """Return what no runtime of a node honours; one is as good as any, since a node has one."""
    if not keys or any(runtime not in HONOURED for runtime in runtimes) or not runtimes:
        return []
    missing = keys.difference(*(HONOURED[runtime] for runtime in runtimes))
    return sorted(FILE_KEYS.get(key, key) for key in missing)


def _large_enough(demand: GpuDemand, node: Candidate) -> list[GpuCapacity]:
    return [
        gpu
        for gpu in node.capacity.gpus
        if gpu.slots >= demand.slots and gpu.memory_bytes >= demand.memory_bytes
    ]


def _gpu_taken(
    demand: GpuDemand, large: Sequence[GpuCapacity], reserved: Reserved
) -> Iterator[Objection]:
    with_slots = [gpu for gpu in large if _free_slots(gpu, reserved) >= demand.slots]
    if not with_slots:
        slots = "free GPU slot" if demand.slots == 1 else f"GPU with {demand.slots} free slots"
        yield Objection(Misfit.GPU_SLOTS, slots)
    elif all(_free_bytes(gpu, reserved) < demand.memory_bytes for gpu in with_slots):
        yield Objection(Misfit.GPU_MEMORY, _gpu_text(demand))


def _gpu_for(demand: GpuDemand, node: Candidate) -> GpuCapacity | None:
    """Return the fullest GPU that fits: whole ones stay free for who needs many slots."""
    reserved = node.reserved
    return min(
        (
            gpu
            for gpu in _large_enough(demand, node)
            if _free_slots(gpu, reserved) >= demand.slots
            and _free_bytes(gpu, reserved) >= demand.memory_bytes
        ),
        key=lambda gpu: (_free_slots(gpu, reserved), gpu.id),
        default=None,
    )


def _free_slots(gpu: GpuCapacity, reserved: Reserved) -> int:
    return gpu.slots - reserved.gpus.get(gpu.id, GpuReserved()).slots


def _free_bytes(gpu: GpuCapacity, reserved: Reserved) -> int:
    return gpu.memory_bytes - reserved.gpus.get(gpu.id, GpuReserved()).memory_bytes


def _free_ports(demand: Demand, node: Candidate) -> tuple[int, ...] | None:
    """Return the lowest free port of the range for each that the node chooses; None: too few."""
    if not demand.dynamic_ports:
        return ()
    taken = {(port.number, port.protocol) for port in (*node.reserved.ports, *demand.ports)}
    chosen: list[int] = []
    for protocol in demand.dynamic_ports:
        port = next((p for p in node.capacity.ports or () if (p, protocol) not in taken), None)
        if port is None:
            return None
        taken.add((port, protocol))
        chosen.append(port)
    return tuple(chosen)


# Words


def _cpus(millis: int) -> str:
    return f"{millis / 1000:g}"


def _gpu_text(demand: GpuDemand) -> str:
    slots = f"{demand.slots} slot{'s' if demand.slots != 1 else ''}"
    return f"{slots} and {size_text(demand.memory_bytes)}" if demand.memory_bytes else slots


def _ports_text(count: int) -> str:
    return f"{count} host port{'s' if count != 1 else ''}"
