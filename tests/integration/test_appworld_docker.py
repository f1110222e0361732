"""AppWorld in containers: one an episode, its data mounted, its ground truth closed to the agent's code."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import appworld_tasks
import pytest
from runs import play

from backends.environments.catalog import find
from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.docker.hardening import Hardening
from orchestrator.errors import Unavailable
from orchestrator.events import SandboxStarted
from orchestrator.testing.harness import entered, spec
from orchestrator.types import StopReason
from policies.agents.replay import ReplayPolicy
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView

pytestmark = [pytest.mark.usefixtures("containers", "home"), pytest.mark.timeout(900)]
TASKS = ["tidy01_1", "jot02_1", "meet04_1"]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of the project's with synthetic tasks; the image's wheels are the user's own."""
    try:
        python = find("appworld").interpreter()
    except Unavailable as missing:
        pytest.fail(str(missing)) if os.environ.get("CI") == "true" else pytest.skip(str(missing))
    root = appworld_tasks.write(python, tmp_path_factory.mktemp("appworld"))
    return appworld_tasks.settle(tmp_path_factory.mktemp("home") / "rollout", root)


@pytest.fixture
def home(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_HOME", str(known))


FILLING = """\
import os
posix = __import__("posix")
file = posix.open("ballast", os.O_CREAT | os.O_WRONLY)
while True:
    posix.write(file, bytes(2**16))
"""


def reading(name: str) -> bytes:
    path = f'pathlib.Path(os.environ["APPWORLD_ROOT"], "data", "tasks", "{TASKS[0]}", "{name}")'
    code = f"import os, pathlib\nprint({path}.read_text())"
    return json.dumps({"role": "assistant", "content": f"```python\n{code}\n```"}).encode()


async def test_known_answers_in_a_container_each(tmp_path: Path) -> None:
    backend = DockerBackend("appworld")
    assert backend.limits.episodes == 1
    played = await play(
        tmp_path / "run", ReplayPolicy(), backend=backend, tasks=TASKS, concurrency=2, step_timeout_s=60.0
    )
    assert [episode.reward for episode in played.episodes.values()] == [1.0] * len(TASKS)
    started = [event.sandbox for event in played.events if isinstance(event, SandboxStarted)]
    assert len(set(started)) >= len(TASKS), "a container serves one episode"


async def test_the_truth_is_closed_in_a_container() -> None:
    async with entered(lambda: DockerBackend("appworld")) as backend:
        sandbox = await backend.create()
        session, _ = await sandbox.open(spec(TASKS[0], step_timeout_s=60.0))
        told = (await session.step(reading("specs.json"))).body.decode()
        assert "instruction" in told
        told = (await session.step(reading("ground_truth/answer.json"))).body.decode()
        assert "PermissionError" in told
        assert (await session.evaluate()).reward == 0.0
        session.close()


async def test_a_full_disk_spares_no_grade(tmp_path: Path) -> None:
    """The solution, then a file as large as may be, where the state is written and graders write too."""

    def act(view: ConversationView, ctx: EpisodeContext) -> str:
        [task] = (task for task in appworld_tasks.tasks() if task.id == ctx.key.task)
        solution = task.solution.replace("apis.supervisor.complete_task(", "dict(")
        return f"```python\n{(solution, FILLING, 'apis.supervisor.complete_task()')[view.turn]}\n```"

    backend = DockerBackend("appworld", hardening=Hardening(tmp_mb=16))
    played = await play(
        tmp_path, ScriptedPolicy(act), backend=backend, tasks=TASKS[1:2], sandboxes=1, step_timeout_s=60.0, max_turns=3
    )
    [episode] = played.episodes.values()
    assert (episode.reward, episode.stop_reason) == (0.0, StopReason.AGENT_KILLED_ENV)
