"""Settings from a file, the environment and flags, in rising order."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, cast

Settings = TypeVar("Settings")


class SettingsError(Exception):
    """A setting that cannot be used; the message names it, where it stands, and what to do."""


def load_settings(
    settings_type: type[Settings],
    *,
    file: Mapping[str, Any],
    file_name: str,
    environment: Mapping[str, str],
    prefix: str,
    flags: Mapping[str, Mapping[str, object]],
    foreign: Collection[str] = (),
) -> Settings:
    """Return the settings of a dataclass whose fields are sections, themselves dataclasses.

    `file` is a read TOML document; a variable is named PREFIX + SECTION + "__" + NAME; `flags` are
    what was given on the command line, None where it was not. `foreign` are sections of programs
    that may share this one's environment: a variable of theirs that means nothing here is theirs.

    Raises:
        SettingsError: an unknown section or name, a value of the wrong type, or a number that no
            bound, count or time can be.
    """
    sections = typing.get_type_hints(settings_type)
    given: dict[str, dict[str, object]] = {name: {} for name in sections}
    for section, values in file.items():
        if section not in sections:
            raise SettingsError(f"{file_name}: {_unknown('section', section, sections)}")
        if not isinstance(values, Mapping):
            raise SettingsError(f"{file_name}: {section} must be a table: [{section}]")
        for name, value in values.items():
            given[section][name] = _read(sections[section], section, name, value, where=file_name)
    for variable, text in environment.items():
        section, separator, name = variable.removeprefix(prefix).lower().partition("__")
        if not variable.startswith(prefix) or not separator:
            continue
        if section in foreign and name not in _fields(sections.get(section)):
            continue
        if section not in sections:
            raise SettingsError(f"{variable}: {_unknown('section', section, sections)}")
        given[section][name] = _read(sections[section], section, name, text, where=variable)
    for section, values in flags.items():
        for name, value in values.items():
            if value is not None:
                given[section][name] = _read(sections[section], section, name, value, where="flag")
    built = {}
    for section, section_type in sections.items():
        try:
            built[section] = section_type(**given[section])
        except TypeError as error:
            raise SettingsError(f"[{section}]: {error}") from error
    return settings_type(**built)


def _read(section_type: Any, section: str, name: str, value: object, *, where: str) -> object:
    hints = typing.get_type_hints(section_type)
    if name not in _fields(section_type):
        raise SettingsError(
            f"{where}: {_unknown('setting', f'{section}.{name}', _names(section, hints))}"
        )
    try:
        converted = _convert(hints[name], value)
        if isinstance(converted, int | float):
            _check_number(name, converted)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{where}: {section}.{name}: {error}") from error
    return converted


def _check_number(name: str, value: float) -> None:
    """Refuse a number that no setting of this name can mean.

    Half of the standard library takes a bound of 0 for none at all.
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"must be a number from 0 on, not {value}")
    counts = type(value) is int and not name.endswith(("retries", "_min"))
    if value == 0 and (counts or name.endswith(("_max", "interval_s"))):
        raise ValueError("must be more than 0")


def _fields(section_type: Any) -> set[str]:
    """Return the names of a section's settings; none of a section that is not there."""
    return {field.name for field in dataclasses.fields(section_type)} if section_type else set()


def _convert(hint: Any, value: object) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert(next(a for a in arguments if a is not types.NoneType), value)
    if origin in (frozenset, tuple):
        items = value.split(",") if isinstance(value, str) else cast("list[Any]", value)
        converted = [_convert(arguments[0], item) for item in items]
        return frozenset(converted) if origin is frozenset else tuple(converted)
    if origin in (Mapping, dict):
        if not isinstance(value, Mapping):
            raise TypeError("must be a table")
        return dict(value)
    if hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise ValueError(f"must be true or false, not {value!r}")
    if hint in (int, float):
        if isinstance(value, bool):
            raise TypeError("must be a number")
        return hint(value)
    if hint is Path:
        return Path(str(value))
    if isinstance(hint, type) and issubclass(hint, Enum):
        known = {str(member.value): member for member in hint}
        if value not in known:
            raise ValueError(f"must be one of {', '.join(known)}, not {value!r}")
        return known[str(value)]
    if not isinstance(value, str):
        raise TypeError(f"must be a text, not {value!r}")
    return value


def _names(section: str, hints: Mapping[str, Any]) -> list[str]:
    return [f"{section}.{name}" for name in hints]


def _unknown(what: str, name: str, known: typing.Iterable[str]) -> str:
    nearest = get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(sorted(known))}"
    return f"unknown {what} {name}{hint}"
