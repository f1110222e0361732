"""What a script is shown of a `MemoryBackend`'s calls, and the faults that it may answer with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from orchestrator.types import FailureKind


class MemoryCall(NamedTuple):
    """What a script is shown: `op` is create, open, step, evaluate, tasks, solution or destroy.

    `sandbox` numbers the sandboxes from 1 in the order of their starts; `turn` counts the session's answered actions.
    """

    sandbox: int
    op: str
    task: str = ""
    turn: int = 0
    action: bytes = b""


@dataclass(frozen=True, slots=True)
class Die:
    """The sandbox is lost with this call unanswered; for `create` and `destroy`: they fail."""

    kind: FailureKind = FailureKind.SANDBOX_LOST
    message: str = "it died as scripted"


@dataclass(frozen=True, slots=True)
class Gone:
    """The sandbox is lost before this call has reached it: a session's call, whose caller is no suspect."""


@dataclass(frozen=True, slots=True)
class Hang:
    """Never answered: until somebody condemns the sandbox, or for ever."""


@dataclass(frozen=True, slots=True)
class Slow:
    """Answered after `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answered with an error; the session lives on."""

    kind: FailureKind
    code: str


@dataclass(frozen=True, slots=True)
class Say:
    """Answered by this instead of what is true; `grade` for evaluate."""

    body: bytes = b'{"messages":[]}'
    grade: float = 0.0


Fault: TypeAlias = Die | Gone | Hang | Slow | Refuse | Say
Script: TypeAlias = Callable[[MemoryCall], Fault | None]
