from __future__ import annotations

import socket
from pathlib import Path
from random import Random

import pytest

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import SystemClock
from gamenode.lib.ids import UuidV7
from gamenode.server.app import Server
from gamenode.server.settings import ListenSettings, ServerSettings


def make_server(data: Path, **addresses: str) -> Server:
    listening = ListenSettings(
        **{"http": "127.0.0.1:0", "grpc": "127.0.0.1:0", **addresses},  # type: ignore[arg-type] # texts
        data=data,
    )
    clock = SystemClock()
    return Server(
        ServerSettings(server=listening), clock=clock, ids=UuidV7(clock), random=Random(1)
    )


async def test_the_key_of_the_audit_log_is_its_owners_and_stays(tmp_path: Path) -> None:
    await make_server(tmp_path).stop()
    key = tmp_path / "audit.key"
    first = key.read_bytes()
    assert (len(first), key.stat().st_mode & 0o777) == (32, 0o600)
    await make_server(tmp_path).stop()
    assert key.read_bytes() == first


async def test_a_key_that_is_none_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "audit.key").write_bytes(b"")
    with pytest.raises(GameNodeError, match=r"audit\.key") as refused:
        make_server(tmp_path)
    assert refused.value.code is ErrorCode.CONFLICT
    assert "backup" in refused.value.hint
    assert (tmp_path / "audit.key").read_bytes() == b""


@pytest.mark.parametrize("face", ["http", "grpc"])
async def test_a_taken_address_is_named_with_the_flag_that_changes_it(
    face: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = make_server(tmp_path, **{face: address})
        with pytest.raises(GameNodeError, match=address) as refused:
            await server.start()
        assert "Address already in use" in refused.value.message
        assert f"--{face}" in refused.value.hint
        await server.stop()
    assert capfd.readouterr().err == ""
