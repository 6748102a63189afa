"""`gamenode inventory`: what people see of what nodes are made of."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.support.bodies import inventory, inventory_diff, inventory_version, node, page
from tests.support.fake_api import Cut, FakeApi, Reply, fake_api, ndjson, problem
from tests.support.program import Program

NODE = "/nodes/fra-07/inventory"
MOVED = {"op": "moved", "path": "memory.modules[M1].slot", "from": "A1", "to": "C1"}
ADDED = {
    "op": "added",
    "path": "disk[D2]",
    "from": None,
    "to": {"model": "S980", "capacity_bytes": 10, "mounts": ["/", "/srv"]},
}


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as served:
        served.on("GET", "/nodes/fra-07", Reply(node()))
        served.on("GET", NODE, Reply(inventory()))
        served.on("GET", "/inventory", Reply(page(inventory())))
        yield served


def test_show_says_what_was_not_reported(api: FakeApi) -> None:
    result = Program(api.url)("inventory", "show", "fra-07")
    lines = [line.split(maxsplit=1) for line in result.text.splitlines() if line]
    shown = {words[0]: words[1].strip() for words in lines if len(words) == 2}
    assert shown["MEMORY"] == "64 GiB"
    assert shown["MEMORY_CHANNELS"] == "not reported"
    assert shown["GPU_DRIVER"] == "not reported"
    assert shown["DOCKER"] == "26.1.0"
    assert shown["KERNEL"] == "6.1.0-18-amd64"
    assert shown["GPU"] == "not reported"
    assert shown["gpu"] == "NVML did not answer"
    assert "EPYC 7302  0       16     not reported  3.3 GHz" in result.text
    assert "/, /srv" in result.text


def test_show_asks_for_a_version_or_a_time(api: FakeApi) -> None:
    Program(api.url)("inventory", "show", "fra-07", "--version", "3")
    Program(api.url)("inventory", "show", "fra-07", "--at", "2h")
    assert [seen.query for seen in api.requests("GET", NODE)] == [{"version": "3"}, {"at": "2h"}]


def test_versions_say_what_changed(api: FakeApi) -> None:
    items = (inventory_version(2, "gpu[G1] removed (L4)"), inventory_version(1))
    api.on("GET", f"{NODE}/versions", Reply(page(*items)))
    result = Program(api.url)("inventory", "versions", "fra-07", "--columns", "version,changes")
    assert result.text.splitlines()[1:] == ["2        gpu[G1] removed (L4)", "1        the first"]


def test_diff_shows_each_change_and_may_say_so_by_its_exit_code(api: FakeApi) -> None:
    api.on("GET", f"{NODE}/diff", Reply(inventory_diff(MOVED, ADDED)))
    result = Program(api.url)("inventory", "diff", "fra-07", "1", "2h")
    assert (result.exit_code, api.requests("GET", f"{NODE}/diff")[0].query) == (
        0,
        {"from": "1", "to": "2h"},
    )
    _, moved, added = result.text.splitlines()
    assert moved.split() == ["moved", "memory.modules[M1].slot", "A1", "C1"]
    assert added.split(maxsplit=2)[2] == "model=S980, capacity_bytes=10, mounts=/ /srv"
    assert Program(api.url)("inventory", "diff", "fra-07", "--exit-code").exit_code == 10
    api.on("GET", f"{NODE}/diff", Reply(inventory_diff()))
    assert Program(api.url)("inventory", "diff", "fra-07", "--exit-code").exit_code == 0


def test_a_diff_as_json_is_the_rest_body(api: FakeApi) -> None:
    api.on("GET", f"{NODE}/diff", Reply(inventory_diff(ADDED)))
    result = Program(api.url)("inventory", "diff", "fra-07", "-o", "json")
    assert json.loads(result.text) == inventory_diff(ADDED)


def test_collect_shows_the_inventory_or_says_that_the_node_is_offline(api: FakeApi) -> None:
    api.on("POST", f"{NODE}:collect", Reply(inventory(7)))
    result = Program(api.url)("inventory", "collect", "fra-07", "-o", "json")
    assert json.loads(result.text)["version"] == 7
    api.on("POST", f"{NODE}:collect", problem("NODE_OFFLINE", 503, "fra-07 is not connected"))
    result = Program(api.url)("inventory", "collect", "fra-07")
    assert (result.exit_code, result.stdout) == (7, b"")
    assert "error: NODE_OFFLINE: fra-07 is not connected" in result.stderr


def test_query_asks_for_what_fits(api: FakeApi) -> None:
    result = Program(api.url)(
        *("inventory", "query", "gpu.model~4090", "--at", "30d", "--changed-since", "60d"),
        *("-o", "name"),
    )
    assert result.text == "fra-07\n"
    query = api.requests("GET", "/inventory")[0].query
    assert query == {
        "query": "gpu.model~4090",
        "at": "30d",
        "changed_since": "60d",
        "limit": "100",
    }


def test_export_passes_the_servers_csv_on(api: FakeApi) -> None:
    table = b"node_id,version\nfra-07,1\n"
    api.on("GET", "/inventory", Reply(iter([table[:20], table[20:]])))
    assert Program(api.url)("inventory", "export", "-o", "csv").stdout == table
    assert api.seen[-1].query == {"format": "csv"}


def test_export_writes_lines_as_they_come(api: FakeApi) -> None:
    api.on("GET", "/inventory", Reply(ndjson([inventory(1), inventory(2)])))
    result = Program(api.url)("inventory", "export", "zone=a", "-o", "ndjson")
    assert [json.loads(line)["version"] for line in result.text.splitlines()] == [1, 2]
    assert api.seen[-1].query == {"query": "zone=a", "format": "ndjson"}


def test_an_export_that_breaks_off_is_an_error(api: FakeApi) -> None:
    def broken() -> Iterator[bytes]:
        yield from ndjson([inventory(1)])
        raise Cut

    api.on("GET", "/inventory", Reply(broken()))
    assert Program(api.url)("inventory", "export", "-o", "ndjson").exit_code == 7


def test_a_whole_export_as_json_is_one_document(api: FakeApi) -> None:
    first, second = page(inventory(1), next_cursor="more"), page(inventory(2))
    api.on("GET", "/inventory", lambda seen: Reply(second if "cursor" in seen.query else first))
    result = Program(api.url)("inventory", "export", "-o", "json")
    document = json.loads(result.text)
    assert [item["version"] for item in document["items"]] == [1, 2]
    assert document["next_cursor"] is None
