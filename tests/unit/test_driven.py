"""Driven episodes on a backend in memory: whatever fails, the record is that of the answered actions alone."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from played import say

from orchestrator.driven import DrivenEpisode
from orchestrator.episode import MAX_LOSSES
from orchestrator.errors import SandboxError, SandboxRefused, UsageError
from orchestrator.pool import Pool
from orchestrator.testing import Die, Gone, MemoryBackend, MemoryCall, Refuse, Slow
from orchestrator.types import EpisodeSpec, Failure, FailureKind, RunId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from orchestrator.testing.script import Fault, Script

SPEC = EpisodeSpec("memory_3", 11, 5.0)
KILLED = Failure(FailureKind.SANDBOX_LOST, "call", "killed")
DEEDS = ("step", "step", "grade", "sleep", "kill", "cancel")
FAULTS = (None, None, None, None, Die(), Gone(), Refuse(FailureKind.ENVIRONMENT, "environment"))


@asynccontextmanager
async def memory(
    script: Script | None = None, *, deterministic: bool = True, max_turns: int = 64
) -> AsyncIterator[tuple[MemoryBackend, Pool]]:
    backend = MemoryBackend(script, deterministic=deterministic, max_turns=max_turns)
    backend.configure(run=RunId("driven"), with_solutions=False, logs=None, call_limit_s=5.0)
    async with backend, Pool(backend, 2, lambda event: None) as pool:
        yield backend, pool
        assert pool.statistics().leases == 0, "every lease is given back"
        assert backend.statistics().sessions == 0, "every session is closed"
    assert backend.statistics().sandboxes == 0


def recorded(episode: DrivenEpisode) -> bytes:
    return bytes(episode._buffer.data)


class Drive:
    """One episode under a list of deeds; `answered` is what the model believes to have happened."""

    def __init__(self, backend: MemoryBackend, episode: DrivenEpisode) -> None:
        self.backend = backend
        self.episode = episode
        self.answered: list[bytes] = []

    async def do(self, deed: str, number: int) -> None:
        match deed:
            case "step":
                action = say(f"do {number}")
                await self.episode.step(action)
                self.answered.append(action)
            case "grade":
                assert (await self.episode.evaluate()).reward == len(self.answered)
            case "sleep":
                assert await self.episode.sleep()
            case "kill":
                for sandbox in list(self.backend.live.values()):
                    sandbox.condemn(KILLED)
            case _:
                await self.give_up(say(f"never {number}"))

    async def give_up(self, action: bytes) -> None:
        """Begin a step and cancel it; it has happened only if it was answered before."""
        step = asyncio.create_task(self.episode.step(action))
        await asyncio.sleep(0)
        step.cancel()
        await asyncio.wait({step})
        if not step.cancelled() and step.exception() is None:
            self.answered.append(action)


async def _drive(deeds: Sequence[str], faults: Sequence[Fault | None]) -> None:
    plan = list(faults)

    def script(call: MemoryCall) -> Fault | None:
        return plan.pop(0) if plan and call.op in ("open", "step", "evaluate") else None

    async with memory(script) as (backend, pool):
        try:
            episode = await DrivenEpisode.open(pool, SPEC)
        except SandboxError:
            return
        drive = Drive(backend, episode)
        for number, deed in enumerate(deeds):
            try:
                await drive.do(deed, number)
            except SandboxError:
                pass  # the deed failed, and has not happened
            assert episode.turns == len(drive.answered)
            assert not episode.busy
        plan.clear()
        clean = await DrivenEpisode.open(pool, SPEC)
        for action in drive.answered:
            await clean.step(action)
        assert recorded(clean) == recorded(episode)
        for one in (episode, clean):
            one.close()


@given(
    st.lists(st.sampled_from(DEEDS), max_size=12),
    st.lists(st.sampled_from(FAULTS), max_size=24),
)
@settings(deadline=None, max_examples=150)
def test_the_record_is_that_of_the_answered_actions(deeds: list[str], faults: list[Fault | None]) -> None:
    asyncio.run(_drive(deeds, faults))


async def test_calls_of_one_episode_run_one_at_a_time() -> None:
    def slow(call: MemoryCall) -> Fault | None:
        return Slow(0.001) if call.op == "step" else None

    async with memory(slow) as (_, pool):
        episode = await DrivenEpisode.open(pool, SPEC)
        async with asyncio.TaskGroup() as tasks:
            for number in range(10):
                tasks.create_task(episode.step(say(f"do {number}")))
        assert episode.turns == 10
        assert episode._buffer.history()[1] == [say(f"do {n}") for n in range(10)]
        episode.close()


async def test_what_cannot_be_replayed_ends_with_its_sandbox() -> None:
    async with memory(deterministic=False) as (backend, pool):
        episode = await DrivenEpisode.open(pool, SPEC)
        await episode.step(say("do"))
        assert not await episode.sleep(), "it could not be woken"
        for sandbox in list(backend.live.values()):
            sandbox.condemn(KILLED)
        with pytest.raises(SandboxError) as caught:
            await episode.step(say("do"))
        assert caught.value.failure.kind is FailureKind.NOT_DETERMINISTIC
        episode.close()


async def test_losses_that_never_end_are_given_up() -> None:
    def gone(call: MemoryCall) -> Fault | None:
        return Gone() if call.op == "step" else None

    async with memory(gone) as (backend, pool):
        episode = await DrivenEpisode.open(pool, SPEC)
        with pytest.raises(SandboxError, match="gone"):
            await episode.step(say("do"))
        assert backend.statistics().started > MAX_LOSSES
        assert episode.turns == 0
        episode.close()


async def _play(pool: Pool) -> None:
    episode = await DrivenEpisode.open(pool, SPEC)
    try:
        await episode.step(say("do"))
        await episode.evaluate()
    finally:
        episode.close()


@pytest.mark.parametrize("op", ["open", "step", "evaluate"])
async def test_two_deaths_alone_are_proof(op: str) -> None:
    async with memory(lambda call: Die() if call.op == op else None) as (_, pool):
        with pytest.raises(SandboxError, match="2 times alone"):
            await _play(pool)


async def test_a_refused_step_is_undone_and_a_refused_grade_costs_nothing() -> None:
    refuse = Refuse(FailureKind.ENVIRONMENT, "environment")
    async with memory(lambda call: refuse if call.op == "evaluate" or b"no" in call.action else None) as (_, pool):
        episode = await DrivenEpisode.open(pool, SPEC)
        await episode.step(say("do"))
        with pytest.raises(SandboxRefused):
            await episode.step(say("no"))
        assert not episode.awake
        await episode.step(say("do"))
        with pytest.raises(SandboxRefused):
            await episode.evaluate()
        assert episode.awake
        assert episode.turns == 2
        episode.close()


@pytest.mark.parametrize("answered", [Refuse(FailureKind.PROTOCOL, "unknown_session"), Gone()])
async def test_who_closes_an_episode_under_a_call_is_told_so(answered: Fault) -> None:
    """Whichever comes first: what the server says of the closed session, or that nothing is there."""
    opened: list[DrivenEpisode] = []

    def closed_meanwhile(call: MemoryCall) -> Fault | None:
        if call.op != "step":
            return None
        opened[0].close()
        return answered

    async with memory(closed_meanwhile) as (_, pool):
        opened.append(await DrivenEpisode.open(pool, SPEC))
        with pytest.raises(UsageError, match="released"):
            await opened[0].step(say("do"))


async def test_the_environments_bound() -> None:
    async with memory(max_turns=2) as (_, pool):
        episode = await DrivenEpisode.open(pool, SPEC)
        for _ in range(2):
            await episode.step(say("do"))
        with pytest.raises(UsageError, match="2 actions"):
            await episode.step(say("do"))
        assert (await episode.evaluate()).reward == 2.0
        episode.close()
