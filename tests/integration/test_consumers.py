"""Real processes on one run directory: a writer and its consumers, killed at random points, and nothing is lost."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import apsw
import pytest

from backends.trainers.durable import DurableQueue
from orchestrator.errors import ClaimLost, SchemaMismatch, UsageError
from orchestrator.rundir import RunDirectory
from orchestrator.store import Claims, RunMeta, Store, StoreReader
from orchestrator.testing.queue import sample_group
from orchestrator.types import GroupRelease, RunId

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from orchestrator.types import Trajectory

META = RunMeta(RunId("r-1"), "toy", "0123456789abcdef", 7, 1000.0, {})

# Writes groups for ever, two trajectories each, and says which keys it was told are durable.
WRITER = """
import asyncio, os, sys
from orchestrator.rundir import RunDirectory
from orchestrator.store import Store
from orchestrator.testing.queue import sample_group
from orchestrator.types import GroupRelease

async def main(folder):
    directory = RunDirectory(folder)
    with directory.claim():
        store = Store.load(directory.store)
        await store.raise_epoch()
        stored = await store.committed()
        def say(keys, seqs):
            os.write(1, "".join(f"{key}\\n" for key in keys).encode())
        await store.start(say, lambda error: os._exit(9))
        os.write(1, b"ready\\n")
        seq = 0
        while True:
            seq += 1
            group = sample_group(seq)
            missing = [one for one in group.trajectories if one.key not in stored]
            for one in missing:
                release = GroupRelease(group.task, 0, 2, group.partial) if one is missing[-1] else None
                store.put(one, release)
            if missing and seq % 5 == 0:
                await asyncio.sleep(0.0005)

asyncio.run(main(sys.argv[1]))
"""

# Takes groups until there are no more, and says each before it asks for the next, which acknowledges it.
CONSUMER = """
import asyncio, os, sys
from backends.trainers.durable import DurableQueue

async def main(folder, name):
    async with DurableQueue(folder, name, lease_s=1.0, limit=5) as queue:
        os.write(1, b"ready\\n")
        async for group in queue:
            os.write(1, f"{group.seq} {group.redelivered}\\n".encode())
    os.write(1, f"end {queue.statistics().acked}\\n".encode())

asyncio.run(main(*sys.argv[1:]))
"""


RUNNING: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """A test that fails leaves no process of its own behind."""
    yield
    for process in RUNNING:
        process.kill()
        process.communicate()
    RUNNING.clear()


def run(script: str, *args: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    RUNNING.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", "the process did not come up"
    return process


def kill(process: subprocess.Popen[str]) -> list[str]:
    """End a process as a power cut would, and return the whole lines that it said."""
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=20)
    RUNNING.remove(process)
    return output[: output.rfind("\n") + 1].splitlines()


async def filled(folder: Path, groups: int, *, finished: bool = True) -> RunDirectory:
    """A run directory with this many released groups."""
    directory = RunDirectory(folder)
    with directory.claim():
        store = Store.create(directory.store, META)
        await release(store, range(1, groups + 1))
        if finished:
            await store.finish({})
        await store.close()
    return directory


async def release(store: Store, seqs: range) -> None:
    for seq in seqs:
        group = sample_group(seq)
        first, last = group.trajectories
        store.put(first, None)
        store.put(last, GroupRelease(group.task, 0, 2, partial=group.partial))
    await store.flush()


@pytest.mark.chaos
async def test_writer_killed_at_random_points_loses_nothing_it_had_confirmed(tmp_path: Path) -> None:
    chooser = random.Random(20_240_601)
    directory = RunDirectory(tmp_path)
    with directory.claim():
        await Store.create(directory.store, META).close()
    confirmed: Counter[str] = Counter()
    stored: dict[str, Trajectory] = {}
    for life in range(15):
        writer = run(WRITER, tmp_path)
        assert directory.live_owner() == writer.pid
        await asyncio.to_thread(time.sleep, chooser.uniform(0.0, 0.12))
        confirmed.update(kill(writer))
        assert directory.live_owner() is None
        with StoreReader(directory.store) as reader:
            assert reader.run_epoch == life + 2
            stored = {str(one.key): one for one in reader.episodes()}
            assert confirmed.keys() <= stored.keys(), "a confirmed trajectory is gone"
            whole = {(group.task, group.group): group.seq for group in reader.groups()}
            assert sorted(whole.values()) == list(range(1, len(whole) + 1))
            assert all(len(keys) < 2 for keys in reader.open_groups().values()), "a whole group was not released"
            totals = reader.totals()
        assert totals.duplicates == 0
        assert totals.episodes == len(stored)
    check = apsw.Connection(str(directory.store))
    assert check.pragma("integrity_check") == "ok"
    check.close()
    assert len(confirmed) > 500
    assert set(confirmed.values()) == {1}
    for key, one in stored.items():
        group = sample_group(int(key.split("/", maxsplit=1)[0].removeprefix("task_")))
        assert one == group.trajectories[one.key.sample]


@pytest.mark.chaos
async def test_consumers_killed_and_restarted_lose_nothing_and_ack_everything_once(tmp_path: Path) -> None:
    chooser = random.Random(20_240_602)
    directory = RunDirectory(tmp_path)
    said: list[list[str]] = []
    with directory.claim():
        store = Store.create(directory.store, META)
        consumers = [run(CONSUMER, tmp_path, "trainer") for _ in range(2)]
        for start in range(1, 400, 40):
            await release(store, range(start, start + 40))
            await asyncio.to_thread(time.sleep, chooser.uniform(0.0, 0.2))
            victim = chooser.randrange(2)
            said.append(kill(consumers[victim]))
            consumers[victim] = run(CONSUMER, tmp_path, "trainer")
        await store.finish({})
        for consumer in consumers:
            output, _ = await asyncio.to_thread(consumer.communicate, timeout=60)
            assert consumer.returncode == 0
            RUNNING.remove(consumer)
            said.append(output.splitlines())
        totals = await store.totals()
        assert await store.unacked("trainer") == 0
        assert await store.unacked("another") == 400
        await store.close()

    seen = Counter(int(line.split()[0]) for lines in said for line in lines if not line.startswith("end"))
    first = Counter(int(line.split()[0]) for lines in said for line in lines if line.endswith("False"))
    assert seen.keys() == set(range(1, 401)), "a group was lost"
    assert all(count == 1 for count in first.values()), "a group came twice and was not marked as redelivered"
    assert totals.redelivered >= sum(seen.values()) - 400
    check = apsw.Connection(str(directory.store))
    assert check.execute("SELECT count(*), count(DISTINCT token) FROM deliveries WHERE state = 'acked'").get == (
        400,
        400,
    )
    assert check.pragma("integrity_check") == "ok"
    check.close()


async def test_iteration_acks_what_was_worked_on_and_gives_back_the_rest(tmp_path: Path) -> None:
    directory = await filled(tmp_path, 10)
    async with DurableQueue(tmp_path, limit=4) as queue:
        seen = []
        async for group in queue:
            seen.append(group.seq)
            if len(seen) == 3:
                break
        assert queue.statistics() == (2, 4, 2, 0, 0)
    assert seen == [1, 2, 3]
    async with DurableQueue(tmp_path) as queue:
        groups = [group async for group in queue]
    assert [group.seq for group in groups] == list(range(3, 11))
    assert [group.seq for group in groups if group.redelivered] == [3, 4]
    assert queue.statistics() == (0, 8, 8, 2, 0)
    with StoreReader(directory.store) as reader:
        assert reader.unacked("trainer") == 0


async def test_body_that_raises_gives_its_group_back(tmp_path: Path) -> None:
    await filled(tmp_path, 3)

    async def train() -> None:
        async with DurableQueue(tmp_path) as queue:
            async for group in queue:
                if group.seq == 2:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await train()
    async with DurableQueue(tmp_path) as queue:
        assert [(group.seq, group.redelivered) async for group in queue] == [(2, True), (3, True)]


async def test_queue_waits_for_the_run_and_follows_it_to_its_end(tmp_path: Path) -> None:
    seen: asyncio.Queue[int] = asyncio.Queue()

    async def consume() -> None:
        async with DurableQueue(tmp_path / "run", limit=3) as queue:
            async for group in queue:
                seen.put_nowait(group.seq)

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        consuming = tasks.create_task(consume(), name="consume")
        await asyncio.sleep(0.02)
        directory = RunDirectory(tmp_path / "run")
        with directory.claim():
            store = Store.create(directory.store, META)
            for seq in range(1, 6):
                await release(store, range(seq, seq + 1))
                assert await seen.get() == seq
            assert not consuming.done()
            await store.finish({})
            await store.close()
    assert seen.empty()


async def test_lease_outlives_a_consumer_that_blocks_its_loop(tmp_path: Path) -> None:
    await filled(tmp_path, 2)
    async with DurableQueue(tmp_path, lease_s=0.3, limit=2) as queue:
        async for group in queue:
            if group.seq == 1:
                with Claims(RunDirectory(tmp_path).store, "trainer") as other:
                    block(0.9)
                    assert other.claim(5, 60) == [], "a lease ended while its worker lived"
    assert queue.statistics() == (0, 2, 2, 0, 0)


def block(seconds: float) -> None:
    time.sleep(seconds)


async def test_group_that_went_to_another_is_counted_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = await filled(tmp_path, 2)
    async with DurableQueue(tmp_path, limit=1) as queue:
        assert (await anext(queue)).seq == 1
        with Claims(directory.store, "trainer") as other:
            other.reclaim()
            (taken,) = other.claim(1, 60)
            assert (await anext(queue)).seq == 2
            assert queue.statistics().lost == 1
            assert "no longer this worker's" in caplog.text
            other.ack(taken)
        with pytest.raises(StopAsyncIteration):
            await anext(queue)


async def test_explicit_claims(tmp_path: Path) -> None:
    await filled(tmp_path, 4)
    async with DurableQueue(tmp_path) as queue:
        one, two, three = await queue.claim(3)
        await queue.ack(one)
        await queue.ack(one)
        await queue.nack(two)
        await queue.extend(three, 1000)
        with pytest.raises(ClaimLost):
            await queue.ack(two)
        with pytest.raises(ClaimLost):
            await queue.nack(one)
        with pytest.raises(ClaimLost):
            await queue.extend(two)
        again, four = await queue.claim()
        assert (again.group.seq, again.group.redelivered, four.group.seq) == (2, True, 4)
        assert await queue.claim() == []
        for claim in (again, three, four):
            assert not await queue.drained()
            await queue.ack(claim)
        assert await queue.drained()


async def test_cancelled_claim_is_given_back(tmp_path: Path) -> None:
    await filled(tmp_path, 3)
    async with DurableQueue(tmp_path) as queue:
        for turns in range(4):
            claiming = asyncio.create_task(queue.claim(), name="claim")
            for _ in range(turns):
                await asyncio.sleep(0)
            claiming.cancel()
            await asyncio.wait({claiming})
            assert claiming.cancelled()
        assert [claim.group.seq for claim in await queue.claim()] == [1, 2, 3]
        assert queue.statistics().held == 3


async def test_bad_use_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="enter the queue first"):
        await DurableQueue(tmp_path).claim()
    for arguments in ({"consumer": ""}, {"lease_s": 0}, {"limit": 0}):
        with pytest.raises(UsageError, match="consumer's name"):
            DurableQueue(tmp_path, **arguments)
    directory = await filled(tmp_path, 1)
    async with DurableQueue(tmp_path, "a") as queue, DurableQueue(tmp_path, "b") as other:
        (claim,) = await queue.claim()
        with pytest.raises(UsageError, match="claimed nothing"):
            await other.ack(claim)
    connection = apsw.Connection(str(directory.store))
    connection.pragma("user_version", 99)
    connection.close()
    async with DurableQueue(tmp_path) as queue:
        with pytest.raises(SchemaMismatch):
            await queue.claim()
