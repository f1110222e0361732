"""The model on paper: sums that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.ray_model import CORES, EPISODE_S, LIVE, NODES, Costs, ceilings, machine_rate, node_rate, paper

COSTS = Costs(
    coordinator_us=500.0,
    shard_us=250.0,
    sandbox_us=1000.0,
    cluster_us=250.0,
    bytes_per_episode=12_500.0,
    store_rows_per_s=10_000.0,
    queue_rows_per_s=5_000.0,
)


def test_what_there_is_once_has_a_ceiling() -> None:
    assert ceilings(COSTS) == {"coordinator": 2000.0, "store": 10_000.0, "queue": 5000.0, "network": 100_000.0}


@pytest.mark.parametrize(
    ("change", "shards", "cores", "rate"),
    [
        ({}, 1, 2, 1000.0),  # one sandbox is one core
        ({}, 2, 2, 1000.0),  # 2 ms of CPU an episode on two cores
        ({}, 2, 64, 2000.0),  # two sandboxes
        ({}, 8, 64, 2000.0),  # the coordinator
        ({"coordinator_us": 50.0}, 8, 64, 5000.0),  # the queue
        ({"sandbox_us": 1.0}, 1, 64, 2000.0),
        ({"sandbox_us": 1.0, "shard_us": 4000.0}, 2, 64, 500.0),  # a shard is one core too
    ],
)
def test_a_machine_that_is_shared(change: dict[str, float], shards: int, cores: int, rate: float) -> None:
    assert machine_rate(replace(COSTS, **change), shards, cores) == pytest.approx(rate)


def test_a_node_of_its_own() -> None:
    assert node_rate(COSTS) == pytest.approx(4000.0), "its shard's loop"
    assert node_rate(replace(COSTS, shard_us=1.0)) == pytest.approx((CORES - 1) * 1000.0), "its sandboxes"


def test_what_many_nodes_do() -> None:
    model = paper(COSTS)
    assert model["saturates_first"] == "coordinator"
    flat_out, with_model = model["flat_out"], model["with_model"]
    assert flat_out["wanted_per_s"] == NODES * 4000.0
    assert flat_out["done_per_s"] == 2000.0
    assert flat_out["nodes_until_saturation"] == 0.5
    assert flat_out["load"] == {"coordinator": 200.0, "store": 40.0, "queue": 80.0, "network": 4.0}
    assert with_model["wanted_per_s"] == pytest.approx(NODES * LIVE / EPISODE_S)
    assert with_model["done_per_s"] == with_model["wanted_per_s"]
    assert with_model["load"]["coordinator"] == pytest.approx(with_model["wanted_per_s"] / 2000)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"store_rows_per_s": 100.0}, "store"),
        ({"queue_rows_per_s": 100.0}, "queue"),
        ({"bytes_per_episode": 1e9}, "network"),
    ],
)
def test_whatever_is_slowest_saturates_first(change: dict[str, float], first: str) -> None:
    assert paper(replace(COSTS, **change))["saturates_first"] == first
