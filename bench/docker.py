"""What containers cost beside processes: throughput and CPU a step, cold and warm starts, memory.

- `steps_ratio`, `cpu_ratio`: a whole run of BFCL on containers divided by the same on the local backend, in steps
  a second and in the orchestrator's CPU a step. Medians of the rounds' own ratios; the two take turns.
- `cold_start_ratio`: seconds from nothing to the first step's answer, by the backend, divided by those of a bare
  create, start and first answer of the same image with the same settings; medians, in turns.
- `starts_per_s`: containers started at once, until all have dialled in. `mib_per_container`: what the control group of
  an idle one counts, when it has answered.
- `warm_lease_p99_ms`: the wait for a lease, where each takes a fresh container, at half the pace that the machine can
  start them, and one is ready; `warm_share`: how many of the leases found one ready.

To falsify it: the two sides of a round must have made the same steps and earned every reward; every wait is in the
rounds.
"""

from __future__ import annotations

import shutil
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from backends.sandboxes.docker.port import Engine
from bench.values import Report
from bench.workers import work as worker
from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.values import Row, Say, Sizes

SPLIT: Final = "multi_turn_base"
CONCURRENCY: Final = 500
SANDBOXES: Final = 2
EPISODES: Final = 3000
ROUNDS: Final = 7
STARTS: Final = 12
LEASES: Final = 40
FULL: Final = 1000
"""Fewer episodes than this ask for a quick look: one round, few starts."""


async def docker(sizes: Sizes, work: Path, say: Say) -> Report:
    """Measure it. Raises Unavailable without a daemon, RunFailed where a measurement is none."""
    async with await Engine.connect():
        pass
    episodes = sizes.episodes or EPISODES
    quick = episodes < FULL
    rounds: list[Row] = []
    for number in range(1 if quick else ROUNDS):
        rounds += await _pair(number, episodes, work, sizes.seed, say)
    starts, leases = (3, 5) if quick else (STARTS, LEASES)
    say(f"{starts} cold starts, {2 * starts} at once, {leases} leases")
    row = await worker("bench.container_run", work=str(work), starts=starts, leases=leases, seed=sizes.seed)
    result = {**_ratios(rounds), **_figures(row)}
    say(
        f"cold {result['cold_start_s']:.2f} s ({result['cold_start_ratio']:.2f} of bare), "
        f"{result['starts_per_s']:.1f} starts/s, {result['mib_per_container']:.0f} MiB, "
        f"warm lease p99 {result['warm_lease_p99_ms']:.2f} ms"
    )
    settings = {"split": SPLIT, "concurrency": CONCURRENCY, "sandboxes": SANDBOXES, "episodes": episodes}
    return Report(result, [*rounds, {"side": "containers", **row}], settings)


async def _pair(number: int, episodes: int, work: Path, seed: int, say: Say) -> list[Row]:
    """One round: both sides, the order turned around every time."""
    rows: list[Row] = []
    for side in ("local", "docker") if number % 2 else ("docker", "local"):
        out = work / "run"
        common: dict[str, Any] = {"split": SPLIT, "concurrency": CONCURRENCY, "sandboxes": SANDBOXES, "seed": seed}
        row = await worker(
            "bench.engine_run", out=str(out), backend=side, episodes=episodes, durability="episode", **common
        )
        shutil.rmtree(out)
        rows.append({"side": side, "round": number, **row})
    if len({(row["episodes"], row["steps"]) for row in rows}) != 1:
        raise RunFailed(f"the two sides did different work: {rows}")
    words = [f"{row['side']} {row['steps_per_s']:,.0f} steps/s, {row['cpu_us_per_step']:.1f} us" for row in rows]
    say(f"round {number + 1}: {'; '.join(sorted(words))}")
    return rows


def _ratios(rounds: Sequence[Row]) -> dict[str, Any]:
    sides = {side: [row for row in rounds if row["side"] == side] for side in ("docker", "local")}

    def ratio(name: str) -> float:
        pairs = zip(sides["docker"], sides["local"], strict=True)
        return median(float(docker[name] / local[name]) for docker, local in pairs)

    return {
        "steps_ratio": ratio("steps_per_s"),
        "cpu_ratio": ratio("cpu_us_per_step"),
        "steps_per_s": {side: median(row["steps_per_s"] for row in rows) for side, rows in sides.items()},
        "cpu_us_per_step": {side: median(row["cpu_us_per_step"] for row in rows) for side, rows in sides.items()},
    }


def _figures(row: Row) -> dict[str, Any]:
    return {
        "warm_lease_p99_ms": row["lease_p99_s"] * 1e3,
        "warm_share": row["warm_share"],
        "cold_start_ratio": row["cold_start_ratio"],
        "starts_per_s": row["starts_per_s"],
        "mib_per_container": row["mib_per_container"],
        "cold_start_s": median(row["cold_s"]),
        "bare_start_s": median(row["bare_s"]),
    }
