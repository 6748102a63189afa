"""What a part of a YAML file may look like, said once: to read it, and as JSON Schema."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, Final, Generic, Protocol, TypeVar

from gamenode.domain.container import Form, shown
from gamenode.domain.errors import GameNodeError
from gamenode.domain.quantity import DURATION_PATTERN, SIZE_PATTERN, parse_duration, parse_size
from gamenode.domain.template import OPENING, Mistake, Template, find
from gamenode.wire.yaml_document import ListNode, MapNode, Mark, Node, Problems, ScalarNode

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
E = TypeVar("E", bound=StrEnum)

JsonSchema = dict[str, object]

COMMAND_LENGTH_MAX: Final = 16_384
"""A command written as one text is split word by word, in time that grows with it."""

_NAME_LENGTH_MAX: Final = 64
_INTEGER: Final = re.compile(r"0|-?[1-9][0-9]{0,18}", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)
_KINDS: Final = {ScalarNode: "a text", ListNode: "a list", MapNode: "a mapping"}


@dataclass(frozen=True, slots=True)
class Use:
    """A template that a text holds, and where."""

    template: Template
    field: str
    mark: Mark


@dataclass(slots=True)
class Reading:
    """What is found while a file is read."""

    problems: Problems
    uses: list[Use] = field(default_factory=list)


class Shape(Protocol[T_co]):
    """One kind of value."""

    def read(self, node: Node, at: str, reading: Reading) -> T_co | None:
        """Return the value of `node`; None, with every problem noted, if it does not fit."""

    def json_schema(self) -> JsonSchema:
        """Return the schema of what `read` takes. It may take more, never less."""


def scalar_text(node: Node, at: str, reading: Reading, what: str) -> str | None:
    """Return the text of a scalar that shall be `what`; None, with a problem, if it is none."""
    if not isinstance(node, ScalarNode):
        reading.problems.add(at, node.mark, f"must be {what}, not {_KINDS[type(node)]}")
        return None
    if node.absent:
        reading.problems.add(at, node.mark, "has no value", f"write {what}")
        return None
    return node.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Shape[str]):
    """A text: whatever stands there, quoted or not; `8080` and `no` are texts too."""

    form: Form | None = None
    length_max: int | None = None
    length_min: int = 0
    templates: bool = False
    """Whether templates may stand in it; then the form is only checked without them."""
    normal: Callable[[str], str] = str
    """Writes it out in the form that is checked."""

    def read(self, node: Node, at: str, reading: Reading) -> str | None:
        """See `Shape`."""
        text = scalar_text(node, at, reading, self.form.what if self.form else "a text")
        if text is None:
            return None
        problem: tuple[str, str] | None = None
        if self.length_max is not None and len(text) > self.length_max:
            problem = f"is longer than {self.length_max} characters", ""
        elif len(text) < self.length_min:
            problem = "is empty", ""
        elif OPENING in text:
            if not self.templates:
                problem = "cannot hold a template", "write the value itself"
            elif not _note_templates(text, at, node.mark, reading):
                return None
        elif self.form and not self.form.fits(self.normal(text)):
            problem = self.form.refusal(text)
        if problem:
            reading.problems.add(at, node.mark, *problem)
            return None
        return self.normal(text)

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        schema: JsonSchema = {"type": ["string", "number", "boolean"]}
        if self.form and self.normal is str:
            template = r"|\$\{\{" if self.templates else ""
            schema |= {"pattern": f"^(?:{self.form.pattern})$" + template}
        if self.form:
            schema |= {"examples": [self.form.example]}
        if self.length_max is not None:
            schema |= {"maxLength": self.length_max}
        if self.length_min:
            schema |= {"minLength": self.length_min}
        return schema


def _note_templates(text: str, at: str, mark: Mark, reading: Reading) -> bool:
    right = True
    for found in find(text):
        if isinstance(found, Mistake):
            reading.problems.add(at, mark, found.reason, found.advice)
            right = False
        else:
            reading.uses.append(Use(found, at, mark))
    return right


@dataclass(frozen=True, slots=True)
class Choice(Shape[E]):
    """One of an enum's values."""

    values: type[E]
    later: Sequence[str] = ()
    """Values that a later version will know."""

    def read(self, node: Node, at: str, reading: Reading) -> E | None:
        """See `Shape`."""
        known = [str(value) for value in self.values]
        what = f"one of {', '.join(known)}"
        text = scalar_text(node, at, reading, what)
        if text is None:
            return None
        if text in known:
            return self.values(text)
        reason = "is not supported yet" if text in self.later else f"is not {what}"
        reading.problems.add(
            at, node.mark, f"{shown(text)} {reason}", nearest(text, known, reading)
        )
        return None

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        return {"enum": [str(value) for value in self.values]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Integer(Shape[int]):
    """A whole number, not in quotes."""

    least: int
    most: int

    def read(self, node: Node, at: str, reading: Reading) -> int | None:
        """See `Shape`."""
        what = f"a whole number from {self.least} to {self.most}"
        text = scalar_text(node, at, reading, what)
        if text is None:
            return None
        assert isinstance(node, ScalarNode)
        if not _INTEGER.fullmatch(text) or not self.least <= int(text) <= self.most:
            reading.problems.add(at, node.mark, f"{shown(text)} is not {what}")
        elif not node.plain:
            reading.problems.add(at, node.mark, f"must be {what}, not a text", "remove the quotes")
        else:
            return int(text)
        return None

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        return {"type": "integer", "minimum": self.least, "maximum": self.most}


@dataclass(frozen=True, slots=True)
class PositiveNumber(Shape[float]):
    """A number above zero; in quotes too, as the Compose specification writes `cpus`."""

    def read(self, node: Node, at: str, reading: Reading) -> float | None:
        """See `Shape`."""
        text = scalar_text(node, at, reading, "a number")
        if text is None:
            return None
        if not _NUMBER.fullmatch(text) or not float(text):
            reading.problems.add(at, node.mark, f"{shown(text)} is not a number above 0")
            return None
        return float(text)

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        return {
            "type": ["number", "string"],
            "exclusiveMinimum": 0,
            "pattern": f"^{_NUMBER.pattern}$",
        }


@dataclass(frozen=True, slots=True)
class Boolean(Shape[bool]):
    """`true` or `false`."""

    def read(self, node: Node, at: str, reading: Reading) -> bool | None:
        """See `Shape`."""
        text = scalar_text(node, at, reading, "true or false")
        if text is None:
            return None
        assert isinstance(node, ScalarNode)
        if not node.plain or text not in {"true", "false"}:
            reading.problems.add(at, node.mark, f"{shown(text)} is not true or false")
            return None
        return text == "true"

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration(Shape[float]):
    """A duration; its value is in seconds."""

    zero: bool = False
    """Whether none at all is a duration here."""

    def read(self, node: Node, at: str, reading: Reading) -> float | None:
        """See `Shape`."""
        text = scalar_text(node, at, reading, "a duration such as 90s")
        if text is None:
            return None
        duration_s = _parsed(parse_duration, text, at, node, reading)
        if duration_s == 0 and not self.zero:
            reading.problems.add(at, node.mark, "must be longer than 0s")
            return None
        return duration_s

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        return {"type": "string", "pattern": DURATION_PATTERN, "examples": ["90s", "1h30m"]}


@dataclass(frozen=True, slots=True)
class Size(Shape[int]):
    """A size above zero; its value is in bytes."""

    def read(self, node: Node, at: str, reading: Reading) -> int | None:
        """See `Shape`."""
        text = scalar_text(node, at, reading, "a size such as 512m")
        if text is None:
            return None
        size_bytes = _parsed(parse_size, text, at, node, reading)
        if size_bytes == 0:
            reading.problems.add(at, node.mark, "must be larger than 0")
            return None
        return size_bytes

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        return {"type": ["string", "integer"], "pattern": SIZE_PATTERN, "examples": ["512m", "2g"]}


class _Parse(Protocol[T_co]):
    def __call__(self, text: str, *, field: str) -> T_co: ...


def _parsed(parse: _Parse[T], text: str, at: str, node: Node, reading: Reading) -> T | None:
    try:
        return parse(text, field=at)
    except GameNodeError as error:
        advice = "write the value itself: no template can stand here" if OPENING in text else ""
        for wrong in error.violations:
            reading.problems.add(at, node.mark, wrong.reason, advice or wrong.advice)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOf(Shape[tuple[T, ...]]):
    """A list."""

    item: Shape[T]
    count_min: int = 0
    count_max: int
    unique: Callable[[Node], str | None] | None = None
    """Returns what no two items may share."""

    def read(self, node: Node, at: str, reading: Reading) -> tuple[T, ...] | None:
        """See `Shape`."""
        if not isinstance(node, ListNode):
            what = "has no value" if _absent(node) else f"must be a list, not {_KINDS[type(node)]}"
            reading.problems.add(at, node.mark, what, "write a list: [ … ]")
            return None
        count = len(node.items)
        if not self.count_min <= count <= self.count_max:
            limits = f"{self.count_min} to {self.count_max}"
            reading.problems.add(at, node.mark, f"holds {count} items: {limits} are possible")
            return None
        right = self._check_unique(node, at, reading)
        items: list[T] = []
        for index, item in enumerate(node.items):
            value = self.item.read(item, f"{at}[{index}]", reading)
            if value is not None:
                items.append(value)
        return tuple(items) if right and len(items) == count else None

    def _check_unique(self, node: ListNode, at: str, reading: Reading) -> bool:
        if self.unique is None:
            return True
        seen: dict[str, Mark] = {}
        right = True
        for index, item in enumerate(node.items):
            shared = self.unique(item)
            if shared in seen:
                reason = f"{shown(shared)} stands here twice, first on line {seen[shared].line}"
                reading.problems.add(f"{at}[{index}]", item.mark, reason, "give it another name")
                right = False
            elif shared is not None:
                seen[shared] = item.mark
        return right

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        schema: JsonSchema = {"type": "array", "items": self.item.json_schema()}
        if self.count_min:
            schema |= {"minItems": self.count_min}
        return schema | {"maxItems": self.count_max}


@dataclass(frozen=True, slots=True, kw_only=True)
class MapOf(Shape[Mapping[str, T]]):
    """A mapping whose keys are names of the author's choice."""

    key: Form
    value: Shape[T]

    def read(self, node: Node, at: str, reading: Reading) -> Mapping[str, T] | None:
        """See `Shape`."""
        if not isinstance(node, MapNode):
            what = (
                "has no value" if _absent(node) else f"must be a mapping, not {_KINDS[type(node)]}"
            )
            reading.problems.add(at, node.mark, what)
            return None
        values: dict[str, T] = {}
        for key, (mark, child) in node.entries.items():
            here = f"{at}.{key[:_NAME_LENGTH_MAX]}"
            problem = self.key.problem(key)
            if problem:
                reading.problems.add(here, mark, *problem)
            value = self.value.read(child, here, reading)
            if value is not None and not problem:
                values[key] = value
        return values if len(values) == len(node.entries) else None

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^(?:{self.key.pattern})$"},
            "additionalProperties": self.value.json_schema(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs(Shape[Mapping[str, str]]):
    """A mapping, also written as a list of `NAME=value`."""

    key: Form
    separators: str = "="
    value: Text = field(default_factory=lambda: Text(templates=True))

    def read(self, node: Node, at: str, reading: Reading) -> Mapping[str, str] | None:
        """See `Shape`."""
        if not isinstance(node, ListNode):
            return MapOf(key=self.key, value=self.value).read(node, at, reading)
        values: dict[str, str] = {}
        for index, item in enumerate(node.items):
            here = f"{at}[{index}]"
            text = scalar_text(item, here, reading, f"NAME{self.separators[0]}value")
            if text is None:
                continue
            name, separator, rest = self._split(text)
            if not separator:
                advice = f"write NAME{self.separators[0]}value"
                reading.problems.add(here, item.mark, f"{shown(text)} has no value", advice)
            elif problem := self.key.problem(name):
                reading.problems.add(here, item.mark, *problem)
            elif name in values:
                reading.problems.add(here, item.mark, f"{shown(name)} stands here twice")
            elif (
                self.value.read(ScalarNode(item.mark, rest, plain=False), here, reading) is not None
            ):
                values[name] = rest
        return values if len(values) == len(node.items) else None

    def _split(self, text: str) -> tuple[str, str, str]:
        found = [at for at in (text.find(separator) for separator in self.separators) if at >= 0]
        at = min(found, default=len(text))
        return text[:at], text[at : at + 1], text[at + 1 :]

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        item = {"type": "string", "pattern": f"[{self.separators}]"}
        mapping = MapOf(key=self.key, value=self.value).json_schema()
        return {"anyOf": [mapping, {"type": "array", "items": item}]}


@dataclass(frozen=True, slots=True)
class Words(Shape[tuple[str, ...]]):
    """The words of a command: a list, or one text that is split as a shell would, quotes obeyed."""

    words: ListOf[str]

    def read(self, node: Node, at: str, reading: Reading) -> tuple[str, ...] | None:
        """See `Shape`."""
        if not isinstance(node, ScalarNode):
            return self.words.read(node, at, reading)
        line = Text(templates=True, length_max=COMMAND_LENGTH_MAX).read(node, at, reading)
        if line is None:
            return None
        try:
            return split_words(line)
        except ValueError as error:
            reason = f"cannot be split into words: {str(error).lower()}"
            reading.problems.add(at, node.mark, reason, 'write a list: ["word", "word"]')
            return None

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        return {"anyOf": [Text().json_schema(), self.words.json_schema()]}


def split_words(line: str) -> tuple[str, ...]:
    """Return the words of `line`; a template stays whole, whatever blanks it holds.

    Raises:
        ValueError: a quote is not closed.
    """
    templates = [found for found in find(line) if isinstance(found, Template)]
    parts: list[str] = []
    end = 0
    for template in templates:
        # One character that shlex takes for part of a word; it cannot be in a YAML text.
        parts += line[end : template.start], _PLACE
        end = template.end
    texts = iter(line[t.start : t.end] for t in templates)
    words = shlex.split("".join([*parts, line[end:]]))
    return tuple(re.sub(_PLACE, lambda _: next(texts), word) for word in words)


_PLACE: Final = "\x00"


@dataclass(frozen=True, slots=True, kw_only=True)
class ByKind(Shape[T]):
    """One of several shapes, by whether a scalar, a list or a mapping stands there."""

    scalar: Shape[T] | None = None
    items: Shape[T] | None = None
    mapping: Shape[T] | None = None

    def read(self, node: Node, at: str, reading: Reading) -> T | None:
        """See `Shape`."""
        by_kind = {ScalarNode: self.scalar, ListNode: self.items, MapNode: self.mapping}
        shape = by_kind[type(node)]
        if shape is None:
            possible = " or ".join(_KINDS[kind] for kind, one in by_kind.items() if one)
            reason = f"must be {possible}, not {_KINDS[type(node)]}"
            reading.problems.add(at, node.mark, reason)
            return None
        return shape.read(node, at, reading)

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        shapes = (self.scalar, self.items, self.mapping)
        return {"anyOf": [shape.json_schema() for shape in shapes if shape]}


@dataclass(frozen=True, slots=True)
class Mapped(Shape[T]):
    """Another shape, whose value becomes something else."""

    shape: Shape[Any]
    change: Callable[[Any], T]

    def read(self, node: Node, at: str, reading: Reading) -> T | None:
        """See `Shape`."""
        value = self.shape.read(node, at, reading)
        return None if value is None else self.change(value)

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        return self.shape.json_schema()


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a record."""

    shape: Shape[object]
    doc: str
    into: str = ""
    """The name of its value for the record's `build`; the key itself where empty."""
    required: bool = False


class Complain(Protocol):
    """Notes a problem at a place below a record: keys and indexes from there."""

    def __call__(self, reason: str, advice: str, *path: str | int) -> None:
        """Note it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(Shape[T], Generic[T]):
    """A mapping with known keys."""

    what: str
    keys: Mapping[str, Key]
    build: Callable[[dict[str, Any], Complain], T | None]
    """Makes the value of those keys that are there; None, after a complaint, if it cannot."""
    later: Sequence[str] = ()
    """Keys that a later version will know."""

    def read(self, node: Node, at: str, reading: Reading) -> T | None:
        """See `Shape`."""
        if not isinstance(node, MapNode):
            what = (
                "has no value" if _absent(node) else f"must be a mapping, not {_KINDS[type(node)]}"
            )
            reading.problems.add(at, node.mark, what, f"write {self.what}")
            return None
        prefix = f"{at}." if at else ""
        right = self._check_keys(node, prefix, reading)
        values: dict[str, Any] = {}
        for name, key in self.keys.items():
            if name not in node.entries:
                continue
            value = key.shape.read(node.entries[name][1], prefix + name, reading)
            if value is None:
                right = False
            else:
                values[key.into or name] = value

        def complain(reason: str, advice: str, *path: str | int) -> None:
            reading.problems.add(*_place(node, at, path), reason, advice)

        return self.build(values, complain) if right else None

    def _check_keys(self, node: MapNode, prefix: str, reading: Reading) -> bool:
        right = True
        for name, (mark, _) in node.entries.items():
            if name in self.keys:
                continue
            right = False
            here = prefix + name[:_NAME_LENGTH_MAX]
            if name in self.later:
                reading.problems.add(here, mark, "is not supported yet", "leave it out")
            else:
                advice = nearest(name, self.keys, reading)
                reading.problems.add(here, mark, f"is not a key of {self.what}", advice)
        for name, key in self.keys.items():
            if key.required and name not in node.entries:
                reading.problems.add(prefix + name, node.mark, "is missing", f"add {name}:")
                right = False
        return right

    def json_schema(self) -> JsonSchema:
        """See `Shape`."""
        properties = {
            name: {"description": key.doc} | key.shape.json_schema()
            for name, key in self.keys.items()
        }
        schema: JsonSchema = {"type": "object", "properties": properties}
        if required := [name for name, key in self.keys.items() if key.required]:
            schema |= {"required": required}
        return schema | {"additionalProperties": False}


def nearest(text: str, known: Mapping[str, object] | Sequence[str], reading: Reading) -> str:
    """Return advice that names what of `known` the author may have meant."""
    # Looking is slow: not for texts that resemble no name, nor once nobody will read it.
    if reading.problems.full or len(text) > _NAME_LENGTH_MAX:
        return ""
    near = get_close_matches(text.lower(), list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def _absent(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.absent


def _place(node: Node, at: str, path: Sequence[str | int]) -> tuple[str, Mark]:
    mark = node.mark
    for step in path:
        if isinstance(step, int):
            at += f"[{step}]"
            if isinstance(node, ListNode) and step < len(node.items):
                node = node.items[step]
                mark = node.mark
        else:
            at += f".{step}" if at else step
            if isinstance(node, MapNode) and step in node.entries:
                mark, node = node.entries[step]
    return at, mark
