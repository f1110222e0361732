"""The Docker backend: each sandbox is a container, walled off by default, that dials out to this process.

Owns the listener, every container it started and its hold on their standard input. Always true: a container is
registered here and labelled with its owner before anything is awaited on it; the token and the configuration go through
its standard input, never into what `inspect` shows; a sandbox is condemned as soon as its connection or its container
ends, with what the daemon says of its end. What cannot be removed in time is kept in a list and tried again, and the
reaper, a process of its own, removes what is left when this one is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import orjson

from backends.environments.catalog import find
from backends.sandboxes.docker.death import describe
from backends.sandboxes.docker.hardening import Hardening
from backends.sandboxes.docker.images import DIGEST, ENVIRONMENT, ensure
from backends.sandboxes.docker.owners import RUN, clear_strays, owner_labels
from backends.sandboxes.docker.port import Engine, EngineError, EngineGone
from backends.sandboxes.docker.usage import Usage, first_child
from backends.sandboxes.link import LinkedSandbox
from backends.sandboxes.listener import Listener
from backends.server.wire import MAX_BODY
from orchestrator.errors import SandboxError, UsageError
from orchestrator.types import Failure, FailureKind, RunId, SandboxId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backends.environments.catalog import EnvironmentSpec
    from backends.sandboxes.docker.port import Attachment, ContainerState, Progress
    from backends.server.wire import Hello

log = logging.getLogger(__name__)

START_S: Final = 60.0
"""A server must have dialled in this many seconds after its container's start."""
DAEMON_BACK_S: Final = 60.0
"""A daemon that is gone may be restarting: a start waits this long for it."""
DAEMON_POLL_S: Final = 0.25
SETTLE_S: Final = 2.0
"""For a moment after a death the daemon still calls the container running."""
SETTLE_POLL_S: Final = 0.02
STARTS_A_CORE: Final = 4
"""Starts at once; beyond this each takes longer and none more is done."""
LOG_BYTES: Final = 1 << 20
"""What is kept of a container's own output."""
ADDRESS_SPACE_MB: Final = 4096
_MOUNT: Final = "/run/rollout"


@dataclass(slots=True)
class _Container:
    """A container and what belongs to it."""

    id: SandboxId
    attachment: Attachment | None = None
    sandbox: LinkedSandbox | None = None
    usage: Usage = field(default_factory=lambda: Usage(0))
    watcher: asyncio.Task[None] | None = None


class DockerBackend:
    """Sandboxes as containers on this machine's Docker daemon.

    `environment` names an environment of the catalogue. Its image is found, pulled or built on entering, which
    `progress` hears of; `image` names one of your own. `hardening` is how containers are walled off; `url` is the
    daemon's (default: as the docker command finds it).
    """

    def __init__(
        self,
        environment: str,
        *,
        image: str | None = None,
        hardening: Hardening | None = None,
        url: str | None = None,
        max_body: int = MAX_BODY,
        progress: Progress | None = None,
    ) -> None:
        self.spec: EnvironmentSpec = find(environment)
        self.environment = self.spec.name
        self._image = image
        self._hardening = hardening or Hardening()
        self._url = url
        self._max_body = max_body
        self._progress: Progress = progress or _silent
        self._run = RunId("")
        self._with_solutions = False
        self._limit_s = START_S
        self._logs: Path | None = None
        self._containers: dict[SandboxId, _Container] = {}
        self._dead_cpu = 0.0
        self._listener = Listener()
        self._starts = asyncio.Semaphore(STARTS_A_CORE * (os.cpu_count() or 1))
        self._stack = AsyncExitStack()
        self._tasks: asyncio.TaskGroup | None = None
        self._engine: Engine | None = None
        self._prefix = f"rollout-{self.environment}-{secrets.token_hex(4)}"
        self._count = 0

    def configure(self, *, run: RunId, with_solutions: bool, logs: str | None, call_limit_s: float) -> None:
        """See `Backend.configure`."""
        self._run = run
        self._with_solutions = with_solutions
        self._logs = Path(logs) if logs is not None else None
        self._limit_s = call_limit_s

    async def __aenter__(self) -> Self:
        """Raises Unavailable where there is no daemon on this machine, or no image can be had."""
        async with AsyncExitStack() as stack:
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            self._engine = await Engine.connect(self._url)
            stack.push_async_callback(self._close_engine)
            self._image = await ensure(self._engine, self.spec, self._image, self._progress)
            await stack.enter_async_context(self._listener)
            await clear_strays(self._engine)
            stack.push_async_callback(self._destroy_all)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def create(self) -> LinkedSandbox:
        """See `Backend.create`."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + DAEMON_BACK_S
        while True:
            try:
                async with self._starts:
                    return await self._create()
            except EngineGone as error:
                if loop.time() >= ends:
                    message = f"the Docker daemon has been gone for {DAEMON_BACK_S:g} s ({error})"
                    raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", message)) from None
                await self._daemon_back(ends)
            except EngineError as error:
                raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", str(error))) from None

    async def destroy(self, sandbox: SandboxId) -> None:
        """See `Backend.destroy`."""
        engine = self._need_engine()
        container = self._containers.get(sandbox)
        if container is not None:
            await self._let_go(container)
        await engine.remove(sandbox)
        if self._containers.pop(sandbox, None) is not None and container is not None:
            self._dead_cpu += container.usage.cpu_seconds()

    async def owned_by(self, run: RunId) -> Sequence[SandboxId]:
        """See `Backend.owned_by`: containers that carry the run's label, whoever started them, ended ones too."""
        engine = self._engine or await Engine.connect(self._url)
        try:
            found = await engine.containers({RUN: run})
        finally:
            if engine is not self._engine:
                await engine.close()
        return [SandboxId(one.names[0]) for one in found]

    def cpu_seconds(self) -> float:
        """See `Backend.cpu_seconds`."""
        return self._dead_cpu + sum(container.usage.cpu_seconds() for container in self._containers.values())

    async def _create(self) -> LinkedSandbox:
        self._count += 1
        name = SandboxId(f"{self._prefix}-{self._count}")
        token = secrets.token_urlsafe(24)
        container = self._containers[name] = _Container(name)
        arrived = self._listener.expect(token, lambda hello: self._linked(name, hello))
        making = self._group().create_task(self._make(name), name=f"make-{name}")
        try:
            if (error := await asyncio.shield(making)) is not None:
                raise error
            return await self._start(container, token, arrived)
        except BaseException:  # cancellation included: what was started is ended
            self._listener.forget(token)
            await asyncio.shield(self._undo(making, name))
            raise

    async def _make(self, name: SandboxId) -> EngineError | None:
        """Never cancelled: a container that the daemon makes after all would be nobody's."""
        try:
            await self._need_engine().create(name, self._config())
        except EngineError as error:
            return error
        return None

    async def _undo(self, making: asyncio.Task[EngineError | None], name: SandboxId) -> None:
        await asyncio.wait({making})
        try:
            await self.destroy(name)
        except EngineError as error:
            log.warning("%s is left for later: %s", name, error)

    async def _start(self, container: _Container, token: str, arrived: asyncio.Future[LinkedSandbox]) -> LinkedSandbox:
        """Start it, tell it its configuration, and wait for the hello, the container's end, or the deadline."""
        engine, name = self._need_engine(), container.id
        container.attachment = attachment = await engine.attach(name)
        ended = self._group().create_task(self._drain(container, attachment), name=f"output-{name}")
        await engine.start(name)
        await attachment.write(orjson.dumps(self._inside(token)) + b"\n")
        state = await engine.inspect(name)
        container.usage = Usage(state.pid)
        try:
            async with asyncio.timeout(START_S):
                await asyncio.wait(_either(ended, arrived), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            message = f"the server did not answer within {START_S:g} s; see {self._log_path(name)}"
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", message)) from None
        if not arrived.done():
            died = describe(await self._settled(name), self._hardening)
            message = f"{died.message} while starting; see {self._log_path(name)}"
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", message))
        sandbox = arrived.result()
        sandbox.pid = first_child(state.pid) if self._hardening.init else state.pid
        container.sandbox = sandbox
        container.watcher = self._group().create_task(self._watch(container, sandbox, ended), name=f"watch-{name}")
        return sandbox

    async def _watch(self, container: _Container, sandbox: LinkedSandbox, ended: asyncio.Task[None]) -> None:
        """Condemn the sandbox when its connection or its container ends.

        Its output ends with its container, and with the daemon: then the connection alone decides.
        """
        await asyncio.wait(_either(ended, sandbox.ended), return_when=asyncio.FIRST_COMPLETED)
        while True:
            if sandbox.ended.done() and sandbox.ended.result().kind == FailureKind.PROTOCOL:
                sandbox.condemn(sandbox.ended.result())
                return
            try:
                state = await self._settled(container.id)
            except EngineGone:
                if sandbox.ended.done():
                    message = "the Docker daemon is gone, and the sandbox with it"
                    sandbox.condemn(Failure(FailureKind.SANDBOX_LOST, "call", message))
                    return
            except EngineError as error:
                sandbox.condemn(Failure(FailureKind.SANDBOX_LOST, "call", f"the container is gone ({error})"))
                return
            else:
                if not state.running:
                    sandbox.condemn(describe(state, self._hardening))
                    return
                if sandbox.ended.done():
                    sandbox.condemn(sandbox.ended.result())
                    return
            await asyncio.wait({sandbox.ended})

    async def _settled(self, name: SandboxId) -> ContainerState:
        """How a container ended; or that it has not, after a while."""
        engine = self._need_engine()
        loop = asyncio.get_running_loop()
        ends = loop.time() + SETTLE_S
        while True:
            state = await engine.inspect(name)
            if not state.running or loop.time() >= ends:
                return state
            await asyncio.sleep(SETTLE_POLL_S)

    async def _drain(self, container: _Container, attachment: Attachment) -> None:
        """Keep the beginning of a container's output; read on to its end."""
        path, kept = self._log_path(container.id), 0
        while data := await attachment.read():
            if kept < LOG_BYTES:
                await asyncio.to_thread(_append, path, data[: LOG_BYTES - kept])
                kept += len(data)

    async def _let_go(self, container: _Container) -> None:
        if container.sandbox is not None:
            container.sandbox.condemn(Failure(FailureKind.SANDBOX_LOST, "call", "the sandbox was destroyed"))
        if container.watcher is not None:
            container.watcher.cancel()
        container.usage.cpu_seconds()
        if container.attachment is not None:
            await container.attachment.close()

    async def _daemon_back(self, ends: float) -> None:
        """Until the daemon answers again, or time is up."""
        loop = asyncio.get_running_loop()
        while loop.time() < ends:
            try:
                await self._need_engine().version()
            except EngineError:
                await asyncio.sleep(DAEMON_POLL_S)
            else:
                return

    def _config(self) -> dict[str, Any]:
        host = self._hardening.host_config()
        host["Mounts"] = [
            {"Type": "bind", "Source": str(self._listener.folder), "Target": _MOUNT, "ReadOnly": True},
        ]
        solutions = ["--with-solutions"] if self._with_solutions else []
        return {
            "Image": self._image,
            "Cmd": ["--run", self._run, *solutions],
            "User": self._hardening.user,
            "WorkingDir": "/tmp",
            "Env": [
                "HOME=/tmp",
                "TMPDIR=/tmp",
                "LANG=C.UTF-8",
                "TZ=UTC",
                "PYTHONHASHSEED=0",  # the order of sets must not differ between servers: replay compares bytes
            ],
            "Labels": {
                RUN: self._run,
                ENVIRONMENT: self.environment,
                DIGEST: self.spec.digest,
                **owner_labels(),
            },
            "AttachStdin": True,
            "AttachStdout": True,
            "AttachStderr": True,
            "OpenStdin": True,
            "StdinOnce": True,
            "NetworkDisabled": self._hardening.network == "none",
            "HostConfig": host,
        }

    def _inside(self, token: str) -> dict[str, Any]:
        """What the server reads from its standard input."""
        return {
            "socket": f"{_MOUNT}/{self._listener.socket.name}",
            "token": token,
            "digest": self.spec.digest,
            "max_body": self._max_body,
            # An absurd request for memory then fails in the action that makes it, and takes nobody along.
            "memory_mb": None if self.spec.runs_code else ADDRESS_SPACE_MB,
        }

    def _linked(self, name: SandboxId, hello: Hello) -> LinkedSandbox:
        # The server's own number means nothing on this side of the wall.
        return LinkedSandbox(name, hello._replace(pid=0), limit_s=self._limit_s, max_body=self._max_body)

    def _log_path(self, name: SandboxId) -> Path:
        return Path(os.devnull) if self._logs is None else self._logs / f"{name}.log"

    async def _close_engine(self) -> None:
        engine, self._engine = self._need_engine(), None
        await engine.close()

    async def _destroy_all(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in list(self._containers):
                tasks.create_task(self.destroy(name), name=f"destroy-{name}")

    def _need_engine(self) -> Engine:
        if self._engine is None:
            raise UsageError("enter the backend first: `async with DockerBackend(...)`")
        return self._engine

    def _group(self) -> asyncio.TaskGroup:
        if self._tasks is None:
            raise UsageError("enter the backend first: `async with DockerBackend(...)`")
        return self._tasks


def _either(*futures: asyncio.Future[Any]) -> set[asyncio.Future[Any]]:
    """Futures of different results as one set, which `asyncio.wait` leaves alone when it is cancelled."""
    return set(futures)


def _append(path: Path, data: bytes) -> None:
    try:
        with path.open("ab") as output:
            output.write(data)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)


def _silent(step: object) -> None:
    """Nobody wants to hear of progress."""
