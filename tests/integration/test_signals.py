"""Signals to a process that uses the API, and a disk that fills up: what is stored stays, and a resume goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from runs import Counted, counting, play, read, until

from orchestrator import Run
from orchestrator.errors import StoreError, UsageError
from orchestrator.testing.leaks import labelled, servers

if TYPE_CHECKING:
    from collections.abc import Iterator

LIFE = Path(__file__).with_name("life.py")


def label(out: Path) -> str | None:
    try:
        with Run.open(out) as run:
            return run.meta.run
    except (UsageError, StoreError):
        return None


async def started(out: Path, log: Path, *arguments: str) -> tuple[asyncio.subprocess.Process, str]:
    """A life that has made its first decisions, and its label."""
    output = await asyncio.to_thread(log.with_suffix(".out").open, "wb")
    with output:
        life = await asyncio.create_subprocess_exec(sys.executable, LIFE, out, log, *arguments, stderr=output)

    async def decided() -> bool:
        assert life.returncode is None, "it ended by itself"
        return await asyncio.to_thread(log.exists) and (await asyncio.to_thread(log.stat)).st_size > 2000

    await until(decided, "the first decisions")
    run = await asyncio.to_thread(label, out)
    assert run is not None
    return life, run


async def gone(run: str) -> bool:
    return not await asyncio.to_thread(labelled, run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_script_that_is_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    """The API installs no handlers: Python's own end comes, and its sandboxes go with it."""
    out, log = tmp_path / "run", tmp_path / "decisions"
    life, run = await started(out, log, "--think", "0.1", "--episodes", "400")
    life.send_signal(number)
    async with asyncio.timeout(10):
        code = await life.wait()
    assert code == {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: -signal.SIGTERM}[number]
    await until(lambda: gone(run), "the servers to end", within_s=3.0)
    stored = len(await read(out))
    assert stored < 400
    resumed = await play(out, Counted(counting), resume=True)
    assert (resumed.summary.episodes, resumed.summary.duplicates) == (400, 0)


async def test_an_orchestrator_that_is_stopped_and_goes_on(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "decisions"
    life, run = await started(out, log, "--think", "0.05", "--episodes", "300", "--step-timeout", "0.4")
    alive = {server.pid for server in await asyncio.to_thread(servers, life.pid)}
    life.send_signal(signal.SIGSTOP)
    await asyncio.sleep(1.5)
    life.send_signal(signal.SIGCONT)
    async with asyncio.timeout(60):
        assert await life.wait() == 0
    assert len(alive) == 2
    stored = await read(out)
    assert len(stored) == 300
    assert not any(one.recovered for one in stored.values()), "no sandbox is blamed for its orchestrator's sleep"
    assert await gone(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = mount("-t", "tmpfs", "-o", "size=3m", "none", str(disk))
    if mounted.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


async def test_a_disk_that_fills_up(small_disk: Path) -> None:
    """The run stops with what to do; nothing that was stored is lost; with room again, it goes on."""
    out, policy = small_disk / "run", Counted(lambda view, ctx: "big 30000" if view.turn < 3 else "stop")
    with pytest.raises(StoreError, match=r"full|space") as caught:
        await play(out, policy, episodes=400, concurrency=16)
    assert "rollout resume" in str(caught.value)
    before = await read(out)
    assert 0 < len(before) < 400
    grown = await asyncio.to_thread(mount, "-o", "remount,size=200m", str(small_disk))
    assert grown.returncode == 0
    resumed = await play(out, policy, resume=True, concurrency=16)
    assert (resumed.summary.episodes, resumed.summary.duplicates) == (400, 0)
    assert all(resumed.episodes[key] == one for key, one in before.items())
