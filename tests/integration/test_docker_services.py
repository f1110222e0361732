"""Images that serve AgentScope's environment service, as sandboxes: walled off, reached, watched, and removed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from counting_service import TASKS
from service_images import COUNTING, build, count_to, counting

from backends.sandboxes.docker.service_backend import ServiceImageBackend
from backends.sandboxes.docker.service_image import ServiceImage, Volume
from bench.reference import Reference, reference
from bench.reference_answers import answers
from bench.strikes import docker
from orchestrator import Orchestrator, Run
from orchestrator.errors import SandboxError, SandboxLost, Unavailable
from orchestrator.testing import BACKEND_CHECKS, run_check
from orchestrator.types import EpisodeSpec, FailureKind, RunId
from policies.agents.replay import ReplayPolicy
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from backends.sandboxes.remote.instances import ServiceSandbox
    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView

pytestmark = pytest.mark.usefixtures("containers")
SOLUTIONS = {task: count_to(6) for task in TASKS}


@pytest.fixture(scope="module")
def image(daemon: None) -> str:
    return asyncio.run(counting())


def counts(image: str, **options: Any) -> ServiceImageBackend:
    given = {"deterministic": True, "solutions": SOLUTIONS} | options
    return ServiceImageBackend("counting", ServiceImage(image), **given)


@asynccontextmanager
async def one_sandbox(backend: ServiceImageBackend) -> AsyncIterator[ServiceSandbox]:
    backend.configure(run=RunId("services"), with_solutions=False, logs=None, call_limit_s=5.0)
    async with backend:
        yield await backend.create()


def say(content: str) -> bytes:
    return orjson.dumps({"role": "assistant", "content": content})


@pytest.mark.parametrize("name", ["life", "order", "release", "unknown", "solutions", "condemned"])
async def test_the_contract(image: str, name: str) -> None:
    await run_check(BACKEND_CHECKS[name], lambda: counts(image))


async def test_a_container_has_no_network_no_capability_and_what_it_was_given(image: str, tmp_path: Path) -> None:
    given = ServiceImage(image, variables={"GREETING": "hello"}, volumes=[Volume(tmp_path, "/d")])
    async with one_sandbox(ServiceImageBackend("counting", given)) as sandbox:
        _, first = await sandbox.open(EpisodeSpec("about", 0, 5.0))
        told = orjson.loads(orjson.loads(first.body)["messages"][0]["content"])
        assert told["interfaces"] == ["lo"]
        assert told["environ"] == {"OPENAI_API_KEY": "none", "GREETING": "hello"}
        assert told["data"] is True
        assert told["status"] == {"CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
        shown = orjson.loads(await asyncio.to_thread(docker, "inspect", sandbox.id, f"{sandbox.id}-relay"))
        assert not any(one["HostConfig"]["PortBindings"] or one["NetworkSettings"]["Ports"] for one in shown)
        assert shown[0]["HostConfig"]["NetworkMode"] == "none"
        assert shown[0]["HostConfig"]["Mounts"][0]["ReadOnly"] is True
        assert 0 < shown[0]["HostConfig"]["Memory"] < 1 << 35


async def test_a_run_is_right_though_its_container_is_killed(image: str, tmp_path: Path) -> None:
    backend = counts(image)
    run = Orchestrator(backend=backend, policy=ReplayPolicy(), out=tmp_path / "run", concurrency=8, sandboxes=1)
    async with run as orchestrator:
        running = asyncio.create_task(orchestrator.run(episodes=120))
        while not (backend.containers() and orchestrator.progress().done > 10):  # noqa: ASYNC110  # it signals nothing
            await asyncio.sleep(0.01)
        await asyncio.to_thread(docker, "kill", "--signal", "KILL", backend.containers()[0].id)
        summary = await running
    assert (summary.episodes, summary.outcomes["completed"], summary.duplicates) == (120, 120, 0)
    assert summary.recovered_episodes > 0
    assert backend.containers() == []


async def test_an_action_that_ends_the_service_is_told_from_the_daemon(image: str) -> None:
    backend = counts(image)
    async with one_sandbox(backend) as sandbox:
        guilty, _ = await sandbox.open(EpisodeSpec("count_0", 0, 5.0))
        idle, _ = await sandbox.open(EpisodeSpec("count_1", 0, 5.0))
        with pytest.raises(SandboxLost) as crashed:
            await guilty.step(say("crash"))
        assert crashed.value.suspect
        async with asyncio.timeout(5):
            failure = await sandbox.lost
        assert (failure.kind, failure.message) == (FailureKind.SANDBOX_LOST, "the server exited with code 9")
        with pytest.raises(SandboxLost) as lost:
            await idle.step(say("add 1"))
        assert not lost.value.suspect


def mostly_counting(view: ConversationView, ctx: EpisodeContext) -> str:
    return "crash" if ctx.key.task == "count_3" and view.turn == 2 else "add 1"


async def test_an_agent_that_ends_its_service_again_and_again_costs_no_other_episode(
    image: str, tmp_path: Path
) -> None:
    policy = ScriptedPolicy(mostly_counting)
    run = Orchestrator(backend=counts(image), policy=policy, out=tmp_path / "run", concurrency=8, sandboxes=1)
    async with run as orchestrator:
        summary = await orchestrator.run(episodes=8)
    assert (summary.outcomes, summary.reward_one) == ({"completed": 7, "truncated": 1}, 7)
    with Run.open(tmp_path / "run") as finished:
        stops = {one.key.task: one.stop_reason for one in finished.episodes()}
    assert stops["count_3"] == "agent_killed_env"


async def test_a_service_that_does_not_start_says_why(image: str, daemon: None) -> None:
    dead = await build("rollout-test-dead:latest", {}, ["python3", "-c", "raise SystemExit('no data here')"])
    deaf = await build("rollout-test-deaf:latest", {}, ["python3", "-c", "import time; time.sleep(60)"])
    for given, says in (
        (ServiceImage(dead), "exited with code 1 while starting; it said last: no data here"),
        (ServiceImage(deaf, ready_s=0.5), "nothing at port 80 answered /healthz within 0.5 s"),
    ):
        with pytest.raises(SandboxError, match=says):
            async with one_sandbox(ServiceImageBackend("counting", given)):
                pytest.fail("it started")
    await asyncio.to_thread(docker, "rmi", "rollout-test-dead:latest", "rollout-test-deaf:latest")


async def test_an_image_that_nobody_has_is_said_to_be_missing(daemon: None) -> None:
    with pytest.raises(Unavailable, match="no image rollout-test-absent"):
        async with one_sandbox(ServiceImageBackend("counting", ServiceImage("rollout-test-absent:none"))):
            pytest.fail("it started")


OWNER = """
import asyncio, sys
from backends.sandboxes.docker.service_backend import ServiceImageBackend
from backends.sandboxes.docker.service_image import ServiceImage
from orchestrator.types import RunId

async def main():
    backend = ServiceImageBackend("counting", ServiceImage(sys.argv[1]))
    backend.configure(run=RunId("killed"), with_solutions=False, logs=None, call_limit_s=5.0)
    async with backend:
        print((await backend.create()).id, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_what_a_killed_owner_leaves_is_removed(image: str) -> None:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, COUNTING, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert owner.stdout is not None
    name = (await owner.stdout.readline()).decode().strip()
    shown = await asyncio.to_thread(docker, "ps", "--filter", f"name={name}", "--format", "{{.Names}}")
    assert sorted(shown.split()) == [name, f"{name}-relay"]
    os.kill(owner.pid, signal.SIGKILL)
    await owner.wait()
    async with asyncio.timeout(15):
        while await asyncio.to_thread(docker, "ps", "-aq", "--filter", f"name={name}"):  # noqa: ASYNC110  # it signals nothing
            await asyncio.sleep(0.1)


def rollout(*arguments: str) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("rollout")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def test_the_command_collects_from_an_image_of_an_environment_that_this_machine_does_not_know(
    image: str, tmp_path: Path
) -> None:
    solutions = tmp_path / "solutions.jsonl"
    rows = [{"task": task, "actions": list(map(orjson.loads, actions))} for task, actions in SOLUTIONS.items()]
    solutions.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    out = tmp_path / "run"
    asked = [
        "collect", "--env", "counting", "--backend", "docker", "--image", image, "--image-protocol", "env_service",
        "--image-env", "GREETING=hello", "--solutions", str(solutions), "--sandboxes", "1", "--episodes", "8",
        "--hardening", "read_only=true", "--hardening", "user=65534:65534", "--out", str(out), "--json",
    ]  # fmt: skip
    summary = rollout(*asked)
    assert (summary["outcomes"], summary["reward_one"]) == ({"completed": 8}, 8)
    assert rollout("status", str(out), "--json")["episodes"] == 8


@pytest.fixture(scope="module")
def installed(daemon: None) -> Reference:
    try:
        return asyncio.run(reference())
    except Unavailable as error:
        pytest.fail(str(error)) if os.environ.get("CI") == "true" else pytest.skip(str(error))


@pytest.mark.timeout(300)
async def test_agentscopes_own_service_runs_in_a_container(installed: Reference, tmp_path: Path) -> None:
    """As published, on the base image: its packages and its data are seen where they lie on this machine."""
    python = [str(installed.python), "-m", "training_box.env_service", "--env", "bfcl"]
    name = await build("rollout-test-reference:latest", {}, [*python, "--portal", "0.0.0.0", "--port", "80"])
    seen = [installed.python.parents[1], installed.root, Path(sys.base_prefix), *vector_mathematics()]
    given = ServiceImage(
        name, variables=variables(installed), volumes=[Volume(path, str(path)) for path in seen], ready_s=240
    )
    known = await asyncio.to_thread(answers, installed, "multi_turn_base")
    backend = ServiceImageBackend("bfcl", given, max_instances=4, solutions=known)
    run = Orchestrator(backend=backend, policy=ReplayPolicy(), out=tmp_path / "run", concurrency=4, sandboxes=1)
    async with run as orchestrator:
        summary = await orchestrator.run(split="train", episodes=2)
    assert (summary.outcomes, summary.reward_one, summary.failures) == ({"completed": 2}, 2, {})


def variables(installed: Reference) -> dict[str, str]:
    data = installed.root / "training_box" / "bfcl"
    return {
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(installed.root),
        "BFCL_DATA_PATH": str(data / "multi_turn" / "multi_turn_processed.jsonl"),
        "BFCL_SPLID_ID_PATH": str(data / "multi_turn" / "multi_turn_split_ids.json"),
        "BFCL_ANSWER_PATH": str(data / "data" / "possible_answer"),
    }


def vector_mathematics() -> list[Path]:
    """A part of the C library that one of its packages loads, and the base image of Python does without."""
    return [path for path in Path("/lib").glob("*-linux-gnu/libmvec.so.1") if path.is_file()]
