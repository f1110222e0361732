"""The benchmark of the cluster through the real command at a tiny size, and what it says of work that differs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from bench import ray as scenario
from bench import ray_queue_run
from bench.census import Census
from bench.ray_model import Costs
from bench.values import Sizes
from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from pathlib import Path

    from ray_cluster import TwoNodes

pytestmark = pytest.mark.timeout(240)
LIMIT_S = 230.0
SIDES = ["local", "ray", "one shard", "two shards", "crowd of 1", "crowd"]


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    if find_spec("ray") is None:
        message = "Ray is not installed: pip install 'rollout-orchestrator[ray]'"
        pytest.fail(message) if os.environ.get("ROLLOUT_REQUIRE_RAY") == "1" else pytest.skip(message)


def test_the_report(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", "from orchestrator.cli.main import main; main()", "bench", "ray", "--json"]
    ended = subprocess.run(
        [*command, "--episodes", "40"], capture_output=True, text=True, cwd=tmp_path, timeout=LIMIT_S, check=False
    )
    assert ended.returncode == 0, ended.stderr
    result: dict[str, Any] = orjson.loads(ended.stdout.splitlines()[-1])
    document = orjson.loads((tmp_path / "bench-results" / "ray.json").read_bytes())
    assert document["result"] == result
    assert (tmp_path / "bench-results" / "ray.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "bench-results").iterdir()) == ["ray.json", "ray.png"]
    for name in (
        "steps_ratio",
        "cpu_ratio",
        "shards_scaling",
        "shards_cpu_ratio",
        "queue_rows_per_s",
        "crowd_cpu_ratio",
    ):
        assert result[name] > 0, name
    used = result["us_per_episode"]
    assert list(used) == list(result["steps_per_s"]) == SIDES
    assert all(used[side]["driver"] > 0 for side in SIDES)
    assert used["local"]["shards"] == used["ray"]["shards"] == 0
    assert [row["side"] for row in document["rounds"]][-3:] == ["store", "queue", "small queue"]
    assert all(row["rows"] == 80 for row in document["rounds"][-3:])
    model = result["model"]
    assert model["saturates_first"] in model["ceilings_per_s"]
    assert model["ceilings_per_s"]["queue"] == result["queue_rows_per_s"]
    base = result["us_per_episode"]["one shard"]["driver"]
    assert model["ceilings_per_s"]["coordinator"] == pytest.approx(1e6 / base / result["crowd_cpu_ratio"])
    assert model["check"]["scaling"]["measured"] == result["shards_scaling"]
    assert "saturates first" in ended.stderr


async def test_sides_that_did_different_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def worker(module: str, **arguments: Any) -> dict[str, Any]:
        await asyncio.to_thread((tmp_path / "run").mkdir)
        return {"episodes": 3, "steps": 30 if arguments.get("backend") == "local" else 31}

    monkeypatch.setattr(scenario, "worker", worker)
    with pytest.raises(RunFailed, match="different work"):
        await scenario.ray(Sizes(episodes=3), tmp_path, lambda line: None)


@pytest.mark.parametrize("what", ["groups", "bytes"])
async def test_a_trainer_that_was_given_too_little(
    what: str, cluster: TwoNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ray_queue_run.work

    async def lazy(module: str, **arguments: Any) -> dict[str, Any]:
        row = await whole(module, **arguments)
        return {**row, what: row[what] - 1}

    monkeypatch.setattr(ray_queue_run, "work", lazy)
    with pytest.raises(RunFailed, match="not 4 groups"):
        await ray_queue_run.measure(part="give", groups=3)


@pytest.mark.parametrize(("coordinator_us", "rate"), [(500.0, 2000.0), (10.0, 10_000.0)])
def test_what_a_crowd_would_do_is_not_taken_from_itself(coordinator_us: float, rate: float) -> None:
    costs = Costs(coordinator_us, 1.0, 1.0, 1.0, 1.0, store_rows_per_s=10_000.0, queue_rows_per_s=1.0)
    measured = {"one_shard_per_s": 1.0, "scaling": 1.0, "crowd_per_s": 7.0}
    crowd = {"driver": 1e6, "shards": 0.0, "sandboxes": 0.0, "others": 1.0}
    check = scenario._check(costs, costs, crowd, measured)
    assert check["crowd_per_s"] == {"predicted": pytest.approx(rate), "measured": 7.0}


def test_a_census_counts_from_an_earlier_one() -> None:
    assert Census(5.0, 3.0, 1.0, 0.5).since(Census(4.0, 1.0, 1.0, 0.7)) == (1.0, 2.0, 0.0, 0.0)
