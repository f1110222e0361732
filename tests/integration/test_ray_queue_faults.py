"""A Ray queue under strain: nobody takes, the actor hangs, groups are large, the store is full, its own code fails."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from queue_driver import drive
from runs import until

from backends.sandboxes.ray.cluster import NAMESPACE
from backends.trainers.ray import RayQueue, RayWorker, keeper
from backends.trainers.ray.keeper import INLINE, actor_name
from orchestrator.errors import RunFailed, Unavailable
from orchestrator.testing.queue import sample_group

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ray_cluster import TwoNodes

    from backends.trainers.ray.leases import LeaseStatistics
    from orchestrator.types import Group

pytestmark = pytest.mark.timeout(180)
LIMIT_S = 60.0
LARGE = 1 << 20


def large_group(seq: int) -> Group:
    """One whose data are longer than a call should carry."""
    group = sample_group(seq)
    return replace(group, trajectories=[replace(t, buffer=t.buffer + os.urandom(LARGE)) for t in group.trajectories])


async def taken(queue: str, train_s: float = 0.0) -> list[int]:
    """All that a worker of this process is given, until the end."""
    seqs = []
    async with RayWorker(queue, limit=2) as worker:
        async for group in worker:
            seqs.append(group.seq)
            await asyncio.sleep(train_s)
    return seqs


async def acked(queue: RayQueue, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        found += await queue.acked()
    return found


async def test_a_run_pauses_while_nobody_takes(cluster: TwoNodes, tmp_path: Path) -> None:
    queue = RayQueue("unloved", capacity=3)
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(drive(tmp_path / "run", queue, 60))

        async def full() -> bool:
            return queue.statistics().held == 3

        await until(full, "the queue to be full")
        await asyncio.sleep(1.0)
        assert queue.statistics() == (3, 3, 0, 0, 1)
        assert not running.done()
        taking = tasks.create_task(taken("unloved"))
    assert taking.result() == list(range(1, 61))
    assert running.result().groups == 60


async def test_an_actor_that_hangs_is_replaced(
    cluster: TwoNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "WAIT_S", 0.5)
    monkeypatch.setattr(keeper, "SILENT_S", 1.0)
    queue = RayQueue("frozen")
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(drive(tmp_path / "run", queue, 80))
        taking = tasks.create_task(taken("frozen", 0.02))

        async def half() -> bool:
            return queue.statistics().acked >= 20

        await until(half, "some groups")
        os.kill(await actor_pid("frozen"), signal.SIGSTOP)
    assert sorted(taking.result()) == list(range(1, 81))
    assert running.result().groups == 80
    assert queue.statistics() == (0, 80, 80, 0, 2)


async def actor_pid(queue: str) -> int:
    import ray

    actor = await asyncio.to_thread(ray.get_actor, actor_name(queue), NAMESPACE)
    return int(await actor.__ray_call__.remote(lambda host: os.getpid()))


class Trainer:
    """A trainer as an actor of the user's own: `async for` on whatever node it is."""

    async def hold_up(self, queue: str, block_s: float) -> list[tuple[int, bool]]:
        """A step that does not give way to the event loop."""
        found = []
        async with RayWorker(queue, lease_s=3.0, limit=3) as worker:
            async for group in worker:
                if not found:
                    time.sleep(block_s)  # noqa: ASYNC251 - that is what it does
                found.append((group.seq, group.redelivered))
        return found

    async def train(self, queue: str) -> tuple[str, list[tuple[int, int]]]:
        import ray

        async with RayWorker(queue) as worker:
            found = [(group.seq, sum(len(t.buffer) for t in group.trajectories)) async for group in worker]
        return ray.get_runtime_context().get_node_id(), found


async def test_a_trainer_on_another_node_takes_large_groups(cluster: TwoNodes) -> None:
    import ray

    mine = ray.get_runtime_context().get_node_id()
    other = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != mine)
    there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(other, soft=False)
    trainer = ray.remote(Trainer).options(num_cpus=0, scheduling_strategy=there).remote()
    groups = [large_group(seq) for seq in range(1, 13)]
    async with asyncio.timeout(LIMIT_S), RayQueue("afar", capacity=4) as queue:
        training = trainer.train.remote("afar")
        async with asyncio.TaskGroup() as tasks:
            hearing = tasks.create_task(acked(queue, len(groups)))
            for group in groups:
                await queue.deliver(group)
        await queue.finish()
        node, found = await training
    assert hearing.result() == [group.seq for group in groups]
    assert node == other
    assert found == [(group.seq, sum(len(t.buffer) for t in group.trajectories)) for group in groups]


async def test_a_trainer_that_blocks_its_loop_keeps_its_groups(cluster: TwoNodes) -> None:
    import ray

    async with asyncio.timeout(LIMIT_S), RayQueue("busy") as queue:
        for seq in range(1, 11):
            await queue.deliver(sample_group(seq))
        await queue.flush()
        blocked = ray.remote(Trainer).options(num_cpus=0).remote().hold_up.remote("busy", 6.0)

        async def begun() -> bool:
            return (await statistics("busy")).held == 3

        await until(begun, "it to hold three groups")
        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(taken("busy"))
            await acked(queue, 10)
            await queue.finish()
        found = await blocked
    assert found[:3] == [(1, False), (2, False), (3, False)]
    assert sorted(taking.result() + [seq for seq, _ in found]) == list(range(1, 11))


async def statistics(queue: str) -> LeaseStatistics:
    import ray

    actor = await asyncio.to_thread(ray.get_actor, actor_name(queue), NAMESPACE)
    counts: LeaseStatistics = await actor.statistics.remote()
    return counts


async def test_a_worker_is_told_that_the_actor_is_at_fault(cluster: TwoNodes) -> None:
    async with asyncio.timeout(LIMIT_S), RayQueue("faulty"), RayWorker("faulty") as worker:
        with pytest.raises(RunFailed, match="the actor of the queue faulty failed: TypeError"):
            await worker.claim("many")  # type: ignore[arg-type]


async def test_a_worker_asks_again_after_it_found_no_queue(cluster: TwoNodes) -> None:
    async with asyncio.timeout(LIMIT_S), RayWorker("late", patience_s=0.1) as worker:
        for _ in range(2):
            with pytest.raises(Unavailable, match="start the run, or resume it"):
                await anext(worker)
        async with RayQueue("late") as queue:
            await queue.deliver(sample_group(1))
            assert await anext(worker) == sample_group(1)


async def test_the_object_store_keeps_no_group_that_is_done(cluster: TwoNodes) -> None:
    async with asyncio.timeout(LIMIT_S), RayQueue("tidy") as queue, asyncio.TaskGroup() as tasks:
        for seq in range(1, 6):
            await queue.deliver(large_group(seq))
        await queue.flush()
        held = list(queue._stock._held.values())
        assert all(one.group is None for one in held), "its data would be here twice"
        stored = {one.reference.hex().encode() for one in held}
        del held
        assert len(stored & references()) == 5
        tasks.create_task(taken("tidy"))
        await acked(queue, 5)

        async def gone() -> bool:
            return not stored & references()

        await until(gone, "the objects to be gone")
        await queue.finish()


def references() -> set[bytes]:
    """Objects that something in this process, or elsewhere, still refers to, of those that it made."""
    import ray

    return set(ray._private.worker.global_worker.core_worker.get_all_reference_counts())


async def test_a_full_object_store_is_waited_for(cluster: TwoNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(keeper, "PAUSE_S", 0.01)
    errors: list[Exception] = [ray.exceptions.ObjectStoreFullError(), ray.exceptions.OutOfDiskError()]
    put = ray.put

    def full(value: object) -> Any:
        if errors:
            raise errors.pop()
        return put(value)

    monkeypatch.setattr(ray, "put", full)
    async with asyncio.timeout(LIMIT_S), RayQueue("crammed") as queue:
        await queue.deliver(large_group(1))
        await queue.flush()
        assert not errors
        assert queue.statistics().lives == 1


async def test_who_waits_is_told_when_its_own_code_fails(cluster: TwoNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> bytes:
        raise TypeError("cannot pickle it")

    monkeypatch.setattr(keeper.pickle, "dumps", broken)
    async with asyncio.timeout(LIMIT_S), RayQueue("broken", capacity=1) as queue:
        await queue.deliver(sample_group(1))
        for waiting in (queue.deliver(sample_group(2)), queue.acked(), queue.flush()):
            with pytest.raises(RunFailed, match="the queue broken ended: cannot pickle it"):
                await waiting


async def test_workers_know_the_end_of_a_queue_that_is_left_at_once(cluster: TwoNodes) -> None:
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks, RayQueue("brief") as queue:
        taking = tasks.create_task(taken("brief"))
        await queue.deliver(sample_group(1))
        await acked(queue, 1)
        await queue.finish()
    assert taking.result() == [1]


def test_the_sizes_say_what_they_mean() -> None:
    def weight(group: Group) -> int:
        return sum(len(trajectory.buffer) for trajectory in group.trajectories)

    groups: Sequence[Group] = [sample_group(1), large_group(1)]
    assert [weight(group) > INLINE for group in groups] == [False, True]
