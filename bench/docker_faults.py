"""What faults of containers, of their daemon and of their orchestrator cost a run on Docker.

For each kind of fault one run is struck again and again (`bench.faults_run`); one run has its daemon restarted under it
(`bench.outage_run`); and orchestrators are killed with SIGKILL, never to be restarted, beside a run of another owner
(`bench.owners_killed`).

- `episodes_right` of `episodes`: played to their end in their first attempt, with the reward that they earned.
- `detection_max_s`: for each fault that ends a container, from the fault to the moment that the run knew, less the
  deadline where only a deadline can tell (a paused or hanging one). `untrue_causes`: losses called something else.
- `repeated_calls`: decisions asked of the policy twice. `infra_rewards`: failures of the infrastructure with a reward.
- `left_after_30s`: containers, networks, processes and files of killed orchestrators. `other_owner_hurt`: containers
  that the other run lost, or its bad end.
- `restart_recovery_s`: from when a restarted daemon answers until every sandbox serves again; the longest.

To falsify it: strikes go through the docker command and the kernel; a fault that is not noticed counts as 15 s; every
latency, cause and leftover is in the rounds.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from backends.sandboxes.docker.port import Engine
from bench.daemon import PrivateDaemon
from bench.owners_killed import kill_owners
from bench.strikes import FAULTS
from bench.values import Report
from bench.workers import work as worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.values import Row, Say, Sizes

EPISODES: Final = 500
STRIKES: Final = 50
"""Of each fault."""
OWNERS_SHARE: Final = 0.4
"""Orchestrators killed, as a part of the strikes of each fault."""
RESTARTS_SHARE: Final = 0.1


async def docker_faults(sizes: Sizes, work: Path, say: Say) -> Report:
    """Strike and judge. Raises Unavailable without a daemon, RunFailed where a run does not come to its end."""
    episodes = EPISODES if sizes.episodes is None else sizes.episodes
    strikes = STRIKES if sizes.kills is None else sizes.kills
    async with await Engine.connect():
        pass
    rows = [await _struck(fault, episodes, strikes, work, sizes.seed, say) for fault in FAULTS]
    restarts = max(1, round(strikes * RESTARTS_SHARE))
    outage = await _outage(episodes, restarts, work, sizes.seed, say)
    kills = max(1, round(strikes * OWNERS_SHARE))
    with tempfile.TemporaryDirectory(prefix="rollout-bench-") as temporary:  # a socket's path must be short
        owners = await kill_owners(Path(temporary), kills, random.Random(f"{sizes.seed} owners"), say)
    result = {**_figures(rows, outage), **_owners(owners), "strikes": {row["fault"]: row["strikes"] for row in rows}}
    settings = {"episodes": episodes, "strikes": strikes, "restarts": restarts, "owners": kills}
    return Report(result, [*rows, outage, owners], settings)


async def _struck(fault: str, episodes: int, strikes: int, work: Path, seed: int, say: Say) -> Row:
    out = work / "run"
    arguments: dict[str, Any] = {"out": str(out), "fault": fault, "episodes": episodes, "strikes": strikes}
    row = await worker("bench.faults_run", seed=seed, **arguments)
    await asyncio.to_thread(shutil.rmtree, out)
    late = f", noticed within {_late(row):.2f} s of its deadline" if row["noticed_s"] else ""
    say(f"{fault}: {row['strikes']} strikes, {row['right']} of {episodes} right{late}")
    return row


async def _outage(episodes: int, restarts: int, work: Path, seed: int, say: Say) -> Row:
    """The run on a private daemon, whose data lies on the disk of the results: /tmp may be memory."""
    out, data = work / "run", work / "docker"
    with tempfile.TemporaryDirectory(prefix="rollout-bench-") as folder:
        daemon = PrivateDaemon(Path(folder), data)
        try:
            await asyncio.to_thread(daemon.start)
            await asyncio.to_thread(daemon.copy_image, "toy")
            arguments: dict[str, Any] = {"out": str(out), "folder": folder, "data": str(data), "episodes": episodes}
            row = await worker("bench.outage_run", seed=seed, restarts=restarts, **arguments)
        finally:
            await asyncio.to_thread(daemon.end)
    await asyncio.to_thread(shutil.rmtree, out)
    say(f"restart: {row['restarts']}, {row['right']} of {episodes} right, back after {max(row['recovery_s']):.1f} s")
    return row


def _late(row: Row) -> float:
    return float(max(row["noticed_s"]) - row["deadline_s"])


def _figures(rows: Sequence[Row], outage: Row) -> dict[str, Any]:
    every = [*rows, outage]
    return {
        "episodes": sum(row["episodes"] for row in every),
        "episodes_right": sum(row["right"] for row in every),
        "detection_max_s": {row["fault"]: round(_late(row), 3) for row in rows if row["noticed_s"]},
        "untrue_causes": sum(len(row["untrue"]) for row in rows),
        "infra_rewards": sum(row["infra_rewards"] for row in every),
        "duplicates": sum(row["duplicates"] for row in every),
        "repeated_calls": sum(row["repeated_calls"] for row in every),
        "calls": sum(row["calls"] for row in every),
        "recovered": sum(row["recovered"] for row in every),
        "restart_recovery_s": max(outage["recovery_s"]),
    }


def _owners(row: Row) -> dict[str, Any]:
    return {
        "owners_killed": row["kills"],
        "left_after_30s": row["left"],
        "gone_max_s": row["gone_max_s"],
        "other_owner_hurt": row["other_owner_hurt"],
    }
