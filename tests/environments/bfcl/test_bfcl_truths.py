"""Known answers: every multi-turn solution is worth 1.0, every other category's is what upstream's checker says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Inside

pytestmark = pytest.mark.timeout(300)

UNWINNABLE = {"simple_java": 2, "live_simple": 2, "live_multiple": 2}
"""Tasks whose possible answers upstream's own checker refuses: contradictions in the data."""
SIZES = {
    "simple_python": 400,
    "simple_java": 100,
    "simple_javascript": 50,
    "multiple": 200,
    "parallel": 200,
    "parallel_multiple": 200,
    "irrelevance": 240,
    "live_simple": 258,
    "live_multiple": 1053,
    "live_parallel": 16,
    "live_parallel_multiple": 24,
    "live_irrelevance": 884,
    "live_relevance": 16,
}


@pytest.fixture(scope="module")
def played(inside: Inside) -> Any:
    return inside("play_truths")


def test_all_multi_turn_solutions_are_worth_one(played: Any) -> None:
    assert played["rewards"] == {"1.0": 800}
    assert played["rewarded_early"] == 0
    assert played["evaluate_differs"] == 0


def test_solutions_make_one_call_a_message_within_the_limit_of_steps(played: Any) -> None:
    assert played["calls"] == 4625
    assert played["longest_turn"] <= 20
    assert played["steps"] < played["calls"] + 800 * 8


def test_results_are_upstreams_to_the_byte(inside: Inside, played: Any) -> None:
    upstream = inside("upstream_alone", stdin=json.dumps({"truths": True, "answers": []}))["results"]
    assert len(upstream) == 800
    assert played["results"] == upstream


def test_observations_do_not_depend_on_the_process(inside: Inside, played: Any) -> None:
    assert inside("play_truths", hash_seed=4711)["digest"] == played["digest"]


def test_single_turn_verdicts_are_upstreams(inside: Inside) -> None:
    report = inside("known_answers", *SIZES)
    assert [found["differences"] for found in report.values()] == [[]] * len(SIZES)
    assert {category: found["tasks"] for category, found in report.items()} == SIZES
    wrong = {category: found["tasks"] - found["right"] for category, found in report.items()}
    assert {category: count for category, count in wrong.items() if count} == UNWINNABLE
