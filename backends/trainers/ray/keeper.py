"""Keeps the queue's actor alive, gives it what the stock holds, and hears what was acknowledged.

Owns the actor. Always true: it holds nothing that the stock does not; one that dies, or does not answer, is replaced
and given all of it again, in order; what cannot be mended so fails the stock, and with it whoever waits.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from typing import TYPE_CHECKING, Any, Final

from backends.sandboxes.ray.cluster import NAMESPACE, told
from backends.trainers.ray.host import QueueHost
from backends.trainers.ray.leases import Parcel
from orchestrator.errors import RunFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from backends.trainers.ray.stock import Held, Stock

BATCH: Final = 64
"""Groups in one call."""
BATCH_BYTES: Final = 4 << 20
INLINE: Final = 64 << 10
"""A larger group goes through the object store, and only its reference through the actor."""
WAIT_S: Final = 5.0
SILENT_S: Final = 10.0
"""An actor that has not answered so long after it should have hangs: it is replaced."""
START_S: Final = 60.0
"""An actor must have been taken by a node after so long."""
NAME_S: Final = 20.0
"""Ray ends the actors of a dead process; its queue's name is free after so long at the latest."""
PAUSE_S: Final = 0.5
FAREWELL_S: Final = 5.0
"""What workers get to hear that all is over."""

log = logging.getLogger(__name__)


def actor_name(queue: str) -> str:
    """What the actor of a queue is called in our namespace."""
    return f"queue/{queue}"


class Keeper:
    """See the module's docstring. `lives` counts actors."""

    def __init__(self, ray: ModuleType, name: str, stock: Stock) -> None:
        self.lives = 0
        self._ray = ray
        self._name = name
        self._stock = stock
        self._actor: Any = None
        self._placing: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Put a new actor in the place of the old one. Raises UsageError where the name is taken, RunFailed."""
        began = time.monotonic()
        while True:
            try:
                self._placing = asyncio.create_task(asyncio.to_thread(self._place), name=f"{self._name}-place")
                await asyncio.shield(self._placing)
                async with asyncio.timeout(START_S):
                    await self._actor.ready.remote()
                break
            except ValueError:  # what a dead run has left goes away in a moment
                if time.monotonic() - began > NAME_S:
                    raise UsageError(
                        f"another run's queue in this cluster is called {self._name}: choose another name"
                    ) from None
            except (TimeoutError, self._ray.exceptions.RayError) as error:
                if time.monotonic() - began > START_S:
                    raise RunFailed(f"no node takes the queue {self._name}: {told(error)}; see `ray status`") from None
            await asyncio.sleep(PAUSE_S)
        self.lives += 1
        self._stock.again()

    async def keep(self) -> None:
        """Serve one actor after the other; until cancelled, or until there can be none."""
        try:
            while True:
                await self._serve()
                await self.begin()
        except* (RunFailed, UsageError) as errors:
            await self._stock.fail(str(errors.exceptions[0]))
        except* Exception as errors:  # the boundary: whoever waits for this queue must not wait for ever
            log.exception("the keeper of the queue %s ended", self._name)
            await self._stock.fail(f"the queue {self._name} ended: {told(errors.exceptions[0])}")

    async def end(self) -> None:
        """End the actor; where all is done, once the workers know that."""
        if self._placing is not None:  # its thread goes on where it was cancelled
            for placed in (await asyncio.wait({self._placing}, timeout=START_S))[0]:
                placed.exception()  # seen
        if self._actor is None:
            return
        if self._stock.finished and not len(self._stock):
            try:
                async with asyncio.timeout(FAREWELL_S + PAUSE_S):
                    await self._actor.finish.remote()
                    await self._actor.farewell.remote(FAREWELL_S)
            except (TimeoutError, self._ray.exceptions.RayError) as error:
                log.info("the workers of the queue %s may not know that it has ended: %s", self._name, told(error))
        await asyncio.to_thread(self._ray.kill, self._actor, no_restart=True)
        self._actor = None

    async def _serve(self) -> None:
        """Until the actor has ended, or hangs. Raises RunFailed where it is at fault itself."""
        exceptions = self._ray.exceptions
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._push(self._actor), name=f"{self._name}-push")
                tasks.create_task(self._hear(self._actor), name=f"{self._name}-hear")
        except* exceptions.RayTaskError as errors:
            raise RunFailed(f"the actor of the queue {self._name} failed: {told(errors.exceptions[0])}") from None
        except* exceptions.RayError as errors:
            log.warning("the actor of the queue %s has ended: %s", self._name, told(errors.exceptions[0]))
        except* TimeoutError:
            log.warning("the actor of the queue %s does not answer: another takes its place", self._name)

    async def _push(self, actor: Any) -> None:
        """Give the actor what it does not have, in batches."""
        while await self._push_some(actor):
            pass
        async with asyncio.timeout(SILENT_S):
            await actor.finish.remote()

    async def _push_some(self, actor: Any) -> bool:
        """One batch, which nothing here refers to afterwards; whether there may be more."""
        waiting = await self._stock.unpushed(BATCH)
        batch = await self._pack(waiting)
        for _, held in waiting[: len(batch)]:
            held.pushed = True  # from now on a worker may have it
        if batch:
            async with asyncio.timeout(SILENT_S):
                await actor.push.remote(batch)
            await self._stock.pushed(len(batch))
        return bool(batch)

    async def _hear(self, actor: Any) -> None:
        """Take over what the actor says was acknowledged."""
        count = 0
        while True:
            async with asyncio.timeout(WAIT_S + SILENT_S):
                count, idents = await actor.acked.remote(count, WAIT_S)
            await self._stock.settle(idents)

    async def _pack(self, waiting: Sequence[tuple[bytes, Held]]) -> list[Parcel]:
        """The first of them, as many as are good for one call."""
        batch: list[Parcel] = []
        size = 0
        for ident, held in waiting:
            payload = await self._payload(held)
            batch.append(Parcel(ident, payload, held.pushed or held.redelivered))
            size += len(payload) if isinstance(payload, bytes) else 0
            if size > BATCH_BYTES:
                break
        return batch

    async def _payload(self, held: Held) -> bytes | list[Any]:
        if held.reference is None:
            data = pickle.dumps(held.group, protocol=5)
            if len(data) <= INLINE:
                return data
            held.reference = await self._shelve(data)
            held.group = None
        return [held.reference]

    async def _shelve(self, data: bytes) -> Any:
        """Into the object store, as soon as that has room: what workers acknowledge makes some."""
        exceptions, full = self._ray.exceptions, False
        while True:
            try:
                return await asyncio.to_thread(self._ray.put, data)
            except (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError) as error:
                if not full:
                    log.warning("the queue %s waits for room in the object store: %s", self._name, told(error))
                full = True
                await asyncio.sleep(PAUSE_S)

    def _place(self) -> None:
        """Ask for an actor beside this process, which holds the groups: blocks on the cluster's store of names."""
        ray = self._ray
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)
            self._actor = None
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        self._actor = (
            ray.remote(QueueHost)
            .options(
                name=actor_name(self._name),
                namespace=NAMESPACE,
                num_cpus=0,
                scheduling_strategy=here,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=1000,
            )
            .remote()
        )
