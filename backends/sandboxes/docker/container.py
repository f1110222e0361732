"""One container, from its making to its end; and the blueprint that all containers of a backend are made by.

Always true: it carries its labels from the moment it exists; the token and the configuration go through its standard
input, never into what `inspect` shows; its door is shut as soon as it has dialled in; its sandbox is condemned as soon
as its connection or the container ends, with what the daemon says of that end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from backends.environments.data import VARIABLE as DATA
from backends.sandboxes.docker.carried import FOLDER as DATA_FOLDER
from backends.sandboxes.docker.death import describe
from backends.sandboxes.docker.egress import AllowList
from backends.sandboxes.docker.images import DIGEST, ENVIRONMENT
from backends.sandboxes.docker.owners import LEASE, RUN
from backends.sandboxes.docker.port import EngineError, EngineGone, NotThere
from backends.sandboxes.docker.proxy import SOCKET as EGRESS
from backends.sandboxes.docker.proxy import Proxy
from backends.sandboxes.docker.usage import Usage, first_child
from backends.sandboxes.link import LinkedSandbox
from backends.sandboxes.listener import SOCKET
from backends.server.forward import PORT
from orchestrator.errors import SandboxError
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from backends.environments.catalog import EnvironmentSpec
    from backends.sandboxes.docker.hardening import Hardening
    from backends.sandboxes.docker.outpost import Door
    from backends.sandboxes.docker.port import Attachment, ContainerState, Engine
    from backends.sandboxes.listener import Listener
    from backends.server.wire import Hello
    from orchestrator.types import RunId, SandboxId

START_S: Final = 60.0
"""A server must have dialled in this many seconds after its container's start."""
SETTLE_S: Final = 2.0
"""For a moment after a death the daemon still calls the container running."""
SETTLE_POLL_S: Final = 0.02
WORN_AT: Final = 0.75
"""The part of its memory from which on a container is replaced."""
LOG_BYTES: Final = 1 << 20
"""What is kept of a container's own output."""
LEISURE_S: Final = 0.05
"""Between two reads of what is not kept; each takes some 32 KiB."""
ADDRESS_SPACE_MB: Final = 4096
_MOUNT: Final = "/run/rollout"
_WAY_OUT: Final = "/run/rollout-egress"
_NOWHERE: Final = AllowList()
_OWN: Final = ("localhost", "127.0.0.1", "::1")
"""The container itself, unless the list means this machine by one of these."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What all containers of a backend have in common."""

    spec: EnvironmentSpec
    digest: str
    image: str
    hardening: Hardening
    run: RunId
    owner: Mapping[str, str]
    """The labels that name the owner."""
    with_solutions: bool
    logs: Path | None
    limit_s: float
    max_body: int
    allowed: AllowList = _NOWHERE
    """Where its containers may connect to."""
    data: Path | None = None
    """The environment's registered data."""

    def config(self, folder: Path, way_out: Path | None = None, lease: str = "") -> dict[str, Any]:
        """What the daemon is told: the body of the engine's call. `folder` holds the socket to dial, `way_out` that of
        the proxy where there is one; `lease` is the outpost that it depends on, if it does."""
        host = self.hardening.host_config(self.spec.resources)
        mounts = {_MOUNT: folder, _WAY_OUT: way_out, DATA_FOLDER: self.data}
        host["Mounts"] = [_mount(source, target) for target, source in mounts.items() if source is not None]
        return {
            "Image": self.image,
            "Cmd": [
                *("--run", self.run, "--isolation", self.spec.isolation),
                *(["--with-solutions"] if self.with_solutions else []),
            ],
            "User": self.hardening.user,
            "WorkingDir": "/tmp",
            "Env": [
                "HOME=/tmp",
                "TMPDIR=/tmp",
                "LANG=C.UTF-8",
                "TZ=UTC",
                "PYTHONHASHSEED=0",  # the order of sets must not differ between servers: replay compares bytes
                *(_proxied(self.allowed) if way_out else ()),
                *([f"{DATA}={DATA_FOLDER}"] if self.data else ()),
            ],
            "Labels": {
                RUN: self.run,
                ENVIRONMENT: self.spec.name,
                DIGEST: self.digest,
                **self.owner,
                **({LEASE: lease} if lease else {}),
            },
            "AttachStdin": True,
            "AttachStdout": True,
            "AttachStderr": True,
            "OpenStdin": True,
            "StdinOnce": True,
            "NetworkDisabled": self.hardening.network == "none",
            "HostConfig": host,
        }

    def inside(self, token: str) -> bytes:
        """What the server reads from its standard input."""
        config = {
            "socket": f"{_MOUNT}/{SOCKET}",
            "token": token,
            "digest": self.digest,
            "max_body": self.max_body,
            "guarded": True,
            "egress": f"{_WAY_OUT}/{EGRESS}" if self.allowed else None,
            # An absurd request for memory then fails in the action that makes it, and takes nobody along.
            "memory_mb": None if self.spec.runs_code else ADDRESS_SPACE_MB,
        }
        return orjson.dumps(config) + b"\n"

    def linked(self, name: SandboxId, hello: Hello) -> LinkedSandbox:
        """The sandbox behind a connection. The server's own number means nothing on this side of the wall."""
        return LinkedSandbox(name, hello._replace(pid=0), limit_s=self.limit_s, max_body=self.max_body)

    @property
    def memory_mb(self) -> int:
        """What a container may use."""
        return self.hardening.bounds(self.spec.resources).memory_mb

    def log_path(self, name: SandboxId) -> Path:
        """Where a container's output goes."""
        return Path(os.devnull) if self.logs is None else self.logs / f"{name}.log"


@dataclass(slots=True)
class Container:
    """A container and what belongs to it. Start it once; let it go before it is removed."""

    id: SandboxId
    blueprint: Blueprint
    engine: Engine
    tasks: asyncio.TaskGroup
    """The backend's: none of what runs in it raises."""
    lease: str = ""
    """The outpost that it depends on, where the daemon is another machine's."""
    usage: Usage = field(default_factory=lambda: Usage(0))
    sandbox: LinkedSandbox | None = None
    _attachment: Attachment | None = None
    _door: Door | None = None
    _proxy: Proxy | None = None
    _made: asyncio.Task[EngineError | OSError | None] | None = None
    _watcher: asyncio.Task[None] | None = None

    async def start(self, listener: Listener, door: Door) -> LinkedSandbox:
        """Make it, start it, and wait for its hello, through its own door. Raises EngineError, SandboxError, OSError;
        then let it go."""
        token = secrets.token_urlsafe(24)
        arrived = listener.expect(token, lambda hello: self.blueprint.linked(self.id, hello))
        self._door = door
        if self.blueprint.allowed:
            folder = door.folder.with_name(f"{door.folder.name}-egress")
            self._proxy = Proxy(self.id, folder, self.blueprint.allowed, self.tasks)
        self._made = self.tasks.create_task(self._make(door, self._proxy), name=f"make-{self.id}")
        try:
            if (error := await asyncio.shield(self._made)) is not None:
                raise error
            return await self._run(token, arrived)
        finally:
            listener.forget(token)

    def look(self) -> None:
        """Take in what it uses; a sandbox near its bound is worn, before the kernel kills it for memory."""
        self.usage.cpu_seconds()
        if killed := self.usage.new_oom_kills():
            log.warning("%s: the kernel has killed %d of its processes for memory", self.id, killed)
        allowed = self.blueprint.memory_mb << 20
        if self.sandbox is not None and 0 < allowed * WORN_AT < self.usage.memory_bytes():
            self.sandbox.worn = True

    @property
    def never_made(self) -> bool:
        """Whether the daemon cannot have heard of it."""
        error = self._made.result() if self._made is not None and self._made.done() else None
        return isinstance(error, OSError) or (isinstance(error, EngineGone) and not error.asked)

    @property
    def refused(self) -> int:
        """How many connections its proxy has refused."""
        return 0 if self._proxy is None else self._proxy.refused

    async def let_go(self) -> None:
        """Close all that leads to it; its standard input ends. Idempotent."""
        if self._made is not None:
            await asyncio.wait({self._made})
        if self.sandbox is not None:
            self.sandbox.condemn(Failure(FailureKind.SANDBOX_LOST, "call", "the sandbox was destroyed"))
        if self._watcher is not None:
            self._watcher.cancel()
        self.usage.cpu_seconds()
        await self._shut()
        if self._proxy is not None:
            await self._proxy.close()
        if self._attachment is not None:
            await self._attachment.close()

    async def _make(self, door: Door, proxy: Proxy | None) -> EngineError | OSError | None:
        """Never cancelled: a container that the daemon makes after all would be nobody's."""
        try:
            await door.open()
            if proxy is not None:
                await proxy.open()
            way_out = None if proxy is None else proxy.folder
            await self.engine.create(self.id, self.blueprint.config(door.folder, way_out, self.lease))
        except (EngineError, OSError) as error:
            return error
        return None

    async def _run(self, token: str, arrived: asyncio.Future[LinkedSandbox]) -> LinkedSandbox:
        self._attachment = attachment = await self.engine.attach(self.id)
        ended = self.tasks.create_task(self._drain(attachment), name=f"output-{self.id}")
        await self.engine.start(self.id)
        await attachment.write(self.blueprint.inside(token))
        pid = (await self.engine.inspect(self.id)).pid  # while the server loads
        pid = 0 if self.engine.remote else pid  # another machine's number means nothing here
        self.usage = Usage(pid)
        sandbox = await self._arrival(ended, arrived)
        await self._shut()
        sandbox.pid = first_child(pid) if self.blueprint.hardening.init else pid
        self.sandbox = sandbox
        self._watcher = self.tasks.create_task(self._watch(sandbox, ended), name=f"watch-{self.id}")
        return sandbox

    async def _arrival(self, ended: asyncio.Task[None], arrived: asyncio.Future[LinkedSandbox]) -> LinkedSandbox:
        """Wait for the hello, the container's end, or the deadline."""
        see = f"see {self.blueprint.log_path(self.id)}"
        try:
            async with asyncio.timeout(START_S):
                await asyncio.wait(_either(ended, arrived), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            message = f"the server did not answer within {START_S:g} s; {see}"
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", message)) from None
        if not arrived.done():
            state = await self._settled()
            died = "its output ended" if state.running else describe(state, self.blueprint.memory_mb).message
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", f"{died} while starting; {see}"))
        sandbox = arrived.result()
        started, serves = (self.blueprint.spec.name, self.blueprint.digest), (sandbox.info.name, sandbox.info.digest)
        if serves != started:
            message = f"the server serves {' '.join(serves)}, but {' '.join(started)} was started"
            raise SandboxError(Failure(FailureKind.PROTOCOL, "start", message))
        return sandbox

    async def _watch(self, sandbox: LinkedSandbox, ended: asyncio.Task[None]) -> None:
        """Condemn the sandbox when its connection or its container ends.

        Its output ends with the container, but with the daemon too: then the connection alone decides.
        """
        await asyncio.wait(_either(ended, sandbox.ended), return_when=asyncio.FIRST_COMPLETED)
        failure = await self._cause(sandbox)
        if failure is None and not sandbox.ended.done():
            await asyncio.wait({sandbox.ended})
            failure = await self._cause(sandbox)
        sandbox.condemn(failure or sandbox.ended.result())

    async def _cause(self, sandbox: LinkedSandbox) -> Failure | None:
        """Why the sandbox is lost; None where it seems to live."""
        if sandbox.ended.done() and sandbox.ended.result().kind == FailureKind.PROTOCOL:
            return sandbox.ended.result()
        try:
            state = await self._settled()
        except NotThere as error:
            return Failure(FailureKind.SANDBOX_LOST, "call", f"the container is gone ({error})")
        except EngineError as error:
            if not sandbox.ended.done():
                return None
            gone = "the Docker daemon is gone, and the sandbox with it"
            message = (
                gone if isinstance(error, EngineGone) else f"the connection has ended, and nobody knows why: {error}"
            )
            return Failure(FailureKind.SANDBOX_LOST, "call", message)
        return None if state.running else describe(state, self.blueprint.memory_mb)

    async def _settled(self) -> ContainerState:
        """How the container ended; or that it has not, after a while."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + SETTLE_S
        while True:
            state = await self.engine.inspect(self.id)
            if not state.running or loop.time() >= ends:
                return state
            await asyncio.sleep(SETTLE_POLL_S)

    async def _drain(self, attachment: Attachment) -> None:
        """Keep the beginning of the container's output; read on to its end, but at leisure: what writes without end
        waits in its own pipe, and costs neither this process nor the daemon anything."""
        path, kept = self.blueprint.log_path(self.id), 0
        while data := await attachment.read():
            if kept < LOG_BYTES:
                await asyncio.to_thread(_append, path, data[: LOG_BYTES - kept])
                kept += len(data)
            else:
                await asyncio.sleep(LEISURE_S)

    async def _shut(self) -> None:
        """Nobody comes in through this container's door any more."""
        if (door := self._door) is not None:
            self._door = None
            await door.shut()


def _proxied(allowed: AllowList) -> Iterator[str]:
    """The variables that HTTP clients go by, as each of them spells it."""
    meant = {destination.host for destination in allowed.destinations}
    values = {"http_proxy": f"http://127.0.0.1:{PORT}", "https_proxy": f"http://127.0.0.1:{PORT}"}
    values["no_proxy"] = ",".join(name for name in _OWN if name not in meant)
    for name, value in values.items():
        yield f"{name}={value}"
        yield f"{name.upper()}={value}"


def _mount(source: Path, target: str) -> dict[str, Any]:
    return {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": True}


def _either(*futures: asyncio.Future[Any]) -> set[asyncio.Future[Any]]:
    """Futures of different results as one set, which `asyncio.wait` leaves alone when it is cancelled."""
    return set(futures)


def _append(path: Path, data: bytes) -> None:
    try:
        with path.open("ab") as output:
            output.write(data)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)
