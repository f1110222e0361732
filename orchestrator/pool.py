"""Warm sandboxes: keeps `size` of them alive and leases the least busy one; others hold one suspect each, alone.

Owns every sandbox of the run. Each place in the pool is a task: create, serve until lost or told to stop, destroy,
begin again. Always true: a sandbox is leased only while it lives; a place holds at most one sandbox; when a place's
task ends its sandbox is destroyed, or left to the reaper after a deadline. Episodes call `lease` and `quarantine`;
whoever enters the pool owns it; its own sweep keeps the deadlines.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from orchestrator.errors import RunFailed, SandboxError
from orchestrator.events import SandboxEnded, SandboxLeft, SandboxStarted
from orchestrator.shield import shielded
from orchestrator.types import Failure, FailureKind, SandboxId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from orchestrator.events import Listener
    from orchestrator.protocols import Backend, Sandbox

DESTROY_S: Final = 10.0
"""A sandbox that does not end within this is left behind and reported."""
SWEEP_S: Final = 0.1
"""How often deadlines are looked at."""
STARTS_BEFORE_GIVING_UP: Final = 4
"""Consecutive failed starts of a place, with no sandbox alive, after which the run cannot go on."""
_FIRST_PAUSE_S: Final = 0.2
_MAX_PAUSE_S: Final = 5.0


class Lease:
    """A sandbox's place for one session; release it when the session is over."""

    __slots__ = ("_tenancy", "sandbox")

    def __init__(self, tenancy: _Tenancy) -> None:
        self._tenancy = tenancy
        self.sandbox = tenancy.sandbox
        tenancy.leases += 1

    def release(self) -> None:
        """Give the place back."""
        self._tenancy.leases -= 1


class PoolStatistics(NamedTuple):
    """`live` sandboxes of `size` wanted; leases held; sandboxes lost so far; starts that failed."""

    size: int
    live: int
    leases: int
    lost: int
    failed_starts: int


class _Tenancy:
    """One sandbox's time in a place."""

    __slots__ = ("leases", "leases_at_loss", "sandbox")

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.leases = 0
        self.leases_at_loss = 0
        sandbox.lost.add_done_callback(self._note)  # before the episodes hear of it, and let go

    def _note(self, lost: asyncio.Future[Failure]) -> None:
        self.leases_at_loss = self.leases


class _Place:
    """One place of the pool, empty while its next sandbox starts."""

    __slots__ = ("tenancy",)

    def __init__(self) -> None:
        self.tenancy: _Tenancy | None = None


class Pool:
    """See the module's docstring."""

    def __init__(self, backend: Backend, size: int, emit: Listener) -> None:
        self._backend = backend
        self._emit = emit
        self._places = [_Place() for _ in range(size)]
        self._changed = asyncio.Event()
        self._quarantines: list[_Place] = []
        self._vacant: list[_Place] = []
        self._suspects = asyncio.Semaphore(size)
        self._lost = 0
        self._failed_starts = 0
        self._tasks = asyncio.TaskGroup()
        self._keepers: list[asyncio.Task[None]] = []
        self._fatal: Failure | None = None

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._keepers = [
            self._tasks.create_task(self._keep(place), name=f"pool-{n}") for n, place in enumerate(self._places)
        ]
        self._keepers.append(self._tasks.create_task(self._watch_deadlines(), name="pool-sweep"))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._fatal = self._fatal or Failure(FailureKind.SANDBOX_START, "start", "the pool is closed")
        self._changed.set()
        for keeper in self._keepers:
            keeper.cancel()
        await self._tasks.__aexit__(None, None, None)

    async def lease(self) -> Lease:
        """The live sandbox with the fewest leases; waits for one. Cancelled: nothing is held.

        Raises RunFailed when no sandbox can be started at all.
        """
        while True:
            self._refuse_if_fatal()
            live = [p.tenancy for p in self._places if p.tenancy is not None and not p.tenancy.sandbox.lost.done()]
            if live:
                return Lease(min(live, key=_leases))
            self._changed.clear()
            await self._changed.wait()

    @asynccontextmanager
    async def quarantine(self) -> AsyncIterator[Sandbox]:
        """A living sandbox with nobody else on it, for one suspect: a death there is its suspect's.

        There are at most as many as the pool has places; they start when they are first needed. Raises RunFailed.
        """
        async with self._suspects:
            self._refuse_if_fatal()
            place = self._vacant.pop() if self._vacant else self._add_quarantine()
            try:
                while (tenancy := place.tenancy) is None or tenancy.sandbox.lost.done():
                    self._refuse_if_fatal()
                    self._changed.clear()
                    await self._changed.wait()
                yield tenancy.sandbox
            finally:
                self._vacant.append(place)

    def _add_quarantine(self) -> _Place:
        place = _Place()
        self._quarantines.append(place)
        name = f"quarantine-{len(self._quarantines)}"
        self._keepers.append(self._tasks.create_task(self._keep(place), name=name))
        return place

    def _refuse_if_fatal(self) -> None:
        if self._fatal is not None:
            raise RunFailed(f"no sandbox can be started: {self._fatal.message}")

    def sandboxes(self) -> Iterable[Sandbox]:
        """All live sandboxes, the quarantines' included."""
        return [p.tenancy.sandbox for p in (*self._places, *self._quarantines) if p.tenancy is not None]

    def sweep(self, now: float) -> None:
        """Condemn every sandbox that has passed its deadline at monotonic `now`."""
        for sandbox in self.sandboxes():
            if not sandbox.lost.done() and (failure := sandbox.overdue(now)) is not None:
                sandbox.condemn(failure)

    async def _watch_deadlines(self) -> None:
        """The one owner of sandboxes' deadlines."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep(loop.time())

    def cpu_seconds(self) -> float:
        """CPU of all sandboxes so far."""
        return self._backend.cpu_seconds()

    def statistics(self) -> PoolStatistics:
        """Counts; cheap."""
        live = [place.tenancy for place in self._places if place.tenancy is not None]
        leases = sum(tenancy.leases for tenancy in live)
        return PoolStatistics(len(self._places), len(live), leases, self._lost, self._failed_starts)

    def __repr__(self) -> str:
        return f"<Pool {self.statistics()}>"

    async def _keep(self, place: _Place) -> None:
        """Keep one place filled until cancelled."""
        failures = 0
        while True:
            try:
                sandbox = await self._create()
            except SandboxError as error:
                self._failed_starts += 1
                failures += 1
                if failures >= STARTS_BEFORE_GIVING_UP and not any(self.sandboxes()):
                    self._fatal = error.failure
                    self._changed.set()
                    return
                self._emit(SandboxEnded(_NOT_STARTED, error.failure, 0))
                await asyncio.sleep(min(_FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10), _MAX_PAUSE_S))
                continue
            failures = 0
            tenancy = place.tenancy = _Tenancy(sandbox)
            self._changed.set()
            try:
                failure = await asyncio.shield(sandbox.lost)
                self._lost += 1
                self._emit(SandboxEnded(sandbox.id, failure, tenancy.leases_at_loss))
            finally:
                place.tenancy = None
                if not await shielded(
                    self._backend.destroy(sandbox.id), deadline_s=DESTROY_S, what=f"sandbox {sandbox.id}"
                ):
                    self._emit(SandboxLeft(sandbox.id))
                self._changed.set()

    async def _create(self) -> Sandbox:
        started = asyncio.get_running_loop().time()
        sandbox = await self._backend.create()
        self._emit(SandboxStarted(sandbox.id, asyncio.get_running_loop().time() - started))
        return sandbox


def _leases(tenancy: _Tenancy) -> int:
    return tenancy.leases


_NOT_STARTED: Final = SandboxId("(not started)")
