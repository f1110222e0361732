"""The store when its disk is full, its file locked or damaged: nothing committed is lost, and a person is told."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import apsw
import pytest

from orchestrator.errors import StoreError
from orchestrator.store import RunMeta, Store, StoreReader, schema
from orchestrator.testing.queue import sample_group
from orchestrator.types import EpisodeKey, GroupRelease, RunId, Trajectory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

META = RunMeta(RunId("r-1"), "toy", "0123456789abcdef", 7, 1000.0, {})
ROW_BYTES = 10_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


class Told:
    """What a store reports."""

    def __init__(self) -> None:
        self.keys: list[EpisodeKey] = []
        self.errors: list[StoreError] = []
        self.failed = asyncio.Event()

    def on_commit(self, keys: Sequence[EpisodeKey], seqs: Sequence[int]) -> None:
        self.keys += keys

    def on_error(self, error: StoreError) -> None:
        self.errors.append(error)
        self.failed.set()


async def started(store: Store) -> Told:
    told = Told()
    await store.start(told.on_commit, told.on_error)
    return told


def episode(number: int) -> Trajectory:
    template = sample_group(1).trajectories[0]
    return replace(template, key=EpisodeKey("t", number, 0), buffer=number.to_bytes(4, "little") * (ROW_BYTES // 4))


def put(store: Store, numbers: range) -> None:
    for number in numbers:
        store.put(episode(number), GroupRelease("t", number, 1, partial=False))


def stored(path: Path) -> list[int]:
    """The numbers in the store, each found whole; the file is sound."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    assert connection.pragma("integrity_check") == "ok"
    connection.close()
    with StoreReader(path) as reader:
        found = list(reader.episodes())
        assert [replace(one, buffer=b"") for one in found] == [
            replace(episode(one.key.group), buffer=b"") for one in found
        ]
        assert all(one.buffer == episode(one.key.group).buffer for one in found)
        assert [group.group for group in reader.groups()] == [one.key.group for one in found]
        return [one.key.group for one in found]


async def test_full_store_keeps_what_it_has_and_takes_the_rest_later(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    store = Store.create(path, META)
    told = await started(store)
    put(store, range(10))
    await store.flush()
    connection = store._committer.connection
    room = connection.pragma("max_page_count", connection.pragma("page_count") + 4)
    put(store, range(10, 50))
    with pytest.raises(StoreError, match=r"disk .* is full: free some space, then run `rollout resume"):
        await store.flush()
    await told.failed.wait()
    assert (len(told.keys), store.backlog) == (10, 40)
    with pytest.raises(StoreError, match="full"):
        await store.finish({})
    assert len(told.errors) == 1, "one streak of failures is told once"
    connection.pragma("max_page_count", 10 * room)
    await store.finish({"all": "there"})
    assert (store.state, store.backlog) == ("finished", 0)
    await store.close()
    assert stored(path) == list(range(50))


async def test_store_that_stays_full_says_so_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    store = Store.create(path, META)
    await started(store)
    connection = store._committer.connection
    connection.pragma("max_page_count", connection.pragma("page_count") + 4)
    put(store, range(40))
    with pytest.raises(StoreError, match="40 trajectories are not stored: the disk"):
        await store.close()
    assert stored(path) == []


async def test_disk_that_fills_up_and_is_cleared(small_disk: Path) -> None:
    path = small_disk / "run.sqlite"
    store = Store.create(path, META)
    told = await started(store)
    put(store, range(20))
    await store.flush()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    put(store, range(20, 60))
    await told.failed.wait()
    assert "free some space" in str(told.errors[0])
    assert (len(told.keys), store.backlog) == (20, 40)
    ballast.unlink()
    await store.flush()
    assert store.backlog == 0
    await store.close()
    assert stored(path) == list(range(60))


async def test_file_locked_by_another_is_waited_for_then_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "BUSY_S", 0.05)
    path = tmp_path / "run.sqlite"
    store = Store.create(path, META)
    told = await started(store)
    other = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    other.execute("BEGIN IMMEDIATE")
    put(store, range(5))
    await told.failed.wait()
    assert "locked by another process" in str(told.errors[0])
    assert store.backlog == 5
    other.execute("ROLLBACK")
    other.close()
    await store.flush()
    await store.close()
    assert stored(path) == list(range(5))


async def test_close_gives_up_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "BUSY_S", 0.5)
    path = tmp_path / "run.sqlite"
    store = Store.create(path, META)
    await started(store)
    other = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    other.execute("BEGIN IMMEDIATE")
    put(store, range(5))
    with pytest.raises(StoreError, match=r"took no writes for 0\.01 s, 5 trajectories"):
        await store.close(deadline_s=0.01)
    other.execute("ROLLBACK")
    other.close()
    thread = store._writer._thread
    assert thread is not None
    await asyncio.to_thread(thread.join)
    assert stored(path) == list(range(5)), "the thread goes on to its end by itself"


async def test_damaged_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    store = Store.create(path, META)
    await started(store)
    put(store, range(200))
    await store.close()
    body = bytearray(path.read_bytes())
    body[2 * schema.PAGE_BYTES :] = bytes(len(body) - 2 * schema.PAGE_BYTES)
    path.write_bytes(body)
    with StoreReader(path) as reader, pytest.raises(StoreError, match=r"damaged .* restore it from a copy"):
        list(reader.episodes())
