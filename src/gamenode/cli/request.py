"""What a pipeline is made of on the command line: the same for `run` and for `pipelines plan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from gamenode.cli.command import Invocation
from gamenode.cli.inputs import Inputs
from gamenode.cli.names import complete_nodes

_Decorated = Callable[..., Any]


def request_options(command: _Decorated) -> _Decorated:
    """Give a command the file and everything that is filled into it."""
    for option in reversed(
        (
            click.argument("file", type=click.Path()),
            click.option(
                *("-a", "--arg", "args"),
                multiple=True,
                metavar="K=V",
                help="An arg; @FILE or - as its value.",
            ),
            click.option(
                *("-e", "--env", "envs"), multiple=True, metavar="K=V", help="As -a, for an env."
            ),
            click.option(
                "--node", default="", shell_complete=complete_nodes, help="Run on this node."
            ),
            click.option("-l", "--selector", default="", help="Run on a node that this fits."),
        )
    ):
        command = option(command)
    return command


def read_request(
    invocation: Invocation,
    *,
    file: str,
    args: tuple[str, ...],
    envs: tuple[str, ...],
    node: str,
    selector: str,
) -> dict[str, Any]:
    """Return the body that asks for the pipeline.

    Raises:
        GameNodeError: INVALID_REQUEST; a file cannot be read, or what should be a pair is none.
    """
    inputs = Inputs(bytes_max=invocation.settings.file_bytes_max)
    invocation.file = file.removeprefix("@")
    return {
        "file": inputs.file(file, field="FILE"),
        "args": inputs.pairs(args, option="-a"),
        "envs": inputs.pairs(envs, option="-e"),
        "node": node,
        "selector": selector,
    }
