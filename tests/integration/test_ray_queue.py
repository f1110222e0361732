"""The queue on a real cluster: the conformance kit, whole runs, deaths of its actor, its workers and its driver."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING

import pytest

from backends.trainers.ray import RayQueue, RayWorker
from orchestrator.testing.queue import QueueUnderTest, check_queue, sample_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ray_cluster import TwoNodes

pytestmark = pytest.mark.timeout(180)
NAMES = count(1)


@asynccontextmanager
async def under_test(stack: AsyncExitStack, capacity: int) -> AsyncIterator[QueueUnderTest]:
    """A queue and a worker of it, which live until the test ends."""
    queue = await stack.enter_async_context(RayQueue(f"kit-{next(NAMES)}", capacity=capacity))
    worker = await stack.enter_async_context(RayWorker(queue.name))

    async def take(limit: int) -> list[tuple[str, int]]:
        await queue.flush()
        claims = await worker.claim(limit)
        await worker.ack(*claims)
        return [(claim.group.task, claim.group.group) for claim in claims]

    yield QueueUnderTest(queue, take, capacity)
    await queue.finish()


@pytest.mark.parametrize("capacity", [2, 64])
async def test_the_contract(cluster: TwoNodes, capacity: int) -> None:
    async with AsyncExitStack() as stack:
        await check_queue(lambda: under_test(stack, capacity))


async def test_groups_large_and_small_come_in_order_and_end(cluster: TwoNodes) -> None:
    groups = [sample_group(seq, size=1000 if seq % 5 == 0 else 2) for seq in range(1, 41)]
    async with RayQueue("order") as queue, RayWorker("order", limit=7) as worker:
        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(_all(worker))
            for group in groups:
                await queue.deliver(group)
            acked: list[int] = []
            while len(acked) < len(groups):
                acked += await queue.acked()
            await queue.finish()
        assert taking.result() == groups
        assert acked == [group.seq for group in groups]
        assert worker.statistics() == (0, 40, 40, 0, 0)
        assert queue.statistics() == (0, 40, 40, 0, 1)


async def _all(worker: RayWorker) -> list[object]:
    return [group async for group in worker]
