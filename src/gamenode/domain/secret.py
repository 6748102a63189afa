"""Secret values: where they may stand, what is shown in their place, which bytes of logs they hide.

Source: F11, rule RG3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

SHOWN: Final = "***"
"""What stands for a secret value wherever args are shown or recorded."""
VALUE_BYTES_MIN: Final = 4
"""Shorter values cannot be masked: they would stand in every other line."""
ADVICE: Final = 'give it a name in environment, and write "$NAME" in a script'


def may_hold_secrets(path: str) -> bool:
    """Return whether the text at `path` of a container is read by its own processes alone.

    Argument vectors, labels, names and paths are seen by every user of the host, and recorded.
    """
    return path.startswith("environment.")


def length_problem(value: str) -> tuple[str, str] | None:
    """Return why `value` is too short to be a secret, and what to give, or None."""
    if len(value.encode(errors="replace")) < VALUE_BYTES_MIN:
        return f"is shorter than {VALUE_BYTES_MIN} bytes, so it could not be masked in logs", (
            "give a longer one"
        )
    return None


def masked_texts(values: Iterable[str]) -> tuple[bytes, ...]:
    """Return what must not be seen of these values, longest first.

    That is each value without line breaks at its ends, since shells drop those; and each of its
    lines, since programs print a key or a certificate line by line. Lines that are too short to be
    told from others are left out, except within their value.
    """
    texts: set[bytes] = set()
    for value in values:
        encoded = value.encode(errors="replace").strip(b"\r\n")
        texts |= {encoded, *(line.strip() for line in encoded.split(b"\n"))}
    return tuple(
        sorted((t for t in texts if len(t) >= VALUE_BYTES_MIN), key=lambda t: (-len(t), t))
    )
