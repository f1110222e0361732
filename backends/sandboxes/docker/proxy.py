"""A container's only way out: a small HTTP proxy of the orchestrator's, on a unix socket that the container mounts.

Owns one socket and its connections. Always true: a connection leads to a destination on the allow-list, at an address
that was judged after it was resolved and is not resolved again; everything else is answered with 403 and why; there are
at most CONNECTIONS at once, each with a deadline for its head and for silence. `CONNECT` carries TLS from end to end;
a plain request (`GET http://...`) carries one exchange. Inside, `backends.server.forward` brings connections here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from backends.sandboxes.docker.egress import Destination, parse

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from backends.sandboxes.docker.egress import AllowList

SOCKET: Final = "egress"
"""The socket's name in its folder."""
CONNECTIONS: Final = 64
LOOKUPS: Final = 2
"""Names that are resolved at once."""
HEAD_BYTES: Final = 16 * 1024
HEAD_S: Final = 10.0
REACH_S: Final = 10.0
"""To resolve a name and to connect to it."""
SILENT_S: Final = 300.0
CLOSE_S: Final = 2.0
_CHUNK: Final = 64 * 1024
_LOGGED: Final = 20
"""Refusals of one container that go into the log."""
_OWN: Final = (b"host", b"proxy-connection", b"proxy-authorization", b"connection", b"keep-alive")
"""Fields that the proxy writes itself or keeps to itself. A host that differs from the URL's (RFC 9112, 3.2.2) would be
another site behind a listed address."""

log = logging.getLogger(__name__)


class _Refused(Exception):
    """What the client is told instead of a connection."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


class Proxy:
    """See the module's docstring. Open it once; close it when the container is let go."""

    def __init__(self, name: str, folder: Path, allowed: AllowList, tasks: asyncio.TaskGroup) -> None:
        self.folder = folder
        self.refused = 0
        self._name = name
        self._allowed = allowed
        self._tasks = tasks
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        # A lookup that hangs cannot be cancelled: a container's hold up each other, and nobody else's threads.
        self._lookups = ThreadPoolExecutor(LOOKUPS, thread_name_prefix=f"egress-{name}")

    async def open(self) -> None:
        """Begin to listen: any uid that the folder is mounted for can connect. Raises OSError."""
        await asyncio.to_thread(_make_folder, self.folder)
        path = self.folder / SOCKET
        self._server = await asyncio.start_unix_server(self._accept, path=str(path), limit=HEAD_BYTES)
        await asyncio.to_thread(path.chmod, 0o666)

    async def close(self) -> None:
        """End every connection and remove the folder. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        connections = set(self._connections)
        for connection in connections:
            connection.cancel()
        if connections:
            await asyncio.wait(connections)
        self._lookups.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = self._tasks.create_task(self._converse(reader, writer), name=f"egress-{self._name}")
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection, whole. Raises nothing."""
        try:
            if len(self._connections) > CONNECTIONS:
                raise _Refused("503 Service Unavailable", f"more than {CONNECTIONS} connections at once")
            await self._serve(reader, writer)
        except _Refused as refusal:
            self._note(refusal)
            body = f"{refusal}\n".encode()
            head = f"HTTP/1.1 {refusal.status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + body)
        except (OSError, EOFError, TimeoutError):
            pass  # one of both is gone, or silent: the other learns it by the end of the connection
        finally:
            await _close(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HEAD_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise _Refused("431 Request Header Fields Too Large", f"the head is over {HEAD_BYTES} bytes") from None
        wanted, first = _read(head)
        out_reader, out_writer = await self._reach(wanted)
        try:
            if first:
                out_writer.write(first)
            else:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await _carry((reader, out_writer), (out_reader, writer))
        finally:
            await _close(out_writer)

    async def _reach(self, wanted: Destination) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to a listed destination, at an address that may be believed."""
        if not self._allowed.names(wanted):
            how = f"name it in the environment's `egress`, or with --hardening egress={wanted}"
            raise _Refused("403 Forbidden", f"{wanted} is not a destination that this sandbox may reach: {how}")
        try:
            async with asyncio.timeout(REACH_S):
                addresses = await asyncio.get_running_loop().run_in_executor(self._lookups, _look_up, wanted)
                believed = [address for address in addresses if self._allowed.believes(address, wanted.port)]
                if not believed:
                    raise _Refused(
                        "403 Forbidden",
                        f"{wanted} is {', '.join(addresses)}, which is not public: to allow that, list the address too",
                    )
                return await _connect(believed, wanted.port)
        except (OSError, TimeoutError) as error:
            raise _Refused("502 Bad Gateway", f"{wanted} cannot be reached: {str(error) or 'no answer'}") from None

    def _note(self, refusal: _Refused) -> None:
        self.refused += 1
        if self.refused <= _LOGGED:
            log.warning("%s: %s", self._name, refusal)


def _look_up(wanted: Destination) -> list[str]:
    """The addresses of a destination, in the resolver's order. Raises OSError."""
    found = socket.getaddrinfo(*wanted, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def _make_folder(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o711)


def _read(head: bytes) -> tuple[Destination, bytes]:
    """Where a request wants to go, and what is sent there first (nothing for CONNECT)."""
    line, *fields = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    try:
        method, target, version = line.decode("ascii").split(" ")
        if method == "CONNECT":
            return parse(target), b""
        parts = urlsplit(target)
        if parts.scheme != "http" or parts.username is not None or parts.hostname is None:
            raise ValueError(f"{target[:200]!r} is not an http URL")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        wanted = parse(f"{host}:{parts.port or 80}")
    except ValueError as error:
        raise _Refused("400 Bad Request", f"not a request for a proxy: {error}") from None
    path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
    kept = [field for field in fields if field.partition(b":")[0].strip().lower() not in _OWN]
    named = host if parts.port is None else f"{host}:{parts.port}"
    own = (f"Host: {named}".encode(), b"Connection: close")
    return wanted, b"\r\n".join([f"{method} {path} {version}".encode(), *own, *kept, b"", b""])


async def _connect(addresses: list[str], port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The first that answers. Raises OSError where none does."""
    for address in addresses[:-1]:
        try:
            return await asyncio.open_connection(address, port)
        except OSError:
            continue
    return await asyncio.open_connection(addresses[-1], port)


async def _carry(*ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
    """Both directions, until each has ended, one breaks, or neither has moved for a while."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(SILENT_S) as deadline, asyncio.TaskGroup() as tasks:
            for reader, writer in ways:
                tasks.create_task(_pump(reader, writer, lambda: deadline.reschedule(loop.time() + SILENT_S)))
    except* OSError:
        pass


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, moved: Callable[[], None]) -> None:
    while data := await reader.read(_CHUNK):
        moved()
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await writer.wait_closed()
