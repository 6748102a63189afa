"""Dataclasses and protobuf messages that have the same fields, converted field by field."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from functools import cache
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

Record = TypeVar("Record")
_Plan = list[tuple[str, Callable[[Message], Any], Callable[[Any, Message], None]]]


def decode_record(record_type: type[Record], message: Message) -> Record:
    """Return the dataclass that `message` carries; what is unset gets the dataclass's default.

    A field of an `| None` type must be `optional` (or a message) on the wire: absent is None there.
    """
    return record_type(
        **{name: decode(message) for name, decode, _ in _plan(cast("Hashable", record_type))}
    )


def encode_record(record: object, message: Message) -> None:
    """Write the fields of a dataclass into `message`, leaving None unset."""
    for name, _, encode in _plan(cast("Hashable", type(record))):
        value = getattr(record, name)
        if value is not None:
            encode(value, message)


@cache
def _plan(record_type: Hashable) -> _Plan:
    hints = typing.get_type_hints(record_type)
    return [
        (field.name, *_converters(field.name, hints[field.name]))
        for field in dataclasses.fields(cast("type[Any]", record_type))
    ]


def _converters(
    name: str, hint: Any
) -> tuple[Callable[[Message], Any], Callable[[Any, Message], None]]:
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        inner = next(argument for argument in arguments if argument is not types.NoneType)
        decode, encode = _converters(name, inner)
        return (lambda m: decode(m) if m.HasField(name) else None), encode
    if origin is tuple:
        item = arguments[0]
        if dataclasses.is_dataclass(item):
            return _repeated_records(name, item)
        return (lambda m: tuple(getattr(m, name))), (lambda v, m: getattr(m, name).extend(v))
    if origin in (Mapping, dict):
        return (lambda m: dict(getattr(m, name))), (lambda v, m: getattr(m, name).update(v))
    if dataclasses.is_dataclass(hint):
        nested = cast("type[Any]", hint)
        return (
            lambda m: decode_record(nested, getattr(m, name)),
            lambda v, m: _encode_nested(v, getattr(m, name)),
        )
    return (lambda m: getattr(m, name)), (lambda v, m: setattr(m, name, v))


def _repeated_records(
    name: str, item: Any
) -> tuple[Callable[[Message], Any], Callable[[Any, Message], None]]:
    def decode(message: Message) -> Any:
        return tuple(decode_record(item, entry) for entry in getattr(message, name))

    def encode(records: Any, message: Message) -> None:
        entries = getattr(message, name)
        for record in records:
            encode_record(record, entries.add())

    return decode, encode


def _encode_nested(record: object, message: Message) -> None:
    message.SetInParent()  # present, even where every field has its default
    encode_record(record, message)
