"""The recorded conversation: one growing buffer an episode, and the lazy view of it that agents read.

A buffer is a header and records. The header is MAGIC, a schema version, and a JSON object (length-prefixed) that
names the environment, its digest and the dialect. A record is `kind u8, length u32 little-endian, bytes`:

    O  observation: reward f64, done u8, then the body as the sandbox sent it
    A  action: the assistant message as the policy returned it
    G  generation: JSON of `Generation`, right behind the action it belongs to
    E  evaluation: reward f64, then details JSON

An episode is O (A G? O)* E?; a buffer that ends in A (or A G) has an unanswered action. Journal, store, `show` and
exports read the same bytes. Owned by one episode at a time; only ever appended to.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from orchestrator.errors import SandboxError, SchemaMismatch
from orchestrator.types import Decision, Evaluation, Failure, FailureKind, Generation, Observation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAGIC: Final = b"RLOT"
VERSION: Final = 1
OBSERVATION: Final = ord("O")
ACTION: Final = ord("A")
GENERATION: Final = ord("G")
EVALUATION: Final = ord("E")

_MANY: Final = 1 << 40
"""A count of tokens of one call is believed up to this: an endpoint may report anything, a store holds 63 bits."""
_HEADER = struct.Struct("<4sHI")
_RECORD = struct.Struct("<BI")
_OBSERVED = struct.Struct("<BId?")
_EVALUATED = struct.Struct("<BId")
_REWARD_DONE = struct.Struct("<d?")
_REWARD = struct.Struct("<d")


class Record(NamedTuple):
    """One record: its kind (a byte value) and where its payload lies in the buffer."""

    kind: int
    start: int
    end: int


def header(environment: str, digest: str, dialect: str = "openai") -> bytes:
    """The bytes that every buffer of a run begins with."""
    body = orjson.dumps({"environment": environment, "digest": digest, "dialect": dialect})
    return _HEADER.pack(MAGIC, VERSION, len(body)) + body


def read_header(buffer: bytes | bytearray | memoryview) -> tuple[dict[str, str], int]:
    """The header's object and the offset of the first record. Raises SchemaMismatch."""
    if len(buffer) < _HEADER.size:
        raise SchemaMismatch("a recorded buffer is shorter than its header")
    magic, version, length = _HEADER.unpack_from(buffer, 0)
    if magic != MAGIC or version != VERSION:
        raise SchemaMismatch(
            f"a recorded buffer has schema {magic!r}/{version}; this version reads {MAGIC!r}/{VERSION}"
        )
    end = _HEADER.size + length
    try:
        fields = orjson.loads(bytes(buffer[_HEADER.size : end])) if end <= len(buffer) else None
    except orjson.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        raise SchemaMismatch("a recorded buffer's header is damaged")
    return fields, end


def records(buffer: bytes | bytearray | memoryview, start: int) -> Iterator[Record]:
    """Walk whole records from `start`; a torn record at the end is left out."""
    size = len(buffer)
    while start + _RECORD.size <= size:
        kind, length = _RECORD.unpack_from(buffer, start)
        begin = start + _RECORD.size
        if begin + length > size:
            return
        yield Record(kind, begin, begin + length)
        start = begin + length


class EpisodeBuffer:
    """The growing buffer of one attempt. `turn` counts its actions."""

    __slots__ = ("body_start", "data", "flushed", "last", "model_calls", "tokens_in", "tokens_out", "turn")

    def __init__(self, head: bytes) -> None:
        self.data = bytearray(head)
        self.body_start = len(head)
        self.flushed = 0
        """Bytes already handed to the step journal."""
        self.turn = 0
        self.last: Observation | None = None
        self.model_calls = 0
        self.tokens_in = 0
        self.tokens_out = 0

    @classmethod
    def restore(cls, data: bytes) -> EpisodeBuffer:
        """Rebuild from recorded bytes (a journal's); a torn last record is cut. Raises SchemaMismatch."""
        _, start = read_header(data)
        self = cls(data[:start])
        end = start
        for record in records(data, start):
            if record.kind == EVALUATION:
                break  # not durable as a trajectory: it will be graded again
            end = record.end
            if record.kind == ACTION:
                self.turn += 1
            elif record.kind == GENERATION:
                self._count(read_generation(data[record.start : record.end]))
            elif record.kind == OBSERVATION:
                self.last = read_observation(data, record)
        self.data += data[start:end]
        return self

    def observe(self, observation: Observation) -> None:
        """Append an observation."""
        body, reward, done = observation
        self.data += _OBSERVED.pack(OBSERVATION, len(body) + 9, reward, done) + body  # one growth, not two
        self.last = observation

    def decide(self, decision: Decision) -> None:
        """Append an action, and what its model call cost."""
        action, generation = decision
        self.data += _RECORD.pack(ACTION, len(action)) + action
        self.turn += 1
        if generation is not None:
            self._count(generation)
            body = orjson.dumps(generation)
            self.data += _RECORD.pack(GENERATION, len(body)) + body

    def grade(self, evaluation: Evaluation) -> None:
        """Append the grade."""
        details = evaluation.details
        self.data += _EVALUATED.pack(EVALUATION, len(details) + 8, evaluation.reward) + details

    def history(self) -> tuple[list[Observation], list[bytes]]:
        """All observations and all actions so far, in order: what a replay needs."""
        observations: list[Observation] = []
        actions: list[bytes] = []
        for record in records(self.data, self.body_start):
            if record.kind == OBSERVATION:
                observations.append(read_observation(self.data, record))
            elif record.kind == ACTION:
                actions.append(bytes(self.data[record.start : record.end]))
        return observations, actions

    def _count(self, generation: Generation) -> None:
        self.model_calls += generation.calls
        self.tokens_in += min(generation.prompt_tokens, _MANY)
        self.tokens_out += min(generation.completion_tokens, _MANY)


def read_observation(buffer: bytes | bytearray | memoryview, record: Record) -> Observation:
    """Decode an O record."""
    reward, done = _REWARD_DONE.unpack_from(buffer, record.start)
    return Observation(bytes(buffer[record.start + 9 : record.end]), reward, done)


def parse_observation(body: bytes) -> dict[str, Any]:
    """An observation's body. Raises SandboxError: what is wrong with it is the environment's fault."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _bad_observation(f"it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise _bad_observation("it is not a JSON object")
    return value


def read_evaluation(buffer: bytes | bytearray | memoryview, record: Record) -> Evaluation:
    """Decode an E record."""
    (reward,) = _REWARD.unpack_from(buffer, record.start)
    return Evaluation(reward, bytes(buffer[record.start + 8 : record.end]))


def read_generation(body: bytes | bytearray | memoryview) -> Generation:
    """Decode a G record's payload."""
    return Generation(**orjson.loads(bytes(body)))


class ConversationView:
    """What an agent sees of its episode: lazy, read-only, parsed only as far as it is asked for.

    `.last` and `.turn` cost nothing. `.messages()` and `.joined_json()` parse each observation once and remember it.
    The opening observation's messages come first, then each action and the messages it was answered with. Where an
    observation begins a new conversation, what was said before is gone from the view (the tools stay); `whole` keeps
    it, for those who read the record of an episode: `beginnings` tells the conversations apart.
    """

    __slots__ = ("_added", "_buffer", "_joined", "_messages", "_read", "_starts", "_tools_digest", "_toolset", "_whole")

    def __init__(self, buffer: EpisodeBuffer, toolset: Mapping[str, bytes], *, whole: bool = False) -> None:
        self._buffer = buffer
        self._whole = whole
        self._toolset = toolset
        self._read = buffer.body_start
        self._messages: list[dict[str, object]] = []
        self._starts = [0]
        self._joined = bytearray(b"[")
        self._tools_digest: str | None = None
        self._added: list[object] = []

    @property
    def last(self) -> Observation:
        """The newest observation."""
        last = self._buffer.last
        if last is None:
            raise LookupError("the episode has no observation yet")
        return last

    @property
    def turn(self) -> int:
        """Actions taken so far: 0 at the first call of act."""
        return self._buffer.turn

    def messages(self) -> list[dict[str, object]]:
        """The conversation as OpenAI messages. The list is the view's own: do not change it."""
        self._catch_up()
        return self._messages

    def beginnings(self) -> list[int]:
        """Where in `messages` each conversation begins: `[0]` but for the whole of an episode of several."""
        self._catch_up()
        return list(self._starts)

    def joined_json(self) -> bytes:
        """The conversation as one JSON array, joined from recorded bytes: ready for a model request."""
        self._catch_up()
        return bytes(self._joined) + b"]"

    def tools(self) -> list[object]:
        """The OpenAI tools open to the agent now: the opening set, then those added since, in order."""
        self._catch_up()
        base = orjson.loads(self._toolset[self._tools_digest]) if self._tools_digest else []
        return [*base, *self._added]

    def tools_json(self) -> bytes:
        """The same as one JSON array, joined from the tool set's own bytes: ready for a model request."""
        self._catch_up()
        base = self._toolset[self._tools_digest] if self._tools_digest else b"[]"
        if not self._added:
            return base
        added = orjson.dumps(self._added)
        return added if base == b"[]" else b"".join((base[:-1], b",", added[1:]))

    def _catch_up(self) -> None:
        data = self._buffer.data
        for record in records(data, self._read):
            if record.kind == ACTION:
                self._append(bytes(data[record.start : record.end]))
            elif record.kind == OBSERVATION:
                self._observe(bytes(data[record.start + 9 : record.end]))
            self._read = record.end

    def _observe(self, raw: bytes) -> None:
        body = parse_observation(raw)
        if body.get("new_conversation") is True:
            self._begin()
        messages = body.get("messages")
        for message in messages if isinstance(messages, list) else ():
            if not isinstance(message, dict):
                raise _bad_observation("a message is not a JSON object")
            self._append(orjson.dumps(message), message)
        digest = body.get("tools")
        if isinstance(digest, str):
            if digest not in self._toolset:
                raise _bad_observation(f"it names the tool set {digest[:32]!r}, which was never announced")
            self._tools_digest = digest
        added = body.get("tools_added")
        if isinstance(added, list):
            self._added.extend(added)

    def _begin(self) -> None:
        if self._whole:
            self._starts.append(len(self._messages))
        else:
            self._messages = []
            self._joined = bytearray(b"[")

    def _append(self, raw: bytes, message: dict[str, object] | None = None) -> None:
        if len(self._joined) > 1:
            self._joined += b","
        self._joined += raw
        self._messages.append(orjson.loads(raw) if message is None else message)


def _bad_observation(why: str) -> SandboxError:
    return SandboxError(Failure(FailureKind.ENVIRONMENT, "observe", f"an observation cannot be read: {why}"))
