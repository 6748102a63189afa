"""From what people type to whole ids, and from the first letters to what they may type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from gamenode.cli.command import Invocation
from gamenode.cli.errors import ApiError
from gamenode.domain.errors import ErrorCode, GameNodeError, Violation

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

    from gamenode.cli.client import ApiClient, Body
    from gamenode.cli.settings import CliSettings

PART_CHARACTERS_MIN: Final = 4
_PAGE: Final = 1000
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_NODE: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", re.ASCII)


def pipeline_id(client: ApiClient, text: str, *, settings: CliSettings) -> str:
    """Return the id of the pipeline that `text` means: an id, a name, or a part of one.

    Raises:
        GameNodeError: INVALID_REQUEST where several are meant (they are named) or `text` is too
            short; PIPELINE_NOT_FOUND.
    """
    if _UUID.fullmatch(text.lower()):
        return text.lower()
    found = _search(client, "pipelines", "name", text, settings)
    return str(_only(found, "pipeline", "name", text, ErrorCode.PIPELINE_NOT_FOUND)["id"])


def node(client: ApiClient, text: str, *, settings: CliSettings) -> Body:
    """Return the node that `text` means: an id, a display name, or a part of one.

    Raises:
        GameNodeError: as `pipeline_id`; NODE_NOT_FOUND.
    """
    if _NODE.fullmatch(text):
        try:
            found_by_id: Body = client.get(f"/nodes/{text}")
        except ApiError as error:
            if error.code != ErrorCode.NODE_NOT_FOUND:
                raise
        else:
            return found_by_id
    found = _search(client, "nodes", "display_name", text, settings)
    return _only(found, "node", "display_name", text, ErrorCode.NODE_NOT_FOUND)


def token_id(client: ApiClient, text: str, *, settings: CliSettings) -> str:
    """Return the id of the token that `text` means: an id, a name, or a part of one.

    Raises:
        GameNodeError: as `pipeline_id`; NOT_FOUND.
    """
    if _UUID.fullmatch(text.lower()):
        return text.lower()
    found = _search(client, "tokens", "name", text, settings)
    return str(_only(found, "token", "name", text, ErrorCode.NOT_FOUND)["id"])


def complete_tokens(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return the tokens that `incomplete` may become, newest first."""
    return _complete(ctx, "/tokens", "name", incomplete)


def complete_pipelines(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return the pipelines that `incomplete` may become, newest first."""
    return _complete(ctx, "/pipelines", "name", incomplete)


def complete_nodes(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return the nodes that `incomplete` may become."""
    return _complete(ctx, "/nodes", "state", incomplete)


def _search(
    client: ApiClient, noun: str, name: str, text: str, settings: CliSettings
) -> list[Body]:
    if not text:
        raise GameNodeError(ErrorCode.INVALID_REQUEST, f"name one of the {noun}: it is empty")
    # Whole names come first: "game" means the one called so, whatever "game-2" there is.
    whole: list[Body] = []
    parts: list[Body] = []
    items = client.items(f"/{noun}", {"q": text, "limit": _PAGE})
    for item in islice(items, settings.search_items_max):
        texts = (str(item["id"]), str(item.get(name) or ""))
        if text in texts:
            whole.append(item)
        elif any(each.startswith(text) or each.endswith(text) for each in texts):
            parts.append(item)
        if len(whole) > settings.candidates_max:
            break
    if whole:
        return whole[: settings.candidates_max]
    if parts and len(text) < PART_CHARACTERS_MIN:
        raise GameNodeError(
            ErrorCode.INVALID_REQUEST,
            f"{text!r} is too short: give {PART_CHARACTERS_MIN} or more characters of id or name",
        )
    return parts[: settings.candidates_max]


def _only(found: list[Body], noun: str, name: str, text: str, missing: ErrorCode) -> Body:
    match found:
        case [one]:
            return one
        case []:
            raise GameNodeError(
                missing,
                f"no {noun} has an id or name that begins or ends with {text!r}",
                hint=f"gamenode {noun}s list shows them",
            )
        case _:
            raise GameNodeError(
                ErrorCode.INVALID_REQUEST,
                f"{text!r} may be any of several {noun}s",
                violations=[
                    Violation(field=str(item["id"]), reason=_known_by(item, name)) for item in found
                ],
                hint="give more of the id",
            )


def _known_by(item: Body, name: str) -> str:
    return " ".join(str(each) for each in (item.get(name), item.get("status")) if each)


def _complete(
    ctx: click.Context, path: str, help_field: str, incomplete: str
) -> list[CompletionItem[str]]:
    from click.shell_completion import CompletionItem  # noqa: PLC0415 - only for completion

    invocation = ctx.ensure_object(Invocation)
    settings = invocation.settings
    invocation.settings = replace(settings, connect_s=settings.completion_s)
    invocation.options.timeout = settings.completion_s
    invocation.options.verbose = invocation.options.debug_http = False
    try:
        items = _page(invocation.client, path, incomplete, settings.completions_max)
        return [CompletionItem(str(item["id"]), help=str(item[help_field])) for item in items]
    except Exception:  # noqa: BLE001 - somebody is typing: whatever is wrong, say nothing
        return []


def _page(client: ApiClient, path: str, incomplete: str, limit: int) -> Iterator[Any]:
    page = client.get(path, {"q": incomplete, "limit": limit})
    return (item for item in page["items"] if str(item["id"]).startswith(incomplete))
