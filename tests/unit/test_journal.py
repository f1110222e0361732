"""The step journal: what was flushed comes back, damage costs what lies behind it and no more, segments go in time."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import segments
from orchestrator.errors import SchemaMismatch, StoreError
from orchestrator.journal import Journal
from orchestrator.records import EpisodeBuffer, header
from orchestrator.segments import Piece, SegmentWriter
from orchestrator.types import Decision, EpisodeKey, Observation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEAD = header("toy", "0" * 16)
FOREVER_S = 1e6
"""An interval that no test waits for: they flush."""


def key(number: int) -> EpisodeKey:
    return EpisodeKey(f"tâche_{number % 3}", number // 3, number)


def grow(buffer: EpisodeBuffer, size: int = 40) -> None:
    buffer.observe(Observation(b"o" * size))
    buffer.decide(Decision(b"a" * size))


def buffer_of(steps: int = 1, size: int = 40) -> EpisodeBuffer:
    buffer = EpisodeBuffer(HEAD)
    for _ in range(steps):
        grow(buffer, size)
    return buffer


def journal_in(folder: Path, epoch: int = 1, *, segment_bytes: int = 1 << 20) -> Journal:
    errors: list[StoreError] = []
    journal = Journal(folder, epoch, interval_s=FOREVER_S, segment_bytes=segment_bytes, on_error=errors.append)
    journal.start()
    return journal


async def files(folder: Path) -> list[int]:
    return await asyncio.to_thread(segments.numbers, folder)


async def loaded(folder: Path) -> dict[EpisodeKey, tuple[int, bytes]]:
    return await asyncio.to_thread(Journal.load, folder)


async def abandon(journal: Journal) -> None:
    """End the thread as a kill would: nothing more is written or deleted."""
    if journal._timer is not None:
        journal._timer.cancel()
    journal._thread.shutdown()
    journal._writer.close()


async def test_flushed_bytes_come_back(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    buffers = {key(number): buffer_of(number + 1) for number in range(5)}
    for _ in range(3):
        for one, buffer in buffers.items():
            grow(buffer)
            journal.touch(one, 2, buffer)
        await journal.flush()
    for buffer in buffers.values():
        grow(buffer)
    await abandon(journal)
    found = await loaded(tmp_path)
    assert {one: attempt for one, (attempt, _) in found.items()} == dict.fromkeys(buffers, 2)
    for one, buffer in buffers.items():
        data = found[one][1]
        assert data == bytes(buffer.data[: len(data)])
        assert EpisodeBuffer.restore(data).turn == buffer.turn - 1, "all but what was never touched"


class Watched(Journal):
    """Tells when an append has ended."""

    landed: asyncio.Event

    def _landed(self, flight: asyncio.Future[int]) -> None:
        super()._landed(flight)
        self.landed.set()


async def test_timer_flushes_what_was_touched(tmp_path: Path) -> None:
    errors: list[StoreError] = []
    journal = Watched(tmp_path, 1, interval_s=0.001, on_error=errors.append)
    journal.landed = asyncio.Event()
    buffer = buffer_of()
    journal.touch(key(1), 1, buffer)
    journal.start()
    for _ in range(3):
        await journal.landed.wait()
        journal.landed.clear()
        assert await loaded(tmp_path) == {key(1): (1, bytes(buffer.data))}
        grow(buffer)
        journal.touch(key(1), 1, buffer)
    await journal.landed.wait()
    assert errors == []
    await journal.close()


async def test_buffer_may_grow_while_its_bytes_are_on_the_way(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    buffer = buffer_of(size=100_000)
    journal.touch(key(1), 1, buffer)
    flushing = asyncio.create_task(journal.flush(), name="flush")
    await asyncio.sleep(0)
    grow(buffer, 100_000)
    journal.touch(key(1), 1, buffer)
    await flushing
    await journal.flush()
    await abandon(journal)
    assert (await loaded(tmp_path))[key(1)][1] == bytes(buffer.data)


async def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    buffer = buffer_of()
    journal.touch(key(1), 1, buffer)
    await journal.flush()
    before = journal.statistics().bytes
    journal.touch(key(1), 1, buffer)
    await journal.flush()
    assert journal.statistics().bytes == before
    await journal.close()


async def test_newer_attempt_supersedes(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    first, second = buffer_of(5), buffer_of(1)
    journal.touch(key(1), 1, first)
    await journal.flush()
    grow(first)
    journal.touch(key(1), 1, first)
    journal.touch(key(1), 2, second)
    grow(first)
    journal.touch(key(1), 1, first)
    await journal.flush()
    assert journal.statistics().live == 1
    grow(second)
    journal.touch(key(1), 2, second)
    await journal.flush()
    await abandon(journal)
    assert await loaded(tmp_path) == {key(1): (2, bytes(second.data))}


async def test_segments_are_deleted_when_no_live_attempt_needs_them(tmp_path: Path) -> None:
    journal = journal_in(tmp_path, segment_bytes=1)
    buffers = [buffer_of() for _ in range(3)]
    for number, buffer in enumerate(buffers):
        journal.touch(key(number), 1, buffer)
        await journal.flush()
    assert await files(tmp_path) == [1, 2, 3]
    journal.forget(key(1))
    await journal.flush()
    assert await files(tmp_path) == [1, 3]
    grow(buffers[0])
    journal.touch(key(0), 1, buffers[0])
    await journal.flush()
    assert await files(tmp_path) == [1, 3, 4]
    journal.touch(key(2), 2, buffer_of())
    await journal.flush()
    assert await files(tmp_path) == [1, 4, 5], "a newer attempt frees what the older one held"
    assert journal.statistics().segments == 3
    journal.forget(key(0))
    journal.forget(key(0))
    journal.forget(key(99))
    await journal.flush()
    assert await files(tmp_path) == [5]
    journal.forget(key(2))
    await journal.close()
    assert await files(tmp_path) == []


async def test_episode_forgotten_before_its_first_flush_leaves_nothing(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.touch(key(1), 1, buffer_of())
    journal.forget(key(1))
    await journal.flush()
    assert journal.statistics()[:3] == (0, 0, 0)
    assert await files(tmp_path) == []
    await journal.close()


async def test_close_keeps_what_can_be_resumed(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    done, open_one = buffer_of(), buffer_of()
    journal.touch(key(1), 1, done)
    journal.touch(key(2), 1, open_one)
    await journal.flush()
    journal.forget(key(1))
    grow(open_one)
    journal.touch(key(2), 1, open_one)
    await journal.close()
    await journal.close()
    assert (await loaded(tmp_path))[key(2)] == (1, bytes(open_one.data)), "close flushes first"


async def test_resumed_run_takes_over_and_clears_the_old_segments(tmp_path: Path) -> None:
    journal = journal_in(tmp_path, segment_bytes=1)
    for number in range(3):
        journal.touch(key(number), 1, buffer_of(number + 1))
        await journal.flush()
    await abandon(journal)

    journal = journal_in(tmp_path, 2)
    found = {one: (attempt, EpisodeBuffer.restore(data)) for one, (attempt, data) in (await loaded(tmp_path)).items()}
    committed = found.pop(key(0))
    await journal.adopt(found)
    assert await files(tmp_path) == [4]
    _, buffer = found[key(2)]
    grow(buffer)
    journal.touch(key(2), 1, buffer)
    await journal.flush()
    await abandon(journal)
    assert await loaded(tmp_path) == {one: (1, bytes(buffer.data)) for one, (_, buffer) in found.items()}
    assert committed[1].turn == 1


async def test_kill_between_taking_over_and_clearing_loses_nothing(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    whole = {key(number): buffer_of(3) for number in range(3)}
    for one, buffer in whole.items():
        journal.touch(one, 1, buffer)
    await journal.flush()
    await abandon(journal)
    before = await loaded(tmp_path)

    journal = journal_in(tmp_path, 2)
    restored = EpisodeBuffer.restore(before[key(1)][1])
    grow(restored)
    journal.touch(key(1), 1, restored)
    await journal.flush()
    await abandon(journal)
    assert await files(tmp_path) == [1, 2]
    assert await loaded(tmp_path) == {**before, key(1): (1, bytes(restored.data))}


async def test_new_run_adopts_nothing_and_starts_clean(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.touch(key(1), 1, buffer_of())
    await journal.flush()
    await abandon(journal)
    journal = journal_in(tmp_path)
    await journal.adopt({})
    assert await files(tmp_path) == []
    await journal.close()


def write_pieces(folder: Path, pieces: list[Piece], epoch: int = 1, number: int = 1) -> Path:
    writer = SegmentWriter(folder)
    writer.append(number, segments.encode(epoch, pieces))
    writer.close()
    return folder / segments.name(number)


def story(records: int) -> tuple[list[Piece], dict[EpisodeKey, bytes]]:
    """Pieces of three episodes, interleaved, and the whole of each."""
    chooser = random.Random(7)
    whole: dict[EpisodeKey, bytes] = {}
    pieces: list[Piece] = []
    for number in range(records):
        one = key(number % 3)
        data = chooser.randbytes(chooser.randrange(1, 60))
        pieces.append(Piece(one, 1, len(whole.get(one, b"")), data))
        whole[one] = whole.get(one, b"") + data
    return pieces, whole


def test_torn_tail_is_cut_at_any_byte(tmp_path: Path) -> None:
    pieces, whole = story(5)
    path = write_pieces(tmp_path, pieces)
    body = path.read_bytes()
    ends = [len(body) - len(segments.encode(1, pieces[number:])) for number in range(6)]
    for cut in range(len(body)):
        path.write_bytes(body[:cut])
        intact = sum(end <= cut for end in ends[1:])
        expected: dict[EpisodeKey, bytes] = {}
        for piece in pieces[:intact]:
            expected[piece.key] = expected.get(piece.key, b"") + piece.data
        assert {one: data for one, (_, data) in Journal.load(tmp_path).items()} == expected
    path.write_bytes(body)
    assert {one: data for one, (_, data) in Journal.load(tmp_path).items()} == whole


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_bit_flip_costs_what_lies_behind_it_and_no_more(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    pieces, _ = story(5)
    path = write_pieces(folder, pieces)
    body = bytearray(path.read_bytes())
    bit = data.draw(st.integers(6 * 8, len(body) * 8 - 1))
    body[bit // 8] ^= 1 << bit % 8
    path.write_bytes(body)
    intact = 0
    while len(body) - len(segments.encode(1, pieces[intact + 1 :])) <= bit // 8:
        intact += 1
    expected: dict[EpisodeKey, bytes] = {}
    for piece in pieces[:intact]:
        expected[piece.key] = expected.get(piece.key, b"") + piece.data
    assert {one: found for one, (_, found) in Journal.load(folder).items()} == expected
    shutil.rmtree(folder)


def test_nothing_behind_a_gap_is_believed(tmp_path: Path) -> None:
    pieces, whole = story(12)
    missing = pieces.pop(4)
    write_pieces(tmp_path, pieces)
    found = Journal.load(tmp_path)
    assert found[missing.key][1] == whole[missing.key][: missing.offset]
    for one in whole.keys() - {missing.key}:
        assert found[one][1] == whole[one]


def test_damaged_segment_does_not_hide_the_next_one(tmp_path: Path) -> None:
    first = write_pieces(tmp_path, [Piece(key(1), 1, 0, b"one"), Piece(key(2), 1, 0, b"two")], number=1)
    write_pieces(tmp_path, [Piece(key(2), 1, 3, b"more"), Piece(key(3), 1, 0, b"three")], number=2)
    first.write_bytes(first.read_bytes()[:-1])
    assert Journal.load(tmp_path) == {key(1): (1, b"one"), key(3): (1, b"three")}


def test_which_history_of_a_key_counts(tmp_path: Path) -> None:
    write_pieces(tmp_path, [Piece(key(1), 1, 0, b"one"), Piece(key(1), 2, 0, b"two"), Piece(key(1), 1, 3, b"late")])
    assert Journal.load(tmp_path) == {key(1): (2, b"two")}
    write_pieces(tmp_path, [Piece(key(1), 2, 0, b"two again")], epoch=2, number=2)
    assert Journal.load(tmp_path) == {key(1): (2, b"two again")}
    write_pieces(tmp_path, [Piece(key(1), 2, 9, b"!")], epoch=1, number=3)
    assert Journal.load(tmp_path) == {key(1): (2, b"two again")}, "an older epoch adds nothing to a newer one"
    write_pieces(tmp_path, [Piece(key(1), 3, 5, b"!")], epoch=2, number=4)
    assert Journal.load(tmp_path) == {key(1): (2, b"two again")}, "a newer attempt counts from its beginning"


def test_folder_without_segments_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    (tmp_path / segments.name(1)).write_bytes(b"RL")
    assert Journal.load(tmp_path) == {}
    assert Journal.load(tmp_path / "missing") == {}


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = write_pieces(tmp_path, [Piece(key(1), 1, 0, b"one")])
    body = bytearray(path.read_bytes())
    body[4] = 9
    path.write_bytes(body)
    with pytest.raises(SchemaMismatch, match="this version reads"):
        Journal.load(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


async def test_full_disk_is_told_once_and_nothing_is_lost(small_disk: Path) -> None:
    errors: list[StoreError] = []
    journal = Journal(small_disk, 1, interval_s=FOREVER_S, on_error=errors.append)
    journal.start()
    buffers = {key(number): buffer_of() for number in range(4)}
    for one, buffer in buffers.items():
        journal.touch(one, 1, buffer)
    await journal.flush()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    for _ in range(3):
        for one, buffer in buffers.items():
            grow(buffer, 5000)
            journal.touch(one, 1, buffer)
        with pytest.raises(StoreError, match=r"free some space .*`rollout resume"):
            await journal.flush()
    assert len(errors) == 1
    assert journal.statistics().failures >= 3
    ballast.unlink()
    await journal.flush()
    await abandon(journal)
    assert await loaded(small_disk) == {one: (1, bytes(buffer.data)) for one, buffer in buffers.items()}


class Life:
    """A journal, and what a model of it knows: at any moment the folder holds, of each live key, its newest attempt as
    of its last flush."""

    def __init__(self, folder: Path, segment_bytes: int) -> None:
        self.folder = folder
        self.segment_bytes = segment_bytes
        self.epoch = 1
        self.journal = journal_in(folder, segment_bytes=segment_bytes)
        self.live: dict[EpisodeKey, tuple[int, EpisodeBuffer]] = {}
        self.committed: set[EpisodeKey] = set()
        self.touched: set[EpisodeKey] = set()
        self.durable: dict[EpisodeKey, tuple[int, bytes]] = {}

    def grow(self, one: EpisodeKey, size: int) -> None:
        if one not in self.committed:
            attempt, buffer = self.live.setdefault(one, (1, EpisodeBuffer(HEAD)))
            grow(buffer, size)
            self.touch(one, attempt, buffer)

    def retry(self, one: EpisodeKey) -> None:
        if one in self.live:
            self.live[one] = (self.live[one][0] + 1, buffer_of())
            self.touch(one, *self.live[one])

    def touch(self, one: EpisodeKey, attempt: int, buffer: EpisodeBuffer) -> None:
        self.journal.touch(one, attempt, buffer)
        self.touched.add(one)

    def commit(self, one: EpisodeKey) -> None:
        self.journal.forget(one)
        self.committed.add(one)
        self.live.pop(one, None)
        self.durable.pop(one, None)
        self.touched.discard(one)

    async def flush(self) -> None:
        await self.journal.flush()
        self.durable |= {one: (self.live[one][0], bytes(self.live[one][1].data)) for one in self.touched}
        self.touched.clear()

    async def resume(self) -> None:
        await abandon(self.journal)
        found = await loaded(self.folder)
        self.epoch += 1
        self.journal = journal_in(self.folder, self.epoch, segment_bytes=self.segment_bytes)
        self.live = {one: (found[one][0], EpisodeBuffer.restore(found[one][1])) for one in self.durable}
        await self.journal.adopt(self.live)
        self.touched.clear()
        assert await loaded(self.folder) == self.durable

    async def check(self) -> None:
        found = await loaded(self.folder)
        assert {one: found.get(one) for one in self.durable} == self.durable
        assert self.needed() <= set(await files(self.folder)), "a segment was deleted that a live attempt needs"

    def needed(self) -> set[int]:
        behind = self.journal._writer._behind
        return {behind + number for track in self.journal._live.values() for number in track.segments}


@settings(max_examples=40, deadline=None)
@given(st.data())
async def test_any_run_of_events_then_a_kill(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("journal")
    life = Life(folder, data.draw(st.sampled_from([1, 300, 1 << 20])))
    try:
        for _ in range(data.draw(st.integers(1, 40))):
            one = key(data.draw(st.integers(0, 4)))
            match data.draw(st.sampled_from(["grow", "grow", "grow", "flush", "commit", "retry", "resume"])):
                case "grow":
                    life.grow(one, data.draw(st.integers(0, 30)))
                case "retry":
                    life.retry(one)
                case "commit":
                    life.commit(one)
                case "flush":
                    await life.flush()
                case _:
                    await life.resume()
            await life.check()
        await life.flush()
        assert len(await files(folder)) <= len(life.needed()) + 1, "a segment that nobody needs is left"
    finally:
        await abandon(life.journal)
        shutil.rmtree(folder)
