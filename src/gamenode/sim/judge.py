"""Holds what a server says of its nodes against what the simulation did to them.

Every time is of one monotonic clock, the simulator's own. What the server says reaches it as
events, a little later than it happened: `JudgeSettings.delivery_s` is what that may take.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from gamenode.agent.runtime import RunKey
from gamenode.domain.event import Event, EventType
from gamenode.domain.node import ConditionType, RegistrationAnswer
from gamenode.lib.clock import Clock

_STEPS_PER_DECADE: Final = 48
"""Steps of the latencies' scale: 5 % each."""


class Verdict(StrEnum):
    """What became of a promise."""

    KEPT = "kept"
    BROKEN = "broken"
    UNTRIED = "untried"  # nothing happened that could have broken it


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was seen of one promise."""

    promise: str
    """Its name in the design: `P8`, `RL3`."""
    text: str
    verdict: Verdict
    seen: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSettings:
    """What is held against the server."""

    check_s: float = 1.0
    """How often the server looks who is silent (P7)."""
    delivery_s: float = 1.5
    """What an event may take from the server to here."""
    examples_max: int = 10
    """How many broken promises are named one by one."""


class Latencies:
    """How long things took, on a scale of 5 % steps, in constant memory."""

    def __init__(self) -> None:
        """Know of none."""
        self._counts: Counter[int] = Counter()
        self.count = 0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.count += 1
        self._counts[round(math.log10(max(seconds, 1e-6)) * _STEPS_PER_DECADE)] += 1

    def quantile_s(self, q: float) -> float | None:
        """Return what the share `q` of them did not exceed, in seconds; None: there are none."""
        left = q * self.count
        for step in sorted(self._counts):
            left -= self._counts[step]
            if left <= 0:
                return float(10 ** (step / _STEPS_PER_DECADE))
        return None


@dataclass(slots=True)
class _Seen:
    """What is known of one node."""

    timeout_s: float = math.inf
    """After so much silence the server takes it for offline."""
    lives: int = 0
    """How often it registered."""
    online: bool = False
    """As the server says."""
    skewed: bool = False
    sent_s: float = -math.inf
    """When it last said anything to the server."""
    cut_s: float | None = None
    """Since when nothing of it reaches the server."""
    silent: bool = False
    """Whether its connection stands all the same."""
    excused_until_s: float = 0.0
    """Until then it may be taken for offline, for what was done to it before."""
    overdue: bool = False


@dataclass(slots=True)
class Counts:
    """How often things happened."""

    registrations: int = 0
    streams: int = 0
    beats_sent: int = 0
    beats_answered: int = 0
    beats_refused: int = 0
    strikes: Counter[str] = field(default_factory=Counter)
    server_losses: int = 0
    events: int = 0
    event_gaps: int = 0
    """How often events may have been missed."""


class Judge:
    """Sees everything, and says at the end which promises were kept."""

    def __init__(self, clock: Clock, settings: JudgeSettings) -> None:
        """Know of no node yet."""
        self._clock = clock
        self._settings = settings
        self._nodes: dict[str, _Seen] = {}
        self._server_back_s = -math.inf
        self._server_away = False
        self._flaps: list[str] = []
        self._flap_count = 0
        self._cuts_noticed = Latencies()
        self._slowest_s = 0.0
        self._overdue: list[str] = []
        self._overdue_count = 0
        self._continued = 0
        self._forgotten: list[str] = []
        self._named_skewed: set[str] = set()
        self._dead: list[str] = []
        self.counts = Counts()
        self.latencies = Latencies()

    @property
    def online(self) -> int:
        """Return how many nodes are online, as the server says."""
        return sum(node.online for node in self._nodes.values())

    @property
    def cut_off(self) -> int:
        """Return how many nodes cannot reach the server, by the simulation's doing."""
        return sum(node.cut_s is not None for node in self._nodes.values())

    @property
    def broken(self) -> int:
        """Return how often a promise was seen broken so far."""
        return self._flap_count + self._overdue_count + len(self._forgotten) + len(self._dead)

    # What nodes do

    def add(self, node_id: str, *, skewed: bool) -> None:
        """Know of a node."""
        self._nodes[node_id] = _Seen(skewed=skewed)

    def registered(self, node_id: str, answer: RegistrationAnswer) -> None:
        """Note that a registration was answered."""
        self.counts.registrations += 1
        node = self._nodes[node_id]
        if node.lives:
            if answer.continuation:
                self._continued += 1
            else:
                self._forgotten.append(node_id)
        node.lives += 1
        node.timeout_s = answer.heartbeat_timeout_s
        node.online = True
        node.sent_s = self._clock.monotonic_s()
        self._heard_server()

    def connected(self, node_id: str) -> None:
        """Note that a stream was opened."""
        self.counts.streams += 1
        self._nodes[node_id].sent_s = self._clock.monotonic_s()

    def beat(self, node_id: str) -> None:
        """Note that a heartbeat is sent."""
        self.counts.beats_sent += 1
        self._nodes[node_id].sent_s = self._clock.monotonic_s()

    def answered(self, node_id: str, round_trip_s: float, *, counted: bool) -> None:
        """Note that a heartbeat was answered."""
        if not counted:
            self.counts.beats_refused += 1
            return
        self.counts.beats_answered += 1
        self.latencies.add(round_trip_s)
        self._heard_server()
        node = self._nodes[node_id]
        if node.cut_s is None and node.excused_until_s == math.inf:
            node.excused_until_s = self._clock.monotonic_s() + self._settings.delivery_s

    def died(self, node_id: str, error: BaseException) -> None:
        """Note that an agent ended by itself, which none ever should."""
        self._dead.append(f"{node_id}: {error!r}")

    # What is done to them

    def cut(self, node_id: str, kind: str, *, silent: bool) -> None:
        """Note that from now on nothing of a node reaches the server."""
        self.counts.strikes[kind] += 1
        node = self._nodes[node_id]
        node.cut_s = self._clock.monotonic_s()
        node.silent = silent
        node.overdue = False
        node.excused_until_s = math.inf

    def healed(self, node_id: str) -> None:
        """Note that a node can reach the server again."""
        self.check()
        self._nodes[node_id].cut_s = None

    # What the server says

    def server_lost(self) -> None:
        """Note that the server's events broke off."""
        if not self._server_away:
            self._server_away = True
            self.counts.server_losses += 1

    def heard(self, event: Event) -> None:
        """Take an event of the server's."""
        self.counts.events += 1
        node = self._nodes.get(event.node_id)
        if node is None:
            return
        match event.type:
            case EventType.NODE_ONLINE:
                node.online = True
            case EventType.NODE_OFFLINE:
                node.online = False
                self._offline(event.node_id, node, event.message)
            case EventType.NODE_CONDITION:
                if (event.data.get("type"), event.status) == (ConditionType.CLOCK_SKEW, "holds"):
                    self._named_skewed.add(event.node_id)
            case _:
                pass

    def check(self) -> None:
        """Look for nodes that should be offline by now; call it every second."""
        if self._server_away:
            return
        now_s = self._clock.monotonic_s()
        for node_id, node in self._nodes.items():
            if node.cut_s is None or not node.online or node.overdue:
                continue
            since_s = max(node.sent_s, self._server_back_s)
            allowed_s = node.timeout_s + self._settings.check_s + self._settings.delivery_s
            if now_s - since_s > allowed_s:
                node.overdue = True
                self._overdue_count += 1
                self._name(self._overdue, f"{node_id} online {now_s - since_s:.1f} s after it")

    def findings(self, starts: Iterable[RunKey]) -> list[Finding]:
        """Return what was seen of each promise; `starts` are all runs that came to run."""
        noticed = self._cuts_noticed.count
        again = self._continued + len(self._forgotten)
        begun = Counter(starts)
        doubled = [str(run) for run, count in begun.items() if count > 1]
        skewed = {node_id for node_id, node in self._nodes.items() if node.skewed}
        misnamed = sorted(self._named_skewed - skewed)
        return [
            _finding(
                "P8",
                "nobody is offline who can reach the server",
                tried=self.counts.beats_answered > 0,
                broken=self._flaps,
                seen=f"{self._flap_count} wrong in {self.counts.beats_answered} heartbeats",
            ),
            _finding(
                "P7",
                "whoever cannot is offline in time",
                tried=noticed > 0 or self._overdue_count > 0,
                broken=self._overdue,
                seen=f"{noticed} in time, at most {self._slowest_s:.1f} s after the last word; "
                f"{self._overdue_count} late",
            ),
            _finding(
                "RL3",
                "a node that registers again goes on with its session",
                tried=again > 0,
                broken=self._forgotten,
                seen=f"{self._continued} of {again}",
            ),
            _finding(
                "P1",
                "every run is started once",
                tried=bool(begun),
                broken=doubled,
                seen=f"{len(begun)} runs, {len(doubled)} of them more than once",
            ),
            _finding(
                "N3",
                "no clock is said to be off that is right",
                tried=self.counts.beats_answered > 0,
                broken=misnamed,
                seen=f"{len(self._named_skewed & skewed)} of {len(skewed)} that are off were named",
            ),
            _finding(
                "RL5",
                "no agent gives up",
                tried=self.counts.registrations > 0,
                broken=self._dead,
                seen=f"{len(self._dead)} of {len(self._nodes)} ended",
            ),
        ]

    def _offline(self, node_id: str, node: _Seen, message: str) -> None:
        now_s = self._clock.monotonic_s()
        early = node.silent and node.cut_s is not None and now_s - node.sent_s < node.timeout_s
        if now_s >= node.excused_until_s or early:
            self._flap_count += 1
            self._name(self._flaps, f"{node_id}: {message}")
        elif node.cut_s is not None:
            after_s = now_s - node.sent_s
            self._cuts_noticed.add(after_s)
            self._slowest_s = max(self._slowest_s, after_s)

    def _heard_server(self) -> None:
        if self._server_away:
            self._server_away = False
            self._server_back_s = self._clock.monotonic_s()

    def _name(self, named: list[str], what: str) -> None:
        if len(named) < self._settings.examples_max:
            named.append(what)


def _finding(promise: str, text: str, *, tried: bool, broken: list[str], seen: str) -> Finding:
    verdict = Verdict.BROKEN if broken else Verdict.KEPT if tried else Verdict.UNTRIED
    examples = f": {'; '.join(broken[:3])}" if broken else ""
    return Finding(promise=promise, text=text, verdict=verdict, seen=seen + examples)
