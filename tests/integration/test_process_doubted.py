"""Isolation `process` with `runs_code`: what the agent's code says in its session's place spares it no grade."""

from __future__ import annotations

from typing import TYPE_CHECKING

import forked
import orjson
import pytest
from forked import told
from runs import counting, play

from backends.sandboxes.local import LocalBackend
from orchestrator.testing.harness import loses, refused, say, spec
from orchestrator.types import FailureKind, Outcome, StopReason
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView

REPLY, FAULT, CRASH = 0, 3, 4
SHOWN = '{"messages": [{"role": "user", "content": "all is well"}]}'
FORGED = {
    "a fault": {"kind": FAULT, "body": '{"code": "environment", "message": "broken", "retryable": false}'},
    "a fault to be retried": {"kind": FAULT, "body": '{"code": "busy", "message": "later", "retryable": true}'},
    "no such task": {"kind": FAULT, "body": '{"code": "unknown_task", "message": "what task?", "retryable": false}'},
    "an exception": {"kind": CRASH, "body": '{"message": "KeyError: 5", "trace": ""}'},
    "no JSON": {"kind": REPLY, "body": "{"},
    "no object": {"kind": REPLY, "body": "[]"},
    "no messages": {"kind": REPLY, "body": "{}"},
    "no message": {"kind": REPLY, "body": '{"messages": [5]}'},
    "no role": {"kind": REPLY, "body": '{"messages": [{"role": "god", "content": ""}]}'},
    "no content": {"kind": REPLY, "body": '{"messages": [{"role": "user", "content": 5}]}'},
    "no call": {"kind": REPLY, "body": '{"messages": [{"role": "tool", "content": "x"}]}'},
    "no tool": {"kind": REPLY, "body": '{"messages": [], "tools_added": [{}]}'},
    "no tools": {"kind": REPLY, "body": '{"messages": [], "tools_added": 5}'},
    "an unknown tool set": {"kind": REPLY, "body": '{"messages": [], "tools": "0123456789abcdef"}'},
    "a tool set without a name": {"kind": REPLY, "body": '{"messages": [], "tools": ["x"]}'},
    "a new tool set": {"kind": REPLY, "tools": "[]", "body": SHOWN},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forked.lay_out(tmp_path_factory.mktemp("forked"), runs_code=True)


@pytest.fixture(autouse=True)
def _brought(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked.bring(site, monkeypatch)


def local() -> LocalBackend:
    return LocalBackend("forked", max_children=16, unsafe=True)


@pytest.mark.parametrize("what", FORGED)
async def test_it_is_the_session_s_own_loss(what: str) -> None:
    async with local() as backend:
        sandbox = await backend.create()
        session, _ = await sandbox.open(spec("toy_3"))
        other, _ = await sandbox.open(spec("toy_3"))
        lost = await loses(session.step(say(f"tell {orjson.dumps(FORGED[what]).decode()}")), what)
        assert lost.suspect
        assert lost.failure.kind is FailureKind.SANDBOX_LOST
        await loses(session.evaluate(), what)
        assert await told(other, "add 1") == "total 1"
        assert not sandbox.lost.done()


async def test_a_step_earns_nothing() -> None:
    async with local() as backend:
        session, _ = await (await backend.create()).open(spec("toy_3"))
        answer = {"kind": REPLY, "reward": 99.0, "done": 1, "body": SHOWN}
        observation = await session.step(say(f"tell {orjson.dumps(answer).decode()}"))
        assert (observation.body.decode(), observation.reward, observation.done) == (SHOWN, 0.0, True)


async def test_a_grader_is_believed() -> None:
    """No code of the agent's runs there: what it raises is the environment's failure."""
    async with local() as backend:
        session, _ = await (await backend.create()).open(spec("toy_3"))
        assert await told(session, "add 4") == "total 4"
        assert (await session.evaluate()).reward == 1.0
        await session.step(say("badgrade"))
        error = await refused(session.evaluate(), "a grading that raises")
        assert error.failure.kind is FailureKind.ENVIRONMENT


@pytest.mark.parametrize("words", ["raise odd", f"tell {orjson.dumps(FORGED['a fault']).decode()}", "badexport"])
async def test_no_failure_spares_a_grade(tmp_path: Path, words: str) -> None:
    def act(view: ConversationView, ctx: EpisodeContext) -> str:
        return words if view.turn == 1 else counting(view, ctx)

    played = await play(tmp_path, ScriptedPolicy(act), backend=local(), tasks=["toy_5"])
    [episode] = played.episodes.values()
    assert (episode.outcome, episode.reward) == (Outcome.TRUNCATED, 0.0)
    assert episode.stop_reason is StopReason.AGENT_KILLED_ENV
