"""A secret on its whole way, with real programs: it is nowhere but where it must be (RG3)."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import Cluster, cluster_in, eventually, pipeline
from tests.support.engine import IMAGE, Engine

VALUE = "correct-horse-battery-staple"
ENV_VALUE = "node-key-4711-of-this-host"
STARS = "*" * len(VALUE)


@pytest.fixture
def secret(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("mine") / "token"
    path.write_text(f"{VALUE}\n")
    return f"T=@{path}"


def file(**container: Any) -> str:
    step = {
        "name": "one",
        "container": {
            "environment": {"NAMED": "Bearer ${{ args.T }}"},
            "commands": [
                'echo "named $NAMED"',
                "echo given ${{ args.T }} >&2",
                'printf %s "${{ args.T }}" | fold -w 5 | tr -d "\\n"; echo',
                "echo env ${{ envs.KEY }}",
                "while [ ! -e go ]; do sleep 0.05; done",
                "echo done",
            ],
            **container,
        },
    }
    args = [{"name": "T", "type": "secret"}]
    return pipeline(step, args=args, envs=["KEY"])


def holding(folder: Path) -> list[Path]:
    """Return the files below `folder` that hold a secret."""
    values = (VALUE.encode(), ENV_VALUE.encode())
    found = []
    for path in folder.rglob("*"):
        try:
            content = path.read_bytes() if path.is_file() else b""
        except FileNotFoundError:
            continue
        if any(value in content for value in values):
            found.append(path)
    return found


def command_lines() -> list[str]:
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines.append((entry / "cmdline").read_text(errors="replace"))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return lines


def bodies(cluster: Cluster, pipeline_id: str) -> str:
    paths = (
        f"/pipelines/{pipeline_id}",
        "/pipelines",
        "/events",
        "/audit",
        "/nodes/n1",
    )
    return json.dumps([cluster.get(path) for path in paths])


def assert_nowhere_but_private(cluster: Cluster, pipeline_id: str) -> None:
    agent_folder = cluster.folder / "agents" / "n1"
    for path in holding(cluster.folder):
        # The agent's own file, and what the run itself was given and has printed.
        kept = path.relative_to(agent_folder).parts[0]
        assert kept in {"secrets", "runs"}, path
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    shown = "\n".join([bodies(cluster, pipeline_id), *command_lines()])
    assert VALUE not in shown
    assert ENV_VALUE not in shown
    assert '"T": "***"' in bodies(cluster, pipeline_id)


def config(cluster: Cluster) -> str:
    # Not where this test looks for values: it is where the host's owner put one.
    path = cluster.folder.parent / f"{cluster.folder.name}-agent.toml"
    path.write_text(f'[envs]\nsecret = ["KEY"]\nvalues = {{ KEY = "{ENV_VALUE}" }}\n')
    return str(path)


def run_to_its_end(cluster: Cluster, run: Any, go: Any) -> None:
    pipeline_id = cluster.pipeline_of(run)
    eventually(lambda: "env " in run.stdout, "the step has printed")
    assert_nowhere_but_private(cluster, pipeline_id)
    go()
    done = run.done()
    assert done.exit_code == 0, done
    printed = cluster.log(pipeline_id, "one").splitlines()
    assert sorted(printed) == sorted(
        [
            f"named Bearer {STARS}",
            f"given {STARS}",
            STARS,
            f"env {'*' * len(ENV_VALUE)}",
            "done",
        ]
    )
    eventually(lambda: not holding(cluster.folder), "nothing holds the secrets any more")
    assert_nowhere_but_private(cluster, pipeline_id)


def test_a_secret_of_a_process_is_nowhere_but_where_it_must_be(
    cluster: Cluster, secret: str
) -> None:
    debug = {"AGENT__LOG_LEVEL": "debug"}
    cluster.server(SERVER__LOG_LEVEL="debug")
    agent = cluster.agent("n1", "--config", config(cluster), **debug)
    run = cluster.run_unawaited(file(), "-a", secret)

    def go() -> None:
        # A new agent goes on masking what the old one's step prints.
        agent.kill()
        cluster.agent("n1", "--config", config(cluster), **debug)
        [work] = (cluster.folder / "agents" / "n1" / "runs").glob("[!.]*/work")
        (work / "go").touch()

    run_to_its_end(cluster, run, go)
    key = cluster.folder / "server" / "secrets.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.stat().st_size == 32


@pytest.mark.docker
def test_a_secret_of_a_container_is_nowhere_but_with_the_engine(
    engine: Engine, secret: str, tmp_path: Path
) -> None:
    with cluster_in(tmp_path, AGENT__ENGINE_SOCKET=str(engine.socket)) as cluster:
        cluster.server()
        cluster.agent("n1", "--runtime", "docker", "--config", config(cluster))
        run = cluster.run_unawaited(file(image=IMAGE), "-a", secret)

        def go() -> None:
            [container] = engine.docker("ps", "-q").split()
            assert VALUE not in engine.docker("inspect", "-f", "{{json .Config.Labels}}", container)
            assert VALUE not in engine.docker("inspect", "-f", "{{.Path}} {{.Args}}", container)
            engine.docker("exec", container, "touch", "go")

        run_to_its_end(cluster, run, go)


def test_a_wrong_secret_is_refused_without_being_repeated(shared: Cluster, tmp_path: Path) -> None:
    short = shared.run(file(), "-a", "T=abc")
    assert short.exit_code == 2
    assert "args.T: is shorter than 4 bytes" in short.stderr
    (tmp_path / "nul").write_bytes(f"{VALUE}\0".encode())
    refused = shared.run(file(), "-a", f"T=@{tmp_path / 'nul'}")
    assert refused.exit_code == 2
    assert VALUE not in f"{refused}"
    assert not any(VALUE in started.stderr for started in shared.started)
