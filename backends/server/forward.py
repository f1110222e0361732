"""Inside a sandbox without a network: brings connections to a port of loopback to a unix socket, where a proxy listens.

A process of its own, forked before anything is loaded: an environment's step may hold its own process, and must get an
answer through here all the same. It dies with the server. What may be reached is decided at the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
from typing import Final

PORT: Final = 3128
"""What the proxy variables of the sandbox name."""
_CHUNK: Final = 64 * 1024
_PR_SET_PDEATHSIG: Final = 1


def start(path: str) -> None:
    """Listen on loopback and fork what serves it. Raises OSError where the port is taken."""
    listener = socket.create_server(("127.0.0.1", PORT), backlog=128)
    parent = os.getpid()
    if os.fork():
        listener.close()
        return
    _begin(parent)
    asyncio.run(_serve(listener, path))


def _begin(parent: int) -> None:
    """Let go of the server's standard input, and die with the server."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


async def _serve(listener: socket.socket, path: str) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await _converse(reader, writer, path)
        writer.close()

    server = await asyncio.start_server(converse, sock=listener)
    async with server:
        await server.serve_forever()


async def _converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
    out_reader, out_writer = await asyncio.open_unix_connection(path)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_pump(reader, out_writer), name="out")
            tasks.create_task(_pump(out_reader, writer), name="in")
    except* OSError:
        pass
    finally:
        out_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
