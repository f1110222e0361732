"""What an agent's message says: text, or calls with literal arguments. Pure; nothing is ever evaluated.

An action is one OpenAI assistant message as JSON. Its calls are its `tool_calls` (arguments as a JSON string), or else
the `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` blocks of its text, in either case read in order. What a
reader cannot make sense of becomes a `Malformed`, whose message tells the agent what was wrong and what to send.
Arguments are plain JSON values; an integer beyond 64 bits is read as the nearest float.

Bounds: MAX_CALLS calls a message, MAX_ARGUMENTS bytes of arguments in all of them together, MAX_DEPTH levels of
nesting. They keep a session's memory small whatever it is sent, and lie far above what any task asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from backends.server.messages import behind_thought, read_message

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_CALLS: Final = 64
MAX_ARGUMENTS: Final = 64 * 1024
MAX_DEPTH: Final = 32
MAX_NAME: Final = 128

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_EXAMPLE: Final = '{"name": "cd", "arguments": {"folder": "document"}}'


class Call(NamedTuple):
    """A well-formed call. `source` is its arguments as JSON text, which no simulator can change."""

    id: str
    name: str
    arguments: dict[str, Any]
    source: str | bytes


class Malformed(NamedTuple):
    """A call, or a whole message (then `id` is empty), that cannot be read, and what is wrong with it."""

    id: str
    problem: str


class Message(NamedTuple):
    """An assistant message that could be read. Without calls it is plain text, which ends the user's turn."""

    calls: list[Call | Malformed]
    as_text: bool
    """Whether the calls stood in the text; then their answers do too."""
    text: str = ""
    """The text of a message without calls, behind any thought."""


def read(action: bytes) -> Message | Malformed:
    """Read one assistant message. Never raises."""
    said = read_message(action)
    if isinstance(said, str):
        return Malformed("", said)
    if said.calls:
        return Message(_read_all(_from_tool_call, said.calls), as_text=False)
    calls = _read_all(_from_block, _blocks(said.text))
    return Message(calls, True, "" if calls else said.text[behind_thought(said.text, _OPEN) :].lstrip())


def _read_all(reader: Callable[[Any, int], Call | Malformed], entries: Sequence[Any]) -> list[Call | Malformed]:
    calls: list[Call | Malformed] = []
    budget = MAX_ARGUMENTS
    for index, entry in enumerate(entries):
        call = reader(entry, index)
        if isinstance(call, Call):
            budget -= len(call.source)
            if index >= MAX_CALLS:
                call = Malformed(call.id, f"at most {MAX_CALLS} calls a message; send the others in the next one")
            elif budget < 0:
                call = Malformed(call.id, f"the arguments of a message's calls exceed {MAX_ARGUMENTS} bytes together")
        calls.append(call)
    return calls


def _blocks(text: str) -> list[str | None]:
    """The insides of the call blocks behind any thought; None for one that is not closed."""
    blocks: list[str | None] = []
    position = behind_thought(text, _OPEN)
    while (start := text.find(_OPEN, position)) >= 0:
        end = text.find(_CLOSE, start)
        if end < 0:
            blocks.append(None)
            break
        blocks.append(text[start + len(_OPEN) : end])
        position = end + len(_CLOSE)
    return blocks


def _from_tool_call(entry: object, index: int) -> Call | Malformed:
    given = entry.get("id") if isinstance(entry, dict) else None
    call_id = given if isinstance(given, str) and 0 < len(given) <= MAX_NAME else f"call_{index}"
    function = entry.get("function") if isinstance(entry, dict) else None
    if not isinstance(function, dict):
        return Malformed(call_id, 'a tool call must be {"id", "type": "function", "function": {"name", "arguments"}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        source: str | bytes = arguments or "{}"
        if len(source) > MAX_ARGUMENTS:
            return Malformed(call_id, f"the arguments exceed {MAX_ARGUMENTS} bytes")
        try:
            arguments = orjson.loads(source)
        except orjson.JSONDecodeError as error:
            return Malformed(call_id, f"the arguments are not valid JSON ({error}); send one JSON object as a string")
        return _checked(call_id, function.get("name"), arguments, source)
    return _checked(call_id, function.get("name"), arguments, None)


def _from_block(block: str | None, index: int) -> Call | Malformed:
    call_id = f"call_{index}"
    if block is None:
        return Malformed(call_id, f"a {_OPEN} block is not closed; end it with {_CLOSE}")
    try:
        call = orjson.loads(block.strip())
    except orjson.JSONDecodeError as error:
        return Malformed(call_id, f"a {_OPEN} block is not valid JSON ({error}); write it as {_EXAMPLE}")
    if not isinstance(call, dict):
        return Malformed(call_id, f"a {_OPEN} block must hold one JSON object; write it as {_EXAMPLE}")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or "{}")
        except orjson.JSONDecodeError as error:
            return Malformed(call_id, f"the arguments are not valid JSON ({error}); write the call as {_EXAMPLE}")
    return _checked(call_id, call.get("name"), arguments, None)


def _checked(call_id: str, name: object, arguments: object, source: str | bytes | None) -> Call | Malformed:
    if not isinstance(name, str) or not name or len(name) > MAX_NAME:
        return Malformed(call_id, f'a call needs a "name": a string of at most {MAX_NAME} characters')
    if arguments is None:
        arguments, source = {}, "{}"
    if not isinstance(arguments, dict):
        return Malformed(call_id, f'the arguments of {name} must be a JSON object such as {{"folder": "document"}}')
    if _too_deep(arguments):
        return Malformed(call_id, f"the arguments of {name} are nested deeper than {MAX_DEPTH} levels")
    return Call(call_id, name, arguments, orjson.dumps(arguments) if source is None else source)


def _too_deep(arguments: dict[str, Any]) -> bool:
    level: list[Any] = [arguments]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
