"""Chat completions on the wire: bodies joined from recorded bytes, and every shape of reply."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from orchestrator.errors import UsageError
from orchestrator.records import ConversationView, EpisodeBuffer, header
from orchestrator.types import Decision, Observation
from policies.agents.completions import BadReply, Dialect, Requests, error_message, read_completion

TOOL = {"type": "function", "function": {"name": "ls", "parameters": {"type": "object", "properties": {}}}}
LATE = {"type": "function", "function": {"name": "mv", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "ls", "arguments": "{}"}}


def a_view(*openings: dict[str, Any], tools: bool = True) -> tuple[EpisodeBuffer, ConversationView]:
    buffer = EpisodeBuffer(header("toy", "0" * 16))
    body: dict[str, Any] = {"messages": list(openings) or [{"role": "user", "content": "häng on"}]}
    if tools:
        body["tools"] = "set"
    buffer.observe(Observation(orjson.dumps(body)))
    return buffer, ConversationView(buffer, {"set": orjson.dumps([TOOL])})


def requested(view: ConversationView, dialect: Dialect = Dialect.OPENAI, seed: int | None = None) -> dict[str, Any]:
    body: dict[str, Any] = orjson.loads(Requests("m", {"temperature": 0.5}, dialect).body(view, seed))
    return body


def reply(message: object, **changes: object) -> bytes:
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return orjson.dumps({"model": "m-1", "choices": [choice], "usage": {"prompt_tokens": 7}, **changes})


class TestRequests:
    def test_the_opening(self) -> None:
        _, view = a_view()
        assert requested(view, seed=9) == {
            "model": "m",
            "temperature": 0.5,
            "seed": 9,
            "messages": [{"role": "user", "content": "häng on"}],
            "tools": [TOOL],
        }

    def test_the_conversation_and_tools_added_later(self) -> None:
        buffer, view = a_view()
        requested(view)
        action = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        result = {"role": "tool", "tool_call_id": "c1", "content": "a.txt"}
        buffer.decide(Decision(orjson.dumps(action)))
        buffer.observe(Observation(orjson.dumps({"messages": [result], "tools_added": [LATE]})))
        body = requested(view)
        assert body["messages"][1:] == [action, result]
        assert body["tools"] == [TOOL, LATE] == view.tools()
        assert "seed" not in body

    def test_no_tools_no_field(self) -> None:
        for dialect in Dialect:
            _, view = a_view(tools=False)
            assert requested(view, dialect).keys() == {"model", "temperature", "messages"}

    def test_added_tools_alone(self) -> None:
        buffer, view = a_view(tools=False)
        buffer.observe(Observation(orjson.dumps({"messages": [], "tools_added": [LATE]})))
        assert requested(view)["tools"] == [LATE]

    def test_text_dialect_makes_a_system_message(self) -> None:
        _, view = a_view()
        body = requested(view, Dialect.TOOL_CALL)
        assert "tools" not in body
        system, user = body["messages"]
        assert system["role"] == "system"
        assert orjson.dumps([TOOL]).decode() in system["content"]
        assert '<tool_call>\n{"name": ' in system["content"]
        assert user == {"role": "user", "content": "häng on"}

    def test_text_dialect_extends_a_system_message(self) -> None:
        _, view = a_view({"role": "system", "content": "Be brief."}, {"role": "user", "content": "list"})
        system, user = requested(view, Dialect.TOOL_CALL)["messages"]
        assert system["content"].startswith("Be brief.\n\nYou can call functions.")
        assert user["content"] == "list"

    @pytest.mark.parametrize("field", ["model", "messages", "tools", "seed", "stream", "n"])
    def test_extra_fields_that_are_not_the_users(self, field: str) -> None:
        with pytest.raises(UsageError, match=f"may not set {field}"):
            Requests("m", {field: 1}, Dialect.OPENAI)

    def test_extra_fields_that_are_not_json(self) -> None:
        with pytest.raises(UsageError, match="must be JSON"):
            Requests("m", {"top_k": object()}, Dialect.OPENAI)


class TestReplies:
    def test_the_message_is_reduced(self) -> None:
        message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [CALL],
            "reasoning_content": "hm",
            "annotations": [],
            "function_call": None,
        }
        read = read_completion(reply(message, usage={"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}))
        assert orjson.loads(read.action) == {"role": "assistant", "content": None, "tool_calls": [CALL]}
        assert read[1:] == ("stop", "m-1", 7, 3)

    def test_reasoning_is_kept_when_asked_for(self) -> None:
        read = read_completion(
            reply({"content": "4", "reasoning": "2+2", "reasoning_content": ""}), keep_reasoning=True
        )
        assert orjson.loads(read.action) == {"role": "assistant", "content": "4", "reasoning": "2+2"}

    @pytest.mark.parametrize(
        ("message", "kept"),
        [
            ({"content": "hi", "tool_calls": []}, {"content": "hi"}),
            ({"content": "hi", "tool_calls": None}, {"content": "hi"}),
            ({"content": None}, {"content": ""}),
            ({}, {"content": ""}),
            ({"content": None, "refusal": "I will not."}, {"content": "I will not."}),
            ({"content": "part", "refusal": None}, {"content": "part"}),
            ({"content": [{"type": "text", "text": "hi"}]}, {"content": [{"type": "text", "text": "hi"}]}),
        ],
    )
    def test_odd_but_usable(self, message: dict[str, Any], kept: dict[str, Any]) -> None:
        assert orjson.loads(read_completion(reply(message)).action) == {"role": "assistant", **kept}

    def test_a_cut_answer_keeps_its_broken_arguments(self) -> None:
        cut = {**CALL, "function": {"name": "ls", "arguments": '{"a": tr'}}
        choice = {"message": {"content": None, "tool_calls": [cut]}, "finish_reason": "length"}
        read = read_completion(orjson.dumps({"choices": [choice]}))
        assert orjson.loads(read.action)["tool_calls"] == [cut]
        assert read[1:] == ("length", "", 0, 0)

    @pytest.mark.parametrize(
        "usage", [None, [], {"prompt_tokens": "7"}, {"prompt_tokens": True}, {"prompt_tokens": -1}]
    )
    def test_usage_that_is_none(self, usage: object) -> None:
        assert read_completion(reply({"content": ""}, usage=usage)).prompt_tokens == 0

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            (b"", "not JSON"),
            (b'{"choices": [{"mess', "not JSON"),
            (b"<html>\n 502 </html>", "<html> 502 </html>"),
            (b"[]", "no choices"),
            (b'{"choices": []}', "no choices"),
            (b'{"error": {"message": "overloaded"}}', "no choices: overloaded"),
            (b'{"choices": [null]}', "no message"),
            (b'{"choices": [{"message": null}]}', "no message"),
            (b'{"choices": [{"message": {"tool_calls": {}}}]}', "not a list of objects"),
            (b'{"choices": [{"message": {"tool_calls": ["ls"]}}]}', "not a list of objects"),
        ],
    )
    def test_what_is_no_completion(self, body: bytes, said: str) -> None:
        with pytest.raises(BadReply, match=said):
            read_completion(body)

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            (b'{"error": {"message": "too long", "code": 1}}', "too long"),
            (b'{"error": "no model"}', "no model"),
            (b'{"object": "error", "message": "bad"}', "bad"),
            (b'{"detail": "Not Found"}', "Not Found"),
            (b'{"detail": [1]}', '{"detail": [1]}'),
            (b"plain\n\ttext", "plain text"),
            (b"\xff", "\ufffd"),
            (b"[1]", "[1]"),
        ],
    )
    def test_where_servers_say_what_is_wrong(self, body: bytes, said: str) -> None:
        assert error_message(body) == said
