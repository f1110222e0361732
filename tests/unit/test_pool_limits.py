"""Sandboxes that serve a bounded number of sessions, or are worn: in virtual time, on a backend in memory."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest
from played import Says, stage

from orchestrator.errors import RunFailed
from orchestrator.protocols import SandboxLimits
from orchestrator.testing import Die, MemoryCall, Slow
from orchestrator.types import EpisodeKey, Failure, FailureKind, Outcome

if TYPE_CHECKING:
    from orchestrator.pool import Lease, Pool
    from orchestrator.testing.script import Fault

pytestmark = pytest.mark.looptime

NOBODY = Says()
ALONE = SandboxLimits(sessions=1, episodes=1)
LOST = Failure(FailureKind.SANDBOX_LOST, "call", "gone")


def starting(seconds: float) -> object:
    """Every sandbox takes this long to start."""

    def script(call: MemoryCall) -> Fault | None:
        return Slow(seconds) if call.op == "create" else None

    return script


def now() -> float:
    return asyncio.get_running_loop().time()


class TestAlone:
    async def test_each_lease_is_of_a_sandbox_of_its_own(self) -> None:
        async with stage(NOBODY, sandboxes=3, limits=ALONE) as on:
            leases = [await on.pool.lease() for _ in range(20)]
            assert len({lease.sandbox.id for lease in leases}) == 20
            for lease in leases:
                lease.release()
            await asyncio.sleep(1)
            assert on.pool.statistics().leases == 0
            assert on.pool.statistics().recycled == 20
            assert on.backend.statistics().sandboxes == 1, "the used ones are destroyed, one is kept ready"

    async def test_a_used_one_is_destroyed_when_its_lease_ends(self) -> None:
        async with stage(NOBODY, sandboxes=2, limits=ALONE) as on:
            lease = await on.pool.lease()
            await asyncio.sleep(100)
            assert lease.sandbox.id in on.backend.live, "not while it is in use"
            lease.release()
            await asyncio.sleep(0.1)
            assert lease.sandbox.id not in on.backend.live

    async def test_a_look_uses_nothing_up(self) -> None:
        async with stage(NOBODY, limits=ALONE) as on:
            first = await on.pool.lease(opens=False)
            first.release()
            assert (await on.pool.lease()).sandbox is first.sandbox

    async def test_a_look_has_it_to_itself(self) -> None:
        async with stage(NOBODY, limits=ALONE) as on:
            looking = await on.pool.lease(opens=False)
            leasing = asyncio.create_task(on.pool.lease())
            await asyncio.sleep(1)
            assert not leasing.done()
            looking.release()
            assert (await leasing).sandbox is looking.sandbox

    async def test_the_next_is_ready_before_it_is_asked_for(self) -> None:
        async with stage(NOBODY, starting(2.0), sandboxes=16, limits=ALONE) as on:
            waits: list[float] = []
            for _ in range(60):
                await asyncio.sleep(0.5)
                began = now()
                (await on.pool.lease()).release()
                waits.append(now() - began)
            assert max(waits[20:]) == 0.0, "once the pace is known nobody waits"
            await asyncio.sleep(60)
            assert 1 <= on.backend.statistics().sandboxes <= 7, "and no more are kept than the pace asks for"

    async def test_never_more_ready_than_the_pool_has_places(self) -> None:
        async with stage(NOBODY, sandboxes=3, limits=ALONE) as on:
            leasing = [asyncio.create_task(on.pool.lease()) for _ in range(50)]
            held: list[Lease] = []
            while len(held) < 50:
                await asyncio.sleep(0.01)
                held = [task.result() for task in leasing if task.done()]
                assert on.backend.statistics().sandboxes <= 3 + len(held)

    async def test_a_lost_one_is_told_with_its_lease(self) -> None:
        async with stage(NOBODY, limits=ALONE) as on:
            lease = await on.pool.lease()
            lease.sandbox.condemn(LOST)
            lease.release()
            await asyncio.sleep(1)
            assert on.pool.statistics().lost == 1
            assert (await on.pool.lease()).sandbox is not lease.sandbox

    async def test_suspects_have_fresh_ones(self) -> None:
        async with stage(NOBODY, limits=ALONE) as on:
            seen = []
            for _ in range(3):
                async with on.pool.quarantine() as alone:
                    seen.append(alone.id)
            assert len(set(seen)) == 3

    async def test_whole_episodes(self) -> None:
        policy = Says("one", "two", "stop")
        async with stage(policy, sandboxes=2, limits=ALONE) as on:
            played = await on.play_all([EpisodeKey(f"memory_{n}", 0, 0) for n in range(30)])
            assert {one.outcome for one in played.values()} == {Outcome.COMPLETED}
            await asyncio.sleep(1)
            assert on.idle()
            assert on.backend.statistics().started >= 30

    async def test_nothing_starts_at_all(self) -> None:
        async with stage(NOBODY, lambda call: Die() if call.op == "create" else None, limits=ALONE) as on:
            with pytest.raises(RunFailed):
                await on.pool.lease()


class TestWorn:
    async def test_after_so_many_sessions_it_is_replaced(self) -> None:
        async with stage(NOBODY, starting(1.0), limits=SandboxLimits(episodes=10)) as on:
            first = [await on.pool.lease() for _ in range(10)]
            early = await on.pool.lease()
            assert early.sandbox is first[0].sandbox, "it serves on while its successor starts"
            await asyncio.sleep(1.5)
            later = await on.pool.lease()
            assert later.sandbox is not first[0].sandbox
            assert first[0].sandbox.id in on.backend.live, "it is in use"
            for lease in (*first, early):
                lease.release()
            await asyncio.sleep(0.1)
            assert first[0].sandbox.id not in on.backend.live
            assert on.pool.statistics() == (1, 1, 1, 0, 0, 1)

    async def test_what_its_backend_calls_worn_is_replaced(self) -> None:
        async with stage(NOBODY, sandboxes=2) as on:
            lease, other = await on.pool.lease(), await on.pool.lease()
            lease.sandbox.worn = True
            await asyncio.sleep(1)
            assert on.backend.statistics().started == 3
            assert lease.sandbox in list(on.pool.sandboxes()), "its deadlines are still kept"
            assert lease.sandbox not in [(await on.pool.lease()).sandbox for _ in range(5)]
            lease.release()
            await asyncio.sleep(0.1)
            assert lease.sandbox.id not in on.backend.live
            assert not other.sandbox.lost.done()

    async def test_one_that_dies_while_it_is_replaced(self) -> None:
        async with stage(NOBODY, starting(1.0), limits=SandboxLimits(episodes=1)) as on:
            lease = await on.pool.lease()
            await asyncio.sleep(0.2)
            lease.sandbox.condemn(LOST)
            assert (await on.pool.lease()).sandbox is not lease.sandbox
            await asyncio.sleep(0.1)
            assert lease.sandbox.id not in on.backend.live
            assert on.pool.statistics().lost == 1

    async def test_one_that_cannot_be_replaced_serves_on(self) -> None:
        def script(call: MemoryCall) -> Fault | None:
            return Die() if call.op == "create" and call.sandbox > 1 else None

        async with stage(NOBODY, script, limits=SandboxLimits(episodes=2)) as on:
            leases = [await on.pool.lease() for _ in range(5)]
            await asyncio.sleep(60)
            assert (await on.pool.lease()).sandbox is leases[0].sandbox


@pytest.mark.parametrize("limits", [ALONE, SandboxLimits(episodes=3), SandboxLimits(sessions=2, episodes=5)])
@pytest.mark.parametrize("seed", range(5))
async def test_any_history(limits: SandboxLimits, seed: int) -> None:
    """Leases, looks, losses and cancellations at random: no limit is passed, and nothing is left."""
    rng = random.Random(seed)

    def script(call: MemoryCall) -> Fault | None:
        if call.op != "create":
            return None
        return Die() if rng.random() < 0.1 else Slow(rng.random())

    counts: dict[str, int] = {}
    used: dict[str, int] = {}

    async def one(pool: Pool) -> None:
        await asyncio.sleep(rng.random() * 20)
        opens = rng.random() < 0.9
        lease = await pool.lease(opens=opens)
        name = lease.sandbox.id
        counts[name] = counts.get(name, 0) + 1
        used[name] = used.get(name, 0) + opens
        try:
            assert limits.sessions is None or counts[name] <= limits.sessions
            assert limits.sessions is None or limits.episodes is None or used[name] <= limits.episodes
            await asyncio.sleep(rng.random() * 2)
            if rng.random() < 0.1:
                lease.sandbox.condemn(LOST)
        finally:
            counts[name] -= 1
            lease.release()

    async with stage(NOBODY, script, sandboxes=3, limits=limits) as on:
        tasks = [asyncio.create_task(one(on.pool)) for _ in range(120)]
        for task in rng.sample(tasks, 15):
            await asyncio.sleep(rng.random())
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            assert task.cancelled() or task.exception() is None
        await asyncio.sleep(30)
        assert on.pool.statistics().leases == 0
        assert on.backend.statistics().sandboxes <= 3
