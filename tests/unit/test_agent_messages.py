"""What all environments read of an agent's message."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.server.messages import Said, behind_thought, read_message

values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "hello"}, Said([], "hello")),
        ({"role": "assistant", "content": None}, Said([], "")),
        ({"content": [{"type": "text", "text": "It is"}, {"type": "text", "text": " so"}]}, Said([], "It is so")),
        ({"content": "unheard", "tool_calls": [7]}, Said([7], "")),
        ({"content": "heard", "tool_calls": []}, Said([], "heard")),
    ],
)
def test_calls_or_else_text(message: object, said: Said) -> None:
    assert read_message(orjson.dumps(message)) == said


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"role":"user","content":"hello"}', "must be a JSON object"),
        (b'{"tool_calls":{"name":"cd"}}', "a list of calls"),
        (b'{"content":7}', "content must be"),
        (b'{"content":[{"type":"image_url"}]}', "content must be"),
    ],
)
def test_what_cannot_be_read_is_said(action: bytes, problem: str) -> None:
    said = read_message(action)
    assert isinstance(said, str)
    assert problem in said


@given(st.binary(max_size=20) | values.map(orjson.dumps) | st.builds(lambda c: orjson.dumps({"content": c}), values))
def test_anything_can_be_read(action: bytes) -> None:
    read_message(action)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("go", "go"),
        ("<think>why</think>go", "go"),
        ("why</think>go", "go"),
        ("<think>never ends", ""),
        ("[call </think>]", "[call </think>]"),
    ],
)
def test_an_answer_stands_behind_the_thought(text: str, answer: str) -> None:
    assert text[behind_thought(text, "[") :] == answer
