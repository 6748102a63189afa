"""Inventories over HTTP: shapes, parameters, pages, exports."""

from __future__ import annotations

import csv
import io
import json

import pytest
from tests.support.api_fakes import Api, viewer
from tests.support.asgi import ask
from tests.support.machines import HOST, with_new_driver, with_other_disk, without_gpu

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.inventory import Disk, Hardware, Inventory
from gamenode.wire.inventory_table import HEADINGS

NODE = "/api/v1/nodes/fra-07/inventory"
FLEET = "/api/v1/inventory"


@pytest.fixture
def api() -> Api:
    api = Api()
    api.inventories.add("fra-07", HOST)
    api.inventories.add("fra-07", with_new_driver(HOST), at=1_000_000_000)
    return api


async def test_what_is_absent_is_null_and_never_zero(api: Api) -> None:
    api.inventories.add("fra-07", Inventory())
    body = (await ask(api.app, "GET", NODE)).json()
    assert body["hardware"] == {
        "cpu": [],
        "memory": {
            "total_bytes": None,
            "type": None,
            "frequency_hertz": None,
            "channels": None,
            "modules": [],
        },
        "gpu": [],
        "disk": [],
    }
    assert body["software"]["runtimes"] == {"docker": None, "containerd": None, "runc": None}
    assert body["network"] == {"interfaces": []}
    assert body["failed"] == []


async def test_an_inventory_names_its_version_and_since_when_it_is_so(api: Api) -> None:
    body = (await ask(api.app, "GET", f"{NODE}?version=1")).json()
    assert (body["node_id"], body["version"]) == ("fra-07", 1)
    assert body["collected_at"] == body["seen_at"] == "2026-11-24T22:00:00.123Z"


async def test_the_shape_of_a_diff(api: Api) -> None:
    body = (await ask(api.app, "GET", f"{NODE}/diff?from=1&to=2")).json()
    assert (body["node_id"], body["from"], body["to"]) == ("fra-07", 1, 2)
    assert {
        "op": "changed",
        "path": "gpu[GPU-5f0d].driver_version",
        "from": "550.54",
        "to": "555.42",
    } in body["changes"]


async def test_a_part_that_came_or_went_is_whole_in_a_diff(api: Api) -> None:
    api.inventories.add("fra-07", without_gpu(with_new_driver(HOST)))
    (change,) = (await ask(api.app, "GET", f"{NODE}/diff")).json()["changes"]
    assert (change["op"], change["to"]) == ("removed", None)
    assert change["from"]["model"] == "RTX 4090"


async def test_versions_come_in_pages_newest_first(api: Api) -> None:
    for change in (with_other_disk, with_new_driver, without_gpu):
        api.inventories.add("fra-07", change(HOST))
    seen: list[int] = []
    target = f"{NODE}/versions?limit=2"
    while True:
        page = (await ask(api.app, "GET", target)).json()
        seen += [item["version"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        target = f"{NODE}/versions?limit=2&cursor={page['next_cursor']}"
    assert seen == [5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("target", "field"),
    [
        (f"{NODE}?version=0", "version"),
        (f"{NODE}?version=x", "version"),
        (f"{NODE}?version=1&at=2h", "at"),
        (f"{NODE}?at=yesterday", "at"),
        (f"{NODE}/versions?cursor=bm9kZSBh", "cursor"),
        (f"{FLEET}?query=a%20b", "query"),
        (f"{FLEET}?changed_since=soon", "changed_since"),
        (f"{FLEET}?format=xml", "format"),
        (f"{FLEET}?limit=0", "limit"),
        (f"{FLEET}?qeury=a", "qeury"),
    ],
)
async def test_a_bad_parameter_is_named(api: Api, target: str, field: str) -> None:
    answer = await ask(api.app, "GET", target)
    assert answer.status == 400
    assert answer.json()["details"][0]["field"] == field


async def test_collecting_needs_an_operator_and_says_why_it_cannot(api: Api) -> None:
    collect = f"{NODE}:collect"
    answer = await ask(Api(authenticate=viewer).app, "POST", collect)
    assert answer.json()["code"] == ErrorCode.PERMISSION_DENIED
    assert (await ask(api.app, "POST", collect)).json()["version"] == 2
    api.inventories.failure = GameNodeError(ErrorCode.NODE_OFFLINE, "fra-07 is not connected")
    assert (await ask(api.app, "POST", collect)).status == 503


async def test_an_export_is_a_line_or_a_row_for_each_node(api: Api) -> None:
    api.inventories.add("ber-01", Inventory())
    lines = await ask(api.app, "GET", f"{FLEET}?format=ndjson")
    assert lines.headers["content-type"] == "application/x-ndjson"
    names = [json.loads(line)["node_id"] for line in lines.body.splitlines()]
    assert names == ["ber-01", "fra-07"]
    table = await ask(api.app, "GET", f"{FLEET}?format=csv")
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    heading, empty, full = csv.reader(io.StringIO(table.body.decode()))
    assert tuple(heading) == HEADINGS
    absent = dict(zip(heading, empty, strict=True))
    assert {value for name, value in absent.items() if name not in HEADINGS[:3]} == {""}
    row = dict(zip(heading, full, strict=True))
    assert row["cpu_cores"] == "32"
    assert row["gpu_driver_version"] == "555.42"
    assert row["memory_total_bytes"] == str(64 * 2**30)


async def test_a_hosts_text_is_no_formula_in_a_spreadsheet(api: Api) -> None:
    hardware = Hardware(disk=(Disk(model="=HYPERLINK(1)", serial="D9"),))
    api.inventories.add("fra-07", Inventory(hardware=hardware))
    table = await ask(api.app, "GET", f"{FLEET}?format=csv")
    (row,) = csv.DictReader(io.StringIO(table.body.decode()))
    assert row["disk_model"] == "'=HYPERLINK(1)"
