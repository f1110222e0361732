"""What the scripts share: an environment, and playing answers in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from backends.environments.bfcl.inside import environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ENVIRONMENT = environment()
SAY_DONE = json.dumps({"role": "assistant", "content": "done"}).encode()

Answer = list[list[list[dict[str, Any]]]]
"""Calls `{"name", "arguments"}` by turn and step."""


def tool_calls(calls: Sequence[dict[str, Any]]) -> bytes:
    """An assistant message with these calls."""
    entries = [
        {
            "id": f"id_{number}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"])},
        }
        for number, call in enumerate(calls)
    ]
    return json.dumps({"role": "assistant", "content": None, "tool_calls": entries}).encode()


def text_calls(*blocks: str) -> bytes:
    """An assistant message with these blocks in its text."""
    content = "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)
    return json.dumps({"role": "assistant", "content": content}).encode()


def actions(answer: Answer) -> Iterator[bytes]:
    """The messages of an answer: a message for each step, and one that ends each turn."""
    for turn in answer:
        for step in turn:
            yield tool_calls(step)
        yield SAY_DONE


def verdict(task: str, answer: Answer) -> list[Any]:
    """Play an answer to its end; `[valid, error_type]`."""
    session, reply = ENVIRONMENT.open(task, 0, {})
    for action in actions(answer):
        reply = session.step(action)
    grade = session.evaluate({})
    assert reply.done
    assert grade.reward == reply.reward == float(grade.details["valid"])
    return [grade.details["valid"], grade.details.get("error_type")]
