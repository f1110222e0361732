"""What the terminal is shown: hostile text made harmless, calls spelled out, durations and counts for people."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli.conversation import CUT, message, spelled
from orchestrator.cli.output import counts, duration, printable


@given(st.text())
def test_nothing_that_moves_the_cursor_or_hides_gets_through(text: str) -> None:
    shown = printable(text)
    categories = {unicodedata.category(char) for char in shown if char not in "\n\t"}
    assert not {name for name in categories if name[0] == "C" or name in {"Zl", "Zp"}}
    shown.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [red]text[/]", "plain [red]text[/]"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\u202eb", "a\\u202eb"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("größe 漢字\n\t", "größe 漢字\n\t"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        ({"function": {"name": "cd", "arguments": '{"folder": "a b", "n": 1}'}}, 'cd(folder="a b", n=1)'),
        ({"function": {"name": "ls", "arguments": "{}"}}, "ls()"),
        ({"function": {"name": "ls", "arguments": "{broken"}}, "ls({broken)"),
        ({"function": {"name": "ls", "arguments": "[1]"}}, "ls([1])"),
        ({"function": {"name": "ls"}}, '{"function":{"name":"ls"}}'),
        ("what", '"what"'),
    ],
)
def test_a_call_is_spelled_out_or_shown_as_it_is(call: object, shown: str) -> None:
    assert spelled(call) == shown


def test_a_message_is_a_heading_its_text_and_its_calls() -> None:
    call = {"function": {"name": "rm", "arguments": '{"name":"\x1b"}'.replace("\x1b", "\\u001b")}}
    lines = [
        text.plain for text in message({"role": "assistant", "content": "one\ntwo", "tool_calls": [call]}, note="n")
    ]
    assert lines == ["assistant  n", "  one\n  two", '  rm(name="\\u001b")']


def test_a_long_text_is_cut_unless_all_is_asked_for() -> None:
    body = {"role": "tool", "content": "x" * (CUT + 5)}
    assert "... 5 characters more: --full shows all" in [text.plain for text in message(body)][1]
    assert [text.plain for text in message(body, full=True)][1] == "  " + "x" * (CUT + 5)


@given(st.recursive(st.none() | st.integers(-9, 9) | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_no_message_is_too_malformed_to_show(body: object) -> None:
    assert list(message({"role": body, "content": body, "tool_calls": body}))


def test_durations_and_counts() -> None:
    assert [duration(value) for value in (0, 59.94, 61, 7384)] == ["0.0 s", "59.9 s", "1:01", "2:03:04"]
    assert counts({"completed": 1234, "truncated": 0, "cancelled": 2}) == "completed 1,234, cancelled 2"
