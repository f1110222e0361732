"""Isolation `process` under random deeds, many sessions at once: every call is answered, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import TYPE_CHECKING, Any

import forked
import pytest
from forked import gone, number, told

from backends.sandboxes.local import LocalBackend
from orchestrator.errors import SandboxLost
from orchestrator.testing.harness import say, spec
from orchestrator.testing.leaks import children

if TYPE_CHECKING:
    from pathlib import Path

    from backends.sandboxes.link import LinkedSandbox

WORDS = ("add 1", "add 2", "global", "sleep 0.02", "crash", "abort", "garble", "close", "bomb 0.01", "leave 0.01")
ROUNDS = 8
AT_ONCE = 8


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forked.lay_out(tmp_path_factory.mktemp("forked"))


@pytest.fixture(autouse=True)
def _brought(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked.bring(site, monkeypatch)


class GivenUp(Exception):
    """A call was cancelled, and its session with it."""


class Storm:
    """What has happened: how many sessions ended by each deed, and which processes were left behind on purpose."""

    def __init__(self, sandbox: LinkedSandbox, zygote: int, seed: int) -> None:
        self.sandbox = sandbox
        self.zygote = zygote
        self.random = random.Random(seed)
        self.lost = self.ended = 0
        self.left: list[int] = []

    async def session(self) -> None:
        """One session and its deeds; its total is right for as long as it lives."""
        session, _ = await self.sandbox.open(spec("toy_3", step_timeout_s=1.0))
        total = 0
        try:
            self.left.append(await number(session, self.random.choice(["daemon", "children"])))
            pid = await number(session, "me")
            for _ in range(self.random.randrange(6)):
                total = await self._deed(session, pid, total)
            self.ended += 1
        except (SandboxLost, GivenUp):
            self.lost += 1
        finally:
            session.close()

    async def _deed(self, session: Any, pid: int, total: int) -> int:
        chance = self.random.random()
        if chance < 0.06:
            if pid in {child.pid for child in await asyncio.to_thread(children, self.zygote)}:
                os.kill(pid, signal.SIGKILL)
        elif chance < 0.15:
            giving_up = asyncio.create_task(session.step(say("sleep 5")), name="giving-up")
            await asyncio.sleep(self.random.random() * 0.01)
            giving_up.cancel()
            raise GivenUp
        elif chance < 0.25:
            await session.evaluate()
        elif (words := self.random.choice(WORDS)).startswith("add"):
            total += int(words[-1])
            assert await told(session, words) == f"total {total}"
        else:
            await session.step(say(words))
        return total


@pytest.mark.parametrize("seed", [1, 2])
async def test_random_deeds(seed: int) -> None:
    async with LocalBackend("forked", max_children=AT_ONCE) as backend:
        sandbox = await backend.create()
        (zygote,) = await asyncio.to_thread(children, sandbox.pid)
        storm = Storm(sandbox, zygote.pid, seed)
        for _ in range(ROUNDS):
            async with asyncio.TaskGroup() as tasks:
                for place in range(AT_ONCE):
                    tasks.create_task(storm.session(), name=f"storm-{place}")
        assert not sandbox.lost.done()
        assert storm.lost + storm.ended == ROUNDS * AT_ONCE
        assert min(storm.lost, storm.ended) > 10
        assert sandbox.statistics().sessions == 0
        await gone(*storm.left)
        async with asyncio.timeout(forked.GONE_S):
            while left := await asyncio.to_thread(children, zygote.pid):  # others' processes
                assert left
                await asyncio.sleep(0.01)
        assert await told((await sandbox.open(spec("toy_3")))[0], "global") == "1"
