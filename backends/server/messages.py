"""What environments read of an agent's message in the same way, and what they tell it where that cannot be read."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import orjson

_THOUGHT: Final = "<think>"
_THOUGHT_ENDS: Final = "</think>"


class Said(NamedTuple):
    """An assistant message: the entries of its `tool_calls`, unread, or else its text."""

    calls: list[Any]
    text: str


def read_message(action: bytes) -> Said | str:
    """Read one OpenAI assistant message; or say, in words for the agent, what is wrong with it. Never raises."""
    try:
        message = orjson.loads(action)
    except orjson.JSONDecodeError as error:
        return f"your message is not valid JSON ({error}); send one OpenAI assistant message"
    if not isinstance(message, dict) or message.get("role", "assistant") != "assistant":
        return 'your message must be a JSON object {"role": "assistant", "content": ...}'
    if calls := message.get("tool_calls"):
        return Said(calls, "") if isinstance(calls, list) else "tool_calls must be a list of calls"
    text = _text(message.get("content"))
    return "content must be a string, a list of text parts, or null" if text is None else Said([], text)


def behind_thought(text: str, opens: str) -> int:
    """Where an answer begins: behind `</think>`, unless `opens`, with which an answer begins, stands before it."""
    end = text.find(_THOUGHT_ENDS)
    if text.lstrip().startswith(_THOUGHT):
        return len(text) if end < 0 else end + len(_THOUGHT_ENDS)
    return 0 if end < 0 or opens in text[:end] else end + len(_THOUGHT_ENDS)


def _text(content: object) -> str | None:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if len(texts) == len(parts) else None
    return None
