"""The file with a node's credentials: who may read it, what it may hold."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from gamenode.agent.runtime import StartError
from gamenode.agent.runtime.docker_auth import auth_header
from gamenode.agent.runtime.docker_reference import canonical, registry_of
from gamenode.domain.pipeline import Reason

ENCODED = base64.b64encode(b"u:p:q").decode()


def file_of(folder: Path, content: object, *, mode: int = 0o600) -> Path:
    file = folder / "auth.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    file.chmod(mode)
    return file


def sent(header: str | None) -> dict[str, Any]:
    assert header is not None
    decoded: dict[str, Any] = json.loads(base64.urlsafe_b64decode(header))
    return decoded


@pytest.mark.parametrize(
    ("image", "key"),
    [
        ("r.example/a/b:1", "r.example"),
        ("r.example:5000/a", "https://r.example:5000/v2/"),
        ("localhost/a", "localhost"),
        ("alpine", "https://index.docker.io/v1/"),
        ("docker.io/a/b", "docker.io"),
        ("a/b", "index.docker.io"),
    ],
)
def test_credentials_are_found_by_registry(tmp_path: Path, image: str, key: str) -> None:
    file = file_of(tmp_path, {"auths": {"other.example": {}, key: {"auth": ENCODED}}})
    credentials = sent(auth_header(image, file))
    assert (credentials["username"], credentials["password"]) == ("u", "p:q")


def test_an_identity_token_stands_alone(tmp_path: Path) -> None:
    file = file_of(tmp_path, {"auths": {"r.example": {"auth": "", "identitytoken": "t"}}})
    assert sent(auth_header("r.example/a", file)) == {
        "identitytoken": "t",
        "serveraddress": "r.example",
    }


def test_other_registries_get_nothing(tmp_path: Path) -> None:
    file = file_of(tmp_path, {"auths": {"r.example": {"auth": ENCODED}}})
    for image in ("alpine", "r.example.evil/a", "r.example:444/a", "evil/r.example/a"):
        assert auth_header(image, file) is None
    assert auth_header("r.example/a", tmp_path / "absent.json") is None


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ("{", "no JSON"),
        ([], "auths"),
        ({"auths": []}, "auths"),
        ({"auths": {"r.example": "x"}}, "must be an object"),
        ({"auths": {"r.example": {}}}, "neither auth nor username"),
        ({"auths": {"r.example": {"username": "u"}}}, "neither auth nor username"),
        ({"auths": {"r.example": {"auth": "???"}}}, "no base64"),
        ({"auths": {"r.example": {"auth": base64.b64encode(b"hush").decode()}}}, "no base64"),
        ({"credsStore": "desktop"}, "credsStore is not supported"),
        ({"credHelpers": {"r.example": "ecr"}}, "credHelpers is not supported"),
    ],
)
def test_what_cannot_be_used_says_why(tmp_path: Path, content: object, advice: str) -> None:
    file = file_of(tmp_path, content)
    with pytest.raises(StartError, match=advice) as caught:
        auth_header("r.example/a", file)
    assert caught.value.reason is Reason.IMAGE_PULL
    assert str(file) in caught.value.message
    assert "hush" not in caught.value.message


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o666])
def test_a_file_that_others_can_read_is_refused_with_advice(tmp_path: Path, mode: int) -> None:
    file = file_of(tmp_path, {"auths": {}}, mode=mode)
    with pytest.raises(StartError, match=f"chmod 600 {file}"):
        auth_header("alpine", file)


def test_a_file_of_somebody_else_is_refused_with_advice(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    file = file_of(tmp_path, {"auths": {}})
    os.chown(file, 12345, -1)
    with pytest.raises(StartError, match="chown root"):
        auth_header("alpine", file)


@pytest.mark.parametrize(
    ("image", "registry", "full"),
    [
        ("alpine", "docker.io", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io", "docker.io/library/alpine:3.20"),
        ("a/b", "docker.io", "docker.io/a/b:latest"),
        ("index.docker.io/a", "docker.io", "docker.io/library/a:latest"),
        ("localhost/a:1", "localhost", "localhost/a:1"),
        ("r:5000/a", "r:5000", "r:5000/a:latest"),
        ("r.example/a/b@sha256:0", "r.example", "r.example/a/b@sha256:0"),
    ],
)
def test_a_reference_is_told_apart(image: str, registry: str, full: str) -> None:
    assert registry_of(image) == registry
    assert canonical(image) == full
