"""Values of the store, and how a trajectory becomes a row and comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from orchestrator.types import EpisodeKey, Failure, FailureKind, Outcome, RunId, StopReason, Trajectory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apsw import SQLiteValue


@dataclass(frozen=True, slots=True)
class RunMeta:
    """What a run is. `created` is seconds since the epoch.

    `config` is any JSON object and stored as given: it must hold the names of secret variables, never their values.
    """

    run: RunId
    environment: str
    digest: str
    seed: int
    created: float
    config: Mapping[str, object]

    def to_json(self) -> str:
        """The stored form."""
        return orjson.dumps(self).decode()

    @classmethod
    def from_json(cls, text: str) -> RunMeta:
        """Read the stored form."""
        return cls(**orjson.loads(text))


class CommittedEpisode(NamedTuple):
    """What a resumed run needs to know of a stored key."""

    outcome: Outcome
    reward: float | None
    attempt: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all stored trajectories. Tokens and steps are counts.

    `duplicates` counts keys handed over again after they were stored (must be 0; the second is never stored);
    `redelivered` counts claims beyond the first of a group, over all consumers.
    """

    episodes: int = 0
    outcomes: Mapping[Outcome, int] = field(default_factory=dict)
    rewarded: int = 0
    reward_sum: float = 0.0
    reward_one: int = 0
    steps: int = 0
    model_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    recovered: int = 0
    groups: int = 0
    duplicates: int = 0
    redelivered: int = 0

    @property
    def reward_mean(self) -> float | None:
        """The mean over the episodes that carry a reward; None where none does."""
        return self.reward_sum / self.rewarded if self.rewarded else None


COLUMNS: Final = (
    "task, grp, sample, attempt, run_epoch, outcome, stop_reason, reward, steps, incarnations, model_calls,"
    " prompt_tokens, completion_tokens, failure, details, started, finished, buffer"
)
WIDTH: Final = COLUMNS.count(",") + 1


def encode(trajectory: Trajectory, run_epoch: int) -> tuple[SQLiteValue, ...]:
    """The row of a trajectory, in the order of COLUMNS."""
    t = trajectory
    failure = None if t.failure is None else orjson.dumps(t.failure).decode()
    return (
        t.key.task,
        t.key.group,
        t.key.sample,
        t.attempt,
        run_epoch,
        t.outcome.value,
        t.stop_reason.value,
        t.reward,
        t.steps,
        t.incarnations,
        t.model_calls,
        t.prompt_tokens,
        t.completion_tokens,
        failure,
        t.details,
        t.started,
        t.finished,
        t.buffer,
    )


def decode(row: Sequence[Any]) -> Trajectory:
    """The trajectory of a row selected as COLUMNS."""
    task, group, sample, attempt, _, outcome, stop, reward, steps, incarnations, calls, tokens_in, tokens_out = row[:13]
    failure, details, started, finished, buffer = row[13:]
    return Trajectory(
        key=EpisodeKey(task, group, sample),
        attempt=attempt,
        outcome=Outcome(outcome),
        stop_reason=StopReason(stop),
        reward=reward,
        steps=steps,
        buffer=buffer,
        incarnations=incarnations,
        model_calls=calls,
        prompt_tokens=tokens_in,
        completion_tokens=tokens_out,
        failure=None if failure is None else _failure(orjson.loads(failure)),
        details=details,
        started=started,
        finished=finished,
    )


def _failure(body: Mapping[str, str]) -> Failure:
    return Failure(FailureKind(body["kind"]), body["stage"], body["message"])
