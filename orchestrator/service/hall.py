"""One environment's sandboxes, kept up for as long as the service lives.

Owns the environment's backend and pool, in one task. Always true: once `up` has returned, the hall stays: when no
sandbox can be started any more, backend and pool are ended and made anew after a pause, whether somebody calls or not,
and calls are refused meanwhile; whoever waits for a sandbox waits `wait_s` at most, but for a quarantine as long as its
call may take. It stands in for a `Pool` where episodes are driven, so an episode outlives the pool that it was opened
in.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from orchestrator.errors import RolloutError, RunFailed
from orchestrator.events import SandboxEnded, SandboxStarted
from orchestrator.pool import Pool
from orchestrator.service.refusals import busy
from orchestrator.types import RunId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from orchestrator.events import Event
    from orchestrator.pool import PoolStatistics
    from orchestrator.protocols import Backend, Sandbox
    from orchestrator.tenancy import Lease
    from orchestrator.types import EnvironmentInfo, TaskList

GRACE_S: Final = 5.0
"""What a sandbox's own timer gets before the pool's sweep ends it."""
PAUSE_S: Final = 2.0
"""Between two tries to start sandboxes at all."""

log = logging.getLogger(__name__)


class Hall:
    """See the module's docstring. `make` gives a fresh backend; `size` is how many sandboxes are kept; `logs` is the
    folder of their stderr."""

    def __init__(
        self, make: Callable[[], Backend], size: int, *, step_s: float, wait_s: float, logs: str | None = None
    ) -> None:
        self._make = make
        self._size = size
        self._step_s = step_s
        self._wait_s = wait_s
        self._logs = logs
        self._pool: Pool | None = None
        self._up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeper: asyncio.Task[None] | None = None
        self._told = ""
        self.environment = make().environment
        self.info: EnvironmentInfo | None = None
        """What a sandbox of it said of itself; None until the first one is up."""

    async def up(self) -> None:
        """Start it, and wait for the first sandbox. Raises RolloutError. Cancelled: `down` ends what was begun."""
        self._keeper = asyncio.create_task(self._keep(), name=f"hall-{self.environment}")
        await asyncio.wait({self._up, self._keeper}, return_when=asyncio.FIRST_COMPLETED)
        if self._keeper.done():
            self._keeper.result()
        lease = await self._pool_or_refuse().lease(opens=False)
        self.info = lease.sandbox.info
        lease.release()

    async def down(self) -> None:
        """End its sandboxes. Idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})

    async def lease(self, *, opens: bool = True) -> Lease:
        """See `Pool.lease`; waits `wait_s` at most. Raises Refusal (503)."""
        try:
            async with asyncio.timeout(self._wait_s):
                return await self._pool_or_refuse().lease(opens=opens)
        except TimeoutError:
            raise busy(f"no sandbox of {self.environment} was free within {self._wait_s:g} s") from None
        except RunFailed as error:
            raise busy(str(error)) from None

    @asynccontextmanager
    async def quarantine(self) -> AsyncIterator[Sandbox]:
        """See `Pool.quarantine`. Raises Refusal (503)."""
        async with AsyncExitStack() as stack:
            try:
                sandbox = await stack.enter_async_context(self._pool_or_refuse().quarantine())
            except RunFailed as error:
                raise busy(str(error)) from None
            yield sandbox

    async def tasks(self, split: str) -> TaskList:
        """The tasks of a split. Raises UnknownName, Unavailable, SandboxError, Refusal."""
        lease = await self.lease(opens=False)
        try:
            return await lease.sandbox.tasks(split)
        finally:
            lease.release()

    @property
    def alive(self) -> bool:
        """Whether at least one sandbox of it is up."""
        return self._pool is not None and any(self._pool.sandboxes())

    def statistics(self) -> PoolStatistics | None:
        """Its pool's counts; None while there is none."""
        return self._pool.statistics() if self._pool is not None else None

    def _pool_or_refuse(self) -> Pool:
        if self._pool is None:
            raise busy(f"the sandboxes of {self.environment} are being started")
        return self._pool

    async def _keep(self) -> None:
        while True:
            try:
                self._tell(f"no sandbox of it can be started: {await self._serve()}")
            except (RolloutError, OSError) as error:
                if not self._up.done():
                    raise
                self._tell(str(error))
            except Exception:
                if not self._up.done():
                    raise
                log.exception("the sandboxes of %s ended by a defect", self.environment)
            await asyncio.sleep(PAUSE_S)

    async def _serve(self) -> str:
        """One backend and one pool, until nothing can be started in them; why."""
        backend = self._make()
        run = RunId(f"serve-{uuid4().hex[:12]}")
        backend.configure(run=run, with_solutions=False, logs=self._logs, call_limit_s=self._step_s + GRACE_S)
        async with backend, Pool(backend, self._size, self._note, lends=False) as pool:
            self._pool = pool
            if not self._up.done():
                self._up.set_result(None)
            try:
                return await pool.given_up()
            finally:
                self._pool = None

    def _note(self, event: Event) -> None:
        match event:
            case SandboxStarted():
                self._told = ""
            case SandboxEnded():
                self._tell(f"sandbox {event.sandbox} ended: {event.failure.message}")
            case _:
                pass

    def _tell(self, trouble: str) -> None:
        """Log it, unless it is what was logged last: what cannot start is tried for as long as it takes."""
        if trouble != self._told:
            log.warning("%s: %s", self.environment, trouble)
        self._told = trouble
