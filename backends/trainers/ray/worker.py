"""A trainer's end of the queue, on any node: claims groups in batches, acknowledges each when the next is asked for.

    async with RayWorker("x") as groups:
        async for group in groups:
            train(group)

Delivery is at least once, and each group is acknowledged exactly once: what a worker that died had claimed is given to
others, marked `redelivered`. A worker that lives is given no group again that it holds or has done, whatever else dies,
as long as its lease stands; leases are prolonged from a thread, and end soon after the process does.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections import deque
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from backends.sandboxes.ray.cluster import connection, module
from backends.trainers.ray.leases import Proof
from backends.trainers.ray.line import BEAT_S, LOOK_S, Line
from orchestrator.errors import ClaimLost, UsageError

if TYPE_CHECKING:
    from backends.trainers.ray.host import Answer
    from backends.trainers.ray.leases import Lent
    from orchestrator.types import Group

WAIT_S: Final = 10.0
PROMPT_S: Final = 0.05
"""An acknowledgement waits for the next claim if the last one went so little ago; else it goes at once."""

log = logging.getLogger(__name__)


class RayClaim(NamedTuple):
    """A group on lease, and the proof of holding it."""

    group: Group
    proof: Proof


class RayWorkerStatistics(NamedTuple):
    """`held` groups are this worker's now; `lost` ones went to another worker before their acknowledgement."""

    held: int
    claimed: int
    acked: int
    redelivered: int
    lost: int


class RayWorker:
    """One worker of the queue called `queue`. An async context manager and async iterator; used by one task at a time.

    `address` is Ray's (default: RAY_ADDRESS, or that of the job which this runs in). `limit`: how many groups to claim
    at once. `lease_s`: how soon a dead worker's groups are given to others. The queue need not exist yet, and may be
    gone while its run is interrupted; after `patience_s` without one, Unavailable is raised.
    """

    def __init__(
        self,
        queue: str = "trainer",
        *,
        address: str | None = None,
        limit: int = 8,
        lease_s: float = 30.0,
        patience_s: float = 600.0,
    ) -> None:
        if not queue or limit < 1 or lease_s < 3 * BEAT_S or patience_s <= 0:
            raise UsageError(
                f"a worker needs a queue's name, a limit of 1 or more and a lease of {3 * BEAT_S:g} s or more"
            )
        self.queue = queue
        self._address = address
        self._limit = limit
        self._lease_s = lease_s
        self._patience_s = patience_s
        self._line: Line | None = None
        self._ready: deque[Lent] = deque()
        self._current: Lent | None = None
        self._asking: asyncio.Task[Answer] | None = None
        self._told = 0.0
        self._over = False
        self._stack = AsyncExitStack()

    def statistics(self) -> RayWorkerStatistics:
        """Counts since it was entered; `acked` ones were confirmed by the queue."""
        line = self._need_line()
        return RayWorkerStatistics(len(line.held), line.claimed, line.acked, line.redelivered, line.lost)

    def __repr__(self) -> str:
        return f"<RayWorker of {self.queue} {self.statistics() if self._line is not None else 'not entered'}>"

    async def __aenter__(self) -> Self:
        """Raises Unavailable, RunFailed where no cluster answers."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(connection(self._address))
            self._over = False
            self._line = Line(module(), self.queue, lease_s=self._lease_s, patience_s=self._patience_s)
            stack.push_async_callback(self._line.leave)
            stack.push_async_callback(self._stop_asking)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Give back what is not acknowledged."""
        self._ready.clear()
        self._current = None
        await self._stack.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Group:
        """Acknowledge the group given before, and give the next one, or wait for it. Raises Unavailable.

        Cancelled: nothing is lost; the group given before counts as acknowledged.
        """
        line = self._need_line()
        self._acknowledge(line)
        while not self._over:
            while self._ready:
                group = await self._open(line, self._ready[0])
                lent = self._ready.popleft()
                if group is not None:
                    self._current = lent
                    return group
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask(line), name=f"claim-{self.queue}")
            try:
                answer = await asyncio.shield(self._asking)
            finally:
                if self._asking.done():  # else cancelled: the next call takes its answer
                    self._asking = None
            self._ready.extend(answer.lent)
            self._over = answer.over
        raise StopAsyncIteration

    async def claim(self, limit: int | None = None) -> list[RayClaim]:
        """Claim up to `limit` groups, oldest first, without waiting for any; none at the end, too. Raises Unavailable.

        Cancelled: what was claimed is given to others when this worker claims again, or leaves.
        """
        line = self._need_line()
        if self._over:
            return []
        answer = await line.claim(limit or self._limit, 0.0)
        self._over = answer.over
        try:
            opened = [(await self._open(line, lent), Proof(lent.ident, lent.token)) for lent in answer.lent]
        except BaseException:
            for lent in answer.lent:
                line.held.pop(lent.ident, None)
            raise
        return [RayClaim(group, proof) for group, proof in opened if group is not None]

    async def ack(self, *claims: RayClaim) -> None:
        """Acknowledge what was claimed; again, nothing happens. Raises ClaimLost where it is no longer this worker's.

        Raises Unavailable.

        Cancelled: it is acknowledged all the same, by the next claim.
        """
        line = self._need_line()
        for claim in claims:
            line.acknowledge(claim.proof)
        lost = await line.confirm()
        for group, proof in claims:
            if proof.ident in lost:
                raise ClaimLost(
                    f"{group.task}/{group.group} was given back, or to another worker because its lease had ended: "
                    "drop what was made of it"
                )

    async def nack(self, *claims: RayClaim) -> None:
        """Give groups back; they are given again at once, to any worker. Raises Unavailable."""
        await self._need_line().give_back([claim.proof.ident for claim in claims])

    async def drained(self) -> bool:
        """Whether the run is finished and all its groups are acknowledged. Raises Unavailable.

        The queue goes seconds after that: ask, or claim, every second.
        """
        if not self._over:
            self._over = (await self._need_line().claim(0, 0.0)).over
        return self._over

    def _acknowledge(self, line: Line) -> None:
        if self._current is None:
            return
        line.acknowledge(Proof(self._current.ident, self._current.token))
        self._current = None
        now = time.monotonic()
        if self._ready and now - self._told > PROMPT_S:
            self._told = now
            line.tell()

    async def _ask(self, line: Line) -> Answer:
        while True:
            answer = await line.claim(self._limit, WAIT_S)
            if answer.lent or answer.over:
                return answer

    async def _open(self, line: Line, lent: Lent) -> Group | None:
        """The group itself; None where the object store has lost it, with the driver that had put it there."""
        payload = lent.payload
        if not isinstance(payload, bytes):
            try:
                payload = await payload[0]
            except module().exceptions.RayError as error:
                log.warning("a group of %s is lost and comes again: %s", self.queue, error)
                line.held.pop(lent.ident, None)
                await asyncio.sleep(LOOK_S)
                return None
        group: Group = pickle.loads(payload)
        return group if group.redelivered == lent.redelivered else replace(group, redelivered=lent.redelivered)

    async def _stop_asking(self) -> None:
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()
            await asyncio.wait({asking})

    def _need_line(self) -> Line:
        if self._line is None:
            raise UsageError("enter the worker first: `async with RayWorker(...) as groups`")
        return self._line
