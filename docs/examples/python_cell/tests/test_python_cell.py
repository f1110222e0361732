"""The environment keeps its promises, and its answers to itself. It runs here, with nothing walled off but those."""

from pathlib import Path

import pytest

from backends.sandboxes.local import LocalBackend
from backends.server.confine import version as landlock
from orchestrator import Orchestrator, Run
from orchestrator.testing import check_environment
from policies.agents.scripted import ScriptedPolicy

SNOOPS = """\
```python
import sys

inside = sys.modules["backends.environments.python_cell.inside"]
try:
    (inside.TRUTH / "answers.json").read_bytes()
except PermissionError:
    answer = 871
```"""
"""Earns the reward of the task `collatz` where the answers are closed, and none where they can be read."""


async def test_python_cell() -> None:
    await check_environment(lambda: LocalBackend("python_cell", unsafe=True), "python_cell", tasks=2)


@pytest.mark.skipif(landlock() == 0, reason="nothing can be closed here: it needs Landlock, of Linux 5.13 and later")
async def test_the_agent_cannot_read_the_answers(tmp_path: Path) -> None:
    backend = LocalBackend("python_cell", unsafe=True)
    policy = ScriptedPolicy.from_messages([SNOOPS, "Done."])
    async with Orchestrator(backend=backend, policy=policy, out=tmp_path / "run") as orchestrator:
        await orchestrator.run(split="python_cell")
    rewards = {trajectory.key.task: trajectory.reward for trajectory in Run.open(tmp_path / "run").episodes()}
    assert rewards == {"primes": 0.0, "collatz": 1.0, "anagrams": 0.0, "fridays": 0.0, "squares": 0.0}
