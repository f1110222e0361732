"""A sandbox on a server that offers this project's wire: one WebSocket to its route `/wire`.

Owns the connection and the task that carries it. Always true: the server speaks first, with the hello of a sandbox of
the environment that was asked for; when the connection ends the sandbox is lost, and its sessions go on elsewhere.
Solutions never come over it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

import aiohttp

from backends.sandboxes.link import LinkedSandbox
from backends.sandboxes.listener import HELLO_S, read_hello
from backends.server.wire import MAX_FRAME, PROTOCOL
from orchestrator.errors import SandboxError
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiohttp import web

    from orchestrator.types import SandboxId

    Solutions = Callable[[str], Awaitable[Sequence[bytes]]]

_NOT_OFFERED: Final = frozenset({403, 404, 405, 501})
"""403 is how the servers of other frameworks answer a WebSocket that they have no route for."""


class WiredSandbox(LinkedSandbox):
    """A linked sandbox whose connection was made from this side. `solutions` answers for the server."""

    solutions: Solutions | None = None
    _socket: aiohttp.ClientWebSocketResponse
    _carrier: asyncio.Task[None]

    async def solution(self, task: str) -> Sequence[bytes]:
        """See `Sandbox.solution`."""
        if self.solutions is None:
            return await super().solution(task)
        return await self.solutions(task)

    def carry(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Begin to carry calls over the socket."""
        self._socket = socket
        self._carrier = asyncio.create_task(self._carry(), name=f"wire-{self.id}")
        self.lost.add_done_callback(lambda _: self._carrier.cancel())

    async def _carry(self) -> None:
        try:
            # both ends' sockets have what `run` uses: receiving, sending, how it closed
            self.condemn(await self.run(cast("web.WebSocketResponse", self._socket)))
        finally:
            await self._socket.close()

    async def end(self) -> None:
        """Close the connection; the server closes its sessions. Idempotent."""
        self.condemn(Failure(FailureKind.SANDBOX_LOST, "call", "the sandbox was destroyed"))
        await asyncio.wait({self._carrier})


async def connect(
    http: aiohttp.ClientSession, base_url: str, sandbox: SandboxId, environment: str, *, limit_s: float
) -> WiredSandbox | None:
    """A sandbox over the server's wire; None where it offers none. Raises SandboxError. Cancelled: nothing is open."""
    try:
        socket = await http.ws_connect(
            f"{base_url}/wire", params={"env": environment}, max_msg_size=MAX_FRAME, compress=0
        )
    except aiohttp.WSServerHandshakeError as error:
        if error.status in _NOT_OFFERED:
            return None
        raise _refused(
            f"{base_url}/wire answered {error.status}: {error.message}", retry=error.status in {429, 503}
        ) from None
    except aiohttp.ClientError as error:
        raise _refused(f"{base_url} cannot be reached: {str(error) or type(error).__name__}", retry=True) from None
    try:
        made = await _greeted(socket, sandbox, environment, limit_s)
    except BaseException:
        await socket.close()
        raise
    made.carry(socket)
    return made


async def _greeted(
    socket: aiohttp.ClientWebSocketResponse, sandbox: SandboxId, environment: str, limit_s: float
) -> WiredSandbox:
    try:
        hello = read_hello(await socket.receive_str(timeout=HELLO_S))
    except (TimeoutError, TypeError, ValueError, aiohttp.WSMessageTypeError) as error:
        raise _refused(f"the server said no hello of a sandbox ({error})") from None
    if hello.protocol != PROTOCOL:
        raise _refused(f"the server speaks protocol {hello.protocol}, this version {PROTOCOL}: install the same one")
    if hello.environment != environment:
        raise _refused(f"the server serves {hello.environment}, not {environment}: name it with --env")
    return WiredSandbox(sandbox, hello, limit_s=limit_s)


def _refused(message: str, *, retry: bool = False) -> SandboxError:
    return SandboxError(Failure(FailureKind.SANDBOX_START, "start", message, retry))
