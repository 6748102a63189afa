"""`gamenode inventory`: what the nodes are made of, now and before."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import click

from gamenode.cli.client import API, Query, Request, Stream
from gamenode.cli.command import Command, Group, Invocation, pass_invocation
from gamenode.cli.errors import EXIT_DIFFERENT
from gamenode.cli.names import complete_nodes
from gamenode.cli.names import node as find_node
from gamenode.cli.output import Body, Column, Format, Part, Value, View, age, field
from gamenode.lib.clock import Instant

_ABSENT: Final = "not reported"
_COLLECT_S: Final = 10.0
_PAGE: Final = 1000
_KIB: Final = 1024


def _shown(value: Any, _now: Instant) -> str:
    """Return a value for people; what is absent is said to be so, and never 0."""
    if value is None or value in ("", []):
        return _ABSENT
    return _plain(value)


def _size(value: int | None, _now: Instant) -> str:
    if value is None:
        return _ABSENT
    size, unit = float(value), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < _KIB:
            break
        size, unit = size / _KIB, larger
    return f"{size:.4g} {unit}"


def _rate(unit: str) -> Callable[[float | None, Instant], str]:
    def shown(value: float | None, _now: Instant) -> str:
        if value is None:
            return _ABSENT
        for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= factor:
                return f"{value / factor:.4g} {prefix}{unit}"
        return f"{value:.4g} {unit}"

    return shown


def _said(name: str, path: str, show: Callable[[Any, Instant], str] = _shown) -> Column:
    return Column(name, field(path), show)


def _joined(path: str) -> Callable[[Body], str]:
    """Return a function that writes the list of texts in a field as one."""

    def take(body: Body) -> str:
        return ", ".join(field(path)(body) or ())

    return take


def _of_parts(path: str, name: str) -> Callable[[Body], str | None]:
    """Return a function that names what the parts in `path` have in `name`: `2 x RTX 4090`."""

    def take(body: Body) -> str | None:
        counts: dict[str, int] = {}
        for part in field(path)(body) or ():
            value = str(part.get(name) or "unnamed")
            counts[value] = counts.get(value, 0) + 1
        return ", ".join(f"{n} x {value}" for value, n in counts.items()) or None

    return take


def _sum(path: str, name: str) -> Callable[[Body], Value]:
    def take(body: Body) -> Value:
        present = [part[name] for part in field(path)(body) or () if part[name] is not None]
        return sum(present) if present else None

    return take


def _kernel(body: Body) -> str | None:
    kernel: Body = field("software.kernel")(body)
    numbers = [
        str(kernel[part]) for part in ("major", "minor", "patch") if kernel[part] is not None
    ]
    return kernel["release"] or ".".join(numbers) or None


def _failed(body: Body) -> str:
    return ",".join(failure["part"] for failure in body["failed"])


def _operating_system(body: Body) -> str | None:
    system: Body = field("software.os")(body)
    return " ".join(system[part] for part in ("distribution", "version") if system[part]) or None


def _node_name(body: Body) -> str:
    return str(body["node_id"])


_LIST: Final = View(
    columns=(
        Column("NODE", field("node_id")),
        Column("VERSION", field("version")),
        Column("SINCE", field("collected_at"), age),
        Column("CPU", _of_parts("hardware.cpu", "model"), _shown),
        Column("CORES", _sum("hardware.cpu", "cores"), _shown),
        Column("MEMORY", field("hardware.memory.total_bytes"), _size),
        Column("GPU", _of_parts("hardware.gpu", "model"), _shown),
        Column("DRIVER", field("software.gpu_driver.driver_version"), _shown),
        Column("DISKS", _sum("hardware.disk", "capacity_bytes"), _size),
        Column("OS", _operating_system, _shown),
        Column("KERNEL", _kernel, _shown),
        Column("DOCKER", field("software.runtimes.docker"), _shown, wide=True),
        Column("FAILED", _failed, wide=True),
        Column("HASH", field("hash"), wide=True),
    ),
    name=_node_name,
)

_ONE: Final = View(
    columns=(
        Column("NODE", field("node_id")),
        Column("VERSION", field("version")),
        Column("SINCE", field("collected_at")),
        Column("REPORTED", field("seen_at"), age),
        Column("HASH", field("hash")),
        _said("OS", "software.os.distribution"),
        _said("OS_VERSION", "software.os.version"),
        _said("OS_ARCHITECTURE", "software.os.architecture"),
        Column("KERNEL", _kernel, _shown),
        _said("GPU_DRIVER", "software.gpu_driver.driver_version"),
        _said("COMPUTE", "software.gpu_driver.compute_version"),
        _said("DOCKER", "software.runtimes.docker"),
        _said("CONTAINERD", "software.runtimes.containerd"),
        _said("RUNC", "software.runtimes.runc"),
        _said("MEMORY", "hardware.memory.total_bytes", _size),
        _said("MEMORY_TYPE", "hardware.memory.type"),
        _said("MEMORY_RATE", "hardware.memory.frequency_hertz", _rate("T/s")),
        _said("MEMORY_CHANNELS", "hardware.memory.channels"),
    ),
    name=_node_name,
    parts=(
        Part(
            "hardware.cpu",
            (
                _said("CPU", "model"),
                _said("SOCKET", "socket"),
                _said("CORES", "cores"),
                _said("THREADS", "threads"),
                _said("FREQUENCY", "frequency_hertz", _rate("Hz")),
                _said("CACHE", "cache_bytes", _size),
                _said("ARCHITECTURE", "architecture"),
            ),
            empty=f"CPU  {_ABSENT}",
        ),
        Part(
            "hardware.memory.modules",
            (
                _said("MODULE", "slot"),
                _said("SIZE", "size_bytes", _size),
                _said("TYPE", "type"),
                _said("RATE", "frequency_hertz", _rate("T/s")),
                _said("CHANNEL", "channel"),
                _said("MANUFACTURER", "manufacturer"),
                _said("PART_NUMBER", "part_number"),
                _said("SERIAL", "serial"),
            ),
            empty=f"MODULE  {_ABSENT}",
        ),
        Part(
            "hardware.gpu",
            (
                _said("GPU", "model"),
                _said("UUID", "uuid"),
                _said("PCI", "pci_address"),
                _said("MEMORY", "memory_bytes", _size),
                _said("DRIVER", "driver_version"),
                _said("ARCHITECTURE", "architecture"),
                _said("COMPUTE", "compute_capability"),
                _said("CUDA_CORES", "cuda_cores"),
                _said("POWER", "power_watts", _rate("W")),
                _said("SLOTS", "slots"),
            ),
            empty=f"GPU  {_ABSENT}",
        ),
        Part(
            "hardware.disk",
            (
                _said("DISK", "path"),
                _said("MODEL", "model"),
                _said("CAPACITY", "capacity_bytes", _size),
                _said("TYPE", "type"),
                _said("INTERFACE", "interface"),
                _said("SERIAL", "serial"),
                Column("MOUNTS", _joined("mounts"), _shown),
            ),
            empty=f"DISK  {_ABSENT}",
        ),
        Part(
            "network.interfaces",
            (
                _said("INTERFACE", "name"),
                _said("MAC", "mac"),
                Column("ADDRESSES", _joined("addresses"), _shown),
                _said("SPEED", "speed_bits_per_second", _rate("bit/s")),
                _said("DRIVER", "driver"),
                Column("VIRTUAL", field("virtual"), _shown),
            ),
            empty=f"INTERFACE  {_ABSENT}",
        ),
        Part(
            "failed",
            (Column("NOT_COLLECTED", field("part")), Column("REASON", field("reason"))),
            empty="everything was collected",
        ),
    ),
)

_VERSIONS: Final = View(
    columns=(
        Column("VERSION", field("version")),
        Column("SINCE", field("collected_at"), age),
        Column("REPORTED", field("seen_at"), age),
        Column("CHANGES", lambda body: body["summary"] or "the first"),
        Column("COLLECTED_AT", field("collected_at"), wide=True),
        Column("FAILED", _failed, wide=True),
        Column("HASH", field("hash"), wide=True),
    ),
    name=lambda body: str(body["version"]),
)


def _changed(name: str) -> Callable[[Body], str]:
    def take(body: Body) -> str:
        value = body[name]
        if isinstance(value, dict):  # a whole part
            return ", ".join(f"{key}={_plain(each)}" for key, each in value.items())
        return "" if value is None else _plain(value)

    return take


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


_CHANGES: Final = View(
    columns=(
        Column("CHANGE", field("op")),
        Column("PATH", field("path")),
        Column("FROM", _changed("from")),
        Column("TO", _changed("to")),
    ),
    name=lambda body: str(body["path"]),
)

inventory = Group("inventory", short_help="Show and compare what nodes are made of.")
inventory.help = "What the nodes are made of: parts and software, now and before."


def _path_of(invocation: Invocation, node: str) -> str:
    found = find_node(invocation.client, node, settings=invocation.settings)
    return f"/nodes/{found['id']}/inventory"


@inventory.command(
    "show",
    cls=Command,
    examples="""
    gamenode inventory show fra-07
    gamenode inventory show fra-07 --version 3 -o yaml
    gamenode inventory show fra-07 --at 2d
    """,
)
@click.argument("node", shell_complete=complete_nodes)
@click.option("--version", type=click.IntRange(1), help="The version with this number.")
@click.option("--at", metavar="TIME", help="As it was then: RFC 3339, or 2h for two hours ago.")
@pass_invocation
def show(invocation: Invocation, *, node: str, version: int | None, at: str | None) -> None:
    """Show what a node is made of."""
    path = _path_of(invocation, node)
    found = invocation.client.get(path, {"version": version, "at": at})
    invocation.output.item(found, _ONE)


@inventory.command(
    "versions",
    cls=Command,
    examples="""
    gamenode inventory versions fra-07
    """,
)
@click.argument("node", shell_complete=complete_nodes)
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--cursor", help="Where to go on, as the page before said.")
@pass_invocation
def versions(invocation: Invocation, *, node: str, limit: int, cursor: str | None) -> None:
    """List the versions of a node's inventory, newest first, and what changed."""
    path = _path_of(invocation, node)
    page = invocation.client.get(f"{path}/versions", {"limit": limit, "cursor": cursor})
    invocation.output.page(page, _VERSIONS)


@inventory.command(
    "diff",
    cls=Command,
    examples="""
    gamenode inventory diff fra-07
    gamenode inventory diff fra-07 3 5 -o json
    gamenode inventory diff fra-07 7d --exit-code
    """,
)
@click.argument("node", shell_complete=complete_nodes)
@click.argument("from_", metavar="[FROM]", required=False)
@click.argument("to", required=False)
@click.option("--exit-code", is_flag=True, help=f"Exit with {EXIT_DIFFERENT} if they differ.")
@pass_invocation
def diff(
    invocation: Invocation, *, node: str, from_: str | None, to: str | None, exit_code: bool
) -> int:
    """Compare two versions of a node's inventory.

    FROM and TO are versions, or times such as 2h (ago) at which they were the newest. Without them
    the newest version is compared with the one before.
    """
    path = _path_of(invocation, node)
    found = invocation.client.get(f"{path}/diff", {"from": from_, "to": to})
    output = invocation.output
    if output.format in {Format.JSON, Format.YAML}:
        output.document(found)
    else:
        output.page({"items": found["changes"]}, _CHANGES)
    return EXIT_DIFFERENT if exit_code and found["changes"] else 0


@inventory.command(
    "collect",
    cls=Command,
    examples="""
    gamenode inventory collect fra-07
    """,
)
@click.argument("node", shell_complete=complete_nodes)
@pass_invocation
def collect(invocation: Invocation, *, node: str) -> None:
    """Let a node collect its inventory now, and show it."""
    path = f"{API}{_path_of(invocation, node)}:collect"
    answer = invocation.client.send(Request("POST", path, wait_s=_COLLECT_S))
    invocation.output.item(answer.json(), _ONE)


@inventory.command(
    "query",
    cls=Command,
    examples="""
    gamenode inventory query gpu.model~4090
    gamenode inventory query 'gpu_driver.driver_version!=555.42.02,zone=a' -o name
    gamenode inventory query 'disk.serial=S6PX' --at 30d
    """,
)
@click.argument("expression", metavar="EXPR")
@click.option("--at", metavar="TIME", help="As they were then: RFC 3339, or 2h for two hours ago.")
@click.option("--changed-since", metavar="TIME", help="Only those that changed since then.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--cursor", help="Where to go on, as the page before said.")
@pass_invocation
def query(
    invocation: Invocation,
    *,
    expression: str,
    at: str | None,
    changed_since: str | None,
    limit: int,
    cursor: str | None,
) -> None:
    """List the inventories of the nodes that a selector fits."""
    wanted: Query = {
        "query": expression,
        "at": at,
        "changed_since": changed_since,
        "limit": limit,
        "cursor": cursor,
    }
    invocation.output.page(invocation.client.get("/inventory", wanted), _LIST)


@inventory.command(
    "export",
    cls=Command,
    examples="""
    gamenode inventory export -o csv > fleet.csv
    gamenode inventory export zone=a -o ndjson
    gamenode inventory export --changed-since 7d -o csv
    """,
)
@click.argument("expression", metavar="[EXPR]", required=False)
@click.option("--at", metavar="TIME", help="As they were then: RFC 3339, or 2h for two hours ago.")
@click.option("--changed-since", metavar="TIME", help="Only those that changed since then.")
@pass_invocation
def export(
    invocation: Invocation, *, expression: str | None, at: str | None, changed_since: str | None
) -> None:
    """Write the inventories of all nodes, or of those that a selector fits, as they come."""
    wanted: Query = {"query": expression, "at": at, "changed_since": changed_since}
    output = invocation.output
    match output.format:
        case Format.CSV if not output.look.columns and output.look.headers:
            with _opened(invocation, {**wanted, "format": "csv"}) as stream:
                while block := stream.read():
                    output.bytes(block)
        case Format.JSON | Format.YAML:
            items = list(invocation.client.items("/inventory", {**wanted, "limit": _PAGE}))
            output.document({"items": items, "next_cursor": None})
        case _:
            rows = output.rows(_LIST)
            with _opened(invocation, {**wanted, "format": "ndjson"}) as stream:
                for line in stream.lines():
                    rows.write(json.loads(line))


def _opened(invocation: Invocation, query: Query) -> AbstractContextManager[Stream]:
    silence_s = invocation.options.timeout or invocation.settings.away_s_max
    return invocation.client.stream(Request("GET", f"{API}/inventory", query), silence_s=silence_s)
