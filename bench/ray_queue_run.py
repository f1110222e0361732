"""Worker: what hands trajectories to a trainer, as fast as it goes. `python -m bench.ray_queue_run JSON`

Three parts: `store` writes rows and their outbox, as the orchestrator does; `give` starts a cluster of its own and
gives groups to a Ray queue; `take` is the trainer, in a process of its own, which `give` starts.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from backends.sandboxes.ray.cluster import connection, module
from backends.trainers.ray import RayQueue, RayWorker
from bench.workers import serve, work
from orchestrator.errors import RunFailed, StoreError
from orchestrator.store import RunMeta, Store
from orchestrator.testing.queue import sample_group
from orchestrator.types import GroupRelease, RunId

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.values import Row
    from orchestrator.types import Group

QUEUE: Final = "bench"
BACKLOG: Final = 512
"""Rows handed to the store and not durable; the feed waits above it."""


async def measure(
    *, part: str, groups: int = 0, size: int = 1, row_bytes: int = 0, work: str = "", address: str = ""
) -> Row:
    """Run one part and return its row."""
    match part:
        case "store":
            return await _store(groups, size, row_bytes, Path(work))
        case "give":
            return await _give(groups, size, row_bytes)
        case _:
            return await _take(address)


def _made(groups: int, size: int, row_bytes: int) -> Iterator[Group]:
    """Groups as a run makes them: every buffer has bytes of its own."""
    for seq in range(1, groups + 1):
        group = sample_group(3 * seq + 1, size=size)
        filled = [replace(t, buffer=t.buffer + os.urandom(row_bytes), started=time.time()) for t in group.trajectories]
        yield replace(group, seq=seq, trajectories=filled)


async def _give(groups: int, size: int, row_bytes: int) -> Row:
    async with connection(None), RayQueue(QUEUE) as queue, asyncio.TaskGroup() as tasks:
        address = module().get_runtime_context().gcs_address
        taking = tasks.create_task(work("bench.ray_queue_run", part="take", address=address), name="take")
        made = list(_made(groups + 1, size, row_bytes))
        await queue.deliver(made[0])
        await queue.acked()  # the trainer is there
        began, cpu = time.perf_counter(), time.process_time()
        hearing = tasks.create_task(_heard(queue, groups), name="hear")
        for group in made[1:]:
            await queue.deliver(group)
        await hearing
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        await queue.finish()
        taken = await taking
    rows = groups * size
    given = {"groups": groups + 1, "bytes": sum(map(_bytes, made)), "redelivered": 0}
    if taken != given:
        raise RunFailed(f"the trainer was given {taken}, not {groups + 1} groups: {given}")
    return {"side": "queue", "rows": rows, "size": size, "row_bytes": row_bytes, **_figures(rows, wall, cpu)}


def _bytes(group: Group) -> int:
    return sum(len(trajectory.buffer) for trajectory in group.trajectories)


async def _heard(queue: RayQueue, groups: int) -> None:
    while groups > 0:
        groups -= len(await queue.acked())


async def _take(address: str) -> Row:
    taken = size = redelivered = 0
    async with RayWorker(QUEUE, address=address, limit=64) as worker:
        async for group in worker:
            taken += 1
            size += _bytes(group)
            redelivered += group.redelivered
    return {"groups": taken, "bytes": size, "redelivered": redelivered}


async def _store(groups: int, size: int, row_bytes: int, folder: Path) -> Row:
    made = list(_made(groups, size, row_bytes))
    store = Store.create(folder / "store", RunMeta(RunId("bench"), "toy", "0" * 16, 0, time.time(), {}))
    failures: list[StoreError] = []
    changed = asyncio.Event()
    await store.start(lambda keys, seqs: changed.set(), failures.append)
    began, cpu = time.perf_counter(), time.process_time()
    for group in made:
        for trajectory in group.trajectories:
            last = trajectory.key.sample == size - 1
            store.put(trajectory, GroupRelease(group.task, group.group, size, partial=False) if last else None)
        while store.backlog > BACKLOG and not failures:
            changed.clear()
            await changed.wait()
    await store.flush()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    await store.close()
    if failures:
        raise failures[0]
    rows = groups * size
    return {"side": "store", "rows": rows, "size": size, "row_bytes": row_bytes, **_figures(rows, wall, cpu)}


def _figures(rows: int, wall: float, cpu: float) -> Row:
    return {"rows_per_s": rows / wall, "cpu_us_per_row": cpu / rows * 1e6}


if __name__ == "__main__":
    serve(measure)
