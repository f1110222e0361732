"""Scripted: whatever a user's function may return, and the errors for what it may not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest

from orchestrator.errors import PolicyError, UsageError
from orchestrator.protocols import EpisodeContext, Policy
from orchestrator.records import ConversationView, EpisodeBuffer, header
from orchestrator.types import Decision, EpisodeKey, FailureKind, Generation, Observation
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from pathlib import Path

CONTEXT = EpisodeContext(EpisodeKey("task", 0, 0), 0, 5, None)
HELLO = {"role": "assistant", "content": "hello"}


def a_view(turns: int = 0) -> ConversationView:
    buffer = EpisodeBuffer(header("toy", "0" * 16))
    buffer.observe(Observation(b'{"messages":[{"role":"user","content":"say it"}]}'))
    for _ in range(turns):
        buffer.decide(Decision(orjson.dumps(HELLO)))
    return ConversationView(buffer, {})


@pytest.mark.parametrize(
    "answer",
    ["hello", HELLO, {"content": "hello"}, orjson.dumps(HELLO), Decision(orjson.dumps(HELLO))],
    ids=["str", "dict", "dict without role", "bytes", "Decision"],
)
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_every_kind_of_answer(answer: Any, asynchronous: bool) -> None:
    def plain(view: ConversationView, ctx: EpisodeContext) -> Any:
        assert ctx is CONTEXT
        assert view.turn == 0
        return answer

    async def waiting(view: ConversationView, ctx: EpisodeContext) -> Any:
        return plain(view, ctx)

    policy = ScriptedPolicy(waiting if asynchronous else plain)
    assert isinstance(policy, Policy)
    decided = await policy.start(CONTEXT).act(a_view())
    assert orjson.loads(decided.action) == HELLO


async def test_a_decision_keeps_its_generation() -> None:
    generation = Generation("m", 1, 2, 0.5, "stop", {})
    policy = ScriptedPolicy(lambda view, ctx: Decision(orjson.dumps(HELLO), generation), calls_model=True)
    assert policy.calls_model
    assert (await policy.start(CONTEXT).act(a_view())).generation is generation


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "is a NoneType; return a Decision"),
        (3, "is a int; return a Decision"),
        (b"hello", "is not JSON"),
        (b'["hello"]', "is not an OpenAI message"),
        ({"role": "user", "content": "hello"}, "is not an OpenAI message"),
        ({"content": object()}, "is not JSON"),
        (Decision(b"hello"), "is not JSON"),
    ],
)
async def test_what_is_no_answer(answer: Any, said: str) -> None:
    policy = ScriptedPolicy(lambda view, ctx: answer)
    with pytest.raises(PolicyError, match=f"the answer at turn 0 {said}") as caught:
        await policy.start(CONTEXT).act(a_view())
    assert caught.value.failure.kind is FailureKind.POLICY


async def test_what_the_function_raises_passes_through() -> None:
    def broken(view: ConversationView, ctx: EpisodeContext) -> str:
        raise LookupError("no such thing")

    with pytest.raises(LookupError, match="no such thing"):
        await ScriptedPolicy(broken).start(CONTEXT).act(a_view())


async def test_a_list_is_played_by_turn_and_ends_in_words() -> None:
    agent = ScriptedPolicy.from_messages(["one", {"role": "assistant", "content": "two"}]).start(CONTEXT)
    assert orjson.loads((await agent.act(a_view(1))).action)["content"] == "two"
    assert orjson.loads((await agent.act(a_view(0))).action)["content"] == "one"
    with pytest.raises(PolicyError, match=r"list of 2 messages is used up; task/0/0"):
        await agent.act(a_view(2))


def test_a_list_is_checked_when_it_is_given() -> None:
    with pytest.raises(UsageError, match="message 1 is a int"):
        ScriptedPolicy.from_messages(["one", 2])  # type: ignore[list-item]


def test_what_cannot_be_called() -> None:
    with pytest.raises(UsageError, match="cannot be called"):
        ScriptedPolicy("hello")  # type: ignore[arg-type]


class TestFromFile:
    def test_a_function(self, tmp_path: Path) -> None:
        file = tmp_path / "script.py"
        file.write_text(
            "from __future__ import annotations\n"
            "from dataclasses import dataclass\n"
            "@dataclass\nclass State:\n    said: str\n"
            "def act(view, ctx):\n    return State(f'turn {view.turn}').said\n",
            encoding="utf-8",
        )
        policy = ScriptedPolicy.from_file(f"{file}:act")
        act = policy.start(CONTEXT).act(a_view(2))
        with pytest.raises(StopIteration) as stopped:
            act.send(None)
        assert orjson.loads(stopped.value.value.action)["content"] == "turn 2"
        assert repr(policy) == "ScriptedPolicy(act)"

    def test_a_list(self, tmp_path: Path) -> None:
        file = tmp_path / "script.py"
        file.write_text("ANSWERS = ['one', 'two']\n", encoding="utf-8")
        assert isinstance(ScriptedPolicy.from_file(f"{file}:ANSWERS"), ScriptedPolicy)

    @pytest.mark.parametrize(
        ("place", "said"),
        [
            ("script.py", "FILE.py:FUNCTION"),
            (":act", "FILE.py:FUNCTION"),
            ("{dir}/missing.py:act", "there is no script"),
            ("{dir}/script.py:missing", "define it as `def missing"),
            ("{dir}/script.py:number", "cannot be called"),
            ("{dir}/broken.py:act", "cannot be loaded: NameError"),
            ("{dir}/script.txt:act", "must end in .py"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, place: str, said: str) -> None:
        (tmp_path / "script.py").write_text("number = 3\n", encoding="utf-8")
        (tmp_path / "broken.py").write_text("undefined\n", encoding="utf-8")
        (tmp_path / "script.txt").write_text("", encoding="utf-8")
        with pytest.raises(UsageError, match=said):
            ScriptedPolicy.from_file(place.format(dir=tmp_path))
