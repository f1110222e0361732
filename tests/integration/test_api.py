"""The Python API on real sandboxes: collecting, delivering, ending early, and what is said to those who misuse it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from runs import QUICK, Counted, counting, equal, play, read, until

from backends.sandboxes.local import LocalBackend
from backends.trainers.memory import MemoryQueue
from orchestrator import Orchestrator, Outcome, Run
from orchestrator.errors import PolicyError, RunFailed, UnknownName, UsageError
from orchestrator.events import DeliveryWaits, Draining, EpisodeEnded, SandboxStarted
from orchestrator.store import holds_run
from orchestrator.types import REWARDED, Failure, FailureKind
from policies.agents.replay import ReplayPolicy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from orchestrator.events import Event
    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView
    from orchestrator.types import Group


def toy(out: Path, policy: Any = None, **options: Any) -> Orchestrator:
    options = {"concurrency": 16, "sandboxes": 1, "retry": QUICK, **options}
    return Orchestrator(backend=LocalBackend("toy"), policy=policy or Counted(counting), out=out, **options)


class TestCollect:
    async def test_the_common_case(self, tmp_path: Path) -> None:
        async with toy(tmp_path / "run", ReplayPolicy()) as orchestrator:
            groups = [group async for group in orchestrator.collect(split="toy:val", group_size=4)]
        for group in groups:
            assert group.rewards == [1.0] * 4
            assert [one.key.sample for one in group.trajectories] == [0, 1, 2, 3]
        assert [group.seq for group in groups] == list(range(1, 33))
        assert {group.task for group in groups} == {f"toy_{number}" for number in range(1, 64, 2)}
        summary = orchestrator.summary
        assert summary is not None
        assert (summary.episodes, summary.planned, summary.groups, summary.reward_mean) == (128, 128, 32, 1.0)
        assert (summary.state, summary.duplicates, summary.redelivered, summary.model_calls) == ("finished", 0, 0, 0)
        assert summary.steps == sum(one.steps for group in groups for one in group.trajectories)
        assert summary.cpu_us_per_step_orchestrator is not None
        assert summary.cpu_us_per_step_orchestrator > 0
        assert summary.cpu_s_sandbox >= 0

    async def test_what_is_given_is_what_is_stored(self, tmp_path: Path) -> None:
        async with toy(tmp_path / "run") as orchestrator:
            given = [group async for group in orchestrator.collect(episodes=24, group_size=3)]
        assert await asyncio.to_thread(stored_groups, tmp_path / "run") == given
        stored = await read(tmp_path / "run")
        assert {one.key: one for group in given for one in group.trajectories} == stored

    async def test_more_than_one_round(self, tmp_path: Path) -> None:
        played = await play(tmp_path / "run", Counted(counting), tasks=["toy_1", "toy_2"], episodes=12, group_size=2)
        assert sorted({(key.task, key.group) for key in played.episodes}) == [
            ("toy_1", 0), ("toy_1", 1), ("toy_1", 2), ("toy_2", 0), ("toy_2", 1), ("toy_2", 2)
        ]  # fmt: skip

    async def test_partial_groups_say_so_and_are_not_filled_with_zeros(self, tmp_path: Path) -> None:
        def act(view: ConversationView, ctx: EpisodeContext) -> str:
            return "error" if ctx.key.sample == 1 and ctx.key.task == "toy_3" else counting(view, ctx)

        groups: dict[str, Group] = {}
        async with toy(tmp_path / "run", Counted(act)) as orchestrator:
            async for group in orchestrator.collect(tasks=["toy_2", "toy_3"], group_size=3):
                groups[group.task] = group
        assert (groups["toy_2"].partial, groups["toy_2"].rewards) == (False, [1.0] * 3)
        assert (groups["toy_3"].partial, groups["toy_3"].rewards) == (True, [1.0, None, 1.0])

    @pytest.mark.parametrize("leave_after", [1, 7])
    async def test_leaving_early_stops_the_run_and_a_resume_goes_on(self, leave_after: int, tmp_path: Path) -> None:
        policy = Counted(counting, think_s=0.01)
        async with toy(tmp_path / "run", policy) as orchestrator:
            async for group in orchestrator.collect(episodes=48):
                if group.seq == leave_after:
                    break
        assert len(await read(tmp_path / "run")) < 48
        plain = await play(tmp_path / "plain", Counted(counting), episodes=48)
        async with toy(tmp_path / "run", policy, resume=True) as orchestrator:
            seen = {group.seq async for group in orchestrator.collect()}
        assert seen == set(range(leave_after, 49)), "from the one that was not acknowledged"
        assert equal(plain.episodes, await read(tmp_path / "run"))
        assert policy.repeated() == 0

    async def test_a_body_that_raises_leaves_the_run_to_a_resume(self, tmp_path: Path) -> None:
        async def train(orchestrator: Orchestrator) -> None:
            async for group in orchestrator.collect(episodes=16):
                raise ZeroDivisionError(group)

        async with toy(tmp_path / "run") as orchestrator:
            with pytest.raises(ZeroDivisionError):
                await train(orchestrator)
        assert orchestrator.summary is None
        assert (await play(tmp_path / "run", Counted(counting), resume=True)).summary.episodes == 16


async def paused(orchestrator: Orchestrator) -> bool:
    return orchestrator.progress().paused == "the consumer is behind"


def stored_groups(out: Path) -> list[Group]:
    """All released groups; none before there is a run."""
    if not holds_run(out / "run.sqlite"):
        return []
    with Run.open(out) as run:
        return list(run.groups())


class TestBackpressure:
    """Nobody has more than so many groups waiting for a consumer that is behind."""

    UNACKED, CONCURRENCY, EPISODES = 6, 8, 120

    async def released(self, out: Path) -> int:
        return len(await asyncio.to_thread(stored_groups, out))

    async def settles(self, out: Path) -> int:
        """How many groups there are once nothing more is released."""
        before = -1
        while (now := await self.released(out)) != before:
            before = now
            await asyncio.sleep(0.4)
        return now

    async def test_a_consumer_that_stops_taking(self, tmp_path: Path) -> None:
        out = tmp_path / "run"
        async with toy(out, concurrency=self.CONCURRENCY, max_unacked=self.UNACKED) as orchestrator:
            taken = 0
            async for _ in orchestrator.collect(episodes=self.EPISODES):
                taken += 1
                if taken in {3, 40}:
                    waiting = await self.settles(out) - (taken - 1)
                    assert self.UNACKED <= waiting <= self.UNACKED + self.CONCURRENCY
                    progress = orchestrator.progress()
                    assert (progress.paused, progress.running) == ("the consumer is behind", 0)
        assert taken == self.EPISODES

    async def test_a_queue_that_is_full(self, tmp_path: Path) -> None:
        out, queue = tmp_path / "run", MemoryQueue(maxsize=2)
        options = {"concurrency": self.CONCURRENCY, "max_unacked": self.UNACKED, "queue": queue}
        async with toy(out, **options) as orchestrator, asyncio.TaskGroup() as tasks:
            running = tasks.create_task(orchestrator.run(episodes=self.EPISODES))
            await until(lambda: paused(orchestrator), "the queue to be full")
            stopped = await self.settles(out)
            assert self.UNACKED <= stopped - 2 <= self.UNACKED + self.CONCURRENCY
            assert queue.statistics().waiting == 2
            assert not running.done()
            taken = []
            async for group in queue:
                taken.append((group.task, group.group))
                if len(taken) == self.EPISODES:
                    break
        assert len(set(taken)) == self.EPISODES
        assert running.result().episodes == self.EPISODES
        assert queue.statistics().repeated == 0

    async def test_a_consumer_elsewhere(self, tmp_path: Path) -> None:
        """A trainer in another process: stopped, it pauses the run; killed, another one goes on; all is acked once."""
        out, log = tmp_path / "run", tmp_path / "trained"
        options = {"concurrency": self.CONCURRENCY, "max_unacked": self.UNACKED, "consumer": "trainer"}
        async with toy(out, **options) as orchestrator, asyncio.TaskGroup() as tasks:
            running = tasks.create_task(orchestrator.run(episodes=self.EPISODES))
            first = await self.trainer(out, log)

            async def trained_some() -> bool:
                return await asyncio.to_thread(trained, log) >= 20

            await until(trained_some, "the first trainer's work")
            first.send_signal(19)  # SIGSTOP
            assert await self.settles(out) < self.EPISODES
            assert not running.done()
            first.kill()
            await first.wait()
            second = await self.trainer(out, log)
            assert (await running).episodes == self.EPISODES
            assert await second.wait() == 0
        names = (await asyncio.to_thread(log.read_text)).split()
        assert len(set(names)) == self.EPISODES
        assert len(names) <= self.EPISODES + 1, "the one that the killed trainer had not acknowledged"

    async def trainer(self, out: Path, log: Path) -> asyncio.subprocess.Process:
        program = (
            "import asyncio, os, sys\n"
            "from backends.trainers.durable import DurableQueue\n"
            "async def main(out, log):\n"
            "    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n"
            "    async with DurableQueue(out, lease_s=1.0, limit=1) as queue:\n"
            "        async for group in queue:\n"
            "            os.write(file, f'{group.task}/{group.group}\\n'.encode())\n"
            "asyncio.run(main(*sys.argv[1:]))\n"
        )
        return await asyncio.create_subprocess_exec(sys.executable, "-c", program, out, log)


def trained(log: Path) -> int:
    return len(log.read_text(encoding="ascii").split()) if log.exists() else 0


class TestQueue:
    async def test_every_group_is_delivered_once_in_order(self, tmp_path: Path) -> None:
        queue = MemoryQueue(maxsize=1000)
        played = await play(tmp_path / "run", Counted(counting), queue=queue, episodes=40, group_size=2)
        assert queue.statistics()[:2] == (20, 20)
        await queue.close()
        groups = [group async for group in queue]
        assert [group.seq for group in groups] == list(range(1, 21))
        assert played.summary.state == "finished"

    async def test_one_that_waits_is_reported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("orchestrator.delivery.REPORT_S", 0.1)

        class Slow:
            name = "slow"

            async def deliver(self, group: Group) -> None:
                if group.seq == 1:
                    await asyncio.sleep(0.35)

        played = await play(tmp_path / "run", Counted(counting), queue=Slow(), episodes=4)
        waits = [event for event in played.events if isinstance(event, DeliveryWaits)]
        assert [(event.queue, round(event.seconds, 1)) for event in waits] == [
            ("slow", 0.1),
            ("slow", 0.2),
            ("slow", 0.3),
        ]

    async def test_one_that_fails_ends_the_run_and_a_resume_delivers_the_rest(self, tmp_path: Path) -> None:
        class Broken(MemoryQueue):
            async def deliver(self, group: Group) -> None:
                if group.seq == 3:
                    raise UsageError("the trainer is not there; start it")
                await super().deliver(group)

        queue = Broken(maxsize=1000)
        with pytest.raises(UsageError, match="the trainer is not there"):
            await play(tmp_path / "run", Counted(counting), queue=queue, episodes=10)
        assert queue.statistics().accepted == 2
        whole = MemoryQueue(maxsize=1000)
        await play(tmp_path / "run", Counted(counting), queue=whole, resume=True)
        await whole.close()
        assert [group.seq async for group in whole] == list(range(3, 11))

    @pytest.mark.parametrize("end", [Orchestrator.drain, Orchestrator.cancel])
    async def test_ended_while_it_waits(self, end: Callable[[Orchestrator], None], tmp_path: Path) -> None:
        """What it has not accepted stays in the outbox."""
        queue = MemoryQueue(maxsize=1)
        options = {"queue": queue, "max_unacked": 2, "concurrency": 2}
        async with toy(tmp_path / "run", **options) as orchestrator, asyncio.TaskGroup() as tasks:
            running = tasks.create_task(orchestrator.run(episodes=30))
            await until(lambda: paused(orchestrator), "the queue to be full")
            end(orchestrator)
        assert running.result().state == "unfinished"
        await self.check_rest(tmp_path / "run", delivered=1, episodes=30)

    async def test_cancelled_while_only_a_delivery_waits(self, tmp_path: Path) -> None:
        queue = MemoryQueue(maxsize=1)
        async with toy(tmp_path / "run", queue=queue) as orchestrator, asyncio.TaskGroup() as tasks:
            running = tasks.create_task(orchestrator.run(episodes=4))

            async def stored() -> bool:
                return orchestrator.progress().done == 4 and queue.statistics().waiting == 1

            await until(stored, "the last episode")
            orchestrator.cancel()
            async with asyncio.timeout(10):
                assert (await running).state == "unfinished"
        await self.check_rest(tmp_path / "run", delivered=1, episodes=4)

    async def check_rest(self, out: Path, delivered: int, episodes: int) -> None:
        """A resume delivers what was not accepted; what was accepted and not acknowledged comes again, and says so."""
        rest = MemoryQueue(maxsize=1000)
        played = await play(out, Counted(counting), queue=rest, resume=True)
        assert played.summary.state == "finished"
        await rest.close()
        groups = [group async for group in rest]
        assert all(group.redelivered for group in groups if group.seq <= delivered)
        assert [group.seq for group in groups if group.seq > delivered] == list(range(delivered + 1, episodes + 1))


class TestEnds:
    async def test_drain_finishes_what_runs_and_starts_nothing_more(self, tmp_path: Path) -> None:
        policy = Counted(counting, think_s=0.02)
        events: list[Event] = []
        async with toy(tmp_path / "run", policy, listener=events.append) as orchestrator, asyncio.TaskGroup() as tasks:
            running = tasks.create_task(orchestrator.run(episodes=100))

            async def some() -> bool:
                return orchestrator.progress().done >= 20

            await until(some, "the first episodes")
            orchestrator.drain()
            orchestrator.drain()
            assert orchestrator.progress().draining
        summary = running.result()
        assert summary.state == "unfinished"
        assert 20 <= summary.episodes <= 20 + 16 * 2
        assert summary.outcomes == {"completed": summary.episodes}, "what ran came to its own end"
        assert sum(isinstance(event, Draining) for event in events) == 1
        assert (await play(tmp_path / "run", policy, resume=True)).summary.episodes == 100
        assert policy.repeated() == 0

    async def test_drain_before_the_run_has_begun(self, tmp_path: Path) -> None:
        async with toy(tmp_path / "run") as orchestrator:
            orchestrator.drain()
            summary = await orchestrator.run(episodes=10)
        assert (summary.state, summary.episodes) == ("unfinished", 0)
        assert (await play(tmp_path / "run", Counted(counting), resume=True)).summary.episodes == 10

    async def test_cancel_leaves_what_runs_to_the_resume(self, tmp_path: Path) -> None:
        policy = Counted(counting, think_s=0.05)
        async with toy(tmp_path / "run", policy) as orchestrator, asyncio.TaskGroup() as tasks:
            running = tasks.create_task(orchestrator.run(episodes=60))

            async def some() -> bool:
                return orchestrator.progress().done >= 10

            await until(some, "the first episodes")
            orchestrator.cancel()
        assert running.result().state == "unfinished"
        resumed = await play(tmp_path / "run", policy, resume=True)
        assert (resumed.summary.episodes, resumed.summary.duplicates) == (60, 0)
        assert resumed.summary.recovered_episodes > 0
        assert policy.repeated() == 0

    @pytest.mark.parametrize("how", ["task", "timeout"])
    async def test_a_cancelled_caller(self, how: str, tmp_path: Path) -> None:
        policy = Counted(counting, think_s=0.05)
        async with toy(tmp_path / "run", policy) as orchestrator:
            running = asyncio.create_task(orchestrator.run(episodes=60))

            async def some() -> bool:
                return orchestrator.progress().done >= 5

            await until(some, "the first episodes")
            if how == "task":
                running.cancel()
                await asyncio.wait({running})
                assert running.cancelled()
            else:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await running
        assert (await play(tmp_path / "run", policy, resume=True)).summary.episodes == 60

    async def test_leaving_the_house_while_a_run_goes_on_in_another_task(self, tmp_path: Path) -> None:
        async with toy(tmp_path / "run", Counted(counting, think_s=0.05)) as orchestrator:
            running = asyncio.create_task(orchestrator.run(episodes=60))

            async def some() -> bool:
                return orchestrator.progress().done >= 5

            await until(some, "the first episodes")
        await asyncio.wait({running}, timeout=5)
        assert running.done()
        running.exception() if not running.cancelled() else None
        assert (await play(tmp_path / "run", Counted(counting), resume=True)).summary.episodes == 60

    async def test_a_suspended_orchestrator_blames_nobody(self, tmp_path: Path) -> None:
        """Its loop stood still for longer than any limit: the answers were there all the time."""
        held: list[float] = []

        def act(view: ConversationView, ctx: EpisodeContext) -> str:
            if ctx.key.task == "toy_6" and view.turn == 1 and not held:
                held.append(ends := time.monotonic() + 2.0)
                while time.monotonic() < ends:
                    pass
            return counting(view, ctx)

        policy = Counted(act, think_s=0.01)
        played = await play(tmp_path / "run", policy, episodes=200, concurrency=100, step_timeout_s=0.4)
        assert held
        assert played.losses() == []
        assert played.summary.outcomes == {"completed": 200}
        assert policy.repeated() == 0


class TestMisuse:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"concurrency": 0}, "concurrency must be positive, not 0"),
            ({"sandboxes": -1}, "sandboxes must be positive, not -1"),
            ({"max_turns": 0}, "max_turns must be positive"),
            ({"step_timeout_s": 0}, "step_timeout_s must be positive"),
            ({"episode_timeout_s": -2.5}, "episode_timeout_s must be positive, not -2.5"),
            ({"max_unacked": 0}, "max_unacked must be positive"),
            ({"queue": MemoryQueue(name="a"), "consumer": "b"}, "not both"),
        ],
    )
    def test_options(self, options: dict[str, Any], says: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=says):
            toy(tmp_path / "run", **options)

    @pytest.mark.parametrize(
        ("arguments", "error", "says"),
        [
            ({"split": "toys"}, UnknownName, "unknown split 'toys'"),
            ({"tasks": ["toy_1", "nothing"]}, UnknownName, "unknown task 'nothing'"),
            ({"tasks": []}, UsageError, "no task"),
            ({"group_size": 0}, UsageError, "group_size must be positive"),
            ({"episodes": 0}, UsageError, "episodes must be positive"),
            ({"episodes": 10, "group_size": 4}, UsageError, "10 episodes are not a whole number of groups of 4"),
        ],
    )
    async def test_arguments(
        self, arguments: dict[str, Any], error: type[UsageError], says: str, tmp_path: Path
    ) -> None:
        """Told before anything is stored, so that the directory can be used again."""
        async with toy(tmp_path / "run") as orchestrator:
            with pytest.raises(error, match=says):
                await orchestrator.run(**arguments)
        assert (await play(tmp_path / "run", Counted(counting), episodes=4)).summary.episodes == 4

    async def test_before_entering(self, tmp_path: Path) -> None:
        orchestrator = toy(tmp_path / "run")
        with pytest.raises(UsageError, match="enter the orchestrator first"):
            await orchestrator.run(episodes=1)
        with pytest.raises(UsageError, match="enter the orchestrator first"):
            await orchestrator.tasks()
        assert orchestrator.progress().paused == "starting"

    async def test_twice(self, tmp_path: Path) -> None:
        async with toy(tmp_path / "run") as orchestrator:
            await orchestrator.run(episodes=4)
            with pytest.raises(UsageError, match="one Orchestrator collects one run"):
                await orchestrator.run(episodes=4)

    async def test_collect_beside_a_queue(self, tmp_path: Path) -> None:
        async with toy(tmp_path / "run", queue=MemoryQueue()) as orchestrator:
            with pytest.raises(UsageError, match=r"collect\(\) is the consumer itself"):
                await anext(orchestrator.collect(episodes=4))

    async def test_no_sandbox_starts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("orchestrator.pool._FIRST_PAUSE_S", 0.01)
        broken = tmp_path / "broken" / "backends" / "server"
        broken.mkdir(parents=True)
        for file in (broken.parent / "__init__.py", broken / "__init__.py"):
            file.touch()
        (broken / "__main__.py").write_text("raise SystemExit(5)", encoding="ascii")
        monkeypatch.setattr("backends.sandboxes.process.stage", lambda spec: tmp_path / "broken")
        with pytest.raises(RunFailed, match="no sandbox can be started: the server exited with code 5"):
            await play(tmp_path / "run", Counted(counting), episodes=4)
        monkeypatch.undo()
        assert (await play(tmp_path / "run", Counted(counting), episodes=4)).summary.episodes == 4

    async def test_a_listener_that_fails(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        def listener(event: Event) -> None:
            raise RuntimeError("I do not listen")

        async with toy(tmp_path / "run", listener=listener) as orchestrator:
            assert (await orchestrator.run(episodes=8)).episodes == 8
        assert "a listener failed at EpisodeEnded" in caplog.text


class TestPolicies:
    async def test_one_that_is_a_context_manager_is_entered_once(self, tmp_path: Path) -> None:
        class Entered(Counted):
            inside: list[str] = []  # noqa: RUF012  # of this test's own class

            async def __aenter__(self) -> Entered:
                self.inside.append("in")
                return self

            async def __aexit__(self, *exc: object) -> None:
                self.inside.append("out")

        policy = Entered(counting)
        await play(tmp_path / "run", policy, episodes=4)
        assert policy.inside == ["in", "out"]

    async def test_one_that_fails_now_and_then(self, tmp_path: Path) -> None:
        def act(view: ConversationView, ctx: EpisodeContext) -> str:
            if ctx.key.task == "toy_4":
                raise LookupError("no idea")
            return counting(view, ctx)

        played = await play(tmp_path / "run", Counted(act), episodes=64)
        failed = [one for one in played.episodes.values() if one.failure is not None]
        assert [(one.key.task, one.outcome, one.reward) for one in failed] == [("toy_4", Outcome.INFRA_FAILED, None)]
        assert "LookupError" in str(failed[0].failure)
        assert played.summary.outcomes == {"completed": 63, "infra_failed": 1}

    async def test_one_whose_model_is_away_for_a_while(self, tmp_path: Path) -> None:
        """The same attempts go on where they were, and no decision is made twice."""
        away: Counter[str] = Counter()

        def act(view: ConversationView, ctx: EpisodeContext) -> str:
            if view.turn == 1 and away[str(ctx.key)] < 2:
                away[str(ctx.key)] += 1
                raise PolicyError(Failure(FailureKind.MODEL_UNAVAILABLE, "act", "no answer"))
            return counting(view, ctx)

        policy = Counted(act)
        played = await play(tmp_path / "run", policy, episodes=32)
        assert played.summary.outcomes == {"completed": 32}
        assert all((one.attempt, one.reward) == (0, 1.0) for one in played.episodes.values())
        assert policy.repeated() == 0
        assert equal((await play(tmp_path / "plain", Counted(counting), episodes=32)).episodes, played.episodes)

    async def test_budgets_of_a_run(self, tmp_path: Path) -> None:
        turns = await play(tmp_path / "turns", Counted(lambda view, ctx: "add 0"), episodes=8, max_turns=3)
        assert {(one.stop_reason, one.steps) for one in turns.episodes.values()} == {("max_turns", 3)}
        slow = Counted(lambda view, ctx: "add 0", think_s=0.2)
        timed = await play(tmp_path / "time", slow, episodes=8, episode_timeout_s=0.5)
        assert {(one.stop_reason, one.steps) for one in timed.episodes.values()} == {("time_budget", 2)}
        for one in (*turns.episodes.values(), *timed.episodes.values()):
            assert one.outcome is Outcome.TRUNCATED
            assert one.reward is not None


async def test_events_tell_what_happened(tmp_path: Path) -> None:
    played = await play(tmp_path / "run", Counted(counting), episodes=20, sandboxes=2)
    started = [event for event in played.events if isinstance(event, SandboxStarted)]
    assert 1 <= len(started) <= 2
    ended = {event.key: event for event in played.events if isinstance(event, EpisodeEnded)}
    assert ended.keys() == played.episodes.keys()
    for key, one in played.episodes.items():
        assert (ended[key].outcome, ended[key].reward) == (one.outcome, one.reward)
        assert one.outcome in REWARDED
        assert 0 < one.started <= one.finished
