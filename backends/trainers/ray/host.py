"""The queue's actor: the table of leases, behind calls that wait. Runs in a worker process of Ray's, in one event loop.

Always true: who waits is woken by what it waits for, and answered after `wait_s` at the latest. The actor is never
restarted: it holds nothing that the driver does not have.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from backends.trainers.ray.leases import Leases

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backends.trainers.ray.leases import LeaseStatistics, Lent, Parcel, Proof

GRACE_S: Final = 5.0
"""What an earlier life may have given away is reserved for so long: workers say every second what they hold."""
NEWS_S: Final = 2.0
"""A worker that waits for a queue has found this one after so long."""
TICK_S: Final = 1.0
"""How late it may be noticed that a lease has run out."""


class Asked(NamedTuple):
    """A claim of up to `limit` groups. `holds` is all that the worker has and has not acknowledged."""

    worker: str
    acks: Sequence[Proof]
    holds: Sequence[Proof]
    limit: int
    lease_s: float
    wait_s: float


class Answer(NamedTuple):
    """To a claim. `lost` acks were of groups that another worker has been given since; `over`: nothing more comes."""

    lent: Sequence[Lent]
    lost: Sequence[bytes]
    over: bool


class QueueHost:
    """Made by Ray; see the module's docstring."""

    def __init__(self) -> None:
        self._leases = Leases(secrets.token_hex(4), grace_s=GRACE_S)
        self._found = time.monotonic() + NEWS_S
        self._changed = asyncio.Event()
        self._asking: set[str] = set()
        """Workers whose claim waits here."""

    async def ready(self) -> None:
        """Answered once a node has taken the actor."""

    async def push(self, parcels: Sequence[Parcel]) -> None:
        """See `Leases.push`."""
        self._leases.push(parcels, time.monotonic())
        self._wake()

    async def finish(self) -> None:
        """Nothing more will be pushed."""
        self._leases.finished = True
        self._wake()

    async def acked(self, after: int, wait_s: float) -> tuple[int, Sequence[bytes]]:
        """See `Leases.acked`; waits for one at least."""
        ends = time.monotonic() + wait_s
        while True:
            count, idents = self._leases.acked(after)
            if idents or not await self._change(ends):
                return count, idents

    async def claim(self, asked: Asked) -> Answer:
        """Acknowledge, then wait for parcels."""
        worker, ends = asked.worker, time.monotonic() + asked.wait_s
        lost = await self.ack(asked.acks)
        self._leases.extend(worker, asked.holds, time.monotonic(), asked.lease_s, exact=True)
        self._asking.add(worker)
        try:
            while True:
                here = worker in self._asking  # else it has left while it waited
                lent = self._leases.grant(worker, asked.limit, time.monotonic(), asked.lease_s) if here else []
                if lent or not here or self._leases.over or not await self._change(ends):
                    return Answer(lent, lost, self._leases.over)
        finally:
            self._asking.discard(worker)
            if self._leases.over:  # it knows the end now
                self._leases.leave(worker)
                self._wake()

    async def ack(self, acks: Sequence[Proof]) -> Sequence[bytes]:
        """The acks that come too late."""
        lost = [proof.ident for proof in acks if not self._leases.ack(proof)]
        if acks:
            self._wake()
        return lost

    async def extend(self, worker: str, holds: Sequence[Proof], lease_s: float) -> None:
        """See `Leases.extend`."""
        self._leases.extend(worker, holds, time.monotonic(), lease_s)

    async def give_back(self, worker: str, idents: Sequence[bytes]) -> None:
        """See `Leases.give_back`."""
        self._leases.give_back(worker, idents)
        self._wake()

    async def leave(self, worker: str, acks: Sequence[Proof]) -> None:
        """See `Leases.leave`."""
        await self.ack(acks)
        self._asking.discard(worker)
        self._leases.leave(worker)
        self._wake()

    async def farewell(self, within_s: float) -> None:
        """Wait until every worker has been told that all is over, those included that are about to ask."""
        ends = time.monotonic() + within_s
        while self._asking or self._leases.workers() or time.monotonic() < self._found:
            if not await self._change(ends):
                return

    async def statistics(self) -> LeaseStatistics:
        """Counts."""
        return self._leases.statistics()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, ends: float) -> bool:
        """Wait for a change, or for time to bring one; whether there is more time."""
        changed, left = self._changed, ends - time.monotonic()
        if left <= 0:
            return False
        try:
            async with asyncio.timeout(min(left, TICK_S)):
                await changed.wait()
        except TimeoutError:
            self._leases.advance(time.monotonic())
        return True

    def __repr__(self) -> str:  # Ray asks for it once a call
        return f"<QueueHost {self._leases.statistics()}>"
