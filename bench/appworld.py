"""AppWorld: what a world weighs, how soon one opens, and what starting the process costs that worlds are forked from.

- `mib_per_world`: the heaviest of `worlds` sessions, all alive at once, each after its task's known solution; PSS of
  /proc/PID/smaps_rollup, so that what they share counts in parts. `mib_per_world_p50`: the one in the middle.
- `create_p50_ms`, `create_max_ms`: opening them, one after the other, from a process that has served before.
- `start_s`: from nothing to the first open world; `start_cpu_s`: CPU of the server and its processes until then.
- `reward_one`: worlds whose known solution earned 1.0.

It needs AppWorld's data (`rollout env data appworld`), plays tasks of the split `train`, the same again where there are
fewer, and runs their published solutions on this machine. To falsify it: `rounds` holds every world.
"""

from __future__ import annotations

import asyncio
import time
from statistics import median
from typing import TYPE_CHECKING, Final

from backends.environments.catalog import find
from backends.environments.install import install
from backends.sandboxes.local import LocalBackend
from backends.sandboxes.process import cpu_below, cpu_of
from bench.processes import children, need_linux, pss_kib
from bench.values import Report
from orchestrator.errors import RunFailed, SandboxError, Unavailable
from orchestrator.types import EpisodeSpec, RunId

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.values import Row, Say, Sizes
    from orchestrator.protocols import Sandbox, Session

SPLIT: Final = "train"
WORLDS: Final = 16
STEP_S: Final = 60.0


async def appworld(sizes: Sizes, work: Path, say: Say) -> Report:
    """Measure it. Raises Unavailable without Linux or AppWorld's data, RunFailed where a world cannot be played."""
    need_linux("appworld")
    spec = find("appworld")
    if await asyncio.to_thread(lambda: spec.data_folder) is None:
        raise Unavailable("AppWorld's data is not registered: see `rollout env data appworld`")
    await install(spec, progress=say)
    worlds = sizes.episodes or WORLDS
    say(f"opening {worlds} worlds of {SPLIT}, all alive at once")
    backend = LocalBackend("appworld", unsafe=True)  # the data's own solutions, no agent's code
    backend.configure(run=RunId("bench-appworld"), with_solutions=True, logs=str(work), call_limit_s=STEP_S)
    try:
        async with backend:
            rows, starting = await _measured(backend, worlds, sizes.seed)
    except SandboxError as error:
        raise RunFailed(f"a world could not be played: {error}") from error
    weights, openings = [row["mib"] for row in rows], [row["create_ms"] for row in rows]
    result = {
        "worlds": worlds,
        "mib_per_world": max(weights),
        "mib_per_world_p50": median(weights),
        "create_p50_ms": median(openings),
        "create_max_ms": max(openings),
        **starting,
        "reward_one": sum(row["reward"] == 1.0 for row in rows),
    }
    say(
        f"{result['mib_per_world']:.0f} MiB a world at most, {result['create_p50_ms']:.0f} ms to open one, "
        f"{result['reward_one']} of {worlds} at 1.0"
    )
    return Report(result, rows, {"split": SPLIT, "worlds": worlds})


async def _measured(backend: LocalBackend, worlds: int, seed: int) -> tuple[list[Row], Row]:
    began = time.perf_counter()
    sandbox = await backend.create()
    tasks = (await sandbox.tasks(SPLIT)).ids
    first, _ = await _opened(sandbox, tasks[0], seed)
    pid = sandbox.statistics().pid
    used = await asyncio.to_thread(lambda: cpu_of(pid) + cpu_below(pid))
    starting = {"start_s": time.perf_counter() - began, "start_cpu_s": used}
    first.close()
    sessions: list[Session] = []
    rows: list[Row] = []
    for number in range(worlds):
        task = tasks[number % len(tasks)]
        session, seconds = await _opened(sandbox, task, seed)
        sessions.append(session)
        rows.append({"task": task, "create_ms": seconds * 1e3})
    for row, session in zip(rows, sessions, strict=True):
        for action in await sandbox.solution(row["task"]):
            await session.step(action)
    weights = await asyncio.to_thread(_weights, pid, worlds)
    for row, session, mib in zip(rows, sessions, weights, strict=True):
        row |= {"mib": mib, "reward": (await session.evaluate()).reward}
        session.close()
    return rows, starting


async def _opened(sandbox: Sandbox, task: str, seed: int) -> tuple[Session, float]:
    began = time.perf_counter()
    session, _ = await sandbox.open(EpisodeSpec(task, seed, STEP_S))
    return session, time.perf_counter() - began


def _weights(server: int, worlds: int) -> Sequence[float]:
    """MiB of each session's process, in the order in which they were forked."""
    [zygote] = children(server)
    living = children(zygote)
    if len(living) != worlds:
        raise RunFailed(f"{worlds} worlds were to be alive, there are {len(living)} processes")
    return [pss_kib(pid) / 1024 for pid in living]
