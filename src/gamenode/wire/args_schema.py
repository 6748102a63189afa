"""The args of a pipeline file as JSON Schema: for the CLI, forms, and whoever calls the API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from gamenode.domain.args import INTEGER_MAX
from gamenode.domain.pipeline import ArgSpec, ArgType
from gamenode.wire.shapes import JsonSchema

_TYPES: Final[dict[ArgType, JsonSchema]] = {
    ArgType.STRING: {"type": "string"},
    ArgType.INTEGER: {"type": "integer", "minimum": -INTEGER_MAX, "maximum": INTEGER_MAX},
    ArgType.BOOLEAN: {"type": "boolean"},
    ArgType.CHOICE: {"type": "string"},
    ArgType.SECRET: {"type": "string", "minLength": 1, "writeOnly": True},
}


def args_json_schema(args: Iterable[ArgSpec]) -> JsonSchema:
    """Return the JSON Schema (draft 2020-12) of the object that gives `args` their values.

    It refuses nothing that the server takes, but for texts that write a number or a truth value:
    a form gives those as what they are. A secret is `writeOnly`: it is never shown again.

    Source: F11.
    """
    declared = tuple(args)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {arg.name: _property(arg) for arg in declared},
        "required": [arg.name for arg in declared if arg.default is None],
        "additionalProperties": False,
    }


def _property(arg: ArgSpec) -> JsonSchema:
    schema = dict(_TYPES[arg.type])
    if arg.description:
        schema["description"] = arg.description
    if arg.pattern:
        schema["pattern"] = f"^(?:{arg.pattern})$"
    if arg.choices:
        schema["enum"] = list(arg.choices)
    if arg.default is not None:
        schema["default"] = _value(arg.type, arg.default)
    return schema


def _value(kind: ArgType, text: str) -> str | int | bool:
    match kind:
        case ArgType.INTEGER:
            return int(text)
        case ArgType.BOOLEAN:
            return text == "true"
        case ArgType.STRING | ArgType.CHOICE | ArgType.SECRET:
            return text
