"""The run's own consumers of the outbox: groups for `collect`, and for a queue given to the orchestrator.

Owns one named consumer's claims for as long as it is entered. Always true: a group is acked only after its taker has
come back for the next one, its queue's `deliver` has returned, or, where a queue lends its groups, a worker has
acknowledged it; what a dead life of the run had claimed is claimed again at once, because the run directory's lock says
that nobody else can hold it.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from orchestrator.errors import RolloutError, RunFailed
from orchestrator.events import DeliveryWaits
from orchestrator.protocols import LendingQueue
from orchestrator.shield import shielded
from orchestrator.store import Claims

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
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
    async with _claims(path, consumer) as claims:
        groups = _groups(claims, releases)
        try:
            yield groups
        finally:
            await groups.aclose()


@asynccontextmanager
async def hand_over(
    path: Path, queue: TrainerQueue, releases: Releases, emit: Listener
) -> AsyncIterator[Coroutine[Any, Any, None]]:
    """The work of giving a queue all groups, one at a time, each until it is accepted.

    It ends when the run is over and every group is acknowledged. Raises RunFailed when the queue refuses one: it stays
    in the outbox, and a resume delivers it again.
    """
    if isinstance(queue, LendingQueue):
        async with _claims(path, queue.name) as claims:
            yield _Loans(claims, releases, queue, emit).run()
    else:
        async with consume(path, queue.name, releases) as groups:
            yield _deliver(groups, queue, emit)


@asynccontextmanager
async def _claims(path: Path, consumer: str) -> AsyncIterator[_ClaimsThread]:
    claims = _ClaimsThread(path, consumer)
    try:
        await claims.do(lambda held: held.reclaim())
        yield claims
    finally:
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


async def _groups(
    claims: _ClaimsThread, releases: Releases, loans: dict[int, Claim] | None = None
) -> AsyncGenerator[Group]:
    """Every group once, acked when the next is asked for; or put among the loans, and acked by whoever keeps those."""
    while True:
        signal, over = releases.signal(), releases.over
        claimed = await claims.do(lambda held: held.claim(_BATCH, _LEASE_S))
        for claim in claimed:
            if loans is not None:
                loans[claim.group.seq] = claim
            yield claim.group
            if loans is None:
                await claims.do(_acking([claim]))
        if not claimed:
            if over:
                return
            await signal.wait()


def _acking(claims: Sequence[Claim]) -> Callable[[Claims], None]:
    return lambda held: held.ack(*claims)


async def _deliver(groups: AsyncIterator[Group], queue: TrainerQueue, emit: Listener) -> None:
    async for group in groups:
        with _refusals(queue, f"refused {group.task}"):
            await _patiently(queue.deliver(group), f"deliver-{group.seq}", queue, emit)


class _Loans:
    """The groups that a lending queue has taken in: each is acked in the outbox when the queue says that it was."""

    def __init__(self, claims: _ClaimsThread, releases: Releases, queue: LendingQueue, emit: Listener) -> None:
        self._claims = claims
        self._releases = releases
        self._queue = queue
        self._emit = emit
        self._held: dict[int, Claim] = {}
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Until every group is acknowledged; then the queue is told the end."""
        groups = _groups(self._claims, self._releases, self._held)
        async with asyncio.TaskGroup() as tasks:
            settling = tasks.create_task(self._settle(), name=f"acks-of-{self._queue.name}")
            try:
                await _deliver(groups, self._queue, self._emit)
            finally:
                await groups.aclose()
            await _patiently(self._returned(), f"acks-to-{self._queue.name}", self._queue, self._emit)
            settling.cancel()
        with _refusals(self._queue, "did not finish"):
            await self._queue.finish()

    async def _settle(self) -> None:
        while True:
            with _refusals(self._queue, "lost its acknowledgements"):
                seqs = await self._queue.acked()
            returned = [self._held[seq] for seq in seqs if seq in self._held]
            await self._claims.do(_acking(returned))
            for claim in returned:
                del self._held[claim.group.seq]
            self._changed.set()

    async def _returned(self) -> None:
        while self._held:
            self._changed.clear()
            await self._changed.wait()


@contextmanager
def _refusals(queue: TrainerQueue, what: str) -> Iterator[None]:
    """What a queue of anybody's raises, as RunFailed."""
    try:
        yield
    except RolloutError:
        raise
    except Exception as error:
        raise RunFailed(f"the queue {queue.name} {what}: {type(error).__name__}: {error}") from error


async def _patiently(work: Coroutine[Any, Any, None], name: str, queue: TrainerQueue, emit: Listener) -> None:
    """Wait for work of a queue's, and report again and again how long it takes."""
    task = asyncio.create_task(work, name=name)
    waited = 0.0
    try:
        while not (await asyncio.wait({task}, timeout=REPORT_S))[0]:
            waited += REPORT_S
            emit(DeliveryWaits(queue.name, waited))
    finally:
        task.cancel()
    await task
