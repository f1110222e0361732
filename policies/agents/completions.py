"""Chat completions on the wire: request bodies joined from recorded bytes, replies reduced to what is kept.

A request never serialises the conversation again: its messages and tools are bytes that were made once. Two dialects:
`openai` sends the tools beside the messages; `tool_call`, for endpoints that know no tools, describes them in the
system message and lets the model write `<tool_call>` blocks as text. What a server says is quoted on one line, and
bounded only by MAX_SAID: who shows it redacts it first and cuts it then.
"""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.records import ConversationView

RESERVED: Final = frozenset({"model", "messages", "tools", "seed", "stream", "n"})
"""What a request's extra fields may not be: the policy sets them, or could not read the answer."""
MAX_SAID: Final = 64 * 1024
"""Bytes looked at of what a server says."""
_REASONING: Final = ("reasoning", "reasoning_content")
_TOOL_PROMPT: Final = """\
You can call functions. They are described here as a JSON array, their parameters as JSON Schema:
<tools>
{tools}
</tools>
To call a function, write one block for each call, and nothing else in the block:
<tool_call>
{{"name": "the function's name", "arguments": {{"parameter": "value"}}}}
</tool_call>
You are then given the results. To answer the user instead, write plain text without such a block."""


class Dialect(StrEnum):
    """How an endpoint is told of tools."""

    OPENAI = "openai"
    """The request's `tools`; calls come back as `tool_calls`."""
    TOOL_CALL = "tool_call"
    """A system message; calls come back as text."""


class BadReply(Exception):
    """A reply that is no chat completion."""


class Completion(NamedTuple):
    """What is kept of a reply: `action` is the assistant message as JSON bytes. Counts are tokens."""

    action: bytes
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int


class Requests:
    """Makes request bodies: everything but seed, messages and tools is fixed and serialised once."""

    def __init__(self, model: str, fields: Mapping[str, object], dialect: Dialect) -> None:
        wrong = RESERVED.intersection(fields)
        if wrong:
            raise UsageError(f"a request's extra fields may not set {', '.join(sorted(wrong))}: leave them out")
        try:
            self._head = orjson.dumps({"model": model, **fields})[:-1]
        except TypeError as error:
            raise UsageError(f"a request's extra fields must be JSON: {error}") from error
        self._dialect = dialect

    def body(self, view: ConversationView, seed: int | None) -> bytes:
        """The request for the next message of a conversation."""
        messages = view.joined_json()
        tools = view.tools_json()
        parts = [self._head]
        if seed is not None:
            parts.append(b',"seed":%d' % seed)
        if tools == b"[]":
            parts += (b',"messages":', messages)
        elif self._dialect is Dialect.OPENAI:
            parts += (b',"messages":', messages, b',"tools":', tools)
        else:
            parts += (b',"messages":', _with_tools(messages, tools, view.messages()[0]))
        parts.append(b"}")
        return b"".join(parts)


def _with_tools(messages: bytes, tools: bytes, first: Mapping[str, object]) -> bytes:
    """The messages with the tools in front: in the system message, where there is one, else in a new one."""
    opening = b"[" + orjson.dumps(first)
    text = first.get("content")
    if first.get("role") != "system" or not isinstance(text, str) or not messages.startswith(opening):
        return b"".join((b"[", _system_message("", tools), b",", messages[1:]))
    return b"".join((b"[", _system_message(text, tools), messages[len(opening) :]))


@lru_cache(maxsize=256)
def _system_message(text: str, tools: bytes) -> bytes:
    prompt = _TOOL_PROMPT.format(tools=tools.decode())
    return orjson.dumps({"role": "system", "content": f"{text}\n\n{prompt}" if text else prompt})


def read_completion(body: bytes, *, keep_reasoning: bool = False) -> Completion:
    """Read a reply. Raises BadReply where it is none.

    A tool call's arguments are passed on as the model wrote them: the environment tells the agent what is wrong with
    them. A refusal becomes the message's content, and no content at all becomes empty text.
    """
    try:
        reply = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadReply(f"the reply is not JSON ({error}): {_line(body)}") from None
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices:
        raise BadReply(f"the reply has no choices: {error_message(body)}")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        raise BadReply(f"the reply's choice has no message: {_line(body)}")
    reason = choices[0].get("finish_reason")
    model = reply.get("model")
    usage = reply.get("usage")
    return Completion(
        orjson.dumps(_reduced(message, keep_reasoning)),
        reason if isinstance(reason, str) else "",
        model if isinstance(model, str) else "",
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
    )


def _reduced(message: dict[str, Any], keep_reasoning: bool) -> dict[str, Any]:
    content = message.get("content")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise BadReply("the reply's tool_calls are not a list of objects")
    if content is None and not calls:
        refusal = message.get("refusal")
        content = refusal if isinstance(refusal, str) else ""
    kept = {"role": "assistant", "content": content}
    if calls:
        kept["tool_calls"] = calls
    if keep_reasoning:
        kept.update({field: message[field] for field in _REASONING if message.get(field)})
    return kept


def _count(usage: object, field: str) -> int:
    value = usage.get(field) if isinstance(usage, dict) else None
    return value if type(value) is int and value >= 0 else 0


def error_message(body: bytes) -> str:
    """What a server says is wrong, on one line: the usual places for it first, else the body itself."""
    try:
        reply = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _line(body)
    if isinstance(reply, dict):
        error = reply.get("error")
        inner = error.get("message") if isinstance(error, dict) else error
        for said in (inner, reply.get("message"), reply.get("detail")):
            if isinstance(said, str) and said:
                return _line(said.encode())
    return _line(body)


def _line(text: bytes) -> str:
    return " ".join(text[:MAX_SAID].decode(errors="replace").split())
