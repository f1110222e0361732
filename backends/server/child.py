"""One session in a process of its own: answers the server's questions until the stream ends. Runs the agent's deeds.

A plain synchronous loop without a clock: nothing that an environment does to time, signals or globals disturbs it. What
the environment raises is an answer; what ends the process is the server's to notice.
"""

from __future__ import annotations

import traceback
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

import orjson

from backends.server.environment import (
    EnvironmentFault,
    Exports,
    Grade,
    GradesElsewhere,
    Reply,
    bad_reward,
    too_large,
)
from backends.server.pipe import MAX_STATE, MAX_TOOLSET, Answer, Ask, Told, give, next_question, split_head
from backends.server.wire import ErrorCode

if TYPE_CHECKING:
    import socket

    from backends.server.environment import Environment, Session

_MESSAGE_CAP: Final = 2000
_TRACE_CAP: Final = 8000
"""Bytes; six times as many in JSON, where each is a control character."""
_FRAMES: Final = 20


class Child:
    """The session's side of the stream."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._session: Session | None = None
        self._max_body = 0
        self._named: set[str] = set()

    def serve(self, channel: socket.socket) -> None:
        """Answer questions until the stream ends, then close the session. Raises OSError where the server is gone."""
        while (question := next_question(channel)) is not None:
            give(channel, self._answer(*question))
        if self._session is not None:
            self._session.close()

    def _answer(self, op: int, body: bytes) -> Answer:
        """The one place where an environment's exception becomes an answer."""
        try:
            return self._perform(op, body)
        except EnvironmentFault as fault:
            told = {"code": fault.code, "message": _text(str(fault)), "retryable": fault.retryable}
            return Answer(Told.FAULT, body=orjson.dumps(told))
        except Exception as error:  # noqa: BLE001  # an environment may raise anything; the session may go on
            trace = "".join(traceback.format_exception(error, limit=_FRAMES))
            told = {"message": _text(f"{type(error).__name__}: {error}"), "trace": _text(trace, _TRACE_CAP)}
            return Answer(Told.CRASH, body=orjson.dumps(told))

    def _perform(self, op: int, body: bytes) -> Answer:
        if op == Ask.OPEN:
            return self._open(orjson.loads(body))
        if op == Ask.GRADE:
            return self._grade(*split_head(body))
        session = self._session
        if session is None:
            raise EnvironmentFault(ErrorCode.UNKNOWN_SESSION, "the session did not open")
        if op == Ask.STEP:
            return self._reply(session.step(body))
        if op == Ask.EVALUATE:
            return self._graded(session.evaluate(orjson.loads(body)))
        return _exported(session)

    def _open(self, spec: dict[str, Any]) -> Answer:
        self._max_body = spec["max_body"]
        self._session, reply = self._environment.open(spec["task"], spec["seed"], spec["options"])
        return self._reply(reply)

    def _grade(self, spec: dict[str, Any], state: bytes) -> Answer:
        self._max_body = spec["max_body"]
        if not isinstance(self._environment, GradesElsewhere):
            raise TypeError(f"{type(self._environment).__name__} has no grade")
        options, params = spec["options"], spec["params"]
        return self._graded(self._environment.grade(spec["task"], spec["seed"], options, state, params))

    def _reply(self, reply: object) -> Answer:
        if not isinstance(reply, Reply):
            raise _wrong("Reply", reply)
        if len(reply.body) > self._max_body:
            raise too_large(len(reply.body), self._max_body)
        tools = b""
        if reply.toolset is not None and reply.toolset.digest not in self._named:
            tools = reply.toolset.body
            if len(tools) > MAX_TOOLSET:
                raise too_large(len(tools), MAX_TOOLSET)
            self._named.add(reply.toolset.digest)
        return Answer(Told.REPLY, _finite(reply.reward), bool(reply.done), tools, reply.body)

    def _graded(self, grade: object) -> Answer:
        if not isinstance(grade, Grade):
            raise _wrong("Grade", grade)
        details = orjson.dumps(grade.details)
        if len(details) > self._max_body:
            raise too_large(len(details), self._max_body)
        return Answer(Told.GRADE, _finite(grade.reward), True, b"", details)


def _exported(session: Session) -> Answer:
    if not isinstance(session, Exports):
        raise TypeError(f"{type(session).__name__} has no export, which its environment's grade needs")
    state = session.export()
    if len(state) > MAX_STATE:
        raise too_large(len(state), MAX_STATE)
    return Answer(Told.STATE, body=state)


def _finite(reward: object) -> float:
    if not (isinstance(reward, float | int) and isfinite(reward)):
        raise bad_reward(reward)
    return float(reward)


def _wrong(wanted: str, got: object) -> TypeError:
    return TypeError(f"isolation process needs a {wanted} from a plain function, not {type(got).__name__}")


def _text(text: str, cap: int = _MESSAGE_CAP) -> str:
    """An exception's text may hold anything, and any amount of it."""
    return text[:cap].encode("utf-8", "backslashreplace")[:cap].decode("utf-8", "ignore")
