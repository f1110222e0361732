"""The scenario `appworld` of the benchmark: small, on synthetic tasks; and without data."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from bench.registry import SCENARIOS
from bench.values import Sizes
from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.usefixtures("home")
def test_every_world_is_weighed_and_solved(tmp_path: Path) -> None:
    report = asyncio.run(SCENARIOS["appworld"](Sizes(episodes=3), tmp_path, lambda line: None))
    assert (report.result["worlds"], report.result["reward_one"]) == (3, 3)
    assert len({row["task"] for row in report.rounds}) == 3
    assert max(row["mib"] for row in report.rounds) == report.result["mib_per_world"] > 1
    assert 0 < report.result["create_p50_ms"] <= report.result["create_max_ms"] < report.result["start_s"] * 1e3


def test_without_data_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match="rollout env data appworld"):
        asyncio.run(SCENARIOS["appworld"](Sizes(), tmp_path, lambda line: None))
