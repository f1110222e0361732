"""An episode as an agent sees it: openings, turns, held-out functions, unreadable messages, the limit of steps."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Inside

ADDED = "I have updated some more functions you can choose from. What about now?"


def text(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def blocks(*calls: dict[str, Any]) -> dict[str, str]:
    return text("\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls))


def calls(*functions: tuple[str, str]) -> dict[str, Any]:
    entries = [
        {"id": f"id_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(functions)
    ]
    return {"role": "assistant", "content": None, "tool_calls": entries}


def block(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


DEMONSTRATION = [
    blocks(
        block("cd", folder="document"),
        block("mkdir", dir_name="temp"),
        block("mv", source="final_report.pdf", destination="temp"),
    ),
    text("ok.1"),
    blocks(block("cd", folder="temp"), block("grep", file_name="final_report.pdf", pattern="budget analysis")),
    text("ok.2"),
    blocks(block("sort", file_name="final_report.pdf")),
    text("ok.2"),
    blocks(
        block("cd", folder=".."),
        block("mv", source="previous_report.pdf", destination="temp"),
        block("cd", folder="temp"),
        block("diff", file_name1="final_report.pdf", file_name2="previous_report.pdf"),
    ),
    text("ok.2"),
]
"""A conversation in the text dialect that solves multi_turn_base_0."""


def drive(inside: Inside, *commands: Any) -> list[Any]:
    told: list[Any] = inside("drive", stdin=json.dumps(commands))
    return told


@pytest.mark.parametrize("options", [{}, {"dialect": "tool_call"}])
def test_a_conversation_in_text_is_worth_one(inside: Inside, options: dict[str, str]) -> None:
    opening, *told, grade, again = drive(
        inside,
        ["open", "a", "multi_turn_base_0", options],
        *(["step", "a", action] for action in DEMONSTRATION),
        ["evaluate", "a", {"sparse": True}],
        ["evaluate", "a"],
    )
    assert opening["messages"][-1]["role"] == "user"
    assert [reply["done"] for reply in told] == [False] * 7 + [True]
    assert [reply["reward"] for reply in told] == [0.0] * 7 + [1.0]
    assert [[m["role"] for m in reply["messages"]] for reply in told] == [["user"]] * 7 + [[]]
    answers = told[0]["messages"][0]["content"]
    assert answers.count("<tool_response>\n") == answers.count("\n</tool_response>") == 3
    assert '{"current_working_directory": "document"}' in answers
    assert grade == again
    assert grade["reward"] == 1.0
    assert grade["turns"] == [{"calls": n, "verdict": "valid"} for n in (3, 2, 1, 4)]


def test_results_of_tool_calls_are_tool_messages(inside: Inside) -> None:
    _, told = drive(
        inside,
        ["open", "a", "multi_turn_base_0"],
        ["step", "a", calls(("cd", '{"folder": "document"}'), ("ls", ""), ("cd", '{"folder": "nowhere"}'))],
    )
    assert [(m["role"], m["tool_call_id"]) for m in told["messages"]] == [("tool", f"id_{n}") for n in range(3)]
    assert json.loads(told["messages"][0]["content"]) == {"current_working_directory": "document"}
    assert "error" in json.loads(told["messages"][2]["content"])


def test_the_opening_names_its_tools(inside: Inside) -> None:
    asked = ["multi_turn_base_0", "multi_turn_long_context_0", "multi_turn_miss_func_0", "simple_python_1"]
    told = drive(inside, *(c for task in asked for c in (["open", task, task], ["toolset", task])))
    openings, toolsets = told[::2], told[1::2]
    assert [o["tools"] for o in openings] == [t["digest"] for t in toolsets]
    base, long_context, miss_func, single = toolsets
    assert base["identity"] == long_context["identity"] != miss_func["identity"]
    names = [tool["function"]["name"] for tool in base["tools"]]
    assert {"cd", "post_tweet"} < set(names)
    assert [n for n in names if n != "sort"] == [tool["function"]["name"] for tool in miss_func["tools"]]
    assert [tool["function"]["name"] for tool in single["tools"]] == ["math_factorial"]
    assert single["tools"][0]["type"] == "function"
    assert single["tools"][0]["function"]["parameters"]["type"] == "object"


def test_every_tool_can_be_sent_to_an_endpoint(inside: Inside) -> None:
    problems = inside("toolsets")
    assert problems == {"sets": 4747, "without": 4, "bad_names": [], "bad_schemas": []}


def test_held_out_functions_appear_at_their_turn(inside: Inside) -> None:
    solution = drive(inside, ["solution", "multi_turn_miss_func_0"])[0]
    told = drive(
        inside,
        *(["open", name, "multi_turn_miss_func_0", {"dialect": name}] for name in ("openai", "tool_call")),
        *(["step", name, action] for name in ("openai", "tool_call") for action in solution),
    )[2:]
    openai, in_text = told[: len(solution)], told[len(solution) :]
    (turn,) = [reply for reply in openai if "tools_added" in reply]
    assert turn["messages"] == [{"role": "user", "content": ADDED}]
    assert [tool["function"]["name"] for tool in turn["tools_added"]] == ["sort"]
    described = in_text[openai.index(turn)]
    assert "tools_added" not in described
    assert described["messages"][0]["content"].endswith("\n" + ADDED)
    assert json.loads(described["messages"][0]["content"].split("\n")[0]) == turn["tools_added"][0]
    assert openai[-1]["reward"] == in_text[-1]["reward"] == 1.0


def test_the_first_turn_comes_whole(inside: Inside) -> None:
    task = "live_irrelevance_125-11-0"
    live, with_tools, bare = drive(
        inside,
        ["open", "a", task],
        ["open", "b", task, {"dialect": "tool_call"}],
        ["open", "c", "multi_turn_base_0", {"dialect": "tool_call"}],
    )
    assert [m["role"] for m in live["messages"]] == ["system", "user", "assistant", "user"]
    first, *rest = with_tools["messages"]
    assert first["content"].endswith("\n\n" + live["messages"][0]["content"])
    assert rest == live["messages"][1:]
    assert [m["role"] for m in bare["messages"]] == ["system", "user"]
    assert "tools" not in bare
    assert '"name":"cd"' in bare["messages"][0]["content"]


UNREADABLE = [
    ("{", "not valid JSON"),
    ("[]", "JSON object"),
    ('"cd"', "JSON object"),
    ("\ud800", "not valid JSON"),
    ({"role": "user", "content": "hello"}, "assistant"),
    ({"role": "assistant", "content": 7}, "content must be"),
    ({"role": "assistant", "tool_calls": {"name": "cd"}}, "tool_calls must be a list"),
    ({"role": "assistant", "tool_calls": ["cd"]}, "a tool call must be"),
    (calls(("cd", '{"folder": "document"')), "not valid JSON"),
    (calls(("cd", '["document"]')), "must be a JSON object"),
    (calls(("", "{}")), 'needs a "name"'),
    (calls(("n" * 1000, "{}")), 'needs a "name"'),
    (text('<tool_call>{"name": "cd", "arguments": {"folder": }</tool_call>'), "not valid JSON"),
    (text('<tool_call>{"name": "cd", "arguments": {"folder": "document"}}'), "not closed"),
    (text("<tool_call>cd document</tool_call>"), "not valid JSON"),
    (text("<tool_call>[1]</tool_call>"), "one JSON object"),
    (text('<tool_call>{"arguments": {}}</tool_call>'), 'needs a "name"'),
]


def test_what_cannot_be_read_is_answered_and_ends_no_turn(inside: Inside) -> None:
    told = drive(
        inside,
        *(
            command
            for number, (action, _) in enumerate(UNREADABLE)
            for command in (
                ["open", str(number), "multi_turn_base_0"],
                ["step", str(number), action],
                *(["step", str(number), step] for step in DEMONSTRATION),
            )
        ),
    )
    length = 2 + len(DEMONSTRATION)
    for number, (_, problem) in enumerate(UNREADABLE):
        _, answer, *_, last = told[number * length : (number + 1) * length]
        (message,) = answer["messages"]
        assert message["content"].removeprefix("<tool_response>\n").startswith("Error: "), message
        assert problem in message["content"]
        assert (answer["done"], answer["reward"]) == (False, 0.0)
        assert (last["done"], last["reward"]) == (True, 1.0), problem


def test_a_bad_call_stops_none_of_its_neighbours(inside: Inside) -> None:
    action = calls(("cd", '{"folder": "document"}'), ("mkdir", "{"), ("pwd", "{}"))
    _, told = drive(inside, ["open", "a", "multi_turn_base_0"], ["step", "a", action])
    contents = [message["content"] for message in told["messages"]]
    assert [message["tool_call_id"] for message in told["messages"]] == ["id_0", "id_1", "id_2"]
    assert contents[1].startswith("Error: the arguments are not valid JSON")
    assert "document" in contents[2]


@pytest.mark.parametrize("action", [calls(("pwd", "{}")), "{"], ids=["calls", "unreadable"])
def test_the_step_beyond_the_limit_ends_the_episode(inside: Inside, action: Any) -> None:
    _, *told, grade = drive(
        inside, ["open", "a", "multi_turn_base_0"], *[["step", "a", action]] * 21, ["evaluate", "a"]
    )
    assert [reply["done"] for reply in told] == [False] * 20 + [True]
    assert told[-1]["reward"] == grade["reward"] == 0.0
    assert len(told[-1]["messages"]) == 1


def test_the_limit_counts_anew_in_every_turn(inside: Inside) -> None:
    steps = [["step", "a", calls(("pwd", "{}"))]] * 20
    _, *told = drive(
        inside, ["open", "a", "multi_turn_base_0"], *steps, ["step", "a", text("next")], *steps, ["evaluate", "a"]
    )
    assert not any(reply["done"] for reply in told[:-1])


def test_grades_in_the_middle_change_nothing_and_say_what_is_missing(inside: Inside) -> None:
    plain, watched = (["open", name, "multi_turn_base_0"] for name in "ab")
    told = drive(
        inside,
        plain,
        *(["step", "a", action] for action in DEMONSTRATION),
        watched,
        *(c for action in DEMONSTRATION for c in (["evaluate", "b"], ["evaluate", "b"], ["step", "b", action])),
    )
    count = 1 + len(DEMONSTRATION)
    undisturbed, rest = told[1:count], told[count + 1 :]
    bodies = [{k: v for k, v in reply.items() if k != "seconds"} for reply in rest[2::3]]
    assert bodies == [{k: v for k, v in reply.items() if k != "seconds"} for reply in undisturbed]
    assert rest[0::3] == rest[1::3]
    start, half = rest[0], rest[9]
    assert (start["reward"], start["error_type"]) == (0.0, "multi_turn:empty_turn_model_response")
    assert [turn["verdict"] for turn in start["turns"][1:]] == ["not_checked"] * 3
    assert (half["reward"], half["error_type"]) == (0.0, "multi_turn:force_terminated")
    assert [turn["verdict"] for turn in half["turns"]] == ["valid", "valid", "not_checked", "not_checked"]


def test_a_wrong_state_names_the_turn(inside: Inside) -> None:
    spoiled = [DEMONSTRATION[0], text("done"), *DEMONSTRATION[3:]]
    *_, last, grade = drive(
        inside, ["open", "a", "multi_turn_base_0"], *(["step", "a", a] for a in spoiled), ["evaluate", "a"]
    )
    assert (last["done"], last["reward"]) == (True, 0.0)
    assert grade["error_type"] == "multi_turn:empty_turn_model_response"
    assert grade["turns"][1] == {"calls": 0, "verdict": "multi_turn:empty_turn_model_response"}
    assert re.search(r"turn 1", grade["error_message"])


def test_unknown_parameters_of_evaluate_are_refused(inside: Inside) -> None:
    for task in ("multi_turn_base_0", "simple_python_0"):
        _, told = drive(inside, ["open", "a", task], ["evaluate", "a", {"dense": True}])
        assert told["fault"] == "bad_request"
        assert "dense" in told["message"]


@pytest.mark.parametrize("task", ["simple_python_0", "irrelevance_0", "live_relevance_0-0-0"])
def test_an_unreadable_single_answer_is_wrong_everywhere(inside: Inside, task: str) -> None:
    _, before, told, grade = drive(
        inside,
        ["open", "a", task],
        ["evaluate", "a"],
        ["step", "a", calls(("anything", "{"))],
        ["evaluate", "a"],
    )
    assert before["reward"] == 0.0
    assert (told["done"], told["reward"]) == (True, 0.0)
    assert told["messages"][0]["content"].startswith("Error: ")
    assert grade["error_type"] == "ast_decoder:decoder_failed"


def test_single_answers_may_name_functions_with_dots(inside: Inside) -> None:
    (action,) = drive(inside, ["solution", "simple_python_1"])[0]
    function = action["tool_calls"][0]["function"]
    dotted = block("math.factorial", **json.loads(function["arguments"]))
    _, told = drive(inside, ["open", "a", "simple_python_1"], ["step", "a", blocks(dotted)])
    assert function["name"] == "math_factorial"
    assert told["reward"] == 1.0


@pytest.mark.parametrize("task", ["simple_python_1", "multiple_0", "parallel_0"])
def test_details_do_not_give_the_answer_away(inside: Inside, task: str) -> None:
    ((action,),) = drive(inside, ["solution", task])
    functions = [entry["function"] for entry in action["tool_calls"]]
    wrong = [(f["name"], json.dumps(dict.fromkeys(json.loads(f["arguments"]), 987654))) for f in functions]
    *_, grade = drive(inside, ["open", "a", task], ["step", "a", calls(*wrong)], ["evaluate", "a"])
    assert grade["reward"] == 0.0
    assert grade["error_type"]
    assert grade["error_message"]
    assert "Expected one of" not in grade["error_message"]
    assert "possible_answer_item" not in grade["error_message"]
