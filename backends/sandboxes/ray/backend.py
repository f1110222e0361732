"""The Ray backend: each sandbox is an actor that starts a server on its node; the server dials in here over TLS.

Owns the connection to the cluster (with others of this process), the listener, and every actor it made. Always true:
Ray carries no step; a sandbox is condemned as soon as its connection, its server or its actor ends, with the truest
reason there is; actors belong to this process, so Ray ends them when it dies, and their servers end with them.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self
from uuid import uuid4

from backends.environments.catalog import find
from backends.sandboxes.link import LinkedSandbox
from backends.sandboxes.listener import Listener, Tcp
from backends.sandboxes.process import death
from backends.sandboxes.ray.cluster import NAMESPACE, RayOptions, actors_of, connection, module, own_address, told
from backends.sandboxes.ray.host import Launch, Prepared, SandboxHost
from backends.server.wire import MAX_BODY
from orchestrator.errors import SandboxError, UsageError
from orchestrator.protocols import SandboxLimits
from orchestrator.types import Failure, FailureKind, RunId, SandboxId

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from backends.environments.catalog import EnvironmentSpec
    from backends.server.wire import Hello

START_S: Final = 60.0
"""A node must have been found for an actor, and its server must have dialled in, after this many seconds."""
INSTALL_S: Final = 600.0
"""The first actor of a node may have an environment to install."""
STOP_S: Final = 3.0
"""What an actor gets to end its server in order; then it is killed, and the server with it."""
CPU_S: Final = 2.0
"""How often the servers' CPU is asked for."""
_STRAY: Final = "stray:"


@dataclass(slots=True, eq=False)
class _Placed:
    """An actor of ours, and its sandbox once the server has dialled in."""

    id: SandboxId
    actor: Any
    sandbox: LinkedSandbox | None = None
    watcher: asyncio.Task[None] | None = None
    cpu: float = 0.0


class RayBackend:
    """Sandboxes on a cluster.

    `address` is Ray's (default: RAY_ADDRESS, or a cluster of this machine's own). `options` is what each actor asks
    for. `host` is the address of this machine that the nodes reach (default: as Ray sees it), `port` where sandboxes
    dial in (default: any free one). `insecure` leaves TLS out. `memory_mb` bounds a server's address space.
    """

    def __init__(
        self,
        environment: str,
        *,
        address: str | None = None,
        options: RayOptions | None = None,
        host: str | None = None,
        port: int = 0,
        insecure: bool = False,
        memory_mb: int = 4096,
        max_body: int = MAX_BODY,
    ) -> None:
        self.spec: EnvironmentSpec = find(environment)
        self.environment = self.spec.name
        self.limits = SandboxLimits(sessions=1, episodes=1) if self.spec.runs_code else SandboxLimits()
        self._address = address
        self._options = options or RayOptions()
        self._host, self._port, self._insecure = host, port, insecure
        self._memory_mb, self._max_body = memory_mb, max_body
        self._run = RunId("")
        self._with_solutions = False
        self._limit_s = START_S
        self._ray: ModuleType | None = None
        self._listener: Listener | None = None
        self._placed: dict[SandboxId, _Placed] = {}
        self._dead_cpu = 0.0
        self._tasks: asyncio.TaskGroup | None = None
        self._stack = AsyncExitStack()
        self._life = uuid4().hex[:6]
        self._count = 0

    def configure(self, *, run: RunId, with_solutions: bool, logs: str | None, call_limit_s: float) -> None:
        """See `Backend.configure`. The servers' output stays on their nodes, and its end goes into failures."""
        self._run = run
        self._with_solutions = with_solutions
        self._limit_s = call_limit_s

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            ray = self._ray = await asyncio.to_thread(module)
            await asyncio.to_thread(self._options.check, ray, SandboxHost)
            await stack.enter_async_context(connection(self._address))
            host = self._host if self._host is not None else await asyncio.to_thread(own_address, ray)
            self._listener = await stack.enter_async_context(Listener(Tcp(host, self._port, self._insecure)))
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            for stray in await self.owned_by(self._run):  # a dead owner's, from an earlier life of the run
                await self.destroy(stray)
            accounts = self._tasks.create_task(self._keep_accounts(), name="ray-cpu")
            stack.callback(accounts.cancel)
            stack.push_async_callback(self._destroy_all)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def create(self) -> LinkedSandbox:
        """See `Backend.create`."""
        _, listener = self._need_entered()
        self._count += 1
        name = SandboxId(f"{self.environment}-ray-{self._life}-{self._count}")
        placing = asyncio.create_task(asyncio.to_thread(self._place, name), name=f"place-{name}")
        token = ""
        try:
            placed = await asyncio.shield(placing)
            prepared = await self._prepared(placed)
            token = prepared.token
            arrived = listener.expect(token, lambda hello: self._linked(name, hello))
            await self._launch(placed, prepared, listener)
            return await self._arrival(placed, prepared, arrived)
        except BaseException:  # cancellation included: what was started is ended
            listener.forget(token)
            await asyncio.shield(self._undo(placing, name))
            raise

    def _place(self, name: SandboxId) -> _Placed:
        """Ask for an actor: blocks on the cluster's store of names."""
        ray, _ = self._need_entered()
        actor = ray.remote(SandboxHost).options(**self._options.actor(f"{self._run}/{name}"))
        placed = self._placed[name] = _Placed(name, actor.remote(self.environment, name))
        return placed

    async def _undo(self, placing: asyncio.Task[_Placed], name: SandboxId) -> None:
        await asyncio.wait({placing})
        await self.destroy(name)

    async def destroy(self, sandbox: SandboxId) -> None:
        """See `Backend.destroy`."""
        ray, _ = self._need_entered()
        if sandbox.startswith(_STRAY):
            await asyncio.to_thread(_kill_named, ray, sandbox.removeprefix(_STRAY))
            return
        placed = self._placed.get(sandbox)
        if placed is None:
            return
        if placed.sandbox is not None:
            placed.sandbox.condemn(Failure(FailureKind.SANDBOX_LOST, "call", "the sandbox was destroyed"))
        if placed.watcher is not None:
            placed.watcher.cancel()
        try:
            async with asyncio.timeout(STOP_S):
                placed.cpu = await placed.actor.stop.remote()
        except (TimeoutError, ray.exceptions.RayError):
            pass  # hung, or dead already: its server goes with it
        await asyncio.to_thread(ray.kill, placed.actor, no_restart=True)
        if self._placed.pop(sandbox, None) is not None:
            self._dead_cpu += placed.cpu

    async def owned_by(self, run: RunId) -> Sequence[SandboxId]:
        """See `Backend.owned_by`: actors by their names, whoever made them."""
        ray, _ = self._need_entered()
        prefix = f"{run}/"
        names = await asyncio.to_thread(actors_of, ray, prefix)
        ours = {f"{prefix}{name}": name for name in self._placed}
        return [ours.get(name, SandboxId(f"{_STRAY}{name}")) for name in names]

    def cpu_seconds(self) -> float:
        """See `Backend.cpu_seconds`: what the nodes said last, a few seconds ago."""
        return self._dead_cpu + sum(placed.cpu for placed in self._placed.values())

    async def _prepared(self, placed: _Placed) -> Prepared:
        """Wait for a node, and for the environment to be there."""
        ray, _ = self._need_entered()
        what, limit_s = "no node took the sandbox", START_S
        try:
            async with asyncio.timeout(START_S):
                await placed.actor.ready.remote()
            what, limit_s = f"the node did not prepare {self.environment}", INSTALL_S
            async with asyncio.timeout(INSTALL_S):
                prepared: Prepared = await placed.actor.prepare.remote()
        except ray.exceptions.RayError as error:
            raise self._refused(f"the actor could not be started: {told(error)}") from None
        except TimeoutError:
            wanted = await asyncio.to_thread(self._options.wanted, ray)
            raise self._refused(f"{what} within {limit_s:g} s: {wanted}") from None
        if prepared.failure is not None:
            raise self._refused(f"on the node: {prepared.failure}")
        return prepared

    async def _launch(self, placed: _Placed, prepared: Prepared, listener: Listener) -> None:
        ray, _ = self._need_entered()
        launch = Launch(
            listener.url, listener.certificate, self._run, self._with_solutions, self._max_body, self._memory_mb
        )
        try:
            async with asyncio.timeout(START_S):
                await placed.actor.launch.remote(prepared.incarnation, launch)
        except ray.exceptions.RayError as error:
            raise self._refused(f"the server could not be started on its node: {told(error)}") from None
        except TimeoutError:
            raise self._refused(f"the actor did not answer within {START_S:g} s") from None

    async def _arrival(
        self, placed: _Placed, prepared: Prepared, arrived: asyncio.Future[LinkedSandbox]
    ) -> LinkedSandbox:
        """Wait for the hello, the server's end, or the deadline."""
        assert self._tasks is not None, "an entered backend has tasks"
        exited = self._tasks.create_task(self._end_of(placed), name=f"exit-{placed.id}")
        try:
            async with asyncio.timeout(START_S):
                await asyncio.wait(_either(exited, arrived), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            exited.cancel()
            where = self._listener.url if self._listener else ""
            raise self._refused(f"the server did not reach {where} from its node within {START_S:g} s") from None
        except BaseException:
            exited.cancel()
            raise
        if not arrived.done():
            raise self._refused(f"{exited.result().message} while starting: {await self._said(placed)}")
        sandbox = arrived.result()
        if (sandbox.info.name, sandbox.info.digest) != (self.environment, prepared.digest):
            exited.cancel()
            raise SandboxError(Failure(FailureKind.PROTOCOL, "start", "the server serves another environment"))
        placed.sandbox = sandbox
        placed.watcher = self._tasks.create_task(self._watch(sandbox, exited), name=f"watch-{placed.id}")
        return sandbox

    async def _watch(self, sandbox: LinkedSandbox, exited: asyncio.Task[Failure]) -> None:
        """Condemn the sandbox when its server, its actor, its node or its connection ends."""
        try:
            await asyncio.wait(_either(exited, sandbox.ended), return_when=asyncio.FIRST_COMPLETED)
            if not exited.done() and sandbox.ended.result().kind != FailureKind.PROTOCOL:
                await asyncio.wait({exited}, timeout=1.0)  # a death closes the connection first; its status says more
            sandbox.condemn(exited.result() if exited.done() else sandbox.ended.result())
        finally:
            exited.cancel()

    async def _end_of(self, placed: _Placed) -> Failure:
        """Why the server has ended, once it has."""
        ray, _ = self._need_entered()
        try:
            return death(await placed.actor.ended.remote())
        except ray.exceptions.RayError as error:
            return Failure(FailureKind.SANDBOX_LOST, "call", f"its actor or its node ended: {told(error)}")

    async def _said(self, placed: _Placed) -> str:
        ray, _ = self._need_entered()
        try:
            async with asyncio.timeout(STOP_S):
                said: str = await placed.actor.said.remote()
        except (TimeoutError, ray.exceptions.RayError):
            return "its node does not say more"
        return said or "it wrote nothing"

    async def _keep_accounts(self) -> None:
        ray, _ = self._need_entered()
        while True:
            await asyncio.sleep(CPU_S)
            for placed in list(self._placed.values()):
                try:
                    async with asyncio.timeout(CPU_S):
                        placed.cpu = await placed.actor.cpu_seconds.remote()
                except (TimeoutError, ray.exceptions.RayError):
                    continue

    async def _destroy_all(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for name in list(self._placed):
                tasks.create_task(self.destroy(name), name=f"destroy-{name}")

    def _linked(self, name: SandboxId, hello: Hello) -> LinkedSandbox:
        return LinkedSandbox(name, hello, limit_s=self._limit_s, max_body=self._max_body)

    def _refused(self, message: str) -> SandboxError:
        return SandboxError(Failure(FailureKind.SANDBOX_START, "start", message))

    def _need_entered(self) -> tuple[ModuleType, Listener]:
        if self._ray is None or self._listener is None:
            raise UsageError("enter the backend first: `async with RayBackend(...)`")
        return self._ray, self._listener


def _kill_named(ray: ModuleType, name: str) -> None:
    try:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
    except ValueError:
        pass  # gone already


def _either(*futures: asyncio.Future[Any]) -> set[asyncio.Future[Any]]:
    """Futures of different results as one set, which `asyncio.wait` leaves alone when it is cancelled."""
    return set(futures)
