"""Splits: which tasks they hold, in which order, and what is said of those that cannot run here."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Inside

COUNTS = {
    "all": 10306,
    "all_scoring": 5106,
    "multi_turn": 800,
    "single_turn": 3641,
    "live": 2251,
    "non_live": 1390,
    "non_python": 150,
    "python": 3491,
}
"""Tasks of each sub-type, those that are left out included."""
LEFT_OUT = {
    "memory_vector": 155,
    "web_search_base": 100,
    "web_search_no_snippet": 100,
    "format_sensitivity": 5200,
}
MEMORIES = ("memory_kv", "memory_rec_sum")
CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")


@pytest.fixture(scope="module")
def splits(inside: Inside) -> dict[str, Any]:
    names = [
        *COUNTS,
        *LEFT_OUT,
        *MEMORIES,
        *CATEGORIES,
        "simple_java",
        "live_relevance",
        "memory",
        "web_search",
        "agentic",
    ]
    wrong = ["", "nonsense", "multi_turn:test", "multi_turn:", ":train"]
    asked = [*(f"{name}{side}" for name in names for side in ("", ":train", ":val")), *wrong]
    told = inside("drive", stdin=json.dumps([["tasks", split] for split in asked]))
    return dict(zip(asked, told, strict=True))


def test_sub_types_have_upstreams_members(splits: dict[str, Any]) -> None:
    found = {name: splits[name] for name in COUNTS}
    counts = {name: len(s["ids"]) + sum(n for n, _ in s["left_out"].values()) for name, s in found.items()}
    assert counts == COUNTS
    assert {name: count for name, (count, _) in splits["all"]["left_out"].items()} == LEFT_OUT
    assert "format_sensitivity" not in splits["all_scoring"]["left_out"]
    assert splits["multi_turn"]["left_out"] == {}
    assert all(needs for _, needs in splits["all"]["left_out"].values())


def test_the_order_is_the_datas_and_multi_turn_the_default(splits: dict[str, Any]) -> None:
    expected = [f"{category}_{number}" for category in CATEGORIES for number in range(200)]
    assert splits["multi_turn"]["ids"] == expected
    assert splits[""] == splits["multi_turn"]
    assert splits["all"]["ids"][0] == "simple_python_0"


def test_train_and_val_part_every_split_the_same_way(splits: dict[str, Any]) -> None:
    val = set(splits["all:val"]["ids"])
    for name in (*COUNTS, *MEMORIES, *CATEGORIES, "simple_java", "live_relevance", "memory", "agentic"):
        whole, train, rest = (splits[f"{name}{side}"]["ids"] for side in ("", ":train", ":val"))
        assert [task for task in whole if task not in val] == train
        assert [task for task in whole if task in val] == rest
        assert 0.1 < len(rest) / len(whole) < 0.3
    assert "multi_turn_base_0" in splits["multi_turn:train"]["ids"]


def test_variants_of_a_scenario_stand_on_one_side(splits: dict[str, Any]) -> None:
    sides: dict[str, set[str]] = {"train": set(), "val": set()}
    for side, numbers in sides.items():
        numbers.update(re.sub(r".*_", "", task) for task in splits[f"multi_turn:{side}"]["ids"])
    assert sides["train"] & sides["val"] == set()
    assert len(sides["train"] | sides["val"]) == 200


def test_memories_ask_the_same_questions_and_a_question_stands_on_one_side(splits: dict[str, Any]) -> None:
    for side in ("", ":train", ":val"):
        kv, rec_sum = (splits[f"{name}{side}"]["ids"] for name in MEMORIES)
        assert [task.replace("memory_kv", "memory_rec_sum") for task in kv] == rec_sum
        assert splits[f"memory{side}"]["ids"] == kv + rec_sum == splits[f"agentic{side}"]["ids"]
        assert splits[f"memory{side}"]["left_out"].keys() == {"memory_vector"}
    assert splits["memory_kv"]["ids"][::154] == ["memory_kv_0-customer-0", "memory_kv_154-notetaker-24"]


@pytest.mark.parametrize("name", [*LEFT_OUT, "web_search"])
def test_what_cannot_run_here_says_what_it_needs(splits: dict[str, Any], name: str) -> None:
    for side in ("", ":train", ":val"):
        told = splits[f"{name}{side}"]
        assert told["fault"] == "unavailable"
        assert name in told["message"]
        assert "it needs" in told["message"]


@pytest.mark.parametrize("split", ["nonsense", "multi_turn:test", "multi_turn:", ":train"])
def test_an_unknown_split_lists_those_there_are(splits: dict[str, Any], split: str) -> None:
    told = splits[split]
    assert told["fault"] == "unknown_split"
    assert repr(split) in told["message"]
    for name in (*COUNTS, *CATEGORIES, "live_simple", ":train"):
        assert name in told["message"]


def test_unknown_tasks_and_options_are_refused(inside: Inside) -> None:
    commands = [
        ["open", "a", "multi_turn_base_200"],
        ["open", "a", "nonsense"],
        ["open", "a", ""],
        ["open", "a", "../multi_turn_base_0"],
        ["open", "a", "memory_vector_0-customer-0"],
        ["open", "a", "memory_0-customer-0"],
        ["open", "a", "memory_kv_0-customer-1"],
        ["open", "a", "memory_kv_prereq_0-customer-0"],
        ["open", "a", "format_sensitivity_0:x:live_simple_0-0-0"],
        ["open", "a", "multi_turn_base_0", {"dialect": "klingon"}],
        ["open", "a", "multi_turn_base_0", {"colour": 1}],
        ["solution", "multi_turn_base_200"],
    ]
    told = inside("drive", stdin=json.dumps(commands))
    assert [fault["fault"] for fault in told] == [
        *["unknown_task"] * 4,
        "unavailable",
        *["unknown_task"] * 3,
        "unavailable",
        *["bad_request"] * 2,
        "unknown_task",
    ]
    assert "multi_turn_base has 200 tasks" in told[0]["message"]
