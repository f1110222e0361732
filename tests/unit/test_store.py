"""The store: what is handed over is stored once, in order, whole groups at once, by the newest epoch alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import apsw
import pytest

from orchestrator.errors import RunExists, SchemaMismatch, StoreError, UsageError
from orchestrator.store import Claims, RunMeta, Store, StoreReader, holds_run
from orchestrator.testing.queue import sample_group
from orchestrator.types import (
    EpisodeKey,
    Failure,
    FailureKind,
    GroupRelease,
    Outcome,
    RunId,
    StopReason,
    Trajectory,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

META = RunMeta(RunId("r-1"), "toy", "0123456789abcdef", 7, 1000.0, {"model": {"key": "API_KEY"}, "list": [1, None]})


class Commits:
    """What a store reports, and a way to wait for it."""

    def __init__(self) -> None:
        self.keys: list[EpisodeKey] = []
        self.seqs: list[int] = []
        self.errors: list[StoreError] = []
        self.calls = 0
        self.changed = asyncio.Event()

    def on_commit(self, keys: Sequence[EpisodeKey], seqs: Sequence[int]) -> None:
        self.calls += 1
        self.keys += keys
        self.seqs += seqs
        self.changed.set()

    def on_error(self, error: StoreError) -> None:
        self.errors.append(error)
        self.changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()


async def started(store: Store) -> Commits:
    commits = Commits()
    await store.start(commits.on_commit, commits.on_error)
    return commits


def episode(task: str, group: int = 0, sample: int = 0, **changes: object) -> Trajectory:
    template = sample_group(1).trajectories[0]
    return replace(template, key=EpisodeKey(task, group, sample), **changes)  # type: ignore[arg-type]


def path_of(folder: Path) -> Path:
    return folder / "run.sqlite"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def log_bytes(folder: Path) -> int:
    return (folder / "run.sqlite-wal").stat().st_size


async def test_what_is_put_comes_back_equal(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    commits = await started(store)
    failed = Trajectory(
        key=EpisodeKey("tâche/1", 2, 3),
        attempt=4,
        outcome=Outcome.INFRA_FAILED,
        stop_reason=StopReason.FAILURE,
        reward=None,
        steps=5,
        buffer=b"\x00\xff" * 10_000,
        incarnations=6,
        model_calls=7,
        prompt_tokens=8,
        completion_tokens=9,
        failure=Failure(FailureKind.SANDBOX_LOST, "step", "gone: “quoted”"),
        details=b'{"a":1}',
        started=10.5,
        finished=11.25,
    )
    graded = episode("a", reward=0.1 + 0.2, outcome=Outcome.TRUNCATED, stop_reason=StopReason.MAX_TURNS)
    store.put(failed, None)
    store.put(graded, GroupRelease("a", 0, 1, partial=False))
    await store.flush()
    await store.close()
    assert commits.keys == [failed.key, graded.key]
    assert commits.seqs == [1]
    with StoreReader(path_of(tmp_path)) as reader:
        assert list(reader.episodes()) == [failed, graded]
        assert list(reader.episodes("key")) == [graded, failed]
        assert reader.episode(failed.key) == failed
        assert reader.episode(EpisodeKey("tâche/1", 2, 4)) is None
        assert reader.meta == META


async def test_order_batches_and_backlog(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    keys = [EpisodeKey(f"t{n % 7}", n // 7, 0) for n in range(300)]
    for key in keys:
        store.put(episode(key.task, key.group), GroupRelease(key.task, key.group, 1, partial=False))
    assert store.backlog == 300
    commits = await started(store)
    await store.flush()
    assert store.backlog == 0
    assert commits.keys == keys
    assert commits.seqs == list(range(1, 301))
    assert commits.calls == 3, "up to 128 rows a commit"
    assert store.statistics().commits == commits.calls
    with StoreReader(path_of(tmp_path)) as reader:
        assert [one.key for one in reader.episodes()] == keys
        assert [one.key for one in reader.episodes("key")] == sorted(keys)
        assert [(group.task, group.group) for group in reader.groups()] == [(key.task, key.group) for key in keys]
        assert [group.seq for group in reader.groups(after=290)] == list(range(291, 301))
    await store.close()


async def test_a_lone_row_is_stored_without_anything_behind_it(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    commits = await started(store)
    for number in range(3):
        store.put(episode(f"t{number}"), None)
        await commits.until(lambda expected=number + 1: len(commits.keys) == expected)  # type: ignore[misc]
    assert store.backlog == 0
    await store.close()


async def test_group_is_released_with_its_last_trajectory(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    await started(store)
    group = sample_group(3, size=4)
    *first, last = group.trajectories
    for trajectory in first:
        store.put(trajectory, None)
    await store.flush()
    assert await store.open_groups() == {("task_3", 0): [trajectory.key for trajectory in first]}
    assert await store.unacked("trainer") == 0
    store.put(last, GroupRelease("task_3", 0, 4, partial=True))
    await store.flush()
    assert await store.open_groups() == {}
    assert await store.unacked("trainer") == 1
    with StoreReader(path_of(tmp_path)) as reader:
        assert list(reader.groups()) == [replace(group, seq=1)]
    await store.close()


async def test_group_that_is_not_whole_is_not_released(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    commits = await started(store)
    store.put(episode("a"), GroupRelease("a", 0, 2, partial=False))
    with pytest.raises(StoreError, match="not whole"):
        await store.flush()
    assert len(commits.errors) == 1
    with pytest.raises(StoreError, match="1 trajectories are not stored"):
        await store.close()
    with StoreReader(path_of(tmp_path)) as reader:
        assert list(reader.episodes()) == []


async def test_key_put_twice_is_stored_once_and_counted(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    commits = await started(store)
    release = GroupRelease("a", 0, 1, partial=False)
    store.put(episode("a", reward=None), release)
    await store.flush()
    store.put(episode("b", attempt=1), None)
    store.put(episode("a", attempt=9), release)
    store.put(episode("b", attempt=2), None)
    store.put(episode("c"), GroupRelease("c", 0, 1, partial=False))
    await store.flush()
    assert [key.task for key in commits.keys] == ["a", "b", "c"]
    assert commits.seqs == [1, 2]
    totals = await store.totals()
    assert (totals.episodes, totals.groups, totals.duplicates) == (3, 2, 2)
    stored = await store.committed()
    assert [stored[EpisodeKey(task, 0, 0)].attempt for task in "abc"] == [1, 1, 1]
    assert store.backlog == 0
    await store.close()


async def test_toolsets_are_there_before_what_names_them(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    commits = await started(store)
    store.put_toolsets({"d1": b"[1]"})
    store.put(episode("a"), None)
    await commits.until(lambda: commits.keys)
    assert await store.toolsets() == {"d1": b"[1]"}
    store.put_toolsets({"d1": b"[1]", "d2": b"[2]"})
    store.put_toolsets({"d1": b"[1]"})
    store.put(episode("b"), None)
    await store.flush()
    assert await store.toolsets() == {"d1": b"[1]", "d2": b"[2]"}
    store.put_toolsets({"d3": b"[3]"})
    await store.close()
    with StoreReader(path_of(tmp_path)) as reader:
        assert reader.toolsets().keys() == {"d1", "d2", "d3"}


async def test_totals(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    await started(store)
    assert (await store.totals()).episodes == 0
    assert (await store.totals()).reward_mean is None
    cost = {"steps": 2, "model_calls": 3, "prompt_tokens": 50, "completion_tokens": 7}
    store.put(episode("a", reward=1.0, outcome=Outcome.COMPLETED, incarnations=3, **cost), None)
    store.put(episode("b", reward=0.25, outcome=Outcome.TRUNCATED, **cost), None)
    store.put(episode("c", reward=None, outcome=Outcome.POISONED, steps=0), None)
    store.put(episode("d", reward=1.0, outcome=Outcome.COMPLETED, **cost), GroupRelease("d", 0, 1, partial=False))
    await store.flush()
    totals = await store.totals()
    assert totals.outcomes == {Outcome.COMPLETED: 2, Outcome.TRUNCATED: 1, Outcome.POISONED: 1}
    assert (totals.episodes, totals.rewarded, totals.reward_sum, totals.reward_one) == (4, 3, 2.25, 2)
    assert (totals.steps, totals.model_calls, totals.prompt_tokens, totals.completion_tokens) == (6, 9, 150, 21)
    assert (totals.recovered, totals.groups, totals.duplicates, totals.redelivered) == (1, 1, 0, 0)
    assert totals.reward_mean == 0.75
    with Claims(path_of(tmp_path), "one") as claims:
        claims.nack(*claims.claim(1, 60))
        claims.nack(*claims.claim(1, 60))
        claims.ack(*claims.claim(1, 60))
    assert (await store.totals()).redelivered == 2
    await store.close()


async def test_reward_belongs_to_outcomes_that_may_carry_one(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    await started(store)
    store.put(episode("a", outcome=Outcome.INFRA_FAILED, reward=0.0), None)
    with pytest.raises(StoreError, match="CHECK"):
        await store.flush()
    with pytest.raises(StoreError, match="not stored"):
        await store.close()


async def test_plan_summary_and_state_survive(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    assert (store.run_epoch, store.state, store.summary) == (1, "running", None)
    assert await store.load_plan() is None
    await store.save_plan({"tasks": ["a", "b"], "size": 2})
    assert await store.raise_epoch() == 2
    await store.finish({"episodes": 4})
    await store.close()
    again = Store.load(path_of(tmp_path))
    assert (again.run_epoch, again.state, again.summary, again.meta) == (2, "finished", {"episodes": 4}, META)
    assert await again.load_plan() == {"tasks": ["a", "b"], "size": 2}
    await again.close()
    with pytest.raises(RunExists, match="finished run"):
        Store.create(path_of(tmp_path), META)


async def test_run_is_finished_only_after_all_that_was_put(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    commits = await started(store)
    for number in range(200):
        store.put(episode(f"t{number}"), GroupRelease(f"t{number}", 0, 1, partial=False))
    await store.finish({})
    assert len(commits.keys) == 200
    await store.close()


async def test_late_writer_of_an_older_epoch_is_refused_whole(tmp_path: Path) -> None:
    late = Store.create(path_of(tmp_path), META)
    told = await started(late)
    late.put(episode("a"), None)
    await late.flush()
    store = Store.load(path_of(tmp_path))
    assert await store.raise_epoch() == 2
    await started(store)
    late.put(episode("b"), GroupRelease("b", 0, 1, partial=False))
    with pytest.raises(StoreError, match="resumed the run"):
        await late.flush()
    assert [str(error).split(":")[0] for error in told.errors] == [f"another process has resumed the run in {tmp_path}"]
    for change in (late.finish({}), late.save_plan({}), late.raise_epoch()):
        with pytest.raises(StoreError, match="resumed the run"):
            await change
    with pytest.raises(StoreError, match="not stored"):
        await late.close()
    store.put(episode("b", attempt=2), None)
    await store.flush()
    assert {key.task: one.attempt for key, one in (await store.committed()).items()} == {"a": 1, "b": 2}
    assert store.state == "running"
    await store.close()


async def test_old_writers_changes_of_the_run_are_refused_even_with_nothing_to_store(tmp_path: Path) -> None:
    late = Store.create(path_of(tmp_path), META)
    store = Store.load(path_of(tmp_path))
    await store.raise_epoch()
    for change in (late.finish({}), late.save_plan({}), late.raise_epoch()):
        with pytest.raises(StoreError, match="resumed the run"):
            await change
    await late.close()
    await store.close()
    with StoreReader(path_of(tmp_path)) as reader:
        assert (reader.state, reader.plan, reader.run_epoch) == ("running", None, 2)


async def test_second_store_is_not_made_over_a_first(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    with pytest.raises(RunExists, match="rollout resume"):
        Store.create(path_of(tmp_path), META)
    await store.close()


def test_missing_store_names_what_to_do(tmp_path: Path) -> None:
    assert not holds_run(path_of(tmp_path))
    for open_it in (Store.load, StoreReader, lambda path: Claims(path, "one")):
        with pytest.raises(UsageError, match="there is no run in"):
            open_it(path_of(tmp_path))
    assert names(tmp_path) == [], "looking for a run must not make one"


async def test_creation_that_was_cut_short_is_no_run_and_can_be_repeated(tmp_path: Path) -> None:
    half = apsw.Connection(str(path_of(tmp_path)))
    half.pragma("journal_mode", "wal")
    half.close()
    assert not holds_run(path_of(tmp_path))
    with pytest.raises(UsageError, match="cut short"):
        Store.load(path_of(tmp_path))
    store = Store.create(path_of(tmp_path), META)
    await store.close()
    assert holds_run(path_of(tmp_path))


def test_another_schema_is_refused(tmp_path: Path) -> None:
    other = apsw.Connection(str(path_of(tmp_path)))
    other.execute("CREATE TABLE notes(text)")
    other.pragma("user_version", 99)
    other.close()
    for open_it in (Store.load, StoreReader, lambda path: Claims(path, "one"), lambda path: Store.create(path, META)):
        with pytest.raises(SchemaMismatch, match="schema 99"):
            open_it(path_of(tmp_path))


def test_database_of_others_is_not_taken_over(tmp_path: Path) -> None:
    other = apsw.Connection(str(path_of(tmp_path)))
    other.execute("CREATE TABLE notes(text)")
    other.close()
    with pytest.raises(SchemaMismatch, match="no store of this version"):
        Store.create(path_of(tmp_path), META)


def test_file_that_is_no_database_is_explained(tmp_path: Path) -> None:
    path_of(tmp_path).write_text("This is my diary, not a database. " * 100, encoding="utf-8")
    for open_it in (Store.load, StoreReader, lambda path: Store.create(path, META)):
        with pytest.raises(StoreError, match="damaged or not a run's store"):
            open_it(path_of(tmp_path))


async def test_close_stores_what_is_left_and_can_be_repeated(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    commits = await started(store)
    for number in range(1000):
        store.put(episode(f"t{number}"), None)
    await store.close()
    await store.close()
    assert store.backlog == 0
    await commits.until(lambda: len(commits.keys) == 1000)
    assert names(tmp_path) == ["run.sqlite"], "the log is folded into the store"


async def test_store_that_was_never_started_closes(tmp_path: Path) -> None:
    await Store.create(path_of(tmp_path), META).close()
    assert holds_run(path_of(tmp_path))


async def test_slow_reader_sees_what_comes_and_holds_nothing_up(tmp_path: Path) -> None:
    store = Store.create(path_of(tmp_path), META)
    await started(store)
    for number in range(100):
        store.put(episode(f"t{number:03}", buffer=bytes(20_000)), None)
    await store.flush()
    with StoreReader(path_of(tmp_path)) as reader:
        episodes = reader.episodes()
        assert next(episodes).key.task == "t000"
        for number in range(100, 2000):
            store.put(episode(f"t{number:03}", buffer=bytes(20_000)), None)
        await store.flush()
        assert log_bytes(tmp_path) < 30_000_000, "an open reader kept the log from being folded into the store"
        assert sum(1 for _ in episodes) == 1999
    await store.close()
