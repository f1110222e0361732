"""Reading an agent's message, whatever it is: in process, since it needs nothing of upstream."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import assume, example
from hypothesis import given as forall
from hypothesis import strategies as st

from backends.environments.bfcl import actions
from backends.environments.bfcl.actions import Call, Malformed, Message, read

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
arguments = st.dictionaries(st.text(min_size=1, max_size=8), values, max_size=4)
names = st.text(min_size=1, max_size=actions.MAX_NAME)
functions = st.lists(st.tuples(names, arguments), min_size=1, max_size=6)


def encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def said(message: Message | Malformed) -> list[tuple[str, Any]]:
    assert isinstance(message, Message)
    assert all(isinstance(call, Call) for call in message.calls)
    return [(call.name, call.arguments) for call in message.calls if isinstance(call, Call)]


@forall(functions)
@example([("echo", {"content": "</think> and <tool_call>"})])
def test_both_forms_of_a_call_say_the_same(calls: list[tuple[str, Any]]) -> None:
    entries = [{"id": "x", "function": {"name": name, "arguments": json.dumps(given)}} for name, given in calls]
    blocks = [f"<tool_call>{json.dumps({'name': name, 'arguments': given})}</tool_call>" for name, given in calls]
    assume(not any("</tool_call>" in block[:-12] for block in blocks))
    by_field = read(encode({"role": "assistant", "content": "let me see", "tool_calls": entries}))
    by_text = read(encode({"role": "assistant", "content": "let me see\n" + "\nand ".join(blocks)}))
    assert said(by_field) == said(by_text) == calls
    for message in (by_field, by_text):
        assert isinstance(message, Message)
        assert [json.loads(call.source) for call in message.calls if isinstance(call, Call)] == [a for _, a in calls]


@forall(st.binary(max_size=64) | values.map(encode))
@example(b'{"role": "assistant", "content": [{"type": "text"}]}')
@example(b'{"tool_calls": [{"function": {"name": "a", "arguments": 1}}]}')
@example(b'{"content": "<tool_call>{\\"name\\": \\"a\\", \\"arguments\\": \\"{\\"}</tool_call>"}')
def test_nothing_makes_the_reader_raise(action: bytes) -> None:
    message = read(action)
    if isinstance(message, Malformed):
        assert message.problem


@forall(st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), values))
def test_no_object_makes_the_reader_raise(message: dict[str, Any]) -> None:
    assert isinstance(read(encode({"role": "assistant", **message})), Message | Malformed)


def one(**function: Any) -> Call | Malformed:
    message = read(encode({"tool_calls": [{"id": "x", "function": function}]}))
    assert isinstance(message, Message)
    return message.calls[0]


def test_arguments_may_be_missing_or_an_object() -> None:
    given: Any
    for given in (None, "", "{}", {}):
        call = one(name="ls", arguments=given)
        assert isinstance(call, Call)
        assert (call.arguments, json.loads(call.source)) == ({}, {})
    assert isinstance(one(name="ls"), Call)


def test_text_parts_are_joined_and_thoughts_left_out() -> None:
    block = '<tool_call>{"name": "ls", "arguments": {}}</tool_call>'
    parts = [{"type": "text", "text": block[:20]}, {"type": "text", "text": block[20:]}]
    assert said(read(encode({"role": "assistant", "content": parts}))) == [("ls", {})]
    assert said(read(encode({"content": f"<think>a <tool_call> would do</think>{block}"}))) == [("ls", {})]
    assert said(read(encode({"content": f"a plan</think>{block}"}))) == [("ls", {})]
    assert said(read(encode({"content": f"<think>{block}"}))) == []
    assert said(read(encode({"content": None}))) == []


def test_bounds_are_per_message() -> None:
    entry = {"id": "x", "function": {"name": "ls", "arguments": "{}"}}
    message = read(encode({"tool_calls": [entry] * (actions.MAX_CALLS + 1)}))
    assert isinstance(message, Message)
    assert [type(call) for call in message.calls] == [Call] * actions.MAX_CALLS + [Malformed]

    half = {"id": "x", "function": {"name": "echo", "arguments": json.dumps({"content": "x" * 30_000})}}
    message = read(encode({"tool_calls": [half, half, half, entry]}))
    assert isinstance(message, Message)
    assert [type(call) for call in message.calls] == [Call, Call, Malformed, Malformed]


def test_depth_is_bounded_exactly() -> None:
    def nested(depth: int) -> str:
        return '{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"

    assert isinstance(one(name="f", arguments=nested(actions.MAX_DEPTH)), Call)
    assert isinstance(one(name="f", arguments=nested(actions.MAX_DEPTH + 1)), Malformed)
