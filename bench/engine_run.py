"""Worker: one run of the orchestrator, whole, with the replay policy; what it cost.

`python -m bench.engine_run JSON`. CPU is the run's own figure (user + system of the whole process, all threads, from
first admission to last durable commit); `call_us_per_step` is the same of the whole call of `run`, measured here, so
that work moved outside of the first shows in the second. A run whose rewards are not all 1.0 is an error: its figure
would be that of other work.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final, Literal

from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.local import LocalBackend
from bench.workers import serve
from orchestrator import Orchestrator
from orchestrator.errors import RunFailed
from policies.agents.replay import ReplayPolicy

if TYPE_CHECKING:
    from bench.values import Row

SAMPLE_S: Final = 0.1


async def measure(
    *,
    out: str,
    split: str,
    concurrency: int,
    episodes: int,
    sandboxes: int,
    seed: int,
    durability: Literal["step", "episode"],
    backend: Literal["local", "docker"] = "local",
) -> Row:
    """Run it and return its row."""
    async with Orchestrator(
        backend=LocalBackend("bfcl") if backend == "local" else DockerBackend("bfcl"),
        policy=ReplayPolicy(),
        out=Path(out),
        concurrency=concurrency,
        sandboxes=sandboxes,
        seed=seed,
        durability=durability,
    ) as orch:
        running: list[int] = []
        sampler = asyncio.create_task(_sample(orch, running), name="sampler")
        cpu = time.process_time()
        summary = await orch.run(split=split, episodes=episodes)
        cpu = time.process_time() - cpu
        sampler.cancel()
    if summary.reward_one != episodes or summary.duplicates:
        raise RunFailed(f"{summary.reward_one} of {episodes} rewards are 1.0 ({summary.failures}): no measurement")
    return {
        "split": split,
        "concurrency": concurrency,
        "durability": durability,
        "episodes": summary.episodes,
        "steps": summary.steps,
        "wall_s": summary.wall_s,
        "steps_per_s": summary.steps_per_s,
        "episodes_per_s": summary.episodes_per_s,
        "cpu_us_per_step": summary.cpu_us_per_step_orchestrator,
        "call_us_per_step": cpu / summary.steps * 1e6,
        "sandbox_us_per_step": summary.cpu_s_sandbox / summary.steps * 1e6,
        "peak_rss_mb": summary.peak_rss_mb,
        "running_median": median(running) if running else None,
        "running_max": max(running, default=None),
    }


async def _sample(orch: Orchestrator, running: list[int]) -> None:
    """Note how many episodes run, as long as there are more to come."""
    while True:
        await asyncio.sleep(SAMPLE_S)
        progress = orch.progress()
        if progress.waiting:
            running.append(progress.running)


if __name__ == "__main__":
    serve(measure)
