"""What an image's reference means: which registry, which repository, which tag.

Source: https://github.com/distribution/reference (the grammar that every engine shares).
"""

from __future__ import annotations

from typing import Final

HUB: Final = "docker.io"
_HUB_HOSTS: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})


def registry_of(image: str) -> str:
    """Return the host of an image's registry, with its port where it names one."""
    first, slash, _ = image.partition("/")
    if not slash or (first != "localhost" and not set(".:") & set(first)):
        return HUB
    return registry_of_host(first)


def registry_of_host(host: str) -> str:
    """Return the one name of a registry that has several."""
    return HUB if host in _HUB_HOSTS else host


def is_exact(image: str) -> bool:
    """Return whether a reference names a tag or a digest."""
    return bool(set(":@") & set(image.rpartition("/")[2]))


def canonical(image: str) -> str:
    """Return a reference in full: `alpine` means `docker.io/library/alpine:latest`."""
    registry = registry_of(image)
    first, slash, rest = image.partition("/")
    path = rest if slash and registry_of_host(first) == registry else image
    if registry == HUB and "/" not in path:
        path = f"library/{path}"
    return f"{registry}/{path}{'' if is_exact(image) else ':latest'}"
