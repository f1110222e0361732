"""Worker: what containers cost. `python -m bench.container_run JSON`

Cold starts of the backend and of the bare loop, in turns; many starts at once; what an idle container weighs; and
leases from a pool that keeps one container an episode, asked for at a steady pace.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from pathlib import Path
from secrets import token_hex
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Final

from backends.sandboxes.docker import DockerBackend
from bench.bare_container import BareStarter
from bench.workers import serve
from orchestrator.errors import RunFailed
from orchestrator.pool import Pool
from orchestrator.types import EpisodeSpec, RunId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bench.values import Row

ENVIRONMENT: Final = "bfcl"
TASK: Final = "multi_turn_base_0"
ACTION: Final = b'{"role":"assistant","content":"Let me see."}'
WARMING: Final = 8
"""Leases from which the pool learns the pace; they are not counted."""
PACE: Final = 0.5
"""Leases a second, as a part of the starts a second that this machine can do."""
HOLD_S: Final = 1.0


async def measure(*, work: str, starts: int, leases: int, seed: int) -> Row:
    """Run it and return its row."""
    cold = await _cold(Path(work), starts)
    async with _entered(per_episode=False) as backend:
        many = await _many(backend, 2 * starts)
    pace = PACE * many["starts_per_s"]
    async with _entered(per_episode=True) as backend:
        waits = await _leases(backend, leases, pace)
    warm = [seconds for seconds, ready in waits if ready]
    return {
        **cold,
        **many,
        "leases_s": [seconds for seconds, _ in waits],
        "warm_leases_s": warm,
        "pace_per_s": pace,
        "lease_p99_s": _p99(warm if len(warm) > 1 else [seconds for seconds, _ in waits]),
        "warm_share": len(warm) / len(waits),
        "seed": seed,
    }


@asynccontextmanager
async def _entered(*, per_episode: bool) -> AsyncIterator[DockerBackend]:
    backend = DockerBackend(ENVIRONMENT, per_episode=per_episode)
    backend.configure(run=RunId("bench"), with_solutions=False, logs=None, call_limit_s=60.0)
    async with backend:
        yield backend


async def _cold(work: Path, starts: int) -> dict[str, Any]:
    """From nothing to the first step's answer, by the backend and bare, in turns."""
    ours: list[float] = []
    bare: list[float] = []
    folder = work / "s"
    await asyncio.to_thread(folder.mkdir, mode=0o711)
    async with _entered(per_episode=False) as backend:
        engine, blueprint = backend.engine, backend.blueprint
        async with BareStarter(engine, blueprint, folder, TASK, ACTION) as starter:
            for _ in range(starts + 1):  # the first of each only warms the page cache
                bare.append(await starter.start(f"rollout-bench-{token_hex(4)}"))
                ours.append(await _one(backend))
    return {"cold_s": ours[1:], "bare_s": bare[1:], "cold_start_ratio": median(ours[1:]) / median(bare[1:])}


async def _one(backend: DockerBackend) -> float:
    began = time.perf_counter()
    sandbox = await backend.create()
    session, _ = await sandbox.open(EpisodeSpec(TASK, 0, 30.0))
    await session.step(ACTION)
    seconds = time.perf_counter() - began
    await backend.destroy(sandbox.id)
    return seconds


async def _many(backend: DockerBackend, count: int) -> dict[str, Any]:
    """Many starts at once, and what each weighs when it has answered."""
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        creating = [tasks.create_task(backend.create(), name=f"create-{n}") for n in range(count)]
    seconds = time.perf_counter() - began
    for task in creating:
        session, _ = await task.result().open(EpisodeSpec(TASK, 0, 30.0))
        await session.step(ACTION)
        session.close()
    memory = (await asyncio.to_thread(backend.statistics)).memory_bytes
    if not memory:
        raise RunFailed("the containers' control groups cannot be read from here: nothing is known of their memory")
    return {"starts_per_s": count / seconds, "mib_per_container": memory / count / 2**20, "starts": count}


async def _leases(backend: DockerBackend, count: int, pace: float) -> list[tuple[float, bool]]:
    """How long each lease takes, and whether a sandbox was ready when it was asked for: at a steady pace, each held for
    a second."""
    waits: list[tuple[float, bool]] = []
    async with Pool(backend, 8, lambda event: None) as pool:
        (await pool.lease(opens=False)).release()
        async with asyncio.TaskGroup() as tasks:
            for number in range(WARMING + count):
                tasks.create_task(_lease(pool, waits), name=f"lease-{number}")
                await asyncio.sleep(1 / pace)
    return waits[WARMING:]


async def _lease(pool: Pool, waits: list[tuple[float, bool]]) -> None:
    ready, began = pool.ready > 0, time.perf_counter()
    lease = await pool.lease()
    waits.append((time.perf_counter() - began, ready))
    session, _ = await lease.sandbox.open(EpisodeSpec(TASK, 0, 30.0))
    await asyncio.sleep(HOLD_S)
    session.close()
    lease.release()


def _p99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98]


if __name__ == "__main__":
    serve(measure)
