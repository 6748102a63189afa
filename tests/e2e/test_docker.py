"""The same pipelines in containers, on a real engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.cluster import Cluster, Done, cluster_in, counted, counting, eventually, pipeline
from tests.support.engine import IMAGE, Engine

pytestmark = pytest.mark.docker


def _step(name: str, *commands: str, **more: object) -> dict[str, object]:
    return {"name": name, "container": {"image": IMAGE, "commands": list(commands)}, **more}


def _containers(engine: Engine, *, all_: bool) -> list[str]:
    return engine.docker("ps", "-q", *(["-a"] if all_ else [])).split()


@pytest.fixture(scope="module")
def contained(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server, and the agent of a node that runs steps in containers."""
    with cluster_in(
        tmp_path_factory.mktemp("cluster"), AGENT__ENGINE_SOCKET=str(engine.socket)
    ) as made:
        made.server()
        made.agent("n1", "--runtime", "docker")
        yield made
        for container in _containers(engine, all_=True):
            engine.docker("rm", "-f", container)


def test_a_three_step_file_runs_in_containers(contained: Cluster, engine: Engine) -> None:
    done = contained.run(
        pipeline(
            _step("fetch", "echo fetched"),
            _step("unpack", "cat /etc/hostname >/dev/null"),
            _step("go", counting(20, pause_s=0)),
        )
    )
    assert done.exit_code == 0, done
    assert done.stdout == "fetched\n" + counted(20)
    eventually(lambda: not _containers(engine, all_=True), "the containers are removed")


def test_a_failing_container_is_named_with_its_exit_code_and_last_lines(contained: Cluster) -> None:
    done = contained.run(pipeline(_step("bad", "echo last words", "exit 7")))
    assert done.exit_code == 3
    assert "exit code 7" in done.stderr
    assert "last words" in done.stderr.rpartition("step bad: FAILED")[2]


def test_an_image_that_is_not_there_fails_the_step_and_says_which(contained: Cluster) -> None:
    bad = {
        "name": "a",
        "container": {"image": "no-such-image:1", "pull_policy": "never", "command": ["true"]},
    }
    done = contained.run(pipeline(bad))
    assert done.exit_code == 3
    assert "no-such-image:1" in done.stderr


def test_a_cancel_ends_a_container(contained: Cluster, engine: Engine) -> None:
    run = contained.run_unawaited(pipeline(_step("long", "echo here", "sleep 600")))
    pipeline_id = contained.pipeline_of(run)
    eventually(lambda: "here" in run.stdout, "the step prints")
    assert contained.command("pipelines", "cancel", pipeline_id).exit_code == 0
    assert run.done(10.0).exit_code == 3
    assert not _containers(engine, all_=False)


def test_a_container_outlives_a_kill_of_its_agent_and_is_adopted(
    contained: Cluster, engine: Engine
) -> None:
    run = contained.run_unawaited(pipeline(_step("count", counting(100, pause_s=0.02))))
    eventually(lambda: "line 10\n" in run.stdout, "the step prints")
    before = _containers(engine, all_=False)
    contained.started[1].kill()
    contained.agent("n1", "--runtime", "docker")
    done = run.done()
    assert (done.exit_code, done.stdout) == (0, counted(100))
    assert len(before) == 1


def test_a_service_container_lives_on(contained: Cluster, engine: Engine) -> None:
    done = contained.run(pipeline(_step("game", "sleep 600", type="service")))
    assert done.exit_code == 0, done
    assert len(_containers(engine, all_=False)) == 1


def test_a_host_gives_what_its_policy_allows_and_nothing_else(contained: Cluster) -> None:
    games = contained.folder / "games"
    games.mkdir()
    (games / "map").write_text("arena\n")
    (games / "out").symlink_to("/etc")
    file = contained.folder / "policy.toml"
    file.write_text(f'[containers]\nmounts = ["{games}"]\n')
    contained.agent("n2", "--runtime", "docker", AGENT__POLICY=str(file))

    def run(volume: str) -> Done:
        step = _step("one", "cat /data/map")
        step["container"] |= {"volumes": [volume]}  # type: ignore[operator]
        return contained.run(pipeline(step), "--node", "n2")

    assert run(f"{games}:/data:ro").stdout == "arena\n"
    for volume in (f"{games}/out:/data", f"{games}/../games/out:/data", "/etc:/data"):
        done = run(volume)
        assert done.exit_code == 3
        assert "POLICY" in done.stderr
        assert f"ask this node's owner: {file.name}" in done.stderr
