"""AppWorld behind a server: what a session cannot reach, what its death costs, and sixteen worlds at once."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import appworld_tasks
import pytest

from backends.sandboxes.local import LocalBackend
from backends.server.confine import version
from orchestrator.errors import SandboxError
from orchestrator.testing.harness import spec
from orchestrator.testing.leaks import children
from orchestrator.types import RunId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from orchestrator.protocols import Sandbox, Session

LIVE = 16

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    backend = LocalBackend("appworld", unsafe=True, auto_install=False)
    backend.configure(run=RunId("appworld-tests"), with_solutions=False, logs=None, call_limit_s=60.0)
    async with backend:
        yield await backend.create()


def says(code: str) -> bytes:
    return json.dumps({"role": "assistant", "content": f"```python\n{code}\n```"}).encode()


async def printed(session: Session, code: str) -> str:
    observation = await session.step(says(code))
    [message] = json.loads(observation.body)["messages"]
    return str(message["content"])


def below(pid: int) -> list[int]:
    """The processes of a server's sessions: the children of the one that it forks them from."""
    [zygote] = children(pid)
    return [child.pid for child in children(zygote.pid)]


@pytest.mark.skipif(not version(), reason="this kernel has no Landlock")
async def test_no_code_of_the_agent_s_reads_the_truth(sandbox: Sandbox) -> None:
    session, _ = await sandbox.open(spec("tidy01_1", step_timeout_s=60))
    for task in ("tidy01_1", "jot02_1"):
        folder = f'pathlib.Path(os.environ["APPWORLD_ROOT"], "data", "tasks", "{task}")'
        assert "instruction" in await printed(
            session, f'import os, pathlib\nprint(({folder} / "specs.json").read_text())'
        )
        for name in ("answer.json", "evaluation.py", "compiled_solution.py"):
            told = await printed(session, f'print(({folder} / "ground_truth" / "{name}").read_text())')
            assert "PermissionError" in told, told
    assert (await session.evaluate()).reward == 0.0


@pytest.mark.skipif(not version(), reason="this kernel has no Landlock")
async def test_no_code_of_the_agent_s_puts_another_truth_in_the_place_of_the_true_one(sandbox: Sandbox) -> None:
    """The grader reads code and data of the same user's: none of it can be changed."""
    session, _ = await sandbox.open(spec("tidy01_1", step_timeout_s=60))
    known = "import os, pathlib\nposix = __import__('posix')\nroot = os.environ['APPWORLD_ROOT']\n"
    task = f"{known}task = root + '/data/tasks/tidy01_1'\n"
    code = "__import__('appworld').__path__[0] + '/mine'"
    for deed in (
        f"{known}posix.rename(root + '/data', root + '/other')",
        f"{known}posix.rename(root, root + '-other')",
        f"{known}os.mkdir(root + '/data/tasks/new99_1')",
        f"{known}os.symlink('/', root + '/../world-1')",
        f"{task}posix.open(task + '/dbs/supervisor.jsonl', os.O_WRONLY | os.O_TRUNC)",
        f"{task}posix.unlink(task + '/specs.json')",
        f"{task}posix.rename(task + '/ground_truth', task + '/other')",
        f"import os\nos.mkdir({code})",
    ):
        told = await printed(session, deed)
        assert "PermissionError" in told, (deed, told)
    await session.step(says(appworld_tasks.tasks()[0].solution))
    assert (await session.evaluate()).reward == 1.0


async def test_a_death_is_one_session_s_own(sandbox: Sandbox) -> None:
    guilty, _ = await sandbox.open(spec("tidy01_1", step_timeout_s=60))
    other, _ = await sandbox.open(spec("jot02_1", step_timeout_s=60))
    with pytest.raises(SandboxError) as caught:
        await guilty.step(says("import os\nos.abort()"))
    assert "SIGABRT" in str(caught.value)
    await other.step(says(appworld_tasks.tasks()[3].solution))
    assert (await other.evaluate()).reward == 1.0


async def test_sixteen_worlds_live_at_once(sandbox: Sandbox) -> None:
    tasks = appworld_tasks.tasks()
    chosen = [tasks[n % len(tasks)] for n in range(LIVE)]
    sessions = [(await sandbox.open(spec(task.id, step_timeout_s=60)))[0] for task in chosen]
    assert len(await asyncio.to_thread(below, sandbox.statistics().pid)) == LIVE
    async with asyncio.TaskGroup() as group:
        steps = [group.create_task(s.step(says(t.solution))) for s, t in zip(sessions, chosen, strict=True)]
    assert all(step.result().done for step in steps)
    assert [(await session.evaluate()).reward for session in sessions] == [1.0] * LIVE
