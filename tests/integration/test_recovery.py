"""The orchestrator is killed with SIGKILL at random points and resumed: nothing is lost, repeated or left behind."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import apsw
import orjson
import pytest
from runs import Counted, counting, equal, play, read, until

from backends.sandboxes import private
from backends.sandboxes.local import LocalBackend
from bench.answers import read_log, repeated
from bench.endpoint import endpoint_process
from bench.endpoint_server import EndpointOptions
from orchestrator import Orchestrator, Run
from orchestrator.errors import EnvironmentChanged, RunBusy, RunExists, StoreError, UsageError
from orchestrator.testing import killed
from orchestrator.testing.leaks import labelled
from orchestrator.types import EpisodeKey, Group, Outcome

if TYPE_CHECKING:
    from orchestrator.types import Trajectory

LIFE = Path(__file__).with_name("life.py")
KILLS = 6
GRACE_S = 0.2
"""A decision made within this before a kill may be lost with it: the journal's interval, and its disk."""


async def live(out: Path, log: Path, *arguments: str, after_s: float, watched: Path | None = None) -> float | None:
    """One life, killed some seconds after `watched` has grown; when it was killed, or None where it came to its end."""
    command = [sys.executable, str(LIFE), str(out), str(log), *arguments]
    output = log.with_suffix(".out")
    before = await asyncio.to_thread(size, watched) if watched is not None else 0

    async def begun() -> bool:
        return watched is None or await asyncio.to_thread(size, watched) > before

    code = await killed(command, after_s=after_s, log=output, begun=begun)
    assert code in {0, -signal.SIGKILL}, await asyncio.to_thread(output.read_text)
    return None if code == 0 else time.time()


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


async def run_id(out: Path) -> str | None:
    """The label of the run's servers; None while it has no store."""

    def look() -> str | None:
        try:
            with Run.open(out) as run:
                return run.meta.run
        except (UsageError, StoreError):
            return None

    return await asyncio.to_thread(look)


async def no_server_left(out: Path) -> None:
    """The servers of a killed orchestrator die with it."""
    run = await run_id(out)

    async def gone() -> bool:
        return run is None or not await asyncio.to_thread(lambda: labelled(run))

    await until(gone, "the servers of a dead orchestrator to die", within_s=3.0)


async def lives(out: Path, log: Path, arguments: list[str], *, kills: int, seed: int, watched: Path) -> list[float]:
    """Live, be killed and resume until the run is finished; when it was killed.

    A fourth of the kills fall on what happens before the first decision of a life.
    """
    rng = random.Random(seed)
    struck: list[float] = []
    while len(struck) < kills:
        early, after_s = len(struck) % 4 == 3, rng.uniform(0.0, 1.0)
        at = await live(out, log, *arguments, after_s=after_s, watched=None if early else watched)
        assert at is not None, f"the run ended after {len(struck)} kills: make it longer"
        struck.append(at)
        await no_server_left(out)
    assert await live(out, log, *arguments, after_s=100.0) is None
    await no_server_left(out)
    return struck


def repeated_decisions(log: Path, struck: list[float]) -> list[dict[str, Any]]:
    """Decisions that were asked for again although they had been made more than GRACE_S before the next kill."""
    seen: set[tuple[Any, ...]] = set()
    again = []
    for line in log.read_bytes().splitlines():
        made = orjson.loads(line)
        name = (made["key"], made["attempt"], made["turn"])
        if name in seen:
            again.append(made)
        if not any(made["t"] <= kill <= made["t"] + GRACE_S for kill in struck):
            seen.add(name)
    return again


@pytest.mark.chaos
async def test_killed_again_and_again(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "decisions"
    arguments = ["--episodes", "512", "--concurrency", "48", "--think", "0.12"]
    struck = await lives(out, log, arguments, kills=KILLS, seed=3, watched=log)
    stored = await read(out)
    assert len(stored) == 512
    assert Counter(one.outcome for one in stored.values()) == {Outcome.COMPLETED: 512}
    assert {one.reward for one in stored.values()} == {1.0}
    assert any(one.recovered for one in stored.values()), "some kills fell on episodes in flight"
    assert await asyncio.to_thread(repeated_decisions, log, struck) == []
    plain = await play(tmp_path / "plain", Counted(counting), seed=11, group_size=2, episodes=512)
    assert equal(plain.episodes, stored)
    assert await asyncio.to_thread(groups_of, out) == [2] * 256


def groups_of(out: Path) -> list[int]:
    with Run.open(out) as run:
        groups = list(run.groups())
        assert [group.seq for group in groups] == list(range(1, len(groups) + 1))
        assert len({(group.task, group.group) for group in groups}) == len(groups)
        return [len(group.trajectories) for group in groups]


@pytest.mark.chaos
async def test_killed_while_a_model_is_asked(tmp_path: Path) -> None:
    """No call is made again that the endpoint had answered in time."""
    out, log = tmp_path / "run", tmp_path / "calls"
    async with endpoint_process(EndpointOptions(latency_s=0.3, jitter_s=0.1, log=log)) as endpoint:
        arguments = ["--episodes", "160", "--concurrency", "40", "--max-turns", "5", "--endpoint", endpoint.url]
        struck = await lives(out, tmp_path / "unused", arguments, kills=4, seed=9, watched=log)
    stored = await read(out)
    assert len(stored) == 160
    assert {(one.outcome, one.steps) for one in stored.values()} == {(Outcome.TRUNCATED, 5)}
    calls = await asyncio.to_thread(read_log, log)
    assert repeated(calls, struck, GRACE_S) == []
    assert 160 * 5 <= len(calls) <= 160 * 5 + len(struck) * 40
    assert sum(one.model_calls for one in stored.values()) == 160 * 5


async def test_what_a_kill_leaves_in_temporary_directories_goes_with_the_next_start(
    tmp_path: Path, private_folder: Path
) -> None:
    out = tmp_path / "run"
    life = await asyncio.create_subprocess_exec(sys.executable, LIFE, out, tmp_path / "decisions", "--think", "20")

    async def begun() -> bool:
        return await run_id(out) is not None

    await until(begun, "the run's store")
    life.kill()
    await life.wait()
    left = await asyncio.to_thread(lambda: list(private_folder.glob(f"{private.PREFIX}*")))
    assert left, "the killed orchestrator could not clean up"
    await no_server_left(out)
    played = await play(out, Counted(counting), resume=True, concurrency=32)
    assert played.summary.episodes == 64
    assert not await asyncio.to_thread(lambda: any(path.exists() for path in left))


@pytest.mark.parametrize("resume", [False, True])
async def test_a_kill_while_the_store_is_made(resume: bool, tmp_path: Path) -> None:
    """Nothing had been promised yet: the directory is as good as new, and nothing is there to resume."""
    out = tmp_path / "run"
    out.mkdir()
    with closing(apsw.Connection(str(out / "run.sqlite"))) as connection:
        connection.pragma("journal_mode", "wal")
    if resume:
        with pytest.raises(UsageError, match="there is no run in"):
            await play(out, Counted(counting), resume=True)
    else:
        assert (await play(out, Counted(counting), episodes=8)).summary.episodes == 8


async def test_a_finished_run_needs_no_journal(tmp_path: Path) -> None:
    await play(tmp_path / "run", Counted(counting), episodes=16, durability="step")
    assert list((tmp_path / "run" / "journal").iterdir()) == []


class TestSameSeed:
    async def test_concurrency_does_not_matter(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"seed": 4, "group_size": 2, "episodes": 512}
        wide = await play(tmp_path / "wide", Counted(counting), concurrency=512, sandboxes=3, **options)
        narrow = await play(tmp_path / "narrow", Counted(counting), concurrency=1, sandboxes=1, **options)
        assert len(wide.episodes) == 512
        assert equal(wide.episodes, narrow.episodes)

    async def test_another_seed_is_another_run(self, tmp_path: Path) -> None:
        one, other = [
            (await play(tmp_path / f"{seed}", Counted(counting), seed=seed, episodes=16)).episodes for seed in (1, 2)
        ]
        assert one.keys() == other.keys()
        assert not equal(one, other)


class TestDirectories:
    """One directory, one run, one owner."""

    async def part(self, out: Path, episodes: int = 40, stop_after: int = 10) -> dict[EpisodeKey, Trajectory]:
        """Collect some of a run and leave it."""
        async with Orchestrator(
            backend=LocalBackend("toy"), policy=Counted(counting, think_s=0.01), out=out, concurrency=4, sandboxes=1
        ) as orchestrator:
            seen = 0
            async for _ in orchestrator.collect(episodes=episodes):
                seen += 1
                if seen == stop_after:
                    break
        stored = await read(out)
        assert stop_after <= len(stored) < episodes
        return stored

    async def test_an_unfinished_run_must_be_resumed(self, tmp_path: Path) -> None:
        before = await self.part(tmp_path / "run")
        with pytest.raises(RunExists, match="`rollout resume"):
            await play(tmp_path / "run", Counted(counting))
        played = await play(tmp_path / "run", Counted(counting), resume=True)
        assert (played.summary.episodes, played.summary.state, played.summary.lives) == (40, "finished", 2)
        assert {key: one.buffer for key, one in played.episodes.items() if key in before} == {
            key: one.buffer for key, one in before.items()
        }, "what was stored stays as it was"

    async def test_a_finished_run_says_so_and_resumes_to_its_summary(self, tmp_path: Path) -> None:
        first = await play(tmp_path / "run", Counted(counting), episodes=8)
        with pytest.raises(RunExists, match="finished run: choose another directory"):
            await play(tmp_path / "run", Counted(counting))
        again = await play(tmp_path / "run", Counted(counting), resume=True)
        assert again.summary == first.summary
        assert again.episodes == first.episodes

    async def test_there_must_be_a_run_to_resume(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="there is no run in"):
            await play(tmp_path / "nothing", Counted(counting), resume=True)

    async def test_two_runs_on_one_directory(self, tmp_path: Path) -> None:
        async with Orchestrator(backend=LocalBackend("toy"), policy=Counted(counting), out=tmp_path / "run") as first:
            with pytest.raises(RunBusy, match="is in use by process"):
                await play(tmp_path / "run", Counted(counting))
            assert (await first.run(episodes=8)).episodes == 8

    async def test_another_environment_is_refused(self, tmp_path: Path) -> None:
        await self.part(tmp_path / "run")
        backend = LocalBackend("toy")
        backend.spec = replace(backend.spec, folder=await asyncio.to_thread(changed, backend.spec.folder, tmp_path))
        with pytest.raises(EnvironmentChanged, match="toy has changed since the run was recorded"):
            await play(tmp_path / "run", Counted(counting), backend=backend, resume=True)
        played = await play(tmp_path / "run", Counted(counting), resume=True)
        assert (played.summary.episodes, played.summary.duplicates) == (40, 0)


def changed(folder: Path, parent: Path) -> Path:
    """The same environment with one byte more."""
    copy = shutil.copytree(folder, parent / "toy")
    with (copy / "inside.py").open("a", encoding="utf-8") as source:
        source.write("\n")
    return copy


async def test_groups_that_nobody_had_acknowledged_come_again(tmp_path: Path) -> None:
    """A collector that dies between two groups is given the one it held again, marked as such."""
    seen: list[Group] = []
    for resume in (False, True):
        async with Orchestrator(
            backend=LocalBackend("toy"), policy=Counted(counting), out=tmp_path / "run", concurrency=8, resume=resume
        ) as orchestrator:
            async for group in orchestrator.collect(episodes=24, group_size=2):
                seen.append(group)
                if len(seen) == 5:
                    break
    names = [(group.task, group.group) for group in seen]
    assert len(names) == 13
    assert len(set(names)) == 12, "each group once, and the fifth twice"
    assert names[4] == names[5]
    redelivered = [group.redelivered for group in seen]
    assert redelivered[:6] == [False] * 5 + [True]
    assert not redelivered[-1]
