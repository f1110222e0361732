"""The driver's side of shards on a Ray cluster: an actor a shard, which dials in here over TLS.

Owns the actors and the listener. Always true: a slot has at most one actor that is listened to; one that has ended is
replaced, wherever there is room, as long as the run goes on; more slots than the cluster has room for wait for nodes.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import sysconfig
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from pickle import PicklingError
from typing import TYPE_CHECKING, Any, Final

from backends.sandboxes.listener import Listener, Tcp
from backends.sandboxes.ray.cluster import RayOptions, connection, module, own_address, told
from backends.sandboxes.ray.shard import Packed, ShardHost, SocketChannel
from orchestrator.errors import RunFailed, SandboxError, UsageError
from orchestrator.events import ShardWaits
from orchestrator.shards import Crew
from orchestrator.shards.messages import MAX_FRAME
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
    from types import ModuleType

    from aiohttp import web

    from backends.server.wire import Hello
    from orchestrator import events
    from orchestrator.protocols import Backend, Policy
    from orchestrator.shards import ShardJob, ShardLink

FIRST_S: Final = 120.0
"""A shard must be ready after so long; an environment may have to be installed on its node."""
START_S: Final = 60.0
STARTS_BEFORE_GIVING_UP: Final = 4
"""Failed starts in a row, with no shard alive, after which the run cannot go on."""
PAUSE_S: Final = 1.0
WAITS_S: Final = 5.0
"""A node that has not been found for so long is spoken of."""
SWEEP_S: Final = 1.0
_PROJECT: Final = frozenset({"orchestrator", "backends", "policies", "bench"})
END_S: Final = 10.0
"""What shards get to end in order."""

log = logging.getLogger(__name__)


class _Arrival:
    """A shard's connection, as a listener wants it: made with its hello, run with its socket."""

    def __init__(self, link: ShardLink) -> None:
        self.link = link
        self.ended: asyncio.Future[Failure] = link.ended

    async def run(self, socket: web.WebSocketResponse) -> Failure:
        """See `LinkedSandbox.run`."""
        return await self.link.run(SocketChannel(socket))


class RayShards:
    """`count` shards on the cluster at `address` (default: RAY_ADDRESS, or one of this machine's own).

    `options` is what each asks for. `host` and `port` are where they reach this machine; `insecure` leaves TLS out.
    """

    def __init__(
        self,
        count: int,
        *,
        address: str | None = None,
        options: RayOptions | None = None,
        host: str | None = None,
        port: int = 0,
        insecure: bool = False,
    ) -> None:
        if count < 1:
            raise UsageError(f"shards must be at least 1, not {count}")
        self._count = count
        self._address = address
        self._options = options or RayOptions()
        self._host, self._port, self._insecure = host, port, insecure
        self._backend = self._policy = b""

    @asynccontextmanager
    async def opened(self, backend: Backend, policy: Policy) -> AsyncIterator[None]:
        """See `Shards.opened`."""
        await asyncio.to_thread(self._pack, backend, policy)
        async with connection(self._address):
            yield

    def _pack(self, backend: Backend, policy: Policy) -> None:
        ray = module()
        self._options.check(ray, ShardHost)
        with _by_value(ray.cloudpickle):
            self._backend = _pickled(ray.cloudpickle, "backend", backend)
            self._policy = _pickled(ray.cloudpickle, "policy", policy)

    @asynccontextmanager
    async def crew(
        self, job: ShardJob, absorb: Callable[[Mapping[str, bytes]], None], emit: events.Listener
    ) -> AsyncIterator[Crew]:
        """See `Shards.crew`."""
        async with AsyncExitStack() as stack:
            ray = module()
            host = self._host if self._host is not None else await asyncio.to_thread(own_address, ray)
            listener = await stack.enter_async_context(Listener(Tcp(host, self._port, self._insecure, MAX_FRAME)))
            crew = Crew(self._count, job.settings.header, absorb, journalled=job.durable_steps, emit=emit)
            packed = Packed(job, self._backend, self._policy)
            slots = [_Slot(ray, self._options, listener, crew, packed, number, emit) for number in range(self._count)]
            tasks = [asyncio.create_task(slot.keep(), name=f"shard-{slot.number}") for slot in slots]
            tasks.append(asyncio.create_task(_sweep(crew, slots), name="shard-sweep"))
            for task in tasks:
                task.add_done_callback(partial(_notice, crew))
            try:
                await crew.gathered(everyone=job.resume, within_s=FIRST_S)
                yield crew
            finally:
                await _ended(slots)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)


class _Slot:
    """One shard's place: keeps an actor in it."""

    def __init__(
        self,
        ray: ModuleType,
        options: RayOptions,
        listener: Listener,
        crew: Crew,
        packed: Packed,
        number: int,
        emit: events.Listener,
    ) -> None:
        self.number = number
        self.actor: Any = None
        self.link: ShardLink | None = None
        self.ended: asyncio.Task[Any] | None = None
        """Done when the shard has ended, with all that it had."""
        self._ray = ray
        self._options = options
        self._listener = listener
        self._crew = crew
        self._packed = packed
        self._emit = emit
        self._wanted = ""
        """What has been said of a node that is waited for."""
        self._lives = 0

    async def keep(self) -> None:
        """Start, wait for the end, begin again; until the run ends, or cancelled."""
        failures = 0
        while not self._crew.ending:
            try:
                await self._live()
                failures = 0
            except (SandboxError, RunFailed, TimeoutError, self._ray.exceptions.RayError) as error:
                failures += 1
                self._emit(ShardWaits(self.number, f"it did not start: {told(error)}"))
                if failures >= STARTS_BEFORE_GIVING_UP and self._crew.statistics().live == 0:
                    self._crew.fail(f"no shard can be started: {told(error)}")
                    return
            finally:
                self.kill()
            await asyncio.sleep(PAUSE_S)

    def kill(self) -> None:
        """End the actor, where there is one."""
        actor, self.actor = self.actor, None
        if actor is not None:
            self._ray.kill(actor, no_restart=True)

    async def _live(self) -> None:
        self._lives += 1
        name = f"{self._packed.job.run}/shard-{self.number}-{self._packed.job.run_epoch}-{self._lives}"
        self.actor = await asyncio.to_thread(self._place, name)
        incarnation = await self._taken(self.actor)
        async with asyncio.timeout(START_S):
            token: str = await self.actor.token.remote(incarnation)
            arrived = self._listener.expect(token, self._arrive)
            try:
                await self.actor.launch.remote(incarnation, self._listener.url, self._listener.certificate, name)
            except BaseException:
                self._listener.forget(token)
                raise
        ended = self.ended = asyncio.create_task(_answer(self.actor.ended.remote()), name=f"{name}-ended")
        try:
            await asyncio.wait(_either(ended, arrived), timeout=FIRST_S, return_when=asyncio.FIRST_COMPLETED)
            if not arrived.done():
                self._listener.forget(token)
                raise RunFailed(ended.result() if ended.done() else f"it did not dial in within {FIRST_S:g} s")
            self.link = arrived.result().link
            await asyncio.wait(_either(ended, self.link.ended), return_when=asyncio.FIRST_COMPLETED)
            self._crew.lose(self.link, Failure(FailureKind.SHARD_LOST, "shard", f"shard {self.number} ended"))
            await asyncio.wait({ended}, timeout=END_S)  # it ends its sandboxes
        finally:
            ended.cancel()

    async def _taken(self, actor: Any) -> str:
        """Once a node has taken the actor: its incarnation. As long as it takes: a node may join. Raises RayError."""
        ready = asyncio.create_task(_answer(actor.ready.remote()), name=f"shard-{self.number}-ready")
        try:
            while not (await asyncio.wait({ready}, timeout=WAITS_S))[0]:
                wanted = await asyncio.to_thread(self._options.wanted, self._ray)
                if wanted != self._wanted:
                    self._wanted = wanted
                    self._emit(ShardWaits(self.number, f"it waits for a node: {wanted}"))
            incarnation: str = ready.result()
            return incarnation
        finally:
            ready.cancel()

    def _place(self, name: str) -> Any:
        """Ask for an actor: blocks on the cluster's store of names."""
        host = self._ray.remote(ShardHost).options(**self._options.actor(name))
        return host.remote(self._packed, self.number)

    def _arrive(self, hello: Hello) -> Any:
        return _Arrival(self._crew.join(self.number))


def _pickled(pickler: ModuleType, what: str, thing: object) -> bytes:
    try:
        pickled: bytes = pickler.dumps(thing)
    except (TypeError, AttributeError, ValueError, PicklingError) as error:
        raise UsageError(
            f"each shard needs a copy of the {what}, and {error}: open connections and the like in its __aenter__, "
            "which every shard enters for itself"
        ) from None
    return pickled


async def _answer(reference: Awaitable[Any]) -> Any:
    """The result of a call to an actor, as a coroutine."""
    return await reference


def _notice(crew: Crew, task: asyncio.Task[None]) -> None:
    """A keeper that ended on what nobody expected ends the run, instead of leaving it to wait."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended", task.get_name(), exc_info=error)
        crew.fail(f"{task.get_name()} ended: {error}")


async def _sweep(crew: Crew, slots: Sequence[_Slot]) -> None:
    """End shards that hang: they are connected, and say nothing. Their successors take over what they have recorded."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(SWEEP_S)
        for link in crew.silent(loop.time()):
            crew.lose(link, Failure(FailureKind.SHARD_LOST, "shard", f"shard {link.slot} has said nothing for long"))
            slots[link.slot].kill()


async def _ended(slots: Sequence[_Slot]) -> None:
    """Let shards that were told to end do so in order, then end what is left."""
    ends = {slot.ended for slot in slots if slot.ended is not None}
    if ends:
        await asyncio.wait(ends, timeout=END_S)


def _either(*futures: asyncio.Future[Any]) -> set[asyncio.Future[Any]]:
    """Futures of different results as one set, which `asyncio.wait` leaves alone when it is cancelled."""
    return set(futures)


@contextmanager
def _by_value(pickler: ModuleType) -> Iterator[None]:
    """Modules of the user's own, which no node has installed, travel with what is pickled in here."""
    installed = [Path(path) for name, path in sysconfig.get_paths().items() if name in {"stdlib", "purelib", "platlib"}]
    own = []
    for name, found in list(sys.modules.items()):
        file = getattr(found, "__file__", None)
        if file is None or name == "__main__" or name.partition(".")[0] in _PROJECT:
            continue
        path = Path(file)
        if path.suffix == ".py" and not any(path.is_relative_to(folder) for folder in installed):
            own.append(found)
    for found in own:
        pickler.register_pickle_by_value(found)
    try:
        yield
    finally:
        for found in own:
            pickler.unregister_pickle_by_value(found)
