"""Whether a run that was killed again and again has come to what an undisturbed one comes to. Lists in, counts out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from orchestrator import records

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from orchestrator.types import EpisodeKey, Trajectory


class Fingerprint(NamedTuple):
    """What must be the same in every run with the same seed."""

    outcome: str
    stop_reason: str
    reward: float | None
    digest: str
    """Of all actions, observations and the grade; what a model call cost may differ."""


class Evidence(NamedTuple):
    """What a run left. Each list may hold a key more than once: that is what is looked for."""

    stored: Sequence[tuple[EpisodeKey, Fingerprint]]
    outbox: Sequence[EpisodeKey]
    consumed: Sequence[EpisodeKey]
    """What a consumer was given and acknowledged."""
    refused: int
    """Second commits of a stored key that the store has turned away."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts of keys; all must be 0. `lost`: missing from the store, the outbox or the consumer. `duplicated`: there
    twice, in any of them. `unexpected`: never asked for. `wrong_rewards`: another reward or outcome than undisturbed,
    `wrong_trajectories`: other actions, observations or grade."""

    lost: int = 0
    duplicated: int = 0
    unexpected: int = 0
    wrong_rewards: int = 0
    wrong_trajectories: int = 0

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return self == Verdict()


def fingerprint(trajectory: Trajectory) -> Fingerprint:
    """What of a trajectory must not differ. Raises SchemaMismatch for a buffer of another version."""
    buffer = trajectory.buffer
    _, start = records.read_header(buffer)
    digest = blake2b(digest_size=8)
    for record in records.records(buffer, start):
        if record.kind != records.GENERATION:
            digest.update(bytes([record.kind]) + buffer[record.start : record.end])
    return Fingerprint(trajectory.outcome, trajectory.stop_reason, trajectory.reward, digest.hexdigest())


def judge(expected: Mapping[EpisodeKey, Fingerprint], evidence: Evidence) -> Verdict:
    """Compare a run with what it should have come to."""
    stored = dict(evidence.stored)
    places = [[key for key, _ in evidence.stored], evidence.outbox, evidence.consumed]
    common = [(expected[key], found) for key, found in stored.items() if key in expected]
    return Verdict(
        lost=len(set().union(*(expected.keys() - set(place) for place in places))),
        duplicated=sum(map(_surplus, places)) + evidence.refused,
        unexpected=len(set().union(*places) - expected.keys()),
        wrong_rewards=sum(right[:3] != found[:3] for right, found in common),
        wrong_trajectories=sum(right.digest != found.digest for right, found in common),
    )


def _surplus(keys: Iterable[EpisodeKey]) -> int:
    return sum(count - 1 for count in Counter(keys).values())
