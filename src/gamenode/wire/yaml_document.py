"""YAML text as a tree that remembers lines and columns, and cannot be larger than it looks.

The tree is built from the parser's events: scalars stay the text that was written, aliases share
their node, and the bounds count what a reader would walk through, so neither depth nor a chain of
aliases costs more than refusing it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import islice
from typing import Final

import yaml

from gamenode.domain.errors import ErrorCode, GameNodeError, Violation

TEXT_LENGTH_MAX: Final = 262_144
"""Of the text, and of all its values once aliases are expanded."""
NODES_MAX: Final = 10_000
DEPTH_MAX: Final = 32
VIOLATIONS_MAX: Final = 100
WHOLE_FILE: Final = "file"
"""The field of what concerns no part of the file alone."""

_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_TEXT_TAGS: Final = frozenset({"!", "tag:yaml.org,2002:str"})
_KEY_SHOWN_MAX: Final = 64
_NOT_YAML: Final = re.compile("[^\t\n\r -~\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NOT_TEXT: Final = re.compile("[\0\ud800-\udfff]")
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the text; lines and columns count from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class ScalarNode:
    """A text, and whether it stood without quotes."""

    mark: Mark
    text: str
    plain: bool

    @property
    def absent(self) -> bool:
        """Whether this is YAML's way to write nothing."""
        return self.plain and self.text in _NULLS


@dataclass(frozen=True, slots=True)
class ListNode:
    """A list."""

    mark: Mark
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class MapNode:
    """A mapping; merge keys are resolved."""

    mark: Mark
    entries: Mapping[str, tuple[Mark, Node]]
    """Each key's place and value."""


Node = ScalarNode | ListNode | MapNode


class Problems:
    """Collects what is wrong, up to a bound."""

    def __init__(self) -> None:
        """Begin with none."""
        self.violations: list[Violation] = []
        self._unnamed = 0

    @property
    def full(self) -> bool:
        """Whether further ones are only counted."""
        return len(self.violations) >= VIOLATIONS_MAX

    def add(self, field: str, mark: Mark | None, reason: str, advice: str = "") -> None:
        """Note one."""
        if self.full:
            self._unnamed += 1
            return
        line, column = (mark.line, mark.column) if mark else (None, None)
        self.violations.append(
            Violation(
                field=field or WHOLE_FILE, reason=reason, advice=advice, line=line, column=column
            )
        )

    def error(self, file: str) -> GameNodeError:
        """Return the refusal that carries them all, in the order of the text."""
        found = sorted(self.violations, key=lambda v: (v.line or 0, v.column or 0))
        first = found[0]
        place = f"{file}:{first.line}:{first.column}" if first.line else file
        more = len(found) - 1 + self._unnamed
        return GameNodeError(
            ErrorCode.INVALID_REQUEST,
            f"{place}: {first.field} {first.reason}{f' (and {more} more)' if more else ''}",
            violations=found,
            hint=first.advice,
        )


class _RefusedError(Exception):
    """Nothing can be read any further."""

    def __init__(self, field: str, mark: Mark | None, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.field, self.mark, self.reason, self.advice = field, mark, reason, advice


def decode_text(text: str | bytes, problems: Problems) -> str | None:
    """Return `text` as Unicode without a byte order mark; None, with a problem noted, if it is not.

    Any character that YAML does not allow is named here, with its place.
    """
    if len(text) > TEXT_LENGTH_MAX:
        problems.add("", None, f"is longer than {TEXT_LENGTH_MAX} bytes")
        return None
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode()
            mark = _mark_at(before, len(before))
            problems.add("", mark, "is not valid UTF-8", "save the file as UTF-8")
            return None
    if wrong := _NOT_YAML.search(text):
        mark = _mark_at(text, wrong.start())
        problems.add("", mark, f"holds the character U+{ord(wrong[0]):04X}", "remove it")
        return None
    return text.removeprefix("\ufeff")


def read_document(text: str, problems: Problems) -> Node | None:
    """Return the one document of `text`; None, with a problem noted, where there is none.

    Duplicate keys, tags and merges that cannot be are noted, and reading goes on.
    """
    builder = _Builder(problems)
    try:
        for event in yaml.parse(text, _LOADER):
            builder.take(event)
    except _RefusedError as refused:
        problems.add(refused.field, refused.mark, refused.reason, refused.advice)
        return None
    except yaml.YAMLError as error:
        problems.add("", *_syntax_problem(text, error))
        return None
    if builder.root is None:
        problems.add("", None, "is empty", "begin with name: and steps:")
    return builder.root


@dataclass(slots=True)
class _Collection:
    """A list or mapping that is still open."""

    mark: Mark
    anchor: str | None
    field: str
    is_map: bool
    nodes_before: int
    characters_before: int
    items: list[Node] = dataclass_field(default_factory=list)
    entries: dict[str, tuple[Mark, Node]] = dataclass_field(default_factory=dict)
    merged: list[tuple[Mark, Node]] = dataclass_field(default_factory=list)
    key: ScalarNode | None = None
    height: int = 1

    def child_field(self) -> str:
        """Return the path of what comes next."""
        if not self.is_map:
            return f"{self.field}[{len(self.items)}]"
        key = self.key.text[:_KEY_SHOWN_MAX] if self.key else ""
        return f"{self.field}.{key}" if self.field else key


@dataclass(frozen=True, slots=True)
class _Anchored:
    """A node that aliases stand for, and what each of them costs."""

    node: Node
    nodes: int
    characters: int
    height: int


class _Builder:
    """Builds the tree from events, and counts."""

    def __init__(self, problems: Problems) -> None:
        self.root: Node | None = None
        self._problems = problems
        self._open: list[_Collection] = []
        self._anchors: dict[str, _Anchored | None] = {}
        self._nodes = 0
        self._characters = 0

    def take(self, event: yaml.Event) -> None:
        """Take the parser's next event."""
        match event:
            case yaml.ScalarEvent():
                self._scalar(event)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self._begin(event)
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                self._end()
            case yaml.AliasEvent():
                self._alias(event)
            case yaml.DocumentStartEvent() if self.root is not None:
                reason = "holds a second document"
                raise _RefusedError("", _start(event), reason, "remove what follows ---")
            case _:
                pass

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        mark = _start(event)
        self._count(mark, nodes=1, characters=len(event.value), height=0)
        text = _NOT_TEXT.sub("", event.value)
        if text != event.value:
            self._problems.add(self._field(), mark, "holds a NUL or half a character")
        node = ScalarNode(mark, text, plain=not event.style and event.tag is None)
        self._check_tag(event.tag, mark)
        if event.anchor:
            self._anchors[event.anchor] = _Anchored(node, 1, len(event.value), 0)
        self._place(node, height=0)

    def _begin(self, event: yaml.CollectionStartEvent) -> None:
        mark = _start(event)
        opened = _Collection(
            mark=mark,
            anchor=event.anchor,
            field=self._field(),
            is_map=isinstance(event, yaml.MappingStartEvent),
            nodes_before=self._nodes,
            characters_before=self._characters,
        )
        self._count(mark, nodes=1, characters=0, height=1)
        self._check_tag(event.tag, mark)
        parent = self._open[-1] if self._open else None
        if parent and parent.is_map and not parent.key:
            raise _RefusedError(parent.field, mark, "a key must be a text")
        if event.anchor:
            self._anchors[event.anchor] = None
        self._open.append(opened)

    def _end(self) -> None:
        closed = self._open.pop()
        node: Node
        if closed.is_map:
            self._merge(closed)
            node = MapNode(closed.mark, closed.entries)
        else:
            node = ListNode(closed.mark, tuple(closed.items))
        if closed.anchor:
            self._anchors[closed.anchor] = _Anchored(
                node,
                self._nodes - closed.nodes_before,
                self._characters - closed.characters_before,
                closed.height,
            )
        self._place(node, height=closed.height)

    def _alias(self, event: yaml.AliasEvent) -> None:
        mark = _start(event)
        name = f"*{event.anchor}"
        if event.anchor not in self._anchors:
            raise _RefusedError(self._field(), mark, f"{name} has no anchor before it")
        anchored = self._anchors[event.anchor]
        if anchored is None:
            raise _RefusedError(self._field(), mark, f"{name} holds itself")
        self._count(
            mark, nodes=anchored.nodes, characters=anchored.characters, height=anchored.height
        )
        self._place(anchored.node, height=anchored.height)

    def _place(self, node: Node, *, height: int) -> None:
        if not self._open:
            self.root = node
            return
        parent = self._open[-1]
        parent.height = max(parent.height, height + 1)
        if not parent.is_map:
            parent.items.append(node)
        elif parent.key is None:
            if not isinstance(node, ScalarNode):
                raise _RefusedError(parent.field, node.mark, "a key must be a text")
            parent.key = node
        else:
            self._set(parent, parent.key, node)
            parent.key = None

    def _set(self, parent: _Collection, key: ScalarNode, node: Node) -> None:
        if key.text == "<<" and key.plain:
            parent.merged.append((key.mark, node))
        elif key.text in parent.entries:
            line = parent.entries[key.text][0].line
            reason = f"stands here twice, first on line {line}"
            self._problems.add(parent.child_field(), key.mark, reason, "remove one of them")
        else:
            parent.entries[key.text] = (key.mark, node)

    def _merge(self, closed: _Collection) -> None:
        # What is written out wins over what is merged, and the first merged over the next.
        for mark, node in closed.merged:
            for source in node.items if isinstance(node, ListNode) else (node,):
                if not isinstance(source, MapNode):
                    self._problems.add(closed.field, mark, "<< takes a mapping or a list of them")
                    continue
                for key, entry in source.entries.items():
                    closed.entries.setdefault(key, entry)

    def _count(self, mark: Mark, *, nodes: int, characters: int, height: int) -> None:
        self._nodes += nodes
        self._characters += characters
        if self._nodes > NODES_MAX:
            raise _RefusedError("", mark, f"holds more than {NODES_MAX} values, aliases included")
        if self._characters > TEXT_LENGTH_MAX:
            reason = f"holds more than {TEXT_LENGTH_MAX} characters, aliases included"
            raise _RefusedError("", mark, reason)
        if len(self._open) + height > DEPTH_MAX:
            raise _RefusedError("", mark, f"is deeper than {DEPTH_MAX} levels")

    def _check_tag(self, tag: str | None, mark: Mark) -> None:
        if tag is not None and tag not in _TEXT_TAGS:
            shown = tag.replace("tag:yaml.org,2002:", "!!")[:_KEY_SHOWN_MAX]
            self._problems.add(self._field(), mark, f"has the tag {shown}", "remove the tag")

    def _field(self) -> str:
        return self._open[-1].child_field() if self._open else ""


def _syntax_problem(text: str, error: yaml.YAMLError) -> tuple[Mark | None, str, str]:
    if not isinstance(error, yaml.MarkedYAMLError):
        return None, f"is not YAML: {error}", ""
    at = error.problem_mark or error.context_mark
    reason = " ".join(part for part in (error.problem, error.context) if part)
    if at is None:
        return None, f"is not YAML: {reason}", ""
    line = next(islice(text.splitlines(), at.line, None), "")
    tab = line[: len(line) - len(line.lstrip())].find("\t") >= 0
    return (
        Mark(at.line + 1, at.column + 1),
        f"is not YAML: {reason}",
        "indent with spaces, not tabs" if tab else "",
    )


def _start(event: yaml.Event) -> Mark:
    at = event.start_mark
    assert at is not None  # only events made by hand lack it
    return Mark(at.line + 1, at.column + 1)


def _mark_at(text: str, position: int) -> Mark:
    before = text[:position]
    return Mark(before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1)
