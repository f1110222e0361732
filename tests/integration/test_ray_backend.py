"""The Ray backend on a real cluster of two nodes: the conformance kit, whole runs, deaths of every kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from backends.sandboxes.ray import RayBackend, RayOptions
from orchestrator.testing import BACKEND_CHECKS, FAULT_CHECKS, run_check

if TYPE_CHECKING:
    from ray_cluster import TwoNodes

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
