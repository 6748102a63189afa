"""What shall go wrong in a simulated fleet, and how often."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gamenode.domain.errors import invalid
from gamenode.domain.quantity import parse_duration


class FaultKind(StrEnum):
    """What can go wrong with a node."""

    PARTITION = "partition"  # its connection breaks, and it can make no other for a while
    SILENCE = "silence"  # its connection stands and carries nothing for a while
    KILL = "kill"  # its agent ends at once and is started again on the same host after a while
    SLOW = "slow"  # whatever it sends arrives late
    SKEW = "skew"  # its clock is off, one way or the other


STRIKING: Final = (FaultKind.PARTITION, FaultKind.SILENCE, FaultKind.KILL)
"""Faults that come and go; the others are a property of the node from its start."""

_DURATIONS_S: Final = {
    FaultKind.PARTITION: 30.0,
    FaultKind.SILENCE: 60.0,
    FaultKind.KILL: 60.0,
    FaultKind.SLOW: 2.0,
    FaultKind.SKEW: 90.0,
}
_FAULT: Final = re.compile(r"(?P<kind>[a-z]+)=(?P<ratio>[0-9]*\.?[0-9]+)([/:](?P<duration>.+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of fault."""

    kind: FaultKind
    ratio: float
    """The share of the nodes that it strikes in a minute; of `SLOW` and `SKEW`: that have it."""
    duration_s: float
    """How long it lasts; `SLOW`: the longest delay; `SKEW`: how far the clock is off."""


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Return the faults that `text` writes, such as `partition=0.05/30s,slow=0.02,skew=0.01:90s`.

    Raises:
        GameNodeError: INVALID_REQUEST.
    """
    faults = tuple(_parse(part.strip()) for part in text.split(",") if part.strip())
    kinds = [fault.kind for fault in faults]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise invalid("--faults", f"{kind} stands there twice")
    return faults


def _parse(text: str) -> Fault:
    match = _FAULT.fullmatch(text)
    if match is None or match["kind"] not in set(FaultKind):
        raise invalid(
            "--faults",
            f"{text!r} is no fault",
            advice=f"write KIND=RATIO/DURATION; the kinds are {', '.join(FaultKind)}",
        )
    ratio = float(match["ratio"])
    if ratio > 1.0:
        raise invalid("--faults", f"{text}: a ratio is at most 1")
    kind = FaultKind(match["kind"])
    duration = match["duration"]
    return Fault(
        kind=kind,
        ratio=ratio,
        duration_s=(parse_duration(duration, field="--faults") if duration else _DURATIONS_S[kind]),
    )
