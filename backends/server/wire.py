"""The wire between orchestrator and sandbox: frames of many calls, read and written the same on both sides.

A frame is `u32 little-endian length of the header, the header, the bodies`. The header is a JSON list with one entry a
call, in the order of the bodies behind it:

    orchestrator to sandbox:  [id, op, session, seq, length]
    sandbox to orchestrator:  [id, status, reward, done, length]

`id` numbers the calls of a connection from 1 and is never reused; `session` ids are chosen by the orchestrator and
never reused; `seq` numbers a session's calls from 0 (0 is `open`), and a call out of order is a protocol error. Id 0
is the sandbox speaking unasked: status TOOLSET announces a tool set before the first answer that names it.

An error's body is `{"code", "message", "retryable"}`: never a class path. The connection starts with a text message
`hello` from the sandbox (see `Hello`) that carries PROTOCOL; another version is refused.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import orjson

if TYPE_CHECKING:
    from collections.abc import Sequence

PROTOCOL: Final = 1
MAX_BODY: Final = 4 * 1024 * 1024
"""Default cap of one body in bytes; a larger reply becomes the error `too_large`."""
MAX_FRAME: Final = 16 * 1024 * 1024
"""Cap of one frame in bytes; a larger one is a protocol error."""
MAX_CALLS: Final = 4096
"""Cap of calls in one frame."""
MAX_CHILDREN: Final = 64
"""Default cap of sessions at once where each has a process of its own."""

_LENGTH = struct.Struct("<I")


class Op(IntEnum):
    """What the orchestrator may ask."""

    OPEN = 1
    """Body `{"task", "seed", "step_timeout_s", "options"}`; answered by the first observation."""
    STEP = 2
    """Body: the action; answered by an observation."""
    EVALUATE = 3
    """Body: JSON params; answered by JSON details, with the reward in the header."""
    CLOSE = 4
    """No body; forgets the session. Not answered."""
    TASKS = 5
    """Body `{"split"}`; answered by `{"tasks": [ids], "left_out": {category: {"count", "needs"}}}`."""
    SOLUTION = 6
    """Body `{"task"}`; answered by a JSON list of actions as strings. Only with `--with-solutions`."""
    PING = 7
    """No body; any answer says that somebody is there."""


class Status(IntEnum):
    """How a call ended."""

    OK = 0
    ERROR = 1
    """The body is an error object; see `ErrorCode`."""
    TOOLSET = 2
    """Unasked (id 0): the body is `digest in hex, newline, JSON array`."""


class ErrorCode:
    """The codes an error body may carry. Text on the wire, so that a reader of a capture understands it."""

    UNKNOWN_TASK: Final = "unknown_task"
    UNKNOWN_SPLIT: Final = "unknown_split"
    UNAVAILABLE: Final = "unavailable"
    ENVIRONMENT: Final = "environment"
    TOO_LARGE: Final = "too_large"
    STEP_TIMEOUT: Final = "step_timeout"
    SESSION_LOST: Final = "session_lost"
    """The session's own process ended; the sandbox and its other sessions go on."""
    UNKNOWN_SESSION: Final = "unknown_session"
    OUT_OF_ORDER: Final = "out_of_order"
    FORBIDDEN: Final = "forbidden"
    BAD_REQUEST: Final = "bad_request"
    BAD_REWARD: Final = "bad_reward"
    BUSY: Final = "busy"
    """Whoever serves has no room for it now."""


class WireError(Exception):
    """The peer broke the protocol; the connection must be closed."""


class Call(NamedTuple):
    """A decoded request."""

    id: int
    op: int
    session: int
    seq: int
    body: bytes


Answer: TypeAlias = tuple[int, int, float, bool, bytes]
"""A decoded reply: id, status, reward, done, body. A plain tuple: one is made for every step of every episode."""


def encode(header: Sequence[Sequence[object]], bodies: Sequence[bytes]) -> bytes:
    """One frame of calls or replies."""
    head = orjson.dumps(header)
    return b"".join((_LENGTH.pack(len(head)), head, *bodies))


def _split(frame: bytes) -> tuple[list[Any], int]:
    if len(frame) < _LENGTH.size:
        raise WireError("a frame is shorter than its length field")
    (size,) = _LENGTH.unpack_from(frame)
    start = _LENGTH.size + size
    if start > len(frame):
        raise WireError("a frame's header is longer than the frame")
    try:
        header = orjson.loads(memoryview(frame)[_LENGTH.size : start])
    except orjson.JSONDecodeError as error:
        raise WireError(f"a frame's header is not JSON: {error}") from None
    if not isinstance(header, list) or len(header) > MAX_CALLS:
        raise WireError("a frame's header is not a list of at most 4096 entries")
    return header, start


def decode_calls(frame: bytes) -> list[Call]:
    """The calls of a frame. Raises WireError on anything malformed."""
    header, start = _split(frame)
    calls: list[Call] = []
    for entry in header:
        match entry:
            case [int(call), int(op), int(session), int(seq), int(length)] if length >= 0:
                end = start + length
                calls.append(Call(call, op, session, seq, frame[start:end]))
                start = end
            case _:
                raise WireError(f"a call is not [id, op, session, seq, length]: {entry!r:.80}")
    if start != len(frame):
        raise WireError("the bodies of a frame do not add up to its length")
    return calls


def decode_answers(frame: bytes) -> list[Answer]:
    """The replies of a frame. Raises WireError on anything malformed. Rewards may still be any float."""
    header, start = _split(frame)
    answers: list[Answer] = []
    for entry in header:
        try:
            call, status, reward, done, length = entry
        except (TypeError, ValueError):
            raise _bad_reply(entry) from None
        if type(call) is not int or type(status) is not int or type(length) is not int or length < 0:
            raise _bad_reply(entry)
        if type(done) is not bool or (type(reward) is not float and type(reward) is not int):
            raise _bad_reply(entry)
        end = start + length
        answers.append((call, status, reward, done, frame[start:end]))
        start = end
    if start != len(frame):
        raise WireError("the bodies of a frame do not add up to its length")
    return answers


def _bad_reply(entry: object) -> WireError:
    return WireError(f"a reply is not [id, status, reward, done, length]: {entry!r:.80}")


class Hello(NamedTuple):
    """The sandbox's first message, as JSON of this object; `token` proves which sandbox it is."""

    protocol: int
    token: str
    environment: str
    digest: str
    isolation: str
    deterministic: bool
    runs_code: bool
    max_turns: int
    pid: int


def toolset_digest(body: bytes) -> str:
    """The name of a tool set: blake2b of its JSON array, 16 hex digits."""
    return blake2b(body, digest_size=8).hexdigest()
