"""The remote backend over the wire against the conformance kit; the server answers with the toy environment."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from backends.environments.toy.inside import environment
from backends.sandboxes.remote import RemoteBackend
from backends.server.__main__ import _Connection, _hello
from orchestrator.errors import SandboxError
from orchestrator.testing import BACKEND_CHECKS, run_check
from orchestrator.types import RunId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TOKEN = "the token"


async def wire(request: web.Request) -> web.WebSocketResponse:
    if request.headers.get("Authorization") != f"Bearer {TOKEN}":
        raise web.HTTPUnauthorized
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    served, config = environment(), {"token": "", "digest": "0" * 16}
    await socket.send_str(orjson.dumps(_hello(served, config)._asdict()).decode())
    await _Connection(served, socket, config, solutions=False).run()  # type: ignore[arg-type]  # used alike
    return socket


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_get("/wire", wire)
    async with TestServer(application) as server:
        yield str(server.make_url("")).rstrip("/")


@pytest.mark.parametrize("name", BACKEND_CHECKS)
async def test_the_contract_over_the_wire(name: str) -> None:
    async with serving() as url:
        await run_check(BACKEND_CHECKS[name], lambda: RemoteBackend(url, environment="toy", token=TOKEN))


@pytest.mark.parametrize(("environment", "token", "says"), [("bfcl", TOKEN, "serves toy"), ("toy", "x", "401")])
async def test_a_server_that_is_another_is_refused(environment: str, token: str, says: str) -> None:
    async with serving() as url:
        backend = RemoteBackend(url, environment=environment, token=token)
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=30.0)
        async with backend:
            with pytest.raises(SandboxError, match=says):
                await backend.create()
