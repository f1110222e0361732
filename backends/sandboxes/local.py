"""The local backend: each sandbox is a subprocess on its environment's own interpreter. The embedded default.

Owns the listener, every server process it started and their temporary directories. Always true: a process is registered
before anything is awaited on it; it is killed with its process group and waited for before it is forgotten; a sandbox
is condemned as soon as its process or its connection ends, with the true reason. Servers also die with this process
(PR_SET_PDEATHSIG, and the end of their standard input), so kill -9 leaves nothing behind. What an environment forks
goes with its server's process group; what leaves the group by setsid escapes, and belongs into a container.
"""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import sys
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self

from backends.environments.catalog import find
from backends.environments.install import install
from backends.sandboxes.link import LinkedSandbox
from backends.sandboxes.listener import Listener
from backends.sandboxes.process import (
    Program,
    children_of,
    cpu_below,
    cpu_of,
    death,
    describe,
    end_of,
    kill,
    kill_group,
    labelled,
    left_behind,
)
from backends.sandboxes.tail import Tail
from backends.server.folders import remove
from backends.server.wire import MAX_BODY, MAX_CHILDREN
from orchestrator.errors import SandboxError, Unavailable, UsageError
from orchestrator.protocols import SandboxLimits
from orchestrator.types import Failure, FailureKind, RunId, SandboxId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backends.environments.catalog import EnvironmentSpec
    from backends.server.wire import Hello

START_S: Final = 60.0
"""A server must have dialled in after this many seconds."""
TAIL_S: Final = 3.0
"""What a server leaves behind on purpose has ended everything by then."""
_STRAY: Final = "pid-"
"""What the id of a server begins with that another process started."""
UNSAFE_VARIABLE: Final = "ROLLOUT_UNSAFE_LOCAL"


@dataclass(slots=True)
class _Server:
    """A started process and what belongs to it."""

    id: SandboxId
    process: asyncio.subprocess.Process
    folder: Path
    tail: Tail | None = None
    sandbox: LinkedSandbox | None = None
    watcher: asyncio.Task[None] | None = None


class LocalBackend:
    """Sandboxes as subprocesses of this process.

    `environment` names one of the catalogue. `memory_mb` bounds the address space of a server, or of each session's
    process where they have their own; of those a sandbox has at most `max_children`. `max_body` bounds a body in bytes.
    An environment that runs code is refused unless `unsafe` or ROLLOUT_UNSAFE_LOCAL=1 says so.
    An environment that is not installed is installed on entering, unless `auto_install` is False.
    """

    def __init__(
        self,
        environment: str,
        *,
        memory_mb: int = 4096,
        max_children: int = MAX_CHILDREN,
        max_body: int = MAX_BODY,
        unsafe: bool = False,
        auto_install: bool = True,
    ) -> None:
        self.spec: EnvironmentSpec = find(environment)
        self.environment = self.spec.name
        self._forks = self.spec.isolation == "process"
        self.limits = SandboxLimits(max_children if self._forks else None)
        if self._forks and sys.platform != "linux":
            raise Unavailable(
                f"{environment} needs a process a session, which this project forks and ends on Linux alone"
            )
        if self.spec.runs_code and not (unsafe or os.environ.get(UNSAFE_VARIABLE) == "1"):
            raise Unavailable(
                f"{environment} runs the agent's code, and the local backend walls nothing off: use containers "
                f"(--backend docker), or accept the risk with --unsafe-local or {UNSAFE_VARIABLE}=1"
            )
        self._memory_mb = memory_mb
        self._max_children = max_children
        self._max_body = max_body
        self._auto_install = auto_install
        self._run = RunId("")
        self._with_solutions = False
        self._limit_s = START_S
        self._logs: Path | None = None
        self._servers: dict[SandboxId, _Server] = {}
        self._listener = Listener()
        self._stack = AsyncExitStack()
        self._tasks: asyncio.TaskGroup | None = None
        self._program: Program | None = None
        self._dead_cpu_at_start = 0.0
        self._orphaned_cpu = 0.0
        """Of processes that outlive their server: nobody here waits for them."""
        self._count = 0

    def configure(self, *, run: RunId, with_solutions: bool, logs: str | None, call_limit_s: float) -> None:
        """See `Backend.configure`."""
        self._run = run
        self._with_solutions = with_solutions
        self._logs = Path(logs) if logs is not None else None
        self._limit_s = call_limit_s

    async def __aenter__(self) -> Self:
        if self._auto_install and not self.spec.installed:
            await install(self.spec, progress=lambda line: None)
        self._program = Program.of(self.spec)
        self._dead_cpu_at_start = _waited_cpu()
        async with AsyncExitStack() as stack:
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            await stack.enter_async_context(self._listener)
            for stray in left_behind(self._run):  # from an earlier life of the run
                kill(stray)
            stack.push_async_callback(self._destroy_all)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def create(self) -> LinkedSandbox:
        """See `Backend.create`."""
        self._count += 1
        name = SandboxId(f"{self.environment}-{os.getpid()}-{self._count}")
        token = secrets.token_urlsafe(24)
        arrived = self._listener.expect(token, lambda hello: self._linked(name, hello))
        try:
            server = await self._spawn(name, token)
            return await self._arrival(server, arrived)
        except BaseException:  # cancellation included: what was started is ended
            self._listener.forget(token)
            await asyncio.shield(self.destroy(name))
            raise

    async def destroy(self, sandbox: SandboxId) -> None:
        """See `Backend.destroy`."""
        server = self._servers.get(sandbox)
        if server is None:
            if sandbox.startswith(_STRAY):
                kill(int(sandbox.removeprefix(_STRAY)))
            return
        below = [] if server.tail is None else children_of(server.process.pid)
        self._orphaned_cpu += sum(cpu_of(pid) + cpu_below(pid) for pid in below)
        kill_group(server.process)
        await server.process.wait()
        if server.tail is not None:
            await _ended(server.tail, below)
        if server.sandbox is not None:
            server.sandbox.condemn(Failure(FailureKind.SANDBOX_LOST, "call", "the sandbox was destroyed"))
        if server.watcher is not None:
            server.watcher.cancel()
        with suppress(OSError):  # what is left goes with the private folder
            await asyncio.to_thread(remove, server.folder)
        self._servers.pop(sandbox, None)

    async def owned_by(self, run: RunId) -> Sequence[SandboxId]:
        """See `Backend.owned_by`: servers whose command line carries the run's label, whoever started them."""
        named = {server.process.pid: server.id for server in self._servers.values()}
        return [named.get(pid, SandboxId(f"{_STRAY}{pid}")) for pid in labelled(run)]

    def cpu_seconds(self) -> float:
        """See `Backend.cpu_seconds`."""
        live = sum(cpu_of(server.process.pid) for server in self._servers.values())
        below = sum(cpu_below(server.process.pid) for server in self._servers.values() if server.tail is not None)
        return live + below + self._orphaned_cpu + _waited_cpu() - self._dead_cpu_at_start

    async def _spawn(self, name: SandboxId, token: str) -> _Server:
        folder = self._listener.private / name
        config = {
            "socket": str(self._listener.socket),
            "token": token,
            "max_body": self._max_body,
            "memory_mb": self._memory_mb,
            "max_children": self._max_children,
        }
        try:
            folder.mkdir()
            with self._log(name) as log, ExitStack() as undo:
                tail = Tail() if self._forks else None
                if tail is not None:
                    undo.callback(tail.close)
                program, solutions = self._need_program(), self._with_solutions
                process = await program.spawn(folder, self._run, log, config, solutions=solutions, tail=tail)
                undo.pop_all()
        except OSError as error:
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", str(error))) from error
        server = self._servers[name] = _Server(name, process, folder, tail)
        return server

    async def _arrival(self, server: _Server, arrived: asyncio.Future[LinkedSandbox]) -> LinkedSandbox:
        """Wait for the hello, the process's end, or the deadline."""
        if self._tasks is None:
            raise UsageError("enter the backend first: `async with LocalBackend(...)`")
        exited = self._tasks.create_task(end_of(server.process), name=f"exit-{server.id}")
        try:
            async with asyncio.timeout(START_S):
                await asyncio.wait(_either(exited, arrived), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            message = f"the server did not answer within {START_S:g} s; see {self._log_path(server.id)}"
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", message)) from None
        if not arrived.done():
            message = f"{describe(exited.result())} while starting; see {self._log_path(server.id)}"
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", message))
        sandbox = arrived.result()
        started, serves = (self.environment, self._need_program().digest), (sandbox.info.name, sandbox.info.digest)
        if serves != started:
            message = f"the server serves {' '.join(serves)}, but {' '.join(started)} was started"
            raise SandboxError(Failure(FailureKind.PROTOCOL, "start", message))
        info, spec = sandbox.info, self.spec
        if (info.isolation, info.deterministic, info.runs_code) != (spec.isolation, spec.deterministic, spec.runs_code):
            message = (
                f"{spec.name}'s environment.toml and its inside.py differ in isolation, deterministic or runs_code"
            )
            raise SandboxError(Failure(FailureKind.PROTOCOL, "start", message))
        server.sandbox = sandbox
        server.watcher = self._tasks.create_task(self._watch(server, sandbox, exited), name=f"watch-{server.id}")
        return sandbox

    async def _watch(self, server: _Server, sandbox: LinkedSandbox, exited: asyncio.Task[int]) -> None:
        """Condemn the sandbox when its process or its connection ends."""
        await asyncio.wait(_either(exited, sandbox.ended), return_when=asyncio.FIRST_COMPLETED)
        if not exited.done() and sandbox.ended.result().kind != FailureKind.PROTOCOL:
            await asyncio.wait({exited}, timeout=1.0)  # a death closes the connection first; the exit status says more
        if exited.done():
            sandbox.condemn(death(exited.result()))
        else:
            sandbox.condemn(sandbox.ended.result())
            kill_group(server.process)

    def _need_program(self) -> Program:
        if self._program is None:
            raise UsageError("enter the backend first: `async with LocalBackend(...)`")
        return self._program

    def _linked(self, name: SandboxId, hello: Hello) -> LinkedSandbox:
        return LinkedSandbox(name, hello, limit_s=self._limit_s, max_body=self._max_body)

    def _log_path(self, name: SandboxId) -> Path:
        return Path(os.devnull) if self._logs is None else self._logs / f"{name}.log"

    def _log(self, name: SandboxId) -> BinaryIO:
        return self._log_path(name).open("ab")

    async def _destroy_all(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in list(self._servers):
                tasks.create_task(self.destroy(name), name=f"destroy-{name}")


async def _ended(tail: Tail, below: list[int]) -> None:
    """Wait until nothing is left of a server; what was right `below` it and hangs is killed."""
    try:
        async with asyncio.timeout(TAIL_S):
            await tail.gone()
    except TimeoutError:
        for pid in below:
            kill(pid)
        await tail.gone()


def _either(*futures: asyncio.Future[Any]) -> set[asyncio.Future[Any]]:
    """Futures of different results as one set, which `asyncio.wait` leaves alone when it is cancelled."""
    return set(futures)


def _waited_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
