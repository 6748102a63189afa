"""The table of what a registration must say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.support.machines import HOST, registration

from gamenode.domain.inventory import (
    PARTS,
    CollectionFailure,
    Disk,
    Hardware,
    Inventory,
    Network,
    NetworkInterface,
)
from gamenode.domain.node import NodeType
from gamenode.domain.registration import RULES, refusal


@pytest.mark.parametrize("node_type", [*NodeType, None])
def test_a_whole_host_is_taken_and_an_empty_one_never(node_type: NodeType | None) -> None:
    assert refusal(HOST, node_type, retry_after_s=1.0) is None
    assert refusal(Inventory(), node_type, retry_after_s=1.0) is not None


def test_every_rule_belongs_to_a_part_and_says_what_to_do() -> None:
    assert {rule.part for rule in RULES} <= set(PARTS)
    assert all(rule.advice for rule in RULES)


@pytest.mark.parametrize(
    ("interface", "taken"),
    [
        (NetworkInterface(mac="52:54:00:AB:cd:ef"), True),
        (NetworkInterface(mac=":".join(["0a"] * 20)), True),  # InfiniBand
        (NetworkInterface(mac="52-54-00-ab-cd-ef"), False),
        (NetworkInterface(addresses=("192.0.2.7", "2001:db8::7/64")), True),
        (NetworkInterface(addresses=("192.0.2.7/64",)), False),
        (NetworkInterface(), True),
    ],
)
def test_addresses_are_looked_at(interface: NetworkInterface, taken: bool) -> None:
    host = replace(HOST, network=Network(interfaces=(interface,)))
    assert (refusal(host, NodeType.VIRTUAL, retry_after_s=1.0) is None) is taken


@pytest.mark.parametrize("text", ["x" * 4097, "a\0b"])
def test_a_text_that_no_table_can_hold_is_refused(text: str) -> None:
    hardware = replace(HOST.hardware, disk=(Disk(mounts=("/", text)),))
    refused = refusal(replace(HOST, hardware=hardware), NodeType.PHYSICAL, retry_after_s=1.0)
    assert refused is not None
    assert [each.field for each in refused.violations] == ["hardware.disk[0].mounts[1]"]


def test_a_retry_is_advised_only_where_nothing_else_is_wrong() -> None:
    failed = (CollectionFailure(part="cpu", reason="hangs"),)
    without_cpu = replace(HOST, hardware=replace(HOST.hardware, cpu=()))
    refused = refusal(without_cpu, NodeType.PHYSICAL, failed, retry_after_s=9.0)
    assert refused is not None
    assert refused.retry_after_s == 9.0
    without_any = Inventory(hardware=Hardware())
    refused = refusal(without_any, registration("n").type, failed, retry_after_s=9.0)
    assert refused is not None
    assert refused.retry_after_s is None
