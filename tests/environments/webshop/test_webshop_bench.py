"""The scenario `webshop` of the benchmark: small, on what ships, and on the real products where they are."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from backends.environments.catalog import find
from bench import webshop
from bench.registry import SCENARIOS
from bench.values import Sizes
from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from pathlib import Path

    from bench.values import Report


@pytest.fixture(autouse=True)
def installed() -> None:
    """See the contract's tests."""
    if not find("webshop").installed and os.environ.get("CI") != "true":
        pytest.skip("WebShop is not installed: run `rollout env install webshop`")


def measured(work: Path, episodes: int) -> Report:
    said: list[str] = []
    report = asyncio.run(SCENARIOS["webshop"](Sizes(episodes=episodes), work, said.append))
    assert any(line.startswith("catalogue: ") for line in said)
    assert [row["side"] for row in report.rounds] == ["step", "search"]
    return report


def test_on_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webshop, "_catalogue", lambda spec: None)
    report = measured(tmp_path, 30)
    assert report.settings == {"catalogue": "shipped", "goals": 30}
    assert (report.result["goals"], report.result["reward_one"]) == (30, 30)
    assert report.result["identical_top10"] is None
    assert 0 < report.result["step_p50_ms"] <= report.result["step_p99_ms"]
    assert report.result["search_p50_ms"] is None


def test_on_the_real_products(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webshop, "_catalogue", lambda spec: data)
    result = measured(tmp_path, 60).result
    assert (result["products"], result["queries"], result["identical_top10"]) == (1000, 60, 60)
    assert (result["goals"], result["reward_one"]) == (60, 58)
    assert result["kib_per_session"] < 4


def test_a_broken_catalogue_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webshop, "_catalogue", lambda spec: tmp_path)
    with pytest.raises(RunFailed, match=r"holds no items_ins_v2\.json or items_ins_v2_1000\.json"):
        measured(tmp_path, 5)
