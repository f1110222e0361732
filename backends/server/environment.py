"""What an environment's author implements; runs inside the sandbox.

`backends/environments/NAME/inside.py` defines `environment() -> Environment`. The server calls it once, then opens
sessions on it. In isolation `shared` all sessions live in one process and one thread: a session must keep its state to
itself and never touch module globals. `step` and `evaluate` may be plain functions, or coroutines where they wait.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import orjson

from backends.server.wire import ErrorCode, toolset_digest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence


class EnvironmentFault(Exception):
    """An error that the orchestrator is to see: `code` is one of `ErrorCode`, the message is for people."""

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


def unknown_task(task: str, hint: str = "") -> EnvironmentFault:
    """The task does not exist here."""
    return EnvironmentFault(ErrorCode.UNKNOWN_TASK, f"unknown task {task!r}{'; ' + hint if hint else ''}")


def unknown_split(split: str, known: Sequence[str]) -> EnvironmentFault:
    """The split does not exist; the message names the nearest and lists those that do."""
    close = get_close_matches(split, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return EnvironmentFault(ErrorCode.UNKNOWN_SPLIT, f"unknown split {split!r}; {hint}known: {', '.join(known)}")


def unavailable(what: str, needs: str) -> EnvironmentFault:
    """It exists but cannot run here."""
    return EnvironmentFault(ErrorCode.UNAVAILABLE, f"{what} cannot run here: it needs {needs}")


class Toolset:
    """A JSON array of OpenAI tools, named by its digest. Make one per distinct set and share it."""

    __slots__ = ("body", "digest")

    def __init__(self, tools: Sequence[object]) -> None:
        self.body = orjson.dumps(tools)
        self.digest = toolset_digest(self.body)


class Reply(NamedTuple):
    """A session's answer to open or step. `body` comes from `observation()`; `toolset` only where it names one."""

    body: bytes
    reward: float = 0.0
    done: bool = False
    toolset: Toolset | None = None


class Grade(NamedTuple):
    """The answer to evaluate: a finite reward, and details for people (any JSON object)."""

    reward: float
    details: Mapping[str, Any] = {}


class Tasks(NamedTuple):
    """A split: ids in the data's order; categories left out as name -> (count, what it needs)."""

    ids: Sequence[str]
    left_out: Mapping[str, tuple[int, str]] = {}


def observation(
    messages: Sequence[Mapping[str, Any]],
    *,
    toolset: Toolset | None = None,
    tools_added: Sequence[object] = (),
) -> bytes:
    """An observation's body: OpenAI messages, the opening tool set by digest, tools that appear now in full."""
    body: dict[str, Any] = {"messages": messages}
    if toolset is not None:
        body["tools"] = toolset.digest
    if tools_added:
        body["tools_added"] = tools_added
    return orjson.dumps(body)


class Session(Protocol):
    """One episode. All calls come from one place, one at a time."""

    def step(self, action: bytes) -> Reply | Awaitable[Reply]:
        """Answer one assistant message (JSON bytes of an OpenAI message).

        What the agent did wrong (bad JSON, unknown function) is an observation that says so, never an exception. An
        exception means that the environment is broken. After `done`, step is not called again.
        """
        ...

    def evaluate(self, params: Mapping[str, Any]) -> Grade | Awaitable[Grade]:
        """Grade the session as it stands: idempotent, allowed mid-episode, changes nothing."""
        ...

    def close(self) -> None:
        """Free what the session holds."""
        ...


class Environment(Protocol):
    """All tasks of one benchmark. The class attributes declare what the orchestrator may rely on."""

    name: ClassVar[str]
    isolation: ClassVar[str]
    """`shared` (plain objects in this process) or `process` (one child a session)."""
    deterministic: ClassVar[bool]
    """Same task, seed and actions: same bytes. Allows recovery by replay."""
    runs_code: ClassVar[bool]
    """Whether actions run as code: such an environment needs a container an episode."""
    max_turns: ClassVar[int]
    """A bound on the actions of any episode of this environment; the default turn budget."""

    def tasks(self, split: str) -> Tasks:
        """The tasks of `NAME` or `NAME:train` or `NAME:val`; "" is the default split. Raises EnvironmentFault."""
        ...

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[Session, Reply]:
        """A fresh session and its first observation. Raises EnvironmentFault."""
        ...

    def solution(self, task: str) -> Sequence[bytes]:
        """The known solution as actions, ending the episode. Raises EnvironmentFault where there is none."""
        ...
