"""Every fault of the toy environment through whole runs: the right outcome for the guilty, no harm to anybody else."""

from __future__ import annotations

import asyncio
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest
from runs import QUICK, Counted, Played, counting, counting_from, equal, play

from backends.sandboxes import local
from backends.sandboxes.local import LocalBackend
from orchestrator.errors import UnknownName
from orchestrator.testing import SandboxKiller
from orchestrator.types import EpisodeKey, FailureKind, Outcome, StopReason

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView

INNOCENT = 200
GUILTY = "toy_9"
KIND = FailureKind
KILLED = StopReason.AGENT_KILLED_ENV


def saying(content: str) -> Any:
    """All solve their task, but the first sample of one task says this after its first step."""

    def act(view: ConversationView, ctx: EpisodeContext) -> str:
        if ctx.key == EpisodeKey(GUILTY, 0, 0):
            return ["add 1", content][view.turn] if view.turn < 2 else counting_from(1, view)
        return counting(view, ctx)

    return act


async def among_others(tmp_path: Path, content: str, **options: Any) -> tuple[Any, Played, Counted]:
    """One guilty episode among two hundred others on two sandboxes: its trajectory."""
    policy = Counted(saying(content), think_s=0.002)
    options = {"step_timeout_s": 0.5, "concurrency": INNOCENT, "episodes": INNOCENT + 1, **options}
    played = await play(tmp_path / "run", policy, **options)
    guilty = played.episodes[EpisodeKey(GUILTY, 0, 0)]
    others = [one for key, one in played.episodes.items() if key != guilty.key]
    assert len(others) == INNOCENT
    for one in others:
        assert (one.outcome, one.reward, one.failure) == (Outcome.COMPLETED, 1.0, None), f"{one.key} is innocent"
    assert policy.repeated() == 0, "no decision is asked for twice"
    return guilty, played, policy


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        ("crash", KIND.SANDBOX_LOST, "exited with code 9"),
        ("abort", KIND.SANDBOX_LOST, "SIGABRT"),
        ("hang", KIND.SANDBOX_HUNG, "time limit"),
        ("spin", KIND.SANDBOX_HUNG, "time limit"),
        ("sleep 60", KIND.SANDBOX_HUNG, "longer than 0.5 s"),
        ("block 60", KIND.SANDBOX_HUNG, "time limit"),
    ],
)
async def test_an_action_that_ends_its_sandbox(content: str, kind: FailureKind, says: str, tmp_path: Path) -> None:
    guilty, played, _ = await among_others(tmp_path, content)
    assert (guilty.outcome, guilty.stop_reason, guilty.reward) == (Outcome.TRUNCATED, KILLED, 0.0)
    assert guilty.failure.kind is kind
    assert guilty.failure.stage == "step"
    assert says in guilty.failure.message
    assert played.summary.failures == {str(kind): 1}
    takes_its_sandbox_along = not content.startswith("sleep")
    assert len(played.losses()) == 3 * takes_its_sandbox_along, "once among others, twice alone"


@pytest.mark.parametrize(("choice", "reward"), [("grade", 1.0), ("drop", None)])
async def test_what_a_killer_is_given(choice: str, reward: float | None, tmp_path: Path) -> None:
    """Task 7 asks for 1, so the state before the crash is worth 1.0."""
    policy = Counted(lambda view, ctx: ["add 1", "crash"][view.turn])
    played = await play(tmp_path / "run", policy, tasks=["toy_7"], on_agent_kill=choice)
    [guilty] = played.episodes.values()
    assert (guilty.outcome, guilty.stop_reason, guilty.reward) == (Outcome.TRUNCATED, KILLED, reward)
    assert played.summary.reward_mean == reward


@pytest.mark.parametrize(
    ("content", "outcome", "stop", "reward", "kind"),
    [
        ("big 5000000", Outcome.TRUNCATED, StopReason.REPLY_TOO_LARGE, 0.25, None),
        ("big 3000000", Outcome.COMPLETED, StopReason.DONE, 1.0, None),
        ("memory 100000", Outcome.ENV_FAILED, StopReason.FAILURE, None, KIND.ENVIRONMENT),
        ("error", Outcome.ENV_FAILED, StopReason.FAILURE, None, KIND.ENVIRONMENT),
        ("nan", Outcome.ENV_FAILED, StopReason.FAILURE, None, KIND.BAD_REWARD),
        ("badgrade", Outcome.ENV_FAILED, StopReason.FAILURE, None, KIND.ENVIRONMENT),
        ("random", Outcome.COMPLETED, StopReason.DONE, 1.0, None),
        ("no such command", Outcome.COMPLETED, StopReason.DONE, 1.0, None),
    ],
)
async def test_an_action_that_its_sandbox_survives(
    content: str, outcome: Outcome, stop: StopReason, reward: float | None, kind: FailureKind | None, tmp_path: Path
) -> None:
    guilty, played, _ = await among_others(tmp_path, content)
    assert (guilty.outcome, guilty.stop_reason, guilty.reward) == (outcome, stop, reward)
    assert (guilty.failure.kind if guilty.failure else None) is kind
    assert played.losses() == []
    assert played.summary.recovered_episodes == 0


async def test_an_action_longer_than_a_frame(tmp_path: Path) -> None:
    """It is never sent, and so harms nobody."""
    guilty, played, _ = await among_others(tmp_path, "x" * (17 << 20), step_timeout_s=5.0)
    assert (guilty.outcome, guilty.stop_reason, guilty.reward) == (
        Outcome.TRUNCATED, StopReason.REPLY_TOO_LARGE, 0.25
    )  # fmt: skip
    assert played.losses() == []


class TestOpenings:
    """Tasks of the split `faults`, beside healthy ones."""

    async def run(self, tmp_path: Path, task: str) -> tuple[Any, Played]:
        tasks = [task, *[f"toy_{number}" for number in range(40)]]
        played = await play(tmp_path / "run", Counted(counting), tasks=tasks, group_size=2, step_timeout_s=0.5)
        for key, one in played.episodes.items():
            if key.task != task:
                assert (one.outcome, one.reward, one.failure) == (Outcome.COMPLETED, 1.0, None)
        return [played.episodes[EpisodeKey(task, 0, sample)] for sample in (0, 1)], played

    @pytest.mark.parametrize(("task", "kind"), [("open_crash", KIND.SANDBOX_LOST), ("open_hang", KIND.SANDBOX_HUNG)])
    async def test_one_that_ends_its_sandbox_poisons_the_task(
        self, task: str, kind: FailureKind, tmp_path: Path
    ) -> None:
        bad, played = await self.run(tmp_path, task)
        for one in bad:
            assert (one.outcome, one.stop_reason, one.reward, one.steps) == (
                Outcome.POISONED, StopReason.FAILURE, None, 0
            )  # fmt: skip
            assert one.failure.kind is kind
        assert played.summary.outcomes == {"completed": 80, "poisoned": 2}

    async def test_one_that_raises_fails_the_episode(self, tmp_path: Path) -> None:
        bad, played = await self.run(tmp_path, "open_error")
        assert [(one.outcome, one.failure.kind) for one in bad] == [(Outcome.ENV_FAILED, KIND.ENVIRONMENT)] * 2
        assert played.losses() == []

    async def test_one_that_is_slow_is_only_slow(self, tmp_path: Path) -> None:
        slow, played = await self.run(tmp_path, "open_sleep")
        assert [(one.outcome, one.reward) for one in slow] == [(Outcome.COMPLETED, 1.0)] * 2
        assert played.losses() == []

    async def test_a_task_that_does_not_exist_is_told_before_the_run(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownName, match="unknown task 'toy_99'"):
            await play(tmp_path / "run", Counted(counting), tasks=["toy_1", "toy_99"])
        assert not await asyncio.to_thread((tmp_path / "run" / "run.sqlite").exists)


class TestDivergence:
    """An observation that no replay can repeat, and then a loss: the attempt ends, another one begins."""

    async def test_a_new_attempt_completes(self, tmp_path: Path) -> None:
        def act(view: ConversationView, ctx: EpisodeContext) -> str:
            if ctx.key.task != GUILTY:
                return counting(view, ctx)
            return ["random", "crash" if ctx.attempt == 0 else "add 3", "stop"][view.turn]

        policy = Counted(act)
        played = await play(tmp_path / "run", policy, episodes=30, tasks=[GUILTY, "toy_1", "toy_2"])
        odd = [one for one in played.episodes.values() if one.key.task == GUILTY]
        assert len(odd) == 10
        assert all((one.outcome, one.attempt, one.reward) == (Outcome.COMPLETED, 1, 1.0) for one in odd)
        assert policy.repeated() == 0, "another attempt is another history"

    async def test_every_attempt_diverging_is_the_environments_fault(self, tmp_path: Path) -> None:
        policy = Counted(lambda view, ctx: ["random", "crash"][view.turn])
        played = await play(tmp_path / "run", policy, tasks=["toy_1"])
        [one] = played.episodes.values()
        assert one.failure is not None
        assert (one.outcome, one.failure.kind, one.attempt) == (Outcome.ENV_FAILED, KIND.DIVERGED, QUICK.max_tries - 1)
        assert "replayed observation" in one.failure.message


class TestMemoryBound:
    async def test_a_sandbox_that_needs_more_memory_than_it_has(self, tmp_path: Path) -> None:
        policy = Counted(lambda view, ctx: ["memory 300", "stop"][view.turn])
        backend = LocalBackend("toy", memory_mb=256)
        played = await play(tmp_path / "run", policy, backend=backend, tasks=["toy_1"])
        [one] = played.episodes.values()
        assert one.failure is not None
        assert "MemoryError" in one.failure.message


@pytest.mark.chaos
async def test_sandboxes_killed_and_stopped_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every episode ends with its right reward, nobody is blamed, no decision is asked for twice, and all is equal."""
    monkeypatch.setattr(local, "START_S", 2.0)  # those that are stopped while they start are given up sooner
    episodes = 288
    plain = await play(tmp_path / "plain", Counted(counting), episodes=episodes)
    policy = Counted(counting, think_s=0.15)
    killer = SandboxKiller(seed=2, every_s=0.35, most=12)
    played = await play(tmp_path / "run", policy, episodes=episodes, concurrency=96, step_timeout_s=0.6, chaos=killer)
    assert len(killer.hits) >= 3
    assert {hit.signal for hit in killer.hits} <= {signal.SIGKILL, signal.SIGSTOP}
    assert played.summary.recovered_episodes > 0
    assert played.summary.outcomes == {"completed": episodes}
    assert all(one.failure is None and one.attempt == 0 for one in played.episodes.values())
    assert policy.repeated() == 0
    assert len(policy.made) == played.summary.steps
    assert equal(plain.episodes, played.episodes)


async def test_the_right_seed_reaches_every_session(tmp_path: Path) -> None:
    played = await play(tmp_path / "run", Counted(counting), tasks=["toy_1", "toy_2"], group_size=3, seed=5)
    seeds: dict[tuple[str, int], set[str]] = {}
    for key, one in played.episodes.items():
        found = re.search(rb"\(seed (\d+)\)", one.buffer)
        assert found is not None
        seeds.setdefault((key.task, key.group), set()).add(found[1].decode())
    assert [len(group) for group in seeds.values()] == [1, 1], "samples of a group share the environment's seed"
    assert len(set.union(*seeds.values())) == 2
