"""What the fake endpoint says and what it writes down: recorded answers, and a log of answered calls.

An answer belongs to the conversation before it: the key is a digest of all messages up to it, tool results included,
because tasks may share their opening and part ways later. Key order and null fields do not count, so a conversation
recorded by one policy matches the same conversation sent by another. The log has one line a call whose answer left
whole; a line is one `write` to a file opened for appending: it outlives its client and is never torn.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    Message = Mapping[str, object]


class Answer(NamedTuple):
    """One assistant message, ready to be put into a reply."""

    message: bytes
    finish_reason: str


class LoggedCall(NamedTuple):
    """An answered call. `t` is the wall clock in seconds when the answer had been sent, `asked` when the call came."""

    t: float
    digest: str
    n: int
    """Assistant messages that the request already held."""
    seed: int | None
    asked: float = math.inf
    """Infinite where it is not known; then only a kill behind the answer counts."""


def digest(messages: Iterable[Message]) -> str:
    """The name of a conversation: 16 hex digits."""
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return blake2b(orjson.dumps(present, option=orjson.OPT_SORT_KEYS), digest_size=8).hexdigest()


def write_answers(path: Path, conversations: Iterable[Sequence[Message]]) -> int:
    """Write what the endpoint is to answer, from whole conversations (as `rollout export --format openai` gives them).

    Returns the number of answers. Raises ValueError where two conversations are equal up to a point and then answer
    differently: the endpoint could not know which is meant.
    """
    known: dict[str, bytes] = {}
    for messages in conversations:
        for place, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            key = digest(messages[:place])
            action = orjson.dumps(message)
            if known.setdefault(key, action) != action:
                opening = orjson.dumps(messages[0]).decode()
                raise ValueError(
                    f"two conversations are equal up to message {place} and then differ; leave one of them out. "
                    f"They begin with {opening:.200}"
                )
    lines = [b'{"before":"%s","answer":%s}\n' % (key.encode(), action) for key, action in known.items()]
    path.write_bytes(b"".join(lines))
    return len(lines)


def load_answers(path: Path) -> dict[str, Answer]:
    """Read what `write_answers` wrote: digest of the conversation so far -> answer."""
    answers: dict[str, Answer] = {}
    for line in path.read_bytes().splitlines():
        entry = orjson.loads(line)
        answers[entry["before"]] = answer(entry["answer"])
    return answers


def answer(message: Message) -> Answer:
    """An answer of one assistant message."""
    return Answer(orjson.dumps(message), "tool_calls" if message.get("tool_calls") else "stop")


def read_log(path: Path) -> list[LoggedCall]:
    """All calls answered so far, in order; none where there is no log yet."""
    if not path.exists():
        return []
    return [LoggedCall(**orjson.loads(line)) for line in path.read_bytes().splitlines()]


def repeated(calls: Iterable[LoggedCall], kills: Sequence[float], grace_s: float = 0.2) -> list[LoggedCall]:
    """Calls whose answer had already been given: same conversation, same seed.

    An answer that left less than `grace_s` seconds before one of `kills` (wall clock) may have been lost with its
    client, and one that was asked for before a kill and left behind it reached nobody: asking again is excused.
    """
    answered: set[tuple[str, int | None]] = set()
    again: list[LoggedCall] = []
    for call in calls:
        key = (call.digest, call.seed)
        if key in answered:
            again.append(call)
        if not any(min(call.asked, call.t) <= kill <= call.t + grace_s for kill in kills):
            answered.add(key)
    return again
