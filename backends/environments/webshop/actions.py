"""What an agent's message asks for: `search[words]` and `click[button]`, in its text or as calls of the tools.

Pure, never raises. In text the last line that holds an action counts, so that a thought may stand before it, and of
several in that line the last, unless it begins with one; an argument reaches to the line's last bracket. A message may
make several calls; they are carried out in order.

Bounds: MAX_CALLS calls a message, MAX_ARGUMENT characters an argument: far above what any page asks for.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

import orjson

from backends.server.environment import Toolset
from backends.server.messages import read_message

MAX_CALLS: Final = 16
MAX_ARGUMENT: Final = 4096
_MAX_ID: Final = 128
_ARGUMENTS: Final = {"search": "keywords", "click": "value"}
_OPENS = re.compile(r"\b(search|click)\[")
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


class Move(NamedTuple):
    """One action. `call` is the tool call's id, "" for text; `problem` says why there is no `verb`, for calls alone."""

    call: str
    verb: str
    argument: str
    problem: str = ""


def _tool(name: str, description: str, parameter: str, meaning: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {parameter: {"type": "string", "description": meaning}}}
    function = {"name": name, "description": description, "parameters": schema | {"required": [parameter]}}
    return {"type": "function", "function": function}


TOOLSET: Final = Toolset(
    [
        _tool("search", "Search the shop for products.", "keywords", "Words to look for."),
        _tool(
            "click",
            "Press a button, open a product or choose an option of the current page.",
            "value",
            "What to press, as the page spells it, such as Buy Now, Next >, a product's number, or an option's value.",
        ),
    ]
)


def read(action: bytes) -> list[Move] | str:
    """The moves of an assistant message, none where its text holds no action; or what is wrong with the message."""
    said = read_message(action)
    if isinstance(said, str):
        return said
    return [_called(call, number) for number, call in enumerate(said.calls)] if said.calls else _spoken(said.text)


def message(verb: str, argument: str) -> bytes:
    """An assistant message that makes one move."""
    return orjson.dumps({"role": "assistant", "content": f"{verb}[{argument}]"})


def _spoken(text: str) -> list[Move]:
    for line in reversed(_THOUGHT.sub("", text).splitlines()):
        end = line.rfind("]")
        found = [opened for opened in _OPENS.finditer(line) if opened.end() < end]
        if found:
            opened = found[0] if not line[: found[0].start()].strip() else found[-1]
            return [Move("", opened[1], line[opened.end() : end][:MAX_ARGUMENT].lower())]
    return []


def _called(call: object, number: int) -> Move:
    given = call.get("id") if isinstance(call, dict) else None
    name = given if isinstance(given, str) and 0 < len(given) <= _MAX_ID else f"call_{number}"
    function = call.get("function") if isinstance(call, dict) else None
    if number >= MAX_CALLS:
        return Move(name, "", "", f"at most {MAX_CALLS} calls a message; send the others in the next one")
    if not isinstance(function, dict):
        shape = '{"id", "type": "function", "function": {"name", "arguments"}}'
        return Move(name, "", "", f"a tool call must be {shape}")
    verb = function.get("name")
    if not isinstance(verb, str) or verb not in _ARGUMENTS:
        return Move(name, "", "", "unknown tool; there are search(keywords) and click(value)")
    argument = _argument(function.get("arguments"), _ARGUMENTS[verb])
    if argument is None:
        return Move(name, "", "", f'the arguments of {verb} must be JSON such as {{"{_ARGUMENTS[verb]}": "text"}}')
    return Move(name, verb, argument[:MAX_ARGUMENT].lower())


def _argument(arguments: object, parameter: str) -> str | None:
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            return None
    value = arguments.get(parameter) if isinstance(arguments, dict) else None
    return value if isinstance(value, str) and value else None
