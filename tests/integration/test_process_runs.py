"""Whole runs in isolation `process`: the same trajectories as anywhere; deaths that cost their own episode alone."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import forked
import pytest
from forked import gone
from runs import Counted, counting, equal, play

from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.local import LocalBackend
from orchestrator.driven import DrivenEpisode
from orchestrator.errors import ActionKilled
from orchestrator.pool import Pool
from orchestrator.testing.harness import say, spec
from orchestrator.testing.leaks import children
from orchestrator.types import OnAgentKill, Outcome, StopReason
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView
    from orchestrator.types import EpisodeKey, Trajectory


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forked.lay_out(tmp_path_factory.mktemp("forked"))


@pytest.fixture(autouse=True)
def _brought(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked.bring(site, monkeypatch)


def local() -> LocalBackend:
    return LocalBackend("forked", max_children=16)


def _bare(played: Mapping[EpisodeKey, Trajectory]) -> dict[EpisodeKey, Trajectory]:
    """Without what names the environment, and what it says beside the reward."""
    return {key: replace(t, buffer=_conversation(t.buffer), details=b"") for key, t in played.items()}


def _conversation(buffer: bytes) -> bytes:
    return buffer[buffer.index(b"Count to") : buffer.rindex(b"stopped")]


async def test_the_same_trajectories_as_in_one_process(tmp_path: Path) -> None:
    played = await play(tmp_path / "forked", ScriptedPolicy(counting), backend=local(), episodes=64)
    assert played.summary.reward_one == 64
    assert not played.losses()
    plain = await play(tmp_path / "toy", ScriptedPolicy(counting), episodes=64, concurrency=3)
    assert equal(_bare(played.episodes), _bare(plain.episodes))


@pytest.mark.usefixtures("containers")
async def test_the_same_trajectories_in_containers(tmp_path: Path) -> None:
    backend = DockerBackend("forked")
    contained = await play(tmp_path / "docker", ScriptedPolicy(counting), backend=backend, episodes=24, sandboxes=1)
    played = await play(tmp_path / "local", ScriptedPolicy(counting), backend=local(), episodes=24)
    assert equal(contained.episodes, played.episodes)
    assert contained.summary.reward_one == 24


def deadly(words: str) -> ScriptedPolicy:
    """Every fourth task's agent does this in its second turn, where it is no use replaying."""

    def act(view: ConversationView, ctx: EpisodeContext) -> str:
        guilty = int(ctx.key.task.removeprefix("toy_")) % 4 == 0
        return words if guilty and view.turn == 1 else counting(view, ctx)

    return ScriptedPolicy(act)


@pytest.mark.parametrize(
    ("words", "on_agent_kill"),
    [
        ("crash", OnAgentKill.ZERO),
        ("garble", OnAgentKill.DROP),
        ("hang", OnAgentKill.ZERO),
        ("abort", OnAgentKill.GRADE),
    ],
)
async def test_an_agents_deed_costs_nobody_else(tmp_path: Path, words: str, on_agent_kill: OnAgentKill) -> None:
    tasks = [f"toy_{number}" for number in range(1, 13)]
    played = await play(
        tmp_path, deadly(words), backend=local(), tasks=tasks, step_timeout_s=1.0, on_agent_kill=on_agent_kill
    )
    assert not played.losses(), "no sandbox was lost"
    for key, episode in played.episodes.items():
        if int(key.task.removeprefix("toy_")) % 4:
            assert (episode.outcome, episode.reward, episode.incarnations) == (Outcome.COMPLETED, 1.0, 1)
            continue
        assert (episode.outcome, episode.stop_reason) == (Outcome.TRUNCATED, StopReason.AGENT_KILLED_ENV)
        left = int(key.task.removeprefix("toy_")) % 7
        assert episode.reward == {"zero": 0.0, "drop": None, "grade": 0.5**left}[on_agent_kill]


class Killer:
    """Kills a random session's process every now and then, for as long as it is entered."""

    def __init__(self, every_s: float) -> None:
        self.kills = 0
        self._every_s = every_s
        self._random = random.Random(5)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._go(), name="killer")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _go(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            sessions = await asyncio.to_thread(_sessions)
            if sessions:
                os.kill(self._random.choice(sessions), signal.SIGKILL)
                self.kills += 1


def _sessions() -> list[int]:
    zygotes = [child.pid for server in children() for child in children(server.pid)]
    return [session.pid for zygote in zygotes for session in children(zygote) if session.state != "Z"]


async def test_killed_sessions_go_on_elsewhere(tmp_path: Path) -> None:
    policy, killer = Counted(counting, think_s=0.02), Killer(0.05)
    played = await play(tmp_path, policy, backend=local(), episodes=128, concurrency=16, chaos=killer)
    assert killer.kills > 5
    assert not played.losses(), "no sandbox was lost"
    assert played.summary.reward_one == 128
    assert {episode.reward for episode in played.episodes.values()} == {1.0}
    assert any(episode.recovered for episode in played.episodes.values())
    assert policy.repeated() == 0, "no decision was made again"


async def test_a_driven_episode_survives_its_process() -> None:
    backend = local()
    async with backend, Pool(backend, 1, lambda event: None) as pool:
        episode = await DrivenEpisode.open(pool, spec("toy_3", step_timeout_s=1.0))
        assert b"total 1" in (await episode.step(say("add 1"))).body
        for session in await asyncio.to_thread(_sessions):
            os.kill(session, signal.SIGKILL)
        assert b"total 2" in (await episode.step(say("add 1"))).body
        with pytest.raises(ActionKilled):
            await episode.step(say("crash"))
        assert b"total 3" in (await episode.step(say("add 1"))).body
        episode.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_nothing_outlives_the_owner(site: Path, number: signal.Signals, private_folder: Path) -> None:
    folder = private_folder / "owner"
    folder.mkdir()
    owner = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("forked_life.py")),
        str(site),
        stdout=subprocess.PIPE,
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder)},
    )
    assert owner.stdout is not None
    pids = [int(word) for word in (await owner.stdout.readline()).split()]
    assert len(pids) == 6
    owner.send_signal(number)
    await owner.wait()
    await gone(*pids)
    shutil.rmtree(folder)  # its private directory, which nobody was left to remove
