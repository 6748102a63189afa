"""How two inventories differ, part by part, and field by field within a part.

A part is known by what identifies it (serial, UUID, MAC, PCI address, slot), never by its position
in a list: a memory module in another slot is moved, not lost and new. Paths are those that
selectors use: `gpu[GPU-5f0d].driver_version`, `memory.modules[83A1C2].slot`, `os.version`.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, TypeVar

from gamenode.domain.inventory import (
    Cpu,
    Disk,
    Gpu,
    Inventory,
    MemoryModule,
    NetworkInterface,
    canonical,
)

Value = str | int | float | bool | tuple[str, ...]
"""One value of a field."""

Part = Mapping[str, Value]
"""The fields of a part that are present."""

_Record = TypeVar("_Record")


class ChangeOp(StrEnum):
    """What happened to a part, or to a value."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"
    MOVED = "moved"


@dataclass(frozen=True, slots=True)
class Change:
    """One difference; `from_` is None for what was added, `to` for what was removed."""

    op: ChangeOp
    path: str
    from_: Value | Part | None
    to: Value | Part | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryDiff:
    """How two versions of a node's inventory differ."""

    node_id: str
    from_version: int
    to_version: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of part: which fields identify it, the best first, and which says where it is."""

    type: type[Any]
    identity: tuple[str, ...]
    place: str | None = None


_KINDS: Final[Mapping[str, _Kind]] = {
    "cpu": _Kind(Cpu, ("socket",)),
    "memory.modules": _Kind(MemoryModule, ("serial", "slot"), place="slot"),
    "gpu": _Kind(Gpu, ("uuid", "pci_address"), place="pci_address"),
    "disk": _Kind(Disk, ("serial", "path"), place="path"),
    "interfaces": _Kind(NetworkInterface, ("mac", "name"), place="name"),
}
_WORKING_KINDS: Final = frozenset({"cpu", "memory.modules", "gpu", "disk"})
_MEMORY_KEPT_RATIO: Final = 0.95
_PART_PATH: Final = re.compile(r"([a-z_.]+)\[(.*)\](?:\.([a-z0-9_]+))?", re.DOTALL)


def diff(a: Inventory, b: Inventory) -> tuple[Change, ...]:
    """Return what has to happen to the stable content of `a` to make it that of `b`.

    In the order of `b`'s paths, removed ones last. Empty if and only if their hashes are equal.
    """
    old, new = _flatten(a), _flatten(b)
    changes = list(_differences("", "", old.values, new.values))
    for path, part in new.parts.items():
        if path in old.parts:
            place = _KINDS[_kind_of(path)].place
            changes.extend(_differences(f"{path}.", place, old.parts[path], part))
        else:
            changes.append(Change(ChangeOp.ADDED, path, None, part))
    changes.extend(
        Change(ChangeOp.REMOVED, path, part, None)
        for path, part in old.parts.items()
        if path not in new.parts
    )
    return tuple(changes)


def apply(changes: Sequence[Change], a: Inventory) -> Inventory:
    """Return the stable content of `a` after `changes`: `apply(diff(a, b), a) == canonical(b)`."""
    flat = _flatten(a)
    for change in changes:
        match = _PART_PATH.fullmatch(change.path)
        if match is None:
            _set(flat.values, change.path, change.to)
        elif match[3] is not None:
            _set(flat.parts[f"{match[1]}[{match[2]}]"], match[3], change.to)
        elif isinstance(change.to, Mapping):
            flat.parts[change.path] = dict(change.to)
        else:
            del flat.parts[change.path]
    built = Inventory()
    return canonical(
        Inventory(
            hardware=_build(built.hardware, "", flat),
            software=_build(built.software, "", flat),
            network=_build(built.network, "", flat),
        )
    )


def is_loss(change: Change) -> bool:
    """Return whether a part is gone, or there is noticeably less of what a node works with."""
    path = change.path.partition("[")[0]
    if path in _WORKING_KINDS and path != change.path:
        if change.path.endswith("]"):
            return change.op is ChangeOp.REMOVED
        return change.path.endswith("].cores") and _less(change, 1.0)
    # The kernel keeps a little more or less for itself from one release to the next.
    return change.path == "memory.total_bytes" and _less(change, _MEMORY_KEPT_RATIO)


def describe(change: Change) -> str:
    """Return one change in words, for an event or a line on a terminal."""
    match change.op:
        case ChangeOp.ADDED if isinstance(change.to, Mapping):
            return f"{change.path} added{_named(change.to)}"
        case ChangeOp.REMOVED if isinstance(change.from_, Mapping):
            return f"{change.path} removed{_named(change.from_)}"
        case ChangeOp.ADDED:
            return f"{change.path} {_words(change.to)}, not reported before"
        case ChangeOp.REMOVED:
            return f"{change.path} {_words(change.from_)}, no longer reported"
        case ChangeOp.MOVED:
            part = change.path.rpartition(".")[0]
            return f"{part} moved {_words(change.from_)} → {_words(change.to)}"
        case ChangeOp.CHANGED:
            return f"{change.path} {_words(change.from_)} → {_words(change.to)}"


@dataclass(slots=True)
class _Flat:
    """An inventory's stable content as paths: single values, and parts with their fields."""

    values: dict[str, Value] = field(default_factory=dict)
    parts: dict[str, dict[str, Value]] = field(default_factory=dict)


def _flatten(inventory: Inventory) -> _Flat:
    stable = canonical(inventory)
    flat = _Flat()
    for root in (stable.hardware, stable.software, stable.network):
        _collect(root, "", flat)
    return flat


def _collect(record: Any, prefix: str, into: _Flat) -> None:
    for name in _names(record):
        path, value = f"{prefix}{name}", getattr(record, name)
        if path in _KINDS:
            fields = [_fields(part) for part in value]
            for key, part in zip(_keys(_KINDS[path], fields), fields, strict=True):
                into.parts[f"{path}[{key}]"] = part
        elif dataclasses.is_dataclass(value):
            _collect(value, f"{path}.", into)
        elif value is not None:
            into.values[path] = value


def _build(template: _Record, prefix: str, flat: _Flat) -> _Record:
    values: dict[str, Any] = {}
    for name in _names(template):
        path = f"{prefix}{name}"
        if path in _KINDS:
            values[name] = tuple(
                _KINDS[path].type(**part)
                for part_path, part in flat.parts.items()
                if _kind_of(part_path) == path
            )
        elif dataclasses.is_dataclass(value := getattr(template, name)):
            values[name] = _build(value, f"{path}.", flat)
        else:
            values[name] = flat.values.get(path)
    return replace(template, **values)  # type: ignore[type-var] # only dataclasses come here


def _keys(kind: _Kind, parts: Sequence[Part]) -> Iterator[str]:
    """Return a key for each part: its identity, with all of it where the first is not its own."""
    identities = [[str(part[name]) for name in kind.identity if name in part] for part in parts]
    owners = Counter(identity[0] for identity in identities if identity)
    taken: set[str] = set()
    for identity in identities:
        key = "@".join(identity if identity and owners[identity[0]] > 1 else identity[:1]) or "?"
        number, unique = 1, key
        while unique in taken:
            number += 1
            unique = f"{key}#{number}"
        taken.add(unique)
        yield unique


def _differences(prefix: str, place: str | None, old: Part, new: Part) -> Iterator[Change]:
    for name in dict.fromkeys((*new, *old)):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if before is None:
            op = ChangeOp.ADDED
        elif after is None:
            op = ChangeOp.REMOVED
        else:
            op = ChangeOp.MOVED if name == place else ChangeOp.CHANGED
        yield Change(op, f"{prefix}{name}", before, after)


def _less(change: Change, kept_ratio: float) -> bool:
    before, after = change.from_, change.to
    if isinstance(before, int) and isinstance(after, int):
        return after < before * kept_ratio
    return False


def _set(values: dict[str, Value], name: str, value: Value | Part | None) -> None:
    if value is None:
        del values[name]
    else:
        assert not isinstance(value, Mapping)  # only whole parts are mappings
        values[name] = value


def _kind_of(part_path: str) -> str:
    return part_path.partition("[")[0]


def _fields(part: Any) -> dict[str, Value]:
    values = {name: getattr(part, name) for name in _names(part)}
    return {name: value for name, value in values.items() if value is not None and value != ()}


def _names(record: Any) -> Iterator[str]:
    return (entry.name for entry in dataclasses.fields(record))


def _named(part: Part) -> str:
    names = [_words(part[name]) for name in ("model", "part_number", "name") if name in part]
    return f" ({names[0]})" if names else ""


def _words(value: Value | Part | None) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return ", ".join(value) if isinstance(value, tuple) else str(value)
