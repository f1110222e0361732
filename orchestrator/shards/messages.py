"""What the driver and its shards say to each other: typed messages, many a frame.

A frame is `u32 little-endian length of the header, the header, the bodies`. The header is a JSON list with one entry a
message, `[code, fields, length of the body]`, in the order of the bodies behind it. A malformed frame is a
`FrameError`: its sender is not to be believed any more.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from orchestrator.types import EpisodeKey, Failure, FailureKind, Outcome, StopReason, Trajectory

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_FRAME: Final = 256 * 1024 * 1024
"""Bytes; a single trajectory may be large."""
FRAME: Final = 4 * 1024 * 1024
"""Bodies of one frame together, where one does not exceed it alone."""
_LENGTH = struct.Struct("<I")


class FrameError(Exception):
    """The other side sent what is no frame of ours."""


class Launch(NamedTuple):
    """To a shard: play this attempt, from where `buffer` stands."""

    key: EpisodeKey
    attempt: int
    buffer: bytes


class Settled(NamedTuple):
    """To a shard: these are durable, or not its business any more; their steps need not be kept."""

    keys: Sequence[EpisodeKey]


class End(NamedTuple):
    """To a shard: nothing more comes. `complete`: every episode of the run is durable."""

    complete: bool


class Held(NamedTuple):
    """From a shard, before it is ready: an attempt that its journal holds."""

    key: EpisodeKey
    attempt: int
    buffer: bytes


class Ready(NamedTuple):
    """From a shard: it takes episodes, and has reported all that its journal holds."""

    node: str


class Played(NamedTuple):
    """From a shard: an episode has its trajectory."""

    trajectory: Trajectory


class NotPlayed(NamedTuple):
    """From a shard: a try failed, and what it had recorded."""

    key: EpisodeKey
    attempt: int
    failure: Failure
    buffer: bytes


class Tools(NamedTuple):
    """From a shard: a tool set that later trajectories name."""

    digest: str
    body: bytes


class Standing(NamedTuple):
    """From a shard, about once a second: live sandboxes, CPU seconds of them and of itself so far."""

    sandboxes: int
    sandbox_cpu_s: float
    cpu_s: float


class Fatal(NamedTuple):
    """From a shard: it cannot go on, and why; `hopeless`: nor can any other."""

    message: str
    hopeless: bool


Message = Launch | Settled | End | Held | Ready | Played | NotPlayed | Tools | Standing | Fatal


def encode(messages: Sequence[Message]) -> bytes:
    """One frame."""
    entries = [_entry(message) for message in messages]
    header = orjson.dumps([(code, fields, len(body)) for code, fields, body in entries])
    return b"".join((_LENGTH.pack(len(header)), header, *(body for _, _, body in entries)))


def weight(message: Message) -> int:
    """About how many bytes of a frame it takes."""
    match message:
        case Played(trajectory):
            return len(trajectory.buffer) + 512
        case Launch(_, _, buffer) | Held(_, _, buffer) | NotPlayed(_, _, _, buffer) | Tools(_, buffer):
            return len(buffer) + 256
        case Settled(keys):
            return 64 * len(keys)
        case _:
            return 128


def decode(frame: bytes) -> list[Message]:
    """The messages of a frame. Raises FrameError."""
    try:
        (size,) = _LENGTH.unpack_from(frame)
        start = _LENGTH.size + size
        header = orjson.loads(memoryview(frame)[_LENGTH.size : start])
        messages = []
        for code, fields, length in header:
            end = start + length
            if length < 0 or end > len(frame):
                raise FrameError("a body is longer than its frame")
            messages.append(_message(code, fields, frame[start:end]))
            start = end
    except (struct.error, ValueError, TypeError, KeyError) as error:
        raise FrameError(f"a frame is malformed: {error}") from None
    if start != len(frame):
        raise FrameError("the bodies of a frame do not add up to its length")
    return messages


def _entry(message: Message) -> tuple[str, Any, bytes]:
    match message:
        case Launch(key, attempt, buffer):
            return "launch", (tuple(key), attempt), buffer
        case Settled(keys):
            return "settled", [tuple(key) for key in keys], b""
        case End(complete):
            return "end", complete, b""
        case Held(key, attempt, buffer):
            return "held", (tuple(key), attempt), buffer
        case Ready(node):
            return "ready", node, b""
        case Played(trajectory):
            return "played", _fields(trajectory), trajectory.buffer + trajectory.details
        case NotPlayed(key, attempt, failure, buffer):
            return "not_played", (tuple(key), attempt, _told(failure)), buffer
        case Tools(digest, body):
            return "tools", digest, body
        case Standing(sandboxes, sandbox_cpu_s, cpu_s):
            return "standing", (sandboxes, sandbox_cpu_s, cpu_s), b""
        case Fatal(text, hopeless):
            return "fatal", (text, hopeless), b""


def _message(code: str, fields: Any, body: bytes) -> Message:
    match code, fields:
        case "launch", [key, int(attempt)]:
            return Launch(_key(key), attempt, body)
        case "settled", list(keys):
            return Settled([_key(key) for key in keys])
        case "end", bool(complete):
            return End(complete)
        case "held", [key, int(attempt)]:
            return Held(_key(key), attempt, body)
        case "ready", str(node):
            return Ready(node)
        case "played", list():
            return Played(_trajectory(fields, body))
        case "not_played", [key, int(attempt), failure]:
            return NotPlayed(_key(key), attempt, _failure(failure), body)
        case "tools", str(digest):
            return Tools(digest, body)
        case "standing", [int(sandboxes), float(sandbox_cpu_s), float(cpu_s)]:
            return Standing(sandboxes, sandbox_cpu_s, cpu_s)
        case "fatal", [str(text), bool(hopeless)]:
            return Fatal(text, hopeless)
        case _:
            raise FrameError(f"no message is called {code!r:.40} with {fields!r:.80}")


def _key(value: Any) -> EpisodeKey:
    match value:
        case [str(task), int(group), int(sample)]:
            return EpisodeKey(task, group, sample)
        case _:
            raise FrameError(f"a key is [task, group, sample], not {value!r:.80}")


def _told(failure: Failure) -> tuple[str, str, str, bool]:
    return failure.kind, failure.stage, failure.message, failure.retryable


def _failure(value: Any) -> Failure:
    kind, stage, message, retryable = value
    return Failure(FailureKind(kind), str(stage), str(message), bool(retryable))


def _fields(t: Trajectory) -> list[Any]:
    failure = None if t.failure is None else _told(t.failure)
    return [
        tuple(t.key), t.attempt, t.outcome, t.stop_reason, t.reward, t.steps, t.incarnations,
        t.model_calls, t.prompt_tokens, t.completion_tokens, failure, t.started, t.finished, len(t.buffer),
    ]  # fmt: skip


def _trajectory(fields: list[Any], body: bytes) -> Trajectory:
    key, attempt, outcome, stop, reward, steps, incarnations, *rest = fields
    model_calls, prompt_tokens, completion_tokens, failure, started, finished, size = rest
    return Trajectory(
        key=_key(key),
        attempt=int(attempt),
        outcome=Outcome(outcome),
        stop_reason=StopReason(stop),
        reward=None if reward is None else float(reward),
        steps=int(steps),
        buffer=body[:size],
        incarnations=int(incarnations),
        model_calls=int(model_calls),
        prompt_tokens=int(prompt_tokens),
        completion_tokens=int(completion_tokens),
        failure=None if failure is None else _failure(failure),
        details=body[size:],
        started=float(started),
        finished=float(finished),
    )
