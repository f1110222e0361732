"""A run of the toy environment whose groups go to a Ray queue: `queue_driver.py OUT ADDRESS QUEUE EPISODES INLINE`.

Groups longer than INLINE bytes go through the object store. Goes on with the run where there is one.
`python queue_driver.py worker ADDRESS QUEUE LOG` takes groups instead: it writes each of them down and never asks for a
second.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runs import QUICK, counting

from backends.sandboxes.local import LocalBackend
from backends.trainers.ray import RayQueue, RayWorker, keeper
from orchestrator import Orchestrator
from orchestrator.rundir import RunDirectory
from orchestrator.store import holds_run
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView
    from orchestrator.summary import Summary

THINK_S = 0.02


async def think(view: ConversationView, ctx: EpisodeContext) -> str:
    await asyncio.sleep(THINK_S)
    return counting(view, ctx)


async def drive(out: Path, queue: RayQueue, episodes: int) -> Summary:
    """A run, or the rest of one."""
    async with (
        queue,
        Orchestrator(
            backend=LocalBackend("toy"),
            policy=ScriptedPolicy(think),
            out=out,
            concurrency=4,
            sandboxes=1,
            retry=QUICK,
            queue=queue,
            resume=holds_run(RunDirectory(out).store),
        ) as orch,
    ):
        return await orch.run(episodes=episodes)


async def hold_one(address: str, queue: str, log: Path) -> None:
    async with RayWorker(queue, address=address, lease_s=3.0, limit=5) as groups:
        async for group in groups:
            await asyncio.to_thread(log.write_text, f"{group.seq}\n", encoding="utf-8")
            await asyncio.sleep(3600)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        address, name, log = sys.argv[2:]
        asyncio.run(hold_one(address, name, Path(log)))
    else:
        out, address, name, episodes, inline = sys.argv[1:]
        keeper.INLINE = int(inline)  # type: ignore[misc]
        asyncio.run(drive(Path(out), RayQueue(name, address=address), int(episodes)))
