"""A service in this process for tests, and a client that speaks to it in plain requests."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from backends.sandboxes.local import LocalBackend
from orchestrator.service import Service, ServiceLimits
from orchestrator.types import RunId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


def say(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


@asynccontextmanager
async def serving(*environments: str, **options: Any) -> AsyncIterator[Service]:
    backends = {name: partial(LocalBackend, name) for name in environments or ("toy",)}
    limits = options.pop("limits", ServiceLimits(step_s=5.0, wait_s=10.0))
    async with Service(backends, port=0, limits=limits, **options) as service:
        yield service


class Client:
    """Posts to a service; `post` gives the status and the body."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http = http
        self.url = url

    async def post(self, route: str, **body: Any) -> tuple[int, Any]:
        async with self.http.post(f"{self.url}/{route}", data=orjson.dumps(body)) as response:
            return response.status, orjson.loads(await response.read())

    async def done(self, route: str, **body: Any) -> Any:
        status, answer = await self.post(route, **body)
        assert status == 200, (route, status, answer)
        return answer["data"]


@asynccontextmanager
async def client(service: Service, token: str | None = None) -> AsyncIterator[Client]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as http:
        yield Client(http, service.url)


async def solutions(environment: str, tasks: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The known solutions of tasks, as messages."""
    backend = LocalBackend(environment)
    backend.configure(run=RunId("solutions"), with_solutions=True, logs=None, call_limit_s=30.0)
    async with backend:
        sandbox = await backend.create()
        return {task: [orjson.loads(action) for action in await sandbox.solution(task)] for task in tasks}
