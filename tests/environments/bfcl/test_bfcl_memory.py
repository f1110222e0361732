"""Memory episodes: conversations that are shown one at a time, the memory, the question; all as upstream plays them."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Inside

pytestmark = pytest.mark.timeout(300)

EPISODES = int(os.environ.get("ROLLOUT_BFCL_MEMORIES", "150"))
SEED = 20260323
KV, REC_SUM = "memory_kv_140-notetaker-10", "memory_rec_sum_140-notetaker-10"
CONVERSATIONS = (5, 4, 5, 5, 5)
"""Turns of the user in each conversation before the questions of the notetaker."""
SAID = {"role": "assistant", "content": "Noted."}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


def drive(inside: Inside, *commands: Any) -> list[Any]:
    told: list[Any] = inside("drive", stdin=json.dumps(commands))
    return told


def steps(*actions: Any) -> list[list[Any]]:
    return [["step", "a", action] for action in actions]


def roles(reply: dict[str, Any]) -> list[str]:
    return [message["role"] for message in reply["messages"]]


def test_episodes_and_verdicts_are_those_of_upstreams_own_loop(inside: Inside) -> None:
    package = pytest.importorskip("rank_bm25", reason="upstream's key search needs it: pip install rank-bm25 numpy")
    played = inside("play_memory", str(EPISODES), str(SEED))
    fair = [episode for episode in played["episodes"] if not episode[4]]
    assert len(fair) >= 0.9 * EPISODES
    asked = json.dumps([[task, actions] for task, actions, *_ in fair])
    upstream = inside("upstream_memory", str(Path(package.__file__).parent), stdin=asked)
    different = [
        (task, verdict, actions[-1])
        for (task, actions, shown, verdict, _), told in zip(fair, upstream["episodes"], strict=True)
        if [shown, verdict] != told
    ]
    assert different == []
    assert played["toolsets"] == upstream["toolsets"]
    kinds = Counter(verdict[1] for _, _, _, verdict, _ in fair)
    assert set(kinds) == {None, "agentic:answer_not_found", "agentic:no_last_message"}
    assert min(kinds.values()) > EPISODES / 20, "the answers do not reach every verdict often enough"
    assert any('"ranked_results": [[' in content for e in fair for messages in e[2] for _, content in messages)


def test_each_conversation_begins_anew_and_shows_what_the_memory_holds(inside: Inside) -> None:
    note = call("core_memory_add", key="colour", value="The user's bicycle is green.")
    *told, grade = drive(inside, ["open", "a", KV], *steps(note, *[SAID] * sum(CONVERSATIONS), SAID), ["evaluate", "a"])
    assert [reply["done"] for reply in told] == [False] * (len(told) - 1) + [True]
    assert told[1]["messages"] == [
        {"role": "tool", "tool_call_id": "c", "content": '{"status": "Key-value pair added."}'}
    ]
    opening, replies = told[0], told[2:]
    assert roles(opening) == ["system", "user"]
    assert "no content in the core memory" in opening["messages"][0]["content"]
    begun = [number for number, reply in enumerate(replies, 1) if reply.get("new_conversation")]
    assert begun == [sum(CONVERSATIONS[: number + 1]) for number in range(len(CONVERSATIONS))]
    for number, reply in enumerate(replies[:-1], 1):
        assert roles(reply) == (["system", "user"] if number in begun else ["user"])
        if number in begun:
            assert "The user's bicycle is green." in reply["messages"][0]["content"]
    assert "you must respond in this format" in replies[-2]["messages"][0]["content"]
    assert "new_conversation" not in opening
    assert (replies[-1]["messages"], replies[-1]["reward"]) == ([], 0.0)
    assert (grade["reward"], grade["error_type"]) == (0.0, "agentic:answer_not_found")


def test_the_tools_stay_and_the_text_dialect_repeats_them(inside: Inside) -> None:
    ended = steps(*[SAID] * CONVERSATIONS[0])
    opening, *told = drive(inside, ["open", "a", REC_SUM], *ended)
    assert "tools" in opening
    assert all("tools" not in reply for reply in told)
    opening, *told = drive(inside, ["open", "a", REC_SUM, {"dialect": "tool_call"}], *ended)
    assert "tools" not in opening
    for reply in (opening, told[-1]):
        assert roles(reply) == ["system", "user"]
        assert '"name":"memory_append"' in reply["messages"][0]["content"]
        assert "no content in the memory at this point" in reply["messages"][0]["content"]


def test_a_turn_over_the_limit_of_steps_ends_its_conversation_and_in_the_question_the_episode(inside: Inside) -> None:
    look = call("memory_retrieve")
    *told, middle = drive(inside, ["open", "a", REC_SUM], *steps(*[look] * 21), ["evaluate", "a"])
    assert [roles(reply) for reply in told[1:21]] == [["tool"]] * 20
    assert (roles(told[21]), told[21]["new_conversation"]) == (["system", "user"], True)
    assert (middle["reward"], middle["error_type"]) == (0.0, "agentic:no_last_message")
    question = [SAID] * sum(CONVERSATIONS)
    *told, grade = drive(inside, ["open", "a", REC_SUM], *steps(*question, *[look] * 21), ["evaluate", "a"])
    assert [reply["done"] for reply in told] == [False] * (len(told) - 1) + [True]
    assert (grade["reward"], grade["error_type"]) == (0.0, "agentic:no_last_message")


@pytest.mark.parametrize(
    ("content", "reward"),
    [("{}", 1.0), ("So: *{}*!", 1.0), ("<think>hm</think>{}", 1.0), ("<think>{}</think>no idea", 0.0), ("", 0.0)],
)
def test_the_answer_is_what_stands_behind_the_thought(inside: Inside, content: str, reward: float) -> None:
    (solution,) = drive(inside, ["solution", KV])
    known = solution[-1]["content"]
    answer = {"role": "assistant", "content": content.replace("{}", known)}
    *told, grade = drive(inside, ["open", "a", KV], *steps(*solution[:-1], answer), ["evaluate", "a", {"sparse": True}])
    assert (told[-1]["done"], told[-1]["reward"], grade["reward"]) == (True, reward, reward)


def test_what_cannot_be_read_is_answered_and_ends_nothing(inside: Inside) -> None:
    odd = ["{", {"role": "assistant", "content": "<tool_call>\n{\n</tool_call>"}, call("no_such_function")]
    _, *told = drive(inside, ["open", "a", KV], *steps(*odd))
    for reply, expected in zip(told, ("not valid JSON", "not valid JSON", "there is no function"), strict=True):
        assert expected in reply["messages"][0]["content"]
        assert not reply["done"]


def test_every_known_answer_is_worth_one_and_its_session_alone_holds_it(inside: Inside) -> None:
    report = inside("play_memories")
    assert report["rewards"] == {"1.0": 310}
    assert report["rewarded_early"] == 0
    assert report["leaked"] == 0
    assert inside("play_memories", hash_seed=4711)["digest"] == report["digest"]


def test_what_would_grow_without_bound_is_refused(inside: Inside) -> None:
    grow = [call("memory_append", text="e" * 9000), call("memory_replace", old_text="e", new_text="e" * 7)]
    told = drive(inside, ["open", "a", REC_SUM], *steps(*grow, grow[1]))
    assert '"Memory updated."' in told[2]["messages"][0]["content"]
    assert "more than 65536 characters" in told[3]["messages"][0]["content"]
    names = ("archival_memory_add", "core_memory_add")
    keys = [call(name, key="k" * length, value="v") for name in names for length in (1000, 1001)]
    searches = [call("core_memory_key_search", query="q " * 600), call("archival_memory_key_search", query="q " * 600)]
    told = drive(inside, ["open", "a", KV], *steps(*keys, *searches))
    refused = ["at most 1000 characters" in reply["messages"][0]["content"] for reply in told[1:]]
    assert refused == [False, True, False, True, True, True]
