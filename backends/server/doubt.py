"""What is believed of a session's process in which the agent's code runs.

Such code can answer in the session's place, or make the session raise. So nothing that it says earns a reward or spares
it one: a step's reward is none, an answer that no agent could be shown and an exception are the session's loss. A loss
is replayed alone, and where it comes again it is the agent's doing; an environment's failure would let the episode go
without a grade, and a policy would learn to fail where it expects a bad one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

from backends.server.environment import EnvironmentFault
from backends.server.pipe import Garbled
from backends.server.wire import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Container

    from backends.server.pipe import Answer

_ROLES: Final = frozenset({"system", "user", "assistant", "tool"})


def believable(answer: Answer, toolsets: Container[str]) -> Answer:
    """A step's answer without a reward. `toolsets` are the digests that its opening may have named. Raises Garbled."""
    if answer.toolset:
        raise Garbled("a tool set after the opening")
    try:
        body = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        raise Garbled("an observation that is not JSON") from None
    if not (isinstance(body, dict) and _can_be_shown(body, toolsets)):
        raise Garbled("an observation that no agent can be shown")
    return answer._replace(reward=0.0)


def _can_be_shown(body: dict[str, Any], toolsets: Container[str]) -> bool:
    messages, tools, named = body.get("messages"), body.get("tools_added", []), body.get("tools")
    return (
        isinstance(messages, list)
        and all(map(_is_message, messages))
        and isinstance(tools, list)
        and all(map(_is_tool, tools))
        and (named is None or (isinstance(named, str) and named in toolsets))
    )


def _is_message(value: object) -> bool:
    match value:
        case {"role": "tool", "content": str() | list(), "tool_call_id": str()}:
            return True
        case {"role": str(role), "content": str() | list()}:
            return role in _ROLES - {"tool"}
        case _:
            return False


def _is_tool(value: object) -> bool:
    match value:
        case {"type": "function", "function": {"name": str()}}:
            return True
        case _:
            return False


def failure(fault: EnvironmentFault) -> EnvironmentFault:
    """What an exception out of such a session is to the orchestrator."""
    return EnvironmentFault(ErrorCode.SESSION_LOST, f"the session failed, where the agent's code runs: {fault}")
