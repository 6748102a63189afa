"""The policy file, and where host paths lead."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gamenode.agent.policy import FilePolicy, OpenPolicy
from gamenode.agent.runtime import StartError
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.pipeline import ContainerSpec, Reason
from gamenode.domain.policy import ContainerRules, ProcessRules

DOCUMENT = Path(__file__).parents[3] / "docs" / "operations" / "node-policy.md"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it changes owners")


class Host:
    """A host's folders, and its policy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.games = folder / "games"
        self.secret = folder / "secret"
        self.games.mkdir()
        self.secret.mkdir()
        self.file = folder / "policy.toml"
        self.write(f'[containers]\nmounts = ["{self.games}"]\n')

    def write(self, text: str) -> None:
        """Replace the file, as its owner should."""
        new = self.folder / "policy.new"
        new.write_text(text)
        new.chmod(0o644)
        new.replace(self.file)

    def policy(self, envs: Mapping[str, str] | None = None) -> FilePolicy:
        return FilePolicy(self.file, envs=envs or {})


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


async def refusal(
    policy: FilePolicy | OpenPolicy, *, runtime: str = "docker", **given: object
) -> str:
    """Return what is said of a container that is refused."""
    with pytest.raises(StartError) as caught:
        await admitted(policy, runtime=runtime, **given)
    assert caught.value.reason is Reason.POLICY
    return caught.value.message


async def admitted(
    policy: FilePolicy | OpenPolicy, *, runtime: str = "docker", **given: object
) -> ContainerSpec:
    container = ContainerSpec(**{"image": "alpine", **given})  # type: ignore[arg-type]
    return await policy.admit(container, runtime=runtime)


# Mounts


async def test_a_folder_below_a_root_is_mounted(host: Host) -> None:
    (host.games / "one").mkdir()
    volumes = (f"{host.games}:/a", f"{host.games}//one/.:/b:ro", f"{host.games}/new/deep:/c")
    found = await admitted(host.policy(), volumes=volumes)
    assert found.volumes == (
        f"{host.games}:/a",
        f"{host.games}/one:/b:ro",
        f"{host.games}/new/deep:/c",
    )


async def test_a_refused_mount_names_the_path_and_the_roots(host: Host) -> None:
    message = await refusal(host.policy(), volumes=("/etc:/etc",))
    assert message == (
        f"volumes[0]: /etc is outside the allowed roots ({host.games});"
        " ask this node's owner: policy.toml"
    )


@pytest.mark.parametrize(
    "source",
    [
        "/",
        "//etc",
        "/etc/../etc",
        "{games}/../secret",
        "{games}/..",
        "{games}/one/../../secret",
        "{games}-and-more",
        "/proc/1/root/etc",
        "/proc/self/cwd",
        "/proc/self/root{games}/../secret",
        "{games}/to-secret",
        "{games}/to-secret/file",
        "{games}/to-secret/missing",
        "{games}/dangling",
        "{games}/dangling/deep",
        "{games}/circle",
        "{games}/circle/deep",
        "{games}/file/deep",
        "{games}/relative",
        # An engine takes `..` away before it follows links: this one is /etc to it.
        "{games}/far/../../../../../../../../../../etc",
    ],
)
async def test_no_path_leads_out_of_the_roots(host: Host, source: str) -> None:
    (host.games / "one").mkdir()
    (host.games / "file").touch()
    (host.secret / "file").touch()
    (host.games / "to-secret").symlink_to(host.secret)
    (host.games / "dangling").symlink_to(host.secret / "not-yet")
    (host.games / "circle").symlink_to(host.games / "circle")
    (host.games / "relative").symlink_to("../secret")
    (host.games / "a/b/c/d/e/f/g/h/i/j/k").mkdir(parents=True)
    (host.games / "far").symlink_to(host.games / "a/b/c/d/e/f/g/h/i/j/k")
    message = await refusal(host.policy(), volumes=(f"{source.format(games=host.games)}:/x",))
    assert message.startswith("volumes[0]: ")


async def test_a_link_within_the_roots_is_mounted_as_what_it_leads_to(host: Host) -> None:
    (host.games / "v2").mkdir()
    (host.games / "current").symlink_to("v2")
    found = await admitted(host.policy(), volumes=(f"{host.games}/current:/x",))
    assert found.volumes == (f"{host.games}/v2:/x",)


async def test_a_link_put_in_place_of_a_missing_folder_is_seen_the_next_time(host: Host) -> None:
    policy = host.policy()
    volumes = (f"{host.games}/later:/x",)
    await admitted(policy, volumes=volumes)
    (host.games / "later").symlink_to(host.secret)
    assert f"which is {host.secret}" in await refusal(policy, volumes=volumes)


async def test_a_root_that_a_step_could_make_a_link_allows_nothing_else(host: Host) -> None:
    maps = host.games / "maps"
    host.write(f'[containers]\nmounts = ["{host.games}", "{maps}"]\n')
    policy = host.policy({"MAPS": str(maps)})
    await admitted(policy, volumes=(f"{maps}:/x",))
    maps.symlink_to(host.secret)  # as whoever has the games mounted can
    message = await refusal(policy, volumes=(f"{host.secret}:/x",))
    assert f"roots ({host.games}, {maps}, which has a link in it" in message
    await refusal(policy, volumes=(f"{maps}:/x",))


async def test_a_name_with_a_colon_is_not_handed_to_an_engine(host: Host) -> None:
    (host.games / "a:").mkdir()
    (host.games / "plain").symlink_to("a:")
    assert "colon" in await refusal(host.policy(), volumes=(f"{host.games}/plain:/x",))


async def test_folders_that_the_nodes_own_envs_name_may_be_mounted(host: Host) -> None:
    wind = host.folder / "wind"
    wind.mkdir()
    envs = {"WIND_ROOT": str(wind), "ALL": "/", "SLASHES": "//.", "A_FILE": str(host.file)}
    await admitted(host.policy(envs), volumes=(f"{wind}/maps:/maps",))
    await refusal(host.policy(envs), volumes=("/etc:/x",))
    await refusal(host.policy(envs), volumes=(f"{host.file}:/x",))
    host.write("[containers]\nmounts = []\nmount_envs = false\n")
    assert "roots (none)" in await refusal(host.policy(envs), volumes=(f"{wind}:/x",))


# Devices


@pytest.mark.parametrize(
    ("rule", "device", "becomes"),
    [
        ("/dev/null", "/dev/null", "/dev/null:/dev/null:rwm"),
        ("/dev/nul?", "/dev/null:/dev/x:r", "/dev/null:/dev/x:r"),
        ("{folder}/by-id", "{folder}/by-id", "/dev/null:{folder}/by-id:rwm"),
        ("/dev/null", "{folder}/by-id", "/dev/null:{folder}/by-id:rwm"),
    ],
)
async def test_a_device_is_allowed_by_what_it_is(
    host: Host, rule: str, device: str, becomes: str
) -> None:
    (host.folder / "by-id").symlink_to("/dev/null")
    host.write(f'[containers]\ndevices = ["{rule.format(folder=host.folder)}"]\n')
    found = await admitted(host.policy(), devices=(device.format(folder=host.folder),))
    assert found.devices == (becomes.format(folder=host.folder),)


@pytest.mark.parametrize(
    "device",
    [
        "/dev/zero",
        "/dev/dri/../zero",
        "/dev",
        "/proc/1/root/dev/zero",
        "{folder}/link",
        "null",
        "vendor.com/class=all",
        "/dev/dri/card0:/dev/x:rwx",
        "/dev/dri/card0:/dev/x:r:w",
    ],
)
async def test_no_other_device_is_had_by_another_name(host: Host, device: str) -> None:
    (host.folder / "link").symlink_to("/dev/zero")
    host.write('[containers]\ndevices = ["/dev/dri/*", "/dev/null"]\n')
    message = await refusal(host.policy(), devices=(device.format(folder=host.folder),))
    assert message.startswith("devices[0]: ")


# Processes


async def test_plain_processes_can_be_refused(host: Host) -> None:
    await admitted(host.policy(), runtime="process", privileged=True)
    host.write("[process]\nallowed = false\n")
    assert "runs no plain processes" in await refusal(host.policy(), runtime="process")
    await admitted(host.policy(), runtime="docker")


@needs_root
@pytest.mark.parametrize(
    ("users", "user", "allowed"),
    [
        ('["*"]', "", True),
        ('["*"]', "root:root", True),
        ('["nobody"]', "nobody", True),
        ('["nobody"]', "{uid}", True),
        ('["{uid}"]', "nobody", True),
        ('["nobody"]', "nobody:{gid}", True),
        ('["nobody"]', "nobody:root", False),
        ('["nobody:root"]', "nobody:0", True),
        ('["nobody:root"]', "nobody", False),
        ('["nobody"]', "", False),
        ('["nobody"]', "root", False),
        ('["nobody"]', "0", False),
        ('["nobody"]', "\N{ARABIC-INDIC DIGIT ZERO}", False),
        ('["None"]', "no-such-user", False),
        ('["None"]', "no\0body", False),
        ('["nobody"]', "nobody:no\0group", False),
        ('["nobody"]', "99999999999999999999", False),
        ('["nobody"]', "9" * 5000, False),
        ('["nobody"]', "nobody:no-such-group", False),
        ('["4000000"]', "4000000", True),
        ('["4000000"]', "4000000:0", False),
        ('["root"]', "", True),
    ],
)
async def test_a_process_runs_only_as_a_listed_user(
    host: Host, users: str, user: str, allowed: bool
) -> None:
    nobody = pwd.getpwnam("nobody")
    numbers = {"uid": nobody.pw_uid, "gid": nobody.pw_gid}
    host.write(f"[process]\nusers = {users.format(**numbers)}\n")
    container = {"runtime": "process", "user": user.format(**numbers)}
    if allowed:
        await admitted(host.policy(), **container)
    else:
        assert (await refusal(host.policy(), **container)).startswith("user: ")


@needs_root
async def test_no_variable_reaches_the_program_that_changes_the_user(host: Host) -> None:
    host.write('[process]\nusers = ["nobody", "root"]\n')
    for name in ("LD_PRELOAD", "LD_AUDIT", "GCONV_PATH", "MALLOC_TRACE", "GLIBC_TUNABLES"):
        given: dict[str, Any] = {
            "runtime": "process",
            "environment": {name: "/tmp/evil.so"},
        }
        message = await refusal(host.policy(), user="nobody", **given)
        assert message.startswith(f"environment.{name}: ")
        await admitted(host.policy(), user="root", **given)  # it is that program's own user


# The file


async def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    policy = FilePolicy(tmp_path / "none" / "policy.toml", envs={})
    await admitted(policy)
    assert "/var/lib/gamenode/volumes" in await refusal(policy, volumes=("/srv:/x",))


async def test_a_change_counts_for_the_next_start(host: Host) -> None:
    policy = host.policy()
    await refusal(policy, privileged=True)
    host.write("[containers]\nprivileged = true\n")
    await admitted(policy, privileged=True)
    host.file.unlink()
    await refusal(policy, privileged=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[containers]\nprivilegd = true\n", "did you mean containers.privileged?"),
        ("[container]\n", "did you mean containers?"),
        ('[containers]\nprivileged = "perhaps"\n', "must be true or false"),
        ("[containers]\nmounts = [5]\n", "must be a text"),
        ('[containers]\nmounts = ["srv"]\n', "'srv' is not an absolute path"),
        ('[containers]\nmounts = ["/srv/../etc"]\n', "is not an absolute path"),
        ('[containers]\nmounts = ["/srv\\u0000"]\n', "is not an absolute path"),
        ("containers", "policy.toml"),
        ("#" * 70_000, "longer than"),
    ],
)
async def test_a_broken_file_stops_every_start_and_says_why(
    host: Host, text: str, says: str
) -> None:
    policy = host.policy()
    host.write(text)
    assert says in await refusal(policy)
    with pytest.raises(GameNodeError) as caught:
        host.policy()
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert says in caught.value.message
    host.write("")
    await admitted(policy)


async def test_a_file_that_others_may_write_to_stops_every_start(host: Host) -> None:
    policy = host.policy()
    for mode in (0o664, 0o646):
        host.file.chmod(mode)
        assert "written to by others" in await refusal(policy)
        with pytest.raises(GameNodeError) as caught:
            host.policy()
        assert caught.value.hint == f"chmod go-w {host.file}"
    host.file.chmod(0o600)
    host.folder.chmod(0o777)
    with pytest.raises(GameNodeError) as caught:
        host.policy()
    assert caught.value.hint == f"chmod go-w {host.folder}"


@needs_root
async def test_a_file_of_another_user_stops_every_start(host: Host) -> None:
    policy = host.policy()
    os.chown(host.file, 12345, 0)
    assert "belongs to user 12345" in await refusal(policy)


async def test_a_pipe_in_its_place_keeps_nobody_waiting(host: Host) -> None:
    host.file.unlink()
    os.mkfifo(host.file)
    with pytest.raises(GameNodeError, match="is not a file"):
        host.policy()


async def test_what_stands_open_still_keeps_the_labels_of_runs() -> None:
    policy = OpenPolicy()
    await admitted(policy, privileged=True, volumes=("/:/host",))
    message = await refusal(policy, labels={"gamenode.pipeline": "x"})
    assert message == "labels.gamenode.pipeline: labels gamenode.* are the agent's own"


def test_every_rule_stands_in_the_document() -> None:
    text = DOCUMENT.read_text()
    for rules in (ContainerRules, ProcessRules):
        for field in fields(rules):
            assert f"| `{field.name}` |" in text
