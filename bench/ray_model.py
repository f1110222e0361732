"""On paper: what a cluster would do, from what was measured on one machine. Pure.

An episode costs CPU in three places: the driver, which keeps plan, store and delivery (`coordinator`: one event loop,
one core); its shard (one event loop, one core a node); its sandboxes (all other cores of the node). It is a row of the
store and of the trainer's queue, and its bytes cross the driver's network. Each of those that there is once has a
ceiling in episodes a second, and the lowest is where more nodes stop to help. The same sums, with the cores of the
machine that was measured, say how much two shards should do beside one there: what really came out is beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

NODES: Final = 100
CORES: Final = 16
"""Of a node, on paper."""
NETWORK_BYTES_PER_S: Final = 1.25e9
"""10 Gbit/s, on paper."""
LIVE: Final = 256
EPISODE_S: Final = 60.0
"""Where a model answers: so many episodes live at once on a node, and an episode takes so long."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured: microseconds of CPU an episode, bytes an episode, rows a second."""

    coordinator_us: float
    shard_us: float
    sandbox_us: float
    cluster_us: float
    """Ray's own, which is so much a second rather than an episode: counted on the machine that was measured."""
    bytes_per_episode: float
    store_rows_per_s: float
    queue_rows_per_s: float


def ceilings(costs: Costs) -> dict[str, float]:
    """Episodes a second, of all that there is once."""
    return {
        "coordinator": 1e6 / costs.coordinator_us,
        "store": costs.store_rows_per_s,
        "queue": costs.queue_rows_per_s,
        "network": NETWORK_BYTES_PER_S / costs.bytes_per_episode,
    }


def machine_rate(costs: Costs, shards: int, cores: int) -> float:
    """Episodes a second of so many shards, with one sandbox each, that share one machine with their driver."""
    busy = costs.coordinator_us + costs.shard_us + costs.sandbox_us + costs.cluster_us
    return min(
        shards * 1e6 / costs.shard_us, shards * 1e6 / costs.sandbox_us, cores * 1e6 / busy, *ceilings(costs).values()
    )


def node_rate(costs: Costs) -> float:
    """Episodes a second of a node of its own, where no model is waited for."""
    return min(1e6 / costs.shard_us, (CORES - 1) * 1e6 / costs.sandbox_us)


def paper(costs: Costs) -> dict[str, Any]:
    """What NODES nodes would do, flat out and where a model answers; `load` is what they want, of each ceiling."""
    tops = ceilings(costs)
    first = min(tops, key=lambda name: tops[name])
    rates = {"flat_out": node_rate(costs), "with_model": LIVE / EPISODE_S}
    return {
        "ceilings_per_s": tops,
        "saturates_first": first,
        "assumed": {
            "nodes": NODES,
            "cores_a_node": CORES,
            "network_bytes_per_s": NETWORK_BYTES_PER_S,
            "live_episodes_a_node": LIVE,
            "episode_s": EPISODE_S,
        },
        **{
            name: {
                "wanted_per_s": NODES * rate,
                "done_per_s": min(NODES * rate, tops[first]),
                "nodes_until_saturation": tops[first] / rate,
                "load": {what: NODES * rate / top for what, top in tops.items()},
            }
            for name, rate in rates.items()
        },
    }
