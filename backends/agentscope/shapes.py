"""The values of AgentScope Runtime's training sandbox, made from ours. Pure; its service and its classes read the same.

    creating   {"state": [messages], "info": {"instance_id", "task_id", ...}}
    a step     {"state": [message], "reward": float, "is_terminated": bool, "info": {}}
    a grade    a float, or for BFCL without `sparse` a report

How tools and calls are written is in `dialect`. Messages of one answer are joined into one, except results of OpenAI
tool calls, which keep their ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

from backends.agentscope import dialect
from orchestrator.errors import UsageError
from orchestrator.records import parse_observation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.types import Evaluation, Observation

    Message = dict[str, Any]

COMPLETED: Final = "[CONVERSATION_COMPLETED]"
"""The last state of an episode whose end has no words of its own."""
REPORTING: Final = "bfcl"
"""The environment whose grade is a report unless `sparse` is asked for."""
PATHS: Final = frozenset({"data_path", "answer_path"})
"""Parameters of `create` that named files of the server."""
_IGNORED: Final = frozenset({"model_name"})
"""A parameter that only labelled the reference's own files."""


def action(message: object) -> tuple[bytes, bool]:
    """An action as our environments take it: one assistant message, or its text; whether its calls stood in the text.

    Raises UsageError.
    """
    if isinstance(message, str):
        message = {"role": "assistant", "content": message}
    if not isinstance(message, dict) or not message:
        raise UsageError('an action is a message: {"role": "assistant", "content": "..."}')
    called = dialect.called(message)
    try:
        return orjson.dumps(called or message), called is not None
    except TypeError as error:
        raise UsageError(f"an action must be JSON: {error}") from None


def is_plain(message: object) -> bool:
    """Whether an assistant message calls nothing: in BFCL it ends the user's turn."""
    if isinstance(message, dict):
        if message.get("tool_calls"):
            return False
        message = message.get("content")
    return dialect.OPEN not in str(message)


def options(params: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parameters of `create` as options of an episode. Raises UsageError where a client chooses files."""
    given = dict(params or {})
    if chosen := sorted(given.keys() & PATHS):
        raise UsageError(f"{chosen[0]} names a file of the server; its data is chosen there: `rollout env data`")
    return {name: value for name, value in given.items() if name not in _IGNORED}


def tools_of(body: bytes) -> str | None:
    """The digest of the tool set that an opening observation names."""
    digest = parse_observation(body).get("tools")
    return digest if isinstance(digest, str) else None


def info(environment: str, instance: str, task: str, tools: int, questions: int) -> dict[str, Any]:
    """What creating an instance says beside its state."""
    said: dict[str, Any] = {"instance_id": instance, "task_id": task}
    if environment == REPORTING:
        said |= {"test_id": task, "tools_count": tools, "questions_count": questions}
    return said


def questions(evaluation: Evaluation) -> int:
    """How many turns of the user a task has, as the details of its grade say: one where they do not."""
    turns = orjson.loads(evaluation.details).get("turns")
    return len(turns) if isinstance(turns, list) else 1


def answer(observation: Observation, reward: float | None = None, *, as_text: bool = False) -> dict[str, Any]:
    """The result of a step. `reward` takes the place of the observation's own; `as_text`: so were the calls."""
    body = parse_observation(observation.body)
    messages = body.get("messages", [])
    messages = _joined(dialect.responses(messages) if as_text else messages)
    if added := body.get("tools_added"):
        messages = dialect.with_functions(messages, added)
    if not messages:
        messages = [{"role": "user", "content": COMPLETED if observation.done else ""}]
    return {
        "state": [{**message, "tool_calls": []} for message in messages],
        "reward": observation.reward if reward is None else reward,
        "is_terminated": observation.done,
        "info": {},
    }


def score(
    environment: str, task: str, evaluation: Evaluation, *, sparse: bool, turns: int, done: bool
) -> float | dict[str, Any]:
    """A grade: the reward, or BFCL's report. `turns` counts the user's turns that were followed by another one."""
    if sparse or environment != REPORTING:
        return evaluation.reward
    details = orjson.loads(evaluation.details)
    report = {
        "valid": bool(details.get("valid", evaluation.reward == 1.0)),
        "accuracy": evaluation.reward,
        "total_count": 1,
        "correct_count": int(evaluation.reward == 1.0),
        "test_category": task.rpartition("_")[0],
        "test_id": task,
        "model_name": "env_handler",
        "input_tokens": 0,
        "output_tokens": 0,
        "turn_count": turns,
        "completed": done,
    }
    return report | {name: details[name] for name in ("error_type", "error_message") if name in details}


def tools_text(tools: Sequence[Any]) -> str:
    """An instance's tools for people, one a line."""
    lines = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        words = str(function.get("description", "")).split()
        lines.append(f"- {function.get('name', 'unknown')}: {' '.join(words)}")
    return "\n".join(["Available tools:", *lines])


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of the same role become one message; what answers a call by its id stays as it is."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else {}
        if last.get("role") == message.get("role") == "user" and _is_text(last) and _is_text(message):
            joined[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            joined.append(dict(message))
    return joined


def _is_text(message: Message) -> bool:
    return isinstance(message.get("content"), str)
