from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from tests.support.hosts import NAMES, put_up
from tests.support.time import START_AT

from gamenode.agent.inventory.collector import Collector, CollectorSettings, parts_of
from gamenode.domain.command import CollectOrder, FencedOrder
from gamenode.domain.inventory import Collection, CollectionFailure, content_hash
from gamenode.domain.node import Heartbeat, HeartbeatResult, NodeType, Registration
from gamenode.lib.clock import Instant, SystemClock
from gamenode.wire import codec
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb

_FAILED = (CollectionFailure(part="gpu", reason="no answer in 2 s"),)


def _collected(name: str) -> Collection:
    with tempfile.TemporaryDirectory() as folder:
        parts = parts_of(put_up(name, Path(folder)))
        collector = Collector(parts, clock=SystemClock(), settings=CollectorSettings())
        return asyncio.run(collector.collect())


@pytest.mark.parametrize("name", NAMES)
def test_an_inventory_crosses_the_wire_unchanged_and_keeps_its_hash(name: str) -> None:
    seen = _collected(name)
    collection = Collection(
        inventory=seen.inventory, collected_at=START_AT, failed=_FAILED, hash=seen.hash
    )

    sent = codec.encode_resource_info(collection, node_id="n1", session_id="s1")
    heard = codec.decode_resource_info(
        pb.ResourceInfo.FromString(sent.SerializeToString()), now=Instant(0)
    )

    assert heard == collection
    assert content_hash(heard.inventory) == collection.hash


def test_a_client_that_does_not_say_when_collected_now() -> None:
    heard = codec.decode_resource_info(pb.ResourceInfo(node_id="n1"), now=START_AT)

    assert (heard.collected_at, heard.hash, heard.failed) == (START_AT, "", ())


def test_a_registration_says_what_failed_and_which_hash_it_has() -> None:
    collection = _collected("kvm-guest")
    registration = Registration(
        node_id="n1",
        type=NodeType.VIRTUAL,
        inventory=collection.inventory,
        failed=_FAILED,
        inventory_hash=collection.hash,
    )

    assert codec.decode_registration(codec.encode_registration(registration)) == registration


def test_heartbeats_carry_the_hash_one_way_and_the_wish_the_other() -> None:
    beat = Heartbeat(node_id="n1", inventory_hash="ab" * 32)
    wish = HeartbeatResult(counted=True, send_inventory=True)

    assert codec.decode_heartbeat(codec.encode_heartbeat(beat)) == beat
    assert codec.decode_server_word(codec.encode_server_word(wish)) == wish


def test_a_collect_order_crosses_the_wire() -> None:
    fenced = FencedOrder(session_epoch=3, stream_number=1, sequence=7, order=CollectOrder())

    assert codec.decode_server_word(codec.encode_server_word(fenced)) == fenced


def test_an_answer_may_say_when_to_report_next() -> None:
    answer = codec.decode_resource_answer(
        pb.UpdateResponse(accepted=True, next_report_time=START_AT)
    )

    assert (answer.accepted, answer.next_report_at) == (True, START_AT)
