"""Lists, once or again and again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import NoReturn

from gamenode.cli.client import Body
from gamenode.cli.command import Invocation
from gamenode.cli.errors import ApiError
from gamenode.cli.follow import Deadline
from gamenode.cli.output import View
from gamenode.domain.errors import GameNodeError

_HOME = "\x1b[H"
_CLEAR_LINE = "\x1b[K"
_CLEAR_BELOW = "\x1b[J"


def show_list(
    invocation: Invocation, fetch: Callable[[], Body], view: View, *, watch: bool
) -> None:
    """Show the list that `fetch` gets; with `watch`, until it is interrupted."""
    if watch:
        _watch(invocation, fetch, view)
    invocation.output.page(fetch(), view)


def _watch(invocation: Invocation, fetch: Callable[[], Body], view: View) -> NoReturn:
    output = invocation.output
    patience = invocation.patience()
    deadline = Deadline(invocation.clock, invocation.options.timeout)
    redraws = output.on_terminal() and output.format.for_people
    rows = output.rows(view)
    known: dict[str, Body] = {}
    while True:
        try:
            items = fetch()["items"]
        except (ApiError, GameNodeError) as error:
            patience.missed(error)
            continue
        patience.met()
        if redraws:
            height = shutil.get_terminal_size().lines - 1
            lines = output.list_table(items, view).splitlines()[:height]
            screen = "".join(f"{line}{_CLEAR_LINE}\n" for line in lines)
            output.text(_HOME + screen + _CLEAR_BELOW)
        else:
            # Rows that are new or have changed, oldest first, as a log has them.
            present = {view.name(item): item for item in items}
            for name, item in reversed(present.items()):
                if known.get(name) != item:
                    rows.write(item)
            known = present
        invocation.sleep(deadline.within(invocation.settings.watch_s))
