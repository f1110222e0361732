"""A container of a service image, and the relay beside it, from their making to their end.

Owns both containers, a folder with the relay's socket, and the channel over it. Always true: both carry their labels
from the moment they exist; neither has a network; the sandbox is condemned as soon as the service's container ends,
with what the daemon says of that end. `let_go` first, then remove both by `names`.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from backends.agentscope.http import Channel
from backends.sandboxes.docker.death import describe
from backends.sandboxes.docker.port import EngineError, EngineGone
from backends.sandboxes.docker.relay import SOCKET
from backends.sandboxes.docker.usage import Usage
from backends.sandboxes.remote.instances import CREATE_S, ServiceSandbox
from orchestrator.errors import SandboxError
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from backends.sandboxes.docker.port import Attachment, ContainerState, Engine
    from backends.sandboxes.docker.service_image import ServiceImage
    from backends.sandboxes.remote.instances import Admission
    from orchestrator.types import EnvironmentInfo, SandboxId

READY_POLL_S: Final = 0.1
SETTLE_S: Final = 2.0
"""For a moment after a death the daemon still calls the container running."""
LOG_BYTES: Final = 1 << 20
"""What is kept of a service's own output."""
TAIL_BYTES: Final = 1000
"""What of it goes into the error of a service that does not start."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What all service containers of a backend have in common."""

    image: ServiceImage
    base: str
    """The image that relays run in."""
    info: EnvironmentInfo
    instances: int
    labels: Mapping[str, str]
    private: Path
    logs: Path | None
    solutions: Callable[[str], Awaitable[Sequence[bytes]]] | None


@dataclass(slots=True)
class ServiceContainer:
    """See the module's docstring. Start it once."""

    id: SandboxId
    plan: Plan
    engine: Engine
    tasks: asyncio.TaskGroup
    """The backend's: none of what runs in it raises."""
    usage: Usage = field(default_factory=lambda: Usage(0))
    sandbox: ServiceSandbox | None = None
    channel: Channel | None = None
    _said: bytearray = field(default_factory=bytearray)
    _made: asyncio.Task[EngineError | OSError | None] | None = None
    _attachment: Attachment | None = None
    _watcher: asyncio.Task[None] | None = None

    @property
    def names(self) -> list[str]:
        """Its containers; the relay first, which has the other one's network."""
        return [f"{self.id}-relay", str(self.id)]

    @property
    def folder(self) -> Path:
        """Where the relay's socket lies."""
        return self.plan.private / self.id.rpartition("-")[2]

    async def start(self, admission: Admission) -> ServiceSandbox:
        """Make and start both, and wait until the service answers. Raises EngineError, SandboxError, OSError; then,
        and when it is cancelled, let it go."""
        self._made = self.tasks.create_task(self._make(), name=f"make-{self.id}")
        if (error := await asyncio.shield(self._made)) is not None:
            raise error
        self._attachment = attachment = await self.engine.attach(self.id)
        ended = self.tasks.create_task(self._drain(attachment), name=f"output-{self.id}")
        await self.engine.start(str(self.id))
        await self._start_relay(ended)
        self.usage = Usage((await self.engine.inspect(self.id)).pid)
        self.channel = Channel(f"http://{self.id}", token=None, timeout=CREATE_S, socket=str(self.folder / SOCKET))
        await self._ready(self.channel, ended)
        self.sandbox = sandbox = ServiceSandbox(
            self.id, self.plan.info, self.channel, admission, self.plan.solutions, self._cause
        )
        self._watcher = self.tasks.create_task(self._watch(sandbox, ended), name=f"watch-{self.id}")
        return sandbox

    async def _start_relay(self, ended: asyncio.Task[None]) -> None:
        """It joins the service's network; there is none where the service has ended already."""
        try:
            await self.engine.start(self.names[0])
        except EngineError:
            await asyncio.wait({ended}, timeout=SETTLE_S)
            await self._check(ended)
            raise

    async def let_go(self) -> None:
        """Condemn its sandbox and close all that leads to it. Idempotent."""
        if self._made is not None:
            await asyncio.wait({self._made})
        if self.sandbox is not None:
            await self.sandbox.bury(Failure(FailureKind.SANDBOX_LOST, "call", "the sandbox was destroyed"))
        if self._watcher is not None:
            self._watcher.cancel()
        self.usage.cpu_seconds()
        if self.channel is not None:
            await self.channel.close()
        if self._attachment is not None:
            await self._attachment.close()
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    async def _make(self) -> EngineError | OSError | None:
        """Never cancelled: a container that the daemon makes after all would be nobody's."""
        plan = self.plan
        try:
            await asyncio.to_thread(_make_folder, self.folder)
            await self.engine.create(self.id, plan.image.config(plan.info.name, plan.instances, plan.labels))
            relay = await asyncio.to_thread(plan.image.relay, plan.base, self.id, self.folder, plan.labels)
            await self.engine.create(self.names[0], relay)
        except (EngineError, OSError) as error:
            return error
        return None

    async def _ready(self, channel: Channel, ended: asyncio.Task[None]) -> None:
        """Until the service says that it is well, its container's end, or the deadline."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + self.plan.image.ready_s
        while loop.time() < ends:
            await self._check(ended)
            if await channel.alive(max(ends - loop.time(), READY_POLL_S)):
                return
            await asyncio.wait({ended}, timeout=READY_POLL_S)
        raise self._not_started(
            f"nothing at port {self.plan.image.port} answered /healthz within {self.plan.image.ready_s:g} s"
        )

    async def _check(self, ended: asyncio.Task[None]) -> None:
        """Raises SandboxError, with the cause, where the service's container has ended."""
        if ended.done():
            died = describe(await self._settled(), self._memory_mb)
            raise self._not_started(f"{died.message} while starting")

    def _not_started(self, why: str) -> SandboxError:
        said = bytes(self._said[-TAIL_BYTES:]).decode(errors="replace").strip()
        tail = f"; it said last: {said}" if said else ""
        message = f"image {self.plan.image.name}: {why}{tail}"
        return SandboxError(Failure(FailureKind.SANDBOX_START, "start", message))

    async def _watch(self, sandbox: ServiceSandbox, ended: asyncio.Task[None]) -> None:
        """Condemn the sandbox when its container ends; its output ends then, but with the daemon too."""
        await asyncio.wait({ended})
        if (failure := await self._cause()) is not None:
            sandbox.condemn(failure)

    async def _cause(self) -> Failure | None:
        """Why the service ended, as the daemon says; None where it runs."""
        try:
            state = await self._settled()
        except EngineGone:
            return Failure(FailureKind.SANDBOX_LOST, "call", "the Docker daemon is gone, and the sandbox with it")
        except EngineError as error:
            return Failure(FailureKind.SANDBOX_LOST, "call", f"the container is gone ({error})")
        return None if state.running else describe(state, self._memory_mb)

    async def _settled(self) -> ContainerState:
        """How the container ended; or that it has not, after a while."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + SETTLE_S
        while True:
            state = await self.engine.inspect(self.id)
            if not state.running or loop.time() >= ends:
                return state
            await asyncio.sleep(READY_POLL_S)

    @property
    def _memory_mb(self) -> int:
        image = self.plan.image
        return image.hardening.bounds(image.resources(self.plan.instances)).memory_mb

    async def _drain(self, attachment: Attachment) -> None:
        """Keep the beginning of the service's output for the log, and its end for an error; read on to its end."""
        kept = 0
        while data := await attachment.read():
            self._said += data
            del self._said[:-TAIL_BYTES]
            if self.plan.logs is not None and kept < LOG_BYTES:
                await asyncio.to_thread(_append, self.plan.logs / f"{self.id}.log", data[: LOG_BYTES - kept])
                kept += len(data)


def _make_folder(folder: Path) -> None:
    """The relay's user makes its socket there; the folder above lets nobody else in."""
    folder.mkdir()
    folder.chmod(0o777)


def _append(path: Path, data: bytes) -> None:
    try:
        with path.open("ab") as output:
            output.write(data)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)
