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
    from collections.abc import Sequence


def as_text(action: bytes) -> dict[str, Any]:
    """An assistant message with its tool calls written as blocks of its text.

    A call that cannot be read is written as it is: it is the agent's mistake, and the service's to answer. Raises
    SandboxRefused (`bad_request`) for what is no message at all, which no agent writes.
    """
    try:
        message = orjson.loads(action)
    except orjson.JSONDecodeError as error:
        raise _no_message(str(error)) from None
    if not isinstance(message, dict):
        raise _no_message("it is not an object")
    calls = message.get("tool_calls") or []
    blocks = [_block(call) for call in (calls if isinstance(calls, list) else [calls])]
    text = _text(message.get("content"))
    return {"role": "assistant", "content": "\n".join([text, *blocks] if text else blocks)}


def _no_message(why: str) -> SandboxRefused:
    failure = Failure(FailureKind.POLICY, "step", f"the action is not an assistant message: {why}")
    return SandboxRefused(failure, code=ErrorCode.BAD_REQUEST)


def _text(content: object) -> str:
    """The text of a content, which may come in parts."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _block(call: object) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        inside = orjson.dumps(call).decode()
    else:
        name, arguments = orjson.dumps(function.get("name")).decode(), function.get("arguments")
        inside = f'{{"name": {name}, "arguments": {_arguments(arguments)}}}'
    return f"<tool_call>\n{inside}\n</tool_call>"


def _arguments(given: object) -> str:
    """A call's arguments as JSON; a text that is none is written as it is."""
    try:
        return orjson.dumps(orjson.loads(given) if isinstance(given, str) else given).decode()
    except orjson.JSONDecodeError:
        return str(given)


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
