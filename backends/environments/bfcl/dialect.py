"""How observations are worded: as OpenAI tool messages, or as text for agents that write `<tool_call>` blocks.

The answers to a message follow the form of its calls. The option `dialect: tool_call` of `open` makes the opening text
too: the tools stand in a system message instead of the tool set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.environments.bfcl.actions import Malformed

    Messages = list[dict[str, Any]]

DIALECTS: Final = ("openai", "tool_call")

_INSTRUCTIONS: Final = """\
You can call functions. Their signatures, one JSON object a line:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and arguments between tags; several blocks make several calls:
<tool_call>
{{"name": "function", "arguments": {{"parameter": "value"}}}}
</tool_call>
The results come back between <tool_response> tags. A message without a call ends your turn."""


def results(answers: Sequence[tuple[str, str]], *, as_text: bool) -> Messages:
    """The answers to calls, given as (id of the call, text): a tool message each, or one message with a block each."""
    if not as_text:
        return [{"role": "tool", "tool_call_id": call, "content": text} for call, text in answers]
    blocks = "\n".join(f"<tool_response>\n{text}\n</tool_response>" for _, text in answers)
    return [{"role": "user", "content": blocks}]


def unreadable(message: Malformed) -> dict[str, Any]:
    """The answer to a message that could not be read at all."""
    return {"role": "user", "content": f"Error: {message.problem}"}


def _listed(tools: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(orjson.dumps(tool).decode() for tool in tools)


def opening(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Messages:
    """The first messages with the tools written into a system message, in front of the task's own if it has one."""
    prompt = _INSTRUCTIONS.format(tools=_listed(tools))
    rest = [dict(message) for message in messages]
    if rest and rest[0]["role"] == "system":
        prompt = f"{prompt}\n\n{rest.pop(0)['content']}"
    return [{"role": "system", "content": prompt}, *rest]


def with_functions(messages: Sequence[Mapping[str, Any]], added: Sequence[Mapping[str, Any]]) -> Messages:
    """A turn's messages with the functions that appear in it written in front of the first."""
    first, *rest = (dict(message) for message in messages)
    first["content"] = f"{_listed(added)}\n{first['content']}"
    return [first, *rest]
