"""The environment keeps its promises, and on slippery ice the seed alone decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from backends.sandboxes.local import LocalBackend
from orchestrator import Orchestrator, Run
from orchestrator.testing import check_environment
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView


async def test_text_games() -> None:
    await check_environment(lambda: LocalBackend("text_games"), "text_games", tasks=4)


def act(view: ConversationView, ctx: EpisodeContext) -> dict[str, object]:
    function = {"name": "move", "arguments": orjson.dumps({"direction": ("down", "right")[view.turn % 2]}).decode()}
    return {"content": None, "tool_calls": [{"id": "call_0", "type": "function", "function": function}]}


async def played(out: Path, seed: int) -> dict[str, list[object]]:
    """What is seen on every lake, by task."""
    run = Orchestrator(
        backend=LocalBackend("text_games"),
        policy=ScriptedPolicy(act),
        out=out,
        seed=seed,
        max_turns=30,
        options={"slippery": True},
    )
    async with run as orchestrator:
        await orchestrator.run(split="lake")
    found = Run.open(out)
    return {episode.key.task: found.to_openai(episode)["messages"] for episode in found.episodes()}


async def test_a_slippery_lake(tmp_path: Path) -> None:
    first, again, other = [await played(tmp_path / str(n), seed) for n, seed in enumerate((1, 1, 2))]
    assert first == again
    assert first != other
    assert {task: seen[:1] for task, seen in first.items()} == {task: seen[:1] for task, seen in other.items()}
