"""A queue in memory, for a trainer in the orchestrator's own process.

At most `maxsize` groups wait in it; `deliver` waits for room, which is the backpressure. A group is accepted at most
once, by its task and number, for as long as the queue lives. What was accepted and not taken is lost with the process:
where that matters, use `backends.trainers.durable`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from orchestrator.types import Group


class MemoryStatistics(NamedTuple):
    """`waiting` groups are in the queue now; `repeated` deliveries were of groups accepted before."""

    waiting: int
    accepted: int
    taken: int
    repeated: int


class MemoryQueue:
    """A `TrainerQueue` and an async iterator of its groups. Used in one event loop."""

    def __init__(self, maxsize: int = 64, *, name: str = "memory") -> None:
        if maxsize < 1:
            raise UsageError(f"a queue holds at least 1 group, not {maxsize}")
        self.name = name
        self._maxsize = maxsize
        self._groups: deque[Group] = deque()
        self._seen: set[tuple[str, int]] = set()
        self._changed = asyncio.Condition()
        self._closed = False
        self._taken = 0
        self._repeated = 0

    def statistics(self) -> MemoryStatistics:
        """Counts so far."""
        return MemoryStatistics(len(self._groups), len(self._seen), self._taken, self._repeated)

    def __repr__(self) -> str:
        return f"<MemoryQueue {self.name} max {self._maxsize} {self.statistics()}>"

    async def deliver(self, group: Group) -> None:
        """Accept a group, or wait for room. Raises UsageError once the queue is closed.

        Cancelled: not accepted.
        """
        key = (group.task, group.group)
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or key in self._seen or len(self._groups) < self._maxsize)
            if key in self._seen:
                self._repeated += 1
                return
            if self._closed:
                raise UsageError(f"the queue {self.name} is closed: its groups are delivered again by a resumed run")
            self._seen.add(key)
            self._groups.append(group)
            self._changed.notify_all()

    async def get(self) -> Group:
        """Take the oldest group, or wait for one. Raises QueueClosed once the queue is closed and empty.

        Cancelled: nothing is taken.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._groups or self._closed)
            if not self._groups:
                raise QueueClosed(f"the queue {self.name} is closed and empty")
            self._taken += 1
            self._changed.notify_all()
            return self._groups.popleft()

    async def close(self) -> None:
        """Accept nothing more; what was accepted can still be taken. Idempotent."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __aiter__(self) -> MemoryQueue:
        return self

    async def __anext__(self) -> Group:
        try:
            return await self.get()
        except QueueClosed:
            raise StopAsyncIteration from None


class QueueClosed(UsageError):
    """Nothing more will come out of the queue."""
