"""Warm sandboxes: keeps `size` of them alive and leases the least busy one; others hold one suspect each, alone.

Owns every sandbox of the run. Each place in the pool is a task: create, serve until lost, worn or told to stop,
destroy, begin again. Always true: a sandbox is leased only while it lives and has room; a place holds at most one
sandbox; a worn sandbox that still has room serves on until its successor has started, and is destroyed when its last
lease is given back; when a place's task ends its sandbox is destroyed, or left to the reaper after a deadline. Where
there is room for few sandboxes, nobody waits for ever for room that the pool itself takes up: suspects that get no
sandbox of their own borrow a regular one, emptied, one after the other, and one that no suspect uses is destroyed.
Episodes call `lease` and `quarantine`; whoever enters the pool owns it; its own sweep keeps the deadlines.

Where a sandbox serves a bounded number of sessions (`SandboxLimits`), `size` is how many are kept ready at most: as
many as are asked for at this pace, beside those that are leased.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from orchestrator.demand import Demand
from orchestrator.errors import RunFailed, SandboxError
from orchestrator.events import SandboxEnded, SandboxLeft, SandboxStarted
from orchestrator.shield import shielded
from orchestrator.tenancy import Lease, Tenancy
from orchestrator.types import Failure, FailureKind, SandboxId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from orchestrator.events import Listener
    from orchestrator.protocols import Backend, Sandbox

DESTROY_S: Final = 10.0
"""A sandbox that does not end within this is left behind and reported."""
SWEEP_S: Final = 0.1
"""How often deadlines are looked at."""
STARTS_BEFORE_GIVING_UP: Final = 4
"""Consecutive failed starts of a place, with no sandbox alive, after which the run cannot go on."""
PATIENCE_S: Final = 5.0
"""A suspect that has waited this long for a sandbox of its own borrows one."""
UNUSED_S: Final = 5.0
"""A suspect's sandbox that nobody needs is destroyed after this."""
_FIRST_PAUSE_S: Final = 0.2
_MAX_PAUSE_S: Final = 5.0


class PoolStatistics(NamedTuple):
    """`live` sandboxes of `size` wanted; leases held; so far: lost sandboxes, failed starts, worn ones replaced."""

    size: int
    live: int
    leases: int
    lost: int
    failed_starts: int
    recycled: int


class _Place:
    """One place of the pool, empty while its next sandbox starts. A suspect's is filled while it is `wanted`."""

    __slots__ = ("impatient", "since", "tenancy", "wanted")

    def __init__(self, *, wanted: bool = True) -> None:
        self.tenancy: Tenancy | None = None
        self.wanted = wanted
        self.since = 0.0
        """When it was filled, or wanted last."""
        self.impatient = False
        """Whether a suspect has waited long enough for a sandbox here."""


class Pool:
    """See the module's docstring. `lends`: whether suspects may borrow: not where leases have no end of their own."""

    def __init__(self, backend: Backend, size: int, emit: Listener, *, lends: bool = True) -> None:
        self._backend = backend
        self._limits = backend.limits
        self._emit = emit
        self._places = [_Place() for _ in range(size)]
        self._changed = asyncio.Event()
        self._quarantines: list[_Place] = []
        self._vacant: list[_Place] = []
        self._suspects = asyncio.Semaphore(size)
        self._queue = 0
        """Suspects that wait for a sandbox."""
        self._seeking: set[_Place] = set()
        """The places of those among them whose turn it is."""
        self._lends = lends
        self._lent: list[Tenancy] = []
        """Sandboxes that wait for suspects, or are being emptied for them."""
        self._retiring: dict[Tenancy, asyncio.Task[None]] = {}
        self._demand = Demand(size)
        self._starting = 0
        self._lost = 0
        self._failed_starts = 0
        self._recycled = 0
        self._tasks = asyncio.TaskGroup()
        self._keepers: list[asyncio.Task[None]] = []
        self._fatal: Failure | None = None
        self._given_up = asyncio.Event()
        self._closed: asyncio.Future[None]

    async def __aenter__(self) -> Self:
        self._closed = asyncio.get_running_loop().create_future()
        await self._tasks.__aenter__()
        self._keepers = [
            self._tasks.create_task(self._keep(place), name=f"pool-{n}") for n, place in enumerate(self._places)
        ]
        self._keepers.append(self._tasks.create_task(self._watch_deadlines(), name="pool-sweep"))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._fatal = self._fatal or Failure(FailureKind.SANDBOX_START, "start", "the pool is closed")
        self._changed.set()
        self._closed.set_result(None)
        for keeper in self._keepers:
            keeper.cancel()
        await self._tasks.__aexit__(None, None, None)

    async def lease(self, *, opens: bool = True) -> Lease:
        """The live sandbox with the fewest leases; waits for one. Cancelled: nothing is held.

        `opens` says whether a session will be opened under the lease: those are counted against the sandbox's limits.
        Raises RunFailed when no sandbox can be started at all.
        """
        self._demand.waiting += 1
        try:
            while (tenancy := self._roomiest()) is None:
                await self._change()
        finally:
            self._demand.waiting -= 1
        self._demand.leased(asyncio.get_running_loop().time())
        self._changed.set()  # one less is ready
        return Lease(tenancy, opens=opens)

    def _roomiest(self) -> Tenancy | None:
        self._refuse_if_fatal()
        open_ = [place.tenancy for place in self._places if place.tenancy is not None and place.tenancy.has_room]
        return min(open_, key=_leases) if open_ else None

    async def _change(self) -> None:
        """Until a sandbox has come, gone, or room was made."""
        self._changed.clear()
        await self._changed.wait()

    @asynccontextmanager
    async def quarantine(self) -> AsyncIterator[Sandbox]:
        """A living sandbox with nobody else on it, for one suspect: a death there is its suspect's.

        There are at most as many as the pool has places. They start when they are needed; where one does not come, a
        regular one is borrowed: it takes nobody in, and is the suspects' once it is empty. Raises RunFailed.
        """
        self._refuse_if_fatal()
        place, tenancy = await self._admit()
        lease = Lease(tenancy)
        try:
            yield lease.sandbox
        finally:
            lease.release()
            self._vacate(place)
            if tenancy.lent and tenancy.open:
                self._lent.append(tenancy)  # for the next one
            self._settle_loans()

    async def _admit(self) -> tuple[_Place, Tenancy]:
        """A suspect's place, and a sandbox to be leased at once, when it is its turn."""
        self._queue += 1
        try:
            await self._suspects.acquire()
            place = self._vacancy()
            try:
                return await self._alone(place)
            except BaseException:
                self._vacate(place)
                raise
        finally:
            self._queue -= 1
            self._settle_loans()

    async def _alone(self, place: _Place) -> tuple[_Place, Tenancy]:
        """An empty sandbox: of this place, of another suspects' place that is exchanged for it, or a lent one."""
        loop = asyncio.get_running_loop()
        patient_until = loop.time() + PATIENCE_S
        place.wanted = True
        self._seeking.add(place)
        self._changed.set()
        try:
            while True:
                self._refuse_if_fatal()
                if (found := self._vacated(place)) is not None:
                    return found
                place.impatient = place.impatient or loop.time() >= patient_until
                self._lend()
                for tenancy in self._lent:
                    if tenancy.empty:
                        self._lent.remove(tenancy)
                        return place, tenancy
                await self._change()  # the sweep has it look again, for its patience and for calls that end
        finally:
            place.wanted = False
            self._seeking.discard(place)

    def _vacated(self, place: _Place) -> tuple[_Place, Tenancy] | None:
        for one in (place, *self._vacant):
            if (tenancy := one.tenancy) is not None and tenancy.has_room and tenancy.empty:
                if one is not place:
                    self._vacant.remove(one)
                    self._vacant.append(place)
                return one, tenancy
        return None

    def _lend(self) -> None:
        """Have a regular sandbox emptied for each suspect that is out of patience."""
        self._lent = [tenancy for tenancy in self._lent if tenancy.open]  # the others were lost or replaced
        wanted = sum(place.impatient for place in self._seeking) if self._lends else 0
        open_ = [place.tenancy for place in self._places if place.tenancy is not None and place.tenancy.open]
        free = sorted((tenancy for tenancy in open_ if not tenancy.lent), key=_leases)
        for tenancy in free[: max(wanted - len(self._lent), 0)]:
            tenancy.lent = True
            self._lent.append(tenancy)

    def _settle_loans(self) -> None:
        """Give back what no suspect can use, the busiest first."""
        self._lent.sort(key=_leases)
        needed = min(self._queue, len(self._places) - sum(map(_filled, self._quarantines)))
        while len(self._lent) > needed:
            self._lent.pop().lent = False
            self._changed.set()

    def _vacancy(self) -> _Place:
        """A suspect's place."""
        if self._vacant:
            return self._vacant.pop()
        place = _Place(wanted=False)
        self._quarantines.append(place)
        name = f"quarantine-{len(self._quarantines)}"
        self._keepers.append(self._tasks.create_task(self._keep(place), name=name))
        return place

    def _vacate(self, place: _Place) -> None:
        place.since = asyncio.get_running_loop().time()
        self._vacant.append(place)
        self._changed.set()  # those who wait already come before the next one
        self._suspects.release()

    def _refuse_if_fatal(self) -> None:
        if self._fatal is not None:
            raise RunFailed(f"no sandbox can be started: {self._fatal.message}")

    async def given_up(self) -> str:
        """Until no sandbox can be started any more; why."""
        await self._given_up.wait()
        assert self._fatal is not None, "what was given up has a reason"
        return self._fatal.message

    @property
    def ready(self) -> int:
        """Sandboxes that can be leased at once."""
        return sum(place.tenancy is not None and place.tenancy.has_room for place in self._places)

    def sandboxes(self) -> Iterable[Sandbox]:
        """All live sandboxes, the quarantines' and the worn ones included."""
        return [tenancy.sandbox for tenancy in self._tenancies()]

    def _tenancies(self) -> Iterator[Tenancy]:
        for place in (*self._places, *self._quarantines):
            if place.tenancy is not None:
                yield place.tenancy
        yield from self._retiring

    def sweep(self, now: float) -> None:
        """Condemn every sandbox that has passed its deadline at monotonic `now`; have the worn ones replaced, and those
        that no suspect needs destroyed.
        """
        for place in self._vacant:
            if place.tenancy is not None and now >= place.since + UNUSED_S:
                place.tenancy.wear()
        if self._seeking:
            self._changed.set()
        for tenancy in self._tenancies():
            sandbox = tenancy.sandbox
            if sandbox.worn:
                tenancy.wear()
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
        leases = sum(tenancy.leases for tenancy in (*live, *self._retiring))
        lost, failed, recycled = self._lost, self._failed_starts, self._recycled
        return PoolStatistics(len(self._places), len(live) + len(self._retiring), leases, lost, failed, recycled)

    def __repr__(self) -> str:
        return f"<Pool {self.statistics()}>"

    async def _keep(self, place: _Place) -> None:
        """Keep one place filled until cancelled, or until nothing starts at all."""
        try:
            while (sandbox := await self._start(place)) is not None:
                self._replace(place)
                tenancy = place.tenancy = Tenancy(sandbox, self._limits, self._changed.set)
                place.since, place.impatient = asyncio.get_running_loop().time(), False
                self._lend()  # before somebody else leases it
                self._changed.set()
                await asyncio.wait(_either(sandbox.lost, tenancy.worn), return_when=asyncio.FIRST_COMPLETED)
                if sandbox.lost.done():
                    place.tenancy = None
                    await self._end(tenancy)
                elif place in self._quarantines:
                    self._retire(place)
                elif self._limits.sessions is not None:  # it would take nobody in while the next one starts
                    self._replace(place)
                else:
                    sandbox.lost.add_done_callback(partial(self._lost_meanwhile, place, tenancy))
        finally:
            if (last := place.tenancy) is not None:
                place.tenancy = None
                await self._end(last)

    async def _start(self, place: _Place) -> Sandbox | None:
        """A started sandbox, once one more is needed; None where nothing can be started at all."""
        failures = in_vain = 0
        while True:
            await self._needed(place)
            try:
                return await self._create()
            except SandboxError as error:
                self._failed_starts += 1
                failures += 1
                in_vain = 0 if self._any_alive() else in_vain + 1
                if in_vain >= STARTS_BEFORE_GIVING_UP and place in self._places:
                    self._fatal = error.failure
                    self._given_up.set()
                    self._changed.set()
                    return None
                self._emit(SandboxEnded(_NOT_STARTED, error.failure, 0))
                await asyncio.sleep(min(_FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10), _MAX_PAUSE_S))

    def _any_alive(self) -> bool:
        return any(not sandbox.lost.done() for sandbox in self.sandboxes())

    async def _needed(self, place: _Place) -> None:
        """Until a suspect or the demand asks for one sandbox more; at once where each serves any number of sessions."""
        while not place.wanted:
            await self._change()
        if self._limits.sessions is None or place in self._quarantines:
            return
        while self._ready() >= self._demand.target(asyncio.get_running_loop().time()):
            await self._change()

    def _ready(self) -> int:
        """Sandboxes that can be leased now, or are starting."""
        return self._starting + self.ready

    async def _create(self) -> Sandbox:
        started = asyncio.get_running_loop().time()
        self._starting += 1
        try:
            sandbox = await self._backend.create()
        finally:
            self._starting -= 1
        seconds = asyncio.get_running_loop().time() - started
        self._demand.started(seconds)
        self._emit(SandboxStarted(sandbox.id, seconds))
        return sandbox

    def _lost_meanwhile(self, place: _Place, tenancy: Tenancy, lost: asyncio.Future[Failure]) -> None:
        """A worn sandbox has died before its successor started."""
        if place.tenancy is tenancy:
            self._retire(place)

    def _replace(self, place: _Place) -> None:
        """Retire the worn sandbox of a place, if it has one."""
        if place.tenancy is not None:
            self._recycled += 1
            self._retire(place)

    def _retire(self, place: _Place) -> None:
        """Destroy a place's sandbox when nobody holds it any more; the place is empty at once."""
        assert place.tenancy is not None, "what is retired was there"
        tenancy, place.tenancy = place.tenancy, None
        tenancy.retire()
        task = self._tasks.create_task(self._see_off(tenancy), name=f"retire-{tenancy.sandbox.id}")
        self._retiring[tenancy] = task

    async def _see_off(self, tenancy: Tenancy) -> None:
        ends = _either(tenancy.sandbox.lost, tenancy.idle, self._closed)
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._end(tenancy)
            del self._retiring[tenancy]

    async def _end(self, tenancy: Tenancy) -> None:
        """Destroy a sandbox, under a deadline."""
        sandbox = tenancy.sandbox
        if sandbox.lost.done():
            self._lost += 1
            self._emit(SandboxEnded(sandbox.id, sandbox.lost.result(), tenancy.leases_at_loss))
        destroying = self._backend.destroy(sandbox.id)
        try:
            if not await shielded(destroying, deadline_s=DESTROY_S, what=f"sandbox {sandbox.id}"):
                self._emit(SandboxLeft(sandbox.id))
        finally:
            self._changed.set()


def _filled(place: _Place) -> bool:
    return place.tenancy is not None


def _leases(tenancy: Tenancy) -> tuple[bool, int]:
    """Whom to lease to first: one that is not worn, then the least busy."""
    return tenancy.worn.done(), tenancy.leases


def _either(*futures: asyncio.Future[Any]) -> set[asyncio.Future[Any]]:
    """Futures of different results as one set, which `asyncio.wait` leaves alone when it is cancelled."""
    return set(futures)


_NOT_STARTED: Final = SandboxId("(not started)")
