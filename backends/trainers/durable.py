"""The store's own queue, for a trainer in any process on the machine: claim, train, ack, while the run goes on.

    async with DurableQueue("runs/x") as queue:
        async for group in queue:
            train(group)  # acked when the next one is asked for

Delivery is at least once, and each group is acked exactly once a consumer: a trainer that dies between training and
ack is given the group again, marked `redelivered`. Workers that share a consumer's name share its groups; another
name is another consumer, with all groups for itself. Leases are prolonged from a thread, so that they outlive a
training step of any length, even one that blocks the event loop, and end soon after the process does.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from orchestrator.errors import ClaimLost, StoreError, UsageError
from orchestrator.rundir import RunDirectory
from orchestrator.store import Claim, Claims, holds_run

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from orchestrator.types import Group

POLL_FIRST_S: Final = 0.05
POLL_LAST_S: Final = 0.25
BEATS_A_LEASE: Final = 3

T = TypeVar("T")
logger = logging.getLogger(__name__)


class DurableStatistics(NamedTuple):
    """`held` claims are this worker's now; `lost` ones went to another worker before their ack."""

    held: int
    claimed: int
    acked: int
    redelivered: int
    lost: int


class DurableQueue:
    """One worker of a named consumer. An async context manager and async iterator; used by one task at a time.

    The run directory need not exist yet: there is nothing to claim until it does. The iteration ends when the run is
    finished and all its groups are acknowledged; while a run is interrupted, it waits for its resume.
    """

    def __init__(
        self, directory: str | os.PathLike[str], consumer: str = "trainer", *, lease_s: float = 60.0, limit: int = 8
    ) -> None:
        """`limit`: how many groups to claim at once. `lease_s`: how soon a dead worker's groups are given to others."""
        if lease_s <= 0 or limit < 1 or not consumer:
            raise UsageError(
                "a durable queue needs a consumer's name, a lease above 0 seconds and a limit of 1 or more"
            )
        self.name = consumer
        self._limit = limit
        self._lease_s = lease_s
        self._work = _Work(RunDirectory(directory).store, consumer, lease_s)
        self._thread: ThreadPoolExecutor | None = None
        self._left = threading.Event()
        self._ready: deque[Claim] = deque()
        self._current: Claim | None = None

    def statistics(self) -> DurableStatistics:
        """Counts so far."""
        return self._work.statistics()

    def __repr__(self) -> str:
        return f"<DurableQueue {self.name} {self.statistics()}>"

    async def __aenter__(self) -> DurableQueue:
        self._left.clear()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="durable-queue")
        threading.Thread(target=self._beat, args=(self._thread,), name="durable-queue-beat", daemon=True).start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Give back what is not acknowledged. Cancelled: it is given back all the same, a moment later."""
        thread, self._thread = self._thread, None
        self._left.set()
        self._ready.clear()
        self._current = None
        if thread is not None:
            left = thread.submit(self._work.leave)
            thread.shutdown(wait=False)
            await asyncio.shield(asyncio.wrap_future(left))

    def __aiter__(self) -> DurableQueue:
        return self

    async def __anext__(self) -> Group:
        """Ack the group given before, and give the next one, or wait for it. Raises StoreError.

        Cancelled: nothing is lost; the group given before counts as acked if its ack had begun.
        """
        if self._current is not None:
            try:
                await self.ack(self._current)
            except ClaimLost as error:
                logger.warning("%s", error)
            self._current = None
        pause = POLL_FIRST_S
        while not self._ready:
            self._ready.extend(await self.claim())
            if not self._ready:
                if await self.drained():
                    raise StopAsyncIteration
                await asyncio.sleep(pause)
                pause = min(2 * pause, POLL_LAST_S)
        self._current = self._ready.popleft()
        return self._current.group

    async def claim(self, limit: int | None = None) -> list[Claim]:
        """Claim up to `limit` groups, lowest number first, without waiting for any. Raises StoreError.

        Cancelled: what was claimed is given back.
        """
        taken: list[Claim] = []
        try:
            await self._do(lambda: taken.extend(self._work.claim(limit or self._limit)))
        except asyncio.CancelledError:
            if self._thread is not None:
                self._thread.submit(self._work.give_back, taken)
            raise
        return taken

    async def ack(self, claim: Claim) -> None:
        """Acknowledge a group; again with the same claim, nothing happens. Raises ClaimLost, StoreError."""
        await self._do(lambda: self._work.ack(claim))

    async def nack(self, claim: Claim) -> None:
        """Give a group back; it is given again at once, to any worker. Raises ClaimLost, StoreError."""
        await self._do(lambda: self._work.nack(claim))

    async def extend(self, claim: Claim, lease_s: float | None = None) -> None:
        """Prolong a lease now, which the queue does by itself for all it holds. Raises ClaimLost, StoreError."""
        await self._do(lambda: self._work.extend(claim, lease_s or self._lease_s))

    async def drained(self) -> bool:
        """Whether the run is finished and this consumer has acknowledged all its groups."""
        return await self._do(self._work.drained)

    async def _do(self, function: Callable[[], T]) -> T:
        if self._thread is None:
            raise UsageError("enter the queue first: `async with DurableQueue(...) as queue:`")
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _beat(self, thread: ThreadPoolExecutor) -> None:
        while not self._left.wait(self._lease_s / BEATS_A_LEASE):
            try:
                thread.submit(self._work.prolong)
            except RuntimeError:
                return  # the queue was left, or the interpreter is about to end


class _Work:
    """What the queue's one thread does, and alone may do: the claims, and which of them are held."""

    def __init__(self, path: Path, consumer: str, lease_s: float) -> None:
        self._path = path
        self._consumer = consumer
        self._lease_s = lease_s
        self._claims: Claims | None = None
        self._held: dict[str, Claim] = {}
        self._claimed = self._acked = self._redelivered = self._lost = 0

    def statistics(self) -> DurableStatistics:
        return DurableStatistics(len(self._held), self._claimed, self._acked, self._redelivered, self._lost)

    def claim(self, limit: int) -> list[Claim]:
        if self._claims is None:
            if not holds_run(self._path):
                return []
            self._claims = Claims(self._path, self._consumer)
        taken = self._claims.claim(limit, self._lease_s)
        self._held.update((claim.token, claim) for claim in taken)
        self._claimed += len(taken)
        self._redelivered += sum(claim.group.redelivered for claim in taken)
        return taken

    def ack(self, claim: Claim) -> None:
        self._settle(claim, Claims.ack)
        self._acked += self._held.pop(claim.token, None) is not None

    def nack(self, claim: Claim) -> None:
        self._settle(claim, Claims.nack)
        self._held.pop(claim.token, None)

    def extend(self, claim: Claim, lease_s: float) -> None:
        self._settle(claim, lambda claims, claim: claims.extend(claim, lease_s))

    def drained(self) -> bool:
        return self._claims is not None and self._claims.drained()

    def give_back(self, taken: Sequence[Claim]) -> None:
        for claim in taken:
            self._quietly(claim, self.nack)

    def prolong(self) -> None:
        for claim in list(self._held.values()):
            self._quietly(claim, lambda claim: self.extend(claim, self._lease_s))

    def leave(self) -> None:
        if self._claims is not None:
            try:
                self._claims.surrender()
            finally:
                self._claims.close()
                self._claims = None
                self._held.clear()

    def _settle(self, claim: Claim, settle: Callable[[Claims, Claim], None]) -> None:
        if self._claims is None:
            raise UsageError("this queue has claimed nothing: settle a claim with the queue that made it")
        try:
            settle(self._claims, claim)
        except ClaimLost:
            self._lost += self._held.pop(claim.token, None) is not None
            raise

    def _quietly(self, claim: Claim, settle: Callable[[Claim], None]) -> None:
        """For what nobody waits for: a lost claim is told at its ack, and a busy disk gets another chance."""
        try:
            settle(claim)
        except (ClaimLost, StoreError) as error:
            logger.warning("%s", error)
