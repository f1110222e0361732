"""The scheduler: a pure state machine. `handle(event, now) -> commands`; no I/O, no tasks, no clock of its own.

Owns which episodes wait, run, pause before a retry, or are ended and not yet durable. Always true (`check()`):

- a key is in at most one of running, paused, unstored, stored;
- running episodes are at most `limit`, and nothing starts while draining, or while paused by a consumer's lag;
- ended episodes that are not yet durable are bounded: nothing starts while they outnumber `limit` plus SLACK;
- every planned key ends in exactly one Record; a group is released with its last one;
- after Finished nothing more is commanded.

The engine feeds it events and carries the commands out. An episode costs three events: launched, ended, stored.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, assert_never

from orchestrator.groups import GroupTracker
from orchestrator.retry import Again, GiveUp, RetryPolicy
from orchestrator.types import REWARDED, EpisodeKey, Failure, GroupRelease, GroupSpec, Outcome

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from orchestrator.planning import Plan
    from orchestrator.types import Trajectory

SLACK: Final = 512
"""Ended episodes that may wait for the store beyond the concurrency limit."""


class Ended(NamedTuple):
    """An episode has its trajectory."""

    trajectory: Trajectory


class Failed(NamedTuple):
    """A try of an episode failed; the retry policy decides."""

    key: EpisodeKey
    failure: Failure


class Stored(NamedTuple):
    """These trajectories are durable, and with them this many groups are released."""

    keys: Sequence[EpisodeKey]
    releases: int = 0


class Lag(NamedTuple):
    """The named consumer has this many released, un-acked groups, as the store says."""

    unacked: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: a wake-up that WakeAt asked for, or the start."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Start nothing more."""


Event = Ended | Failed | Stored | Lag | Tick | Drain


class Launch(NamedTuple):
    """Start or continue an episode. `attempt` from 0; `fresh` forgets any history the engine still holds."""

    key: EpisodeKey
    attempt: int
    fresh: bool


class Record(NamedTuple):
    """Hand a trajectory to the store, with its group's release when it is the last."""

    trajectory: Trajectory
    release: GroupRelease | None


class SetAside(NamedTuple):
    """End an episode that never ran, or will not run again: the engine makes its trajectory and feeds it back."""

    key: EpisodeKey
    attempt: int
    outcome: Outcome
    failure: Failure


class WakeAt(NamedTuple):
    """Feed a Tick at this time (the same clock as `now`, seconds)."""

    time: float


class Finished(NamedTuple):
    """Nothing runs and nothing will. `complete`: every planned episode is stored."""

    complete: bool


Command = Launch | Record | SetAside | WakeAt | Finished


class SchedulerStatistics(NamedTuple):
    """Where the episodes are now."""

    total: int
    waiting: int
    paused: int
    running: int
    unstored: int
    stored: int


@dataclass(slots=True)
class _Place:
    """A key's tries so far."""

    attempt: int = 0
    tries: int = 1


@dataclass(slots=True)
class Scheduler:
    """Decides what runs when. `stored` and `attempts` are what an earlier life of the run left."""

    plan: Plan
    limit: int
    max_unacked: int | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    stored: Collection[EpisodeKey] = ()
    attempts: Mapping[EpisodeKey, int] = field(default_factory=dict)
    """Attempts in flight when the earlier life ended: they go first, and keep their number."""
    open_samples: Iterable[tuple[EpisodeKey, bool]] = ()
    """Stored samples of groups not yet released: key, whether it carries a reward."""

    running: dict[EpisodeKey, _Place] = field(init=False, default_factory=dict)
    unstored: set[EpisodeKey] = field(init=False, default_factory=set)
    draining: bool = field(init=False, default=False)
    finished: bool = field(init=False, default=False)
    _unacked: int = field(init=False, default=0)
    """The consumer's lag at the last look at the store."""
    _released_since: int = field(init=False, default=0)
    """Groups released since that look."""
    _releasing: int = field(init=False, default=0)
    """Groups whose last trajectory is on its way to the store."""
    _ready: deque[tuple[EpisodeKey, _Place, bool]] = field(init=False, default_factory=deque)
    _paused: list[tuple[float, int, EpisodeKey, _Place, bool]] = field(init=False, default_factory=list)
    _paused_count: int = field(init=False, default=0)
    _poisoned: dict[str, Failure] = field(init=False, default_factory=dict)
    _fresh: Iterator[EpisodeKey] = field(init=False)
    _untouched: int = field(init=False)
    _stored_count: int = field(init=False)
    _tracker: GroupTracker = field(init=False)

    def __post_init__(self) -> None:
        self._tracker = GroupTracker(self.plan.size)
        self._tracker.restore(self.open_samples)
        self._stored_count = len(self.stored)
        resumed = [key for key in self.attempts if key not in self.stored]
        self._ready.extend((key, _Place(self.attempts[key]), False) for key in resumed)
        skip = set(self.stored).union(resumed)
        self._untouched = self.plan.episodes - len(skip)
        self._fresh = (key for spec in self.plan.specs() for key in _keys(spec) if key not in skip)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take an event in; what to do about it, in order."""
        commands: list[Command] = []
        match event:
            case Ended(trajectory):
                self._end(trajectory, commands)
            case Failed(key, failure):
                self._fail(key, failure, now, commands)
            case Stored(keys, releases):
                self.unstored.difference_update(keys)
                self._stored_count += len(keys)
                self._releasing -= releases
                self._released_since += releases
            case Lag(unacked):
                self._unacked, self._released_since = unacked, 0
            case Drain():
                self.draining = True
            case Tick():
                pass
            case _:
                assert_never(event)
        self._admit(now, commands)
        self._finish(commands)
        return commands

    def _end(self, trajectory: Trajectory, commands: list[Command]) -> None:
        key = trajectory.key
        if self.running.pop(key, None) is None:
            raise ValueError(f"episode {key} ended, but is not running")
        self.unstored.add(key)
        if trajectory.outcome is Outcome.POISONED and trajectory.failure is not None:
            self._poisoned.setdefault(key.task, trajectory.failure)
        rewarded = trajectory.outcome in REWARDED and trajectory.reward is not None
        release = self._tracker.ended(key, rewarded=rewarded)
        commands.append(Record(trajectory, release))
        if release is not None:
            self._releasing += 1

    def _fail(self, key: EpisodeKey, failure: Failure, now: float, commands: list[Command]) -> None:
        place = self.running[key]
        match self.retry.decide(failure, place.tries):
            case GiveUp(outcome):
                commands.append(SetAside(key, place.attempt, outcome, failure))
            case Again(delay, new_attempt):
                del self.running[key]
                again = _Place(place.attempt + new_attempt, place.tries + 1)
                self._paused_count += 1
                due = now + delay
                heapq.heappush(self._paused, (due, self._paused_count, key, again, new_attempt))
                commands.append(WakeAt(due))

    def _admit(self, now: float, commands: list[Command]) -> None:
        while self._paused and self._paused[0][0] <= now:
            _, _, key, place, fresh = heapq.heappop(self._paused)
            self._ready.append((key, place, fresh))
        while self._may_start():
            if self._ready:
                key, place, fresh = self._ready.popleft()
            else:
                fresh_key = next(self._fresh, None)
                if fresh_key is None:
                    return
                self._untouched -= 1
                key, place, fresh = fresh_key, _Place(), True
            self.running[key] = place
            if (failure := self._poisoned.get(key.task)) is not None:
                commands.append(SetAside(key, place.attempt, Outcome.POISONED, failure))
            else:
                commands.append(Launch(key, place.attempt, fresh))

    @property
    def lagging(self) -> bool:
        """Whether the consumer is too far behind, counting what is on its way to it."""
        behind = self._unacked + self._released_since + self._releasing
        return self.max_unacked is not None and behind >= self.max_unacked

    def _may_start(self) -> bool:
        return (
            len(self.running) < self.limit
            and not self.draining
            and len(self.unstored) < self.limit + SLACK
            and not self.lagging
        )

    def _finish(self, commands: list[Command]) -> None:
        if self.finished or self.running or self.unstored:
            return
        left = self._untouched + len(self._ready) + len(self._paused)
        if left == 0 or self.draining:
            self.finished = True
            commands.append(Finished(complete=left == 0))

    def poisoned(self, task: str) -> Failure | None:
        """Why a task is set aside, or None."""
        return self._poisoned.get(task)

    def statistics(self) -> SchedulerStatistics:
        """Counts; cheap."""
        return SchedulerStatistics(
            total=self.plan.episodes,
            waiting=self._untouched + len(self._ready),
            paused=len(self._paused),
            running=len(self.running),
            unstored=len(self.unstored),
            stored=self._stored_count,
        )

    def check(self) -> None:
        """Verify the invariants; raises AssertionError."""
        paused = {key for _, _, key, _, _ in self._paused}
        ready = {key for key, _, _ in self._ready}
        places = [set(self.running), paused, ready, self.unstored]
        if sum(map(len, places)) != len(set().union(*places)):
            raise AssertionError("a key is in two places")
        if len(self.running) > self.limit:
            raise AssertionError(f"{len(self.running)} episodes run; the limit is {self.limit}")
        counts = self.statistics()
        if counts.waiting + counts.paused + counts.running + counts.unstored + counts.stored != counts.total:
            raise AssertionError(f"episodes do not add up: {counts}")
        if self.finished and (self.running or self.unstored):
            raise AssertionError("finished while episodes run or wait for the store")
        self._tracker.check()


def _keys(spec: GroupSpec) -> Iterator[EpisodeKey]:
    return (EpisodeKey(spec.task, spec.group, sample) for sample in range(spec.size))
