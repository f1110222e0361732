"""Runs in a container of its own, which shares another one's network: brings connections to that one's loopback.

Listens on a unix socket in a mounted folder; each connection becomes one to 127.0.0.1 at the port that is the first
argument. So a service that only knows TCP is reached without any network. Standard library alone: whatever image has a
Python can run it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Final

FOLDER: Final = "/run/rollout"
SOCKET: Final = "service"
"""The socket's name in its folder."""
_CHUNK: Final = 64 * 1024


async def serve(path: str, port: int) -> None:
    """Listen until cancelled. Raises OSError where the socket cannot be made."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:  # it does not listen yet, or no more: whoever connected learns it by the end
            writer.close()
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_pump(reader, inner_writer))
                tasks.create_task(_pump(inner_reader, writer))
        except* OSError:
            pass  # one of both has gone, so the other one's connection ends too
        finally:
            inner_writer.close()
            writer.close()

    server = await asyncio.start_unix_server(converse, path=path)
    os.chmod(path, 0o666)
    async with server:
        await server.serve_forever()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


if __name__ == "__main__":
    asyncio.run(serve(f"{FOLDER}/{SOCKET}", int(sys.argv[1])))
