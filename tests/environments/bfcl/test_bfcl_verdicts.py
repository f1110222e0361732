"""Verdicts on spoiled answers against upstream's whole multi-turn checker, run in processes of its own.

ROLLOUT_BFCL_ANSWERS sets how many answers are tried.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Inside

pytestmark = pytest.mark.timeout(300)

ANSWERS = int(os.environ.get("ROLLOUT_BFCL_ANSWERS", "4000"))
SEED = 20260323


def judged_by_upstream(inside: Inside, answers: list[Any]) -> list[Any]:
    """Upstream's verdicts, by two processes at a time."""
    halves = answers[::2], answers[1::2]
    with ThreadPoolExecutor(2) as pool:
        even, odd = pool.map(
            lambda half: inside("upstream_alone", stdin=json.dumps({"truths": False, "answers": half}))["verdicts"],
            halves,
        )
    verdicts: list[Any] = [None] * len(answers)
    verdicts[::2], verdicts[1::2] = even, odd
    return verdicts


def test_spoiled_answers_get_upstreams_verdict(inside: Inside) -> None:
    played = inside("play_answers", str(ANSWERS), str(SEED))
    fair = [(task, answer, verdict) for task, answer, verdict, apart in played if not apart]
    apart = Counter(entry[3] for entry in played if entry[3])
    assert len(fair) >= 0.95 * ANSWERS, f"too many answers were set apart: {apart}"
    verdicts = judged_by_upstream(inside, [[task, answer] for task, answer, _ in fair])
    different = [
        (task, ours, upstream, answer)
        for (task, answer, ours), upstream in zip(fair, verdicts, strict=True)
        if ours != upstream
    ]
    assert different == []
    kinds = Counter(verdict[1] for _, _, verdict in fair)
    assert set(kinds) == {
        None,
        "multi_turn:instance_state_mismatch",
        "multi_turn:execution_response_mismatch",
        "multi_turn:empty_turn_model_response",
    }, "the answers do not reach every verdict"


def call(name: str, **arguments: Any) -> list[Any]:
    return [[{"name": name, "arguments": arguments}]]


def test_objects_that_upstream_shares_in_a_process_weigh_as_they_do_there(inside: Inside) -> None:
    """Default arguments and long-context records are one object for answer and truth in upstream's checker.

    Both answers would be wrong if the two sides had their own: two mentions in a tweet that was posted without any, and
    an insurance paid with a card of the long context.
    """
    drive = [["solution", "multi_turn_base_5"], ["solution", "multi_turn_long_context_159"]]
    twitter, travel = (_answer(actions) for actions in inside("drive", stdin=json.dumps(drive)))
    twitter[-1] += call("mention", tweet_id=0, mentioned_usernames=["@one"]) * 2
    insurance = {"insurance_type": "travel", "booking_id": "booking_901", "insurance_cost": 10}
    travel[-1] += call("purchase_insurance", access_token="abc123xyz", card_id="1234567812345678", **insurance)
    answers = [["multi_turn_base_5", twitter], ["multi_turn_long_context_159", travel]]
    verdicts = inside("play_given", stdin=json.dumps(answers))
    assert verdicts == judged_by_upstream(inside, answers) == [[True, None]] * 2


def _answer(actions: list[Any]) -> list[Any]:
    """A solution's messages as turns of steps of calls."""
    turns: list[Any] = [[]]
    for action in actions:
        if not action.get("tool_calls"):
            turns.append([])
            continue
        functions = [entry["function"] for entry in action["tool_calls"]]
        turns[-1].append([{"name": f["name"], "arguments": json.loads(f["arguments"])} for f in functions])
    return turns[:-1]
