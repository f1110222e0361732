"""The service as a whole: what it is made of, and its life from the first sandbox to the last connection.

Owns its halls, register, listening socket and connections; made ready and ended in one exit stack. Always true: it
listens only once every environment has a sandbox up; told to end, it admits nothing more, lets instances go on for
`drain_s` at most, then releases them and ends its sandboxes; without a token it listens on loopback alone unless it is
said that this is meant.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import defaultdict
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from aiohttp import web

from backends.server.wire import MAX_FRAME
from orchestrator.errors import UsageError
from orchestrator.service.boxes import Boxes
from orchestrator.service.door import listening
from orchestrator.service.env_service import EnvService
from orchestrator.service.hall import Hall
from orchestrator.service.halls import Halls
from orchestrator.service.limits import MAX_REQUEST, ServiceLimits
from orchestrator.service.manager import Manager
from orchestrator.service.openapi import document
from orchestrator.service.refusals import RETRY_S, Refusal, busy
from orchestrator.service.register import Register
from orchestrator.service.routes import Gate, Route, answer, errors
from orchestrator.service.tenants import Admission, Tenants
from orchestrator.service.wire import WireConnection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from orchestrator.protocols import Backend

HEARTBEAT_S: Final = 30.0
"""A client of the wire that does not answer a WebSocket ping for this long has gone."""
_POLL_S: Final = 0.1


class Service:
    """Serves environments over HTTP; `async with Service(...) as service`, then `service.url`.

    `backends` makes a fresh backend for each environment, by its name: the first is what a client means that names
    none. `sandboxes` is how many of each are kept. `tokens` are bearer tokens by the name of who has them. `port` 0 is
    any that is free. `logs` is an existing folder for what sandboxes write to stderr. Entering raises UsageError,
    Unavailable, RunFailed where an environment cannot be had.
    """

    def __init__(
        self,
        backends: Mapping[str, Callable[[], Backend]],
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        sandboxes: int = 2,
        tokens: Mapping[str, str] | None = None,
        limits: ServiceLimits | None = None,
        insecure: bool = False,
        logs: str | None = None,
    ) -> None:
        if not backends:
            raise UsageError("name at least one environment to serve")
        self._tenants = Tenants(tokens or {})
        if self._tenants.open and not insecure and not _is_loopback(host):
            raise UsageError(f"{host} is reached from elsewhere: ask for a token, or say that this is meant (insecure)")
        self.limits = limits or ServiceLimits()
        self._backends = backends
        self._sandboxes = sandboxes
        self._logs = logs
        self._host, self._port = host, port
        self._admission = Admission(self.limits)
        self._register = Register(self._admission, self.limits)
        self._boxes = Boxes(self._register, self.limits)
        self._connections: set[WireConnection] = set()
        self._halls: dict[str, Hall] = {}
        self._stack = AsyncExitStack()
        self.url = ""
        """Where it listens; known once it is entered."""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._open_halls(stack)
            stack.callback(self._register.close)
            await stack.enter_async_context(self._sweeping())
            door = listening(self._application(), self._host, self._port, self.limits.connections)
            self.url = await stack.enter_async_context(door)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._admission.draining = True
        await self._stack.aclose()

    async def drain(self) -> bool:
        """Admit nothing more, and wait until no instance is left, for `drain_s` at most; whether none is."""
        self._admission.draining = True
        try:
            async with asyncio.timeout(self.limits.drain_s):
                while self._admission.statistics().instances:  # noqa: ASYNC110  # it ends in many places
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            return False
        return True

    @property
    def draining(self) -> bool:
        """Whether it has been told to end."""
        return self._admission.draining

    def health(self) -> dict[str, Any]:
        """What `/health` answers: `status` is `healthy` only if it takes instances of every environment."""
        down = [hall.environment for hall in self._halls.values() if not hall.alive]
        status = "draining" if self.draining else f"no sandbox of {', '.join(down)} is up" if down else "healthy"
        instances, calls, refused, record_bytes = self._admission.statistics()
        return {
            "status": status,
            "version": str(list(self._halls)),
            "instances": instances,
            "calls": calls,
            "refused": refused,
            "record_bytes": record_bytes,
            "released_idle": self._register.released_idle,
            "boxes": len(self._boxes),
            "wire_connections": len(self._connections),
            "wire_unsent_bytes": sum(connection.unsent for connection in self._connections),
            "sandboxes": {hall.environment: _counts(hall) for hall in self._halls.values()},
        }

    async def _open_halls(self, stack: AsyncExitStack) -> None:
        for name, make in self._backends.items():
            limits = self.limits
            hall = Hall(make, self._sandboxes, step_s=limits.step_s, wait_s=limits.wait_s, logs=self._logs)
            stack.push_async_callback(hall.down)
            await hall.up()
            self._halls[name] = hall

    @asynccontextmanager
    async def _sweeping(self) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(self._register.sweep(), name="idle-instances")
        try:
            yield
        finally:
            sweeper.cancel()
            await asyncio.wait({sweeper})

    def _application(self) -> web.Application:
        limits = self.limits
        gate = Gate(self._tenants, self._admission, limits)
        halls = Halls(self._halls)
        env_service, manager = (
            EnvService(halls, self._register),
            Manager(halls, self._register, self._boxes, limits.step_s),
        )
        table = [*manager.routes(), *env_service.routes()]
        application = web.Application(middlewares=[errors], client_max_size=MAX_REQUEST)
        for path, routes in _by_path(table).items():
            application.router.add_post(path, gate.handler(routes))
        described = document(table, bearer=not self._tenants.open)

        async def openapi(_: web.Request) -> web.Response:
            return answer(described)

        async def wire(request: web.Request) -> web.StreamResponse:
            return await self._wire(request, gate, halls)

        application.router.add_get("/openapi.json", openapi)
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/health", self._health)
        application.router.add_get("/wire", wire)
        application.on_shutdown.append(self._hang_up)
        return application

    async def _healthz(self, _: web.Request) -> web.Response:
        status = self.health()["status"]
        if status != "healthy":
            raise busy(status)
        return web.Response(text="OK")

    async def _health(self, _: web.Request) -> web.Response:
        health = self.health()
        if health["status"] == "healthy":
            return answer(health)
        return answer(health, 503, retry_after=RETRY_S)

    async def _wire(self, request: web.Request, gate: Gate, halls: Halls) -> web.StreamResponse:
        tenant = gate.tenant(request)
        hall = halls.find(request.query.get("env"))
        if self.draining:
            raise busy("the service is ending")
        socket = web.WebSocketResponse(max_msg_size=MAX_FRAME, heartbeat=HEARTBEAT_S, compress=False)
        if not socket.can_prepare(request):
            raise Refusal(400, "this route is a WebSocket")
        await socket.prepare(request)
        connection = WireConnection(socket, tenant, hall, self._admission, self.limits, hang_up=partial(_cut, request))
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
        return socket

    async def _hang_up(self, _: web.Application) -> None:
        async with asyncio.TaskGroup() as tasks:
            for connection in self._connections:
                tasks.create_task(connection.close(), name="hang-up")


def _cut(request: web.Request) -> None:
    """End a connection without a word: its client does not listen."""
    if request.transport is not None:
        request.transport.abort()


def _by_path(table: Sequence[Route]) -> dict[str, list[Route]]:
    paths: dict[str, list[Route]] = defaultdict(list)
    for route in table:
        for path in route.paths:
            paths[path].append(route)
    return paths


def _counts(hall: Hall) -> dict[str, int]:
    statistics = hall.statistics()
    return statistics._asdict() if statistics is not None else {}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
