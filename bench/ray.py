"""What a cluster costs and brings: sandboxes behind Ray, shards, the trainers' queue, and what follows for 100 nodes.

- `steps_ratio`, `cpu_ratio`: a whole run of BFCL with sandboxes as actors of a cluster (servers dial in over TLS)
  divided by the same on the local backend, in steps a second and in the orchestrator's CPU a step. Medians of the
  rounds' own ratios; the two take turns.
- `shards_scaling`: episodes a second of two shards, with one sandbox each, divided by those of one; medians, in turns.
  All share this machine with their driver, so where its cores are busy with one shard there is nothing to gain:
  `shards_cpu_ratio` says what an episode costs in all with two shards beside one, which more cores do not change.
- `us_per_episode`: who used what CPU: the driver, shards, sandbox servers, and others (Ray's own processes).
- `queue_rows_per_s`: trajectories of the size that BFCL's have, in groups of 8, from `deliver` in the driver to a
  trainer in another process and back as acknowledgements. `queue_small_rows_per_s`: small ones, in groups of one.
- `store_rows_per_s`: the same trajectories into the store of a run, durable, outbox included.
- `crowd_cpu_ratio`: the coordinator's CPU an episode with 100 shards that play nothing (`bench.crowd`), divided by that
  with one: what many connections cost, because less is said at a time on each.
- `model`: from these, what saturates first and with how many nodes (`bench.ray_model`), and the same sums for this
  machine beside what was measured on it (`check`). A crowd's shards tell their coordinator less than real ones, whose
  cost the sums are made of: it does more episodes than they say.

Every process has a cluster of its own, on this machine. To falsify it: the sides of a round must have made the same
steps and earned every reward; all rounds are in the file.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from backends.sandboxes.ray.cluster import module
from bench.ray_model import NODES, Costs, machine_rate, paper
from bench.values import Report
from bench.workers import work as worker
from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bench.values import Row, Say, Sizes

SPLIT: Final = "multi_turn_base"
CONCURRENCY: Final = 500
EPISODES: Final = 3000
FULL: Final = 1000
"""Fewer episodes than this ask for a quick look: one round of each."""
ROUNDS: Final = 4
SHARD_ROUNDS: Final = 3
CROWD_ROUNDS: Final = 3
GROUP: Final = 8
QUEUED: Final = 8000
SIDES: Final[dict[str, dict[str, Any]]] = {
    "local": {"backend": "local", "sandboxes": 2},
    "ray": {"backend": "ray", "sandboxes": 2},
    "one shard": {"shards": 1, "sandboxes": 1},
    "two shards": {"shards": 2, "sandboxes": 1},
    "crowd of 1": {"crowd": 1, "sandboxes": 1},
    "crowd": {"crowd": NODES, "sandboxes": 1},
}


async def ray(sizes: Sizes, work: Path, say: Say) -> Report:
    """Measure it. Raises Unavailable without Ray, RunFailed where a measurement is none."""
    await asyncio.to_thread(module)
    episodes = sizes.episodes or EPISODES
    quick = episodes < FULL
    rounds: list[Row] = []
    for number in range(1 if quick else ROUNDS):
        rounds += await _round(number, ("local", "ray"), episodes, work, sizes.seed, say)
    for number in range(1 if quick else SHARD_ROUNDS):
        rounds += await _round(number, ("one shard", "two shards"), episodes, work, sizes.seed, say)
    row_bytes = int(median(row["bytes_per_episode"] for row in rounds))
    for number in range(1 if quick else CROWD_ROUNDS):
        rounds += await _round(number, ("crowd of 1", "crowd"), episodes, work, sizes.seed, say, row_bytes=row_bytes)
    groups = max(10, min(episodes, QUEUED) // GROUP)
    rounds += await _rows(groups, row_bytes, work, say)
    result = _result(rounds, row_bytes)
    say(
        f"steps {result['steps_ratio']:.2f}, CPU {result['cpu_ratio']:.2f}, two shards {result['shards_scaling']:.2f}, "
        f"queue {result['queue_rows_per_s']:,.0f} rows/s, store {result['store_rows_per_s']:,.0f} rows/s; "
        f"the {result['model']['saturates_first']} saturates first"
    )
    settings = {"split": SPLIT, "concurrency": CONCURRENCY, "episodes": episodes, "row_bytes": row_bytes}
    return Report(result, rounds, settings)


async def _round(
    number: int, sides: tuple[str, str], episodes: int, work: Path, seed: int, say: Say, row_bytes: int = 0
) -> list[Row]:
    """Both sides once, the order turned around every time."""
    rows: list[Row] = []
    for side in sides if number % 2 else reversed(sides):
        out = work / "run"
        common: dict[str, Any] = {
            "split": SPLIT,
            "concurrency": CONCURRENCY,
            "seed": seed,
            "durability": "episode",
            "row_bytes": row_bytes,
        }
        row = await worker("bench.engine_run", out=str(out), episodes=episodes, **common, **SIDES[side])
        size = await asyncio.to_thread(_remove, out)
        rows.append({"side": side, "round": number, "bytes_per_episode": size / episodes, **row})
    if len({(row["episodes"], row["steps"]) for row in rows}) != 1:
        raise RunFailed(f"the two sides did different work: {rows}")
    words = [f"{row['side']} {row['episodes_per_s']:,.0f} episodes/s, {row['cpu_us_per_step']:.1f} us" for row in rows]
    say(f"round {number + 1}: {'; '.join(sorted(words))}")
    return rows


def _remove(out: Path) -> int:
    """Remove a run's directory; how many bytes it had."""
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return size


async def _rows(groups: int, row_bytes: int, work: Path, say: Say) -> list[Row]:
    say(f"{groups * GROUP:,} rows into a store, and through the queue")
    sized = {"groups": groups, "size": GROUP, "row_bytes": row_bytes}
    store = await worker("bench.ray_queue_run", part="store", work=str(work), **sized)
    queue = await worker("bench.ray_queue_run", part="give", **sized)
    small = await worker("bench.ray_queue_run", part="give", groups=groups * GROUP, size=1, row_bytes=0)
    return [store, queue, {**small, "side": "small queue"}]


def _result(rounds: Sequence[Row], row_bytes: int) -> dict[str, Any]:
    def values(side: str, name: str) -> list[float]:
        return [float(row[name]) for row in rounds if row["side"] == side]

    def ratio(name: str, side: str, to: str) -> float:
        return median(one / other for one, other in zip(values(side, name), values(to, name), strict=True))

    used = {side: _used([row for row in rounds if row["side"] == side]) for side in SIDES}
    scaling = ratio("episodes_per_s", "two shards", "one shard")
    result = {
        "steps_ratio": ratio("steps_per_s", "ray", "local"),
        "cpu_ratio": ratio("cpu_us_per_step", "ray", "local"),
        "shards_scaling": scaling,
        "shards_cpu_ratio": sum(used["two shards"].values()) / sum(used["one shard"].values()),
        "queue_rows_per_s": values("queue", "rows_per_s")[0],
        "queue_small_rows_per_s": values("small queue", "rows_per_s")[0],
        "store_rows_per_s": values("store", "rows_per_s")[0],
        "steps_per_s": {side: median(values(side, "steps_per_s")) for side in SIDES},
        "us_per_episode": used,
    }
    costs, growth = _costs(result, row_bytes), ratio("cpu_us_per_step", "crowd", "crowd of 1")
    measured = {
        "one_shard_per_s": median(values("one shard", "episodes_per_s")),
        "scaling": scaling,
        "crowd_per_s": median(values("crowd", "episodes_per_s")),
    }
    grown = replace(costs, coordinator_us=costs.coordinator_us * growth)
    check = _check(costs, grown, used["crowd"], measured)
    return {**result, "crowd_cpu_ratio": growth, "model": {**paper(grown), "check": check}}


def _used(rows: Sequence[Row]) -> dict[str, float]:
    """Medians of the rounds."""
    return {name: median(row["us_per_episode"][name] for row in rows) for name in rows[0]["us_per_episode"]}


def _costs(result: Mapping[str, Any], row_bytes: int) -> Costs:
    """From the runs of one shard."""
    used = {name: max(us, 1.0) for name, us in result["us_per_episode"]["one shard"].items()}
    return Costs(
        coordinator_us=used["driver"],
        shard_us=used["shards"],
        sandbox_us=used["sandboxes"],
        cluster_us=used["others"],
        bytes_per_episode=row_bytes,
        store_rows_per_s=result["store_rows_per_s"],
        queue_rows_per_s=result["queue_rows_per_s"],
    )


def _check(costs: Costs, grown: Costs, crowd: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, Any]:
    """The model's sums for this machine beside what was measured on it; `grown` are the costs with a crowd."""
    cores = len(os.sched_getaffinity(0))
    one, two = (machine_rate(costs, shards, cores) for shards in (1, 2))
    busy = grown.coordinator_us + sum(us for who, us in crowd.items() if who != "driver")
    predicted = {
        "one_shard_per_s": one,
        "scaling": two / one,
        "crowd_per_s": min(1e6 / grown.coordinator_us, cores * 1e6 / busy, grown.store_rows_per_s),
    }
    return {
        "cores": cores,
        **{name: {"predicted": predicted[name], "measured": found} for name, found in measured.items()},
    }
