"""What a request says, read and checked against the type that its operation declares."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from types import MappingProxyType
from typing import Annotated, Any, Final, Generic, TypeVar, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec
from starlette.requests import Request

from gamenode.domain.errors import ErrorCode, GameNodeError, Violation, invalid

QUERY_FIELDS_MAX: Final = 100
KEY_LENGTH_MAX: Final = 128
_NAME_LENGTH_MAX: Final = 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PathParameter:
    """A part of a path that names something."""

    pattern: re.Pattern[str]
    what: str
    description: str

    def check(self, name: str, value: str) -> None:
        """Check that `value` can be such a name at all.

        Raises:
            GameNodeError: INVALID_REQUEST.
        """
        if not self.pattern.fullmatch(value):
            raise invalid(name, f"is not {self.what}", advice=self.description)


PATH_PARAMETERS: Final[Mapping[str, PathParameter]] = MappingProxyType(
    {
        "node": PathParameter(
            re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?", re.ASCII),
            "a node's id",
            "small letters, digits, dots and dashes, as the list of nodes gives it",
        ),
        "pipeline": PathParameter(
            re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII),
            "a pipeline's id",
            "the whole id, as the list of pipelines gives it",
        ),
        "token": PathParameter(
            re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII),
            "a token's id",
            "the whole id, as the list of tokens gives it",
        ),
        "step": PathParameter(
            re.compile(r"[a-z0-9][a-z0-9_-]{0,62}", re.ASCII),
            "a step's name",
            "small letters, digits, dashes and underscores, as in the pipeline file",
        ),
    }
)
"""Every name that a path template may hold."""


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing can be asked for."""


class QueryReader(Generic[T]):
    """Reads a query string as one type, a struct of scalars and of lists of them."""

    def __init__(self, model: type[T]) -> None:
        """Read as `model`, whose every field has a default."""
        self.model = model
        self._empty = msgspec.convert({}, model)
        self._known = _Known(model)

    def read(self, query: str) -> T:
        """Return what `query` says. A parameter without a value counts as absent.

        Raises:
            GameNodeError: INVALID_REQUEST, naming the parameter.
        """
        if not query:
            return self._empty
        try:
            pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=QUERY_FIELDS_MAX)
        except ValueError as error:
            raise invalid("query", f"has more than {QUERY_FIELDS_MAX} parameters") from error
        values: dict[str, str | list[str]] = {}
        for name, value in pairs:
            self._add(values, name, value)
        try:
            return msgspec.convert(values, self.model, strict=False)
        except msgspec.ValidationError as error:
            violation = self._known.explain(error)
            # Whatever a query holds is text; that it was text is no news.
            reason = violation.reason.removesuffix(", not a string")
            raise invalid(violation.field, reason, advice=violation.advice) from error

    def _add(self, values: dict[str, str | list[str]], name: str, value: str) -> None:
        if name not in self._known.fields:
            advice = self._known.nearest(name)
            raise invalid(_shown(name), "is no parameter of this route", advice=advice)
        if "\0" in value:
            raise invalid(name, "has a NUL character in it")
        if not value:
            return
        if name in self._known.lists:
            found = values.setdefault(name, [])
            assert isinstance(found, list)
            found.append(value)
        elif name in values:
            raise invalid(name, "is given twice")
        else:
            values[name] = value


class BodyReader(Generic[T]):
    """Reads a request's body as one type: from JSON, and from a bare YAML file where that works."""

    def __init__(
        self,
        model: type[T],
        *,
        default: T | None = None,
        from_file: Callable[[str], T] | None = None,
    ) -> None:
        """Read as `model`.

        Args:
            model: The type of the JSON.
            default: What an empty body means; without it there must be one.
            from_file: Makes the same of the text of a YAML file.
        """
        self.model = model
        self.required = default is None
        self.takes_file = from_file is not None
        self._default = default
        self._from_file = from_file
        self._decode = msgspec.json.Decoder(model).decode
        self._known = _Known(model)

    async def read(self, request: Request, *, bytes_max: int) -> T:
        """Return what the body says. No more than `bytes_max` of it are ever kept.

        Raises:
            GameNodeError: INVALID_REQUEST, with the field, or the line and column.
        """
        body = await _read_bounded(request, bytes_max)
        if not body and self._default is not None:
            return self._default
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type == "application/json":
            return self._read_json(body)
        if self._from_file is not None and media_type == "application/yaml":
            try:
                return self._from_file(body.decode())
            except UnicodeDecodeError as error:
                raise _not_utf8(body, error) from error
        wanted = "application/json or application/yaml" if self._from_file else "application/json"
        raise invalid("content-type", f"must be {wanted}", advice="set the header Content-Type")

    def _read_json(self, body: bytes) -> T:
        if not body:
            raise invalid("body", "is missing", advice="send a JSON object")
        try:
            return self._decode(body)
        except msgspec.ValidationError as error:
            violation = self._known.explain(error)
            raise GameNodeError(
                ErrorCode.INVALID_REQUEST,
                f"{violation.field}: {violation.reason}",
                violations=[violation],
                hint=violation.advice,
            ) from error
        except msgspec.DecodeError as error:
            raise _not_json(body, error) from error
        except UnicodeDecodeError as error:
            raise _not_utf8(body, error) from error
        except RecursionError as error:
            raise invalid("body", "is nested too deep") from error


def read_idempotency_key(request: Request) -> str:
    """Return the request's Idempotency-Key; empty if it has none.

    Raises:
        GameNodeError: INVALID_REQUEST.
    """
    key = request.headers.get("idempotency-key", "")
    if len(key) > KEY_LENGTH_MAX or not (key.isascii() and key.isprintable()):
        raise invalid(
            "idempotency-key", f"must be at most {KEY_LENGTH_MAX} printable ASCII characters"
        )
    return key


class _Known:
    """The names and values that a struct knows, to say what was probably meant."""

    def __init__(self, model: type[Any]) -> None:
        types = {field.encode_name: field.type for field in msgspec.structs.fields(model)}
        self.fields = frozenset(types)
        self.lists = frozenset(name for name, type_ in types.items() if _is_list(type_))
        self._values = {name: _values_of(type_) for name, type_ in types.items()}

    def nearest(self, name: str) -> str:
        """Return advice that names the known field nearest to `name`."""
        if found := get_close_matches(name, self.fields, n=1):
            return f"did you mean {found[0]}?"
        return f"one of {', '.join(sorted(self.fields))}" if self.fields else ""

    def explain(self, error: msgspec.ValidationError) -> Violation:
        """Return what is wrong, where, in words of the interface."""
        message, _, place = str(error).partition(" - at `")
        path = place.rpartition("$")[2].rstrip("`").lstrip(".")
        if match := _UNKNOWN.fullmatch(message):
            advice = "" if path else self.nearest(match[1])
            return Violation(
                field=_join(path, _shown(match[1])), reason="is not known", advice=advice
            )
        if match := _MISSING.fullmatch(message):
            return Violation(field=_join(path, match[1]), reason="is missing")
        advice = ""
        if message.startswith("Invalid enum value"):
            advice = f"one of {', '.join(self._values.get(path.partition('[')[0], ()))}"
        if "matching regex" in message:
            message = "must not have a NUL character in it"
        reason = _expectation(message) or (message[:1].lower() + message[1:]).replace("`", "")
        return Violation(field=path or "body", reason=reason, advice=advice)


_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_TYPES: Final = MappingProxyType(
    {
        "str": "a string",
        "int": "an integer",
        "float": "a number",
        "bool": "true or false",
        "null": "null",
        "object": "an object",
        "array": "an array",
    }
)
_EXPECTED: Final = re.compile(
    r"Expected `(?P<types>[^`]*)`(?:(?P<length> of length)? (?P<sign>[<>]=?) (?P<bound>[0-9.e+-]+)"
    r"|, got `(?P<got>[^`]*)`)?"
)
_SIGNS: Final = MappingProxyType(
    {">": "more than", ">=": "at least", "<": "less than", "<=": "at most"}
)
_MALFORMED: Final = "JSON is malformed: "
_TRUNCATED: Final = "Input data was truncated"
_BYTE: Final = re.compile(r"(.*) \(byte (\d+)\)")


def _expectation(message: str) -> str:
    """Return what the decoder expected in words of the interface; empty if it expected nothing."""
    match = _EXPECTED.fullmatch(message)
    if match is None:
        return ""
    types = match["types"].split(" | ")
    if match["sign"]:
        bound = f"{float(match['bound']):.15g}"
        if not match["length"]:
            return f"must be {_SIGNS[match['sign']]} {bound}"
        if (match["sign"], bound) == (">=", "1"):
            return "must not be empty"
        items = "characters" if types == ["str"] else "items"
        return f"must have {_SIGNS[match['sign']]} {bound} {items}"
    wanted = " or ".join(_TYPES.get(type_, type_) for type_ in types)
    got = match["got"]
    return f"must be {wanted}, not {_TYPES.get(got, got)}" if got else f"must be {wanted}"


def _shown(name: str) -> str:
    """Return a name that a stranger chose so that it can stand in an answer."""
    return name[:_NAME_LENGTH_MAX] if name and name.isprintable() else repr(name[:_NAME_LENGTH_MAX])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_list(type_: object) -> bool:
    if get_origin(type_) is Annotated:
        type_ = get_args(type_)[0]
    return get_origin(type_) is list


def _values_of(type_: object) -> tuple[str, ...]:
    if isinstance(type_, type) and issubclass(type_, Enum):
        return tuple(str(member.value) for member in type_)
    return tuple(value for part in get_args(type_) for value in _values_of(part))


async def _read_bounded(request: Request, bytes_max: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > bytes_max:
        raise _too_large(bytes_max)
    chunks: list[bytes] = []
    size_bytes = 0
    async for chunk in request.stream():
        size_bytes += len(chunk)
        if size_bytes > bytes_max:
            raise _too_large(bytes_max)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(bytes_max: int) -> GameNodeError:
    return invalid("body", f"is larger than {bytes_max} bytes")


def _not_json(body: bytes, error: msgspec.DecodeError) -> GameNodeError:
    match = _BYTE.fullmatch(str(error))
    reason, at = (match[1], int(match[2])) if match else (str(error), len(body))
    words = "it ends too soon" if reason == _TRUNCATED else reason.removeprefix(_MALFORMED)
    return _at_byte(body, at, f"is not JSON: {words}")


def _not_utf8(body: bytes, error: UnicodeDecodeError) -> GameNodeError:
    # The decoder may have counted from within; the bytes as a whole tell the place.
    try:
        body.decode()
    except UnicodeDecodeError as whole:
        error = whole
    return _at_byte(body, error.start, "is not UTF-8")


def _at_byte(body: bytes, at: int, reason: str) -> GameNodeError:
    line = body.count(b"\n", 0, at) + 1
    column = at - (body.rfind(b"\n", 0, at) + 1) + 1
    return GameNodeError(
        ErrorCode.INVALID_REQUEST,
        f"body: {reason} (line {line}, column {column})",
        violations=[Violation(field="body", reason=reason, line=line, column=column)],
    )
