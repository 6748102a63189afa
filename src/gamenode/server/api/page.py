"""Pages of lists: cursors, opaque to whoever hands them back."""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from typing import Annotated, Final, TypeVar

from msgspec import Meta

from gamenode.domain.errors import GameNodeError, invalid
from gamenode.lib.clock import Instant

LIMIT_MAX: Final = 1000
_INTEGER_MAX: Final = 2**63 - 1

Item = TypeVar("Item")

Limit = Annotated[int, Meta(ge=1, le=LIMIT_MAX, description="How many at most.")]
Cursor = Annotated[
    str, Meta(max_length=512, description="Where to go on: `next_cursor` of the page before.")
]


def split(found: Sequence[Item], limit: int) -> tuple[Sequence[Item], Item | None]:
    """Return a page of at most `limit`, and its last item if more follow, else None.

    Lists are asked for one item more than the page holds, so that no page ends with a cursor that
    leads to nothing.
    """
    page = found[:limit]
    return page, page[-1] if len(found) > limit else None


def node_cursor(node_id: str) -> str:
    """Return the cursor behind a node."""
    return _encode("node", node_id)


def read_node_cursor(cursor: str) -> str:
    """Return the node's id that `cursor` stands behind; empty for an empty cursor.

    Raises:
        GameNodeError: INVALID_REQUEST; this is no cursor of that list.
    """
    return _decode("node", cursor, parts=1)[0] if cursor else ""


def inventory_cursor(version: int) -> str:
    """Return the cursor behind a version of an inventory."""
    return _encode("inventory", str(version))


def read_inventory_cursor(cursor: str) -> int | None:
    """Return the version that `cursor` stands behind; None if it is empty.

    Raises:
        GameNodeError: INVALID_REQUEST; this is no cursor of that list.
    """
    if not cursor:
        return None
    (version,) = _decode("inventory", cursor, parts=1)
    if not version.isdecimal() or int(version) > _INTEGER_MAX:
        raise _no_cursor()
    return int(version)


def pipeline_cursor(created_at: Instant, pipeline_id: str) -> str:
    """Return the cursor behind a pipeline."""
    return _encode("pipeline", str(created_at), pipeline_id)


def read_pipeline_cursor(cursor: str) -> tuple[Instant, str] | None:
    """Return creation and id of the pipeline that `cursor` stands behind; None if it is empty.

    Raises:
        GameNodeError: INVALID_REQUEST; this is no cursor of that list.
    """
    if not cursor:
        return None
    created_at, pipeline_id = _decode("pipeline", cursor, parts=2)
    if not created_at.isdecimal() or int(created_at) > _INTEGER_MAX:
        raise _no_cursor()
    return Instant(int(created_at)), pipeline_id


def token_cursor(token_id: str) -> str:
    """Return the cursor behind a token."""
    return _encode("token", token_id)


def read_token_cursor(cursor: str) -> str:
    """Return the token's id that `cursor` stands behind; empty for an empty cursor.

    Raises:
        GameNodeError: INVALID_REQUEST; this is no cursor of that list.
    """
    return _decode("token", cursor, parts=1)[0] if cursor else ""


def audit_cursor(number: int) -> str:
    """Return the cursor behind an entry of the audit log."""
    return _encode("audit", str(number))


def read_audit_cursor(cursor: str) -> int | None:
    """Return the id of the entry that `cursor` stands behind; None if it is empty.

    Raises:
        GameNodeError: INVALID_REQUEST; this is no cursor of that list.
    """
    if not cursor:
        return None
    (number,) = _decode("audit", cursor, parts=1)
    if not number.isdecimal() or int(number) > _INTEGER_MAX:
        raise _no_cursor()
    return int(number)


def _encode(kind: str, *parts: str) -> str:
    return urlsafe_b64encode(" ".join((kind, *parts)).encode()).decode().rstrip("=")


def _decode(kind: str, cursor: str, *, parts: int) -> list[str]:
    try:
        # The padding that _encode took off; more of it than needed does not matter.
        text = urlsafe_b64decode(cursor + "===").decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise _no_cursor() from error
    found_kind, *found = text.split(" ")
    if found_kind != kind or len(found) != parts:
        raise _no_cursor()
    return found


def _no_cursor() -> GameNodeError:
    return invalid(
        "cursor", "is no cursor of this list", advice="leave it out to begin at the first page"
    )
