"""The pipeline file: its one table, which reads files and is published as JSON Schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, TypeVar

from gamenode.domain.args import value_problem
from gamenode.domain.container import FORMS, Form, normal_port
from gamenode.domain.errors import GameNodeError
from gamenode.domain.node import GPU_SLOTS_MAX
from gamenode.domain.pipeline import (
    ArgSpec,
    ArgType,
    Condition,
    ContainerSpec,
    DeviceReservation,
    GpuDemand,
    Group,
    Healthcheck,
    OnLost,
    PipelineSpec,
    Placement,
    Retries,
    StepSpec,
    StepType,
    Ulimit,
)
from gamenode.domain.regular import PATTERN_LENGTH_MAX, read_pattern
from gamenode.domain.selector import parse_selector
from gamenode.domain.shell import VARIABLE_PREFIXES, Shell, script_index
from gamenode.domain.template import NAME_PATTERN
from gamenode.wire.shapes import (
    Boolean,
    ByKind,
    Choice,
    Complain,
    Duration,
    Integer,
    Key,
    ListOf,
    MapOf,
    Mapped,
    Pairs,
    PositiveNumber,
    Reading,
    Record,
    Shape,
    Size,
    Text,
    Words,
)
from gamenode.wire.yaml_document import MapNode, Node, ScalarNode

STEPS_MAX: Final = 200
ITEMS_MAX: Final = 1000
"""Of a list in a container, and of args and envs."""
DESCRIPTION_LENGTH_MAX: Final = 4096
RETRIES_MAX: Final = 100
_INT32_MAX: Final = 2**31 - 1
_INT64_MAX: Final = 2**63 - 1

T = TypeVar("T")


def _into(make: Callable[..., T]) -> Callable[[dict[str, Any], Complain], T]:
    return lambda values, _: make(**values)


def _texts(field: str, *, normal: Callable[[str], str] = str) -> ListOf[str]:
    return ListOf(item=_text(field, normal=normal), count_max=ITEMS_MAX)


def _text(field: str, *, normal: Callable[[str], str] = str) -> Text:
    return Text(form=FORMS[field], templates=True, normal=normal)


_ANY_TEXT: Final = Text(templates=True)
_VARIABLE: Final = Form("the name of a variable", r"[^=\s\0]{1,256}", "HOME")
_LABEL: Final = Form("the name of a label", r"(?!gamenode\.)[^=\s\0]{1,256}", "owner")
_HOST: Final = Form("a host name", r"[^\s:=]{1,253}", "db")
_NAME: Final = Form("a name", NAME_PATTERN, "IMAGE")
_ULIMIT: Final = Form("a resource", r"[a-z]{1,16}", "nofile")
_DEVICE_TEXT: Final = Text(length_min=1, length_max=256, templates=True)


def _short_volume(long: dict[str, Any], complain: Complain) -> str | None:
    for part in ("source", "target"):
        if ":" in long[part]:
            complain("cannot hold a colon", "rename it", part)
            return None
    text = f"{long['source']}:{long['target']}" + (":ro" if long.get("read_only") else "")
    return _checked("volumes", text, complain)


def _short_port(long: dict[str, Any], complain: Complain) -> str | None:
    address, protocol = long.get("host_ip"), long.get("protocol")
    shown = f"[{address}]" if address and ":" in address else address
    parts = [*([shown] if shown else []), long.get("published", "0"), long["target"]]
    text = ":".join(parts) + (f"/{protocol}" if protocol else "")
    return _checked("ports", text, complain)


def _checked(field: str, text: str, complain: Complain) -> str | None:
    # Long forms become short ones, so that what follows knows one form only.
    if "${{" not in text and (problem := FORMS[field].problem(text)):
        complain(*problem)
        return None
    return text


class _MountType(StrEnum):
    BIND = "bind"
    VOLUME = "volume"


class _Protocol(StrEnum):
    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"


_VOLUME: Final[ByKind[str]] = ByKind(
    scalar=_text("volumes"),
    mapping=Record(
        what="a volume",
        keys={
            "type": Key(shape=Choice(_MountType, later=("tmpfs",)), doc="bind or volume."),
            "source": Key(shape=_ANY_TEXT, doc="A path of the host, or a name.", required=True),
            "target": Key(shape=_ANY_TEXT, doc="A path in the container.", required=True),
            "read_only": Key(shape=Boolean(), doc="Whether it cannot be written."),
        },
        build=_short_volume,
    ),
)

_PORT: Final[ByKind[str]] = ByKind(
    scalar=_text("ports", normal=normal_port),
    mapping=Record(
        what="a port",
        keys={
            "target": Key(shape=_ANY_TEXT, doc="The port in the container.", required=True),
            "published": Key(shape=_ANY_TEXT, doc="The port of the host; absent: any free one."),
            "protocol": Key(shape=Choice(_Protocol), doc="tcp (default), udp or sctp."),
            "host_ip": Key(shape=_ANY_TEXT, doc="The address of the host; absent: all."),
        },
        build=_short_port,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    soft: int
    hard: int


def _limits(values: dict[str, Any], complain: Complain) -> _Limits | None:
    soft, hard = values["soft"], values["hard"]
    if hard != -1 and (soft > hard or soft == -1):
        complain("is above the hard limit", "", "soft")
        return None
    return _Limits(soft=soft, hard=hard)


def _ulimits(by_name: Mapping[str, _Limits]) -> tuple[Ulimit, ...]:
    return tuple(Ulimit(name=n, soft=one.soft, hard=one.hard) for n, one in by_name.items())


_LIMIT: Final = Integer(least=-1, most=_INT64_MAX)
_ULIMITS: Final[Mapped[tuple[Ulimit, ...]]] = Mapped(
    MapOf(
        key=_ULIMIT,
        value=ByKind(
            scalar=Mapped(_LIMIT, lambda both: _Limits(soft=both, hard=both)),
            mapping=Record(
                what="a limit",
                keys={
                    "soft": Key(shape=_LIMIT, doc="Where it begins.", required=True),
                    "hard": Key(shape=_LIMIT, doc="How far it can be raised.", required=True),
                },
                build=_limits,
            ),
        ),
    ),
    _ulimits,
)


def _healthcheck(values: dict[str, Any], complain: Complain) -> Healthcheck | None:
    check = Healthcheck(**values)
    if check.test and check.test[0] not in {"CMD", "CMD-SHELL", "NONE"}:
        complain("must begin with CMD, CMD-SHELL or NONE", "write CMD first", "test", 0)
        return None
    if not check.test and not check.disable:
        complain("has no test", "add test:, or disable: true")
        return None
    return check


_HEALTHCHECK: Final[Record[Healthcheck]] = Record(
    what="a healthcheck",
    keys={
        "test": Key(
            shape=ByKind(
                scalar=Mapped(_ANY_TEXT, lambda script: ("CMD-SHELL", script)),
                items=ListOf(item=_ANY_TEXT, count_min=1, count_max=ITEMS_MAX),
            ),
            doc="A line for a shell, or a list that begins with CMD, CMD-SHELL or NONE.",
        ),
        "interval": Key(shape=Duration(), into="interval_s", doc="Between two tests."),
        "timeout": Key(shape=Duration(), into="timeout_s", doc="How long one may take."),
        "retries": Key(shape=Integer(least=1, most=_INT32_MAX), doc="How many must fail in a row."),
        "start_period": Key(
            shape=Duration(zero=True),
            into="start_period_s",
            doc="How long failures do not count at the start.",
        ),
        "disable": Key(shape=Boolean(), doc="Switch off the image's own check."),
    },
    build=_healthcheck,
)


def _devices(values: dict[str, Any], complain: Complain) -> DeviceReservation | None:
    if "count" in values and "device_ids" in values:
        complain("cannot stand beside device_ids", "keep one of them", "count")
        return None
    return DeviceReservation(**values)


@dataclass(frozen=True, slots=True)
class _Count(Shape[int]):
    """How many devices; `all` is 0."""

    number: Integer

    def read(self, node: Node, at: str, reading: Reading) -> int | None:
        """See `Shape`."""
        if isinstance(node, ScalarNode) and node.text == "all":
            return 0
        return self.number.read(node, at, reading)

    def json_schema(self) -> dict[str, object]:
        """See `Shape`."""
        return {"anyOf": [{"const": "all"}, self.number.json_schema()]}


_RESERVED_DEVICE: Final[Record[DeviceReservation]] = Record(
    what="a device",
    keys={
        "capabilities": Key(
            shape=ListOf(item=_DEVICE_TEXT, count_min=1, count_max=ITEMS_MAX),
            doc="What it must be able to do, such as [gpu].",
            required=True,
        ),
        "count": Key(shape=_Count(Integer(least=1, most=_INT32_MAX)), doc="How many, or all."),
        "device_ids": Key(
            shape=ListOf(item=_DEVICE_TEXT, count_min=1, count_max=ITEMS_MAX), doc="Which ones."
        ),
        "driver": Key(shape=_DEVICE_TEXT, doc="Whose driver, such as nvidia."),
    },
    build=_devices,
)


def _deploy(values: dict[str, Any], _: Complain) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in values.get("resources", {}).values():
        merged |= part
    return merged


_DEPLOY: Final[Record[dict[str, Any]]] = Record(
    what="deploy",
    keys={
        "resources": Key(
            doc="What the container may use.",
            shape=Record(
                what="resources",
                keys={
                    "limits": Key(
                        doc="What it may use at most.",
                        shape=Record(
                            what="limits",
                            keys={
                                "cpus": Key(shape=PositiveNumber(), doc="Processors."),
                                "memory": Key(shape=Size(), into="memory_bytes", doc="Memory."),
                            },
                            build=_into(dict),
                            later=("pids",),
                        ),
                    ),
                    "reservations": Key(
                        doc="What is kept for it.",
                        shape=Record(
                            what="reservations",
                            keys={
                                "memory": Key(
                                    shape=Size(), into="memory_reservation_bytes", doc="Memory."
                                ),
                                "devices": Key(
                                    shape=ListOf(item=_RESERVED_DEVICE, count_max=ITEMS_MAX),
                                    into="devices_reserved",
                                    doc="Devices by capability, such as GPUs.",
                                ),
                            },
                            build=_into(dict),
                            later=("cpus", "generic_resources"),
                        ),
                    ),
                },
                build=_into(dict),
            ),
        ),
    },
    build=_deploy,
)


def _container(values: dict[str, Any], complain: Complain) -> ContainerSpec | None:
    values |= values.pop("deploy", {})
    environment: dict[str, str] = dict(values.get("environment", {}))
    reserved = tuple(VARIABLE_PREFIXES.values())
    wrong = False
    for name in environment:
        if name.startswith(reserved):
            complain("is a variable of GameNode's own", "give it another name", "environment", name)
            wrong = True
    for other in ("command", "entrypoint"):
        if "commands" in values and other in values:
            complain("cannot stand beside commands", "keep one of them", other)
            wrong = True
    if not values.keys() & {"image", "command", "entrypoint", "commands"}:
        complain("names nothing to run", "add image:, command: or commands:")
        wrong = True
    scripts = _Scripts(values, complain)
    if wrong or scripts.wrong:
        return None
    if "extra_hosts" in values:
        pairs: Mapping[str, str] = values["extra_hosts"]
        values["extra_hosts"] = tuple(f"{name}:{address}" for name, address in pairs.items())
    return ContainerSpec(**values | {"environment": environment | scripts.variables})


class _Scripts:
    """Turns templates into variables wherever a container's text is read by a shell."""

    def __init__(self, values: dict[str, Any], complain: Complain) -> None:
        self.variables: dict[str, str] = {}
        self.wrong = False
        self._complain = complain
        if commands := values.get("commands"):
            values["commands"] = self._rewrite(commands, "commands")
        self._command(values)
        if check := values.get("healthcheck"):
            values["healthcheck"] = self._healthcheck(check)

    def _healthcheck(self, check: Healthcheck) -> Healthcheck:
        at = 1 if check.test[:1] == ("CMD-SHELL",) else script_index(check.test)
        if at is None:
            return check
        return replace(check, test=self._replaced(check.test, at, "healthcheck", "test"))

    def _command(self, values: dict[str, Any]) -> None:
        entrypoint: tuple[str, ...] = values.get("entrypoint", ())
        command: tuple[str, ...] = values.get("command", ())
        at = script_index([*entrypoint, *command])
        if at is None:
            return
        if at < len(entrypoint):
            values["entrypoint"] = self._replaced(entrypoint, at, "entrypoint")
        else:
            values["command"] = self._replaced(command, at - len(entrypoint), "command")

    def _replaced(self, words: tuple[str, ...], at: int, *path: str) -> tuple[str, ...]:
        script = self._rewrite(words[at : at + 1], *path)
        return (*words[:at], *script, *words[at + 1 :])

    def _rewrite(self, lines: tuple[str, ...], *path: str) -> tuple[str, ...]:
        shell = Shell()
        written: list[str] = []
        for index, line in enumerate(lines):
            text, mistakes = shell.line(line)
            written.append(text)
            for mistake in mistakes:
                where = (*path, index) if path == ("commands",) else path
                self._complain(mistake.reason, mistake.advice, *where)
                self.wrong = True
        self.variables |= shell.variables
        return tuple(written)


_WORDS: Final = Words(ListOf(item=_ANY_TEXT, count_max=ITEMS_MAX))

_CONTAINER: Final[Record[ContainerSpec]] = Record(
    what="a container",
    keys={
        "image": Key(shape=_text("image"), doc="The image. The process runtime ignores it."),
        "container_name": Key(shape=_text("container_name"), doc="A name for people."),
        "hostname": Key(shape=_text("hostname"), doc="Its host name."),
        "command": Key(shape=_WORDS, doc="The command's words; no shell reads them."),
        "entrypoint": Key(shape=_WORDS, doc="The entry point's words."),
        "commands": Key(
            shape=ListOf(item=_ANY_TEXT, count_min=1, count_max=ITEMS_MAX),
            doc="Lines for one shell, which stops at the first failure. A template in them is "
            "always one word.",
        ),
        "environment": Key(shape=Pairs(key=_VARIABLE), doc="Variables: a mapping, or NAME=value."),
        "working_dir": Key(shape=_text("working_dir"), doc="Where it starts."),
        "user": Key(shape=_text("user"), doc="Who it runs as: name or id, and a group."),
        "volumes": Key(
            shape=ListOf(item=_VOLUME, count_max=ITEMS_MAX), doc="source:target[:mode]."
        ),
        "tmpfs": Key(
            shape=ByKind(scalar=Mapped(_text("tmpfs"), lambda one: (one,)), items=_texts("tmpfs")),
            doc="Memory file systems.",
        ),
        "ports": Key(
            shape=ListOf(item=_PORT, count_max=ITEMS_MAX),
            doc="[address:][host:]container[/protocol]; without a host port, any that is free.",
        ),
        "devices": Key(shape=_texts("devices"), doc="host[:container[:mode]]."),
        "privileged": Key(shape=Boolean(), doc="Give it everything."),
        "cap_add": Key(shape=_texts("cap_add"), doc="Capabilities to add."),
        "cap_drop": Key(shape=_texts("cap_drop"), doc="Capabilities to drop."),
        "security_opt": Key(shape=_texts("security_opt"), doc="Security options."),
        "shm_size": Key(shape=Size(), into="shm_size_bytes", doc="The size of /dev/shm."),
        "ulimits": Key(shape=_ULIMITS, doc="Limits of its resources; -1 is none."),
        "extra_hosts": Key(
            shape=Pairs(key=_HOST, separators=":="), doc="Names and their addresses."
        ),
        "network_mode": Key(shape=_text("network_mode"), doc="The network mode."),
        "healthcheck": Key(shape=_HEALTHCHECK, doc="How to see that it is healthy."),
        "restart": Key(shape=_text("restart"), doc="no, always, on-failure[:n] or unless-stopped."),
        "stop_grace_period": Key(
            shape=Duration(zero=True),
            into="stop_grace_period_s",
            doc="How long after the stop signal it is killed; 5s.",
        ),
        "deploy": Key(shape=_DEPLOY, doc="What it may use, and what is kept for it."),
        "labels": Key(shape=Pairs(key=_LABEL), doc="Labels: a mapping, or NAME=value."),
        "init": Key(shape=Boolean(), doc="Whether a small init process is its first; true."),
        "stop_signal": Key(shape=_text("stop_signal"), doc="The signal that asks it to stop."),
        "pull_policy": Key(shape=_text("pull_policy"), doc="always, missing or never."),
        "read_only": Key(shape=Boolean(), doc="Whether its root file system can be written."),
    },
    build=_container,
)

_RETRIES: Final[Record[Retries]] = Record(
    what="retries",
    keys={
        "max": Key(shape=Integer(least=0, most=RETRIES_MAX), doc="How often.", required=True),
        "backoff": Key(
            shape=Duration(zero=True),
            into="backoff_s",
            doc="The wait before the first; doubled each time; 5s.",
        ),
    },
    build=_into(Retries),
)

_STEP: Final[Record[StepSpec]] = Record(
    what="a step",
    keys={
        "name": Key(
            shape=Text(form=Form("a step's name", r"[a-z0-9][a-z0-9_-]{0,62}", "fetch")),
            doc="Its name, one of its kind in the file.",
            required=True,
        ),
        "type": Key(
            shape=Choice(StepType),
            doc="task (default): done when it ends. service: done when it runs, and lives on.",
        ),
        "when": Key(
            shape=Choice(Condition),
            into="condition",
            doc="success (default), failure or always: how the steps before it ended.",
        ),
        "timeout": Key(shape=Duration(), into="timeout_s", doc="How long one try may take."),
        "retries": Key(shape=_RETRIES, doc="What happens when it fails."),
        "container": Key(shape=_CONTAINER, doc="What it runs.", required=True),
    },
    build=_into(StepSpec),
)


def _arg(values: dict[str, Any], complain: Complain) -> ArgSpec | None:
    arg = ArgSpec(**values)
    if arg.pattern and arg.type not in {ArgType.STRING, ArgType.SECRET}:
        complain("is only for strings and secrets", "remove it, or the type", "pattern")
    elif arg.default is not None and arg.type is ArgType.SECRET:
        complain("would show a secret to whoever reads the file", "remove it", "default")
    elif arg.pattern and (reason := _pattern_problem(arg.pattern)):
        complain(reason, "simple patterns only: no look-around, no references", "pattern")
    elif arg.choices and arg.type is not ArgType.CHOICE:
        complain("are only for the type choice", "add type: choice", "choices")
    elif not arg.choices and arg.type is ArgType.CHOICE:
        complain("is missing", "add choices: [ … ]", "choices")
    elif arg.default is not None and (problem := value_problem(arg, arg.default)):
        complain(*problem, "default")
    else:
        return arg
    return None


def _pattern_problem(text: str) -> str | None:
    try:
        read_pattern(text)
    except ValueError as error:
        return str(error)
    return None


def name_of(node: Node) -> str | None:
    """Return the name of a step, an arg or an env: a mapping with a name, or the name alone."""
    if isinstance(node, MapNode) and "name" in node.entries:
        node = node.entries["name"][1]
    return node.text if isinstance(node, ScalarNode) else None


_DESCRIPTION: Final = Text(length_max=DESCRIPTION_LENGTH_MAX)

_ARG: Final[ByKind[ArgSpec]] = ByKind(
    scalar=Mapped(Text(form=_NAME), lambda name: ArgSpec(name=name)),
    mapping=Record(
        what="an arg",
        keys={
            "name": Key(shape=Text(form=_NAME), doc="Its name.", required=True),
            "type": Key(
                shape=Choice(ArgType),
                doc="string (default), integer, boolean, choice or secret.",
            ),
            "default": Key(
                shape=Text(), doc="Its value where none is given; without one it is required."
            ),
            "description": Key(shape=_DESCRIPTION, doc="What it is for."),
            "pattern": Key(
                shape=Text(length_min=1, length_max=PATTERN_LENGTH_MAX),
                doc="What the whole of a string or a secret must match.",
            ),
            "choices": Key(
                shape=ListOf(item=Text(), count_min=1, count_max=ITEMS_MAX, unique=name_of),
                doc="What a choice can be.",
            ),
        },
        build=_arg,
    ),
)


def _placement(values: dict[str, Any], complain: Complain) -> Placement | None:
    placement = Placement(**values)
    try:
        parse_selector(placement.selector)
    except GameNodeError as error:
        wrong = error.violations[0]
        complain(wrong.reason, wrong.advice, "selector")
        return None
    return placement


_GPU: Final[Record[GpuDemand]] = Record(
    what="a GPU",
    keys={
        "slots": Key(shape=Integer(least=1, most=GPU_SLOTS_MAX), doc="Slots of it; 1."),
        "memory": Key(shape=Size(), into="memory_bytes", doc="Its video memory."),
    },
    build=_into(GpuDemand),
)

_PLACEMENT: Final[Record[Placement]] = Record(
    what="a placement",
    keys={
        "cpu": Key(shape=PositiveNumber(), into="cpus", doc="Processors, such as 2 or 0.5."),
        "memory": Key(shape=Size(), into="memory_bytes", doc="Memory."),
        "gpu": Key(shape=_GPU, doc="A part of one GPU."),
        "node": Key(
            shape=Text(
                form=Form("a node's id", r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?", "fra-07")
            ),
            doc="The one node.",
        ),
        "selector": Key(
            shape=Text(length_min=1), doc="Which nodes, such as zone=a,gpu.model~4090,!broken."
        ),
    },
    build=_placement,
)

_CONCURRENCY: Final[Record[Group]] = Record(
    what="concurrency",
    keys={
        "group": Key(
            shape=Text(form=Form("a group", r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", "deploy-a")),
            into="name",
            doc="Its name; every file that says it is in it.",
            required=True,
        ),
        "limit": Key(
            shape=Integer(least=1, most=_INT32_MAX),
            doc="How many of the group may run while this one does.",
            required=True,
        ),
    },
    build=_into(Group),
)


def _printable(text: str) -> bool:
    return text.isprintable() and bool(text.strip())


PIPELINE: Final[Record[PipelineSpec]] = Record(
    what="a pipeline",
    keys={
        "name": Key(
            shape=Text(
                form=Form(
                    "a name of 1 to 128 printable characters",
                    r"[^\x00-\x1f\x7f]{1,128}",
                    "start-game",
                    _printable,
                )
            ),
            doc="Its name.",
            required=True,
        ),
        "description": Key(shape=_DESCRIPTION, doc="What it does."),
        "args": Key(
            shape=ListOf(item=_ARG, count_max=ITEMS_MAX, unique=name_of),
            doc="What the caller fills in, as ${{ args.NAME }}. A name alone is a required string.",
        ),
        "envs": Key(
            shape=ListOf(item=Text(form=_NAME), count_max=ITEMS_MAX, unique=name_of),
            doc="What the node fills in, as ${{ envs.NAME }}.",
        ),
        "timeout": Key(shape=Duration(), into="timeout_s", doc="How long the whole may take."),
        "on_lost": Key(
            shape=Choice(OnLost),
            doc="What becomes of it when its node disappears: wait for the node, fail after a "
            "time, or restart elsewhere once it is known to have ended there.",
        ),
        "placement": Key(shape=_PLACEMENT, doc="Where it may run, and what is kept for it there."),
        "concurrency": Key(
            shape=_CONCURRENCY, doc="How many pipelines of a group run at once, on all nodes."
        ),
        "steps": Key(
            shape=ListOf(item=_STEP, count_min=1, count_max=STEPS_MAX, unique=name_of),
            doc="What it does, one after the other.",
            required=True,
        ),
    },
    build=_into(PipelineSpec),
)
"""The table. Templates are checked against `args` and `envs` by who reads with it."""
