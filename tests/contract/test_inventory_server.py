"""Inventories between agents, server and operators: real gRPC and HTTP, both databases (A2, B)."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, cast

import grpc.aio
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tests.support.fleet import free_address
from tests.support.machines import (
    HOST,
    SWAPS,
    register_request,
    registration,
    with_new_driver,
    without_gpu,
)

from gamenode.domain.inventory import (
    Collection,
    CollectionFailure,
    Cpu,
    Inventory,
    Kernel,
    Memory,
    Network,
    NetworkInterface,
    OperatingSystem,
    content_hash,
)
from gamenode.lib.clock import SystemClock
from gamenode.lib.ids import UuidV7
from gamenode.server.access.manager import AccessSettings, AuthMode
from gamenode.server.app import Server
from gamenode.server.db.database import DatabaseSettings
from gamenode.server.nodes.service import InventorySettings
from gamenode.server.settings import ListenSettings, ServerSettings
from gamenode.wire import codec
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2_grpc as pb_grpc

WAIT_S = 10.0
NODE = "fra-07"


class Running:
    """A server of a test's own, as an operator and as an agent see it."""

    def __init__(self, http: str, stub: Any) -> None:
        self._http = http
        self.stub = stub
        self.clock = SystemClock()

    async def ask(self, path: str, method: str = "GET") -> tuple[int, Any]:
        """Return status and body of an answer over HTTP; text where it is no JSON."""
        status, body = await asyncio.to_thread(self._exchange, path, method)
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body

    async def get(self, path: str) -> Any:
        status, body = await self.ask(path)
        assert status == 200, body
        return body

    def _exchange(self, path: str, method: str) -> tuple[int, str]:
        request = urllib.request.Request(f"http://{self._http}/api/v1{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    async def register(self, node_id: str = NODE, inventory: Inventory = HOST) -> str:
        """Register a simple client's node and return its session."""
        response = await self.stub.Register(register_request(node_id, inventory), timeout=WAIT_S)
        assert response.accepted
        return str(response.session_id)

    async def report(
        self, inventory: Inventory, *, session_id: str = "", node_id: str = NODE, failed: str = ""
    ) -> Any:
        collection = Collection(
            inventory=inventory,
            collected_at=self.clock.now(),
            failed=(CollectionFailure(part=failed, reason="hangs"),) if failed else (),
            hash=content_hash(inventory),
        )
        info = codec.encode_resource_info(collection, node_id=node_id, session_id=session_id)
        return await self.stub.UpdateResourceInfo(info, timeout=WAIT_S)


@pytest_asyncio.fixture
async def server(database_url: str, tmp_path: Path) -> AsyncIterator[Running]:
    listen = ListenSettings(http=free_address(), grpc=free_address(), data=tmp_path / "data")
    settings = ServerSettings(
        server=listen,
        database=DatabaseSettings(url=database_url),
        access=AccessSettings(auth=AuthMode.NONE),
        inventories=InventorySettings(collect_s_max=1.0, query_nodes=2),
    )
    running = Server(settings, clock=SystemClock(), ids=UuidV7(SystemClock()), random=Random(1))
    await running.start()
    async with grpc.aio.insecure_channel(listen.grpc) as channel:
        yield Running(listen.http, pb_grpc.GameNodeServiceStub(channel))
    await running.stop()


class Agent:
    """An agent's stream, which answers as a test tells it."""

    def __init__(self, server: Running, session_id: str) -> None:
        self._server = server
        self._session_id = session_id
        self._out: asyncio.Queue[pb.AgentMessage] = asyncio.Queue()
        self._stream = server.stub.Connect(self._words())

    async def _words(self) -> AsyncIterator[pb.AgentMessage]:
        while True:
            yield await self._out.get()

    async def open(self) -> None:
        statement = pb.Statement(
            node_id=NODE, session_id=self._session_id, stream_number=1, boot_id="b1"
        )
        await self._out.put(pb.AgentMessage(statement=statement))
        await self.heard("welcome")

    async def heard(self, content: str) -> Any:
        """Return the next word of that kind."""
        async with asyncio.timeout(WAIT_S):
            while True:
                word = await self._stream.read()
                assert word is not grpc.aio.EOF, "the stream has ended"
                if word.WhichOneof("content") == content:
                    return getattr(word, content)

    async def beat(self, inventory_hash: str) -> Any:
        beat = pb.HeartbeatRequest(
            node_id=NODE, session_id=self._session_id, inventory_hash=inventory_hash
        )
        await self._out.put(pb.AgentMessage(heartbeat=beat))
        return await self.heard("heartbeat")

    async def answer_collect(self, *, accepted: bool = True) -> None:
        command = await self.heard("command")
        assert command.WhichOneof("request") == "collect"
        outcome = pb.COMMAND_OUTCOME_ACCEPTED if accepted else pb.COMMAND_OUTCOME_REFUSED
        answer = pb.CommandAnswer(
            sequence=command.sequence, outcome=outcome, message="" if accepted else "busy"
        )
        await self._out.put(pb.AgentMessage(answer=answer))

    async def report(self, inventory: Inventory) -> None:
        answer = await self._server.report(inventory, session_id=self._session_id)
        assert answer.accepted


@pytest_asyncio.fixture
async def agent(server: Running) -> Agent:
    request = codec.encode_registration(
        registration(NODE, boot_id="b1", inventory_hash=content_hash(HOST))
    )
    response = await server.stub.Register(request, timeout=WAIT_S)
    agent = Agent(server, response.session_id)
    await agent.open()
    return agent


# What a registration must say


def _changed(**parts: Any) -> Inventory:
    hardware, software = HOST.hardware, HOST.software
    if "cpu" in parts:
        hardware = replace(hardware, cpu=parts["cpu"])
    if "memory" in parts:
        hardware = replace(hardware, memory=parts["memory"])
    for name in ("os", "kernel"):
        if name in parts:
            software = replace(software, **{name: parts[name]})
    network = Network(interfaces=parts["interfaces"]) if "interfaces" in parts else HOST.network
    return Inventory(hardware=hardware, software=software, network=network)


INCOMPLETE: dict[str, tuple[Inventory, set[str]]] = {
    "nothing": (
        Inventory(),
        {
            "hardware.cpu[0].architecture",
            "hardware.cpu[0].cores",
            "hardware.memory.total_bytes",
            "software.os.distribution",
            "software.os.version",
            "software.kernel",
        },
    ),
    "no processor": (
        _changed(cpu=()),
        {"hardware.cpu[0].architecture", "hardware.cpu[0].cores"},
    ),
    "a second processor without cores": (
        _changed(cpu=(Cpu(cores=4, architecture="arm64"), Cpu(architecture="arm64"))),
        {"hardware.cpu[1].cores"},
    ),
    "fewer threads than cores": (
        _changed(cpu=(Cpu(cores=4, threads=2, architecture="arm64"),)),
        {"hardware.cpu[0]"},
    ),
    "no cores": (
        _changed(cpu=(Cpu(cores=0, architecture="arm64"),)),
        {"hardware.cpu[0].cores"},
    ),
    "no memory": (_changed(memory=Memory()), {"hardware.memory.total_bytes"}),
    "zero memory": (_changed(memory=Memory(total_bytes=0)), {"hardware.memory.total_bytes"}),
    "blank version": (
        _changed(os=OperatingSystem(distribution="debian", version=" ")),
        {"software.os.version"},
    ),
    "no distribution": (
        _changed(os=OperatingSystem(version="12")),
        {"software.os.distribution"},
    ),
    "a kernel without a version": (_changed(kernel=Kernel(minor=1)), {"software.kernel"}),
    "no MAC, no address": (
        _changed(interfaces=(NetworkInterface(mac="52:54", addresses=("10.0.0.300",)),)),
        {"network.interfaces[0].mac", "network.interfaces[0].addresses"},
    ),
    "two at once, and what the contract bounds": (
        _changed(
            cpu=(Cpu(cores=70_000, architecture="arm64", frequency_hertz=-1.0),),
            memory=Memory(),
        ),
        {
            "hardware.cpu[0].cores",
            "hardware.cpu[0].frequency_hertz",
            "hardware.memory.total_bytes",
        },
    ),
}


async def _refusal(call: Callable[[], Any]) -> tuple[dict[str, str], float | None]:
    """Return what is wrong with a call, by field, and when to try again."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(cast("Any", caught.value))
    assert status is not None
    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    found, retry_after_s = {}, None
    for detail in status.details:
        if detail.Unpack(bad):
            found = {each.field: each.description for each in bad.field_violations}
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return found, retry_after_s


@pytest.mark.parametrize("case", INCOMPLETE)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_registration_is_refused_with_every_field_at_once(
    server: Running, case: str
) -> None:
    inventory, fields = INCOMPLETE[case]
    found, retry_after_s = await _refusal(lambda: server.register(NODE, inventory))
    assert found.keys() == fields
    assert all("(" in text or "must be" in text for text in found.values()), found
    assert retry_after_s is None
    assert (await server.ask(f"/nodes/{NODE}"))[0] == 404


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_an_empty_request_is_refused_with_every_field_at_once(server: Running) -> None:
    found, _ = await _refusal(lambda: server.stub.Register(pb.RegisterRequest(), timeout=WAIT_S))
    assert {"node_id", "node_type", *INCOMPLETE["nothing"][1]} == found.keys()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_what_could_only_not_be_collected_may_be_tried_again(server: Running) -> None:
    failed = (CollectionFailure(part="memory", reason="no answer within 2 s"),)
    request = codec.encode_registration(
        registration(NODE, _changed(memory=Memory()), failed=failed)
    )
    found, retry_after_s = await _refusal(lambda: server.stub.Register(request, timeout=WAIT_S))
    assert "no answer within 2 s" in found["hardware.memory.total_bytes"]
    assert retry_after_s == 30.0
    await server.register()
    assert (await server.stub.Register(request, timeout=WAIT_S)).accepted  # it was seen before


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_an_inventory_that_cannot_be_true_is_refused(server: Running) -> None:
    session_id = await server.register()
    broken = INCOMPLETE["no MAC, no address"][0]
    found, _ = await _refusal(lambda: server.report(broken, session_id=session_id))
    assert "network.interfaces[0].mac" in found
    info = codec.encode_resource_info(
        Collection(inventory=broken, collected_at=server.clock.now()), node_id=NODE, session_id=""
    )
    beat = pb.HeartbeatRequest(node_id=NODE, session_id=session_id, resource_info=info)
    found, _ = await _refusal(lambda: server.stub.Heartbeat(beat, timeout=WAIT_S))
    assert "network.interfaces[0].mac" in found
    assert (await server.get(f"/nodes/{NODE}/inventory"))["version"] == 1


# Reports


async def test_an_inventory_is_answered_as_it_was_reported(server: Running) -> None:
    session_id = await server.register()
    shown = await server.get(f"/nodes/{NODE}/inventory")
    assert shown["hardware"]["gpu"][0]["uuid"] == "GPU-5f0d"
    assert shown["hardware"]["memory"]["channels"] is None
    assert shown["hash"] == content_hash(HOST)
    answer = await server.report(with_new_driver(HOST), session_id=session_id)
    assert answer.accepted
    assert answer.next_report_time > server.clock.now()
    assert (await server.get(f"/nodes/{NODE}"))["inventory_version"] == 2
    stale = await server.report(HOST, session_id="another")
    assert (stale.accepted, stale.stale) == (False, True)


async def test_an_inventory_in_a_heartbeat_is_taken(server: Running) -> None:
    session_id = await server.register()
    info = codec.encode_resource_info(
        Collection(inventory=without_gpu(HOST), collected_at=server.clock.now()),
        node_id=NODE,
        session_id="",
    )
    beat = pb.HeartbeatRequest(node_id=NODE, session_id=session_id, resource_info=info)
    await server.stub.Heartbeat(beat, timeout=WAIT_S)
    assert (await server.get(f"/nodes/{NODE}/inventory"))["version"] == 2
    node = await server.get(f"/nodes/{NODE}")
    assert [each["type"] for each in node["conditions"]] == ["INVENTORY_SHRANK"]


async def test_a_heartbeat_with_another_hash_is_asked_for_the_inventory(
    server: Running, agent: Agent
) -> None:
    changed = with_new_driver(HOST)
    assert not (await agent.beat(content_hash(HOST))).send_inventory
    assert not (await agent.beat("")).send_inventory
    assert (await agent.beat(content_hash(changed))).send_inventory
    await agent.report(changed)
    assert not (await agent.beat(content_hash(changed))).send_inventory
    assert (await server.get(f"/nodes/{NODE}/inventory"))["version"] == 2


# On demand


async def test_a_node_collects_on_demand(server: Running, agent: Agent) -> None:
    asked = asyncio.ensure_future(server.ask(f"/nodes/{NODE}/inventory:collect", "POST"))
    await agent.answer_collect()
    await agent.report(with_new_driver(HOST))
    status, body = await asked
    assert (status, body["version"]) == (200, 2)
    assert body["hardware"]["gpu"][0]["driver_version"] == "555.42"


async def test_a_node_that_is_not_connected_cannot_be_asked(server: Running) -> None:
    await server.register()
    status, problem = await server.ask(f"/nodes/{NODE}/inventory:collect", "POST")
    assert (status, problem["code"]) == (503, "NODE_OFFLINE")
    status, problem = await server.ask("/nodes/nobody/inventory:collect", "POST")
    assert (status, problem["code"]) == (404, "NODE_NOT_FOUND")


async def test_a_node_that_refuses_or_sends_nothing_is_said_to(
    server: Running, agent: Agent
) -> None:
    asked = asyncio.ensure_future(server.ask(f"/nodes/{NODE}/inventory:collect", "POST"))
    await agent.answer_collect(accepted=False)
    status, problem = await asked
    assert (status, problem["code"]) == (409, "CONFLICT")
    assert "busy" in problem["detail"]
    asked = asyncio.ensure_future(server.ask(f"/nodes/{NODE}/inventory:collect", "POST"))
    await agent.answer_collect()
    status, problem = await asked
    assert (status, problem["code"]) == (504, "TIMEOUT")
    await agent.report(with_new_driver(HOST))
    assert (await server.get(f"/nodes/{NODE}/inventory"))["version"] == 2


# History and fleet


@pytest.mark.parametrize("swap", SWAPS)
async def test_a_swap_is_shown_as_a_diff(server: Running, swap: str) -> None:
    change, expected = SWAPS[swap]
    session_id = await server.register()
    await server.report(change(HOST), session_id=session_id)
    for query in ("", "?from=1&to=2", "?from=1"):
        diff = await server.get(f"/nodes/{NODE}/inventory/diff{query}")
        assert (diff["from"], diff["to"]) == (1, 2)
        assert sorted((it["op"], it["path"]) for it in diff["changes"]) == sorted(expected)
    newest, first = (await server.get(f"/nodes/{NODE}/inventory/versions"))["items"]
    assert (first["version"], first["summary"]) == (1, "")
    assert newest["summary"]
    same = await server.get(f"/nodes/{NODE}/inventory/diff?from=2")
    assert same["changes"] == []


async def test_a_diff_may_name_times(server: Running) -> None:
    session_id = await server.register()
    between = (await server.get(f"/nodes/{NODE}/inventory"))["collected_at"].replace("Z", "999Z")
    await asyncio.sleep(0.002)  # versions are told apart by the millisecond that is shown
    await server.report(with_new_driver(HOST), session_id=session_id)
    diff = await server.get(f"/nodes/{NODE}/inventory/diff?from={between}&to=now")
    assert (diff["from"], diff["to"]) == (1, 2)
    shown = await server.get(f"/nodes/{NODE}/inventory?at={between}")
    assert shown["version"] == 1
    status, problem = await server.ask(f"/nodes/{NODE}/inventory?at=2d")
    assert (status, problem["code"]) == (404, "NOT_FOUND")


async def test_the_fleet_is_searched_and_exported(server: Running) -> None:
    for number in range(5):
        await server.register(f"n{number}", HOST if number % 2 else without_gpu(HOST))
    found = await server.get("/inventory?query=gpu.model~4090")
    assert [item["node_id"] for item in found["items"]] == ["n1", "n3"]
    page = await server.get("/inventory?limit=3")
    rest = await server.get(f"/inventory?limit=3&cursor={page['next_cursor']}")
    names = [item["node_id"] for item in (*page["items"], *rest["items"])]
    assert (names, rest["next_cursor"]) == ([f"n{number}" for number in range(5)], None)
    assert (await server.get("/inventory?at=1d"))["items"] == []
    assert (await server.get("/inventory?changed_since=now"))["items"] == []
    lines = (await server.get("/inventory?format=ndjson")).splitlines()
    assert [json.loads(line)["node_id"] for line in lines] == names
    heading, *rows = (await server.get("/inventory?format=csv&query=!gpu.model")).splitlines()
    assert heading.startswith("node_id,version,collected_at,cpu_model")
    assert [row.split(",")[0] for row in rows] == ["n0", "n2", "n4"]
