"""A server in front of our own service that offers its plain routes alone, and does to requests what a test says."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
from aiohttp import web
from aiohttp.test_utils import TestServer

from backends.sandboxes.local import LocalBackend
from orchestrator.service import Service, ServiceLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from multidict import CIMultiDictProxy


@dataclass(frozen=True)
class Answer:
    """Answered in the service's place, which hears nothing."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)


RESET = "reset"
"""The connection breaks off before the service hears of it."""
RESET_AFTER = "reset after"
"""The service does it, but its answer does not arrive."""
HANG = "hang"
"""Nothing comes back, and the service hears nothing."""

Fault = Answer | str | None


@dataclass
class Plain:
    """What the proxy has seen, and what it does: `fault(route, body)` says it for each request."""

    service: Service
    url: str = ""
    fault: Callable[[str, dict[str, Any]], Fault] = lambda route, body: None
    well: bool = True
    calls: Counter[str] = field(default_factory=Counter)

    def instances(self) -> int:
        return int(self.service.health()["instances"])

    async def handle(self, request: web.Request) -> web.StreamResponse:
        route = request.path.strip("/")
        raw = await request.read()
        self.calls[route] += 1
        fault = (self.fault if route != "healthz" else self.unwell)(route, orjson.loads(raw) if raw else {})
        match fault:
            case Answer():
                return web.json_response({"detail": "as the test says"}, status=fault.status, headers=fault.headers)
            case "hang":
                await asyncio.sleep(3600)
            case "reset":
                return broken(request)
        status, body, headers = await self.forwarded(request.method, route, raw)
        if fault == RESET_AFTER:
            return broken(request)
        kept = {name: value for name, value in headers.items() if name == "Retry-After"}
        return web.Response(status=status, body=body, headers=kept, content_type="application/json")

    def unwell(self, route: str, body: dict[str, Any]) -> Fault:
        return None if self.well else RESET

    async def forwarded(self, method: str, route: str, raw: bytes) -> tuple[int, bytes, CIMultiDictProxy[str]]:
        url = f"{self.service.url}/{route}"
        async with aiohttp.ClientSession() as http, http.request(method, url, data=raw) as response:
            return response.status, await response.read(), response.headers


def broken(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


@asynccontextmanager
async def plain(environment: str = "toy", **limits: float) -> AsyncIterator[Plain]:
    wanted = ServiceLimits(**{"step_s": 60.0, "wait_s": 10.0} | limits)  # type: ignore[arg-type]
    backends = {environment: partial(LocalBackend, environment)}
    async with Service(backends, port=0, sandboxes=1, limits=wanted) as service:
        proxy = Plain(service)
        application = web.Application(client_max_size=1 << 26)
        application.router.add_post("/{route}", proxy.handle)
        application.router.add_get("/healthz", proxy.handle)
        async with TestServer(application) as server:
            proxy.url = str(server.make_url("")).rstrip("/")
            yield proxy
