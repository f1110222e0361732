"""WebShop on real sandboxes, with its own interpreter: the conformance kit, and a whole run by replay."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from backends.environments.catalog import find, home
from backends.environments.data import register
from backends.sandboxes.local import LocalBackend
from orchestrator import Orchestrator
from orchestrator.testing import check_environment
from policies.agents.replay import ReplayPolicy

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def installed() -> None:
    """A CI job installs it, as the backend does by itself; elsewhere the tests are skipped, visibly, without it."""
    if not find("webshop").installed and os.environ.get("CI") != "true":
        pytest.skip("WebShop is not installed: run `rollout env install webshop`")


@pytest.mark.parametrize("split", ["synthetic", "human", "synthetic:test"])
async def test_webshop_keeps_its_contract(split: str) -> None:
    await check_environment(lambda: LocalBackend("webshop"), split, tasks=3)


async def test_replay_buys_everything(tmp_path: Path) -> None:
    async with Orchestrator(
        backend=LocalBackend("webshop"), policy=ReplayPolicy(), out=tmp_path / "run", concurrency=64, sandboxes=2
    ) as orch:
        summary = await orch.run(split="human", episodes=62)
    assert (summary.reward_one, summary.duplicates, summary.failures) == (62, 0, {})


@pytest.fixture
def registered(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real files, registered in a home of the test's own, which shares the installed packages."""
    installed_in = home() / "envs"
    monkeypatch.setenv("ROLLOUT_HOME", str(tmp_path))
    (tmp_path / "envs").symlink_to(installed_in)
    shipped = find("webshop").digest
    register(find("webshop"), data, tmp_path / "data", lambda line: None)
    assert find("webshop").digest != shipped


@pytest.mark.usefixtures("registered")
async def test_registered_products_are_sold(tmp_path: Path) -> None:
    async with Orchestrator(
        backend=LocalBackend("webshop"), policy=ReplayPolicy(), out=tmp_path / "run", concurrency=64, sandboxes=1
    ) as orch:
        summary = await orch.run(split="test", episodes=500)
    assert (summary.outcomes, summary.failures) == ({"completed": 500}, {})
    assert summary.reward_one == 480
