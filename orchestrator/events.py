"""What happened, typed: the log, the progress display and tests read these. A few an episode, never one a step.

Schema version 1: fields may be added, never renamed. Listeners are plain functions called in the event loop; they must
return at once and must not raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from orchestrator.types import EpisodeKey, Failure, Outcome, SandboxId, StopReason

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class SandboxStarted:
    """A sandbox answers. `seconds` is how long its start took."""

    sandbox: SandboxId
    seconds: float


@dataclass(frozen=True, slots=True)
class SandboxEnded:
    """A sandbox is lost, with why; `sessions` episodes were on it."""

    sandbox: SandboxId
    failure: Failure
    sessions: int


@dataclass(frozen=True, slots=True)
class SandboxLeft:
    """A sandbox did not end within its deadline and is left to the reaper."""

    sandbox: SandboxId


@dataclass(frozen=True, slots=True)
class ShardStarted:
    """A shard takes episodes, on a node."""

    slot: int
    node: str


@dataclass(frozen=True, slots=True)
class ShardEnded:
    """A shard is lost, with why; `episodes` were under way on it."""

    slot: int
    failure: Failure
    episodes: int


@dataclass(frozen=True, slots=True)
class ShardWaits:
    """A shard has not begun, or not begun again, for a while; why."""

    slot: int
    why: str


@dataclass(frozen=True, slots=True)
class EpisodeRecovering:
    """An episode lost its sandbox and is replayed; `suspect`: its own call was unanswered at the death."""

    key: EpisodeKey
    attempt: int
    failure: Failure
    suspect: bool


@dataclass(frozen=True, slots=True)
class EpisodeRetried:
    """A try failed and the episode will be tried again."""

    key: EpisodeKey
    attempt: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class EpisodeEnded:
    """An episode has its outcome; it is not durable yet."""

    key: EpisodeKey
    outcome: Outcome
    stop_reason: StopReason
    reward: float | None
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class DeliveryWaits:
    """A queue's `deliver` has not returned for `seconds`."""

    queue: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Draining:
    """Nothing more is admitted."""


Event = (
    SandboxStarted
    | SandboxEnded
    | SandboxLeft
    | ShardStarted
    | ShardEnded
    | ShardWaits
    | EpisodeRecovering
    | EpisodeRetried
    | EpisodeEnded
    | DeliveryWaits
    | Draining
)
Listener = Callable[[Event], None]
