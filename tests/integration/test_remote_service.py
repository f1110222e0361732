"""The remote backend against AgentScope's own environment service, as published."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from backends.sandboxes.remote import RemoteBackend
from bench.reference import env_service, reference, session_members
from bench.reference_answers import answers
from orchestrator import Orchestrator
from orchestrator.errors import SandboxRefused, Unavailable, UnknownName
from orchestrator.types import EpisodeSpec, FailureKind, RunId
from policies.agents.replay import ReplayPolicy

if TYPE_CHECKING:
    from bench.reference import Reference

pytestmark = pytest.mark.timeout(900)
EPISODES = 16
LIVE = b"ray::RemoteEnv"


@pytest.fixture(scope="module")
def installed() -> Reference:
    try:
        return asyncio.run(reference())
    except Unavailable as error:
        pytest.fail(str(error)) if os.environ.get("CI") == "true" else pytest.skip(str(error))


def instances(leader: int) -> int:
    return sum(LIVE in (Path("/proc") / str(pid) / "cmdline").read_bytes() for pid in session_members(leader))


async def until_none(leader: int) -> None:
    """The service answers a release before the process of the instance has ended."""
    async with asyncio.timeout(10):
        while await asyncio.to_thread(instances, leader):  # noqa: ASYNC110  # its processes signal nothing to us
            await asyncio.sleep(0.1)


async def test_the_orchestrator_drives_the_original(installed: Reference, tmp_path: Path) -> None:
    known = await asyncio.to_thread(answers, installed, "multi_turn_base")
    async with env_service(installed) as service:
        backend = RemoteBackend(service.url, max_instances=8, solutions=known)
        run = Orchestrator(
            backend=backend, policy=ReplayPolicy(), out=tmp_path / "run", concurrency=EPISODES, sandboxes=1
        )
        async with run as orchestrator:
            summary = await orchestrator.run(split="train", episodes=EPISODES)
        assert summary.outcomes == {"completed": EPISODES}
        assert summary.reward_one == EPISODES
        assert summary.failures == {}
        await until_none(service.pid)


async def test_what_the_original_refuses_and_what_is_given_up_leaves_nothing(installed: Reference) -> None:
    async with env_service(installed) as service:
        backend = RemoteBackend(service.url, solutions={})
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=30.0)
        async with backend:
            sandbox = await backend.create()
            with pytest.raises(UnknownName):
                await sandbox.tasks("no such split")
            with pytest.raises(SandboxRefused) as refused:
                await sandbox.open(EpisodeSpec("no such task", 0, 30.0))
            assert refused.value.failure.kind is FailureKind.UNKNOWN_TASK
            opening = asyncio.create_task(sandbox.open(EpisodeSpec("multi_turn_base_0", 0, 30.0)))
            await asyncio.sleep(0.2)
            opening.cancel()
            await asyncio.wait({opening})
            assert opening.cancelled()
            await sandbox.open(EpisodeSpec("multi_turn_base_0", 0, 30.0))  # left open: the backend releases it
            assert sandbox.statistics().sessions == 1
        await until_none(service.pid)
