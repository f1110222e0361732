"""Our own wire, as a service offers it: the conformance kit, whole runs over it, and what ends its sessions."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import orjson
import pytest

from backends.sandboxes.local import LocalBackend
from backends.sandboxes.remote import RemoteBackend
from orchestrator import Orchestrator
from orchestrator.errors import SandboxError
from orchestrator.service import Service, ServiceLimits
from orchestrator.testing import BACKEND_CHECKS, run_check
from orchestrator.testing.leaks import processes
from orchestrator.types import EpisodeSpec, RunId
from policies.agents.replay import ReplayPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@asynccontextmanager
async def serving(*environments: str, sandboxes: int = 1, **limits: float) -> AsyncIterator[Service]:
    backends = {name: partial(LocalBackend, name) for name in environments}
    wanted = ServiceLimits(**{"step_s": 60.0, "wait_s": 10.0} | limits)  # type: ignore[arg-type]
    async with Service(backends, port=0, sandboxes=sandboxes, tokens={"us": "t"}, limits=wanted) as service:
        yield service


@pytest.mark.parametrize("name", BACKEND_CHECKS)
async def test_the_contract_over_a_service(name: str) -> None:
    async with serving("toy") as service:
        await run_check(BACKEND_CHECKS[name], lambda: RemoteBackend(service.url, environment="toy", token="t"))
        assert service.health()["instances"] == 0


async def test_a_run_over_a_service_is_right_though_its_sandboxes_are_killed(tmp_path: Path) -> None:
    async with serving("toy", "bfcl", sandboxes=2) as service:
        backend = RemoteBackend(service.url, environment="bfcl", token="t")
        run = Orchestrator(backend=backend, policy=ReplayPolicy(), out=tmp_path / "run", concurrency=64, sandboxes=1)
        async with run as orchestrator:
            running = asyncio.create_task(orchestrator.run(split="multi_turn", episodes=200))
            while service.health()["instances"] < 32:  # noqa: ASYNC110  # it signals nothing
                await asyncio.sleep(0.01)
            mine = [p for p in processes() if "--environment bfcl" in p.command and p.parent == os.getpid()]
            os.kill(next(p.pid for p in mine if "--with-solutions" not in p.command), signal.SIGKILL)
            summary = await running
        assert (summary.episodes, summary.reward_one, summary.failures) == (200, 200, {})
        assert service.health()["instances"] == 0


async def test_sessions_end_with_their_connection_and_not_for_being_idle() -> None:
    async with serving("toy", idle_s=0.1) as service:
        backend = RemoteBackend(service.url, environment="toy", token="t")
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=30.0)
        async with backend:
            sandbox = await backend.create()
            session, _ = await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))
            await asyncio.sleep(0.5)
            said = orjson.dumps({"role": "assistant", "content": "add 1"})
            assert b"total 1" in (await session.step(said)).body
            assert service.health()["instances"] == 1
        async with asyncio.timeout(3):
            while service.health()["instances"]:  # noqa: ASYNC110  # it signals nothing
                await asyncio.sleep(0.01)


async def test_a_full_service_refuses_an_episode_and_says_that_it_may_be_tried_again() -> None:
    async with serving("toy", instances=1) as service:
        backend = RemoteBackend(service.url, environment="toy", token="t")
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=30.0)
        async with backend:
            sandbox = await backend.create()
            session, _ = await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))
            with pytest.raises(SandboxError, match="1 instances live") as refused:
                await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))
            assert refused.value.failure.retryable
            session.close()
            await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))
