"""Which journals a shard takes over: those of the dead, never those of the living."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING

from backends.sandboxes.ray.shard import _remove, take
from orchestrator.journal import Journal
from orchestrator.records import EpisodeBuffer, header
from orchestrator.types import Decision, EpisodeKey, Observation

if TYPE_CHECKING:
    from pathlib import Path

HEAD = header("toy", "0" * 16)
KEY = EpisodeKey("toy_0", 0, 0)


def write(folder: Path, attempt: int, turns: int) -> None:
    """What a shard that was killed leaves."""
    asyncio.run(_write(folder, attempt, turns))


async def _write(folder: Path, attempt: int, turns: int) -> None:
    journal = Journal(folder, 1, interval_s=0.0, on_error=lambda error: None)
    journal.start()
    buffer = EpisodeBuffer(HEAD)
    buffer.observe(Observation(b'{"messages":[]}'))
    for _ in range(turns):
        buffer.decide(Decision(b"{}"))
        buffer.observe(Observation(b'{"messages":[]}'))
    journal.touch(KEY, attempt, buffer)
    await journal.close()


def turns(held: dict[EpisodeKey, tuple[int, bytes]]) -> tuple[int, int]:
    attempt, data = held[KEY]
    return attempt, EpisodeBuffer.restore(data).turn


def test_a_successor_takes_its_place_and_what_it_had(tmp_path: Path) -> None:
    with ExitStack() as locks:
        folder, others, held = take(tmp_path / "run", 0, locks)
        assert (folder, others, held) == (tmp_path / "run" / "0", [], {})
        write(folder, 0, 3)
    with ExitStack() as locks:
        folder, others, held = take(tmp_path / "run", 0, locks)
        assert (folder, others, turns(held)) == (tmp_path / "run" / "0", [], (0, 3))


def test_the_living_keep_theirs_and_the_furthest_of_the_dead_counts(tmp_path: Path) -> None:
    with ExitStack() as living:
        mine, _, _ = take(tmp_path, 0, living)
        write(mine, 5, 9)
        with ExitStack() as dead:
            one, _, _ = take(tmp_path, 1, dead)
            write(one, 0, 4)
            two, _, _ = take(tmp_path, 2, dead)
            write(two, 1, 2)
        with ExitStack() as locks:
            folder, others, held = take(tmp_path, 0, locks)  # whoever hangs in place 0 still has its folder
            assert folder.name.startswith("0-")
            assert others == [one, two]
            assert turns(held) == (1, 2)
            _remove(others)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0", folder.name]


def test_nothing_is_left_of_a_complete_run(tmp_path: Path) -> None:
    with ExitStack() as locks:
        folder, _, _ = take(tmp_path / "run", 0, locks)
        write(folder, 0, 1)
        _remove([folder])
    assert not (tmp_path / "run").exists()
