"""The retry policy: what a failure means for the episode. Pure; the scheduler asks it once per failed attempt.

failure                            verdict
sandbox lost, hung, broke the      the same attempt goes on by replay in another sandbox: no model call is
wire, could not start              repeated; after `max_tries`, infra_failed
model endpoint unavailable         the same attempt goes on after a pause; after `max_tries`, infra_failed
shard of the orchestrator lost      the same attempt where its journal came back, else a new one; patiently: whole
                                    machines go at once; after `model_tries`, infra_failed
replay diverged, environment not   a new attempt; after `max_tries`, env_failed
deterministic
environment raised, bad reward,    env_failed at once: a deterministic environment would do it again
unknown task
policy raised                      infra_failed at once: the same code would do it again
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from orchestrator.types import Failure, FailureKind, Outcome

_SAME_ATTEMPT: Final = frozenset(
    {
        FailureKind.SANDBOX_LOST,
        FailureKind.SANDBOX_HUNG,
        FailureKind.SANDBOX_START,
        FailureKind.PROTOCOL,
        FailureKind.MODEL_UNAVAILABLE,
    }
)
_PATIENT: Final = frozenset({FailureKind.MODEL_UNAVAILABLE, FailureKind.SHARD_LOST})
_NEW_ATTEMPT: Final = frozenset({FailureKind.DIVERGED, FailureKind.NOT_DETERMINISTIC})
_ENVIRONMENT: Final = frozenset({FailureKind.ENVIRONMENT, FailureKind.BAD_REWARD, FailureKind.UNKNOWN_TASK})


@dataclass(frozen=True, slots=True)
class Again:
    """Try once more after `delay_s`; `new_attempt` forgets the history, else it is kept and replayed."""

    delay_s: float
    new_attempt: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the episode with `outcome` and no reward."""

    outcome: Outcome


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`max_tries` counts all tries of one episode; pauses double from `first_delay_s` up to `max_delay_s` seconds.

    An endpoint that is away fails all episodes at once, and comes back for all: `model_tries` is patient (about half an
    hour with the pauses as they are), so that an outage costs time and no episode.
    """

    max_tries: int = 4
    model_tries: int = 64
    first_delay_s: float = 0.5
    max_delay_s: float = 30.0

    def decide(self, failure: Failure, tries: int) -> Again | GiveUp:
        """The verdict on the failure of try number `tries` (from 1)."""
        kind = failure.kind
        outcome = Outcome.ENV_FAILED if kind in _ENVIRONMENT or kind in _NEW_ATTEMPT else Outcome.INFRA_FAILED
        same_attempt = kind in _SAME_ATTEMPT or failure.retryable
        new_attempt = kind in _NEW_ATTEMPT or (kind is FailureKind.SHARD_LOST and not failure.retryable)
        limit = self.model_tries if kind in _PATIENT else self.max_tries
        if tries >= limit or not (same_attempt or new_attempt):
            return GiveUp(outcome)
        if kind is FailureKind.SHARD_LOST:
            return Again(0.0, new_attempt)  # there are others, and it was not the episode's doing
        delay = min(self.first_delay_s * 2.0 ** min(tries - 1, 30), self.max_delay_s)
        return Again(delay, new_attempt)
