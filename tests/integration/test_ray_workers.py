"""Workers of a Ray queue: what is done is said soon, what is given back is gone, and all learn of the end."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest
from runs import until

from backends.sandboxes.ray.cluster import NAMESPACE, actors_of
from backends.trainers.ray import RayQueue, RayWorker, line
from backends.trainers.ray.host import NEWS_S
from backends.trainers.ray.keeper import Keeper, actor_name
from orchestrator.errors import ClaimLost
from orchestrator.testing.queue import sample_group

if TYPE_CHECKING:
    from ray_cluster import TwoNodes

pytestmark = pytest.mark.timeout(120)
LIMIT_S = 40.0
SOON_S = 4.0


async def filled(queue: RayQueue, groups: int) -> None:
    for seq in range(1, groups + 1):
        await queue.deliver(sample_group(seq))
    await queue.flush()


async def acked(queue: RayQueue, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        found += await queue.acked()
    return found


async def test_a_long_step_holds_no_acknowledgement_back(cluster: TwoNodes) -> None:
    async with asyncio.timeout(LIMIT_S), RayQueue("slow") as queue:
        await filled(queue, 4)
        async with RayWorker("slow", limit=4) as groups:
            assert [(await anext(groups)).seq for _ in range(3)] == [1, 2, 3]
            async with asyncio.timeout(SOON_S):
                assert await acked(queue, 2) == [1, 2]


async def test_what_a_busy_worker_has_done_is_given_to_nobody_when_the_actor_dies(cluster: TwoNodes) -> None:
    import ray

    async with asyncio.timeout(LIMIT_S), RayQueue("undone") as queue:
        await filled(queue, 3)
        async with RayWorker("undone", limit=3) as busy, RayWorker("undone", limit=3) as idle:
            actor = await asyncio.to_thread(ray.get_actor, actor_name("undone"), NAMESPACE)
            pid = int(await actor.__ray_call__.remote(lambda host: os.getpid()))
            assert (await anext(busy)).seq == 1
            os.kill(pid, signal.SIGSTOP)  # it hears no more, and dies of it
            assert (await anext(busy)).seq == 2
            assert (await anext(busy)).seq == 3
            os.kill(pid, signal.SIGKILL)
            waiting = asyncio.create_task(anext(idle))
            assert sorted(await acked(queue, 2)) == [1, 2]
            await asyncio.sleep(7.0)  # beyond the grace of the new actor
            assert not waiting.done()
            finishing = asyncio.create_task(_end(busy))
            assert await acked(queue, 1) == [3]
            await queue.finish()
            assert await finishing
            with pytest.raises(StopAsyncIteration):
                await waiting
        assert busy.statistics().lost == 0


async def _end(worker: RayWorker) -> bool:
    return [group async for group in worker] == []


async def test_what_was_given_back_cannot_be_acknowledged(cluster: TwoNodes) -> None:
    async with asyncio.timeout(LIMIT_S), RayQueue("returned") as queue, RayWorker("returned") as worker:
        await filled(queue, 2)
        first, second = await worker.claim()
        await worker.nack(first)
        with pytest.raises(ClaimLost, match="was given back"):
            await worker.ack(first)
        await worker.ack(second)
        await worker.ack(second)
        (again,) = await worker.claim()
        assert again.group.redelivered
        await worker.ack(again)
        assert sorted(await acked(queue, 2)) == [1, 2]
        assert worker.statistics()[:4] == (0, 3, 2, 1)


async def test_a_worker_that_claims_learns_of_the_end(cluster: TwoNodes) -> None:
    async with asyncio.timeout(LIMIT_S), RayWorker("ending") as worker, RayWorker("ending") as other:
        async with RayQueue("ending") as queue:
            await filled(queue, 1)
            claims = await worker.claim()
            assert not await worker.drained()
            await worker.ack(*claims)
            assert not await worker.drained()
            await acked(queue, 1)
            await queue.finish()
            await until(worker.drained, "the end to be known")
            with pytest.raises(StopAsyncIteration):
                await anext(other)
        assert await worker.drained()
        assert await worker.claim() == []
        for one in (worker, other, other):
            with pytest.raises(StopAsyncIteration):
                await anext(one)


async def test_workers_that_wait_for_a_queue_find_one_that_ends_at_once(
    cluster: TwoNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "LOOK_S", 0.75 * NEWS_S)
    worker = RayWorker("flash", patience_s=2 * NEWS_S)
    for _ in range(2):
        async with asyncio.timeout(LIMIT_S), worker:
            waiting = asyncio.create_task(anext(worker))
            await asyncio.sleep(0.3)
            assert not waiting.done(), "the end of an earlier queue is not that of the next"
            async with RayQueue("flash") as queue:
                await queue.finish()
            with pytest.raises(StopAsyncIteration):
                await waiting


async def test_a_queue_that_is_cancelled_while_it_starts_leaves_no_actor(
    cluster: TwoNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    place, placing, go, placed = Keeper._place, threading.Event(), threading.Event(), threading.Event()

    def slowly(keeper: Keeper) -> None:
        placing.set()
        go.wait(LIMIT_S)
        place(keeper)
        placed.set()

    monkeypatch.setattr(Keeper, "_place", slowly)
    queue = RayQueue("unborn")
    starting = asyncio.create_task(queue.__aenter__())
    await asyncio.to_thread(placing.wait, LIMIT_S)
    starting.cancel()
    asyncio.get_running_loop().call_later(0.2, go.set)
    await asyncio.wait({starting})
    assert starting.cancelled()
    await asyncio.to_thread(placed.wait, LIMIT_S)

    async def gone() -> bool:
        return not await asyncio.to_thread(actors_of, ray, "queue/unborn")

    async with asyncio.timeout(SOON_S):
        await until(gone, "the actor to be gone")
