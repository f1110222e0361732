"""What is read out of an agent's message, and what it is told where nothing can be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.environments.appworld.actions import MAX_CALLS, MAX_CODE, Call, Malformed, Message, read


def says(content: Any) -> bytes:
    return json.dumps({"role": "assistant", "content": content}).encode()


def calls(*entries: Any) -> bytes:
    return json.dumps({"role": "assistant", "content": None, "tool_calls": list(entries)}).encode()


def call(arguments: Any, *, name: str = "appworld", number: str = "c1") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("I begin.\n```python\nx = 1\nprint(x)\n```\nThat is all.", "x = 1\nprint(x)\n"),
        ("```python\nfirst()\n```\n```python\nsecond()\n```", "first()\n"),
        ("```python\nnot_closed()", "not_closed()"),
        ("```py\nx\n```", "x\n"),
        ("```\nx\n```", "x\n"),
        ("```python\nprint(1)```", "print(1)"),
        ("```python\nprint('```')\n```", "print('```')\n"),
        ("```python\r\nx\r\n```", "x\r\n"),
        ("<think>```python\nno()\n```</think>\n```python\nyes()\n```", "yes()\n"),
        ("a thought</think>```python\nyes()\n```", "yes()\n"),
        ("```python\nprint('</think>')\n```", "print('</think>')\n"),
    ],
)
def test_the_first_block_of_a_text_is_its_code(text: str, code: str) -> None:
    for bare in (False, True):
        assert read(says(text), bare=bare) == Message([Call("", code)], as_text=True)
    assert read(says([{"type": "text", "text": text}]), bare=False) == Message([Call("", code)], as_text=True)


def test_text_alone_is_code_where_it_may_be() -> None:
    assert read(says("print(1)"), bare=True) == Message([Call("", "print(1)")], as_text=True)
    for empty in ("", "  \n", None, "<think>only a thought"):
        assert isinstance(read(says(empty), bare=True), Malformed)
    refused = read(says("print(1)"), bare=False)
    assert isinstance(refused, Malformed)
    assert "Write one block of Python" in refused.problem


def test_tool_calls_are_read_in_order_also_where_they_lie_flat() -> None:
    flat = {"index": 0, "name": "appworld", "arguments": '{"code": "b"}'}
    message = read(calls(call('{"code": "a"}'), flat, call({"code": "c"}, number="")), bare=False)
    assert message == Message([Call("c1", "a"), Call("call_1", "b"), Call("call_2", "c")], as_text=False)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (call('{"code": "a"}', name="python"), "the only one is appworld"),
        (call("{"), "not valid JSON"),
        (call("[]"), 'must be {"code"'),
        (call('{"code": 5}'), 'must be {"code"'),
        (call(json.dumps({"code": "x" * (MAX_CODE + 1)})), "at most 100,000"),
        ({"id": "c1", "function": 5}, "a tool call must be"),
    ],
)
def test_a_call_that_cannot_be_read_is_answered_by_its_id(entry: dict[str, Any], told: str) -> None:
    message = read(calls(entry, call('{"code": "a"}', number="c2")), bare=False)
    assert isinstance(message, Message)
    assert isinstance(message.calls[0], Malformed)
    assert message.calls[0].id == "c1"
    assert told in message.calls[0].problem
    assert message.calls[1] == Call("c2", "a")


def test_bounds() -> None:
    many = read(calls(*(call('{"code": "a"}', number=f"c{n}") for n in range(MAX_CALLS + 2))), bare=False)
    assert isinstance(many, Message)
    assert [isinstance(entry, Call) for entry in many.calls] == [True] * MAX_CALLS + [False] * 2
    long = read(says("```python\n" + "x" * (MAX_CODE + 1) + "\n```"), bare=False)
    assert isinstance(long, Malformed)
    assert "100,000 a message" in long.problem


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": st.just("assistant") | json_values,
        "content": json_values | st.text(alphabet="`python\n</think> x", max_size=40),
        "tool_calls": json_values | st.lists(json_values, max_size=3),
    },
)


@given(st.binary(max_size=40) | (messages | json_values).map(lambda value: json.dumps(value).encode()), st.booleans())
def test_whatever_is_sent_is_read(action: bytes, bare: bool) -> None:
    message = read(action, bare=bare)
    assert isinstance(message, Malformed) or message.calls
