"""Results on standard output in every format, progress and errors on standard error."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TextIO

from gamenode.cli import terminal
from gamenode.cli.errors import Problem, describe
from gamenode.domain.errors import invalid
from gamenode.domain.quantity import parse_time, span
from gamenode.lib.clock import NANOSECONDS_PER_S, Clock, Instant

Body = Mapping[str, Any]
Value = str | int | float | bool | None

_UUID_CHARACTERS: Final = 36
_ID_SHOWN: Final = 8
_GAP: Final = "  "


class Format(StrEnum):
    """In which form a command gives its results."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NDJSON = "ndjson"
    CSV = "csv"
    NAME = "name"

    @property
    def for_people(self) -> bool:
        """Whether it is a table, and not a form that programs read."""
        return self in {Format.TABLE, Format.WIDE}


@dataclass(frozen=True, slots=True)
class Column:
    """One column: what it holds as a plain value (csv), and how people see it."""

    name: str
    value: Callable[[Body], Value]
    show: Callable[[Any, Instant], str] | None = None
    """Gets the value and the present instant; without it, the value as text."""
    wide: bool = False
    """Whether it stands only in the wide table, in csv, and where it is asked for."""
    width: int = 0
    """At least so many columns, in tables whose rows are not known beforehand."""


@dataclass(frozen=True, slots=True)
class Part:
    """A table below an item: the rows that one of its fields holds."""

    field: str
    """Dots lead into objects."""
    columns: tuple[Column, ...]
    empty: str = ""
    """What stands there where it holds no rows; without it, nothing."""


@dataclass(frozen=True, slots=True)
class View:
    """How a kind of thing is shown."""

    columns: tuple[Column, ...]
    name: Callable[[Body], str]
    """What `-o name` prints: what other commands take."""
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How results are to look."""

    format: Format = Format.TABLE
    headers: bool = True
    columns: tuple[str, ...] = ()
    colour: bool = False
    """Of standard output."""
    colour_of_errors: bool = False
    width: int | None = None
    """Of the terminal; without one, nothing is ever cut."""


class Output:
    """The one renderer."""

    def __init__(self, stdout: TextIO, stderr: TextIO, *, look: Look, clock: Clock) -> None:
        """Write results to `stdout`, everything else to `stderr`."""
        self._stdout = stdout
        self._stderr = stderr
        self.look = look
        self._clock = clock

    @property
    def format(self) -> Format:
        """The form that was asked for."""
        return self.look.format

    def on_terminal(self, *, stderr: bool = False) -> bool:
        """Return whether standard output, or standard error, is a terminal."""
        return (self._stderr if stderr else self._stdout).isatty()

    def item(self, body: Body, view: View, *, brief: bool = False) -> None:
        """Write one thing; for people all there is about it, or one row where that is enough."""
        match self.format:
            case Format.TABLE | Format.WIDE:
                self.text(self.list_table([body], view) if brief else self._details(body, view))
            case Format.CSV:
                self.text(self._csv([body], view))
            case Format.NAME:
                self.text(view.name(body) + "\n")
            case Format.JSON | Format.YAML | Format.NDJSON:
                self.document(body)

    def page(self, page: Body, view: View, *, cursor_option: str = "--cursor") -> None:
        """Write a list as the server gave it, one page of it; say how to get the next."""
        items: Sequence[Body] = page["items"]
        match self.format:
            case Format.TABLE | Format.WIDE:
                self.text(self.list_table(items, view))
            case Format.CSV:
                self.text(self._csv(items, view))
            case Format.NAME:
                self.text("".join(view.name(item) + "\n" for item in items))
            case Format.NDJSON:
                self.text("".join(_compact(item) for item in items))
            case Format.JSON | Format.YAML:
                self.document(page)
        if page.get("next_cursor") and self.format not in {Format.JSON, Format.YAML}:
            self.tell(f"there are more: {cursor_option} {page['next_cursor']}")

    def document(self, body: Any) -> None:
        """Write `body` itself, for programs; JSON where people asked for a table of it."""
        match self.format:
            case Format.YAML:
                self.text(_yaml(body))
            case Format.NDJSON:
                self.text(_compact(body))
            case _:
                self.text(json.dumps(body, indent=2, ensure_ascii=False) + "\n")

    def rows(self, view: View) -> Rows:
        """Return a writer for things that come one after the other, for as long as they do."""
        return Rows(self, view, self._chosen(view.columns), self._clock)

    def text(self, text: str) -> None:
        """Write `text` to standard output, at once."""
        self._stdout.write(text)
        self._stdout.flush()

    def bytes(self, block: bytes, *, to_stderr: bool = False) -> None:
        """Write bytes as they are, at once."""
        stream = self._stderr if to_stderr else self._stdout
        stream.flush()
        stream.buffer.write(block)
        stream.buffer.flush()

    def tell(self, text: str, *, code: str = "") -> None:
        """Say `text` on standard error, one line or more, in a colour where there are any."""
        for line in text.split("\n"):
            line_shown = terminal.one_line(line)
            if self.look.colour_of_errors:
                line_shown = terminal.paint(line_shown, code)
            self._stderr.write(line_shown + "\n")
        self._stderr.flush()

    def problem(self, problem: Problem, *, file: str = "") -> None:
        """Say what went wrong; formats for programs carry the problem object itself."""
        match self.format:
            case Format.JSON | Format.NDJSON:
                self._stderr.write(_compact(problem))
            case Format.YAML:
                self._stderr.write(_yaml(problem))
            case Format.TABLE | Format.WIDE | Format.CSV | Format.NAME:
                first, _, rest = describe(problem, file=file).partition("\n")
                self.tell(first, code=terminal.RED)
                if rest:
                    self.tell(rest)
        self._stderr.flush()

    def list_table(self, items: Iterable[Body], view: View) -> str:
        """Return rows as a table for people."""
        return self._table(items, self._chosen(view.columns))

    def _chosen(self, columns: Sequence[Column]) -> Sequence[Column]:
        if self.look.columns:
            return [_column(name, columns) for name in self.look.columns]
        if self.format in {Format.WIDE, Format.CSV}:
            return columns
        return [column for column in columns if not column.wide]

    def _table(self, items: Iterable[Body], columns: Sequence[Column]) -> str:
        now = self._clock.now()
        whole = self.format is Format.WIDE
        rows = [[show(column, item, now, whole=whole) for column in columns] for item in items]
        if self.look.headers:
            rows.insert(0, [column.name for column in columns])
        widths = [
            max((terminal.width_of(row[index]) for row in rows), default=0)
            for index in range(len(columns))
        ]
        return "".join(
            self.row(row, widths, heading=self.look.headers and not index)
            for index, row in enumerate(rows)
        )

    def row(self, cells: Sequence[str], widths: Sequence[int], *, heading: bool = False) -> str:
        """Return one line of a table, its cells padded to `widths`; a terminal's edge cuts it."""
        room = self.look.width
        parts: list[str] = []
        for cell, width in zip(cells, widths, strict=True):
            shown = cell
            if room is not None:
                if room < 1:
                    break
                shown = terminal.cut(cell, room)
                room -= width + len(_GAP)
            padding = " " * (width - terminal.width_of(shown))
            if self.look.colour:
                code = terminal.BOLD if heading else terminal.colour_of(cell)
                shown = terminal.paint(shown, code)
            parts.append(shown + padding)
        return _GAP.join(parts).rstrip() + "\n"

    def _details(self, body: Body, view: View) -> str:
        now = self._clock.now()
        columns = self._chosen(view.columns) if self.look.columns else view.columns
        cells = [(column.name, show(column, body, now, whole=True)) for column in columns]
        present = [(name, cell) for name, cell in cells if cell]
        width = max((len(name) for name, _ in present), default=0)
        lines = []
        for name, cell in present:
            code = terminal.colour_of(cell) if self.look.colour else ""
            lines.append(f"{name:<{width}}{_GAP}{terminal.paint(cell, code)}\n")
        if not self.look.columns:
            for part in view.parts:
                rows: Sequence[Body] = field(part.field)(body)
                if rows:
                    lines += ["\n", self._table(rows, part.columns)]
                elif part.empty:
                    lines += ["\n", f"{part.empty}\n"]
        return "".join(lines)

    def _csv(self, items: Iterable[Body], view: View) -> str:
        columns = self._chosen(view.columns)
        rows = [] if not self.look.headers else [[column.name.lower() for column in columns]]
        rows += [[_plain(column.value(item)) for column in columns] for item in items]
        return csv_lines(rows)


class Rows:
    """Writes things that come one after the other; each is out before the next is taken."""

    def __init__(self, output: Output, view: View, columns: Sequence[Column], clock: Clock) -> None:
        """Write to `output`; the heading comes with the first row."""
        self._output = output
        self._view = view
        self._columns = columns
        self._clock = clock
        self._widths = [max(column.width, len(column.name)) for column in columns]
        self._begun = False

    def write(self, body: Body) -> None:
        """Write one thing."""
        output = self._output
        heading = output.look.headers and not self._begun
        self._begun = True
        match output.format:
            case Format.TABLE | Format.WIDE:
                if heading:
                    names = [column.name for column in self._columns]
                    output.text(output.row(names, self._widths, heading=True))
                cells = [show(column, body, self._clock.now()) for column in self._columns]
                # A wider cell moves the columns from now on, rather than one line of them.
                self._widths = [
                    max(width, terminal.width_of(cell))
                    for width, cell in zip(self._widths, cells, strict=True)
                ]
                output.text(output.row(cells, self._widths))
            case Format.CSV:
                rows = [[column.name.lower() for column in self._columns]] if heading else []
                rows.append([_plain(column.value(body)) for column in self._columns])
                output.text(csv_lines(rows))
            case Format.NAME:
                output.text(self._view.name(body) + "\n")
            case Format.JSON | Format.NDJSON:
                output.text(_compact(body))
            case Format.YAML:
                output.text("---\n" + _yaml(body))


def show(column: Column, body: Body, now: Instant, *, whole: bool = False) -> str:
    """Return a cell as people see it, on one line; ids in full where there is room for them."""
    value = column.value(body)
    if column.show is not None and not (whole and column.show is short_id):
        return terminal.one_line(column.show(value, now))
    return terminal.one_line(_plain(value))


def field(name: str) -> Callable[[Body], Any]:
    """Return a function that takes the field `name`; dots lead into objects."""
    steps = name.split(".")

    def take(body: Body) -> Any:
        value: Any = body
        for step in steps:
            value = value.get(step) if isinstance(value, Mapping) else None
        return value

    return take


def labels(name: str) -> Callable[[Body], str]:
    """Return a function that writes the map in the field `name` as `key=value,…`."""

    def take(body: Body) -> str:
        pairs: Mapping[str, Any] = body.get(name) or {}
        return ",".join(f"{key}={value}" for key, value in sorted(pairs.items()))

    return take


def short_id(value: str | None, _now: Instant) -> str:
    """Return the end of a UUID, which tells it from its neighbours; other names stay whole."""
    if not value:
        return ""
    return value[-_ID_SHOWN:] if len(value) == _UUID_CHARACTERS else value


def age(value: str | None, now: Instant) -> str:
    """Return how long ago a time was, in its largest unit."""
    moment = instant(value)
    return "" if moment is None else span(max(0.0, (now - moment) / NANOSECONDS_PER_S))


def instant(value: str | None) -> Instant | None:
    """Return the instant that a body writes; `None` where it writes none."""
    return parse_time(value, Instant(0)) if value else None


def csv_lines(rows: Iterable[Sequence[str]]) -> str:
    """Return rows as CSV lines."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _column(name: str, columns: Sequence[Column]) -> Column:
    by_name = {column.name.lower(): column for column in columns}
    wanted = name.strip().lower()
    if wanted in by_name:
        return by_name[wanted]
    near = difflib.get_close_matches(wanted, by_name, n=1)
    advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(by_name)}"
    raise invalid("--columns", f"there is no column {name!r}", advice=advice)


def _plain(value: Value) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case _:
            return str(value)


def _compact(body: Any) -> str:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False) + "\n"


def _yaml(body: Any) -> str:
    import yaml  # noqa: PLC0415 - slow to import, and seldom asked for

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(body, Dumper=dumper, sort_keys=False, allow_unicode=True)
    return text
