"""The remote backend over plain HTTP: the conformance kit, and what services, proxies and networks do to requests."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from plain_proxy import HANG, RESET, RESET_AFTER, Answer, Fault, Plain, plain

from backends.sandboxes.remote import RemoteBackend
from backends.sandboxes.remote.instances import CREATIONS
from orchestrator import Orchestrator, Run
from orchestrator.errors import RunFailed, SandboxError, SandboxLost
from orchestrator.retry import RetryPolicy
from orchestrator.testing import BACKEND_CHECKS, run_check
from orchestrator.types import EpisodeSpec, Failure, FailureKind, RunId
from policies.agents.replay import ReplayPolicy
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from backends.sandboxes.remote.instances import ServiceSandbox
    from orchestrator.protocols import EpisodeContext, Policy
    from orchestrator.records import ConversationView
    from orchestrator.summary import Summary


def say(content: str) -> bytes:
    return orjson.dumps({"role": "assistant", "content": content})


def first(route: str, fault: Fault, times: int = 1) -> Callable[[str, dict[str, Any]], Fault]:
    """The first few requests of a route meet a fault."""
    left = [times]

    def judge(called: str, body: dict[str, Any]) -> Fault:
        if called == route and left[0]:
            left[0] -= 1
            return fault
        return None

    return judge


@asynccontextmanager
async def one_sandbox(url: str, **options: Any) -> AsyncIterator[ServiceSandbox]:
    backend = RemoteBackend(url, environment="toy", **options)
    backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=5.0)
    async with backend:
        sandbox = await backend.create()
        yield sandbox  # type: ignore[misc]  # no wire is offered


async def collect(proxy: Plain, out: Path, episodes: int = 40, policy: Policy | None = None, **options: Any) -> Summary:
    run = Orchestrator(
        backend=RemoteBackend(proxy.url, environment="toy", max_instances=8),
        policy=policy or ReplayPolicy(),
        out=out,
        concurrency=16,
        sandboxes=1,
        retry=RetryPolicy(first_delay_s=0.05),
        **options,
    )
    async with run as orchestrator:
        return await orchestrator.run(episodes=episodes)


@pytest.mark.parametrize("name", BACKEND_CHECKS)
async def test_the_contract_over_plain_http(name: str) -> None:
    async with plain() as proxy:
        await run_check(BACKEND_CHECKS[name], lambda: RemoteBackend(proxy.url, environment="toy"))
        assert proxy.instances() == 0
        assert proxy.calls["get_env_profile"] > 0


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_service_is_asked_again_when_it_says(status: int) -> None:
    async with plain() as proxy, one_sandbox(proxy.url) as sandbox:
        proxy.fault = first("create", Answer(status, {"Retry-After": "1"}))
        began = asyncio.get_running_loop().time()
        session, _ = await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))
        assert asyncio.get_running_loop().time() - began >= 1.0
        proxy.fault = first("step", Answer(status, {"Retry-After": "0"}), times=3)
        assert b"total 1" in (await session.step(say("add 1"))).body
        assert (proxy.calls["create"], proxy.calls["step"]) == (2, 4)


async def test_a_service_grades_once_between_two_steps_by_the_same_parameters() -> None:
    async with plain() as proxy, one_sandbox(proxy.url) as sandbox:
        session, _ = await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))
        for calls, words in ((2, "add 1"), (4, "add 1")):
            await session.step(say(words))
            for params in (None, {"sparse": True}, {}, {"sparse": True}):
                await session.evaluate(params)
            assert proxy.calls["evaluate"] == calls


@pytest.mark.parametrize("header", [{}, {"Retry-After": "60"}, {"Retry-After": "no date"}])
async def test_one_that_says_no_time_or_one_too_late_leaves_it_to_the_retry_policy(header: dict[str, str]) -> None:
    async with plain() as proxy, one_sandbox(proxy.url) as sandbox:
        session, _ = await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))
        proxy.fault = first("step", Answer(503, header))
        with pytest.raises(SandboxError, match="is busy") as refused:
            await session.step(say("add 1"))
        assert refused.value.failure.retryable
        assert proxy.calls["step"] == 1
        assert not sandbox.lost.done()


async def test_a_run_is_right_though_requests_meet_faults_all_the_time(tmp_path: Path) -> None:
    faults: list[Fault] = [RESET, RESET_AFTER, Answer(503, {"Retry-After": "0"}), Answer(429), Answer(503)]
    met: list[Fault] = []

    def judge(route: str, body: dict[str, Any]) -> Fault:
        if sum(proxy.calls.values()) % 17 or route == "get_env_profile":
            return None
        met.append(faults[len(met) % len(faults)])
        return met[-1]

    async with plain() as proxy:
        proxy.fault = judge
        summary = await collect(proxy, tmp_path / "run")
        assert (summary.outcomes, summary.reward_one, summary.failures) == ({"completed": 40}, 40, {})
        assert set(map(str, met)) == set(map(str, faults))
        assert proxy.instances() == 0


async def test_a_step_that_hangs_costs_its_instance_and_no_other(tmp_path: Path) -> None:
    async with plain() as proxy:
        proxy.fault = first("step", HANG)
        summary = await collect(proxy, tmp_path / "run", step_timeout_s=0.5)
        assert (summary.outcomes, summary.recovered_episodes) == ({"completed": 40}, 1)
        assert proxy.instances() == 0


def mostly_idle(view: ConversationView, ctx: EpisodeContext) -> str:
    return "crash" if ctx.key.task == "toy_1" else "stop"


async def test_an_action_that_kills_its_sandbox_again_when_it_is_alone_is_the_agents_doing(tmp_path: Path) -> None:
    async with plain() as proxy:
        summary = await collect(proxy, tmp_path / "run", episodes=8, policy=ScriptedPolicy(mostly_idle))
        assert summary.outcomes == {"completed": 7, "truncated": 1}
        assert proxy.instances() == 0
    with Run.open(tmp_path / "run") as run:
        stops = {one.key.task: one.stop_reason for one in run.episodes()}
    assert stops["toy_1"] == "agent_killed_env"


async def test_a_service_that_is_gone_is_lost_as_a_whole_and_asked_nothing_more() -> None:
    async with plain() as proxy, one_sandbox(proxy.url) as sandbox:
        broken, _ = await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))
        idle, _ = await sandbox.open(EpisodeSpec("toy_1", 0, 5.0))
        proxy.well, proxy.fault = False, first("step", RESET)
        with pytest.raises(SandboxLost) as lost:
            await broken.step(say("add 1"))
        assert (lost.value.suspect, lost.value.failure.kind) == (True, FailureKind.SANDBOX_LOST)
        with pytest.raises(SandboxLost) as told:
            await idle.step(say("add 1"))
        assert not told.value.suspect
        assert proxy.calls["step"] == 1


async def test_the_places_of_a_buried_sandboxs_instances_are_free_again() -> None:
    async with plain() as proxy:
        backend = RemoteBackend(proxy.url, environment="toy", max_instances=1)
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=5.0)
        async with backend:
            first_one = await backend.create()
            session, _ = await first_one.open(EpisodeSpec("toy_0", 0, 5.0))
            await first_one.bury(Failure(FailureKind.SANDBOX_LOST, "call", "its container was removed"))  # type: ignore[union-attr]
            assert proxy.calls["release"] == 0
            async with asyncio.timeout(5):
                await (await backend.create()).open(EpisodeSpec("toy_0", 0, 5.0))
            session.close()


async def test_a_service_is_asked_for_few_instances_at_a_time() -> None:
    async with plain() as proxy, one_sandbox(proxy.url) as sandbox:
        proxy.fault = first("create", HANG, times=8)
        async with asyncio.TaskGroup() as tasks:
            opening = [tasks.create_task(_lost_while_opening(sandbox), name="opening") for _ in range(8)]
            while proxy.calls["create"] < CREATIONS:  # noqa: ASYNC110  # it signals nothing
                await asyncio.sleep(0.01)
            await sandbox.tasks("")
            assert proxy.calls["create"] == CREATIONS
            await sandbox.bury(Failure(FailureKind.SANDBOX_LOST, "call", "its container was removed"))
        assert all(task.result() for task in opening)


async def _lost_while_opening(sandbox: ServiceSandbox) -> bool:
    with pytest.raises(SandboxLost):
        await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))
    return True


async def test_a_run_waits_for_a_service_that_comes_back_and_is_right(tmp_path: Path) -> None:
    async with plain() as proxy:
        running = asyncio.create_task(collect(proxy, tmp_path / "run"))
        while proxy.calls["step"] < 20:  # noqa: ASYNC110  # it signals nothing
            await asyncio.sleep(0.01)
        proxy.well, proxy.fault = False, lambda route, body: RESET
        before = proxy.calls["healthz"]
        while proxy.calls["healthz"] < before + 4:  # noqa: ASYNC110  # it signals nothing
            await asyncio.sleep(0.05)
        proxy.well, proxy.fault = True, lambda route, body: None
        summary = await running
        assert (summary.outcomes, summary.reward_one) == ({"completed": 40}, 40)
        assert summary.failures == {}


async def test_a_service_that_was_never_there_is_said_so_at_once(tmp_path: Path) -> None:
    async with plain() as proxy:
        url = proxy.url
    backend = RemoteBackend(url, environment="toy")
    with pytest.raises(RunFailed, match="cannot be reached"):
        async with Orchestrator(backend=backend, policy=ReplayPolicy(), out=tmp_path / "run"):
            pytest.fail("it was there")
