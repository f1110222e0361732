"""Where sandboxes dial in: a unix socket in a private directory, or a TCP port with TLS; one token a sandbox.

Owns the socket and the backend's private directory. The socket (0666) lies in a folder (0711) inside a 0700 directory,
so that any uid in a container that mounts the folder can connect, and nobody else can reach it. A sandbox that runs
what it must not trust gets a door of its own, shut as soon as it has come in. Sandboxes on other machines dial a port
whose certificate is made for this listener and told to them alone. A connection whose hello does not carry
an expected token, or not in time, is closed; so is one to that port that does not ask to come in. Used by backends as
an async context manager; nothing is left behind at exit.
"""

from __future__ import annotations

import asyncio
import hmac
import shutil
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, Self, TypeVar

import aiohttp
import orjson
from aiohttp import web

from backends.sandboxes.private import private_directory
from backends.sandboxes.tls import make
from backends.server.wire import MAX_FRAME, PROTOCOL, Hello
from orchestrator.errors import SandboxError, UsageError
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Callable

HELLO_S: Final = 10.0
"""A connection must say hello within this many seconds."""
SOCKET: Final = "orchestrator"
"""The socket's name in its folder."""
_HELLO_CAP: Final = 4096
_KEEPALIVE: Final = tuple(
    (getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 4000))
    if hasattr(socket, name)
)
"""Seconds, seconds, probes, milliseconds: a silent machine has gone after four seconds."""


class _Expected:
    """A sandbox that has been started and has not dialled in yet."""

    __slots__ = ("arrived", "make")

    def __init__(self, make: Callable[[Hello], Any]) -> None:
        self.make = make
        self.arrived: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class Door:
    """A socket in a folder of its own. Connections that have come through it stay when it is shut."""

    __slots__ = ("_site", "folder", "socket")

    def __init__(self, site: web.UnixSite, folder: Path) -> None:
        self._site = site
        self.folder = folder
        self.socket = folder / SOCKET

    async def open(self) -> None:
        """Begin to listen: whoever can reach the folder can connect. Not to be cancelled half-way."""
        self.folder.mkdir()
        self.folder.chmod(0o711)
        await self._site.start()
        self.socket.chmod(0o666)

    async def shut(self) -> None:
        """Accept nobody more, and remove the folder. Idempotent."""
        if self.folder.exists():
            await self._site.stop()
            shutil.rmtree(self.folder, ignore_errors=True)


class Tcp(NamedTuple):
    """A port to listen on beside the unix socket. `host` is the address that other machines reach; port 0 is any."""

    host: str
    port: int = 0
    insecure: bool = False
    """Without TLS: whoever can read the network reads the steps, and the tokens."""
    max_frame: int = MAX_FRAME
    """Cap of one message in bytes."""


class Arrival(Protocol):
    """What a connection becomes once its hello is believed."""

    ended: asyncio.Future[Failure]
    """Done when the connection has ended, with what the connection knows."""

    async def run(self, socket: web.WebSocketResponse) -> Failure:
        """Use the connection until it ends; returns why."""
        ...


A = TypeVar("A", bound=Arrival)


class Listener:
    """Accepts the sandboxes of one backend; with `tcp`, those of other machines too."""

    def __init__(self, tcp: Tcp | None = None) -> None:
        self._tcp = tcp
        self._max_frame = MAX_FRAME if tcp is None else tcp.max_frame
        self.url = ""
        """Where sandboxes of other machines dial in; "" without `tcp`."""
        self.certificate: str | None = None
        """What they trust, in PEM; None where it is insecure."""
        self._expected: dict[str, _Expected] = {}
        self._stack = AsyncExitStack()
        self.private = Path()
        """A 0700 directory for the backend's own temporary files; goes with the listener."""
        self.socket = Path()
        """Where the sandboxes dial in that have no door of their own."""
        self._runner: web.AppRunner | None = None
        self._asked: set[web.RequestHandler] = set()
        """The connections of those who have asked to come in: what they do next has its own deadline."""
        self._doors = 0

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self.private = stack.enter_context(private_directory())
            application = web.Application()
            application.router.add_get("/", self._accept)
            runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1.0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            self._runner = runner
            door = self.door()
            opening = asyncio.create_task(door.open(), name="open-listener")
            stack.push_async_callback(asyncio.wait, {opening})
            await asyncio.shield(opening)
            self.socket = door.socket
            if self._tcp is not None:
                await self._listen(runner, self._tcp)
                sweeping = asyncio.create_task(self._sweep(runner), name="sweep-listener")
                stack.push_async_callback(_end, sweeping)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for expected in self._expected.values():
            expected.arrived.cancel()
        await self._stack.aclose()

    async def _listen(self, runner: web.AppRunner, tcp: Tcp) -> None:
        context = None
        if not tcp.insecure:
            self.certificate, context = await asyncio.to_thread(make, self.private)
        site = web.TCPSite(runner, tcp.host, tcp.port, ssl_context=context, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            raise UsageError(f"cannot listen on {tcp.host}:{tcp.port} for sandboxes: {error.strerror}") from None
        address = next(address for address in runner.addresses if not isinstance(address, str))
        host = f"[{tcp.host}]" if ":" in tcp.host else tcp.host
        self.url = f"{'http' if tcp.insecure else 'https'}://{host}:{address[1]}/"

    def door(self) -> Door:
        """One more socket, in a folder of its own that a container can mount; not open yet."""
        if self._runner is None:
            raise UsageError("enter the listener first: `async with Listener()`")
        self._doors += 1
        folder = self.private / f"s{self._doors}"
        return Door(web.UnixSite(self._runner, str(folder / SOCKET), backlog=1024), folder)

    def expect(self, token: str, make: Callable[[Hello], A]) -> asyncio.Future[A]:
        """What will dial in with `token`, made by `make`. Cancel or `forget` when it never comes."""
        expected = self._expected[token] = _Expected(make)
        return expected.arrived

    def forget(self, token: str) -> None:
        """Stop expecting a sandbox. Idempotent."""
        if (expected := self._expected.pop(token, None)) is not None:
            expected.arrived.cancel()

    async def _sweep(self, runner: web.AppRunner) -> None:
        """Anybody on the network can connect, and would hold a descriptor of this process for as long as they like."""
        before: set[object] = set()
        while runner.server is not None:
            await asyncio.sleep(HELLO_S)
            silent = set(runner.server.connections) - self._asked
            for connection in silent & before:
                connection.force_close()
            before = set(silent)

    async def _accept(self, request: web.Request) -> web.WebSocketResponse:
        self._asked.add(request.protocol)
        try:
            return await self._converse(request)
        finally:
            self._asked.discard(request.protocol)

    async def _converse(self, request: web.Request) -> web.WebSocketResponse:
        wire = web.WebSocketResponse(max_msg_size=self._max_frame, compress=False, timeout=2.0)
        try:
            await wire.prepare(request)
        except ConnectionError:
            return wire  # the peer died while it dialled in
        _watch_network(request)
        sandbox = await self._greet(wire)
        if sandbox is None:
            await wire.close(code=aiohttp.WSCloseCode.POLICY_VIOLATION, message=b"unknown sandbox")
            return wire
        failure = Failure(FailureKind.SANDBOX_LOST, "call", "the orchestrator closed the connection")
        try:
            failure = await sandbox.run(wire)
        finally:
            if not sandbox.ended.done():
                sandbox.ended.set_result(failure)
        await wire.close()
        return wire

    async def _greet(self, wire: web.WebSocketResponse) -> Arrival | None:
        """Read the hello; the sandbox it belongs to, or None."""
        try:
            text = await wire.receive_str(timeout=HELLO_S)
            hello = read_hello(text)
        except (TimeoutError, TypeError, ValueError, aiohttp.WSMessageTypeError):
            return None
        match = next((token for token in self._expected if hmac.compare_digest(token, hello.token)), None)
        if match is None:
            return None
        expected = self._expected.pop(match)
        if expected.arrived.done():
            return None
        if hello.protocol != PROTOCOL:
            message = f"the sandbox speaks protocol {hello.protocol}, this version {PROTOCOL}: stage it anew"
            expected.arrived.set_exception(SandboxError(Failure(FailureKind.PROTOCOL, "start", message)))
            return None
        made: Arrival = expected.make(hello)
        expected.arrived.set_result(made)
        return made


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def _watch_network(request: web.Request) -> None:
    """Have the kernel find out that the other machine has gone: nothing else would, while no call is under way."""
    transport = request.transport
    connection = None if transport is None else transport.get_extra_info("socket")
    if connection is not None and connection.family in {socket.AF_INET, socket.AF_INET6}:
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def read_hello(text: str) -> Hello:
    """Check a hello's every field. Raises ValueError."""
    if len(text) > _HELLO_CAP:
        raise ValueError("the hello is too long")
    match orjson.loads(text):
        case {
            "protocol": int(),
            "token": str(token),
            "environment": str(),
            "digest": str(),
            "isolation": "shared" | "process",
            "deterministic": bool(),
            "runs_code": bool(),
            "max_turns": int(turns),
            "pid": int(),
            **rest,
        } as fields if not rest and turns > 0 and token.isascii():
            return Hello(**fields)
        case _:
            raise ValueError("the hello is malformed")
