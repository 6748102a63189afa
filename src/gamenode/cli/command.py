"""What every command has: the shared options, an example, and what it needs to do its work."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from random import Random
from typing import TYPE_CHECKING, Any, Final

import click

from gamenode.cli.settings import CliSettings
from gamenode.lib.clock import Clock, SystemClock

if TYPE_CHECKING:
    from gamenode.cli.client import ApiClient
    from gamenode.cli.output import Output
    from gamenode.cli.patience import Patience
    from gamenode.cli.target import Target

FORMATS: Final = ("table", "wide", "json", "yaml", "ndjson", "csv", "name")


@dataclass(slots=True, kw_only=True)
class Options:
    """What was written in the shared options, on whichever command; the last one counts."""

    output: str | None = None
    columns: tuple[str, ...] = ()
    no_headers: bool = False
    no_color: bool = False
    url: str | None = None
    context: str | None = None
    token_file: str | None = None
    timeout: float | None = None
    """In seconds."""
    verbose: bool = False
    debug_http: bool = False


@dataclass(kw_only=True)
class Invocation:
    """One use of the program: what was asked for, and what to do it with."""

    options: Options = field(default_factory=Options)
    settings: CliSettings = field(default_factory=CliSettings)
    clock: Clock = field(default_factory=SystemClock)
    sleep: Callable[[float], None] = time.sleep
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    file: str = ""
    """The pipeline file that is being sent, for messages about places in it."""

    @cached_property
    def output(self) -> Output:
        """Where results and messages go, in the form that was asked for."""
        from gamenode.cli.output import Format, Look, Output  # noqa: PLC0415 - help needs none

        options = self.options
        format_ = Format(options.output or Format.TABLE)
        look = Look(
            format=format_,
            headers=not options.no_headers,
            columns=options.columns,
            colour=self._colour(sys.stdout.isatty()),
            colour_of_errors=self._colour(sys.stderr.isatty()),
            width=shutil.get_terminal_size().columns if sys.stdout.isatty() else None,
        )
        return Output(sys.stdout, sys.stderr, look=look, clock=self.clock)

    @cached_property
    def target(self) -> Target:
        """The server that was named, and the token to show it."""
        from gamenode.cli.target import ContextFile, choose_target  # noqa: PLC0415 - as above

        options = self.options
        return choose_target(
            url=options.url,
            context=options.context,
            token_file=options.token_file,
            environ=self.environ,
            contexts=ContextFile(),
        )

    @cached_property
    def client(self) -> ApiClient:
        """The server's HTTP interface, at the place that was named."""
        from gamenode.cli.client import ApiClient  # noqa: PLC0415 - help needs none

        options, target = self.options, self.target
        if target.exposes_token:
            self.output.tell(
                f"warning: the token goes to {target.url} unencrypted; use https", code="33"
            )
        return ApiClient(
            target,
            clock=self.clock,
            settings=self.settings,
            trace=self.output.tell if options.verbose or options.debug_http else None,
            headers_traced=options.debug_http,
            answer_s=options.timeout,
        )

    def close(self) -> None:
        """Close what was opened on the way."""
        if "client" in self.__dict__:
            self.client.close()

    def patience(self) -> Patience:
        """Return a new count of how long the server has been away."""
        from gamenode.cli.patience import Patience  # noqa: PLC0415 - few commands need it

        return Patience(
            clock=self.clock,
            sleep=self.sleep,
            random=Random(),  # noqa: S311 - spreads retries, guards nothing
            settings=self.settings,
            tell=self.output.tell,
        )

    def _colour(self, terminal: bool) -> bool:
        environ = self.environ
        if self.options.no_color or environ.get("NO_COLOR"):
            return False
        if environ.get("CLICOLOR_FORCE", "0") != "0":
            return True
        return terminal and environ.get("TERM") != "dumb"


pass_invocation = click.make_pass_decorator(Invocation, ensure=True)


class DurationType(click.ParamType[float]):
    """A length of time, read as everywhere: `90s`, `10m`, `1h30m`. The value is in seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the seconds that `value` writes."""
        if isinstance(value, float):
            return value
        from gamenode.domain.errors import GameNodeError  # noqa: PLC0415 - help needs none
        from gamenode.domain.quantity import parse_duration  # noqa: PLC0415 - as above

        try:
            return parse_duration(value)
        except GameNodeError as error:
            advice = f" ({error.hint})" if error.hint else ""
            self.fail(f"{error.violations[0].reason}{advice}", param, ctx)


DURATION: Final = DurationType()


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value is not None:
        assert param.name is not None
        setattr(ctx.ensure_object(Invocation).options, param.name, value)


def _remember_columns(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    _remember(ctx, param, None if value is None else tuple(value.split(",")))


def _shared(
    *names: str,
    help: str,  # noqa: A002 - click's own word
    callback: Callable[[click.Context, click.Parameter, Any], None] = _remember,
    **attributes: Any,
) -> click.Option:
    return click.Option(
        names, help=help, callback=callback, expose_value=False, default=None, **attributes
    )


SHARED: Final[Sequence[click.Option]] = (
    _shared("-o", "--output", type=click.Choice(FORMATS), help="The form of the result."),
    _shared(
        "--columns", metavar="A,B", callback=_remember_columns, help="Only these columns, in order."
    ),
    _shared("--no-headers", is_flag=True, help="No line of headings."),
    _shared("--no-color", is_flag=True, help="No colours, on a terminal either."),
    _shared("--url", metavar="URL", help="The server.  [env: GAMENODE_URL]"),
    _shared("--context", metavar="NAME", help="A server that `gamenode context` knows."),
    _shared(
        "--token-file",
        metavar="FILE",
        help="Where the token is; - is standard input.  [env: GAMENODE_TOKEN holds the token]",
    ),
    _shared("--timeout", type=DURATION, metavar="DURATION", help="How long to wait, such as 30s."),
    _shared("-v", "--verbose", is_flag=True, help="Say each request, and more about failures."),
    _shared("--debug-http", is_flag=True, help="Say each request's headers, without secrets."),
)
"""Every command takes them, and every group for the commands in it."""

_SETTINGS: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Command(click.Command):
    """A command with the shared options and with examples in its help."""

    def __init__(self, *args: Any, examples: str = "", **attributes: Any) -> None:
        """Take what `click.Command` takes, and `examples`: lines, each a use of it."""
        attributes.setdefault("context_settings", _SETTINGS)
        super().__init__(*args, **attributes)
        self.examples = [line.strip() for line in examples.strip().splitlines()]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return its own parameters and the shared options."""
        return [*super().get_params(ctx), *SHARED]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write examples, its own options, then the shared ones."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write(
                    "".join(f"{'':{formatter.current_indent}}{line}\n" for line in self.examples)
                )
        own = [
            param
            for param in click.Command.get_params(self, ctx)
            if isinstance(param, click.Option)
        ]
        _write_options(ctx, formatter, "Options", own)
        _write_options(ctx, formatter, "Shared options", SHARED)


class Lazy(click.Command):
    """A command that is imported when it is used; its line of help needs no import."""

    def __init__(self, name: str, target: str, short_help: str) -> None:
        """Stand for the command that `target` names, as `module:attribute`."""
        super().__init__(name, short_help=short_help)
        self._target = target

    def load(self) -> click.Command:
        """Return the command itself."""
        module, _, attribute = self._target.partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


class Group(click.Group):
    """A group whose commands are imported when they are used."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        """Take what `click.Group` takes."""
        attributes.setdefault("context_settings", _SETTINGS)
        super().__init__(*args, **attributes)

    def add_lazy(self, name: str, target: str, short_help: str) -> None:
        """Add the command that `target` names, as `module:attribute`, without importing it."""
        self.add_command(Lazy(name, target, short_help))

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return its own parameters and the shared options."""
        return [*super().get_params(ctx), *SHARED]

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as click calls it
        """Return the commands in the order in which they were added."""
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, imported now if it was not yet."""
        command = super().get_command(ctx, cmd_name)
        return command.load() if isinstance(command, Lazy) else command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, then the options; the shared ones for the whole program."""
        rows = [
            (name, command.get_short_help_str(limit=100))
            for name, command in self.commands.items()
            if not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
        own = [
            param
            for param in click.Command.get_params(self, ctx)
            if isinstance(param, click.Option)
        ]
        _write_options(ctx, formatter, "Options", own)
        if ctx.parent is None:
            _write_options(ctx, formatter, "Shared options", SHARED)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Return what `incomplete` may become, without an import of the commands."""
        from click.shell_completion import CompletionItem  # noqa: PLC0415 - only for completion

        names = [
            CompletionItem(name, help=command.get_short_help_str())
            for name, command in self.commands.items()
            if name.startswith(incomplete) and not command.hidden
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)


def _write_options(
    ctx: click.Context,
    formatter: click.HelpFormatter,
    title: str,
    params: Sequence[click.Parameter],
) -> None:
    records = [record for param in params if (record := param.get_help_record(ctx)) is not None]
    if records:
        with formatter.section(title):
            formatter.write_dl(records)
