"""The operators' program: its commands, and the one place where errors become words and numbers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from gamenode.cli.command import FORMATS, Group, Invocation

_COMMANDS: Final = (
    ("run", "gamenode.cli.run:run", "Start a pipeline and show its log until it ends."),
    ("pipelines", "gamenode.cli.pipelines:pipelines", "List, show, check and cancel pipelines."),
    ("logs", "gamenode.cli.logs:logs", "Print what steps print."),
    ("nodes", "gamenode.cli.nodes:nodes", "List and show nodes; take them out of use and back."),
    ("inventory", "gamenode.cli.inventory:inventory", "Show and compare what nodes are made of."),
    ("events", "gamenode.cli.events:events", "Show what happened, and what happens."),
    ("audit", "gamenode.cli.audit:audit", "Show who did what, and whether that record is whole."),
    ("verify", "gamenode.cli.verify:verify", "Find out whether all records of attempts agree."),
    ("tokens", "gamenode.cli.tokens:tokens", "Make, list and revoke what people sign in with."),
    ("context", "gamenode.cli.context:context", "Name servers, and choose one."),
    ("version", "gamenode.cli.system:version", "Print the versions of program and server."),
    ("completion", "gamenode.cli.system:completion", "Print a shell's completion script."),
    ("api", "gamenode.cli.system:api", "Send one request to the HTTP interface."),
)


class Program(Group):
    """The root group. Whatever happens, it ends with a number that interface.md knows."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command that `args` name and exit; the arguments are those of `click`."""
        arguments = list(sys.argv[1:] if args is None else args)
        extra.setdefault("obj", Invocation())
        prog_name = prog_name or "gamenode"
        if not standalone_mode:
            return super().main(arguments, prog_name, complete_var, standalone_mode=False, **extra)
        sys.exit(self._run(arguments, prog_name, complete_var, extra))

    def _run(
        self, args: list[str], prog_name: str, complete_var: str | None, extra: dict[str, Any]
    ) -> int:
        for stream in (sys.stdout, sys.stderr):
            # A terminal that cannot show a character gets its number, and no command dies of it.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        invocation: Invocation = extra["obj"]
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help() if error.ctx else "", err=True)
            return error.exit_code
        except UnicodeEncodeError:
            # Bytes of the command line that are no text: a file may be named so, nothing else.
            from gamenode.domain.errors import invalid  # noqa: PLC0415 - only where there is an error

            return _fail(invocation, args, invalid("an argument", "is not UTF-8 text"))
        except Exception as error:  # noqa: BLE001 - the edge of the program
            return _fail(invocation, args, error)
        finally:
            invocation.close()
        return result if isinstance(result, int) else 0


def _fail(invocation: Invocation, args: list[str], error: Exception) -> int:
    from gamenode.cli.errors import (  # noqa: PLC0415 - only where there is an error
        EXIT_INTERRUPTED,
        EXIT_UNKNOWN,
        ApiError,
        exit_code,
        problem_of,
    )
    from gamenode.domain.errors import ErrorCode, GameNodeError  # noqa: PLC0415 - as above

    match error:
        case click.Abort():
            return EXIT_INTERRUPTED
        case BrokenPipeError():
            _drop_stdout()
            return EXIT_UNKNOWN
        case OSError():
            # Most of all a full disk under the output; the network's errors have other names.
            _drop_stdout()
            refusal: ApiError | GameNodeError = GameNodeError(ErrorCode.INTERNAL, str(error))
        case click.ClickException():
            refusal = _usage(error)
            invocation.options.output = invocation.options.output or _format_in(args)
        case ApiError() | GameNodeError():
            refusal = error
        case _:
            if invocation.options.verbose:
                import traceback  # noqa: PLC0415 - only for a fault of ours

                traceback.print_exception(error)
            refusal = GameNodeError(
                ErrorCode.INTERNAL,
                f"{type(error).__name__}: {error}",
                hint="this is a fault in gamenode; --verbose shows where",
            )
    problem = problem_of(refusal)
    invocation.output.problem(problem, file=invocation.file)
    return exit_code(problem)


def _drop_stdout() -> None:
    # What is still buffered cannot be written; it would fail once more when the program exits.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _usage(error: click.ClickException) -> Any:
    from gamenode.domain.errors import ErrorCode, GameNodeError  # noqa: PLC0415 - as above

    ctx = getattr(error, "ctx", None)
    hint = f"{ctx.command_path} --help" if ctx is not None else ""
    return GameNodeError(ErrorCode.INVALID_REQUEST, error.format_message(), hint=hint)


def _format_in(args: list[str]) -> str | None:
    # The command line could not be read as a whole; its errors still keep to the form asked for.
    for index, arg in enumerate(args):
        for option in ("--output=", "-o", "--output"):
            if arg.startswith(option):
                value = arg.removeprefix(option) or "".join(args[index + 1 : index + 2])
                if value in FORMATS:
                    return value
    return None


cli = Program(
    "gamenode",
    help="GameNode: the control plane for a fleet of game hosts.",
    epilog="Exit codes: 0 done; 1 error on the server; 2 usage or invalid input; 3 the work ended"
    " badly; 4 not allowed; 5 not found; 6 conflict; 7 unavailable, try again; 8 the wait timed"
    " out; 130 interrupted.",
)
for _name, _target, _short_help in _COMMANDS:
    cli.add_lazy(_name, _target, _short_help)
