"""Episodes driven call by call, on real sandboxes: recovery, sleep, blame, and what is held."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import orjson
import pytest

from backends.sandboxes.local import LocalBackend
from orchestrator.driven import DrivenEpisode
from orchestrator.errors import SandboxError, SandboxRefused, UsageError
from orchestrator.pool import Pool
from orchestrator.protocols import SandboxLimits
from orchestrator.types import EpisodeSpec, FailureKind, RunId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from orchestrator.types import Observation


def say(words: str) -> bytes:
    return orjson.dumps({"role": "assistant", "content": words})


def heard(observation: Observation) -> str:
    return str(orjson.loads(observation.body)["messages"][0]["content"])


@asynccontextmanager
async def pool(size: int = 1, *, limits: SandboxLimits | None = None) -> AsyncIterator[Pool]:
    backend = LocalBackend("toy")
    backend.limits = limits or backend.limits
    backend.configure(run=RunId("driven"), with_solutions=False, logs=None, call_limit_s=5.0)
    async with backend, Pool(backend, size, lambda event: None) as made:
        yield made


def spec(task: str = "toy_6", step_timeout_s: float = 5.0) -> EpisodeSpec:
    return EpisodeSpec(task, 0, step_timeout_s)


def kill_all(pool: Pool) -> None:
    for sandbox in pool.sandboxes():
        os.kill(sandbox.statistics().pid, signal.SIGKILL)


async def test_from_open_to_grade() -> None:
    async with pool() as sandboxes:
        episode = await DrivenEpisode.open(sandboxes, spec())
        assert episode.first is not None
        assert "Count to 7" in heard(episode.first)
        assert heard(await episode.step(say("add 6"))) == "total 6"
        assert (await episode.evaluate()).reward == 0.5
        assert (episode.turns, episode.done) == (1, False)
        await episode.step(say("add 1"))
        assert (await episode.step(say("stop"))).done
        assert (await episode.evaluate()).reward == 1.0
        with pytest.raises(UsageError, match="over"):
            await episode.step(say("add 1"))
        episode.close()
        episode.close()
        with pytest.raises(UsageError, match="released"):
            await episode.evaluate()
        assert sandboxes.statistics().leases == 0


async def test_sleep_gives_the_session_back_and_the_next_call_wakes_it() -> None:
    async with pool() as sandboxes:
        episode = await DrivenEpisode.open(sandboxes, spec())
        await episode.step(say("add 4"))
        assert await episode.sleep()
        assert not episode.awake
        assert sandboxes.statistics().leases == 0
        assert heard(await episode.step(say("add 1"))) == "total 5"
        assert episode.awake
        episode.close()


async def test_deaths_in_every_state_are_recovered_from() -> None:
    async with pool(2) as sandboxes:
        episode = await DrivenEpisode.open(sandboxes, spec())
        for total in range(1, 5):
            kill_all(sandboxes)
            assert heard(await episode.step(say("add 1"))) == f"total {total}"
        kill_all(sandboxes)
        assert (await episode.evaluate()).reward == 0.5**3
        episode.close()


async def test_a_sandbox_that_dies_under_a_call() -> None:
    async with pool() as sandboxes:
        episode = await DrivenEpisode.open(sandboxes, spec())
        await episode.step(say("add 2"))
        step = asyncio.create_task(episode.step(say("sleep 0.3")))
        await asyncio.sleep(0.1)
        assert episode.busy
        kill_all(sandboxes)
        assert heard(await step) == "slept"
        assert heard(await episode.step(say("add 1"))) == "total 3"
        episode.close()


@pytest.mark.parametrize("deed", ["crash", "abort"])
async def test_the_action_that_kills_is_found_and_undone(deed: str) -> None:
    async with pool() as sandboxes:
        episode, bystander = [await DrivenEpisode.open(sandboxes, spec()) for _ in range(2)]
        await episode.step(say("add 2"))
        await bystander.step(say("add 5"))
        with pytest.raises(SandboxError, match="times alone"):
            await episode.step(say(deed))
        assert heard(await bystander.step(say("add 1"))) == "total 6"
        assert heard(await episode.step(say("add 1"))) == "total 3"
        episode.close()
        bystander.close()


async def test_refusals_leave_it_where_it_stood() -> None:
    async with pool() as sandboxes:
        with pytest.raises(SandboxRefused, match="unknown task"):
            await DrivenEpisode.open(sandboxes, spec("nothing"))
        episode = await DrivenEpisode.open(sandboxes, spec())
        await episode.step(say("add 1"))
        with pytest.raises(SandboxRefused):
            await episode.step(say("error"))
        assert heard(await episode.step(say("add 1"))) == "total 2"
        await episode.step(say("badgrade"))
        with pytest.raises(SandboxRefused):
            await episode.evaluate()
        assert heard(await episode.step(say("add 1"))) == "total 3"
        episode.close()
        assert sandboxes.statistics().leases == 0


async def test_what_does_not_repeat_itself_is_not_rebuilt() -> None:
    async with pool() as sandboxes:
        episode = await DrivenEpisode.open(sandboxes, spec())
        await episode.step(say("random"))
        await episode.sleep()
        with pytest.raises(SandboxError) as caught:
            await episode.step(say("add 1"))
        assert caught.value.failure.kind is FailureKind.DIVERGED
        episode.close()
        assert sandboxes.statistics().leases == 0


async def test_closing_under_a_call_holds_nothing() -> None:
    async with pool() as sandboxes:
        episode = await DrivenEpisode.open(sandboxes, spec())
        await episode.sleep()
        step = asyncio.create_task(episode.step(say("add 1")))
        await asyncio.sleep(0)
        episode.close()
        with pytest.raises(UsageError, match="released"):
            await step
        assert sandboxes.statistics().leases == 0


async def test_the_environments_bound_on_actions() -> None:
    async with pool() as sandboxes:
        episode = await DrivenEpisode.open(sandboxes, spec())
        for _ in range(64):
            await episode.step(say("add 0"))
        with pytest.raises(UsageError, match="64 actions"):
            await episode.step(say("add 0"))
        episode.close()


async def test_where_a_sandbox_serves_one_session() -> None:
    async with pool(2, limits=SandboxLimits(1, 1)) as sandboxes:
        episodes = [await DrivenEpisode.open(sandboxes, spec()) for _ in range(3)]
        assert len({sandbox.id for sandbox in sandboxes.sandboxes()}) >= 3
        for number, episode in enumerate(episodes):
            await episode.step(say(f"add {number}"))
        assert await episodes[0].sleep()
        assert heard(await episodes[0].step(say("add 9"))) == "total 9"
        for episode in episodes:
            episode.close()
