"""Tools and calls as text, for agents that write `<tool_call>` blocks. Pure.

An environment of this project gives its tools as a tool set and answers OpenAI tool calls. Here the tools stand in a
system message, a message's blocks become its tool calls, and the answers to those come back as `<tool_response>`
blocks. A message with a block that cannot be read is left as it is: the environment says what is wrong with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

from orchestrator.records import parse_observation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Message = dict[str, Any]

OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_THOUGHT: Final = "<think>"
_THOUGHT_ENDS: Final = "</think>"

_PROMPT: Final = """\
You can call functions to answer the user. Here is one JSON object for each function:
<tools>
{tools}
</tools>
Write each call as a JSON object with the function's name and its arguments, in a block of its own:
<tool_call>
{{"name": "function", "arguments": {{"parameter": "value"}}}}
</tool_call>"""


def opening(body: bytes, tools: Sequence[Any]) -> list[Message]:
    """The first state: the task's messages, behind a system message with the tools where there are any."""
    messages: list[Message] = [dict(message) for message in parse_observation(body)["messages"]]
    if not tools:
        return messages
    prompt = _PROMPT.format(tools=_listed(tools))
    if messages and messages[0].get("role") == "system":
        prompt = f"{messages.pop(0).get('content', '')}\n\n{prompt}"
    return [{"role": "system", "content": prompt}, *messages]


def called(message: Mapping[str, Any]) -> Message | None:
    """The message with the blocks of its text as tool calls; None where it has none, or one that cannot be read."""
    text = message.get("content")
    if not isinstance(text, str) or message.get("tool_calls") or _THOUGHT in text or _THOUGHT_ENDS in text:
        return None  # what counts behind a thought is for the environment to say
    before, *blocks = text.split(OPEN)
    calls, rest = [], [before]
    for number, block in enumerate(blocks):
        inside, closed, behind = block.partition(_CLOSE)
        call = _read(inside) if closed else None
        if call is None:
            return None
        function = {"name": call["name"], "arguments": orjson.dumps(call["arguments"]).decode()}
        calls.append({"id": f"call_{number}", "type": "function", "function": function})
        rest.append(behind)
    if not calls:
        return None
    return {"role": "assistant", **message, "content": "".join(rest).strip(), "tool_calls": calls}


def _read(block: str) -> Message | None:
    try:
        call = orjson.loads(block.strip())
    except orjson.JSONDecodeError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    return call if isinstance(call.get("arguments"), dict) else None


def responses(messages: Sequence[Message]) -> list[Message]:
    """Results of tool calls as one message of the user's with a block each; other messages as they are."""
    results = [message for message in messages if message.get("role") == "tool"]
    if not results:
        return list(messages)
    blocks = "\n".join(f"<tool_response>\n{message.get('content')}\n</tool_response>" for message in results)
    others = [message for message in messages if message.get("role") != "tool"]
    return [{"role": "user", "content": blocks}, *others]


def with_functions(messages: Sequence[Message], added: Sequence[Any]) -> list[Message]:
    """The functions that appear now, in front of the first text of the user."""
    first = next(
        (n for n, m in enumerate(messages) if m.get("role") == "user" and isinstance(m.get("content"), str)), None
    )
    if first is None:
        return [*messages, {"role": "user", "content": _listed(added)}]
    message = messages[first]
    text = f"{_listed(added)}\n{message['content']}"
    return [*messages[:first], {**message, "content": text}, *messages[first + 1 :]]


def _listed(tools: Sequence[Any]) -> str:
    return "\n".join(orjson.dumps(tool).decode() for tool in tools)
