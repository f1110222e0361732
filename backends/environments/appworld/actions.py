"""What an agent's message asks to be run: Python in a fenced block, or in calls of the tool `appworld`. Pure.

A message's calls are its OpenAI `tool_calls`, of which each one's arguments hold `code`; they may also lie flat in the
entry, as some clients of AgentScope send them. Else the code is the first fenced block of the text behind any thought,
closed or not; where the text is taken as code (`bare`), it may also be the whole of it. What cannot be read becomes a
`Malformed`, whose text tells the agent what to send. Bounds: MAX_CALLS calls a message, MAX_CODE characters a call.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from backends.server.environment import Toolset
from backends.server.messages import behind_thought, read_message

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_CALLS: Final = 16
MAX_CODE: Final = 100_000
TOOL: Final = "appworld"
TOOLSET: Final = Toolset(
    [
        {
            "type": "function",
            "function": {
                "name": TOOL,
                "description": (
                    "Run Python in the session's shell, where `apis` is at hand, and get what it printed. Variables "
                    "stay from call to call."
                ),
                "parameters": {
                    "type": "object",
                    "properties": {
                        "code": {
                            "type": "string",
                            "description": "Such as print(apis.api_docs.show_app_descriptions())",
                        }
                    },
                    "required": ["code"],
                },
            },
        }
    ]
)
_MAX_ID: Final = 128
_BLOCK: Final = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:^[ \t]*```|```|\Z)", re.DOTALL | re.MULTILINE)
_CLOSED: Final = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_EXAMPLE: Final = "```python\nprint(apis.api_docs.show_app_descriptions())\n```"


class Call(NamedTuple):
    """Code to run. `id` is the tool call's, empty for a block of text."""

    id: str
    code: str


class Malformed(NamedTuple):
    """A call, or a whole message (then `id` is empty), that cannot be read, and what is wrong with it."""

    id: str
    problem: str


class Message(NamedTuple):
    """An assistant message that could be read."""

    calls: list[Call | Malformed]
    as_text: bool
    """Whether the code stood in the text; then its output does too."""


def read(action: bytes, *, bare: bool) -> Message | Malformed:
    """Read one assistant message; `bare`: text without a block is code. Never raises."""
    said = read_message(action)
    if isinstance(said, str):
        return Malformed("", said)
    if said.calls:
        return Message(_from_entries(said.calls), as_text=False)
    return _from_text(said.text, bare=bare)


def _from_text(text: str, *, bare: bool) -> Message | Malformed:
    answer = text[behind_thought(text, "```") :]
    block = _CLOSED.search(answer) or _BLOCK.search(answer)
    code = block[1] if block is not None else answer if bare else ""
    if not code.strip():
        return Malformed("", f"there is no code in your message. Write one block of Python, such as\n{_EXAMPLE}")
    if len(code) > MAX_CODE:
        return Malformed("", f"your code has {len(code):,} characters; write at most {MAX_CODE:,} a message")
    return Message([Call("", code)], as_text=True)


def _from_entries(entries: Sequence[Any]) -> list[Call | Malformed]:
    calls = [_from_entry(entry, index) for index, entry in enumerate(entries[:MAX_CALLS])]
    late = f"at most {MAX_CALLS} calls a message; send the others in the next one"
    return calls + [Malformed(_id(entry, MAX_CALLS + n), late) for n, entry in enumerate(entries[MAX_CALLS:])]


def _from_entry(entry: object, index: int) -> Call | Malformed:
    call_id = _id(entry, index)
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict):
        return Malformed(call_id, 'a tool call must be {"id", "type": "function", "function": {"name", "arguments"}}')
    if function.get("name") != TOOL:
        return Malformed(call_id, f"there is no such tool; the only one is {TOOL}, which takes `code`")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError as error:
            return Malformed(call_id, f'the arguments are not valid JSON ({error}); send {{"code": "..."}}')
    code = arguments.get("code") if isinstance(arguments, dict) else None
    if not isinstance(code, str):
        return Malformed(call_id, 'the arguments must be {"code": "..."}, with Python in it')
    if len(code) > MAX_CODE:
        return Malformed(call_id, f"the code has {len(code):,} characters; write at most {MAX_CODE:,} a call")
    return Call(call_id, code)


def _id(entry: object, index: int) -> str:
    given = entry.get("id") if isinstance(entry, dict) else None
    return given if isinstance(given, str) and 0 < len(given) <= _MAX_ID else f"call_{index}"
