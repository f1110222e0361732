"""Reading a run: its episodes by any name, their conversations turn by turn and as OpenAI messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
import pytest

from orchestrator.errors import UnknownName, UsageError
from orchestrator.records import EpisodeBuffer, header
from orchestrator.run import Run
from orchestrator.store import RunMeta, Store
from orchestrator.types import (
    Decision,
    EpisodeKey,
    Evaluation,
    Generation,
    GroupRelease,
    Observation,
    Outcome,
    RunId,
    StopReason,
    Trajectory,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

META = RunMeta(RunId("r-1"), "toy", "0123456789abcdef", 7, 1000.0, {})
HEAD = header("toy", META.digest)
USER = {"role": "user", "content": "How big?"}
ACTION = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
ANSWER = {"role": "tool", "tool_call_id": "1", "content": "5"}
FINAL = {"role": "assistant", "content": "Five."}
GENERATION = Generation("m-1", 10, 3, 0.5, "stop", {"temperature": 1.0})


def observed(messages: list[Mapping[str, object]], **more: object) -> bytes:
    return orjson.dumps({"messages": messages, **more})


def trajectory(task: str, buffer: EpisodeBuffer, *, group: int = 0, sample: int = 0) -> Trajectory:
    key = EpisodeKey(task, group, sample)
    data = bytes(buffer.data)
    return Trajectory(key, 1, Outcome.COMPLETED, StopReason.DONE, 1.0, buffer.turn, data, started=1.0, finished=2.0)


def conversation() -> EpisodeBuffer:
    buffer = EpisodeBuffer(HEAD)
    buffer.observe(Observation(observed([USER], tools="d1")))
    buffer.decide(Decision(orjson.dumps(ACTION), GENERATION))
    buffer.observe(Observation(observed([ANSWER], tools_added=[{"name": "late"}]), 0.5))
    buffer.decide(Decision(orjson.dumps(FINAL)))
    buffer.observe(Observation(observed([]), 1.0, done=True))
    buffer.grade(Evaluation(1.0))
    return buffer


async def write(folder: Path, trajectories: list[Trajectory]) -> None:
    store = Store.create(folder / "run.sqlite", META)
    await store.start(lambda keys, seqs: None, lambda error: None)
    store.put_toolsets({"d1": b'[{"name":"ls"}]', "d2": b"[]"})
    for one in trajectories:
        store.put(one, GroupRelease(one.key.task, one.key.group, 1, partial=False) if one.key.sample == 0 else None)
    await store.save_plan({"tasks": ["a"]})
    await store.close()


async def test_transcript_and_openai_row(tmp_path: Path) -> None:
    one = trajectory("a", conversation())
    await write(tmp_path, [one])
    with Run.open(tmp_path) as run:
        first, second, last = run.transcript(run.episode("a"))
        assert (first.number, first.messages, first.reward, first.done, first.tools) == (0, [USER], 0.0, False, "d1")
        assert (first.action, first.generation, first.tools_added) == (ACTION, GENERATION, [])
        assert (second.messages, second.reward, second.tools_added) == ([ANSWER], 0.5, [{"name": "late"}])
        assert (second.action, second.generation, second.tools) == (FINAL, None, None)
        assert (last.number, last.messages, last.reward, last.done, last.action) == (2, [], 1.0, True, None)
        row = run.to_openai(one)
    assert orjson.loads(orjson.dumps(row)) == {
        "key": "a/0/0",
        "task": "a",
        "messages": [USER, ACTION, ANSWER, FINAL],
        "tools": [{"name": "ls"}, {"name": "late"}],
        "reward": 1.0,
        "outcome": "completed",
        "stop_reason": "done",
        "steps": 2,
    }


async def test_an_episode_of_several_conversations_is_kept_whole_and_tells_where_each_begins(tmp_path: Path) -> None:
    buffer = EpisodeBuffer(HEAD)
    buffer.observe(Observation(observed([USER])))
    buffer.decide(Decision(orjson.dumps(FINAL)))
    buffer.observe(Observation(observed([ANSWER, USER], new_conversation=True)))
    one = trajectory("a", buffer)
    await write(tmp_path, [one])
    with Run.open(tmp_path) as run:
        assert [turn.new_conversation for turn in run.transcript(one)] == [False, True]
        row = run.to_openai(one)
    assert (row["messages"], row["conversations"]) == ([USER, FINAL, ANSWER, USER], [0, 2])


async def test_unanswered_action_and_episode_that_never_opened(tmp_path: Path) -> None:
    cut = EpisodeBuffer(HEAD)
    cut.observe(Observation(observed([USER])))
    cut.decide(Decision(orjson.dumps(ACTION), GENERATION))
    await write(tmp_path, [trajectory("cut", cut), trajectory("never", EpisodeBuffer(HEAD))])
    with Run.open(tmp_path) as run:
        (turn,) = run.transcript(run.episode("cut"))
        assert (turn.messages, turn.action, turn.generation) == ([USER], ACTION, GENERATION)
        assert run.transcript(run.episode("never")) == []
        never = run.to_openai(run.episode("never"))
        assert (never["messages"], never["tools"]) == ([], [])


async def test_an_episode_is_found_by_any_of_its_names(tmp_path: Path) -> None:
    names = [("a", 0, 0), ("a", 2, 0), ("b", 0, 3), ("web/a", 0, 0), ("web/a/7", 0, 0), ("x/1/2", 0, 0)]
    await write(tmp_path, [trajectory(task, conversation(), group=g, sample=s) for task, g, s in names])
    with Run.open(tmp_path) as run:
        for task, group, sample in names:
            key = EpisodeKey(task, group, sample)
            assert run.episode(key).key == key
            assert run.episode(str(key)).key == key
        for text, key in {
            "a": EpisodeKey("a", 0, 0),
            "a/2": EpisodeKey("a", 2, 0),
            "web/a": EpisodeKey("web/a", 0, 0),
            "web/a/7": EpisodeKey("web/a/7", 0, 0),
            "x/1/2": EpisodeKey("x/1/2", 0, 0),
        }.items():
            assert run.episode(text).key == key
        with pytest.raises(UnknownName, match="stored are such as a/0/0"):
            run.episode("a/5/5")
        with pytest.raises(UnknownName, match="no episode "):
            run.episode("")


async def test_what_the_run_is(tmp_path: Path) -> None:
    await write(tmp_path, [trajectory("a", conversation())])
    with Run.open(str(tmp_path)) as run:
        assert (run.meta, run.state, run.summary, run.plan) == (META, "running", None, {"tasks": ["a"]})
        assert run.totals().episodes == 1
        assert [group.task for group in run.groups()] == ["a"]
        assert [one.key.task for one in run.episodes()] == ["a"]
        assert run.toolsets() == {"d1": b'[{"name":"ls"}]', "d2": b"[]"}
        assert "r-1" in repr(run)


def test_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run in"):
        Run.open(tmp_path / "nothing")
