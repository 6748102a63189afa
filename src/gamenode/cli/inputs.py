"""What a command is given: files, standard input, and `K=V` pairs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import click

from gamenode.cli.terminal import one_line
from gamenode.domain.errors import ErrorCode, GameNodeError, Violation, invalid

STDIN: Final = "-"


def can_ask() -> bool:
    """Return whether somebody sits at a terminal and can be asked for a value."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask(name: str, schema: Mapping[str, Any]) -> str:
    """Ask for the value of an arg that `schema` describes; what is secret is not shown.

    Raises:
        click.Abort: nothing was given.
    """
    secret = bool(schema.get("writeOnly"))
    described = f"{name} ({schema['description']})" if schema.get("description") else name
    choices = schema.get("enum")
    # A choice is said in the question and checked by the server, like all the others.
    question = f"{described} [{'|'.join(choices)}]" if choices else described
    value: str = click.prompt(one_line(question), hide_input=secret, err=True)
    return value


class Inputs:
    """Reads the values that a command line names. Standard input can be read once."""

    def __init__(self, *, bytes_max: int) -> None:
        """Read at most `bytes_max` from each."""
        self._bytes_max = bytes_max
        self._stdin_for = ""

    def file(self, name: str, *, field: str) -> str:
        """Return the text of the file `name`, also written `@name`; `-` is standard input.

        Raises:
            GameNodeError: INVALID_REQUEST, for `field`.
        """
        content = self._read(name.removeprefix("@"), field)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            column = error.start - content.rfind(b"\n", 0, error.start)
            violation = Violation(field=field, reason="is not UTF-8 text", line=line, column=column)
            raise GameNodeError(
                ErrorCode.INVALID_REQUEST, f"{name} is not UTF-8 text", violations=[violation]
            ) from error

    def value(self, text: str, *, field: str) -> str:
        """Return the value that `text` writes.

        `@file` and `-` stand for what is in the file and on standard input, without its last
        newline; `@@` begins a value with `@`.
        """
        if text.startswith("@@"):
            return text[1:]
        if text == STDIN or text.startswith("@"):
            return self.file(text, field=field).removesuffix("\n")
        return text

    def pairs(self, texts: Iterable[str], *, option: str) -> dict[str, str]:
        """Return the map that `K=V` texts write.

        Raises:
            GameNodeError: INVALID_REQUEST, where one is no pair or a key stands twice.
        """
        found: dict[str, str] = {}
        for text in texts:
            key, equals, value = text.partition("=")
            if not equals or not key:
                raise invalid(option, f"{text!r} is no pair", advice="write KEY=VALUE")
            if key in found:
                raise invalid(option, f"{key} is given twice")
            found[key] = self.value(value, field=f"{option} {key}")
        return found

    def _read(self, name: str, field: str) -> bytes:
        if name == STDIN:
            if self._stdin_for:
                raise invalid(field, f"standard input is read for {self._stdin_for} already")
            self._stdin_for = field
            content = sys.stdin.buffer.read(self._bytes_max + 1)
        else:
            try:
                with Path(name).open("rb") as file:
                    content = file.read(self._bytes_max + 1)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else "is no name of a file"
                raise invalid(field, f"{name}: {reason}") from error
        if len(content) > self._bytes_max:
            raise invalid(field, f"{name} is longer than {self._bytes_max} bytes")
        return content
