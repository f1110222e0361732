"""What an environment's author implements; runs inside the sandbox.

`backends/environments/NAME/inside.py` defines `environment() -> Environment`. The server calls it once, then opens
sessions on it. In isolation `shared` all sessions live in one process and one thread: a session must keep its state to
itself and never touch module globals. `step` and `evaluate` may be plain functions, or coroutines where they wait.

In isolation `process` each session lives in a child of its own, forked from a process that has done `preload` and
nothing else: it may use globals, freeze clocks, change directories and die. There all of `open`, `step`, `evaluate` and
`close` are plain functions, run in that child; `tasks` and `solution` run in the server, which never preloads. A child
begins in an empty folder of its own, which is also its HOME and TMPDIR, the only place where it may change files, and
removed after it; what `preload` has written stays as it is.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import orjson

from backends.server.wire import ErrorCode, toolset_digest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence
    from pathlib import Path


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

    @classmethod
    def of(cls, body: bytes) -> Toolset:
        """The set whose JSON array is `body`."""
        made = cls.__new__(cls)
        made.body, made.digest = body, toolset_digest(body)
        return made


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


def bad_reward(reward: object) -> EnvironmentFault:
    """The environment returned a reward that is not a finite number."""
    text = f"the environment returned the reward {reward!r:.100}, not a finite number"
    return EnvironmentFault(ErrorCode.BAD_REWARD, text)


def too_large(size: int, cap: int) -> EnvironmentFault:
    """A reply's body has more bytes than may be sent."""
    return EnvironmentFault(ErrorCode.TOO_LARGE, f"the reply has {size} bytes; the cap is {cap}")


def observation(
    messages: Sequence[Mapping[str, Any]],
    *,
    toolset: Toolset | None = None,
    tools_added: Sequence[object] = (),
    new_conversation: bool = False,
) -> bytes:
    """An observation's body: OpenAI messages, the opening tool set by digest, tools that appear now in full.

    With `new_conversation` an agent is shown nothing of what was said before these messages; its tools stay.
    """
    body: dict[str, Any] = {"messages": messages}
    if toolset is not None:
        body["tools"] = toolset.digest
    if tools_added:
        body["tools_added"] = tools_added
    if new_conversation:
        body["new_conversation"] = True
    return orjson.dumps(body)


class Session(Protocol):
    """One episode. All calls come from one place, one at a time."""

    def step(self, action: bytes) -> Reply | Awaitable[Reply]:
        """Answer one assistant message (JSON bytes of an OpenAI message).

        What the agent did wrong (bad JSON, unknown function) is an observation that says so, never an exception. An
        exception means that the environment is broken; where it runs code, that the agent's code has broken it. After
        `done`, step is not called again.
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
    """Whether actions run as code: such an environment needs a container an episode, and, in isolation `process`, to
    be graded elsewhere (see GradesElsewhere), for what its sessions say is not believed: rewards of steps are 0.0."""
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


@runtime_checkable
class Preloads(Protocol):
    """An environment of isolation `process` that has something to load before its first session."""

    def preload(self) -> None:
        """Heavy imports and warm-up, once, in the process that every session's child is forked from.

        What it leaves in memory all children share until they write to it, and can read: load no secrets here. It must
        leave no thread running. Files that it leaves open are the children's too, one position for all of them. Folders
        that sessions write to must exist when it returns. An exception ends the sandbox's start.
        """
        ...


@runtime_checkable
class KeepsSecrets(Protocol):
    """An environment of isolation `process` with files that a session's child must not touch, such as its answers."""

    def secrets(self) -> Sequence[Path]:
        """Files and folders whose contents no session's child, nor what it starts, can read or change.

        Asked once, after `preload`. Paths that do not exist are passed over. Names and sizes stay visible. What did not
        exist when it was asked and lies directly in a folder above a secret is closed to sessions as well: keep secrets
        in few folders of their own. All else a session may read as its user may. Where the kernel has no means (Linux
        before 5.13, other systems) nothing is closed, and the sandbox says so.
        """
        ...


@runtime_checkable
class Exports(Protocol):
    """A session of isolation `process` that is graded elsewhere."""

    def export(self) -> bytes:
        """All that a grade depends on: idempotent, allowed mid-episode, changes nothing. At most 64 MiB."""
        ...


@runtime_checkable
class GradesElsewhere(Protocol):
    """An environment of isolation `process` whose sessions are graded where no action ever ran."""

    def grade(self, task: str, seed: int, options: Mapping[str, Any], state: bytes, params: Mapping[str, Any]) -> Grade:
        """Grade a session by what its `export` gave, in a fresh child that may read the secrets and runs no action.

        `task`, `seed` and `options` are those that it was opened with. `state` comes from where the agent's code runs,
        and may hold anything: never unpickle or run it; what makes no sense of it is worth 0.0. Then the session's own
        `evaluate` is not called.
        """
        ...
