"""Carries the scheduler's commands out in one TaskGroup; results come back to it as events.

Owns the running episodes' tasks and the counters of progress. Always true: the
scheduler is fed from the event loop alone, one event at a time; an exception leaves an episode as a failure (data) or
ends the run; what an episode recorded is held until it is durable or the run ends. The facade makes it, and calls
`run` once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, assert_never

from orchestrator.delivery import Releases
from orchestrator.errors import RolloutError, first_error
from orchestrator.events import Draining, EpisodeEnded, EpisodeRetried
from orchestrator.playing import Unplayed
from orchestrator.records import EpisodeBuffer
from orchestrator.scheduler import (
    Command,
    Drain,
    Ended,
    Event,
    Failed,
    Finished,
    Lag,
    Launch,
    Record,
    Scheduler,
    SetAside,
    Stored,
    Tick,
    WakeAt,
)
from orchestrator.types import REWARDED, FailureKind, StopReason, Trajectory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.events import Listener
    from orchestrator.playing import Player
    from orchestrator.store import Store
    from orchestrator.types import EpisodeKey

CANCEL_S: Final = 5.0
"""How long cancelled episodes have before they are named, and cancelled again."""
LAG_S: Final = 0.1
"""How often the named consumer's lag is read."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counters:
    """What this life of the run has done. CPU in seconds, of this process and of its shards."""

    ended: int = 0
    steps: int = 0
    rewarded: int = 0
    reward_sum: float = 0.0
    recovered: int = 0
    retried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    attempts_lost: int = 0
    """Begun anew because their shard ended, and their steps with it."""
    cpu_s: float = 0.0
    sandbox_cpu_s: float = 0.0
    wall_start: float = 0.0
    wall_end: float = 0.0


class Engine:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        player: Player,
        head: bytes,
        emit: Listener,
        store: Store,
        held: dict[EpisodeKey, EpisodeBuffer],
        consumer: str | None,
    ) -> None:
        self.scheduler = scheduler
        self.counters = Counters()
        self.releases = Releases()
        self.complete = False
        self._player = player
        self._head = head
        """What every buffer of the run begins with."""
        self._emit = emit
        self._store = store
        self._held = held
        """Histories of episodes that are not running: resumed from the journal, or between two tries."""
        self._consumer = consumer
        """Whose lag pauses the run."""
        self._events: deque[Event] = deque()
        self._feeding = False
        self._episodes: dict[EpisodeKey, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._end = asyncio.Event()
        self.over = asyncio.Event()
        """Set when `run` has ended, however."""
        self._loop = asyncio.get_running_loop()
        self._error: RolloutError | None = None
        self._thresholds = gc.get_threshold()
        self._cpu_start = self._sandbox_cpu_start = 0.0

    async def run(self) -> None:
        """Run until every planned episode is durable, the run has drained, or `cancel` was called.

        Raises RunFailed or StoreError when it cannot go on. Cancelled: episodes are cancelled and sessions closed; what
        the journal holds can be resumed.
        """
        self._begin()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                lag = None
                if self._consumer is not None:
                    lag = tasks.create_task(self._watch_lag(self._consumer), name="consumer-lag")
                self.feed(Tick())
                try:
                    await self._end.wait()
                finally:
                    self._end.set()  # cancelled from outside: nothing is launched or recorded any more
                if lag is not None:
                    lag.cancel()
                await self._cancel_episodes()
        except* RolloutError as errors:
            self._error = self._error or first_error(errors)
        finally:
            self._tasks = None
            self.counters.sandbox_cpu_s = self._player.cpu_seconds() - self._sandbox_cpu_start
            gc.unfreeze()
            self.over.set()
            gc.set_threshold(*self._thresholds)
        if self._error is not None:
            raise self._error

    def _begin(self) -> None:
        gc.collect()
        gc.freeze()  # what start-up built stays: the collector need not walk it again and again
        gc.set_threshold(100_000, 50, 100)
        self._cpu_start = time.process_time() + self._player.own_cpu_seconds()
        self._sandbox_cpu_start = self._player.cpu_seconds()
        self.counters.wall_start = self.counters.wall_end = time.monotonic()

    def drain(self) -> None:
        """Start nothing more; what runs goes on to its end. Idempotent."""
        if not self.scheduler.draining:
            self._emit(Draining())
            self.feed(Drain())

    def cancel(self) -> None:
        """Stop now: episodes in flight are left to `resume`. Idempotent."""
        self._end.set()

    def fail(self, error: RolloutError) -> None:
        """The store or the journal cannot go on."""
        if self._error is None:
            self._error = error
        self.cancel()

    def committed(self, keys: Sequence[EpisodeKey], seqs: Sequence[int]) -> None:
        """Called by the store once a commit."""
        self.counters.cpu_s = time.process_time() + self._player.own_cpu_seconds() - self._cpu_start
        self.counters.wall_end = time.monotonic()
        self._player.stored(keys)
        self.feed(Stored(keys, len(seqs)))
        if seqs:
            self.releases.changed()

    def feed(self, event: Event) -> None:
        """Hand an event to the scheduler and carry its commands out, now."""
        self._events.append(event)
        if self._feeding or self._end.is_set():
            return
        self._feeding = True
        try:
            while self._events:
                for command in self.scheduler.handle(self._events.popleft(), self._loop.time()):
                    self._carry_out(command)
        finally:
            self._feeding = False

    def _carry_out(self, command: Command) -> None:
        match command:
            case Launch(key, attempt, fresh):
                self._launch(key, attempt, fresh=fresh)
            case Record(trajectory, release):
                self._count(trajectory)
                self._store.put(trajectory, release)
            case SetAside(key, attempt, outcome, failure):
                buffer = self._held.pop(key, None) or EpisodeBuffer(self._head)
                now = time.time()
                self._events.append(
                    Ended(
                        Trajectory(
                            key=key,
                            attempt=attempt,
                            outcome=outcome,
                            stop_reason=StopReason.FAILURE,
                            reward=None,
                            steps=buffer.turn,
                            buffer=bytes(buffer.data),
                            model_calls=buffer.model_calls,
                            prompt_tokens=buffer.tokens_in,
                            completion_tokens=buffer.tokens_out,
                            failure=failure,
                            started=now,
                            finished=now,
                        )
                    )
                )
            case WakeAt(due):
                self._loop.call_at(due, self.feed, Tick())
            case Finished(complete):
                self.complete = complete
                self._end.set()
            case _:
                assert_never(command)

    def _launch(self, key: EpisodeKey, attempt: int, *, fresh: bool) -> None:
        if self._tasks is None:
            raise RuntimeError("the engine is not running")
        held = self._held.pop(key, None)
        buffer = held if held is not None and not fresh else EpisodeBuffer(self._head)
        self._episodes[key] = self._tasks.create_task(self._play(key, attempt, buffer), name=f"episode-{key}")

    async def _play(self, key: EpisodeKey, attempt: int, buffer: EpisodeBuffer) -> None:
        try:
            trajectory = await self._player.play(key, attempt, buffer)
        except Unplayed as unplayed:
            del self._episodes[key]
            self._held[key] = unplayed.buffer
            self.counters.retried += 1
            lost = unplayed.failure
            self.counters.attempts_lost += lost.kind is FailureKind.SHARD_LOST and not lost.retryable
            self._emit(EpisodeRetried(key, attempt, unplayed.failure))
            self.feed(Failed(key, unplayed.failure))
        else:
            del self._episodes[key]
            self.feed(Ended(trajectory))

    def _count(self, trajectory: Trajectory) -> None:
        counters = self.counters
        counters.ended += 1
        counters.steps += trajectory.steps
        counters.outcomes[trajectory.outcome] += 1
        counters.recovered += trajectory.recovered
        if trajectory.failure is not None:
            counters.failures[trajectory.failure.kind] += 1
        if trajectory.outcome in REWARDED and trajectory.reward is not None:
            counters.rewarded += 1
            counters.reward_sum += trajectory.reward
        self._emit(
            EpisodeEnded(
                trajectory.key, trajectory.outcome, trajectory.stop_reason, trajectory.reward, trajectory.failure
            )
        )

    async def _cancel_episodes(self) -> None:
        """Cancel what runs, again and again: a policy that swallows a cancellation is named, and has no peace."""
        while left := {episode for episode in self._episodes.values() if not episode.done()}:
            for episode in left:
                episode.cancel()
            _, still = await asyncio.wait(left, timeout=CANCEL_S)
            if still:
                log.error("%d episodes go on although cancelled: the policy's act() swallows it", len(still))

    async def _watch_lag(self, consumer: str) -> None:
        """Tell the scheduler how far the named consumer is behind."""
        while True:
            self.feed(Lag(await self._store.unacked(consumer)))
            await asyncio.sleep(LAG_S)
