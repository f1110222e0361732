"""Guess a number between 1 and 100: this file runs inside the sandbox, on standard library and `backends.server` alone.

The agent calls the tool `guess`, and is told "higher" or "lower". The right number ends the episode, and is worth 1.0.
Tasks are `number_0` to `number_99`; the splits `mygame:train` and `mygame:val` share them out.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from backends.server.environment import Grade, Reply, Tasks, Toolset, observation, unknown_split, unknown_task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TASKS = tuple(f"number_{n}" for n in range(100))
HIGHEST = 100
TOOLS = Toolset(
    [
        {
            "type": "function",
            "function": {
                "name": "guess",
                "description": "Guess the number.",
                "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]},
            },
        }
    ]
)


def environment() -> MyGameEnvironment:
    """The entry point that the server calls, once."""
    return MyGameEnvironment()


class MyGameEnvironment:
    """All tasks. One object serves every session of its process."""

    name: ClassVar[str] = "mygame"
    isolation: ClassVar[str] = "shared"
    deterministic: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    max_turns: ClassVar[int] = 20

    def tasks(self, split: str) -> Tasks:
        """The ids of a split, in a fixed order; "" is the default split."""
        parts = {"": slice(None), "mygame": slice(None), "mygame:train": slice(0, 80), "mygame:val": slice(80, None)}
        if split not in parts:
            raise unknown_split(split, [name for name in parts if name])
        return Tasks(TASKS[parts[split]])

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[Episode, Reply]:
        """A fresh session and its first observation. What varies between groups of a task comes from `seed` alone."""
        episode = Episode(secret(task))
        messages = [{"role": "user", "content": f"Find my number: it is between 1 and {HIGHEST}."}]
        return episode, Reply(observation(messages, toolset=TOOLS), toolset=TOOLS)

    def solution(self, task: str) -> Sequence[bytes]:
        """Actions that earn 1.0 and end the episode: `--policy replay` plays them."""
        function = {"name": "guess", "arguments": orjson.dumps({"number": secret(task)}).decode()}
        call = {"id": "call_0", "type": "function", "function": function}
        return [orjson.dumps({"role": "assistant", "content": None, "tool_calls": [call]})]


def secret(task: str) -> int:
    """The number of a task. Raises EnvironmentFault for a task that does not exist."""
    if task not in TASKS:
        raise unknown_task(task, f"there are {TASKS[0]} to {TASKS[-1]}")
    return 1 + hashlib.sha256(task.encode()).digest()[0] % HIGHEST


class Episode:
    """One episode."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._found = False

    def step(self, action: bytes) -> Reply:
        """Answer one assistant message. Whatever an agent does wrong is an observation that says so."""
        calls = calls_of(action)
        if not calls:
            return Reply(observation([{"role": "user", "content": "Call the tool `guess`."}]))
        messages = [{"role": "tool", "tool_call_id": id_, "content": self._told(number)} for id_, number in calls]
        return Reply(observation(messages), reward=float(self._found), done=self._found)

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        """The grade as the episode stands: may be asked at any time, changes nothing."""
        return Grade(float(self._found))

    def close(self) -> None:
        """Nothing is held."""

    def _told(self, number: object) -> str:
        if type(number) is not int:
            return "error: guess takes one argument, `number`, an integer"
        self._found = self._found or number == self._number
        return "right" if number == self._number else "higher" if number < self._number else "lower"


def calls_of(action: bytes) -> list[tuple[str, object]]:
    """The calls of `guess` in a message: their ids, and the numbers where there are any."""
    try:
        message = orjson.loads(action)
    except orjson.JSONDecodeError:
        return []
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    return [call_of(call) for call in calls] if isinstance(calls, list) else []


def call_of(call: object) -> tuple[str, object]:
    """One call's id and number; None for a number that cannot be read."""
    call = call if isinstance(call, dict) else {}
    function = call.get("function")
    function = function if isinstance(function, dict) else {}
    try:
        arguments = orjson.loads(function.get("arguments", ""))
    except (orjson.JSONDecodeError, TypeError):
        arguments = None
    number = arguments.get("number") if function.get("name") == "guess" and isinstance(arguments, dict) else None
    return str(call.get("id", "")), number
