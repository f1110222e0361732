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
import shutil
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self

import orjson

from backends.environments.catalog import find, stage
from backends.environments.data import VARIABLE as DATA
from backends.environments.install import install
from backends.sandboxes.link import LinkedSandbox
from backends.sandboxes.listener import Listener
from backends.server.wire import MAX_BODY
from orchestrator.errors import SandboxError, Unavailable, UsageError
from orchestrator.protocols import SandboxLimits
from orchestrator.types import Failure, FailureKind, RunId, SandboxId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backends.environments.catalog import EnvironmentSpec
    from backends.server.wire import Hello

START_S: Final = 60.0
"""A server must have dialled in after this many seconds."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_STRAY: Final = "pid-"
"""What the id of a server begins with that another process started."""
UNSAFE_VARIABLE: Final = "ROLLOUT_UNSAFE_LOCAL"


@dataclass(slots=True)
class _Server:
    """A started process and what belongs to it."""

    id: SandboxId
    process: asyncio.subprocess.Process
    folder: Path
    sandbox: LinkedSandbox | None = None
    watcher: asyncio.Task[None] | None = None


class LocalBackend:
    """Sandboxes as subprocesses of this process.

    `environment` names one of the catalogue. `memory_mb` bounds a server's address space, `max_body` a body in
    bytes. An environment that runs code is refused unless `unsafe` or ROLLOUT_UNSAFE_LOCAL=1 says so.
    An environment that is not installed is installed on entering, unless `auto_install` is False.
    """

    def __init__(
        self,
        environment: str,
        *,
        memory_mb: int = 4096,
        max_body: int = MAX_BODY,
        unsafe: bool = False,
        auto_install: bool = True,
    ) -> None:
        self.spec: EnvironmentSpec = find(environment)
        self.environment = self.spec.name
        self.limits = SandboxLimits()
        if self.spec.runs_code and not (unsafe or os.environ.get(UNSAFE_VARIABLE) == "1"):
            raise Unavailable(
                f"{environment} runs the agent's code, and the local backend walls nothing off: use containers "
                f"(--backend docker), or accept the risk with --unsafe-local or {UNSAFE_VARIABLE}=1"
            )
        if self.spec.isolation != "shared":
            raise Unavailable(f"{environment} needs isolation {self.spec.isolation!r}, which no backend offers yet")
        self._memory_mb = memory_mb
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
        self._staged = Path()
        self._data: Path | None = None
        self._interpreter = Path()
        self._dead_cpu_at_start = 0.0
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
        self._interpreter = self.spec.interpreter()
        self._staged = stage(self.spec)
        self._data = self.spec.data_folder
        self._dead_cpu_at_start = _waited_cpu()
        async with AsyncExitStack() as stack:
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            await stack.enter_async_context(self._listener)
            for stray in await self.owned_by(self._run):  # a dead owner's, from an earlier life of the run
                await self.destroy(stray)
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
                _kill(int(sandbox.removeprefix(_STRAY)))
            return
        _kill_group(server.process)
        await server.process.wait()
        if server.sandbox is not None:
            server.sandbox.condemn(Failure(FailureKind.SANDBOX_LOST, "call", "the sandbox was destroyed"))
        if server.watcher is not None:
            server.watcher.cancel()
        shutil.rmtree(server.folder, ignore_errors=True)
        self._servers.pop(sandbox, None)

    async def owned_by(self, run: RunId) -> Sequence[SandboxId]:
        """See `Backend.owned_by`: servers whose command line carries the run's label, whoever started them."""
        named = {server.process.pid: server.id for server in self._servers.values()}
        return [named.get(pid, SandboxId(f"{_STRAY}{pid}")) for pid in _labelled(run)]

    def cpu_seconds(self) -> float:
        """See `Backend.cpu_seconds`."""
        live = sum(_process_cpu(server.process.pid) for server in self._servers.values())
        return live + _waited_cpu() - self._dead_cpu_at_start

    async def _spawn(self, name: SandboxId, token: str) -> _Server:
        folder = self._listener.private / name
        arguments = ["-s", "-m", "backends.server", "--environment", self.environment, "--run", self._run]
        if self._with_solutions:
            arguments.append("--with-solutions")
        environ = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "LANG": "C.UTF-8",
            "TZ": "UTC",
            "PYTHONPATH": str(self._staged),
            "PYTHONHASHSEED": "0",  # the order of sets must not differ between servers: replay compares bytes
            **({DATA: str(self._data)} if self._data else {}),
        }
        try:
            folder.mkdir()
            with self._log(name) as log:
                process = await asyncio.create_subprocess_exec(
                    str(self._interpreter),
                    *arguments,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                    env=environ,
                    start_new_session=True,  # a terminal's Ctrl-C is for the orchestrator alone
                )
        except OSError as error:
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", str(error))) from error
        server = self._servers[name] = _Server(name, process, folder)
        config = {
            "socket": str(self._listener.socket),
            "token": token,
            "digest": self._staged.name,
            "max_body": self._max_body,
            "memory_mb": self._memory_mb,
        }
        if process.stdin is None:
            raise UsageError("the server has no standard input")
        process.stdin.write(orjson.dumps(config) + b"\n")
        return server

    async def _arrival(self, server: _Server, arrived: asyncio.Future[LinkedSandbox]) -> LinkedSandbox:
        """Wait for the hello, the process's end, or the deadline."""
        if self._tasks is None:
            raise UsageError("enter the backend first: `async with LocalBackend(...)`")
        exited = self._tasks.create_task(_end_of(server.process), name=f"exit-{server.id}")
        try:
            async with asyncio.timeout(START_S):
                await asyncio.wait(_either(exited, arrived), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            message = f"the server did not answer within {START_S:g} s; see {self._log_path(server.id)}"
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", message)) from None
        if not arrived.done():
            message = f"{_describe(exited.result())} while starting; see {self._log_path(server.id)}"
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", message))
        sandbox = arrived.result()
        started, serves = (self.environment, self._staged.name), (sandbox.info.name, sandbox.info.digest)
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
            code = exited.result()
            kind = FailureKind.SANDBOX_HUNG if code == -signal.SIGALRM else FailureKind.SANDBOX_LOST
            sandbox.condemn(Failure(kind, "call", _describe(code)))
        else:
            sandbox.condemn(sandbox.ended.result())
            _kill_group(server.process)

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


def _either(*futures: asyncio.Future[Any]) -> set[asyncio.Future[Any]]:
    """Futures of different results as one set, which `asyncio.wait` leaves alone when it is cancelled."""
    return set(futures)


async def _end_of(process: asyncio.subprocess.Process) -> int:
    """The exit status; what the server had forked goes with it, however it died."""
    code = await process.wait()
    _kill(process.pid)
    return code


def _kill_group(process: asyncio.subprocess.Process) -> None:
    """SIGKILL to the server's process group; gone already is success."""
    if process.returncode is None:
        _kill(process.pid)


def _kill(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _labelled(run: RunId) -> list[int]:
    """Process ids of servers started for a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if b"backends.server" in words and (b"--run", run.encode()) in pairwise(words):
            found.append(int(path.parent.name))
    return found


def _describe(code: int) -> str:
    """An exit status in words."""
    if code == -signal.SIGALRM:
        return "the server's own timer ended it: a step ran over its time limit"
    if code < 0:
        return f"the server died of {signal.Signals(-code).name}"
    return f"the server exited with code {code}"


def _waited_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _process_cpu(pid: int) -> float:
    """User + system seconds of a live process and its waited-for children; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(field) for field in fields[11:15]) / _TICKS
