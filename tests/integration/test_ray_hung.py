"""What hangs on a cluster, instead of dying: a shard that is stopped in the middle of a run."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest
from runs import until
from sharded import actors, orchestrator, repeated

from backends.sandboxes.private import sweep
from orchestrator.events import ShardEnded
from orchestrator.shards import crew as crews

if TYPE_CHECKING:
    from pathlib import Path

    from ray_cluster import TwoNodes

    from orchestrator.events import Event

pytestmark = pytest.mark.timeout(120)
EPISODES = 200


async def test_a_stopped_shard_is_replaced_and_what_it_says_late_is_not_heard(
    cluster: TwoNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crews, "SILENT_S", 4.0)
    events: list[Event] = []
    log = tmp_path / "log"
    async with orchestrator(tmp_path / "run", log, cluster.address, "shards", 0.3, listener=events.append) as run:
        running = asyncio.create_task(run.run(episodes=EPISODES, group_size=2))

        async def playing() -> bool:
            return log.exists() and log.stat().st_size > 30_000

        await until(playing, "decisions of all", 60)
        os.kill((await asyncio.to_thread(actors, "ShardHost"))[0], signal.SIGSTOP)
        summary = await running
    await asyncio.to_thread(sweep)
    assert summary.outcomes == {"completed": EPISODES}
    assert (summary.reward_one, summary.duplicates) == (EPISODES, 0)
    assert repeated(log)[1] == 0
    assert summary.attempts_lost < 32  # what it had been given at the last, and had not begun
    assert [
        event.failure.message.endswith("has said nothing for long") for event in events if isinstance(event, ShardEnded)
    ] == [True]
