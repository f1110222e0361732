"""One environment, kept ready in an event loop for every box there that asks for it.

Owns the backend and the pool of an environment, in one task: entered and left there, whoever asked first and whoever
leaves last. Always true: a loop has at most one live host a place; a host lives while it has users; it ends when the
last one leaves, when its loop ends, or when nothing can be started any more.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple
from uuid import uuid4
from weakref import WeakKeyDictionary

from backends.environments.catalog import find
from backends.sandboxes.local import UNSAFE_VARIABLE, LocalBackend
from orchestrator.errors import RolloutError, RunFailed, Unavailable
from orchestrator.events import SandboxEnded
from orchestrator.pool import Pool
from orchestrator.types import RunId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from backends.environments.catalog import EnvironmentSpec
    from orchestrator.events import Event
    from orchestrator.protocols import Backend

READY: Final = 2
"""Containers kept ready where each serves one episode; where one sandbox serves many, there is one."""
GRACE_S: Final = 5.0
"""What a server's own timer gets before the pool's sweep ends it."""

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """What a host serves, and how long one call may take in seconds."""

    environment: str
    timeout: float


class Host:
    """See the module's docstring. Take one with `enter`, give it back with `leave`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.users = 0
        self._ready: asyncio.Future[Pool] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        self._keeper = asyncio.create_task(self._keep(), name=f"host-{place.environment}")

    @classmethod
    async def enter(cls, place: Place) -> Host:
        """The host of a place, started where there is none. Raises UsageError (Unavailable), SandboxError.

        Cancelled, or when it raises: nothing is held.
        """
        hosts = _hosts.setdefault(asyncio.get_running_loop(), {})
        host = hosts.get(place)
        if host is None or not host.alive:
            host = hosts[place] = cls(place)
        host.users += 1
        try:
            await asyncio.shield(host._ready)
        except BaseException:
            await host.leave()
            raise
        return host

    async def leave(self) -> None:
        """One user less; the last one waits until all has ended."""
        self.users -= 1
        if self.users == 0:
            self.retire()
            self._stop.set()
            if not self._ready.done():
                self._keeper.cancel()
            await asyncio.wait({self._keeper})
            if not self._keeper.cancelled() and (error := self._keeper.exception()) is not None:
                log.error("the sandboxes of %s did not end in order", self.place.environment, exc_info=error)

    @property
    def alive(self) -> bool:
        """Whether it takes users in."""
        return not (self._stop.is_set() or self._keeper.done())

    @property
    def pool(self) -> Pool:
        """The sandboxes."""
        if not self.alive:
            raise RunFailed(f"the sandboxes of {self.place.environment} have ended; make another box")
        return self._ready.result()

    def retire(self) -> None:
        """Have the next `enter` start another host. Idempotent."""
        hosts = _hosts.get(asyncio.get_running_loop(), {})
        if hosts.get(self.place) is self:
            del hosts[self.place]

    async def _keep(self) -> None:
        try:
            backend = choose(find(self.place.environment))
            call_limit_s = self.place.timeout + GRACE_S
            backend.configure(
                run=RunId(f"box-{uuid4().hex[:12]}"), with_solutions=False, logs=None, call_limit_s=call_limit_s
            )
            size = READY if backend.limits.sessions is not None else 1
            async with _explained(backend), Pool(backend, size, _note) as pool:
                self._ready.set_result(pool)
                await self._stop.wait()
        except RolloutError as error:
            if self._ready.done():
                raise
            self._fail(error)
        except OSError as error:
            if self._ready.done():
                raise
            self._fail(RunFailed(f"the sandboxes of {self.place.environment} cannot be started: {error}"))
        finally:
            if not self._ready.done():
                self._fail(RunFailed(f"the sandboxes of {self.place.environment} were not started"))

    def _fail(self, error: RolloutError) -> None:
        self._ready.set_exception(error)
        self._ready.exception()  # seen: its users are told, if there are any left

    def __repr__(self) -> str:
        return f"<Host {self.place.environment} users={self.users} alive={self.alive}>"


_hosts: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Place, Host]] = WeakKeyDictionary()


def choose(spec: EnvironmentSpec) -> Backend:
    """Containers where the agent's code runs and nobody has accepted the risk; else processes of this machine."""
    if spec.runs_code and os.environ.get(UNSAFE_VARIABLE) != "1":
        from backends.sandboxes.docker import DockerBackend  # its client is heavy, and needed here alone

        return DockerBackend(spec.name)
    return LocalBackend(spec.name)


@asynccontextmanager
async def _explained(backend: Backend) -> AsyncIterator[None]:
    """The backend, entered; where containers cannot be had, the error names the way out."""
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(backend)
        except Unavailable as error:
            if isinstance(backend, LocalBackend):
                raise
            raise Unavailable(
                f"{backend.environment} runs the agent's code, which belongs into a container: {error}. To run it on "
                f"this machine with nothing walled off, set {UNSAFE_VARIABLE}=1"
            ) from error
        yield


def _note(event: Event) -> None:
    if isinstance(event, SandboxEnded):
        log.info("sandbox %s ended: %s", event.sandbox, event.failure.message)
