"""Sandboxes as containers of an image that serves AgentScope's environment service, as the original images do.

Owns the containers, the private directory of their sockets, and the reaper. Always true: a container is registered
before the daemon hears of it; none has a network or a published port: the service in it is reached through the relay
beside it, over a unix socket; what a dead owner left is removed by its reaper or by the next one that looks.

Why a relay: such a service only listens on TCP. A bridge, even an internal one, would cost one of the daemon's few
networks and let containers reach each other and whatever this machine listens on; an unix socket needs none, and costs
less a call. The relay is a container of its own, because nothing is known of what the image has inside.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from backends.sandboxes.docker.images import base_image, found_or_pulled
from backends.sandboxes.docker.owners import BACKEND, RUN, clear_at_leisure, owner_labels
from backends.sandboxes.docker.port import Engine, EngineError
from backends.sandboxes.docker.reaping import Reaper
from backends.sandboxes.docker.service_container import Plan, ServiceContainer
from backends.sandboxes.docker.service_image import SERVICE
from backends.sandboxes.private import private_directory
from backends.sandboxes.remote.instances import Admission, described
from backends.sandboxes.remote.known import Known, is_deterministic
from orchestrator.errors import SandboxError, UsageError
from orchestrator.protocols import SandboxLimits
from orchestrator.shield import ended_within, shielded
from orchestrator.types import Failure, FailureKind, RunId, SandboxId

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.sandboxes.docker.port import Progress
    from backends.sandboxes.docker.service_image import ServiceImage
    from backends.sandboxes.remote.instances import ServiceSandbox

LOOK_S: Final = 1.0
"""How often the reaper is looked after."""
LEAVE_S: Final = 10.0
"""How long leaving the backend waits for removals."""

log = logging.getLogger(__name__)


class ServiceImageBackend:
    """Sandboxes as containers of `image`; each serves many instances, `max_instances` of them live at once in all.

    `environment` is what the service calls it; it need not be in this machine's catalogue. `url` is the daemon's
    (default: as the docker command finds it). `deterministic` says whether a lost episode may be rebuilt, by default as
    this machine's environment of that name says; `solutions` are the tasks' known actions, where the image grades by
    other data than that. Entering raises Unavailable where there is no daemon or the image cannot be had; EngineError.
    """

    def __init__(
        self,
        environment: str,
        image: ServiceImage,
        *,
        max_instances: int = 16,
        deterministic: bool | None = None,
        solutions: Mapping[str, Sequence[bytes]] | None = None,
        url: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        if max_instances < 1:
            raise UsageError("max_instances must be at least 1")
        self.environment = environment
        self.limits = SandboxLimits()
        self._image = image
        self._max_instances = max_instances
        self._deterministic = is_deterministic(environment) if deterministic is None else deterministic
        self._known = Known(environment, solutions)
        self._url = url
        self._progress: Progress = progress or _silent
        self._run = RunId("")
        self._logs: Path | None = None
        self._containers: dict[SandboxId, ServiceContainer] = {}
        self._dead_cpu = 0.0
        self._admission = Admission(max_instances)
        self._engine: Engine | None = None
        self._plan: Plan | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._chores: list[asyncio.Task[None]] = []
        self._reaper: Reaper | None = None
        self._stack = AsyncExitStack()
        self._prefix = f"rollout-{environment}-{secrets.token_hex(4)}"
        self._count = 0

    def configure(self, *, run: RunId, with_solutions: bool, logs: str | None, call_limit_s: float) -> None:
        """See `Backend.configure`. Raises UsageError where solutions are asked for and nobody here has them."""
        self._known.configure(run=run, with_solutions=with_solutions, logs=logs, call_limit_s=call_limit_s)
        self._run = run
        self._logs = Path(logs) if logs is not None else None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            engine = self._engine = await stack.enter_async_context(await Engine.connect(self._url))
            stack.callback(self._forget_engine)
            if engine.remote:
                raise UsageError(
                    f"an image of the protocol env_service needs a Docker daemon on this machine, and {engine.url} is "
                    "another's: start the service there, and reach it with --backend remote --url URL"
                )
            await found_or_pulled(engine, self._image.name, self._progress)
            base = await base_image(engine, self._progress)
            private = await asyncio.to_thread(stack.enter_context, private_directory())
            identity = f"{self.environment} {await engine.image_id(self._image.name)}"
            self._plan = Plan(
                image=self._image,
                base=base,
                info=described(self.environment, identity, deterministic=self._deterministic),
                instances=self._max_instances,
                labels={RUN: self._run, BACKEND: self._prefix, **owner_labels()},
                private=private,
                logs=self._logs,
                solutions=self._known.solution if self._known.asked else None,
            )
            await stack.enter_async_context(self._known)
            output = Path(os.devnull) if self._logs is None else self._logs / "reaper.log"
            self._reaper = await Reaper.start(
                url=engine.url, labels={BACKEND: self._prefix}, private=private, log=output
            )
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            stack.push_async_callback(self._leave)
            self._chores = [
                self._tasks.create_task(self._keep_reaper(), name="keep-reaper"),
                self._tasks.create_task(clear_at_leisure(engine), name="clear-strays"),
            ]
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def create(self) -> ServiceSandbox:
        """See `Backend.create`."""
        if self._plan is None or self._engine is None or self._tasks is None:
            raise UsageError("enter the backend first: `async with ServiceImageBackend(...)`")
        self._count += 1
        name = SandboxId(f"{self._prefix}-{self._count}")
        container = self._containers[name] = ServiceContainer(name, self._plan, self._engine, self._tasks)
        try:
            return await container.start(self._admission)
        except BaseException as error:  # cancellation included: what was started is ended
            await shielded(self._undo(name), deadline_s=LEAVE_S, what=name)
            if isinstance(error, EngineError | OSError):
                raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", str(error))) from None
            raise

    async def destroy(self, sandbox: SandboxId) -> None:
        """See `Backend.destroy`. Raises EngineError where the daemon does not do it; leaving tries again."""
        container = self._containers.get(sandbox)
        if container is None or self._engine is None:
            return
        await container.let_go()
        for name in container.names:
            await self._engine.remove(name)
        self._containers.pop(sandbox, None)
        self._dead_cpu += container.usage.cpu_seconds()

    async def owned_by(self, run: RunId) -> Sequence[SandboxId]:
        """See `Backend.owned_by`: containers that serve and carry the run's label, whoever started them."""
        wanted = {RUN: str(run), SERVICE: self.environment}
        if self._engine is not None:
            found = await self._engine.containers(wanted)
        else:
            async with await Engine.connect(self._url) as engine:
                found = await engine.containers(wanted)
        return [SandboxId(one.names[0]) for one in found]

    def cpu_seconds(self) -> float:
        """See `Backend.cpu_seconds`; relays are not counted."""
        return self._dead_cpu + sum(container.usage.cpu_seconds() for container in self._containers.values())

    def containers(self) -> list[ServiceContainer]:
        """Those that are registered: starting, serving, and not yet removed."""
        return list(self._containers.values())

    def __repr__(self) -> str:
        return f"<ServiceImageBackend {self.environment} {self._image.name} containers={len(self._containers)}>"

    async def _undo(self, name: SandboxId) -> None:
        try:
            await self.destroy(name)
        except EngineError as error:
            log.warning("%s is left for later: %s", name, error)

    async def _keep_reaper(self) -> None:
        while self._reaper is not None:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self._reaper.keep)

    async def _leave(self) -> None:
        """Remove everything; what does not go in time is the reaper's."""
        for chore in self._chores:
            chore.cancel()
        if self._chores:
            await asyncio.wait(self._chores)
        removing = {asyncio.create_task(self._undo(name), name=f"destroy-{name}") for name in self._containers}
        await ended_within(removing, LEAVE_S)
        reaper, self._reaper = self._reaper, None
        if reaper is not None:
            await reaper.leave(list(self._containers))

    def _forget_engine(self) -> None:
        self._engine = None


def _silent(step: object) -> None:
    """Nobody wants to hear of progress."""
