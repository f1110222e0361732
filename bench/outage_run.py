"""Worker: one run on a daemon that is stopped or killed under it, and comes back. `python -m bench.outage_run JSON`

The daemon is a private one, in `folder` and `data`, that the caller has started. Counted is from when it answers again
until every sandbox of the run has been replaced and serves.
"""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from backends.sandboxes.docker import DockerBackend
from bench.daemon import PrivateDaemon
from bench.faults_run import CONCURRENCY, ENVIRONMENT, MAX_TURNS, SANDBOXES, STEP_S, Player, judged
from bench.workers import serve
from orchestrator import Orchestrator
from orchestrator.errors import RunFailed
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from bench.values import Row

SIGNALS: Final = (signal.SIGTERM, signal.SIGKILL)
"""In turns: with a chance to clean up, and without."""
DOWN_S: Final = 1.0
BETWEEN_S: Final = 1.0
RECOVERED_S: Final = 60.0
"""What has not recovered by then never does."""
_POLL_S: Final = 0.02


async def measure(*, out: str, folder: str, data: str, episodes: int, restarts: int, seed: int) -> Row:
    """Run it and return its row. Raises RunFailed where the run does not come back."""
    daemon = PrivateDaemon(Path(folder), Path(data))
    player = Player(episodes, restarts)
    recovered: list[float] = []
    async with (
        Orchestrator(
            backend=DockerBackend(ENVIRONMENT, url=daemon.url),
            policy=ScriptedPolicy(player.act, calls_model=True),
            out=Path(out),
            concurrency=CONCURRENCY,
            sandboxes=SANDBOXES,
            seed=seed,
            max_turns=MAX_TURNS,
            step_timeout_s=STEP_S,
        ) as orch,
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(_restart(orch, daemon, player, recovered), name="restarts")
        summary = await orch.run(episodes=episodes)
    return {
        "fault": "restart",
        "restarts": len(recovered),
        "recovery_s": recovered,
        "recovered": summary.recovered_episodes,
        "duplicates": summary.duplicates,
        "repeated_calls": len(player.decided) - len(set(player.decided)),
        "calls": len(player.decided),
        "wall_s": summary.wall_s,
        **await asyncio.to_thread(judged, Path(out), episodes),
    }


async def _restart(orch: Orchestrator, daemon: PrivateDaemon, player: Player, recovered: list[float]) -> None:
    """Restart the daemon again and again, each time when the run has come back from the last."""
    while player.happened < player.strikes:
        await _until_up(orch)
        await asyncio.sleep(BETWEEN_S)
        await asyncio.to_thread(daemon.stop, SIGNALS[player.happened % len(SIGNALS)])
        await asyncio.sleep(DOWN_S)
        await asyncio.to_thread(daemon.start)
        back = time.monotonic()
        await _until_up(orch)
        recovered.append(time.monotonic() - back)
        player.happened += 1


async def _until_up(orch: Orchestrator) -> None:
    """Until every place of the pool has a sandbox that serves."""
    ends = time.monotonic() + RECOVERED_S
    while True:
        progress = orch.progress()
        if progress.sandboxes_live == progress.sandboxes_target:
            return
        if time.monotonic() > ends:
            raise RunFailed(f"the run has not come back within {RECOVERED_S:g} s: {progress}")
        await asyncio.sleep(_POLL_S)


if __name__ == "__main__":
    serve(measure)
