"""Whole runs of memory tasks: what an agent is shown, and that an answer rests on what it wrote down."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from backends.environments.catalog import find
from backends.sandboxes.local import LocalBackend
from orchestrator import Orchestrator, Run
from orchestrator.testing import check_environment
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView

CONVERSATIONS = 5
TURNS = 24
"""Of the user, in the notetaker's conversations."""


@pytest.fixture(autouse=True)
def _installed() -> None:
    if not find("bfcl").installed:
        pytest.skip("BFCL is not installed: run `rollout env install bfcl`")


def backend() -> LocalBackend:
    return LocalBackend("bfcl", auto_install=False)


@pytest.mark.parametrize("split", ["memory_kv", "memory_rec_sum:val"])
async def test_the_kit(split: str) -> None:
    await check_environment(backend, split, tasks=2)


def write_all_down(view: ConversationView, ctx: EpisodeContext) -> Any:
    """Append what the user says to the memory; the answer to the question is all that the system prompt shows of it."""
    messages = view.messages()
    opening, *rest = messages
    assert [message["role"] for message in messages].count("system") == 1, "another conversation shows"
    assert opening["role"] == "system"
    assert len(rest) < 4 * TURNS / CONVERSATIONS
    prompt = str(opening["content"])
    if "you must respond in this format" in prompt:
        return prompt
    if messages[-1]["role"] == "tool":
        return "Noted."
    arguments = json.dumps({"text": f"{messages[-1]['content']}\n"})
    function = {"name": "memory_append", "arguments": arguments}
    call = {"id": f"c{view.turn}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def write_nothing_down(view: ConversationView, ctx: EpisodeContext) -> str:
    """Answer with all that is shown."""
    return str(view.messages()[0]["content"])


@pytest.mark.parametrize(("act", "right"), [(write_all_down, 20), (write_nothing_down, 0)])
async def test_an_answer_rests_on_what_was_written_down(tmp_path: Path, act: Any, right: int) -> None:
    """Five of the 25 answers are worded otherwise than what the user said, such as "3" for three repairs."""
    tasks = [f"memory_rec_sum_{number}-notetaker-{number - 130}" for number in range(130, 155)]
    async with Orchestrator(backend=backend(), policy=ScriptedPolicy(act), out=tmp_path / "run", sandboxes=1) as orch:
        summary = await orch.run(tasks=tasks)
    assert summary.outcomes == {"completed": 25}
    assert summary.steps == 25 * (TURNS + 1 + (TURNS if right else 0))
    assert summary.reward_one == right
    with Run.open(tmp_path / "run") as run:
        row = run.to_openai(run.episode(tasks[0]))
    begun = [row["messages"][start]["role"] for start in row["conversations"]]
    assert begun == ["system"] * (CONVERSATIONS + 1)
