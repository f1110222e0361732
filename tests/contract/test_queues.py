"""The conformance kit of queues, on the queues of the project, and on broken ones that it must catch."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from backends.trainers.jsonl import JsonlQueue
from backends.trainers.memory import MemoryQueue
from orchestrator.errors import ConformanceError, RunBusy, StoreError, UsageError
from orchestrator.testing.queue import QueueUnderTest, check_queue, sample_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from orchestrator.types import Group


async def take_from_memory(queue: MemoryQueue, limit: int) -> list[tuple[str, int]]:
    taken = [await queue.get() for _ in range(min(limit, queue.statistics().waiting))]
    await asyncio.sleep(0)  # a delivery that waits for the room made here gets its turn
    return [(group.task, group.group) for group in taken]


@asynccontextmanager
async def memory_queue(make: Callable[[], MemoryQueue]) -> AsyncIterator[QueueUnderTest]:
    queue = make()
    yield QueueUnderTest(queue, lambda limit: take_from_memory(queue, limit), queue._maxsize)
    await queue.close()


class Jsonl:
    """A queue's file, read by another as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read = 0

    async def take(self, limit: int) -> list[tuple[str, int]]:
        rows = await asyncio.to_thread(self.rows)
        taken = rows[self.read : self.read + limit]
        self.read += len(taken)
        return [(row["task"], row["group"]) for row in taken]

    def rows(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.path.read_bytes().splitlines()] if self.path.exists() else []

    @asynccontextmanager
    async def subject(self) -> AsyncIterator[QueueUnderTest]:
        async with JsonlQueue(self.path) as queue:
            yield QueueUnderTest(queue, self.take, None)


def fresh_files(folder: Path) -> Callable[[], AbstractAsyncContextManager[QueueUnderTest]]:
    numbers = iter(range(100))
    return lambda: Jsonl(folder / "out" / f"{next(numbers)}.jsonl").subject()


@pytest.mark.parametrize("maxsize", [1, 2, 64])
async def test_memory_queue_keeps_the_contract(maxsize: int) -> None:
    await check_queue(lambda: memory_queue(lambda: MemoryQueue(maxsize)))


async def test_jsonl_queue_keeps_the_contract(tmp_path: Path) -> None:
    await check_queue(fresh_files(tmp_path))


class Forgetful(MemoryQueue):
    async def deliver(self, group: Group) -> None:
        self._seen.clear()
        await super().deliver(group)


class Unbounded(MemoryQueue):
    async def deliver(self, group: Group) -> None:
        self._maxsize += 1
        await super().deliver(group)


class Hasty(MemoryQueue):
    """Counts a group as accepted before there is room for it."""

    async def deliver(self, group: Group) -> None:
        if (group.task, group.group) in self._seen:
            return
        self._seen.add((group.task, group.group))
        await self._changed.acquire()
        try:
            await self._changed.wait_for(lambda: len(self._groups) < self._maxsize)
            self._groups.append(group)
        finally:
            self._changed.release()


class Backwards(MemoryQueue):
    async def get(self) -> Group:
        self._groups.reverse()
        try:
            return await super().get()
        finally:
            self._groups.reverse()


class Dropping(MemoryQueue):
    async def close(self) -> None:
        self._groups.clear()


class Nameless(MemoryQueue):
    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize, name="")


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (Forgetful, "delivered twice is accepted once"),
        (Unbounded, "its deliver must wait"),
        (Hasty, "cancelled"),
        (Backwards, "in that order"),
        (Dropping, "after the queue is closed"),
        (Nameless, "has a name"),
    ],
)
async def test_kit_catches(broken: Callable[[int], MemoryQueue], promise: str) -> None:
    with pytest.raises(ConformanceError, match=promise):
        await check_queue(lambda: memory_queue(lambda: broken(2)))


async def test_memory_queue_ends_its_iteration_when_closed() -> None:
    queue = MemoryQueue(4)
    for seq in (1, 2):
        await queue.deliver(sample_group(seq))
    await queue.close()
    await queue.close()
    assert [group.seq async for group in queue] == [1, 2]
    with pytest.raises(UsageError, match="closed"):
        await queue.deliver(sample_group(3))
    await queue.deliver(sample_group(1))
    assert queue.statistics() == (0, 2, 2, 1)


async def test_memory_queue_wakes_who_waits_when_closed() -> None:
    queue = MemoryQueue(1)
    await queue.deliver(sample_group(1))
    waiting = asyncio.create_task(queue.deliver(sample_group(2)), name="waits-for-room")
    await asyncio.sleep(0)
    await queue.close()
    with pytest.raises(UsageError, match="closed"):
        await waiting
    assert [group.seq async for group in queue] == [1]


async def test_cancelled_get_takes_nothing() -> None:
    queue = MemoryQueue(1)
    getting = asyncio.create_task(queue.get(), name="waits-for-a-group")
    await asyncio.sleep(0)
    getting.cancel()
    await asyncio.wait({getting})
    assert getting.cancelled()
    await queue.deliver(sample_group(1))
    assert (await queue.get()).seq == 1


def test_a_queue_holds_at_least_one_group() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        MemoryQueue(0)


async def test_jsonl_line_is_the_group_and_its_conversations(tmp_path: Path) -> None:
    group = sample_group(3)
    async with JsonlQueue(tmp_path / "out.jsonl") as queue:
        await queue.deliver(group)
    row = orjson.loads((tmp_path / "out.jsonl").read_bytes())
    assert (row["seq"], row["task"], row["group"], row["partial"]) == (3, "task_3", 0, True)
    failed, completed = row["trajectories"]
    assert (failed["key"], failed["reward"], failed["outcome"]) == ("task_3/0/0", None, "infra_failed")
    assert (completed["key"], completed["reward"], completed["stop_reason"]) == ("task_3/0/1", 1.0, "done")
    assert completed["messages"] == [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Gone."}]
    assert completed["details"] == {}


async def test_jsonl_remembers_its_groups_and_cuts_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    async with JsonlQueue(path) as queue:
        await queue.deliver(sample_group(1))
        await queue.deliver(sample_group(2))
    whole = path.read_bytes()
    second = whole.splitlines(keepends=True)[1]
    for cut in (1, len(second) // 2, len(second) - 1):
        path.write_bytes(whole[:-cut])
        async with JsonlQueue(path) as queue:
            await queue.deliver(sample_group(1))
            await queue.deliver(sample_group(2))
            assert queue.statistics().repeated == 1
        assert path.read_bytes() == whole
    async with JsonlQueue(path) as queue:
        await queue.deliver(sample_group(1))
        await queue.deliver(sample_group(2))
        assert queue.statistics() == (2, 2, len(whole))
    assert path.read_bytes() == whole


async def test_jsonl_refuses_a_file_that_is_no_queues(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"task": "a", "group": 0}\nmy notes\nmore\n', encoding="utf-8")
    async with JsonlQueue(path) as queue:
        with pytest.raises(UsageError, match="line 2"):
            await queue.deliver(sample_group(1))
    assert path.read_text(encoding="utf-8").endswith("more\n")
    async with JsonlQueue(tmp_path) as queue:
        with pytest.raises(UsageError, match="choose another file"):
            await queue.deliver(sample_group(1))


async def test_jsonl_file_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    async with JsonlQueue(path) as first, JsonlQueue(path) as second:
        await first.deliver(sample_group(1))
        with pytest.raises(RunBusy, match="another process"):
            await second.deliver(sample_group(2))
        await first.close()
        await second.deliver(sample_group(2))
    assert len(path.read_bytes().splitlines()) == 2


async def test_jsonl_on_a_full_disk_keeps_whole_lines_and_goes_on(small_disk: Path) -> None:
    path = small_disk / "out.jsonl"
    ballast = small_disk / "ballast"
    async with JsonlQueue(path) as queue:
        await queue.deliver(sample_group(1))
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
        big = sample_group(2, size=100)
        with pytest.raises(StoreError, match="free some space"):
            await queue.deliver(big)
        assert len(path.read_bytes().splitlines(keepends=True)) == 1
        ballast.unlink()
        await queue.deliver(big)
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    assert [row["task"] for row in rows] == ["task_1", "task_2"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)
