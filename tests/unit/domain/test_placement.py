"""Which node a pipeline goes to, and why not the others: F7, F10, RL4."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from gamenode.domain import placement
from gamenode.domain.container import HostPort, PortRange
from gamenode.domain.inventory import Cpu, Gpu, Hardware, Inventory, Memory
from gamenode.domain.node import ConditionType, Maintenance, Offer
from gamenode.domain.pipeline import GpuDemand, Group
from gamenode.domain.placement import (
    Assignment,
    Candidate,
    Capacity,
    Decision,
    Demand,
    GpuCapacity,
    GpuReserved,
    Misfit,
    Pass,
    Reserved,
    capacity_of,
    decide,
    judge,
    with_reserved,
)
from gamenode.domain.selector import parse_selector

GIB = 1024**3
NODE = Candidate(
    node_id="n1",
    online=True,
    connected=True,
    simple=False,
    maintenance=Maintenance.NORMAL,
    conditions=(),
    values={"zone": ["a"]},
    env_names=frozenset({"ROOT"}),
    runtimes=frozenset({"docker"}),
    load_max=2,
    capacity=Capacity(
        cpu_millis=4000,
        memory_bytes=8 * GIB,
        gpus=(
            GpuCapacity(id="GPU-1", slots=2, memory_bytes=8 * GIB),
            GpuCapacity(id="GPU-2", slots=4, memory_bytes=24 * GIB),
        ),
        ports=PortRange(20000, 20002),
    ),
)
SOME_TAKEN = Reserved(
    pipelines=1,
    cpu_millis=3000,
    memory_bytes=7 * GIB,
    gpus={"GPU-1": GpuReserved(2, 2 * GIB), "GPU-2": GpuReserved(3, 20 * GIB)},
    ports=frozenset({HostPort(20000, "udp"), HostPort(7777, "udp", "10.0.0.1")}),
)


def demand(**wanted: Any) -> Demand:
    if "selector" in wanted:
        wanted["selector"] = parse_selector(wanted["selector"])
    return Demand(**wanted)


def misfits(wanted: Demand, node: Candidate) -> list[str]:
    return [objection.misfit for objection in judge(wanted, node).objections]


@pytest.mark.parametrize(
    ("wanted", "node", "why"),
    [
        ({}, {}, None),
        ({"node_id": "n1"}, {}, None),
        ({"node_id": "n2"}, {}, Misfit.OTHER_NODE),
        ({"selector": "zone=a"}, {}, None),
        ({"selector": "zone=b"}, {}, Misfit.SELECTOR),
        ({"envs_needed": frozenset({"ROOT"})}, {}, None),
        ({"envs_needed": frozenset({"OTHER"})}, {}, Misfit.ENV_MISSING),
        ({}, {"maintenance": Maintenance.MAINTENANCE}, Misfit.MAINTENANCE),
        ({}, {"maintenance": Maintenance.DISABLED}, Misfit.DISABLED),
        ({}, {"online": False}, Misfit.OFFLINE),
        ({}, {"connected": False}, Misfit.OFFLINE),
        ({}, {"simple": True, "connected": False}, Misfit.SIMPLE_CLIENT),
        ({"node_id": "n1"}, {"simple": True, "connected": False}, None),
        ({"node_id": "n1"}, {"simple": True, "online": False}, Misfit.OFFLINE),
        ({}, {"conditions": (ConditionType.ENGINE_DOWN,)}, Misfit.CONDITION),
        ({}, {"reserved": Reserved(pipelines=1)}, None),
        ({}, {"reserved": Reserved(pipelines=2)}, Misfit.BUSY),
        ({"keys": frozenset({"privileged"})}, {}, None),
        ({"keys": frozenset({"privileged"})}, {"runtimes": frozenset()}, None),
        ({"keys": frozenset({"privileged"})}, {"runtimes": {"process"}}, Misfit.UNSUPPORTED),
        ({"keys": frozenset({"ports"})}, {"runtimes": {"process"}}, None),
        ({"cpu_millis": 4000}, {}, None),
        ({"cpu_millis": 4001}, {}, Misfit.CPU_TOTAL),
        ({"cpu_millis": 1000}, {"reserved": SOME_TAKEN}, None),
        ({"cpu_millis": 1001}, {"reserved": SOME_TAKEN}, Misfit.CPU),
        ({"cpu_millis": 1}, {"capacity": Capacity()}, Misfit.CPU_TOTAL),
        ({"memory_bytes": 8 * GIB}, {}, None),
        ({"memory_bytes": 8 * GIB + 1}, {}, Misfit.MEMORY_TOTAL),
        ({"memory_bytes": GIB}, {"reserved": SOME_TAKEN}, None),
        ({"memory_bytes": GIB + 1}, {"reserved": SOME_TAKEN}, Misfit.MEMORY),
        ({"gpu": GpuDemand()}, {"capacity": Capacity()}, Misfit.GPU_TOTAL),
        ({"gpu": GpuDemand(slots=4, memory_bytes=24 * GIB)}, {}, None),
        ({"gpu": GpuDemand(slots=5)}, {}, Misfit.GPU_TOTAL),
        ({"gpu": GpuDemand(memory_bytes=25 * GIB)}, {}, Misfit.GPU_TOTAL),
        ({"gpu": GpuDemand()}, {"reserved": SOME_TAKEN}, None),
        ({"gpu": GpuDemand(slots=2)}, {"reserved": SOME_TAKEN}, Misfit.GPU_SLOTS),
        # One GPU has the slot, the other one the memory.
        ({"gpu": GpuDemand(memory_bytes=5 * GIB)}, {"reserved": SOME_TAKEN}, Misfit.GPU_MEMORY),
        ({"ports": (HostPort(7777, "udp"),)}, {"reserved": SOME_TAKEN}, Misfit.PORT),
        ({"ports": (HostPort(7777, "udp", "10.0.0.1"),)}, {"reserved": SOME_TAKEN}, Misfit.PORT),
        ({"ports": (HostPort(7777, "udp", "10.0.0.2"),)}, {"reserved": SOME_TAKEN}, None),
        ({"ports": (HostPort(7777, "tcp"),)}, {"reserved": SOME_TAKEN}, None),
        ({"dynamic_ports": ("udp",) * 3}, {}, None),
        ({"dynamic_ports": ("udp",) * 4}, {}, Misfit.PORTS_TOTAL),
        ({"dynamic_ports": ("udp",)}, {"capacity": Capacity()}, Misfit.PORTS_TOTAL),
        ({"dynamic_ports": ("udp",) * 3}, {"reserved": SOME_TAKEN}, Misfit.PORTS),
        ({"dynamic_ports": ("tcp",) * 3}, {"reserved": SOME_TAKEN}, None),
        # What never passes comes before what passes by itself.
        ({"selector": "zone=b"}, {"online": False}, Misfit.SELECTOR),
        ({"cpu_millis": 9000}, {"reserved": Reserved(pipelines=2)}, Misfit.CPU_TOTAL),
    ],
)
def test_why_a_node_does_not_fit(
    wanted: dict[str, Any], node: dict[str, Any], why: Misfit | None
) -> None:
    verdict = judge(demand(**wanted), replace(NODE, **node))
    assert [o.misfit for o in verdict.objections][:1] == ([why] if why else [])
    assert bool(verdict.objections) is (why is not None)


def test_a_verdict_has_everything_that_speaks_against_a_node() -> None:
    node = replace(NODE, online=False, reserved=Reserved(pipelines=2))
    wanted = demand(selector="zone=b,!zone", cpu_millis=5000)
    verdict = judge(wanted, node)
    assert [(o.misfit, o.asked) for o in verdict.objections] == [
        (Misfit.SELECTOR, "zone=b"),
        (Misfit.SELECTOR, "!zone"),
        (Misfit.CPU_TOTAL, "5"),
        (Misfit.OFFLINE, ""),
        (Misfit.BUSY, ""),
    ]
    assert verdict.never


def test_the_least_loaded_node_is_taken_and_among_equals_the_first_by_id() -> None:
    nodes = [
        replace(NODE, node_id="n3"),
        replace(NODE, node_id="n2"),
        replace(NODE, node_id="n1", reserved=Reserved(pipelines=1)),
    ]
    assert decide(Demand(), nodes).node_id == "n2"
    assert decide(Demand(), reversed(nodes)).node_id == "n2"


def test_the_fullest_gpu_that_fits_is_taken_so_that_whole_ones_stay_free() -> None:
    look = Pass([replace(NODE, load_max=9)], {})
    given = [look.place(Demand(gpu=GpuDemand())).assignment.gpu_id for _ in range(3)]
    assert given == ["GPU-1", "GPU-1", "GPU-2"]
    assert look.place(Demand(gpu=GpuDemand(slots=4))).node_id is None


def test_the_lowest_free_ports_are_given_in_the_order_of_the_file() -> None:
    node = replace(NODE, reserved=SOME_TAKEN)
    wanted = Demand(dynamic_ports=("tcp", "udp", "tcp"), ports=(HostPort(20001, "tcp"),))
    assert decide(wanted, [node]).assignment == Assignment(ports=(20000, 20001, 20002))


def test_a_pass_gives_nothing_out_twice_and_hides_nothing_behind_what_waits() -> None:
    look = Pass([replace(NODE, load_max=9), replace(NODE, node_id="n2", load_max=9)], {})
    large, small = Demand(cpu_millis=3000), Demand(cpu_millis=1000)
    placed = [look.place(it).node_id for it in (large, large, large, small, small, small)]
    assert placed == ["n1", "n2", None, "n1", "n2", None]


def test_a_group_is_limited_on_all_nodes_together() -> None:
    group = Demand(group=Group(name="deploy", limit=2))
    look = Pass([NODE, replace(NODE, node_id="n2")], {"deploy": 1})
    assert look.place(group).node_id == "n1"
    full = look.place(group)
    assert (full.node_id, full.never) == (None, False)
    assert full.explain() == "concurrency group deploy: 2 of 2 running"
    assert [(w.reason, w.passes) for w in full.waiting()] == [("GROUP", True)]
    assert look.place(Demand(group=Group(name="deploy", limit=3))).node_id == "n2"


def test_a_decision_counts_the_first_reason_of_each_node() -> None:
    nodes = [
        *(replace(NODE, node_id=f"a{n}", values={"zone": ["b"]}) for n in range(7)),
        *(replace(NODE, node_id=f"b{n}", reserved=SOME_TAKEN) for n in range(3)),
        *(replace(NODE, node_id=f"c{n}", maintenance=Maintenance.MAINTENANCE) for n in range(2)),
    ]
    decision = decide(demand(selector="zone=a", gpu=GpuDemand(slots=2)), nodes)
    assert decision.explain() == (
        "12 nodes: 7 do not match zone=a, 3 have no GPU with 2 free slots, 2 in maintenance"
    )
    first, *_ = decision.waiting(named_max=2)
    assert (first.reason, first.nodes, first.nodes_total, first.passes) == (
        "SELECTOR",
        ("a0", "a1"),
        7,
        False,
    )
    assert not decision.never


@pytest.mark.parametrize(
    ("nodes", "never"),
    [
        ([], False),
        ([NODE], True),
        ([NODE, replace(NODE, node_id="n2", values={"zone": ["b"]})], False),
        ([NODE, replace(NODE, node_id="n2", values={"zone": ["b"]}, online=False)], False),
    ],
)
def test_can_never_fit_is_told_from_must_wait(nodes: Iterable[Candidate], never: bool) -> None:
    busy = [replace(node, reserved=Reserved(pipelines=2)) for node in nodes]
    assert decide(demand(selector="zone=b"), busy).never is never


def test_no_node_at_all_is_said() -> None:
    assert decide(Demand(), []).explain() == "no node is registered"


@pytest.mark.parametrize("misfit", Misfit)
def test_every_reason_has_words(misfit: Misfit) -> None:
    objection = placement.Objection(misfit, "this")
    assert all((objection.text(), objection.text(2)))
    passing = list(Misfit)[list(Misfit).index(Misfit.MAINTENANCE) :]
    assert misfit.permanent is (misfit not in passing)


def test_a_node_has_what_its_inventory_shows_and_gives_out_what_it_offers() -> None:
    inventory = Inventory(
        hardware=Hardware(
            cpu=(Cpu(cores=8, threads=16), Cpu(cores=8)),
            memory=Memory(total_bytes=64 * GIB),
            gpu=(
                Gpu(uuid="GPU-1", memory_bytes=8 * GIB),
                Gpu(uuid="GPU-2"),
                Gpu(uuid="GPU-3"),
                Gpu(memory_bytes=GIB),
            ),
        )
    )
    offer = Offer(gpu_slots=2, gpu_slots_by_id={"GPU-2": 4, "GPU-3": 0}, ports=PortRange(1, 9))
    assert capacity_of(inventory, offer) == Capacity(
        cpu_millis=24_000,
        memory_bytes=64 * GIB,
        gpus=(
            GpuCapacity(id="GPU-1", slots=2, memory_bytes=8 * GIB),
            GpuCapacity(id="GPU-2", slots=4, memory_bytes=0),
        ),
        ports=PortRange(1, 9),
    )


# No sequence of bindings and releases gives out more than there is


def anything(random: Random) -> Demand:
    slots = random.choice([0, 0, 1, 2, 3])
    return Demand(
        node_id=random.choice(["", "", "", "n1"]),
        cpu_millis=random.choice([0, 500, 1500]),
        memory_bytes=random.choice([0, GIB, 3 * GIB]),
        gpu=GpuDemand(slots=slots, memory_bytes=random.choice([0, 5 * GIB])) if slots else None,
        ports=tuple(HostPort(n, "udp") for n in random.sample(range(19999, 20003), 1))
        if random.random() < 0.3
        else (),
        dynamic_ports=("udp",) * random.choice([0, 0, 1, 2]),
        group=Group(name="g", limit=2) if random.random() < 0.2 else None,
    )


def check_within(node: Candidate, held: list[tuple[Demand, Decision]]) -> None:
    here = [(d, it.assignment) for d, it in held if it.node_id == node.node_id]
    capacity = node.capacity
    assert len(here) <= node.load_max
    assert sum(d.cpu_millis for d, _ in here) <= capacity.cpu_millis
    assert sum(d.memory_bytes for d, _ in here) <= capacity.memory_bytes
    for gpu in capacity.gpus:
        on_it = [d.gpu for d, a in here if d.gpu is not None and a.gpu_id == gpu.id]
        assert sum(it.slots for it in on_it) <= gpu.slots
        assert sum(it.memory_bytes for it in on_it) <= gpu.memory_bytes
    ports = [port for d, a in here for port in placement.host_ports(d, a)]
    assert len(ports) == len(set(ports))


@pytest.mark.parametrize("seed", range(40))
def test_no_sequence_of_placements_and_releases_exceeds_what_a_node_has(seed: int) -> None:
    random = Random(seed)
    nodes = [replace(NODE, node_id=f"n{n}", load_max=6) for n in (1, 2)]
    held: list[tuple[Demand, Decision]] = []
    for _ in range(15):
        reserved = {node.node_id: Reserved() for node in nodes}
        for d, it in held:
            assert it.node_id is not None
            reserved[it.node_id] = with_reserved(reserved[it.node_id], d, it.assignment)
        running = sum(d.group is not None for d, _ in held)
        look = Pass([replace(n, reserved=reserved[n.node_id]) for n in nodes], {"g": running})
        for _ in range(random.randrange(5)):
            wanted = anything(random)
            decision = look.place(wanted)
            if decision.node_id is not None:
                held.append((wanted, decision))
            else:
                assert decision.waiting()
        for node in nodes:
            check_within(node, held)
        assert sum(d.group is not None for d, _ in held) <= 2
        held = [entry for entry in held if random.random() < 0.7]
