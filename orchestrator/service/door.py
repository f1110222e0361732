"""The listening socket: how many connections there may be, and for how long one may say nothing.

Always true: a connection more than there is room for is answered 503 and closed; one on which no request is under way
is closed after QUIET_S, though its client trickles a header in; what is no HTTP costs no line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from orchestrator.errors import RunFailed, UsageError
from orchestrator.service.refusals import RETRY_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

QUIET_S: Final = 75.0
"""A connection without a request under way is closed after this many seconds."""
_CLOSE_S: Final = 5.0
"""What requests under way get when the service has ended."""
_OWN_FILES: Final = 256
"""File descriptors that sandboxes and the service itself need beside the connections."""
_BODY: Final = orjson.dumps({"detail": "the service has no room for more connections"})
_FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
    + f"Retry-After: {RETRY_S}\r\nContent-Length: {len(_BODY)}\r\n\r\n".encode()
    + _BODY
)


@asynccontextmanager
async def listening(application: web.Application, host: str, port: int, connections: int) -> AsyncIterator[str]:
    """Serve on an address; where, as a URL. Leaving closes it and its connections. Raises UsageError."""
    runner = web.AppRunner(
        application,
        access_log=None,
        logger=_logger(),
        handler_cancellation=True,
        keepalive_timeout=QUIET_S,
        shutdown_timeout=_CLOSE_S,
    )
    await runner.setup()
    try:
        with closing(await _bound(runner, host, port, connections)) as server:
            yield _url(server.sockets[0].getsockname())
    finally:
        await runner.cleanup()


async def _bound(runner: web.AppRunner, host: str, port: int, connections: int) -> asyncio.Server:
    if runner.server is None:
        raise RunFailed("a runner that is set up has no server")
    accept = partial(_accept, runner.server, room(connections))
    try:
        return await asyncio.get_running_loop().create_server(accept, host, port, backlog=1024)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from None


def room(connections: int) -> int:
    """How many of the wanted connections the limit of open files allows."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(min(connections, soft - _OWN_FILES), 1) if soft != resource.RLIM_INFINITY else connections


def _accept(server: web.Server, most: int) -> asyncio.Protocol:
    return server() if len(server.connections) < most else _Full()


class _Full(asyncio.Protocol):
    """A connection that there is no room for."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport), "a connection can be written to"
        transport.write(_FULL)
        transport.close()


def _logger() -> logging.Logger:
    log = logging.getLogger(__name__)
    log.addFilter(_worth_a_line)
    return log


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Whatever is no HTTP has been answered 400; anybody can send as much of it as they like."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _url(address: Any) -> str:
    match address:
        case (str(host), int(port), *_):
            return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        case other:
            raise RunFailed(f"the service listens at {other!r}, which is no address")
