"""The driver's end of the queue: takes groups in, keeps the actor alive, and hears what was acknowledged.

Owns the actor and all groups that are not acknowledged, `capacity` at most. Always true: the actor holds nothing that
is not here; one that dies is replaced and given all of it again, in order, so that its death costs no group; what this
process's death costs is still in the outbox, because a group's row there goes with its acknowledgement.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections import deque
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from backends.sandboxes.ray.cluster import NAMESPACE, connection, module
from backends.trainers.ray.host import QueueHost
from backends.trainers.ray.leases import Parcel
from orchestrator.errors import RunFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from orchestrator.types import Group

BATCH: Final = 64
"""Groups in one call."""
BATCH_BYTES: Final = 4 << 20
INLINE: Final = 64 << 10
"""A larger group goes through the object store, and only its reference through the actor."""
WAIT_S: Final = 10.0
START_S: Final = 60.0
"""An actor must have been taken by a node after so long."""
NAME_S: Final = 20.0
"""Ray ends the actors of a dead process; its queue's name is free after so long at the latest."""
PAUSE_S: Final = 0.5
FAREWELL_S: Final = 5.0
"""What workers get to hear that all is over."""

log = logging.getLogger(__name__)


class RayQueueStatistics(NamedTuple):
    """`held` groups are not acknowledged yet; `lives` counts actors; the rest counts groups since the start."""

    held: int
    accepted: int
    acked: int
    repeated: int
    lives: int


@dataclass(slots=True, eq=False)
class _Held:
    group: Group
    pushed: bool = False
    """To any life of the actor."""
    reference: Any = None
    """Into the object store; it is there as long as this is."""


def actor_name(queue: str) -> str:
    """What the actor of a queue is called in our namespace."""
    return f"queue/{queue}"


def identity(group: Group) -> bytes:
    """Equal for a group however often it comes, and for nothing else: no two runs store at the same times."""
    stored = [(t.attempt, t.started, t.finished) for t in group.trajectories]
    return blake2b(repr((group.seq, group.task, group.group, stored)).encode(), digest_size=16).digest()


class RayQueue:
    """A trainer queue on a Ray cluster: `async with RayQueue("x") as queue`, then `Orchestrator(queue=queue, ...)`.

    `name` is what workers find it by (`RayWorker`), once at a time in a cluster. `address` is Ray's (default:
    RAY_ADDRESS, or a cluster of this machine's own); a connection that this process has already is used. `deliver`
    waits while `capacity` groups are accepted and not acknowledged. Leaving it ends the actor: what is not
    acknowledged by then comes again from the outbox when the run is resumed.
    """

    def __init__(self, name: str = "trainer", *, address: str | None = None, capacity: int = 256) -> None:
        if not name or capacity < 1:
            raise UsageError("a Ray queue needs a name, and a capacity of 1 or more groups")
        self.name = name
        self._address = address
        self._capacity = capacity
        self._ray: ModuleType | None = None
        self._actor: Any = None
        self._held: dict[bytes, _Held] = {}
        self._unpushed: deque[tuple[bytes, _Held]] = deque()
        self._done: set[bytes] = set()
        self._acks: list[int] = []
        self._finished = False
        self._failure: str | None = None
        self._lives = self._accepted = self._repeated = 0
        self._changed = asyncio.Condition()
        self._stack = AsyncExitStack()

    def statistics(self) -> RayQueueStatistics:
        """Counts so far."""
        return RayQueueStatistics(len(self._held), self._accepted, len(self._done), self._repeated, self._lives)

    def __repr__(self) -> str:
        return f"<RayQueue {self.name} {self.statistics()}>"

    async def __aenter__(self) -> Self:
        """Start the actor. Raises Unavailable, UsageError where the name is taken, RunFailed without a cluster."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(connection(self._address))
            self._ray = module()
            stack.push_async_callback(self._end)
            await self._begin()
            keeper = asyncio.create_task(self._keep(), name=f"ray-queue-{self.name}")
            stack.push_async_callback(_cancelled, keeper)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def deliver(self, group: Group) -> None:
        """Accept a group, or wait for room. Raises UsageError once finished, RunFailed where no actor can be kept.

        Cancelled: not accepted.
        """
        ident = identity(group)
        async with self._changed:
            await self._changed.wait_for(lambda: self._knows(ident) or self._over() or len(self._held) < self._capacity)
            if self._knows(ident):
                self._repeated += 1
                return
            self._check()
            if self._finished:
                raise UsageError(f"the queue {self.name} is finished: a new run needs a new one")
            held = self._held[ident] = _Held(group)
            self._unpushed.append((ident, held))
            self._accepted += 1
            self._changed.notify_all()

    async def acked(self) -> Sequence[int]:
        """The numbers of groups acknowledged since the last call, or wait for some. Raises RunFailed as `deliver`.

        Cancelled: none is lost.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._acks or self._failure)
            if not self._acks:
                self._check()
            acks, self._acks = self._acks, []
            return acks

    async def flush(self) -> None:
        """Wait until all that was accepted is with the actor. Raises RunFailed as `deliver`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure or not self._unpushed)
            self._check()

    async def finish(self) -> None:
        """Accept nothing more; workers end when all is acknowledged. Idempotent."""
        async with self._changed:
            self._finished = True
            self._changed.notify_all()

    def _knows(self, ident: bytes) -> bool:
        return ident in self._held or ident in self._done

    def _over(self) -> bool:
        return self._finished or self._failure is not None

    def _check(self) -> None:
        if self._failure is not None:
            raise RunFailed(self._failure)

    # Below: the actor's keeper.

    async def _keep(self) -> None:
        """Serve one actor after the other; until cancelled, or until there can be none."""
        ray = self._need_ray()
        try:
            while True:
                try:
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(self._push(self._actor), name=f"{self.name}-push")
                        tasks.create_task(self._hear(self._actor), name=f"{self.name}-hear")
                except* ray.exceptions.RayTaskError as errors:
                    raise RunFailed(f"the actor of the queue {self.name} failed: {errors.exceptions[0]}") from None
                except* ray.exceptions.RayError as errors:
                    log.warning("the actor of the queue %s has ended: %s", self.name, _first_line(errors.exceptions[0]))
                await self._begin()
        except* (RunFailed, UsageError) as errors:
            async with self._changed:
                self._failure = str(errors.exceptions[0])
                self._changed.notify_all()

    async def _push(self, actor: Any) -> None:
        """Give the actor what it does not have, in batches."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._unpushed or self._finished)
            if not self._unpushed:
                await actor.finish.remote()
                return
            batch = await self._pack(list(islice(self._unpushed, BATCH)))
            for _, held in islice(self._unpushed, len(batch)):
                held.pushed = True  # from now on a worker may have it
            await actor.push.remote(batch)
            async with self._changed:
                for _ in batch:
                    self._unpushed.popleft()
                self._changed.notify_all()

    async def _pack(self, waiting: Sequence[tuple[bytes, _Held]]) -> list[Parcel]:
        """The first of them, as many as are good for one call."""
        batch: list[Parcel] = []
        size = 0
        for ident, held in waiting:
            payload = await self._payload(held)
            batch.append(Parcel(ident, payload, held.pushed or held.group.redelivered))
            size += len(payload) if isinstance(payload, bytes) else 0
            if size > BATCH_BYTES:
                break
        return batch

    async def _payload(self, held: _Held) -> bytes | list[Any]:
        if held.reference is None:
            data = pickle.dumps(held.group, protocol=5)
            if len(data) <= INLINE:
                return data
            held.reference = await asyncio.to_thread(self._need_ray().put, data)
        return [held.reference]

    async def _hear(self, actor: Any) -> None:
        """Take over what the actor says was acknowledged."""
        count = 0
        while True:
            count, idents = await actor.acked.remote(count, WAIT_S)
            async with self._changed:
                for ident in idents:
                    if (held := self._held.pop(ident, None)) is not None:
                        self._done.add(ident)
                        self._acks.append(held.group.seq)
                self._changed.notify_all()

    async def _begin(self) -> None:
        """Put a new actor in the place of the old one. Raises UsageError where the name is taken, RunFailed."""
        ray, began = self._need_ray(), time.monotonic()
        while True:
            try:
                await asyncio.to_thread(self._place, ray)
                async with asyncio.timeout(START_S):
                    await self._actor.ready.remote()
                break
            except ValueError:  # what a dead run has left goes away in a moment
                if time.monotonic() - began > NAME_S:
                    raise UsageError(
                        f"another run's queue in this cluster is called {self.name}: choose another name"
                    ) from None
            except (TimeoutError, ray.exceptions.RayError) as error:
                if time.monotonic() - began > START_S:
                    raise RunFailed(
                        f"no node takes the queue {self.name}: {_first_line(error)}; see `ray status`"
                    ) from None
            await asyncio.sleep(PAUSE_S)
        self._lives += 1
        self._unpushed = deque(self._held.items())

    def _place(self, ray: ModuleType) -> None:
        """Ask for an actor beside this process, which holds the groups: blocks on the cluster's store of names."""
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)
            self._actor = None
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        self._actor = (
            ray.remote(QueueHost)
            .options(
                name=actor_name(self.name),
                namespace=NAMESPACE,
                num_cpus=0,
                scheduling_strategy=here,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=1000,
            )
            .remote()
        )

    async def _end(self) -> None:
        ray = self._need_ray()
        if self._actor is None:
            return
        if self._finished and not self._held:
            try:
                await self._actor.farewell.remote(FAREWELL_S)
            except ray.exceptions.RayError:
                pass  # it has ended before
        await asyncio.to_thread(ray.kill, self._actor, no_restart=True)
        self._actor = None

    def _need_ray(self) -> ModuleType:
        if self._ray is None:
            raise UsageError("enter the queue first: `async with RayQueue(...) as queue`")
        return self._ray


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
