"""Hostile actions, and thousands of sessions in one process: nothing runs, nothing leaks, nothing hangs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Inside

QUICK_S = 1.0
"""Processor time: longer than any refusal takes, far shorter than the work that is refused."""


def raw(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": function}]}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return raw(name, json.dumps(arguments))


def many(*functions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    entries = [call(name, **arguments)["tool_calls"][0] for name, arguments in functions]
    return {"role": "assistant", "tool_calls": entries}


def nested(depth: int) -> str:
    return '{"content": ' + "[" * depth + "]" * depth + "}"


HOSTILE = {
    "eval": call("eval", expression="__import__('os').getcwd()"),
    "name with code": call("__import__('os').getcwd"),
    "call as a name": call("cd(folder='document') or pwd"),
    "dotted name": call("GorillaFileSystem.cd", folder="document"),
    "attribute path": call("cd.__globals__"),
    "private method": call("_load_scenario", scenario={}),
    "constructor": call("__init__"),
    "class": call("__class__"),
    "builtin": call("open", file="/etc/passwd"),
    "undocumented argument": call("cd", folder="document", self=None),
    "argument with code": call("cd", **{"folder=__import__('os').getcwd()": 1}),
    "dunder argument": call("cd", __class__="x", folder="document"),
    "unknown function": call("format_disk"),
    "wrong types": call("cd", folder={"a": [1]}),
    "unhashable": call("cat", file_name=["a"]),
    "deep": raw("echo", nested(200)),
    "deeper": raw("echo", nested(2000)),
    "a megabyte": call("echo", content="x" * 1_000_000),
    "a megabyte of text": {"role": "assistant", "content": "<tool_call>" + "y" * 1_000_000 + "</tool_call>"},
    "unclosed blocks": {"role": "assistant", "content": "<tool_call>" * 80_000},
    "many calls": many(*[("cd", {"folder": "nowhere"})] * 5_000),
    "bad json": '{"role": "assistant", "tool_calls": [}',
    "not json": "\x00\x01",
    "numbers": call("tail", file_name="final_report.pdf", lines=10**30),
    "long name": call("c" * 100_000, folder="document"),
    "surrogate": '{"role": "assistant", "content": "<tool_call>\\ud800</tool_call>"}',
}


@pytest.mark.parametrize("dialect", ["calls", "text"])
def test_hostile_actions_get_an_answer_and_change_nothing(inside: Inside, dialect: str) -> None:
    actions = [_as_text(action) if dialect == "text" else action for action in HOSTILE.values()]
    opening, before, *told = inside(
        "drive",
        stdin=json.dumps(
            [
                ["open", "a", "multi_turn_base_0"],
                ["state", "a"],
                *(c for number, action in enumerate(actions) for c in _attack(number, action)),
            ]
        ),
    )
    assert opening["messages"]
    for name, answer, after, grade in zip(HOSTILE, told[1::4], told[2::4], told[3::4], strict=True):
        assert after == before, name
        assert answer["messages"], name
        assert all("rror" in message["content"] for message in answer["messages"]), (name, answer["messages"][:2])
        assert (answer["done"], answer["reward"], grade["reward"]) == (False, 0.0, 0.0), name
        assert answer["seconds"] < QUICK_S, name


def _attack(number: int, action: Any) -> list[list[Any]]:
    return [["open", str(number), "multi_turn_base_0"], ["step", str(number), action]] + [
        [what, str(number)] for what in ("state", "evaluate")
    ]


def _as_text(action: Any) -> Any:
    if isinstance(action, str) or "tool_calls" not in action:
        return action
    functions = [entry["function"] for entry in action["tool_calls"]]
    blocks = [f'{{"name": {json.dumps(f["name"])}, "arguments": {f["arguments"]}}}' for f in functions]
    return {"role": "assistant", "content": "\n".join(f"<tool_call>{block}</tool_call>" for block in blocks)}


COSTLY = {
    "power": call("power", base=10, exponent=10**8),
    "power of a negative base": call("power", base=-7, exponent=10**12),
    "precision": call("logarithm", value=2, base=3, precision=2_000_000),
    "precision in a string": call("logarithm", value=2, base=3, precision="2000000"),
    "number in a long string": call("logarithm", value="1" * 60_000, base=3, precision=10),
    "square root": call("square_root", number=2, precision=5_000_000),
    "rounding": call("round_number", number=5, decimal_places=-(10**9)),
}


def test_costly_numbers_are_refused_at_once(inside: Inside) -> None:
    task = "multi_turn_base_57"
    told = inside("drive", stdin=json.dumps([["open", "a", task], *(["step", "a", a] for a in COSTLY.values())]))[1:]
    for name, answer in zip(COSTLY, told, strict=True):
        assert answer["messages"][0]["content"].startswith("Error during execution: "), name
        assert answer["seconds"] < QUICK_S, name


def test_ordinary_numbers_are_not(inside: Inside) -> None:
    asked = [
        call("power", base=2, exponent=10),
        call("power", base=1, exponent=10**15),
        call("power", base=2.0, exponent=10**3),
        call("logarithm", value=27, base=3, precision=50),
        call("square_root", number=2, precision=100),
        call("round_number", number=2.71828, decimal_places=2),
    ]
    task = "multi_turn_base_57"
    told = inside("drive", stdin=json.dumps([["open", "a", task], *(["step", "a", a] for a in asked)]))[1:]
    contents = [answer["messages"][0]["content"] for answer in told]
    assert contents[0] == '{"result": 1024}'
    assert contents[-1] == '{"result": 2.72}'
    assert all("result" in content for content in contents)


def test_a_directory_in_itself_is_survived(inside: Inside) -> None:
    steps = [call("mkdir", dir_name="x"), call("cp", source="x", destination="x"), call("find"), call("du")]
    *_, copied, found, used, grade = inside(
        "drive",
        stdin=json.dumps([["open", "a", "multi_turn_base_0"], *(["step", "a", s] for s in steps), ["evaluate", "a"]]),
    )
    assert "copied" in copied["messages"][0]["content"]
    assert grade["reward"] == 0.0
    for answer in (found, used):
        assert "contains itself" in answer["messages"][0]["content"]
        assert answer["seconds"] < QUICK_S


def test_a_file_system_of_countless_paths_is_not_walked(inside: Inside) -> None:
    doublings: list[tuple[str, dict[str, Any]]] = [("mkdir", {"dir_name": "d"})]
    for _ in range(40):
        doublings += [
            ("mkdir", {"dir_name": "up"}),
            ("cp", {"source": "d", "destination": "e"}),
            ("mv", {"source": "d", "destination": "up"}),
            ("mv", {"source": "e", "destination": "up"}),
            ("mv", {"source": "up", "destination": "d"}),
        ]
    steps = [many(*doublings[start : start + 60]) for start in range(0, len(doublings), 60)]
    told = inside(
        "drive",
        stdin=json.dumps(
            [
                ["open", "a", "multi_turn_base_0"],
                *(["step", "a", step] for step in [*steps, call("find"), call("du")]),
                ["evaluate", "a"],
            ]
        ),
    )
    for answer in told[-3:-1]:
        assert "too large" in answer["messages"][0]["content"]
        assert answer["seconds"] < QUICK_S
    assert told[-1]["reward"] == 0.0


def test_a_result_is_bounded(inside: Inside) -> None:
    content = {"content": "line\n" * 6_000, "file_name": "final_report.pdf"}
    fill = many(("cd", {"folder": "document"}), ("echo", content))
    show = many(*[("cat", {"file_name": "final_report.pdf"})] * 64)
    _, _, shown = inside(
        "drive",
        stdin=json.dumps([["open", "a", "multi_turn_base_0"], ["step", "a", fill], ["step", "a", show]]),
    )
    assert len(shown["messages"]) == 64
    assert sum(len(message["content"]) for message in shown["messages"]) < 64 * 256 * 1024


def test_sessions_share_nothing_that_can_change(inside: Inside) -> None:
    found = inside("sharing")
    assert found["shared"] == []
    assert found["leaked"] == []
    assert found["unchanged"]
    assert found["largest"] > 100, "the walk did not reach the simulators' state"


def test_a_default_argument_does_not_leak_into_other_sessions(inside: Inside) -> None:
    post = call("post_tweet", content="hello")
    mention = call("mention", tweet_id=10, mentioned_usernames=["@one"])
    login = call("authenticate_twitter", username="john", password="john1234")
    *_, mentioned, _, _, posted = inside(
        "drive",
        stdin=json.dumps(
            [
                ["open", "a", "multi_turn_base_175"],
                *(["step", "a", step] for step in (login, post, mention)),
                ["open", "b", "multi_turn_base_175"],
                *(["step", "b", step] for step in (login, post)),
            ]
        ),
    )
    assert "successfully" in mentioned["messages"][0]["content"]
    assert json.loads(posted["messages"][0]["content"])["mentions"] == []


def test_listings_of_sets_are_sorted(inside: Inside) -> None:
    """Upstream lists sets in the order of the process's hash seed; a replay elsewhere must see the same bytes."""
    login = call("ticket_login", username="a", password="b")
    create = call("create_ticket", title="t")
    edit = call("edit_ticket", ticket_id=1, updates={"c": 1, "a": 1, "b": 1})
    flight = {"travel_date": "2026-01-01", "travel_from": "SFO", "travel_to": "LAX", "travel_class": "none"}
    commands = [
        ["open", "a", "multi_turn_base_152"],
        *(["step", "a", step] for step in (login, create, edit)),
        ["open", "b", "multi_turn_base_155"],
        ["step", "b", call("get_all_credit_cards")],
    ]
    told = inside("drive", stdin=json.dumps(commands), hash_seed=1)
    fields = json.loads(told[3]["messages"][0]["content"])["error"]
    cards = json.loads(told[5]["messages"][0]["content"])["credit_card_list"]
    book = call("book_flight", access_token="abc123xyz", card_id=min(cards), **flight)
    seen = {
        json.dumps(inside("drive", stdin=json.dumps([commands[4], ["step", "b", book]]), hash_seed=seed)[1]["messages"])
        for seed in range(1, 5)
    }
    assert fields == "Invalid fields for update: a, b, c"
    assert len(seen) == 1
    assert "'business', 'economy', 'first'" in seen.pop()


def test_ten_thousand_sessions_fit(inside: Inside) -> None:
    found = inside("density")
    assert found["kib_a_session"] < 20
    assert found["us_a_step"] < 200


def test_the_start_is_short_and_leaves_nothing_behind(inside: Inside, python: Path) -> None:
    found = inside("startup")
    assert found["tasks"] == 800
    assert found["seconds"] < 1.0
    assert found["heavy"] == []
    packages = next(python.parents[1].glob("lib/python*/site-packages"))
    assert (packages / "bfcl_eval").is_dir()
    assert not [name for name in ("result", "score", ".file_locks") if (packages / name).exists()]
