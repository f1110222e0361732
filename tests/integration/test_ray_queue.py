"""The queue on a real cluster: the conformance kit, whole runs, deaths of its actor, its workers and its driver."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import queue_driver
from queue_driver import drive
from runs import until

from backends.sandboxes.ray.cluster import NAMESPACE, actors_of
from backends.trainers.ray import RayQueue, RayWorker, keeper
from backends.trainers.ray.keeper import actor_name
from orchestrator import Run
from orchestrator.rundir import RunDirectory
from orchestrator.store import Claims
from orchestrator.testing.queue import QueueUnderTest, check_queue, sample_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from ray_cluster import TwoNodes

    from orchestrator.types import Group

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


class Trainer:
    """A worker in this process that writes down what it is given."""

    def __init__(self, queue: str, train_s: float = 0.0, **options: Any) -> None:
        self.worker = RayWorker(queue, **options)
        self.given: list[Group] = []
        self._train_s = train_s

    async def train(self) -> None:
        async with self.worker:
            async for group in self.worker:
                self.given.append(group)
                await asyncio.sleep(self._train_s)


def seqs(*trainers: Trainer) -> list[int]:
    return sorted(group.seq for trainer in trainers for group in trainer.given)


async def actor_pid(queue: str) -> int:
    import ray

    actor = await asyncio.to_thread(ray.get_actor, actor_name(queue), NAMESPACE)
    return int(await actor.__ray_call__.remote(lambda host: os.getpid()))


INLINE = pytest.mark.parametrize("inline", [keeper.INLINE, 0], ids=["in the call", "in the object store"])


@INLINE
async def test_a_death_of_the_actor_costs_nothing(
    inline: int, cluster: TwoNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "INLINE", inline)
    trainers = [Trainer("mortal", 0.05, limit=limit) for limit in (1, 4)]
    queue = RayQueue("mortal")
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(drive(tmp_path / "run", queue, 120))
        for trainer in trainers:
            tasks.create_task(trainer.train())
        for dead in range(1, 4):
            await until(lambda dead=dead: given(trainers, 25 * dead), "groups")
            os.kill(await actor_pid("mortal"), signal.SIGKILL)
    assert running.result().groups == 120
    assert seqs(*trainers) == list(range(1, 121))
    assert queue.statistics() == (0, 120, 120, 0, 4)
    assert acked(tmp_path / "run", "mortal") == (120, 120)


async def given(trainers: Iterable[Trainer], count: int) -> bool:
    return len(seqs(*trainers)) >= count


def acked(out: Path, consumer: str) -> tuple[int, int]:
    """Rows of the outbox, and how many of them this consumer has acknowledged."""
    with Run.open(out) as run:
        groups = run.totals().groups
    with Claims(RunDirectory(out).store, consumer) as claims:
        sql = "SELECT count(*) FROM deliveries WHERE consumer = ? AND state = 'acked'"
        return groups, claims._connection.execute(sql, (consumer,)).get


async def test_what_a_dead_worker_had_goes_to_another(cluster: TwoNodes, tmp_path: Path) -> None:
    log = tmp_path / "log"
    trainer = Trainer("widowed")
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(drive(tmp_path / "run", RayQueue("widowed"), 40))
        async with program("worker", cluster.address, "widowed", log) as worker:
            await until(lambda: asyncio.to_thread(log.exists), "the worker to hold some")
            worker.kill()
        await trainer.train()
    assert running.result().groups == 40
    assert seqs(trainer) == list(range(1, 41))
    again = [group.seq for group in trainer.given if group.redelivered]
    assert int(log.read_text(encoding="utf-8")) in again
    assert 1 <= len(again) <= 5
    assert trainer.worker.statistics().redelivered == len(again)


@INLINE
async def test_a_death_of_the_driver_costs_nothing(inline: int, cluster: TwoNodes, tmp_path: Path) -> None:
    import ray

    arguments = (tmp_path / "run", cluster.address, "orphaned", 80, inline)
    trainers = [Trainer("orphaned", 0.02, limit=limit) for limit in (1, 5)]
    async with asyncio.TaskGroup() as tasks:
        for trainer in trainers:
            tasks.create_task(trainer.train())
        for dead in (1, 2):
            async with program(*arguments) as driver:
                await until(lambda dead=dead: given(trainers, 20 * dead), "groups")
                driver.kill()
        async with program(*arguments) as driver:
            assert await driver.wait() == 0
    assert seqs(*trainers) == list(range(1, 81))
    assert await asyncio.to_thread(acked, tmp_path / "run", "orphaned") == (80, 80)
    await until(partial(asyncio.to_thread, lambda: not actors_of(ray, "queue/")), "the actors to be gone")


@asynccontextmanager
async def program(*arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """A driver or a worker in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, queue_driver.__file__, *map(str, arguments), stdin=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
