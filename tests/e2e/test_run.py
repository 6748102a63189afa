"""What operators do with pipelines, on one server and one agent."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import Cluster, counted, counting, eventually, pipeline, step

CANCEL_S_MAX = 10.0
AT_ONCE = 100


def _steps(ended: Any, field: str) -> dict[str, Any]:
    return {each["name"]: each[field] for each in ended["steps"]}


def test_a_three_step_file_runs_in_order_with_its_log_on_the_terminal(shared: Cluster) -> None:
    done = shared.run(
        pipeline(
            step("fetch", "echo fetched"),
            step("unpack", "echo a", "echo b"),
            step("go", "echo gone"),
        )
    )
    assert done.exit_code == 0, done
    assert done.stdout == "fetched\na\nb\ngone\n"
    assert done.stderr.index("fetch: COMPLETED") < done.stderr.index("unpack: COMPLETED")
    assert "COMPLETED" in done.stderr.splitlines()[-1]


def test_a_failing_step_is_named_with_its_exit_code_and_its_last_lines(shared: Cluster) -> None:
    done = shared.run(
        pipeline(step("first", "echo well"), step("second", counting(30, pause_s=0), "exit 7"))
    )
    assert done.exit_code == 3
    after = done.stderr.rpartition("step second: FAILED")[2]
    assert "exit code 7" in after
    assert "line 30" in after
    assert "line 21" in after


def test_an_invalid_file_is_refused_with_its_lines(shared: Cluster) -> None:
    done = shared.run("name: x\nsteps:\n  - name: a\n    contaner: {}\n    when: never\n")
    assert done.exit_code == 2
    assert ":4:5: steps[0].contaner" in done.stderr
    assert "did you mean container?" in done.stderr
    assert ":5:11: steps[0].when" in done.stderr
    assert not done.stdout


def test_cancel_from_a_second_terminal_ends_a_long_step_and_leaves_nothing(
    shared: Cluster,
) -> None:
    run = shared.run_unawaited(pipeline(step("long", "echo here", "sleep 600")))
    pipeline_id = shared.pipeline_of(run)
    eventually(lambda: "here" in run.stdout, "the step prints")
    assert shared.command("pipelines", "cancel", pipeline_id).exit_code == 0
    done = run.done(CANCEL_S_MAX)
    assert done.exit_code == 3
    assert "CANCELLED" in done.stderr.splitlines()[-1]
    eventually(lambda: not shared.steps(), "no process of the step lives")


def test_detach_prints_the_id_and_leaves_the_pipeline_running(shared: Cluster) -> None:
    done = shared.run(pipeline(step("a", "sleep 0.5")), "--detach")
    assert done.exit_code == 0
    assert shared.ended(done.stdout.strip())["status"] == "COMPLETED"


def test_ctrl_c_detaches_and_never_cancels(shared: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    run = shared.run_unawaited(
        pipeline(step("a", "echo here", f"until [ -e {go} ]; do sleep 0.05; done", "echo there"))
    )
    eventually(lambda: "here" in run.stdout, "the step prints")
    assert run.stop(signal.SIGINT) == 130
    pipeline_id = shared.pipeline_of(run)
    assert f"gamenode logs -f {pipeline_id}" in run.stderr
    assert shared.get(f"/pipelines/{pipeline_id}")["status"] == "RUNNING"
    go.touch()
    assert shared.ended(pipeline_id)["status"] == "COMPLETED"
    assert shared.log(pipeline_id, "a") == "here\nthere\n"


def test_a_hundred_pipelines_at_once_all_end_and_none_starts_twice(
    shared: Cluster, tmp_path: Path
) -> None:
    starts = tmp_path / "starts"
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ids = list(
            pool.map(
                lambda n: shared.create(
                    pipeline(step("a", f"echo {n} >>{starts}"), name=f"many-{n}"), key=f"many-{n}"
                ),
                range(AT_ONCE),
            )
        )
    assert {shared.ended(each)["status"] for each in ids} == {"COMPLETED"}
    assert sorted(map(int, starts.read_text().split())) == list(range(AT_ONCE))


def test_the_same_key_twice_makes_one_pipeline(shared: Cluster, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    file = pipeline(step("a", f"echo once >>{starts}"))
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: shared.create(file, key="one"), range(8)))
    assert len(ids) == 1
    assert shared.ended(ids.pop())["status"] == "COMPLETED"
    assert starts.read_text() == "once\n"


def test_another_body_under_a_used_key_is_a_conflict(shared: Cluster) -> None:
    shared.create(pipeline(step("a", "true")), key="used")
    other = {"file": pipeline(step("b", "true"))}
    answer = shared.request("POST", "/api/v1/pipelines", other, headers={"idempotency-key": "used"})
    assert (answer.status, answer.json["code"]) == (409, "CONFLICT")
    assert shared.run(pipeline(step("b", "true")), "--key", "used").exit_code == 6


def test_a_service_lives_on_after_its_pipeline_completed(shared: Cluster, tmp_path: Path) -> None:
    pid, enough = tmp_path / "pid", tmp_path / "enough"
    service = step(
        "game",
        "echo up",
        f"echo $$ >{pid}",
        f"until [ -e {enough} ]; do sleep 0.05; done",
        type="service",
    )
    done = shared.run(pipeline(service))
    assert done.exit_code == 0, done
    game = int(pid.read_text())
    assert game in shared.steps()
    enough.touch()
    eventually(lambda: game not in shared.steps(), "the service ends when it wants to")


def test_a_service_that_ends_at_once_fails_its_step(shared: Cluster) -> None:
    ended = shared.ended(shared.create(pipeline(step("game", "exit 0", type="service"))))
    assert ended["status"] == "FAILED"
    assert "must go on running" in ended["steps"][0]["message"]


@pytest.mark.parametrize(("exit_code", "repaired"), [(0, "CANCELLED"), (4, "COMPLETED")])
def test_steps_run_when_their_condition_holds(
    shared: Cluster, exit_code: int, repaired: str
) -> None:
    ended = shared.ended(
        shared.create(
            pipeline(
                step("work", f"exit {exit_code}"),
                step("next", "true"),
                step("repair", "true", when="failure"),
                step("tidy", "true", when="always"),
            )
        )
    )
    statuses = _steps(ended, "status")
    assert statuses["repair"] == repaired
    assert statuses["tidy"] == "COMPLETED"
    assert statuses["next"] == ("CANCELLED" if exit_code else "COMPLETED")
    assert ended["status"] == ("FAILED" if exit_code else "COMPLETED")


def test_a_clean_up_step_runs_after_a_cancel(shared: Cluster) -> None:
    pipeline_id = shared.create(
        pipeline(step("long", "sleep 600"), step("tidy", "echo tidied", when="always"))
    )
    shared.until_step(pipeline_id, "long", "RUNNING")
    shared.request("POST", f"/api/v1/pipelines/{pipeline_id}:cancel", {"reason": "enough"})
    ended = shared.ended(pipeline_id)
    assert ended["status"] == "CANCELLED"
    assert _steps(ended, "status") == {"long": "CANCELLED", "tidy": "COMPLETED"}
    assert shared.log(pipeline_id, "tidy") == "tidied\n"


def test_a_step_ends_at_its_timeout(shared: Cluster) -> None:
    ended = shared.ended(shared.create(pipeline(step("long", "sleep 600", timeout="1s"))))
    assert ended["status"] == "FAILED"
    assert _steps(ended, "reason") == {"long": "TIMEOUT"}
    eventually(lambda: not shared.steps(), "no process of the step lives")


def test_a_pipeline_ends_at_its_timeout_and_what_follows_never_starts(shared: Cluster) -> None:
    ended = shared.ended(
        shared.create(pipeline(step("long", "sleep 600"), step("next", "true"), timeout="1s"))
    )
    assert (ended["status"], ended["reason"]) == ("FAILED", "TIMEOUT")
    assert _steps(ended, "status") == {"long": "FAILED", "next": "CANCELLED"}


def test_a_step_is_tried_again_with_numbered_attempts(shared: Cluster, tmp_path: Path) -> None:
    tries = tmp_path / "tries"
    flaky = step(
        "flaky",
        f"echo x >>{tries}",
        f'echo "try $(wc -l <{tries})"',
        f"[ $(wc -l <{tries}) -ge 3 ]",
        retries={"max": 3, "backoff": "100ms"},
    )
    ended = shared.ended(shared.create(pipeline(flaky)))
    assert ended["status"] == "COMPLETED"
    assert ended["steps"][0]["attempt"] == 3
    assert [shared.log(ended["id"], "flaky", attempt=n) for n in (1, 2, 3)] == [
        f"try {n}\n" for n in (1, 2, 3)
    ]


def test_a_step_fails_when_no_attempt_is_left(shared: Cluster) -> None:
    never = step("never", "exit 9", retries={"max": 1, "backoff": "100ms"})
    ended = shared.ended(shared.create(pipeline(never)))
    assert ended["status"] == "FAILED"
    assert (ended["steps"][0]["attempt"], ended["steps"][0]["exit_code"]) == (2, 9)


def test_the_nodes_own_envs_stand_above_the_callers(shared: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text('[envs.values]\nROOT = "the node\'s"\n')
    shared.agent("with-envs", "--config", str(config))
    say = {"name": "say", "container": {"command": ["echo", "${{ envs.ROOT }} ${{ envs.MODE }}"]}}
    done = shared.run(
        pipeline(say, envs=["ROOT", "MODE"]),
        *("-e", "ROOT=the caller's", "-e", "MODE=fast", "--node", "with-envs"),
    )
    assert done.exit_code == 0, done
    assert done.stdout == "the node's fast\n"


def test_a_pipeline_waits_for_a_node_that_has_its_envs_and_says_so(shared: Cluster) -> None:
    pipeline_id = shared.create(pipeline(step("a", "true"), envs=["NOWHERE"]))
    waiting = eventually(
        lambda: shared.get(f"/pipelines/{pipeline_id}")["waiting"], "the pipeline says why"
    )
    assert "env" in waiting[0]["text"]
    shared.request("POST", f"/api/v1/pipelines/{pipeline_id}:cancel", {})
    assert shared.ended(pipeline_id)["status"] == "CANCELLED"


def test_output_json_is_the_answer_of_the_api_and_nothing_else(shared: Cluster) -> None:
    done = shared.run(pipeline(step("a", "echo to stderr")), "-o", "json")
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert said == shared.get(f"/pipelines/{said['id']}")


def test_logs_follows_a_running_step_to_its_end(shared: Cluster) -> None:
    pipeline_id = shared.create(pipeline(step("a", counting(50, pause_s=0.02))))
    shared.until_step(pipeline_id, "a", "RUNNING")
    done = shared.command("logs", "-f", pipeline_id)
    assert done.exit_code == 0
    assert done.stdout == counted(50)


def test_a_wait_answers_at_once_when_the_pipeline_ends(shared: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    pipeline_id = shared.create(pipeline(step("a", f"until [ -e {go} ]; do sleep 0.01; done")))
    shared.until_step(pipeline_id, "a", "RUNNING")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            shared.request, "GET", f"/api/v1/pipelines/{pipeline_id}?wait=60s", within_s=60.0
        )
        go.touch()
        assert waiting.result(CANCEL_S_MAX).json["status"] == "COMPLETED"
    again = shared.request("GET", f"/api/v1/pipelines/{pipeline_id}?wait=60s", within_s=5.0)
    assert again.json["status"] == "COMPLETED"


def test_a_pipeline_is_found_by_what_a_table_shows_of_its_id(shared: Cluster) -> None:
    pipeline_id = shared.create(pipeline(step("one", "echo found")))
    shared.ended(pipeline_id)

    for part in (pipeline_id[-8:], pipeline_id[:13]):
        assert shared.command("logs", part).stdout == "found\n"
