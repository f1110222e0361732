"""Runs over a Ray cluster: on sandboxes of its nodes, and over shards; what is killed, and what comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from runs import read, until
from sharded import LIGHT, Noting, actors, orchestrator, repeated

from backends.environments.catalog import home
from backends.sandboxes.local import LocalBackend
from backends.sandboxes.private import sweep
from backends.sandboxes.ray import RayBackend, RayOptions, RayShards
from orchestrator import Orchestrator
from orchestrator.events import SandboxEnded, ShardEnded
from orchestrator.testing.leaks import processes
from policies.agents.replay import ReplayPolicy

if TYPE_CHECKING:
    from ray_cluster import TwoNodes

    from orchestrator.events import Event
    from orchestrator.summary import Summary

pytestmark = pytest.mark.timeout(300)
EPISODES = 500
KILLS = int(os.environ.get("ROLLOUT_RAY_KILLS", "3"))
NODE_KILLS = int(os.environ.get("ROLLOUT_RAY_KILLS", "1"))


@pytest.mark.parametrize("how", ["sandboxes", "shards"])
async def test_eight_hundred_ground_truths_exactly_once(cluster: TwoNodes, how: str, tmp_path: Path) -> None:
    if how == "shards":
        backend, shards = LocalBackend("bfcl"), RayShards(2, address=cluster.address, options=LIGHT)
    else:
        backend, shards = RayBackend("bfcl", address=cluster.address, options=LIGHT), None  # type: ignore[assignment]
    run = Orchestrator(
        backend=backend, policy=ReplayPolicy(), out=tmp_path / "run", concurrency=128, sandboxes=2, shards=shards
    )
    async with run as made:
        summary = await made.run(split="multi_turn")
    assert (summary.episodes, summary.reward_one, summary.duplicates, summary.failures) == (800, 800, 0, {})
    assert len(await read(tmp_path / "run")) == 800


async def strike(kind: str, kills: list[float]) -> None:
    """SIGKILL one actor now and then, while there is more than one."""
    for _ in range(KILLS):

        async def two() -> bool:
            return len(await asyncio.to_thread(actors, kind)) >= 2

        await until(two, f"two of {kind}", 60)
        await asyncio.sleep(0.7)
        victim = (await asyncio.to_thread(actors, kind))[0]
        kills.append(time.time())
        os.kill(victim, signal.SIGKILL)


def right(summary: Summary, log: Path) -> None:
    assert summary.outcomes == {"completed": EPISODES}
    assert (summary.reward_one, summary.duplicates) == (EPISODES, 0)
    assert repeated(log)[1] == 0


@pytest.mark.parametrize(("how", "kind"), [("sandboxes", "SandboxHost"), ("shards", "ShardHost")])
async def test_actors_are_killed_and_no_model_call_is_repeated(
    cluster: TwoNodes, how: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, kills = tmp_path / "log", list[float]()
    async with orchestrator(tmp_path / "run", log, cluster.address, how, 0.06 * KILLS) as run:
        running = asyncio.create_task(run.run(episodes=EPISODES, group_size=2))
        striking = asyncio.create_task(strike(kind, kills))
        await asyncio.wait({running, striking}, return_when=asyncio.FIRST_COMPLETED)
        striking.cancel()
        summary = await running
    await asyncio.to_thread(sweep)
    assert len(kills) == KILLS
    right(summary, log)
    assert how == "shards" or summary.recovered_episodes > 0
    assert not [path for path in (home() / "shards").glob("*") if path.name == summary.run]


@pytest.mark.parametrize("how", ["sandboxes", "shards"])
async def test_nodes_are_killed_and_others_join(cluster: TwoNodes, how: str, tmp_path: Path) -> None:
    """Half of the shards, or of the sandboxes, at a time."""
    log, losses, noticed = tmp_path / "log", list[float](), list[float]()
    place = RayOptions(cpus=0.1, resources={f"{how}-killed": 1 if how == "shards" else 0.5})
    there = {"resources": {f"{how}-killed": 1}}
    nodes = [cluster.node(**there), cluster.node(**there)]  # Ray wants the main thread

    def hear(event: Event) -> None:
        if isinstance(event, ShardEnded | SandboxEnded):
            losses.append(time.monotonic())

    think_s = 0.1 + 0.45 * (NODE_KILLS - 1)  # the run outlasts the kills
    try:
        async with orchestrator(tmp_path / "run", log, cluster.address, how, think_s, place, listener=hear) as run:
            running = asyncio.create_task(run.run(episodes=EPISODES, group_size=2))

            async def all_there() -> bool:
                return run.progress().running > 0 and run.progress().sandboxes_live == (2 if how == "shards" else 4)

            for _ in range(NODE_KILLS):
                await until(all_there, "all to be there", 90)
                await asyncio.sleep(1.0)
                losses.clear()
                killed = time.monotonic()
                nodes[0].all_processes["raylet"][0].process.kill()
                await until(lambda: asyncio.sleep(0, bool(losses)), "the death of a node", 10)
                noticed.append(losses[0] - killed)
                cluster.cluster.remove_node(nodes.pop(0), allow_graceful=False)
                nodes.append(cluster.node(**there))
            summary = await running
    finally:
        for node in nodes:
            cluster.cluster.remove_node(node, allow_graceful=False)
        await asyncio.to_thread(sweep)  # what the killed left, as whoever starts sandboxes next does
    right(summary, log)
    assert max(noticed) < 5
    sys.stdout.write(  # with pytest -s
        f"{NODE_KILLS} nodes killed under {how}: noticed within {max(noticed):.2f} s, "
        f"{summary.recovered_episodes} recovered, "
        f"{summary.attempts_lost} attempts lost, {summary.duplicates} duplicates, decisions again {repeated(log)}\n"
    )


@pytest.mark.parametrize(("how", "kind"), [("sandboxes", "SandboxHost"), ("shards", "ShardHost")])
async def test_a_killed_driver_leaves_nothing_and_its_run_is_resumed(
    cluster: TwoNodes, how: str, kind: str, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, str(Path(__file__).with_name("sharded.py")), str(out), str(log), cluster.address, how]
    driver = await asyncio.create_subprocess_exec(*command, str(EPISODES), stderr=subprocess.PIPE)

    async def under_way() -> bool:
        return log.exists() and log.stat().st_size > 20_000

    await until(under_way, "decisions", 60)
    driver.kill()
    await driver.communicate()

    async def gone() -> bool:
        left = await asyncio.to_thread(lambda: [p for p in processes() if "--environment toy" in p.command])
        return not await asyncio.to_thread(actors, kind) and not left

    await until(gone, "actors and servers to end", 30)
    await asyncio.to_thread(sweep)  # as whoever starts sandboxes next does
    async with orchestrator(out, log, cluster.address, how) as run:
        summary = await run.run()
    right(summary, log)
    assert summary.lives == 2


@pytest.mark.parametrize("how", ["sandboxes", "shards"])
async def test_a_node_that_joins_takes_work_within_ten_seconds(cluster: TwoNodes, how: str, tmp_path: Path) -> None:
    place = RayOptions(cpus=0.1, resources={how: 1})
    first = cluster.node(resources={how: 1})
    shards = RayShards(2, address=cluster.address, options=place) if how == "shards" else None
    backend = LocalBackend("toy") if shards else RayBackend("toy", address=cluster.address, options=place)
    run = Orchestrator(
        backend=backend, policy=Noting(tmp_path / "log", 0.2), out=tmp_path / "run", concurrency=32,
        sandboxes=None if shards else 2, shards=shards,
    )  # fmt: skip
    async with run as made:
        running = asyncio.create_task(made.run(episodes=1000, group_size=2))

        async def working(wanted: int) -> bool:
            if made._crew is not None:
                return sum(bool(link.running) for link in made._crew._links) == wanted
            pool = made._need_pool()
            return sum(place.tenancy is not None and place.tenancy.leases > 0 for place in pool._places) == wanted

        await until(lambda: working(1), "the first one to work", 30)
        second = cluster.node(resources={how: 1})
        await until(lambda: working(2), "the one that joined to work", 10)
        made.cancel()
        await running
    for node in (first, second):
        cluster.cluster.remove_node(node, allow_graceful=False)
    await asyncio.to_thread(sweep)
