"""The reaper as a process: kept alive, told to go, and no run ended by what befalls it. Needs no daemon."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from runs import until

from backends.sandboxes.docker import reaping
from backends.sandboxes.docker.reaping import Reaper
from orchestrator.testing.leaks import children

if TYPE_CHECKING:
    from pathlib import Path


async def started(folder: Path) -> Reaper:
    """One that would have nothing to do."""
    return await Reaper.start(
        socket="/nowhere.sock", labels={"rollout.backend": "none"}, private=folder / "none", log=folder / "log"
    )


async def number() -> int:
    [found] = [child.pid for child in await asyncio.to_thread(children) if "docker.reaper" in child.command]
    return found


async def killed() -> int:
    """Its number, once it is dead and nobody has taken note of that yet."""
    pid = await number()
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


async def test_another_is_started_as_soon_as_one_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reaper = await started(tmp_path)
    first = await killed()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere")
        for _ in range(3):  # its pipe is closed once, and no descriptor is anybody else's by then
            with pytest.raises(FileNotFoundError):
                await asyncio.to_thread(reaper.keep)
    await asyncio.to_thread(reaper.keep)
    assert await number() != first
    assert "started another" in caplog.text
    await asyncio.to_thread(reaper.keep)
    await reaper.bye()
    assert not await asyncio.to_thread(children)


async def test_one_that_is_held_up_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reaping, "BYE_S", 0.1)
    reaper = await started(tmp_path)
    pid = await number()
    os.kill(pid, signal.SIGSTOP)
    await reaper.bye()
    assert f"process {pid}) has not ended" in caplog.text
    os.kill(pid, signal.SIGCONT)

    async def it_is_gone() -> bool:
        return not await asyncio.to_thread(children)

    await until(it_is_gone, "the reaper to be gone")


async def test_one_that_has_died_is_let_go_of_all_the_same(tmp_path: Path) -> None:
    reaper = await started(tmp_path)
    pid = await killed()
    await asyncio.to_thread(os.waitpid, pid, 0)
    reaper.let_go()
