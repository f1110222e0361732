"""The driver's side: one `Player` over all shards, and what becomes of a dead shard's episodes.

Owns the links and the episodes that are on their way. Always true: an episode is launched on one living link at a time;
what a link says after its end is not heard, so a dead shard commits nothing; the episodes of a dead shard wait until
their journalled steps are reported, by whichever shard has found them, and then go on from there (the same attempt, no
model call repeated); once all shards are ready again, or after ORPHANED_S, they go on from the beginning (a new
attempt, counted in `attempts_lost`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, NamedTuple

from orchestrator.errors import RunFailed
from orchestrator.events import ShardEnded, ShardStarted
from orchestrator.playing import Unplayed
from orchestrator.records import EpisodeBuffer
from orchestrator.shards.messages import (
    End,
    Fatal,
    FrameError,
    Held,
    Launch,
    NotPlayed,
    Played,
    Ready,
    Settled,
    Standing,
    Tools,
    decode,
)
from orchestrator.shards.runner import Outbox
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from orchestrator.events import Listener
    from orchestrator.shards.runner import Channel
    from orchestrator.types import EpisodeKey, Trajectory

ORPHANED_S: Final = 15.0
"""How long a dead shard's episodes wait for its successor."""
SILENT_S: Final = 20.0
"""A shard that has said nothing for so long is believed dead; it says something about once a second."""
QUIET_S: Final = 2.5
"""A shard that has said nothing for so long gets nothing new as long as there is another."""
ALONE_S: Final = 300.0
"""How long a run waits for any shard at all."""


class CrewStatistics(NamedTuple):
    """Shards alive and lost so far; attempts begun anew; sandboxes alive; CPU seconds of the shards' own processes."""

    live: int
    lost: int
    attempts_lost: int
    sandboxes: int
    cpu_s: float


class ShardLink:
    """The driver's end of one shard's connection. `slot` is the shard's place: its successor has the same."""

    def __init__(self, crew: Crew, slot: int) -> None:
        self.slot = slot
        self.node = ""
        self.ready = False
        self.lost = False
        self.ended: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended, with why."""
        self.outbox = Outbox()
        self.running: dict[EpisodeKey, int] = {}
        """Launched here: key -> attempt."""
        self.standing = Standing(0, 0.0, 0.0)
        self.heard = asyncio.get_running_loop().time()
        self._crew = crew

    async def run(self, channel: Channel) -> Failure:
        """Carry messages until the connection ends; returns why."""
        why = Failure(FailureKind.SHARD_LOST, "shard", f"shard {self.slot} closed its connection")
        try:
            async with asyncio.TaskGroup() as tasks:
                sender = tasks.create_task(self.outbox.carry(channel), name=f"to-shard-{self.slot}")
                await self._listen(channel)
                sender.cancel()
        except* FrameError as errors:
            why = Failure(FailureKind.SHARD_LOST, "shard", f"shard {self.slot}: {errors.exceptions[0]}")
        finally:
            self._crew.lose(self, why)
        return why

    async def _listen(self, channel: Channel) -> None:
        async for frame in channel.frames():
            self.heard = asyncio.get_running_loop().time()
            for message in decode(frame):
                self._crew.hear(self, message)
            if self.lost:
                return


class Crew:
    """See the module's docstring. Satisfies `Player`. `wanted` is how many shards there are, `absorb` takes tool sets.

    `head` begins every buffer; `journalled`: shards keep a journal, so that a successor may know a dead one's steps;
    `emit` hears of shards that come and go.
    """

    def __init__(
        self,
        wanted: int,
        head: bytes,
        absorb: Callable[[Mapping[str, bytes]], None],
        *,
        journalled: bool,
        emit: Listener,
    ) -> None:
        self.wanted = wanted
        self._head = head
        self._journalled = journalled
        self._absorb = absorb
        self._emit = emit
        self._links: list[ShardLink] = []
        self._joined = asyncio.Event()
        self._waiting: dict[EpisodeKey, tuple[int, asyncio.Future[Trajectory]]] = {}
        """Episodes on their way: key -> attempt, who waits."""
        self._orphans: dict[EpisodeKey, ShardLink] = {}
        """Episodes of dead shards: key -> the link that had it under way."""
        self._reporters: dict[EpisodeKey, set[int]] = {}
        """Slots whose journals hold a key that was played elsewhere since."""
        self._players: dict[EpisodeKey, int] = {}
        self._alive: set[EpisodeKey] = set()
        """Played once at least, and not durable yet."""
        self.held: dict[EpisodeKey, tuple[int, EpisodeBuffer]] = {}
        """What the journals of an earlier life hold, until the run begins."""
        self._begun = False
        self.ending = False
        """Whether nothing more comes: who ends now is not lost."""
        self._failed: str | None = None
        self._lost = 0
        self._attempts_lost = 0
        self._gone_cpu = self._gone_sandbox_cpu = 0.0

    # -- what the engine asks

    async def play(self, key: EpisodeKey, attempt: int, buffer: EpisodeBuffer) -> Trajectory:
        """See `Player.play`. Cancelled: the shard goes on until its connection ends, and nobody listens."""
        self._begun = True
        self._alive.add(key)
        link = await self._least_busy()
        answer: asyncio.Future[Trajectory] = asyncio.get_running_loop().create_future()
        self._waiting[key] = attempt, answer
        link.running[key] = attempt
        link.outbox.put(Launch(key, attempt, bytes(buffer.data)))
        try:
            return await answer
        finally:
            self._waiting.pop(key, None)

    def stored(self, keys: Sequence[EpisodeKey]) -> None:
        """See `Player.stored`."""
        settled: dict[int, list[EpisodeKey]] = {}
        self._alive.difference_update(keys)
        for key in keys:
            slots = self._reporters.pop(key, set())
            if (slot := self._players.pop(key, None)) is not None:
                slots.add(slot)
            for slot in slots:
                settled.setdefault(slot, []).append(key)
        for link in self._links:
            if mine := settled.get(link.slot):
                link.outbox.put(Settled(mine))

    def cpu_seconds(self) -> float:
        """See `Player.cpu_seconds`: as the shards said last."""
        return self._gone_sandbox_cpu + sum(link.standing.sandbox_cpu_s for link in self._links)

    def own_cpu_seconds(self) -> float:
        """See `Player.own_cpu_seconds`: as the shards said last."""
        return self.statistics().cpu_s

    def statistics(self) -> CrewStatistics:
        """Counts; cheap."""
        sandboxes = sum(link.standing.sandboxes for link in self._links)
        cpu_s = self._gone_cpu + sum(link.standing.cpu_s for link in self._links)
        return CrewStatistics(len(self._links), self._lost, self._attempts_lost, sandboxes, cpu_s)

    async def _least_busy(self) -> ShardLink:
        while True:
            if self._failed is not None:
                raise RunFailed(self._failed)
            if ready := [link for link in self._links if link.ready]:
                quiet = asyncio.get_running_loop().time() - QUIET_S
                return min(ready, key=lambda link: (link.heard < quiet, len(link.running)))
            self._joined.clear()
            try:
                async with asyncio.timeout(ALONE_S):
                    await self._joined.wait()
            except TimeoutError:
                raise RunFailed(f"no shard has been there for {ALONE_S:g} s; see `rollout doctor`") from None

    # -- what whoever runs the shards says

    def join(self, slot: int) -> ShardLink:
        """A shard has dialled in."""
        link = ShardLink(self, slot)
        self._links.append(link)
        return link

    async def gathered(self, *, everyone: bool, within_s: float) -> None:
        """Wait until one shard is ready; with `everyone` for all of them, within the time. Raises RunFailed."""
        try:
            async with asyncio.timeout(within_s):
                while not self._enough(everyone=everyone):
                    self._joined.clear()
                    await self._joined.wait()
        except TimeoutError:
            if not self._enough(everyone=False):
                raise RunFailed(f"no shard was ready within {within_s:g} s; see `rollout doctor`") from None

    def _enough(self, *, everyone: bool) -> bool:
        if self._failed is not None:
            raise RunFailed(self._failed)
        ready = sum(link.ready for link in self._links)
        return ready >= (self.wanted if everyone else 1)

    def fail(self, message: str) -> None:
        """The run cannot go on: whoever waits is told."""
        self._failed = message
        self._joined.set()
        for _, answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(RunFailed(message))

    def end(self, *, complete: bool) -> None:
        """Tell all shards that nothing more comes."""
        self.ending = True
        for link in self._links:
            link.outbox.put(End(complete))

    def silent(self, now: float) -> list[ShardLink]:
        """Links that have said nothing for too long, at monotonic `now`."""
        return [link for link in self._links if now - link.heard > SILENT_S]

    # -- what the links say

    def hear(self, link: ShardLink, message: object) -> None:
        """One message of a shard. Raises FrameError where a shard would not say it."""
        if link.lost:
            return
        match message:
            case Played(trajectory):
                self._played(link, trajectory)
            case NotPlayed(key, attempt, failure, buffer):
                self._unplayed(link, key, attempt, failure, buffer)
            case Standing():
                link.standing = message
            case Tools(digest, body):
                self._absorb({digest: body})
            case Held(key, attempt, buffer):
                self._held(link, key, attempt, buffer)
            case Ready(node):
                link.node, link.ready = node, True
                self._emit(ShardStarted(link.slot, node))
                if sum(one.ready for one in self._links) >= self.wanted:  # what nobody has reported by now, nobody has
                    self._give_up(self._orphans)
                self._joined.set()
            case Fatal(text, hopeless):
                self.lose(link, Failure(FailureKind.SHARD_LOST, "shard", text))
                if hopeless:
                    self.fail(text)
            case _:
                raise FrameError(f"a shard does not say {type(message).__name__}")

    def _played(self, link: ShardLink, trajectory: Trajectory) -> None:
        key = trajectory.key
        if link.running.pop(key, None) != trajectory.attempt:
            raise FrameError(f"{key} was not launched there")
        self._players[key] = link.slot
        if (waiting := self._waiting.get(key)) is not None and not waiting[1].done():
            waiting[1].set_result(trajectory)

    def _unplayed(self, link: ShardLink, key: EpisodeKey, attempt: int, failure: Failure, buffer: bytes) -> None:
        if link.running.pop(key, None) != attempt:
            raise FrameError(f"{key} was not launched there")
        self._reporters.setdefault(key, set()).add(link.slot)
        self._raise(key, attempt, Unplayed(failure, EpisodeBuffer.restore(buffer)))

    def _held(self, link: ShardLink, key: EpisodeKey, attempt: int, buffer: bytes) -> None:
        if self._begun and key not in self._alive:  # a journal does not remember what it has forgotten
            link.outbox.put(Settled([key]))
            return
        self._reporters.setdefault(key, set()).add(link.slot)
        orphaned = self._orphans.get(key)
        if orphaned is not None and orphaned.running[key] == attempt:
            del self._orphans[key]
            failure = Failure(FailureKind.SHARD_LOST, "shard", "its shard ended; its journal is there", retryable=True)
            self._raise(key, attempt, Unplayed(failure, EpisodeBuffer.restore(buffer)))
        elif not self._begun:
            known = self.held.get(key)
            if known is None or (known[0], len(known[1].data)) < (attempt, len(buffer)):
                self.held[key] = attempt, EpisodeBuffer.restore(buffer)

    def _raise(self, key: EpisodeKey, attempt: int, unplayed: Unplayed) -> None:
        waiting = self._waiting.get(key)
        if waiting is not None and waiting[0] == attempt and not waiting[1].done():
            waiting[1].set_exception(unplayed)

    def lose(self, link: ShardLink, why: Failure) -> None:
        """A shard has gone, with what it had under way. Idempotent."""
        if link.lost:
            return
        link.lost, link.ready = True, False
        self._links.remove(link)
        self._gone_cpu += link.standing.cpu_s
        self._gone_sandbox_cpu += link.standing.sandbox_cpu_s
        if not self.ending:
            self._lost += 1
            self._emit(ShardEnded(link.slot, why, len(link.running)))
        self._orphans.update(dict.fromkeys(link.running, link))
        patience = ORPHANED_S if self._journalled else 0.0
        asyncio.get_running_loop().call_later(patience, self._give_up_on, link)
        if not link.ended.done():
            link.ended.set_result(why)

    def _give_up_on(self, dead: ShardLink) -> None:
        self._give_up([key for key in dead.running if self._orphans.get(key) is dead])

    def _give_up(self, keys: Iterable[EpisodeKey]) -> None:
        """Orphans whose steps nobody has reported begin anew."""
        for key in list(keys):
            attempt = self._orphans.pop(key).running[key]
            waiting = self._waiting.get(key)
            self._attempts_lost += waiting is not None and waiting[0] == attempt
            failure = Failure(FailureKind.SHARD_LOST, "shard", "its shard ended, and its steps with it")
            self._raise(key, attempt, Unplayed(failure, EpisodeBuffer(self._head)))
