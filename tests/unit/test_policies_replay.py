"""Replay: the solution action by action, resumable, shared; and its seeded mistakes."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import PolicyError, UsageError
from orchestrator.protocols import Agent, EpisodeContext, Policy
from orchestrator.records import ConversationView, EpisodeBuffer, header
from orchestrator.types import Decision, EpisodeKey, FailureKind, Observation
from policies.agents.mistakes import spoil
from policies.agents.replay import ReplayPolicy

OBSERVED = Observation(b'{"messages":[{"role":"user","content":"go on"}]}')


def called(name: str, **arguments: object) -> dict[str, Any]:
    return {"id": "c0", "type": "function", "function": {"name": name, "arguments": orjson.dumps(arguments).decode()}}


def message(*calls: dict[str, Any]) -> bytes:
    return orjson.dumps({"role": "assistant", "content": None, "tool_calls": calls})


SOLUTION = [
    message(called("cd", folder="document")),
    message(called("mkdir", dir_name="temp"), called("ls")),
    b'{"role":"assistant","content":"done"}',
]


class Solutions:
    """Offers SOLUTION and counts how often it is asked for."""

    def __init__(self) -> None:
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> list[bytes]:
        self.asked += 1
        await self.gate.wait()
        return SOLUTION

    def context(self, seed: int = 0, task: str = "task", sample: int = 0) -> EpisodeContext:
        return EpisodeContext(EpisodeKey(task, 0, sample), 0, seed, self)


async def play(agent: Agent, turns: int, begin: list[bytes] | None = None) -> list[bytes]:
    buffer = EpisodeBuffer(header("toy", "0" * 16))
    buffer.observe(OBSERVED)
    for action in begin or []:
        buffer.decide(Decision(action))
        buffer.observe(OBSERVED)
    view = ConversationView(buffer, {})
    actions = []
    for _ in range(turns):
        decided = await agent.act(view)
        actions.append(decided.action)
        buffer.decide(decided)
        buffer.observe(OBSERVED)
    return actions


async def test_plays_the_solution_then_short_text() -> None:
    policy = ReplayPolicy()
    assert isinstance(policy, Policy)
    actions = await play(policy.start(Solutions().context()), 4)
    assert actions[:3] == SOLUTION
    last = orjson.loads(actions[3])
    assert last["role"] == "assistant"
    assert last["content"]
    assert "tool_calls" not in last


@pytest.mark.parametrize("skill", [1.0, 0.5, 0.0])
async def test_resumes_in_the_middle(skill: float) -> None:
    whole = await play(ReplayPolicy(skill).start(Solutions().context(seed=7)), 3)
    resumed = await play(ReplayPolicy(skill).start(Solutions().context(seed=7)), 2, begin=whole[:1])
    assert resumed == whole[1:]


async def test_samples_share_one_fetch_and_the_decisions() -> None:
    offered = Solutions()
    policy = ReplayPolicy()
    offered.gate.clear()
    view = ConversationView(EpisodeBuffer(header("toy", "0" * 16)), {})
    async with asyncio.TaskGroup() as group:
        acts = [group.create_task(policy.start(offered.context(sample=n)).act(view)) for n in range(8)]
        await asyncio.sleep(0)
        offered.gate.set()
    assert offered.asked == 1
    assert len({id(act.result()) for act in acts}) == 1
    assert policy.statistics() == (1, 1)


async def test_a_cancelled_fetch_leaves_it_to_the_next() -> None:
    offered = Solutions()
    policy = ReplayPolicy()
    offered.gate.clear()
    first = asyncio.create_task(play(policy.start(offered.context()), 1))
    second = asyncio.create_task(play(policy.start(offered.context(sample=1)), 1))
    await asyncio.sleep(0)
    first.cancel()
    offered.gate.set()
    assert await second == SOLUTION[:1]
    with pytest.raises(asyncio.CancelledError):
        await first
    assert offered.asked == 2


async def test_solutions_held_are_bounded() -> None:
    offered = Solutions()
    policy = ReplayPolicy(solutions=2)
    for task in ("a", "b", "a", "c", "a"):
        await play(policy.start(offered.context(task=task)), 1)
    assert offered.asked == 3  # "a" was used last when "c" pushed out "b"
    assert policy.statistics().held == 2


async def test_without_solutions_it_says_what_is_needed() -> None:
    agent = ReplayPolicy().start(EpisodeContext(EpisodeKey("t", 0, 0), 0, 0, None))
    with pytest.raises(PolicyError, match="--with-solutions") as caught:
        await play(agent, 1)
    assert caught.value.failure.kind is FailureKind.POLICY


@pytest.mark.parametrize("skill", [-0.1, 1.1, float("nan")])
def test_skill_out_of_range(skill: float) -> None:
    with pytest.raises(UsageError, match="from 0 to 1"):
        ReplayPolicy(skill)


async def test_the_share_of_wrong_calls_is_one_minus_skill() -> None:
    offered = Solutions()
    policy = ReplayPolicy(0.7)
    wrong = 0
    for seed in range(400):
        actions = await play(policy.start(offered.context(seed=seed)), 2)
        for action, right in zip(actions, SOLUTION, strict=False):
            made, meant = orjson.loads(action)["tool_calls"], orjson.loads(right)["tool_calls"]
            assert len(made) == len(meant)
            wrong += sum(a != b for a, b in zip(made, meant, strict=True))
    assert 0.25 < wrong / (400 * 3) < 0.35


async def test_without_skill_every_call_is_wrong_and_text_is_left_alone() -> None:
    actions = await play(ReplayPolicy(0.0).start(Solutions().context(seed=3)), 3)
    for action, right in zip(actions[:2], SOLUTION, strict=False):
        made, meant = orjson.loads(action), orjson.loads(right)
        assert made.keys() == meant.keys()
        assert all(a != b for a, b in zip(made["tool_calls"], meant["tool_calls"], strict=True))
    assert actions[2] == SOLUTION[2]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    arguments=st.dictionaries(st.text(max_size=5), json_values, max_size=4),
    functions=st.lists(st.sampled_from(["cd", "ls", "mv"]), max_size=3),
    seed=st.integers(0, 2**64),
)
def test_a_mistake_is_a_well_formed_other_call(arguments: dict[str, Any], functions: list[str], seed: int) -> None:
    right = called("cd")
    right["function"]["arguments"] = orjson.dumps(arguments).decode()
    wrong = spoil(right, functions, random.Random(seed))
    assert wrong == spoil(right, functions, random.Random(seed))
    assert wrong.keys() == right.keys()
    made = orjson.loads(wrong["function"]["arguments"])
    assert isinstance(made, dict)
    assert (wrong["function"]["name"], made) != ("cd", orjson.loads(right["function"]["arguments"]))
    assert wrong["function"]["name"] in {"cd", *functions}


@pytest.mark.parametrize(
    "value",
    [True, 3, 2**60, 1.5, 1e300, "", "ab", "aa", [1], [], {"b": False}, {}, None],
    ids=lambda value: repr(value),
)
def test_every_kind_of_value_can_be_got_wrong(value: object) -> None:
    right = called("cd", a=value)
    made = [orjson.loads(spoil(right, [], random.Random(seed))["function"]["arguments"]) for seed in range(40)]
    assert all(arguments != {"a": value} for arguments in made)
    assert {} in made
    assert any("a" in arguments for arguments in made)
