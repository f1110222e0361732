"""The groups that a queue has accepted and that are not acknowledged, `capacity` at most.

Owned by the driver's end; touched from its event loop alone. Always true: a group is here from its acceptance to its
acknowledgement, in order; it is accepted once, however often it comes; one that comes although it was acknowledged is
said to be so again; a number is said to be acknowledged only for the group that bore it last, for another run may bring
the same numbers. Whoever waits is woken by what it waits for, or by the queue's failure. A large group's data are in
the object store, and here only the reference, which keeps them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from orchestrator.errors import RunFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from orchestrator.types import Group

REMEMBERED: Final = 65_536
"""How many acknowledged groups are known again; those of the outbox come again only while the ack is not durable."""


@dataclass(slots=True, eq=False)
class Held:
    """One group. `redelivered`: it came so from the outbox."""

    seq: int
    redelivered: bool
    group: Group | None
    """None once it is in the object store."""
    reference: Any = None
    """Into the object store; it is there as long as this is."""
    pushed: bool = False
    """To any life of the actor."""


def identity(group: Group) -> bytes:
    """Equal for a group however often it comes, and for nothing else: no two runs store at the same times."""
    stored = [(t.attempt, t.started, t.finished) for t in group.trajectories]
    return blake2b(repr((group.seq, group.task, group.group, stored)).encode(), digest_size=16).digest()


class Stock:
    """See the module's docstring."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name = name
        self.accepted = self.acked = self.repeated = 0
        self.finished = False
        """Nothing more is accepted."""
        self._capacity = capacity
        self._held: dict[bytes, Held] = {}
        self._unpushed: deque[tuple[bytes, Held]] = deque()
        self._done: OrderedDict[bytes, None] = OrderedDict()
        self._numbers: dict[int, bytes] = {}
        """Which group bears a number whose acknowledgement is not told yet."""
        self._acks: dict[int, None] = {}
        self._failure: str | None = None
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._held)

    # -- whoever fills it

    async def accept(self, group: Group) -> None:
        """See `RayQueue.deliver`."""
        ident = identity(group)
        async with self._changed:
            await self._changed.wait_for(lambda: self._knows(ident) or self._over() or len(self) < self._capacity)
            if self._knows(ident):
                self.repeated += 1
                self._number(ident, group.seq)
                return
            self._check()
            if self.finished:
                raise UsageError(f"the queue {self.name} is finished: a new run needs a new one")
            held = self._held[ident] = Held(group.seq, group.redelivered, group)
            self._number(ident, group.seq)
            self._unpushed.append((ident, held))
            self.accepted += 1
            self._changed.notify_all()

    async def take_acks(self) -> Sequence[int]:
        """See `RayQueue.acked`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._acks or self._failure)
            if not self._acks:
                self._check()
            acks, self._acks = list(self._acks), {}
            for seq in acks:
                del self._numbers[seq]
            return acks

    async def all_pushed(self) -> None:
        """Wait until all that was accepted is with the actor. Raises RunFailed once there can be none."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure or not self._unpushed)
            self._check()

    async def finish(self) -> None:
        """Accept nothing more. Idempotent."""
        async with self._changed:
            self.finished = True
            self._changed.notify_all()

    # -- whoever empties it

    async def fail(self, message: str) -> None:
        """There can be no actor: whoever waits is told."""
        async with self._changed:
            self._failure = message
            self._changed.notify_all()

    async def unpushed(self, most: int) -> list[tuple[bytes, Held]]:
        """The first groups that the actor does not have, or wait for one; none once it has all that will come."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._unpushed or self.finished)
            return list(islice(self._unpushed, most))

    async def pushed(self, count: int) -> None:
        """The actor has the first so many of them."""
        async with self._changed:
            for _ in range(count):
                self._unpushed.popleft()
            self._changed.notify_all()

    async def settle(self, idents: Iterable[bytes]) -> None:
        """These are acknowledged."""
        async with self._changed:
            for ident in idents:
                if (held := self._held.pop(ident, None)) is not None:
                    self._remember(ident)
                    if self._numbers.get(held.seq) == ident:
                        self._acks[held.seq] = None
            self._changed.notify_all()

    def again(self) -> None:
        """There is a new actor, which has nothing."""
        self._unpushed = deque(self._held.items())

    def _number(self, ident: bytes, seq: int) -> None:
        """What bore this number before is not what an acknowledgement is waited for."""
        self._numbers[seq] = ident
        self._acks.pop(seq, None)
        if ident in self._done:
            self._acks[seq] = None
            self._changed.notify_all()

    def _remember(self, ident: bytes) -> None:
        self.acked += 1
        self._done[ident] = None
        if len(self._done) > REMEMBERED:
            self._done.popitem(last=False)

    def _knows(self, ident: bytes) -> bool:
        return ident in self._held or ident in self._done

    def _over(self) -> bool:
        return self.finished or self._failure is not None

    def _check(self) -> None:
        if self._failure is not None:
            raise RunFailed(self._failure)
