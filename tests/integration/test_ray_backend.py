"""The Ray backend on a real cluster of two nodes: the conformance kit, whole runs, deaths of every kind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from runs import Counted, counting, play

from backends.sandboxes.private import sweep
from backends.sandboxes.ray import RayBackend, RayOptions
from orchestrator.testing import BACKEND_CHECKS, FAULT_CHECKS, run_check
from orchestrator.types import StopReason

if TYPE_CHECKING:
    from pathlib import Path

    from ray_cluster import TwoNodes

    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView

pytestmark = pytest.mark.timeout(180)
LIGHT = RayOptions(cpus=0.1)


def backend(cluster: TwoNodes, environment: str = "toy") -> RayBackend:
    return RayBackend(environment, address=cluster.address, options=LIGHT)


@pytest.mark.parametrize("name", BACKEND_CHECKS)
async def test_the_contract(cluster: TwoNodes, name: str) -> None:
    await run_check(BACKEND_CHECKS[name], lambda: backend(cluster), sockets=False)


@pytest.mark.parametrize("name", FAULT_CHECKS)
async def test_the_contract_under_faults(cluster: TwoNodes, name: str) -> None:
    await run_check(FAULT_CHECKS[name], lambda: backend(cluster), sockets=False)


async def test_killers_are_found_out_where_there_is_room_for_one_sandbox(cluster: TwoNodes, tmp_path: Path) -> None:
    """The node's one place is the pool's: suspects and the others take turns in it."""
    node = cluster.node(resources={"place": 1})
    only = RayBackend("toy", address=cluster.address, options=RayOptions(cpus=0.1, resources={"place": 1}))
    killers = {"toy_3", "toy_11"}

    def act(view: ConversationView, ctx: EpisodeContext) -> str:
        return "crash" if view.turn == 1 and ctx.key.task in killers else counting(view, ctx)

    policy = Counted(act)
    try:
        played = await play(tmp_path / "run", policy, backend=only, sandboxes=1, episodes=24)
    finally:
        cluster.cluster.remove_node(node, allow_graceful=False)
        await asyncio.to_thread(sweep)
    assert policy.repeated() == 0
    for key, trajectory in played.episodes.items():
        killed = trajectory.stop_reason is StopReason.AGENT_KILLED_ENV
        assert killed == (key.task in killers)
        assert trajectory.reward == (0.0 if killed else 1.0)
