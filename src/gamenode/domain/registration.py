"""What a node must say of itself, and what of it cannot be true: one table (A2, A6)."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gamenode.domain.errors import ErrorCode, GameNodeError, Violation
from gamenode.domain.inventory import CollectionFailure, Cpu, Inventory, Kernel
from gamenode.domain.node import NodeType

_EVERY_TYPE: Final = frozenset(NodeType)
_TEXT_LENGTH_MAX: Final = 4096  # a path's bound
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}((:[0-9a-f]{2}){2}|(:[0-9a-f]{2}){14})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What holds for one field."""

    field: str
    """Its path in the registration; `[]` is every entry of a list."""
    part: str
    """The part of the inventory that it belongs to, one of `inventory.PARTS`."""
    required_for: frozenset[NodeType] = frozenset()
    holds: Callable[[Any], bool] = lambda _: True
    """Whether a value that is present can be true."""
    reason: str = ""
    """What is wrong where it cannot."""
    advice: str


def _threads_suffice(cpu: Cpu) -> bool:
    return cpu.threads is None or cpu.cores is None or cpu.threads >= cpu.cores


def _names_a_version(kernel: Kernel) -> bool:
    return kernel.major is not None or bool(kernel.release)


def _is_mac(text: str) -> bool:
    return _MAC.fullmatch(text.lower()) is not None


def _are_addresses(texts: Sequence[str]) -> bool:
    try:
        for text in texts:
            ipaddress.ip_interface(text)
    except ValueError:
        return False
    return True


RULES: Final = (
    Rule(
        field="hardware.cpu[].architecture",
        part="cpu",
        required_for=_EVERY_TYPE,
        advice="give what `uname -m` prints, such as x86_64",
    ),
    Rule(
        field="hardware.cpu[].cores",
        part="cpu",
        required_for=_EVERY_TYPE,
        holds=lambda cores: cores >= 1,
        reason="must be at least 1",
        advice="give the number of physical cores, as `lscpu` shows it",
    ),
    Rule(
        field="hardware.cpu[]",
        part="cpu",
        holds=_threads_suffice,
        reason="has fewer threads than cores",
        advice="give all hardware threads of the processor, not those of one core",
    ),
    Rule(
        field="hardware.memory.total_bytes",
        part="memory",
        required_for=_EVERY_TYPE,
        holds=lambda total_bytes: total_bytes >= 1,
        reason="must be at least 1",
        advice="give MemTotal of /proc/meminfo, in bytes",
    ),
    Rule(
        field="software.os.distribution",
        part="system",
        required_for=_EVERY_TYPE,
        advice="give ID of /etc/os-release, such as debian",
    ),
    Rule(
        field="software.os.version",
        part="system",
        required_for=_EVERY_TYPE,
        advice="give VERSION_ID of /etc/os-release, or BUILD_ID where that is absent",
    ),
    Rule(
        field="software.kernel",
        part="system",
        required_for=_EVERY_TYPE,
        holds=_names_a_version,
        reason="has neither `major` nor `release`",
        advice="give what `uname -r` prints as `release`, its numbers as major, minor and patch",
    ),
    Rule(
        field="network.interfaces[].mac",
        part="network",
        holds=_is_mac,
        reason="is not a MAC address",
        advice="write it as 52:54:00:12:34:56",
    ),
    Rule(
        field="network.interfaces[].addresses",
        part="network",
        holds=_are_addresses,
        reason="are not all IP addresses",
        advice="write them as 192.0.2.7/24 or 2001:db8::7/64",
    ),
)
"""Every rule beyond the bounds that the wire contract states for single values."""


def refusal(
    inventory: Inventory,
    node_type: NodeType | None,
    failed: Sequence[CollectionFailure] = (),
    *,
    retry_after_s: float,
) -> GameNodeError | None:
    """Return why a node that is made of `inventory` is refused, or None; everything at once.

    Args:
        inventory: What the node is made of.
        node_type: None where it is not known: then everything is required.
        failed: What could not be collected. Where only that is missing, a retry may help.
        retry_after_s: When.
    """
    failures = {failure.part: failure.reason for failure in failed}
    violations: list[Violation] = []
    hopeful = True
    for rule in RULES:
        required = node_type is None or node_type in rule.required_for
        for path, value in _values(inventory, rule.field, required=bool(rule.required_for)):
            if _is_absent(value):
                if required and rule.required_for:
                    reason = failures.get(rule.part)
                    hopeful = hopeful and reason is not None
                    violations.append(_missing(path, rule, reason))
            elif not rule.holds(value):
                hopeful = False
                violations.append(Violation(field=path, reason=rule.reason, advice=rule.advice))
    for path, text in _texts(inventory, ""):
        if len(text) > _TEXT_LENGTH_MAX or "\0" in text:
            hopeful = False
            reason = f"must be at most {_TEXT_LENGTH_MAX} characters, none of them NUL"
            violations.append(Violation(field=path, reason=reason))
    if not violations:
        return None
    return GameNodeError(
        ErrorCode.INVALID_REQUEST,
        "; ".join(f"{violation.field}: {violation.reason}" for violation in violations),
        violations=violations,
        retry_after_s=retry_after_s if hopeful else None,
    )


def _missing(path: str, rule: Rule, failure: str | None) -> Violation:
    if failure is None:
        return Violation(field=path, reason="is missing", advice=rule.advice)
    return Violation(
        field=path,
        reason=f"is missing: {rule.part} could not be collected: {failure}",
        advice="try again; if it goes on failing, " + rule.advice,
    )


def _values(record: Any, path: str, *, required: bool) -> Iterator[tuple[str, Any]]:
    """Yield each value that `path` leads to; of a required one also where a list is empty."""
    name, _, rest = path.partition(".")
    if not name.endswith("[]"):
        value = getattr(record, name)
        inner = _values(value, rest, required=required) if rest else iter([("", value)])
        yield from (_joined(name, found) for found in inner)
        return
    name = name.removesuffix("[]")
    items: Sequence[Any] = getattr(record, name)
    for index, item in enumerate(items):
        inner = _values(item, rest, required=required) if rest else iter([("", item)])
        yield from (_joined(f"{name}[{index}]", found) for found in inner)
    if not items and required:
        yield f"{name}[0].{rest}", None


def _joined(name: str, found: tuple[str, Any]) -> tuple[str, Any]:
    path, value = found
    return (f"{name}.{path}" if path else name), value


def _is_absent(value: Any) -> bool:
    if dataclasses.is_dataclass(value):
        return all(_is_absent(getattr(value, entry.name)) for entry in dataclasses.fields(value))
    return value is None or value == () or (isinstance(value, str) and not value.strip())


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _texts(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value):
        for entry in dataclasses.fields(value):
            inner = f"{path}.{entry.name}" if path else entry.name
            yield from _texts(getattr(value, entry.name), inner)
