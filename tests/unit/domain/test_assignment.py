"""What steps ask of a node, and how what they get reaches their containers: F7."""

from __future__ import annotations

import pytest

from gamenode.domain.assignment import assigned, demand_of
from gamenode.domain.command import GrantedStep
from gamenode.domain.container import HostPort, host_ports, with_host_port
from gamenode.domain.pipeline import (
    Condition,
    ContainerSpec,
    DeviceReservation,
    GpuDemand,
    Group,
    Placement,
    StepType,
)
from gamenode.domain.placement import Assignment

GPU = DeviceReservation(capabilities=("gpu",), count=1)
OTHER = DeviceReservation(capabilities=("tpu",))


def step(name: str = "one", **container: object) -> GrantedStep:
    return GrantedStep(
        name=name,
        type=StepType.TASK,
        condition=Condition.SUCCESS,
        timeout_s=None,
        first_attempt=1,
        attempts=1,
        backoff_s=1.0,
        container=ContainerSpec(**container),  # type: ignore[arg-type] # its fields, by name
    )


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("8080:80", (HostPort(8080),)),
        ("8080:80/udp", (HostPort(8080, "udp"),)),
        ("127.0.0.1:8080:80", (HostPort(8080, "tcp", "127.0.0.1"),)),
        ("[::1]:8080:80/sctp", (HostPort(8080, "sctp", "::1"),)),
        ("8080-8081:80-81", (HostPort(8080), HostPort(8081))),
        ("0:80", "tcp"),
        ("80/udp", "udp"),
        ("127.0.0.1:0:80/udp", "udp"),
        ("80-81", ()),
        ("${{ envs.PORT }}:80", ()),
        ("0:${{ envs.PORT }}", ()),
    ],
)
def test_what_a_port_takes_of_its_host(text: str, taken: object) -> None:
    assert host_ports(text) == taken


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("0:80", "20000:80"),
        ("80/udp", "20000:80/udp"),
        ("127.0.0.1:0:80", "127.0.0.1:20000:80"),
        ("[::1]:0:80/udp", "[::1]:20000:80/udp"),
    ],
)
def test_the_chosen_port_is_written_where_the_file_leaves_it_open(text: str, chosen: str) -> None:
    assert with_host_port(text, 20000) == chosen
    assert isinstance(host_ports(chosen), tuple)


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        (HostPort(1), HostPort(1), True),
        (HostPort(1), HostPort(2), False),
        (HostPort(1), HostPort(1, "udp"), False),
        (HostPort(1), HostPort(1, "tcp", "10.0.0.1"), True),
        (HostPort(1, "tcp", "0.0.0.0"), HostPort(1, "tcp", "10.0.0.1"), True),
        (HostPort(1, "tcp", "10.0.0.1"), HostPort(1, "tcp", "10.0.0.1"), True),
        (HostPort(1, "tcp", "10.0.0.1"), HostPort(1, "tcp", "10.0.0.2"), False),
    ],
)
def test_two_ports_meet_where_only_one_can_be_listened_on(
    one: HostPort, other: HostPort, meet: bool
) -> None:
    assert one.meets(other) is other.meets(one) is meet


def test_a_demand_gathers_what_all_steps_ask_for() -> None:
    demand = demand_of(
        [
            step(ports=("7777:7777/udp", "0:80"), privileged=True),
            step(ports=("7777:7777/udp", "0:81/udp"), commands=("x",)),
        ],
        Placement(
            node="n1",
            selector="zone=a",
            cpus=0.0001,
            memory_bytes=5,
            gpu=GpuDemand(slots=2),
        ),
        envs_needed=frozenset({"E"}),
        group=Group(name="g", limit=1),
    )
    assert demand.ports == (HostPort(7777, "udp"),)
    assert demand.dynamic_ports == ("tcp", "udp")
    assert demand.keys == {"privileged", "placement.gpu"}
    assert (demand.cpu_millis, demand.memory_bytes, demand.gpu) == (1, 5, GpuDemand(slots=2))
    assert demand.group == Group(name="g", limit=1)


def test_equal_steps_ask_for_the_same() -> None:
    one, two = (demand_of([step(ports=("0:80",))], Placement()) for _ in range(2))
    assert (one, hash(one)) == (two, hash(two))


def test_ports_go_in_order_where_the_file_leaves_them_open() -> None:
    steps = [step(ports=("0:80", "9:9")), step(ports=("0:81/udp",))]
    given = assigned(steps, Assignment(ports=(20000, 20001)))
    assert [s.container.ports for s in given] == [("20000:80", "9:9"), ("20001:81/udp",)]


@pytest.mark.parametrize(
    ("devices", "given"),
    [
        (([], []), ([["U"]], [["U"]])),
        (([GPU], []), ([["U"]], [])),
        (([OTHER], []), ([[], ["U"]], [["U"]])),
        (([GPU, OTHER, GPU], []), ([[], ["U"]], [])),
    ],
)
def test_the_gpu_goes_to_the_containers_that_reserve_one_or_to_all(
    devices: tuple[list[DeviceReservation], ...], given: tuple[list[list[str]], ...]
) -> None:
    steps = [
        step(f"s{number}", devices_reserved=tuple(some)) for number, some in enumerate(devices)
    ]
    found = assigned(steps, Assignment(gpu_id="U"))
    ids = tuple([list(d.device_ids) for d in s.container.devices_reserved] for s in found)
    assert ids == given
    assert assigned(steps, Assignment()) == tuple(steps)
