"""The desk of a box without a server: its instances, driven on sandboxes that this process owns.

Owns the instances of one box and one use of each host it needs. Always true: an instance's id is never given twice
while it lives; an instance that nobody has called for IDLE_S sleeps, without a session, where it can be rebuilt; when
the desk is closed it holds nothing.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from backends.agentscope import splits
from backends.agentscope.desk import checked_arguments
from backends.agentscope.host import Host, Place
from backends.agentscope.instance import Instance
from orchestrator.errors import RunFailed, UsageError
from orchestrator.names import unknown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from orchestrator.protocols import Sandbox

IDLE_S: Final = 300.0
"""After so long without a call an instance gives its session back."""
SWEEP_S: Final = 15.0
MAX_NAME: Final = 128
"""Characters of an id that a client may choose."""


@dataclass(slots=True)
class _Held:
    """An instance, and when it was called last."""

    instance: Instance
    called: float


class EmbeddedDesk:
    """Satisfies `Desk`. `environment` is the box's, `timeout` bounds one call of an instance in seconds, `variables`
    decide what its splits hold; `record` is what `info` adds to."""

    def __init__(
        self,
        environment: str,
        *,
        sandbox_id: str | None,
        timeout: float,
        variables: Mapping[str, str],
        record: Mapping[str, Any],
    ) -> None:
        self._environment = environment
        self._id = sandbox_id or f"box_{uuid4().hex[:12]}"
        self._timeout = timeout
        self._variables = variables
        self._record = record
        self._host: Host | None = None
        self._entering = asyncio.Lock()
        self._instances: dict[str, _Held] = {}
        self._opening: set[str] = set()
        self._sweeper: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> str:
        """See `Desk.start`. One sandbox is up then."""
        async with self._leased():
            return self._id

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """See `Desk.call`."""
        given = checked_arguments(name, arguments)
        match name:
            case "create_instance":
                return await self._create(**given)
            case "step":
                return await self._instance(given["instance_id"]).step(given["action"], given["params"])
            case "evaluate":
                return await self._instance(given["instance_id"]).evaluate(given["params"])
            case "release_instance":
                return self._release(given["instance_id"])
            case "get_instance_info":
                return self._instance(given["instance_id"]).tools()
            case _:
                return await self._tasks(given["env_type"], given["split"] or "train")

    async def info(self) -> dict[str, Any]:
        """See `Desk.info`."""
        state = "released" if self._closed else "running" if self._host is not None else "ready"
        return {**self._record, "session_id": self._id, "container_id": self._id, "container_name": self._id} | {
            "state": state,
            "instances": sorted(self._instances),
            "calls": sum(held.instance.episode.busy for held in self._instances.values()),
            "asleep": sorted(name for name, held in self._instances.items() if not held.instance.episode.awake),
        }

    async def close(self) -> None:
        """See `Desk.close`."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait({self._sweeper})
        for held in self._instances.values():
            held.instance.close()
        self._instances.clear()
        await self._leave()

    async def _entered(self) -> Host:
        async with self._entering:
            if self._closed:
                raise UsageError("the box is closed: make another one")
            if self._host is None:
                self._host = await Host.enter(Place(self._environment, self._timeout))
            return self._host

    @asynccontextmanager
    async def _hosted(self) -> AsyncIterator[Host]:
        """The host; where nothing starts there, the next call tries anew."""
        host = await self._entered()
        try:
            yield host
        except RunFailed:
            host.retire()
            await self._leave()
            raise

    @asynccontextmanager
    async def _leased(self) -> AsyncIterator[Sandbox]:
        """A living sandbox, for what needs no session."""
        async with self._hosted() as host:
            lease = await host.pool.lease(opens=False)
            try:
                yield lease.sandbox
            finally:
                lease.release()

    async def _leave(self) -> None:
        async with self._entering:
            host, self._host = self._host, None
            if host is not None:
                await host.leave()

    def _check(self, environment: object) -> None:
        if environment not in (None, self._environment):
            raise UsageError(
                f"this box serves {self._environment!r}, not {environment!r}: make the box of that kind, such as "
                f"TrainingSandbox(box_type={environment!r})"
            )

    async def _tasks(self, environment: object, split: str) -> list[str]:
        self._check(environment)
        wanted = await asyncio.to_thread(splits.resolve, self._environment, split, self._variables)
        if isinstance(wanted, list):
            return wanted
        async with self._leased() as sandbox:
            return list((await sandbox.tasks(wanted)).ids)

    async def _create(self, env_type: object, task_id: object, instance_id: object, params: Any) -> dict[str, Any]:
        self._check(env_type)
        if not isinstance(task_id, str) or not task_id:
            raise UsageError("create_instance needs a task_id: take one of get_env_profile(...)")
        name = self._reserve(instance_id)
        try:
            return await self._open(name, task_id, params)
        finally:
            self._opening.discard(name)

    def _reserve(self, wanted: object) -> str:
        if wanted is None:
            wanted = f"exp_{int(time.time())}_{uuid4().hex[:8]}"
        if not isinstance(wanted, str) or not 0 < len(wanted) <= MAX_NAME:
            raise UsageError(f"an instance_id is a text of at most {MAX_NAME} characters")
        if wanted in self._instances or wanted in self._opening:
            raise UsageError(f"instance {wanted!r} exists already: release it first, or choose another id")
        self._opening.add(wanted)
        return wanted

    async def _open(self, name: str, task: str, params: Any) -> dict[str, Any]:
        async with self._hosted() as host:
            instance = await Instance.open(host.pool, self._environment, task, params, timeout=self._timeout)
        if self._closed:
            instance.close()
            raise UsageError("the box was closed while the instance was created")
        self._instances[name] = _Held(instance, asyncio.get_running_loop().time())
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep(), name=f"sleep-{self._id}")
        return instance.opening(name)

    def _instance(self, name: object) -> Instance:
        held = self._instances.get(name) if isinstance(name, str) else None
        if held is None:
            raise unknown("instance", str(name), list(self._instances)[-8:])
        held.called = asyncio.get_running_loop().time()
        return held.instance

    def _release(self, name: object) -> bool:
        held = self._instances.pop(name, None) if isinstance(name, str) else None
        if held is not None:
            held.instance.close()
        return held is not None

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            for held in list(self._instances.values()):
                if not held.instance.episode.busy and loop.time() - held.called > IDLE_S:
                    await held.instance.episode.sleep()
