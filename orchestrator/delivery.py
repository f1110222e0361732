"""The run's own consumers of the outbox: groups for `collect`, and for a queue given to the orchestrator.

Owns one named consumer's claims for as long as it is entered. Always true: a group is acked only after its taker has
come back for the next one, or its queue's `deliver` has returned; what a dead life of the run had claimed is claimed
again at once, because the run directory's lock says that nobody else can hold it.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from orchestrator.errors import RolloutError, RunFailed
from orchestrator.events import DeliveryWaits
from orchestrator.shield import shielded
from orchestrator.store import Claims

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from pathlib import Path

    from orchestrator.events import Listener
    from orchestrator.protocols import TrainerQueue
    from orchestrator.store import Claim
    from orchestrator.types import Group

REPORT_S: Final = 30.0
"""A `deliver` that has not returned for this long is reported, again and again."""
T = TypeVar("T")
_LEASE_S: Final = 86_400.0
_BATCH: Final = 8


class Releases:
    """Says when there may be something new, without a lost wake-up: take `signal()`, look, then wait on it."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.over = False
        """Nothing more will be released in this life of the run."""

    def signal(self) -> asyncio.Event:
        """An event that is set by the next change."""
        return self._event

    def changed(self, *, over: bool = False) -> None:
        """Groups were released, or the run has ended."""
        self.over = self.over or over
        self._event.set()
        self._event = asyncio.Event()


@asynccontextmanager
async def consume(path: Path, consumer: str, releases: Releases) -> AsyncIterator[AsyncGenerator[Group]]:
    """Released groups in order, each acked when the next is asked for; ends when the run is over and all are given."""
    claims = _ClaimsThread(path, consumer)
    groups = _groups(claims, releases)
    try:
        await claims.do(lambda held: held.reclaim())
        yield groups
    finally:
        await groups.aclose()
        await shielded(claims.close(), deadline_s=30.0, what=f"the claims of {consumer}")


class _ClaimsThread:
    """A consumer's claims on a thread of their own: one call at a time, also when a caller was cancelled."""

    def __init__(self, path: Path, consumer: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"claims-{consumer}")
        self._opened = self._thread.submit(Claims, path, consumer)

    async def do(self, work: Callable[[Claims], T]) -> T:
        """Run on the thread. Cancelled: it still runs, and what comes next waits for it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(self._opened.result()))

    async def close(self) -> None:
        """Behind whatever still runs."""
        try:
            await self.do(lambda held: held.close())
        finally:
            self._thread.shutdown(wait=False)


async def _groups(claims: _ClaimsThread, releases: Releases) -> AsyncGenerator[Group]:
    while True:
        signal, over = releases.signal(), releases.over
        claimed = await claims.do(lambda held: held.claim(_BATCH, _LEASE_S))
        for claim in claimed:
            yield claim.group
            await claims.do(_acking(claim))
        if not claimed:
            if over:
                return
            await signal.wait()


def _acking(claim: Claim) -> Callable[[Claims], None]:
    return lambda held: held.ack(claim)


async def deliver(groups: AsyncIterator[Group], queue: TrainerQueue, emit: Listener) -> None:
    """Give every group to the queue, one at a time, each until it is accepted.

    Raises RunFailed when the queue refuses one: it stays in the outbox, and a resume delivers it again.
    """
    async for group in groups:
        try:
            await _accept(queue, group, lambda seconds: emit(DeliveryWaits(queue.name, seconds)))
        except RolloutError:
            raise
        except Exception as error:
            raise RunFailed(f"the queue {queue.name} refused {group.task}: {type(error).__name__}: {error}") from error


async def _accept(queue: TrainerQueue, group: Group, report: Callable[[float], None]) -> None:
    delivery = asyncio.create_task(queue.deliver(group), name=f"deliver-{group.seq}")
    waited = 0.0
    try:
        while not (await asyncio.wait({delivery}, timeout=REPORT_S))[0]:
            waited += REPORT_S
            report(waited)
    finally:
        delivery.cancel()
    await delivery
