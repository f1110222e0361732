"""The pool on a backend in memory, in virtual time: leases, losses, quarantine, failed starts, teardown."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from played import CALL_LIMIT_S, Says, stage

from orchestrator.errors import RunFailed
from orchestrator.events import SandboxEnded, SandboxLeft, SandboxStarted
from orchestrator.pool import DESTROY_S, Pool
from orchestrator.testing import Die, Hang, MemoryBackend, MemoryCall, Slow
from orchestrator.types import EpisodeSpec, Failure, FailureKind, RunId

if TYPE_CHECKING:
    from orchestrator.events import Event
    from orchestrator.testing.script import Fault

pytestmark = pytest.mark.looptime

LOST = Failure(FailureKind.SANDBOX_LOST, "call", "gone")
NOBODY = Says()


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_the_least_busy_sandbox_is_leased() -> None:
    async with stage(NOBODY, sandboxes=3) as on:
        await asyncio.sleep(1)
        leases = [await on.pool.lease() for _ in range(7)]
        counts = sorted(sum(lease.sandbox is sandbox for lease in leases) for sandbox in on.pool.sandboxes())
        assert counts == [2, 2, 3]
        busiest = max(on.pool.sandboxes(), key=lambda one: sum(lease.sandbox is one for lease in leases))
        for lease in leases:
            if lease.sandbox is not busiest:
                lease.release()
        assert (await on.pool.lease()).sandbox is not busiest
        assert on.pool.statistics() == (3, 3, 4, 0, 0, 0)
        assert repr(on.pool) == f"<Pool {on.pool.statistics()}>"


async def test_a_lease_waits_for_the_first_sandbox() -> None:
    async with stage(NOBODY, lambda call: Slow(3.0) if call.op == "create" else None) as on:
        await on.pool.lease()
        assert now() == 3.0
        assert on.events == [SandboxStarted(next(iter(on.backend.live)), 3.0)]


async def test_a_lost_sandbox_is_replaced_and_never_leased() -> None:
    async with stage(NOBODY, sandboxes=2) as on:
        lease = await on.pool.lease()
        lease.sandbox.condemn(LOST)
        others = [await on.pool.lease() for _ in range(4)]
        assert lease.sandbox not in [other.sandbox for other in others]
        await asyncio.sleep(1)
        assert lease.sandbox.id not in on.backend.live
        assert on.pool.statistics() == (2, 2, 4, 1, 0, 0)
        lease.release()
        assert on.pool.statistics().leases == 4, "a lease on a lost sandbox counts for nobody else"
        assert SandboxEnded(lease.sandbox.id, LOST, 1) in on.events


async def test_a_lease_waits_through_a_loss() -> None:
    async with stage(NOBODY, lambda call: Slow(5.0) if call == MemoryCall(2, "create") else None) as on:
        first = await on.pool.lease()
        first.sandbox.condemn(LOST)
        second = await on.pool.lease()
        assert second.sandbox is not first.sandbox
        assert now() == 5.0


async def test_a_hung_sandbox_is_condemned_and_an_idle_one_is_not() -> None:
    async with stage(NOBODY, lambda call: Hang() if call.op == "step" else None, sandboxes=2) as on:
        hung, idle = await on.pool.lease(), await on.pool.lease()
        session, _ = await hung.sandbox.open(EpisodeSpec("memory_0", 0, CALL_LIMIT_S))
        step = asyncio.create_task(session.step(b"{}"))
        failure = await asyncio.shield(hung.sandbox.lost)
        assert failure.kind is FailureKind.SANDBOX_HUNG
        assert now() == pytest.approx(CALL_LIMIT_S, abs=0.3)
        await asyncio.sleep(100)
        assert not idle.sandbox.lost.done()
        await asyncio.wait({step})
        assert step.exception() is not None


class TestStarts:
    async def test_one_failed_start_is_tried_again_after_a_pause(self) -> None:
        async with stage(NOBODY, lambda call: Die() if call == MemoryCall(1, "create") else None) as on:
            await on.pool.lease()
            assert now() == pytest.approx(0.2)
            assert on.pool.statistics().failed_starts == 1
            [ended, started] = on.events
            assert isinstance(ended, SandboxEnded)
            assert ended.failure.kind is FailureKind.SANDBOX_START
            assert isinstance(started, SandboxStarted)

    async def test_no_sandbox_at_all_ends_the_run(self) -> None:
        async with stage(NOBODY, lambda call: Die(message="no such image") if call.op == "create" else None) as on:
            with pytest.raises(RunFailed, match="no sandbox can be started: no such image"):
                await on.pool.lease()
            assert now() == pytest.approx(0.2 + 0.4 + 0.8)
            with pytest.raises(RunFailed):
                async with on.pool.quarantine():
                    pass

    async def test_pauses_grow_to_a_bound_while_another_sandbox_lives(self) -> None:
        starts: list[float] = []

        def script(call: MemoryCall) -> Fault | None:
            if call.op != "create" or call.sandbox == 1:
                return None
            starts.append(now())
            return Die()

        async with stage(NOBODY, script, sandboxes=2) as on:
            await asyncio.sleep(60)
            await on.pool.lease()
        pauses = [later - earlier for earlier, later in pairwise(starts)]
        assert pauses[:6] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5.0])
        assert max(pauses) == pytest.approx(5.0)


class TestQuarantine:
    async def test_it_is_started_when_it_is_first_needed_and_leased_to_nobody_else(self) -> None:
        async with stage(NOBODY, sandboxes=2) as on:
            await asyncio.sleep(1)
            assert on.backend.statistics().started == 2
            async with on.pool.quarantine() as alone:
                assert on.backend.statistics().started == 3
                leased = [(await on.pool.lease()).sandbox for _ in range(6)]
                assert alone not in leased
                assert alone in list(on.pool.sandboxes())
            async with on.pool.quarantine() as again:
                assert again is alone
            assert on.backend.statistics().started == 3

    async def test_suspects_have_one_each_and_the_rest_wait(self) -> None:
        held: list[object] = []
        most = 0

        async def hold() -> None:
            nonlocal most
            async with on.pool.quarantine() as alone:
                assert alone not in held, "a sandbox holds one suspect"
                held.append(alone)
                most = max(most, len(held))
                await asyncio.sleep(1.0)
                held.remove(alone)

        async with stage(NOBODY, sandboxes=2) as on, asyncio.TaskGroup() as suspects:
            for _ in range(6):
                suspects.create_task(hold())
        assert most == 2
        assert on.backend.statistics().started <= 4

    async def test_a_dead_one_is_replaced_before_it_is_given(self) -> None:
        async with stage(NOBODY) as on:
            async with on.pool.quarantine() as first:
                first.condemn(LOST)
            async with on.pool.quarantine() as second:
                assert second is not first
                assert not second.lost.done()

    async def test_a_hung_one_is_swept(self) -> None:
        async with stage(NOBODY, lambda call: Hang() if call.op == "open" else None) as on:
            async with on.pool.quarantine() as alone:
                opening = asyncio.create_task(alone.open(EpisodeSpec("memory_0", 0, 1.0)))
                await asyncio.wait({opening})
                assert opening.exception() is not None
            assert now() == pytest.approx(CALL_LIMIT_S, abs=0.3)


class TestTeardown:
    async def test_a_sandbox_that_will_not_end_is_left_and_told(self, caplog: pytest.LogCaptureFixture) -> None:
        events: list[Event] = []
        backend = MemoryBackend(lambda call: Hang() if call == MemoryCall(1, "destroy") else None)
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=1.0)
        async with Pool(backend, 2, events.append):
            await asyncio.sleep(1)
        assert now() == pytest.approx(1 + DESTROY_S)
        [left] = backend.live
        assert SandboxLeft(left) in events
        assert "left behind for the reaper" in caplog.text

    async def test_a_lost_sandbox_that_will_not_end_gives_its_place_away(self) -> None:
        def script(call: MemoryCall) -> Fault | None:
            return Hang() if call == MemoryCall(1, "destroy") else None

        backend = MemoryBackend(script)
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=1.0)
        async with Pool(backend, 1, lambda event: None) as pool:
            (await pool.lease()).sandbox.condemn(LOST)
            second = await pool.lease()
            assert second.sandbox.id != "memory-1"
            assert now() == pytest.approx(DESTROY_S)

    async def test_cancelled_anywhere_nothing_is_left(self) -> None:
        turns = 0
        while await self.cancelled_after(turns):
            turns += 1
        assert turns > 15, "the life that is cut short has that many turns"

    async def cancelled_after(self, turns: int) -> bool:
        """Whether it was cut short: otherwise it had ended before."""
        backend = MemoryBackend(lambda call: Die() if call == MemoryCall(2, "create") else None)
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=1.0)

        async def live() -> None:
            async with Pool(backend, 2, lambda event: None) as pool:
                lease = await pool.lease()
                try:
                    async with pool.quarantine() as alone:
                        alone.condemn(LOST)
                        lease.sandbox.condemn(LOST)
                        (await pool.lease()).release()
                finally:
                    lease.release()

        living = asyncio.create_task(live())
        for _ in range(turns):
            await asyncio.sleep(0)
        cut = living.cancel()
        await asyncio.wait({living})
        assert living.cancelled() == cut, "cancellation is passed on"
        assert backend.statistics().sandboxes == 0
        return cut

    @pytest.mark.parametrize("turns", range(6))
    async def test_a_cancelled_lease_holds_nothing(self, turns: int) -> None:
        async with stage(NOBODY, lambda call: Slow(1.0) if call.op == "create" else None) as on:
            waiting = asyncio.create_task(on.pool.lease())
            for _ in range(turns):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
            await asyncio.sleep(5)
            assert on.pool.statistics().leases == 0
            assert on.pool.statistics().live == 1
