"""The remote backend: sandboxes on a server that is there already, over our wire where it offers that, else HTTP.

Owns the connections to it and what it was asked for. It ends nothing of the server's own: destroying a sandbox
releases its instances. A server of AgentScope's protocol tells no digest, no bound on turns and no solutions: the
digest names the environment and the protocol, and solutions come from this machine's own environment of that name.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final, Self

import aiohttp

from backends.agentscope.http import Channel
from backends.sandboxes.remote.instances import CREATE_S, PROBE_S, Admission, ServiceSandbox, described
from backends.sandboxes.remote.known import Known, is_deterministic
from backends.sandboxes.remote.wired import WiredSandbox, connect
from orchestrator.errors import SandboxError, UsageError
from orchestrator.protocols import SandboxLimits
from orchestrator.types import Failure, FailureKind, RunId, SandboxId

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SERVICE_BACK_S: Final = 60.0
"""A server that was there and is gone may be restarting: a start waits this long for it."""
BACK_POLL_S: Final = 0.5


class RemoteBackend:
    """Sandboxes on the server at `base_url`.

    `environment` is what the server calls it. `max_instances` bounds the instances that live at once: a service of
    AgentScope's holds a process for each and refuses none. `deterministic` says whether a lost episode may be rebuilt;
    by default as this machine's environment of that name says, and not for one that it does not know.
    `solutions` are the tasks' known actions, where the server grades by other data than this machine's environment.
    """

    def __init__(
        self,
        base_url: str,
        *,
        environment: str = "bfcl",
        token: str | None = None,
        max_instances: int = 16,
        deterministic: bool | None = None,
        solutions: Mapping[str, Sequence[bytes]] | None = None,
    ) -> None:
        if max_instances < 1:
            raise UsageError("max_instances must be at least 1")
        self.environment = environment
        self.limits = SandboxLimits()
        self._base_url, self._token = base_url.rstrip("/"), token
        self._http: aiohttp.ClientSession | None = None
        self._limit_s = CREATE_S
        self._channel = Channel(base_url, token=token, timeout=CREATE_S)
        self._deterministic = is_deterministic(environment) if deterministic is None else deterministic
        self._known = Known(environment, solutions)
        self._run = RunId("")
        self._sandboxes: dict[SandboxId, ServiceSandbox | WiredSandbox] = {}
        self._count = 0
        self._met = False
        """Whether the server has answered before."""
        self._admission = Admission(max_instances)
        self._stack = AsyncExitStack()

    def configure(self, *, run: RunId, with_solutions: bool, logs: str | None, call_limit_s: float) -> None:
        """See `Backend.configure`. Raises UsageError where solutions are asked for and nobody here has them."""
        self._known.configure(run=run, with_solutions=with_solutions, logs=logs, call_limit_s=call_limit_s)
        self._run = run
        self._limit_s = call_limit_s

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._channel.close)
            headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
            self._http = await stack.enter_async_context(aiohttp.ClientSession(headers=headers))
            await stack.enter_async_context(self._known)
            stack.push_async_callback(self._drain)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def create(self) -> ServiceSandbox | WiredSandbox:
        """See `Backend.create`: over the wire where the server offers it. While a server that was there before is gone
        it waits for it, for a minute."""
        if self._http is None:
            raise UsageError("enter the backend first: `async with RemoteBackend(...)`")
        if self._met:
            await self._back()
        self._count += 1
        name = SandboxId(f"{self.environment}-remote-{os.getpid()}-{self._count}")
        wired = await connect(self._http, self._base_url, name, self.environment, limit_s=self._limit_s)
        if wired is None:
            return await self._create_on_service(name)
        self._met = True
        self._sandboxes[name] = wired
        if self._known.asked:
            wired.solutions = self._known.solution
        return wired

    async def _create_on_service(self, name: SandboxId) -> ServiceSandbox:
        """Asks the service for its tasks, which it can only answer when it works."""
        info = described(self.environment, self.environment, deterministic=self._deterministic)
        solutions = self._known.solution if self._known.asked else None
        sandbox = ServiceSandbox(name, info, self._channel, self._admission, solutions)
        try:
            await sandbox.tasks("")
        except UsageError as error:
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", str(error))) from None
        self._met = True
        self._sandboxes[name] = sandbox
        return sandbox

    async def _back(self) -> None:
        """Until the server says that it is well. Raises SandboxError when it has not for too long."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + SERVICE_BACK_S
        while not await self._channel.alive(PROBE_S):
            if loop.time() >= ends:
                raise SandboxError(
                    Failure(
                        FailureKind.SANDBOX_START,
                        "start",
                        f"{self._base_url} has not said for {SERVICE_BACK_S:g} s that it is well",
                    )
                )
            await asyncio.sleep(BACK_POLL_S)

    async def destroy(self, sandbox: SandboxId) -> None:
        """See `Backend.destroy`."""
        found = self._sandboxes.get(sandbox)
        if isinstance(found, WiredSandbox):
            await found.end()
            self._sandboxes.pop(sandbox, None)
        elif found is not None:
            found.condemn(Failure(FailureKind.SANDBOX_LOST, "call", "the sandbox was destroyed"))
            await found.drain()
            self._sandboxes.pop(sandbox, None)

    async def owned_by(self, run: RunId) -> Sequence[SandboxId]:
        """See `Backend.owned_by`: this process's own; a service does not say whose its instances are."""
        return list(self._sandboxes) if run == self._run else []

    def cpu_seconds(self) -> float:
        """See `Backend.cpu_seconds`: a server does not tell, and it is not of this machine."""
        return 0.0

    async def _drain(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in list(self._sandboxes):
                tasks.create_task(self.destroy(name), name=f"destroy-{name}")
