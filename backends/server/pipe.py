"""What the server and a session's child say to each other over a socketpair: one question, one answer, in turns.

A question is `op u8, length u32, body`; an answer is `kind u8, reward f64, done u8, length of tool set u32, length of
body u32, tool set, body`. The tool set is its JSON array, sent once a child at the first answer that names it. The end
of the stream closes the session. The server never believes a child: the agent's code may run there and write into the
socket itself, so every length is bounded before anything is read, and what is malformed is `Garbled`.
"""

from __future__ import annotations

import asyncio
import struct
from enum import IntEnum
from math import isfinite
from typing import TYPE_CHECKING, Final, NamedTuple

import orjson

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping
    from typing import Any

MAX_TOOLSET: Final = 16 * 1024 * 1024
MAX_STATE: Final = 64 * 1024 * 1024
MAX_ERROR: Final = 64 * 1024
_QUESTION: Final = struct.Struct("<BI")
_ANSWER: Final = struct.Struct("<BdBII")
_HEAD: Final = struct.Struct("<I")


class Ask(IntEnum):
    """What a child is asked. The first question is OPEN or GRADE; after GRADE there is none."""

    OPEN = 1
    """Body: JSON `{"task", "seed", "options", "max_body"}`."""
    STEP = 2
    """Body: the action."""
    EVALUATE = 3
    """Body: JSON params."""
    EXPORT = 4
    GRADE = 5
    """Body: `with_head` of JSON `{"task", "seed", "options", "params", "max_body"}` and the exported state."""


class Told(IntEnum):
    """What an answer's body is."""

    REPLY = 0
    """An observation."""
    GRADE = 1
    """JSON details; the reward is in the answer's head."""
    STATE = 2
    """What `export` gave."""
    FAULT = 3
    """JSON `{"code", "message", "retryable"}`: an EnvironmentFault."""
    CRASH = 4
    """JSON `{"message", "trace"}`: the environment raised something else."""


class Answer(NamedTuple):
    """A child's answer. `toolset` is a JSON array, or empty."""

    kind: int
    reward: float = 0.0
    done: bool = False
    toolset: bytes = b""
    body: bytes = b""


class Garbled(Exception):
    """The child does not keep to the protocol."""


def with_head(head: Mapping[str, Any], tail: bytes) -> tuple[bytes, bytes]:
    """A JSON object and bytes behind it, as the parts of one body: the bytes may be many."""
    packed = orjson.dumps(head)
    return _HEAD.pack(len(packed)) + packed, tail


def split_head(body: bytes) -> tuple[dict[str, Any], bytes]:
    """The parts of `with_head`."""
    (size,) = _HEAD.unpack_from(body)
    end = _HEAD.size + size
    return orjson.loads(body[_HEAD.size : end]), body[end:]


def next_question(channel: socket.socket) -> tuple[int, bytes] | None:
    """The child's side: wait for a question; None at the end of the stream."""
    head = _read(channel, _QUESTION.size)
    if head is None:
        return None
    op, length = _QUESTION.unpack(head)
    body = _read(channel, length)
    return None if body is None else (op, body)


def give(channel: socket.socket, answer: Answer) -> None:
    """The child's side: send an answer."""
    kind, reward, done, toolset, body = answer
    channel.sendall(_ANSWER.pack(kind, reward, done, len(toolset), len(body)))
    for part in (toolset, body):
        if part:
            channel.sendall(part)


def _read(channel: socket.socket, size: int) -> bytes | None:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        count = channel.recv_into(view[at:])
        if count == 0:
            return None
        at += count
    return bytes(data)


async def ask(channel: socket.socket, op: int, *parts: bytes, max_body: int) -> Answer | None:
    """The server's side, on a socket that does not block: ask, and wait for the answer; None where the stream ends.

    The question's body is sent in `parts`.

    Raises Garbled. Cancelled: the stream is in no known state, and the child must be ended.
    """
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(channel, _QUESTION.pack(op, sum(map(len, parts))) + parts[0])
        for part in parts[1:]:
            await loop.sock_sendall(channel, part)
    except ConnectionError:
        pass  # it may have answered before, and the answer says more
    head = await _receive(channel, _ANSWER.size)
    if head is None:
        return None
    kind, reward, done, tools, length = _ANSWER.unpack(head)
    cap = {Told.STATE: MAX_STATE, Told.FAULT: MAX_ERROR, Told.CRASH: MAX_ERROR}.get(kind, max_body)
    if kind not in _KINDS or done > 1 or tools > MAX_TOOLSET or length > cap or not isfinite(reward):
        raise Garbled(f"an answer of kind {kind} with {length} bytes, {tools} bytes of tools, reward {reward}")
    toolset = await _receive(channel, tools) if tools else b""
    content = await _receive(channel, length) if length else b""
    if toolset is None or content is None:
        return None
    return Answer(kind, reward, bool(done), toolset, content)


_KINDS: Final = frozenset(Told)


async def _receive(channel: socket.socket, size: int) -> bytes | None:
    loop = asyncio.get_running_loop()
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        try:
            count = await loop.sock_recv_into(channel, view[at:])
        except ConnectionError:
            return None
        if count == 0:
            return None
        at += count
    return bytes(data)
