"""The driver's end of the queue: takes groups in, and says what was acknowledged.

Always true: a group is with the driver from its acceptance to its acknowledgement (`stock`), and with the queue's actor
besides, whichever that is (`keeper`): the actor's death costs no group. What this process's death costs is still in the
outbox, because a group's row there goes with its acknowledgement.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, NamedTuple, Self

from backends.sandboxes.ray.cluster import connection, module
from backends.trainers.ray.keeper import Keeper
from backends.trainers.ray.stock import Stock
from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.types import Group


class RayQueueStatistics(NamedTuple):
    """`held` groups are not acknowledged yet; `lives` counts actors; the rest counts groups since the start."""

    held: int
    accepted: int
    acked: int
    repeated: int
    lives: int


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
        self._stock = Stock(name, capacity)
        self._keeper: Keeper | None = None
        self._stack = AsyncExitStack()

    def statistics(self) -> RayQueueStatistics:
        """Counts so far."""
        stock, lives = self._stock, 0 if self._keeper is None else self._keeper.lives
        return RayQueueStatistics(len(stock), stock.accepted, stock.acked, stock.repeated, lives)

    def __repr__(self) -> str:
        return f"<RayQueue {self.name} {self.statistics()}>"

    async def __aenter__(self) -> Self:
        """Start the actor. Raises Unavailable, UsageError where the name is taken, RunFailed without a cluster."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(connection(self._address))
            keeper = self._keeper = Keeper(module(), self.name, self._stock)
            stack.push_async_callback(keeper.end)
            await keeper.begin()
            keeping = asyncio.create_task(keeper.keep(), name=f"ray-queue-{self.name}")
            stack.push_async_callback(_cancelled, keeping)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def deliver(self, group: Group) -> None:
        """Accept a group, or wait for room. Raises UsageError once finished, RunFailed where no actor can be kept.

        Cancelled: not accepted.
        """
        await self._stock.accept(group)

    async def acked(self) -> Sequence[int]:
        """The numbers of groups acknowledged since the last call, or wait for some. Raises RunFailed as `deliver`.

        Cancelled: none is lost.
        """
        return await self._stock.take_acks()

    async def flush(self) -> None:
        """Wait until all that was accepted is with the actor. Raises RunFailed as `deliver`."""
        await self._stock.all_pushed()

    async def finish(self) -> None:
        """Accept nothing more; workers end when all is acknowledged. Idempotent."""
        await self._stock.finish()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
