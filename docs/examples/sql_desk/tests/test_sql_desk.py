"""The environment keeps its promises, and an endless statement costs no session but its own."""

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

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT sum(i) FROM n"


async def test_sql_desk() -> None:
    await check_environment(lambda: LocalBackend("sql_desk"), "sql_desk", tasks=2)


def act(view: ConversationView, ctx: EpisodeContext) -> dict[str, object] | str:
    if ctx.key.task != "ship_porto":
        return "Done."
    function = {"name": "sql", "arguments": orjson.dumps({"statement": ENDLESS}).decode()}
    return {"content": None, "tool_calls": [{"id": "call_0", "type": "function", "function": function}]}


async def test_an_endless_statement(tmp_path: Path) -> None:
    backend = LocalBackend("sql_desk")
    run = Orchestrator(backend=backend, policy=ScriptedPolicy(act), out=tmp_path / "run", step_timeout_s=1.0)
    async with run as orchestrator:
        await orchestrator.run(split="sql_desk")
    episodes = list(Run.open(tmp_path / "run").episodes())
    stopped = {episode.key.task: episode.stop_reason for episode in episodes}
    assert stopped.pop("ship_porto") == "agent_killed_env"
    assert set(stopped.values()) == {"done"}
    assert len(stopped) == 14
