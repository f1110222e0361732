"""BFCL inside the sandbox: opens sessions, lists tasks, and knows their solutions.

Options of `open`: `dialect`, `openai` (the default: the tools come as a tool set) or `tool_call` (they stand in a
system message, as text). The seed changes nothing: a simulator's random numbers follow from the task alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from backends.environments.bfcl import dialect, solutions, splits, tasks
from backends.environments.bfcl.memory import MemorySession
from backends.environments.bfcl.session import MultiTurnSession, SingleTurnSession
from backends.server.environment import EnvironmentFault, Reply, Tasks, observation
from backends.server.wire import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.server.environment import Environment, Session


class Bfcl:
    """The Berkeley Function Calling Leaderboard. One object serves all sessions of its process."""

    name: ClassVar[str] = "bfcl"
    isolation: ClassVar[str] = "shared"
    deterministic: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    max_turns: ClassVar[int] = 109 * 21
    """The longest tasks, of memory, have 109 turns of the user, and one ends with its 21st action at the latest."""

    def tasks(self, split: str) -> Tasks:
        """The tasks of a split; see `splits`. Raises EnvironmentFault."""
        return splits.resolve(split)

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[Session, Reply]:
        """A fresh session and the first messages of its task. Raises EnvironmentFault."""
        text = _as_text(options)
        found = tasks.load(task)
        session: Session
        messages: Sequence[Mapping[str, Any]]
        match found:
            case tasks.MultiTurnTask(turns=turns):
                session, messages = MultiTurnSession(found, text=text), turns[0]
            case tasks.MemoryTask():
                session = MemorySession(found, text=text)
                messages = session.opening()
            case tasks.SingleTurnTask(messages=messages):
                session = SingleTurnSession(found)
        if text and found.tools:
            return session, Reply(observation(dialect.opening(messages, found.tools)))
        return session, Reply(observation(messages, toolset=found.toolset), toolset=found.toolset)

    def solution(self, task: str) -> Sequence[bytes]:
        """Actions that solve a task, as far as upstream's data does. Raises EnvironmentFault."""
        return solutions.actions(tasks.load(task))


def _as_text(options: Mapping[str, Any]) -> bool:
    if unknown := options.keys() - {"dialect"}:
        raise EnvironmentFault(ErrorCode.BAD_REQUEST, f"unknown option {min(unknown)!r}; bfcl takes: dialect")
    chosen = options.get("dialect", dialect.DIALECTS[0])
    if chosen not in dialect.DIALECTS:
        known = ", ".join(dialect.DIALECTS)
        raise EnvironmentFault(ErrorCode.BAD_REQUEST, f"unknown dialect {chosen!r}; known: {known}")
    return bool(chosen == "tool_call")


def environment() -> Environment:
    """What the server serves."""
    return Bfcl()
