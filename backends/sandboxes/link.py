"""The orchestrator's end of one sandbox's connection: a `Sandbox` and its `Session`s over the wire.

Owns the batcher, the tool sets and the session numbers of one connection. Always true: a reply is data, checked
against the protocol before anything believes it; whatever breaks the protocol condemns the sandbox; `lost` is done
exactly once. The listener makes a `LinkedSandbox` and runs it over its socket; the backend ends its process.
"""

from __future__ import annotations

import asyncio
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson
from aiohttp import web

from backends.server.wire import (
    MAX_BODY,
    ErrorCode,
    Op,
    Status,
    WireError,
    decode_answers,
    encode,
    toolset_digest,
)
from orchestrator.batching import Batcher
from orchestrator.errors import SandboxError, SandboxLost, SandboxRefused, Unavailable, UnknownName
from orchestrator.protocols import SandboxStatistics
from orchestrator.types import (
    EnvironmentInfo,
    EpisodeSpec,
    Evaluation,
    Failure,
    FailureKind,
    Observation,
    SandboxId,
    TaskList,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.server.wire import Hello

MAX_TOOLSET_BYTES: Final = 256 * 1024 * 1024
"""A connection may announce this many bytes of tool sets (all of BFCL's: 20 MB)."""

_STEP: Final = int(Op.STEP)
"""A plain number: it goes into the header of every step, where a member of an enumeration is slower to write."""
PING_S: Final = 0.5
"""How often a sandbox that nobody asks anything is asked whether it is there."""
MESSAGE_CAP: Final = 2000
"""Characters of a sandbox's error message that are kept."""

_KINDS: Final = {
    ErrorCode.UNKNOWN_TASK: FailureKind.UNKNOWN_TASK,
    ErrorCode.UNAVAILABLE: FailureKind.UNKNOWN_TASK,
    ErrorCode.BAD_REWARD: FailureKind.BAD_REWARD,
    ErrorCode.ENVIRONMENT: FailureKind.ENVIRONMENT,
    ErrorCode.TOO_LARGE: FailureKind.ENVIRONMENT,
    ErrorCode.BUSY: FailureKind.SANDBOX_START,
}

_LOSSES: Final = {
    ErrorCode.STEP_TIMEOUT: FailureKind.SANDBOX_HUNG,
    ErrorCode.SESSION_LOST: FailureKind.SANDBOX_LOST,
}
"""What is a loss of this session alone. Its caller is a suspect even where the session's process had died before the
call: nothing but the session's own earlier actions runs there."""


class LinkedSandbox:
    """A sandbox behind a WebSocket. Satisfies `orchestrator.protocols.Sandbox`."""

    def __init__(self, sandbox: SandboxId, hello: Hello, *, limit_s: float, max_body: int = MAX_BODY) -> None:
        self.id = sandbox
        self.info = EnvironmentInfo(
            name=hello.environment,
            digest=hello.digest,
            isolation=hello.isolation,
            deterministic=hello.deterministic,
            runs_code=hello.runs_code,
            max_turns=hello.max_turns,
        )
        self.pid = hello.pid
        self.lost: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended, with what the connection knows; the backend then finds out why."""
        self.worn = False
        self._limit_s = limit_s
        self.max_body = max_body
        self._batcher = Batcher()
        self._toolsets: dict[str, bytes] = {}
        self._toolset_bytes = 0
        self._next_session = 1
        self._sessions = 0

    async def open(self, spec: EpisodeSpec) -> tuple[LinkedSession, Observation]:
        """See `Sandbox.open`."""
        number = self._next_session
        self._next_session += 1
        body = orjson.dumps(
            {"task": spec.task, "seed": spec.seed, "step_timeout_s": spec.step_timeout_s, "options": spec.options}
        )
        self._sessions += 1
        session = LinkedSession(self, self._batcher, number)
        try:
            observation = await self._batcher.call(Op.OPEN, number, 0, body)
        except BaseException:  # cancellation included: the session must not outlive its owner
            session.close()
            raise
        return session, observation

    async def tasks(self, split: str) -> TaskList:
        """See `Sandbox.tasks`."""
        try:
            answered = await self._batcher.call(Op.TASKS, 0, 0, orjson.dumps({"split": split}))
        except SandboxRefused as refused:
            if refused.code == ErrorCode.UNKNOWN_SPLIT:
                raise UnknownName(refused.failure.message) from None
            if refused.code == ErrorCode.UNAVAILABLE:
                raise Unavailable(refused.failure.message) from None
            raise
        try:
            body = orjson.loads(answered.body)
            left_out = {str(name): (int(v["count"]), str(v["needs"])) for name, v in body["left_out"].items()}
            ids = [task for task in body["tasks"] if isinstance(task, str)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._malformed("task list") from None
        return TaskList(ids, left_out)

    async def solution(self, task: str) -> Sequence[bytes]:
        """See `Sandbox.solution`."""
        answered = await self._batcher.call(Op.SOLUTION, 0, 0, orjson.dumps({"task": task}))
        try:
            actions = orjson.loads(answered.body)
        except orjson.JSONDecodeError:
            raise self._malformed("solution") from None
        if not (isinstance(actions, list) and all(isinstance(action, str) for action in actions)):
            raise self._malformed("solution")
        return [action.encode() for action in actions]

    def _malformed(self, what: str) -> SandboxError:
        failure = Failure(FailureKind.PROTOCOL, "call", f"the sandbox's {what} is malformed")
        self.condemn(failure)
        return SandboxLost(failure, suspect=False)

    def toolsets(self) -> Mapping[str, bytes]:
        """See `Sandbox.toolsets`."""
        return self._toolsets

    def overdue(self, now: float) -> Failure | None:
        """See `Sandbox.overdue`."""
        return self._batcher.overdue(now, self._limit_s)

    def condemn(self, failure: Failure) -> None:
        """See `Sandbox.condemn`."""
        if not self.lost.done():
            self.lost.set_result(failure)
        self._batcher.fail(failure)

    def statistics(self) -> SandboxStatistics:
        """See `Sandbox.statistics`."""
        _, pending, calls, batches = self._batcher.statistics()
        return SandboxStatistics(self._sessions, pending, calls, batches, self.pid)

    async def run(self, socket: web.WebSocketResponse) -> Failure:
        """Carry calls and replies until the connection ends or the sandbox is condemned; returns why."""
        helpers = [
            asyncio.create_task(self._send(socket), name=f"send-{self.id}"),
            asyncio.create_task(self._ping(), name=f"ping-{self.id}"),
        ]
        try:
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    self._receive(message.data)
                elif message.type == aiohttp.WSMsgType.ERROR:
                    return Failure(FailureKind.PROTOCOL, "call", f"the connection failed: {socket.exception()}")
                else:
                    return Failure(FailureKind.PROTOCOL, "call", f"a {message.type.name} message, not a frame")
        except WireError as error:
            return Failure(FailureKind.PROTOCOL, "call", str(error))
        finally:
            for helper in helpers:
                helper.cancel()
        if socket.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG:
            return Failure(FailureKind.PROTOCOL, "call", "a frame was over the size cap")
        return Failure(FailureKind.SANDBOX_LOST, "call", "the sandbox closed its connection")

    async def _send(self, socket: web.WebSocketResponse) -> None:
        batcher = self._batcher
        while True:
            await batcher.ready.wait()
            # One turn more: replies come in several frames a turn apart, and what they lead to leaves together. Where
            # the kernel runs this process as soon as there is a reply (beside containers it does), that halves frames.
            await asyncio.sleep(0)
            try:
                await socket.send_bytes(encode(*batcher.take()))
            except ConnectionError:
                return  # the reader sees the same end and says why

    async def _ping(self) -> None:
        """An idle sandbox that hangs would be found out by the first episode that is given it: so it is never idle for
        long, and passes its deadline like any other. Pings are calls: one at a time, and none while others wait."""
        while True:
            await asyncio.sleep(PING_S)
            if not self._batcher.busy:
                self._batcher.call(Op.PING, 0, 0, b"").add_done_callback(_seen)

    def _receive(self, frame: bytes) -> None:
        answers = decode_answers(frame)
        for number, _, reward, _, body in answers:
            if len(body) > self.max_body:
                raise WireError(f"a reply of {len(body)} bytes is over the cap of {self.max_body}")
            if not isfinite(reward):
                raise WireError(f"a reply to call {number} has a reward that is not a finite number")
        for number, status, _, _, body in self._batcher.settle(answers):
            if status == Status.TOOLSET and number == 0:
                self._intern(body)
            elif status == Status.ERROR:
                self._refuse(number, body)
            elif status == Status.OK:
                raise WireError(f"a reply to call {number}, which was never made or is answered already")
            else:
                raise WireError(f"a reply has the unknown status {status}")

    def _refuse(self, number: int, raw: bytes) -> None:
        try:
            body: Any = orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise WireError("an error's body is not JSON") from None
        match body:
            case {"code": str(code), "message": str(message), "retryable": bool(retryable)}:
                if not self._batcher.refuse(number, partial(_refused, code, message, retryable)):
                    raise WireError(f"an error for call {number}, which was never made or is answered already")
            case _:
                raise WireError("an error's body is not {code, message, retryable}")

    def _intern(self, body: bytes) -> None:
        digest, _, tools = body.partition(b"\n")
        name = digest.decode("ascii", "replace")
        if toolset_digest(tools) != name or not tools.startswith(b"["):
            raise WireError("a tool set does not match its digest, or is not a JSON array")
        self._toolset_bytes += len(tools)
        if self._toolset_bytes > MAX_TOOLSET_BYTES:
            raise WireError(f"more than {MAX_TOOLSET_BYTES} bytes of tool sets")
        self._toolsets[name] = tools

    def forget(self, session: int, seq: int) -> None:
        """Close a session on the sandbox's side; called by the session, once."""
        self._sessions -= 1
        self._batcher.post(Op.CLOSE, session, seq)

    def __repr__(self) -> str:
        return f"<LinkedSandbox {self.id} sessions={self._sessions} {self._batcher!r}>"


class LinkedSession:
    """A session on a linked sandbox. Satisfies `orchestrator.protocols.Session`."""

    __slots__ = ("_batcher", "_closed", "_number", "_sandbox", "_seq")

    def __init__(self, sandbox: LinkedSandbox, batcher: Batcher, number: int) -> None:
        self._sandbox = sandbox
        self._batcher = batcher
        self._number = number
        self._seq = 1
        self._closed = False

    def _call(self, op: int, body: bytes) -> asyncio.Future[Observation]:
        if self._closed:
            raise _released()
        seq = self._seq
        self._seq = seq + 1
        return self._batcher.call(op, self._number, seq, body)

    async def step(self, action: bytes) -> Observation:
        """See `Session.step`."""
        if self._closed:
            raise _released()
        if len(action) > self._sandbox.max_body:
            message = f"the action has {len(action)} bytes; the cap is {self._sandbox.max_body}"
            raise _refused(ErrorCode.TOO_LARGE, message, False, "step")
        seq = self._seq
        self._seq = seq + 1
        return await self._batcher.call(_STEP, self._number, seq, action)

    async def replay(self, actions: Sequence[bytes]) -> list[Observation]:
        """See `Session.replay`: all actions leave in one batch."""
        futures = [self._call(Op.STEP, action) for action in actions]
        try:
            return [await future for future in futures]
        finally:
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # seen: the first one was raised

    async def evaluate(self, params: Mapping[str, object] | None = None) -> Evaluation:
        """See `Session.evaluate`."""
        body, reward, _ = await self._call(Op.EVALUATE, orjson.dumps(params) if params else b"")
        try:
            details = orjson.loads(body)
        except orjson.JSONDecodeError:
            details = None
        if not isinstance(details, dict):
            raise _refused(ErrorCode.ENVIRONMENT, "the grade's details are not a JSON object", False, "evaluate")
        return Evaluation(reward, orjson.dumps(details))  # our own bytes: they are copied into files of lines

    def close(self) -> None:
        """See `Session.close`."""
        if not self._closed:
            self._closed = True
            self._sandbox.forget(self._number, self._seq)


def _seen(answer: asyncio.Future[Observation]) -> None:
    """Whatever a ping is answered with, nobody asks."""
    if not answer.cancelled():
        answer.exception()


def _released() -> SandboxRefused:
    failure = Failure(FailureKind.PROTOCOL, "step", "the session was released; open a new one")
    return SandboxRefused(failure, code=ErrorCode.UNKNOWN_SESSION)


def _refused(code: str, message: str, retryable: bool, stage: str) -> SandboxError:
    message = message[:MESSAGE_CAP]  # it goes into logs and the store
    if (lost := _LOSSES.get(code)) is not None:
        return SandboxLost(Failure(lost, stage, message), suspect=True)
    kind = _KINDS.get(code, FailureKind.PROTOCOL)
    return SandboxRefused(Failure(kind, stage, message, retryable), code=code)
