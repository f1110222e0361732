"""A pool where there is room for as many sandboxes as it has places, or for fewer: in virtual time, in memory.

Whoever waits for room must not wait for the pool's own sandboxes for ever: nobody here has another way out.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from played import Says, stage

from orchestrator.errors import RunFailed
from orchestrator.pool import PATIENCE_S, UNUSED_S, Pool
from orchestrator.protocols import SandboxLimits, SandboxStatistics
from orchestrator.testing import Die, MemoryBackend, MemoryCall, Slow
from orchestrator.types import EpisodeKey, Failure, FailureKind, Outcome, RunId, StopReason

if TYPE_CHECKING:
    from orchestrator.testing.script import Fault

pytestmark = pytest.mark.looptime

NOBODY = Says()
ALONE = SandboxLimits(sessions=1, episodes=1)
LOST = Failure(FailureKind.SANDBOX_LOST, "call", "gone")


def now() -> float:
    return asyncio.get_running_loop().time()


async def hold(pool: Pool, seconds: float) -> str:
    """Be a suspect; which sandbox it had."""
    async with pool.quarantine() as alone:
        await asyncio.sleep(seconds)
        return alone.id


class TestBorrowed:
    async def test_a_suspect_without_room_has_the_one_there_is_once_it_is_empty(self) -> None:
        async with stage(NOBODY, room=1) as on:
            leases = [await on.pool.lease() for _ in range(3)]
            suspect = asyncio.create_task(hold(on.pool, 2.0))
            await asyncio.sleep(PATIENCE_S - 1)
            early = await on.pool.lease()
            await asyncio.sleep(2)
            late = asyncio.create_task(on.pool.lease())
            await asyncio.sleep(30)
            assert not suspect.done(), "it is in use"
            assert not late.done(), "it takes nobody in"
            for lease in (*leases, early):
                lease.release()
            emptied = now()
            assert await suspect == leases[0].sandbox.id
            assert now() == emptied + 2.0
            assert (await late).sandbox is leases[0].sandbox
            assert now() == emptied + 2.0

    async def test_the_next_suspect_does_not_wait_again_for_what_does_not_come(self) -> None:
        async with stage(NOBODY, room=1) as on:
            await asyncio.sleep(1)
            await hold(on.pool, 1.0)
            began = now()
            for _ in range(10):
                await hold(on.pool, 1.0)
            assert now() == began + 10.0

    async def test_with_room_it_has_one_of_its_own_at_once(self) -> None:
        async with stage(NOBODY, room=2) as on:
            lease = await on.pool.lease()
            assert await hold(on.pool, 1.0) != lease.sandbox.id
            assert now() == 1.0

    async def test_nothing_is_borrowed_any_more_when_its_own_comes(self) -> None:
        async with stage(NOBODY, sandboxes=2, room=3) as on:
            await asyncio.sleep(1)
            leases = [await on.pool.lease() for _ in range(4)]
            first = asyncio.create_task(hold(on.pool, PATIENCE_S + 1))
            await asyncio.sleep(0.1)
            second = asyncio.create_task(hold(on.pool, 1.0))
            leases[0].sandbox.condemn(LOST)  # its successor stands behind the second suspect
            await asyncio.sleep(PATIENCE_S)
            assert len({first, second} & {task for task in (first, second) if task.done()}) == 1
            more = [await on.pool.lease() for _ in range(4)]
            assert {lease.sandbox.id for lease in more} <= set(on.backend.live)

    async def test_a_borrowed_one_that_dies_is_borrowed_no_more(self) -> None:
        async with stage(NOBODY, room=1) as on:
            lease = await on.pool.lease()
            suspect = asyncio.create_task(hold(on.pool, 1.0))
            await asyncio.sleep(PATIENCE_S + 1)
            lease.sandbox.condemn(LOST)
            lease.release()
            assert await suspect != lease.sandbox.id
            assert (await on.pool.lease()).sandbox.id in on.backend.live

    async def test_a_cancelled_suspect_gives_it_back(self) -> None:
        async with stage(NOBODY, room=1) as on:
            lease = await on.pool.lease()
            suspect = asyncio.create_task(hold(on.pool, 1.0))
            await asyncio.sleep(PATIENCE_S + 1)
            waiting = asyncio.create_task(on.pool.lease())
            await asyncio.sleep(1)
            assert not waiting.done()
            suspect.cancel()
            assert (await waiting).sandbox is lease.sandbox

    async def test_one_that_serves_one_episode_is_borrowed_while_it_is_ready(self) -> None:
        async with stage(NOBODY, room=1, limits=ALONE) as on:
            await asyncio.sleep(1)
            [ready] = on.backend.live
            assert await hold(on.pool, 1.0) == ready
            assert (await on.pool.lease()).sandbox.id != ready

    async def test_one_on_which_a_call_is_still_at_work_is_not_empty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its caller has given it up, and the lease with it; its deadline may yet end the sandbox."""
        async with stage(NOBODY, room=1) as on:
            lease = await on.pool.lease()
            counts = lease.sandbox.statistics()
            monkeypatch.setattr(lease.sandbox, "statistics", lambda: replace(counts, pending=1))
            lease.release()
            suspect = asyncio.create_task(hold(on.pool, 1.0))
            await asyncio.sleep(PATIENCE_S + 10)
            assert not suspect.done()
            monkeypatch.undo()
            began = now()
            await suspect
            assert now() <= began + 1.2

    async def test_suspects_have_it_one_after_the_other_before_anybody_else(self) -> None:
        async with stage(NOBODY, room=1) as on:
            lease = await on.pool.lease()
            suspects = [asyncio.create_task(hold(on.pool, 1.0)) for _ in range(20)]
            await asyncio.sleep(PATIENCE_S + 1)
            others = [asyncio.create_task(on.pool.lease()) for _ in range(20)]
            await asyncio.sleep(1)
            suspects.pop().cancel()
            lease.release()
            began = now()
            await asyncio.wait(suspects)
            assert now() == began + 19.0
            await asyncio.wait(others)
            assert now() == began + 19.0

    @pytest.mark.parametrize("room", [2, 3])
    async def test_a_suspects_own_that_is_still_at_work_is_not_the_next_one_s(
        self, room: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with stage(NOBODY, room=room) as on:
            await asyncio.sleep(1)
            async with on.pool.quarantine() as first:
                monkeypatch.setattr(first, "statistics", lambda: SandboxStatistics(1, 1, 1, 1, 0))
            next_one = asyncio.create_task(hold(on.pool, 0.0))
            await asyncio.sleep(PATIENCE_S - 1)
            assert not next_one.done()
            assert await next_one != first.id

    async def test_a_lent_one_waits_for_nobody_who_cannot_use_it(self) -> None:
        """Two suspects' sandboxes are under way, slowly; the pool has two places, so nobody else's turn comes."""

        def script(call: MemoryCall) -> Fault | None:
            return Slow(PATIENCE_S + 3) if call.op == "create" and call.sandbox > 2 else None

        async with stage(NOBODY, script, sandboxes=2) as on:
            await asyncio.sleep(1)
            suspects = [asyncio.create_task(hold(on.pool, 4.0)) for _ in range(40)]
            waited = 0.0
            while not all(suspect.done() for suspect in suspects):
                began = now()
                (await on.pool.lease()).release()
                waited = max(waited, now() - began)
                await asyncio.sleep(0.5)
            assert waited < PATIENCE_S + 4

    async def test_the_first_to_wait_is_the_first_to_have_one(self) -> None:
        """The second suspect's own sandbox has no room: it has the first one's, before those that came later."""
        backend = MemoryBackend(room=3)
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=1.0)
        ended: list[int] = []

        async def suspect(number: int) -> None:
            await hold(pool, 3.0)
            ended.append(number)

        async with backend, Pool(backend, 2, lambda event: None, lends=False) as pool:
            await asyncio.sleep(1)
            async with asyncio.TaskGroup() as tasks:
                for number in range(10):
                    tasks.create_task(suspect(number))
                    await asyncio.sleep(0.01)
        assert ended == list(range(10))

    async def test_nothing_is_lent_where_leases_may_have_no_end(self) -> None:
        backend = MemoryBackend(room=1)
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=1.0)
        async with backend, Pool(backend, 1, lambda event: None, lends=False) as pool:
            lease = await pool.lease()
            suspect = asyncio.create_task(hold(pool, 1.0))
            await asyncio.sleep(1000)
            assert (await pool.lease()).sandbox is lease.sandbox
            suspect.cancel()


class TestUnused:
    async def test_a_suspects_one_gives_way(self) -> None:
        """A regular one was lost, and a suspect was first in the queue for its room."""

        def script(call: MemoryCall) -> Fault | None:
            return Slow(1.0) if call == MemoryCall(1, "destroy") else None

        async with stage(NOBODY, script, room=1) as on:
            (await on.pool.lease()).sandbox.condemn(LOST)
            suspect = await hold(on.pool, 0.5)
            ends = now()
            assert (await on.pool.lease()).sandbox.id != suspect
            assert now() <= ends + UNUSED_S + 0.2
            assert suspect not in on.backend.live

    async def test_it_is_there_for_the_next_suspect_until_then(self) -> None:
        async with stage(NOBODY) as on:
            first = await hold(on.pool, 1.0)
            await asyncio.sleep(UNUSED_S - 1)
            assert await hold(on.pool, 1.0) == first
            await asyncio.sleep(UNUSED_S + 1)
            assert first not in on.backend.live
            assert on.pool.statistics().recycled == 0, "it was not worn"
            assert await hold(on.pool, 1.0) != first


async def test_a_worn_one_that_dies_before_its_successor_has_room_gives_way() -> None:
    async with stage(NOBODY, room=1, limits=SandboxLimits(episodes=1)) as on:
        first = await on.pool.lease()
        first.release()
        await asyncio.sleep(1)
        first.sandbox.condemn(LOST)
        assert (await on.pool.lease()).sandbox is not first.sandbox
        assert now() == pytest.approx(1.0)


async def test_a_worn_one_that_has_died_does_not_count_as_alive() -> None:
    def script(call: MemoryCall) -> Fault | None:
        return Die() if call.op == "create" and call.sandbox > 1 else None

    async with stage(NOBODY, script, limits=SandboxLimits(episodes=1)) as on:
        first = await on.pool.lease()
        first.release()
        await asyncio.sleep(1)
        first.sandbox.condemn(LOST)
        with pytest.raises(RunFailed):
            await on.pool.lease()


@pytest.mark.parametrize("before", [175.0, 235.0, 240.0, 300.0])
async def test_a_suspect_that_found_no_room_ends_no_run(before: float) -> None:
    """Starts of its sandbox have failed one after the other; then the regular one dies, and is slow to be destroyed."""

    def script(call: MemoryCall) -> Fault | None:
        return Slow(3.0) if call == MemoryCall(1, "destroy") else None

    async with stage(NOBODY, script, room=1) as on:
        lease = await on.pool.lease()
        suspect = asyncio.create_task(hold(on.pool, 1.0))
        await asyncio.sleep(before)
        lease.sandbox.condemn(LOST)
        lease.release()
        assert (await on.pool.lease()).sandbox is not lease.sandbox
        await suspect


@pytest.mark.parametrize("turns", range(8))
async def test_one_that_is_seen_off_as_the_pool_closes_is_destroyed_by_it(turns: int) -> None:
    backend = MemoryBackend(limits=ALONE)
    backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=1.0)
    async with Pool(backend, 1, lambda event: None) as pool:
        lease = await pool.lease()
        for _ in range(turns):
            await asyncio.sleep(0)
        lease.release()
    assert not backend.live


async def test_a_worn_one_that_was_empty_for_a_while_is_kept_from_whoever_leases_it() -> None:
    """Its successor starts slowly; it serves on, and is not destroyed under those that it serves."""

    def script(call: MemoryCall) -> Fault | None:
        return Slow(10.0) if call == MemoryCall(2, "create") else None

    async with stage(NOBODY, script, limits=SandboxLimits(episodes=1)) as on:
        (await on.pool.lease()).release()
        await asyncio.sleep(1)
        lease = await on.pool.lease()
        await asyncio.sleep(60)
        assert not lease.sandbox.lost.done()
        lease.release()
        await asyncio.sleep(1)
        assert lease.sandbox.id not in on.backend.live


@pytest.mark.parametrize("limits", [SandboxLimits(), ALONE, SandboxLimits(sessions=2, episodes=5)])
@pytest.mark.parametrize("room", [1, 2, 4])
async def test_an_agent_that_kills_is_found_out_and_the_rest_completes(limits: SandboxLimits, room: int) -> None:
    killers = {f"memory_{n}" for n in range(3)}

    def script(call: MemoryCall) -> Fault | None:
        return Die() if call.op == "step" and call.task in killers and call.turn == 2 else None

    policy = Says("one", "two", "three", "stop", think_s=1.0)
    async with stage(policy, script, sandboxes=4, room=room, limits=limits) as on:
        async with asyncio.timeout(600):
            played = await on.play_all([EpisodeKey(f"memory_{n}", 0, 0) for n in range(12)])
        for key, trajectory in played.items():
            assert trajectory.outcome is (Outcome.TRUNCATED if key.task in killers else Outcome.COMPLETED)
            assert (trajectory.stop_reason is StopReason.AGENT_KILLED_ENV) == (key.task in killers)


@pytest.mark.parametrize("room", [1, 2])
async def test_suspects_do_not_wait_for_the_episodes_of_those_that_were_acquitted(room: int) -> None:
    """Sixteen episodes of five minutes on one sandbox when one of them kills it: all are suspects."""

    def script(call: MemoryCall) -> Fault | None:
        if call.op != "step" or call.task != "memory_0":
            return Slow(2.0) if (call.op, call.turn, call.sandbox) == ("step", 1, 1) else None
        return Die() if call.turn == 1 else Slow(1.0)

    policy = Says(*["on"] * 60, "stop", think_s=5.0)
    async with stage(policy, script, room=room, time_budget_s=600.0) as on:
        played = await on.play_all([EpisodeKey(f"memory_{n}", 0, 0) for n in range(16)])
        assert now() < 330.0
        assert [one.outcome for one in played.values()].count(Outcome.COMPLETED) == 15


@pytest.mark.parametrize("limits", [SandboxLimits(), ALONE, SandboxLimits(sessions=2, episodes=5)])
@pytest.mark.parametrize("seed", range(8))
async def test_any_history(limits: SandboxLimits, seed: int) -> None:
    """Leases, suspects, losses and cancellations at random: everybody has a turn, and a suspect has nobody beside."""
    rng = random.Random(seed)
    holders: dict[str, int] = {}
    suspects: set[str] = set()

    def script(call: MemoryCall) -> Fault | None:
        return Slow(rng.random()) if call.op == "create" else None

    async def leases(pool: Pool) -> None:
        await asyncio.sleep(rng.random() * 30)
        lease = await pool.lease()
        name = lease.sandbox.id
        assert name not in suspects
        holders[name] = holders.get(name, 0) + 1
        try:
            await asyncio.sleep(rng.random() * 3)
            if rng.random() < 0.1:
                lease.sandbox.condemn(LOST)
        finally:
            holders[name] -= 1
            lease.release()

    async def is_suspect(pool: Pool) -> None:
        await asyncio.sleep(rng.random() * 30)
        async with pool.quarantine() as alone:
            assert not holders.get(alone.id)
            assert alone.id not in suspects
            suspects.add(alone.id)
            try:
                await asyncio.sleep(rng.random())
                if rng.random() < 0.3:
                    alone.condemn(LOST)
            finally:
                suspects.discard(alone.id)

    async with stage(NOBODY, script, sandboxes=3, room=rng.randint(1, 3), limits=limits) as on:
        tasks = [asyncio.create_task((is_suspect if n % 4 == 0 else leases)(on.pool)) for n in range(80)]
        for task in rng.sample(tasks, 10):
            await asyncio.sleep(rng.random())
            task.cancel()
        _, waiting = await asyncio.wait(tasks, timeout=600)
        assert not waiting
        for task in tasks:
            assert task.cancelled() or task.exception() is None
        assert on.pool.statistics().leases == 0
