"""A node's credentials for private registries: a file on the host, read for each pull.

They never leave the host but to the engine, and never stand in a log or a message.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gamenode.agent.runtime import StartError
from gamenode.agent.runtime.docker_reference import registry_of, registry_of_host
from gamenode.domain.pipeline import Reason

_FILE_BYTES_MAX: Final = 1024 * 1024
_UNSUPPORTED: Final = ("credsStore", "credHelpers")


def auth_header(image: str, file: Path) -> str | None:
    """Return the X-Registry-Auth of a pull of `image`; None where `file` has nothing for it.

    No file is no credentials. Reads the disk.

    Raises:
        StartError: IMAGE_PULL; the file cannot be used, with advice.
    """
    entries = _entries(file)
    wanted = registry_of(image)
    for key, entry in entries.items():
        if _registry_of_key(key) == wanted:
            credentials = {**_credentials(entry, f"auths.{key} of {file}"), "serveraddress": wanted}
            return base64.urlsafe_b64encode(json.dumps(credentials).encode()).decode()
    return None


def _entries(file: Path) -> Mapping[str, Any]:
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            _refuse_open_file(file, status)
            content = opened.read(_FILE_BYTES_MAX)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _unusable(f"{file} cannot be read: {error.strerror}") from error
    try:
        whole = json.loads(content)
    except ValueError as error:
        # Not its text, which may hold a password.
        raise _unusable(f"{file} is no JSON") from error
    if not isinstance(whole, dict) or not isinstance(whole.get("auths", {}), dict):
        raise _unusable(f'{file} must be an object with an object "auths"')
    for key in _UNSUPPORTED:
        if whole.get(key):
            raise _unusable(f'{file}: {key} is not supported; give the credentials in "auths"')
    entries: Mapping[str, Any] = whole.get("auths", {})
    return entries


def _refuse_open_file(file: Path, status: os.stat_result) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise _unusable(f"{file} is open to others (mode {mode:04o}): chmod 600 {file}")
    if status.st_uid not in {0, os.geteuid()}:
        raise _unusable(f"{file} belongs to user {status.st_uid}: chown root {file}")


def _credentials(entry: Any, where: str) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise _unusable(f"{where} must be an object")
    if token := entry.get("identitytoken"):
        return {"identitytoken": str(token)}
    username, password = entry.get("username"), entry.get("password")
    if encoded := entry.get("auth"):
        try:
            decoded = base64.b64decode(encoded, validate=True).decode()
        except (binascii.Error, TypeError, ValueError):
            raise _unusable(f"{where}: auth is no base64 of user:password") from None
        username, colon, password = decoded.partition(":")
        if not colon:
            raise _unusable(f"{where}: auth is no base64 of user:password")
    if not username or password is None:
        raise _unusable(f"{where} has neither auth nor username and password")
    return {"username": str(username), "password": str(password).rstrip("\0")}


def _registry_of_key(key: str) -> str:
    """Return the host that a key of `auths` means: old ones are addresses."""
    host = key.removeprefix("https://").removeprefix("http://").partition("/")[0]
    return registry_of_host(host)


def _unusable(why: str) -> StartError:
    return StartError(Reason.IMAGE_PULL, f"this node's registry credentials: {why}")
