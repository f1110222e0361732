"""The reaper as a process: kept alive, told to go, and no run ended by what befalls it. Needs no daemon."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from runs import until

from backends.sandboxes.docker import owners, reaping
from backends.sandboxes.docker import reaper as reaper_module
from backends.sandboxes.docker.port import EngineGone
from backends.sandboxes.docker.reaping import Reaper
from orchestrator.testing.leaks import children


async def started(folder: Path) -> Reaper:
    """One that would have nothing to do."""
    return await Reaper.start(
        url="unix:///nowhere.sock", labels={"rollout.backend": "none"}, private=folder / "none", log=folder / "log"
    )


async def killed(reaper: Reaper) -> int:
    """Its number, once it is dead and nobody has taken note of that yet."""
    os.kill(reaper._pid, signal.SIGKILL)
    await asyncio.to_thread(os.waitid, os.P_PID, reaper._pid, os.WEXITED | os.WNOWAIT)
    return reaper._pid


async def test_another_is_started_as_soon_as_one_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reaper = await started(tmp_path)
    first = await killed(reaper)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere")
        for _ in range(3):  # its pipe is closed once, and no descriptor is anybody else's by then
            with pytest.raises(FileNotFoundError):
                await asyncio.to_thread(reaper.keep)
    await asyncio.to_thread(reaper.keep)
    assert reaper._pid != first
    assert "started another" in caplog.text
    await asyncio.to_thread(reaper.keep)
    await reaper.bye()
    assert not await asyncio.to_thread(children)


async def test_one_that_is_held_up_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reaping, "BYE_S", 0.1)
    reaper = await started(tmp_path)
    pid = reaper._pid
    os.kill(pid, signal.SIGSTOP)
    await reaper.bye()
    assert f"process {pid}) has not ended" in caplog.text
    os.kill(pid, signal.SIGCONT)

    async def it_is_gone() -> bool:
        return not await asyncio.to_thread(children)

    await until(it_is_gone, "the reaper to be gone")


async def test_one_that_has_died_is_let_go_of_all_the_same(tmp_path: Path) -> None:
    reaper = await started(tmp_path)
    pid = await killed(reaper)
    await asyncio.to_thread(os.waitpid, pid, 0)
    reaper.let_go()


async def test_it_looks_again_for_what_was_being_made_when_its_owner_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until two looks, some time apart, find nothing; a daemon that cannot be asked has not been looked at."""
    private = tmp_path / "private"
    private.mkdir()
    for name in ("SETTLED_S", "RETRY_S"):
        monkeypatch.setattr(reaper_module, name, 0.0)
    looks: list[int | str] = [0, 2, 0, "gone", 0, 0]
    asked: list[object] = []

    async def look(url: str, labels: object) -> int:
        asked.append((url, labels))
        found = looks[len(asked) - 1]
        if isinstance(found, str):
            raise EngineGone(found)
        return found

    monkeypatch.setattr(owners, "remove_all", look)
    await reaper_module._reap({"url": "unix:///s", "labels": {"a": "b"}, "private": str(private)})
    assert asked == [("unix:///s", {"a": "b"})] * len(looks)
    assert not private.exists()


async def test_it_gives_up_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reaper_module, "DEADLINE_S", 0.05)
    monkeypatch.setattr(reaper_module, "RETRY_S", 0.01)
    await reaper_module._reap({"url": f"unix://{tmp_path}/none", "labels": {}, "private": str(tmp_path / "p")})
    assert "cannot be asked" in caplog.text
    assert "given up after 0.05 s: `rollout reap` tries again" in caplog.text


async def test_what_ends_its_owner_does_not_end_it(tmp_path: Path) -> None:
    """Ctrl-C of a terminal, a kill of the owner's process group, a shutdown's polite request."""
    reaper = await started(tmp_path)
    assert os.getsid(reaper._pid) == reaper._pid

    async def it_waits() -> bool:
        status = await asyncio.to_thread(Path(f"/proc/{reaper._pid}/status").read_text, encoding="ascii")
        ignored = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")), 16)
        return all(ignored >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    await until(it_waits, "the reaper to wait")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(reaper._pid, number)
    assert not await asyncio.to_thread(reaper._ended)
    await reaper.bye()
