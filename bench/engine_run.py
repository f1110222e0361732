"""Worker: one run of the orchestrator, whole, with the replay policy; what it cost.

`python -m bench.engine_run JSON`. CPU is the run's own figure (user + system of the whole process, all threads, from
first admission to last durable commit); `call_us_per_step` is the same of the whole call of `run`, measured here, so
that work moved outside of the first shows in the second; `us_per_episode` says who of its family used what. A run
whose rewards are not all 1.0 is an error: its figure would be that of other work.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final, Literal

from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.local import LocalBackend
from backends.sandboxes.ray import RayBackend, RayOptions, RayShards
from bench import census
from bench.crowd import Crowd
from bench.workers import serve
from orchestrator import Orchestrator
from orchestrator.errors import RunFailed
from policies.agents.replay import ReplayPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from bench.values import Row
    from orchestrator.events import Listener
    from orchestrator.protocols import Backend
    from orchestrator.shards import Crew, ShardJob

SAMPLE_S: Final = 0.1
STEPS: Final = 10
"""Of an episode that a crowd answers: about as many as one of BFCL's has."""
LIGHT: Final = RayOptions(cpus=0.5)
"""The machine that is measured may have fewer cores than a run has processes."""


async def measure(
    *,
    out: str,
    split: str,
    concurrency: int,
    episodes: int,
    sandboxes: int,
    seed: int,
    durability: Literal["step", "episode"],
    backend: Literal["local", "docker", "ray"] = "local",
    shards: int | None = None,
    crowd: int | None = None,
    row_bytes: int = 0,
) -> Row:
    """Run it and return its row. Ray's parts start a cluster of their own; a `crowd` of shards plays nothing, and
    answers with trajectories of `row_bytes`."""
    crew = None if shards is None else _Together(shards, options=LIGHT)
    mimes = None if crowd is None else Crowd(crowd, steps=STEPS, row_bytes=row_bytes)
    async with Orchestrator(
        backend=_backend(backend),
        shards=crew or mimes,
        policy=ReplayPolicy(),
        out=Path(out),
        concurrency=concurrency,
        sandboxes=sandboxes,
        seed=seed,
        durability=durability,
    ) as orch:
        running: list[int] = []
        sampler = asyncio.create_task(_sample(orch, running), name="sampler")
        before = await census.at_rest() if backend == "ray" else await asyncio.to_thread(census.take)
        summary = await orch.run(split=split, episodes=episodes)
        after = await asyncio.to_thread(census.take)
        sampler.cancel()
    used = after.since(before)
    begun = after.since(crew.before) if crew is not None else used
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
        "call_us_per_step": used.driver / summary.steps * 1e6,
        "us_per_episode": {name: cpu / episodes * 1e6 for name, cpu in begun._asdict().items()},
        "sandbox_us_per_step": summary.cpu_s_sandbox / summary.steps * 1e6,
        "peak_rss_mb": summary.peak_rss_mb,
        "running_median": median(running) if running else None,
        "running_max": max(running, default=None),
    }


class _Together(RayShards):
    """Shards that begin when all of them are ready, and the cluster is at rest; `before` is the census then."""

    before: census.Census

    @asynccontextmanager
    async def crew(
        self, job: ShardJob, absorb: Callable[[Mapping[str, bytes]], None], emit: Listener
    ) -> AsyncIterator[Crew]:
        """See `Shards.crew`."""
        async with super().crew(job, absorb, emit) as crew:
            await crew.gathered(everyone=True, within_s=census.REST_S)
            self.before = await census.at_rest()
            yield crew


def _backend(name: Literal["local", "docker", "ray"]) -> Backend:
    match name:
        case "local":
            return LocalBackend("bfcl")
        case "docker":
            return DockerBackend("bfcl")
        case "ray":
            return RayBackend("bfcl", options=LIGHT)


async def _sample(orch: Orchestrator, running: list[int]) -> None:
    """Note how many episodes run, as long as there are more to come."""
    while True:
        await asyncio.sleep(SAMPLE_S)
        progress = orch.progress()
        if progress.waiting:
            running.append(progress.running)


if __name__ == "__main__":
    serve(measure)
