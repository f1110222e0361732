"""What a live episode weighs: memory of the orchestrator and all its servers, an episode, with 10,000 of them open.

`kib_per_episode` = (PSS at N - PSS at 0) / N after opening, in one fresh process (`bench.hold_run`) with 2 servers.
PSS is the proportional set size of /proc/PID/smaps_rollup, so that shared pages count once. At 0 the orchestrator runs,
its servers answer, and no episode was ever opened. `kib_per_episode_played` is the same when every episode has played
all but its last action, with all it has recorded. The split says whose memory it is.

To falsify it: N is counted in the orchestrator and in the connections while the memory is read, and afterwards every
episode must end with reward 1.0; fewer episodes make fixed costs (the tasks' own data) show, so that the figure grows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from bench.processes import need_linux
from bench.values import Report
from bench.workers import work as worker

if TYPE_CHECKING:
    from pathlib import Path

    from bench.values import Row, Say, Sizes

SPLIT: Final = "multi_turn_base"
EPISODES: Final = 10_000
SANDBOXES: Final = 2


async def density(sizes: Sizes, work: Path, say: Say) -> Report:
    """Measure it. Raises RunFailed where the episodes were not all held, Unavailable outside of Linux."""
    need_linux("density")
    episodes = EPISODES if sizes.episodes is None else sizes.episodes
    say(f"holding {episodes:,} live episodes of {SPLIT} on {SANDBOXES} servers")
    row = await worker(
        "bench.hold_run",
        out=str(work / "run"),
        split=SPLIT,
        episodes=episodes,
        sandboxes=SANDBOXES,
        seed=sizes.seed,
    )
    result = _result(row)
    say(f"{result['kib_per_episode']:.1f} KiB an episode, {result['kib_per_episode_played']:.1f} KiB when played")
    return Report(result, [row], {"split": SPLIT, "episodes": episodes, "sandboxes": SANDBOXES})


def _result(row: Row) -> dict[str, Any]:
    opened, played = _growth(row, "opened"), _growth(row, "played")
    return {
        "kib_per_episode": sum(opened.values()),
        "kib_per_episode_played": sum(played.values()),
        "opened": opened,
        "played": played,
        "episodes": row["episodes"],
        "empty_mib": sum(row["pss_kib"]["empty"].values()) / 1024,
    }


def _growth(row: Row, stage: str) -> dict[str, float]:
    """KiB an episode above the empty state, by whose memory it is."""
    pss = row["pss_kib"]
    return {who: (pss[stage][who] - pss["empty"][who]) / row["episodes"] for who in ("orchestrator", "servers")}
