"""Values shared by every layer: what an episode is, what it did, how it ended.

All are frozen values, built once and never validated on the hot path; pydantic stands only at the
edges (configuration, HTTP, files). Nothing here imports anything else of the project.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, NewType

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RunId = NewType("RunId", str)
SandboxId = NewType("SandboxId", str)


class Outcome(StrEnum):
    """How an admitted episode ended. Only `completed` and `truncated` may carry a reward."""

    COMPLETED = "completed"
    """The environment said done and graded the episode."""
    TRUNCATED = "truncated"
    """A budget (turns, time, size) or the agent's own deed ended it early; graded where that is possible."""
    ENV_FAILED = "env_failed"
    """The environment's own code failed or is not reproducible: a defect of the environment, not of the agent."""
    INFRA_FAILED = "infra_failed"
    """Sandboxes or the model endpoint failed beyond the retry policy. Never a reward."""
    CANCELLED = "cancelled"
    """Given up before it ended. An interrupted run records none: its episodes are left to `resume`."""
    POISONED = "poisoned"
    """Opening this task killed its sandbox twice; the task is set aside for the run."""


REWARDED = frozenset({Outcome.COMPLETED, Outcome.TRUNCATED})


class StopReason(StrEnum):
    """Why an episode with an outcome stopped; finer than the outcome."""

    DONE = "done"
    """The environment reported the end."""
    MAX_TURNS = "max_turns"
    """The agent used up its actions."""
    TIME_BUDGET = "time_budget"
    """The episode's wall-clock budget ran out."""
    AGENT_KILLED_ENV = "agent_killed_env"
    """The agent's action killed its sandbox, proven by a second death alone in quarantine."""
    REPLY_TOO_LARGE = "reply_too_large"
    """The action, or its observation, was over the size cap."""
    FAILURE = "failure"
    """See the trajectory's failure."""


class OnAgentKill(StrEnum):
    """The reward of an episode whose own action killed its sandbox."""

    ZERO = "zero"
    """0.0, counted in the summary: a policy must not learn to delete its bad samples."""
    GRADE = "grade"
    """The grade of the state before that action."""
    DROP = "drop"
    """No reward; the group is partial."""


class FailureKind(StrEnum):
    """The taxonomy that the retry policy decides on."""

    SANDBOX_LOST = "sandbox_lost"
    """A sandbox's process or connection ended."""
    SANDBOX_HUNG = "sandbox_hung"
    """A sandbox made no progress within its deadline and was killed."""
    SANDBOX_START = "sandbox_start"
    """A sandbox could not be started."""
    SHARD_LOST = "shard_lost"
    """A shard of the orchestrator ended. `retryable`: its journal came back, and the same attempt goes on."""
    PROTOCOL = "protocol"
    """A sandbox broke the wire protocol; it was killed."""
    ENVIRONMENT = "environment"
    """The environment's code raised."""
    DIVERGED = "diverged"
    """A replayed action gave another observation than the recorded one."""
    NOT_DETERMINISTIC = "not_deterministic"
    """A sandbox of a non-deterministic environment was lost: it cannot be replayed."""
    POLICY = "policy"
    """The policy raised, or returned what is not a decision."""
    MODEL_UNAVAILABLE = "model_unavailable"
    """The model endpoint did not answer within its own retries."""
    BAD_REWARD = "bad_reward"
    """The environment returned a reward that is not a finite number."""
    UNKNOWN_TASK = "unknown_task"
    """The environment does not have this task, or cannot run it here."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Failure as data: the one form in which an exception leaves an episode.

    `stage` is where it happened (start, open, act, step, evaluate, close); `message` is for people. `retryable`: who
    failed says that the same call may succeed later.
    """

    kind: FailureKind
    stage: str
    message: str
    retryable: bool = False


class EpisodeKey(NamedTuple):
    """What is delivered exactly once: sample `sample` of task `task` in its `group`-th group of the run.

    `group` counts the groups of the same task (the epoch), from 0; `sample` counts within the group, from 0. The run
    is implied: a key lives in one run directory.
    """

    task: str
    group: int
    sample: int

    def __str__(self) -> str:
        return f"{self.task}/{self.group}/{self.sample}"


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A group to collect: `size` samples of one task. `index` is its place in the run's order."""

    index: int
    task: str
    group: int
    size: int


@dataclass(frozen=True, slots=True)
class GroupRelease:
    """Goes into the outbox with the group's last trajectory. `partial`: at least one sample carries no reward."""

    task: str
    group: int
    size: int
    partial: bool


@dataclass(frozen=True, slots=True)
class TaskList:
    """The tasks of a split in the data's order, and what was left out: category -> (count, what it needs)."""

    ids: Sequence[str]
    left_out: Mapping[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Generation:
    """What one model call cost and how it was sampled. `None` in its place: no model was called.

    Tokens are counts; `latency_s` is seconds; `sampling` holds the request's sampling parameters as sent.
    """

    model: str
    prompt_tokens: int
    completion_tokens: int
    latency_s: float
    finish_reason: str
    sampling: Mapping[str, object]
    calls: int = 1
    """Requests sent for this decision, retries included."""


class Decision(NamedTuple):
    """An agent's answer: `action` is one OpenAI assistant message as JSON bytes.

    It and Observation are made once a step, where a named tuple costs a third of a frozen dataclass.
    """

    action: bytes
    generation: Generation | None = None


class Observation(NamedTuple):
    """A sandbox's answer to open or step.

    `body` is `{"messages": [...], "tools": digest?, "tools_added": [...]?, "new_conversation": true?}`.
    """

    body: bytes
    reward: float = 0.0
    done: bool = False


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A grade. `reward` is finite; `details` is the environment's own JSON object (bytes), for people."""

    reward: float
    details: bytes = b"{}"


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """All that a session needs to open, equal for every incarnation of an attempt."""

    task: str
    seed: int
    step_timeout_s: float
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EnvironmentInfo:
    """What a sandbox says of the environment it serves. Resume and re-grading refuse another `digest`."""

    name: str
    digest: str
    isolation: str
    deterministic: bool
    runs_code: bool
    max_turns: int
    """The environment's own bound on actions an episode; the default of `max_turns`."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode's result: exactly one per admitted key.

    `buffer` is the recorded conversation (see `orchestrator.records`), with its header. `reward` is None unless the
    outcome may carry one. Times are seconds since the epoch.
    """

    key: EpisodeKey
    attempt: int
    outcome: Outcome
    stop_reason: StopReason
    reward: float | None
    steps: int
    buffer: bytes
    incarnations: int = 1
    model_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failure: Failure | None = None
    details: bytes = b"{}"
    started: float = 0.0
    finished: float = 0.0

    @property
    def recovered(self) -> bool:
        """Whether at least one incarnation was lost and the episode went on by replay."""
        return self.incarnations > 1


@dataclass(frozen=True, slots=True)
class Group:
    """All samples of one task's group, in sample order, released once.

    `partial` says that at least one of them carries no reward; such a place is never filled with a zero.
    """

    seq: int
    """Its number in the outbox, from 1, in the order of release."""
    task: str
    group: int
    partial: bool
    trajectories: Sequence[Trajectory]
    redelivered: bool = False
    """Whether an earlier claim of it by this consumer ended without an ack."""

    @property
    def rewards(self) -> list[float | None]:
        """Rewards in sample order; None where there is none."""
        return [t.reward for t in self.trajectories]
