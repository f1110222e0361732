"""What AgentScope's environment service is sent and what it answers, as this project's values. Pure.

The service reads tool calls from text: a message's calls become `<tool_call>` blocks behind its content. It answers
with messages of its own, which are recorded as they are, but for the empty list of calls that each carries.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

import orjson

from backends.server.wire import ErrorCode
from orchestrator.errors import SandboxError, SandboxRefused
from orchestrator.types import Evaluation, Failure, FailureKind, Observation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def as_text(action: bytes) -> dict[str, Any]:
    """An assistant message with its tool calls written as blocks of its text.

    Raises SandboxRefused (`bad_request`) for what is no message: the service must not see it.
    """
    try:
        message = orjson.loads(action)
        if not isinstance(message, dict):
            raise TypeError("it is not an object")
        content, calls = message.get("content"), message.get("tool_calls") or []
        blocks = [_block(call["function"]) for call in calls]
    except (ValueError, TypeError, KeyError) as error:
        failure = Failure(FailureKind.POLICY, "step", f"the action is not an assistant message: {error}")
        raise SandboxRefused(failure, code=ErrorCode.BAD_REQUEST) from None
    text = content if isinstance(content, str) else ""
    return {"role": "assistant", "content": "\n".join([text, *blocks] if text else blocks)}


def _block(function: Mapping[str, Any]) -> str:
    arguments = orjson.loads(function["arguments"])
    return f"<tool_call>\n{orjson.dumps({'name': function['name'], 'arguments': arguments}).decode()}\n</tool_call>"


def opened(answer: object) -> Observation:
    """The first observation. Raises SandboxError where the answer is none."""
    match answer:
        case {"state": list(state), **_rest}:
            return Observation(_body(state, "open"))
        case _:
            raise malformed("open", answer)


def stepped(answer: object) -> Observation:
    """An observation. Raises SandboxError where the answer is none."""
    match answer:
        case {"state": list(state), "reward": int() | float() as reward, "is_terminated": bool(done), **_rest}:
            return Observation(_body(state, "step"), _finite(float(reward), "step"), done)
        case _:
            raise malformed("step", answer)


def graded(answer: object) -> Evaluation:
    """A grade. Raises SandboxError for one that failed: the service answers that like a score of 0.0."""
    match answer:
        case {"error": error, **_rest}:
            raise SandboxError(Failure(FailureKind.ENVIRONMENT, "evaluate", f"the grading failed: {str(error)[:500]}"))
        case {"accuracy": int() | float() as reward, **_rest}:
            return Evaluation(_finite(float(reward), "evaluate"), orjson.dumps(answer))
        case int() | float():
            return Evaluation(_finite(float(answer), "evaluate"))
        case _:
            raise malformed("evaluate", answer)


def _body(state: Sequence[object], stage: str) -> bytes:
    if not all(isinstance(message, dict) for message in state):
        raise malformed(stage, state)
    kept = [{key: value for key, value in message.items() if key != "tool_calls" or value} for message in state]  # type: ignore[attr-defined]
    return orjson.dumps({"messages": kept})


def _finite(reward: float, stage: str) -> float:
    if not isfinite(reward):
        raise SandboxError(Failure(FailureKind.BAD_REWARD, stage, f"the reward {reward} is not a finite number"))
    return reward


def malformed(stage: str, answer: object) -> SandboxError:
    """The error for an answer of another shape."""
    return SandboxError(Failure(FailureKind.PROTOCOL, stage, f"the service answered with {str(answer)[:200]}"))
