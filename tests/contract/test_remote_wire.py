"""What the remote backend makes of a server's hello; the conformance kit over the wire is run against our service."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from backends.sandboxes.remote import RemoteBackend
from backends.server.wire import PROTOCOL, Hello
from orchestrator.errors import SandboxError
from orchestrator.types import RunId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TOKEN = "the token"
HELLO = Hello(
    protocol=PROTOCOL,
    token="",
    environment="toy",
    digest="0" * 16,
    isolation="shared",
    deterministic=True,
    runs_code=False,
    max_turns=8,
    pid=1,
)


@asynccontextmanager
async def saying(hello: Hello) -> AsyncIterator[str]:
    async def wire(request: web.Request) -> web.WebSocketResponse:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise web.HTTPUnauthorized
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(orjson.dumps(hello._asdict()).decode())
        await socket.receive()
        return socket

    application = web.Application()
    application.router.add_get("/wire", wire)
    async with TestServer(application) as server:
        yield str(server.make_url("")).rstrip("/")


@pytest.mark.parametrize(
    ("hello", "token", "says"),
    [
        (HELLO._replace(environment="bfcl"), TOKEN, "serves bfcl, not toy"),
        (HELLO._replace(protocol=PROTOCOL + 1), TOKEN, "install the same one"),
        (HELLO, "another", "401"),
    ],
)
async def test_a_server_that_is_another_is_refused(hello: Hello, token: str, says: str) -> None:
    async with saying(hello) as url:
        backend = RemoteBackend(url, environment="toy", token=token)
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=30.0)
        async with backend:
            with pytest.raises(SandboxError, match=says):
                await backend.create()


async def test_a_server_that_is_the_one_is_a_sandbox() -> None:
    async with saying(HELLO) as url:
        backend = RemoteBackend(url, environment="toy", token=TOKEN)
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=30.0)
        async with backend:
            sandbox = await backend.create()
            assert (sandbox.info.name, sandbox.info.max_turns) == ("toy", 8)
            assert list(await backend.owned_by(RunId("r"))) == [sandbox.id]
