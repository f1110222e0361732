"""Runs in the outpost's container, on the machine of a Docker daemon elsewhere: the way from sandboxes to their owner.

Standard input brings, as its first line, a JSON object: `host`, `port` and `certificate` (PEM; null without TLS) of the
orchestrator's listener, and `lease_s`; then lines: `open NAME` makes a folder with a socket that a sandbox's container
mounts, `shut NAME` removes both, `reach` tries the listener, `alive` renews the lease. Each is answered: `done LINE` or
`failed LINE: WHY`. What connects to a socket is connected to the listener, whose certificate alone is trusted. The
input's end, or none within the lease, ends all. Standard library alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import ssl
import sys
from typing import Any, Final

FOLDER: Final = "/run/rollout-outpost"
SOCKET: Final = "orchestrator"
"""The socket's name in its folder."""
DIAL_S: Final = 10.0
"""What does not let anyone in by then is a firewall."""
_CHUNK: Final = 64 * 1024
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))
"""A silent machine has gone after four seconds, as on the other side."""


class Doors:
    """The sockets of sandboxes that have not dialled in yet; connections outlive their door."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._host, self._port = str(config["host"]), int(config["port"])
        self._tls: ssl.SSLContext | None = None
        if (certificate := config["certificate"]) is not None:
            self._tls = ssl.create_default_context(cadata=certificate)
            self._tls.check_hostname = False  # this one certificate is trusted, whatever the address
        self._open: dict[str, asyncio.Server] = {}

    async def obey(self, line: str) -> None:
        """Do what a line says. Raises OSError, ValueError."""
        match line.split():
            case ["open", name]:
                folder = os.path.join(FOLDER, name)
                os.mkdir(folder)
                os.chmod(folder, 0o711)
                path = os.path.join(folder, SOCKET)
                self._open[name] = await asyncio.start_unix_server(self._converse, path=path, backlog=1024)
                os.chmod(path, 0o666)
            case ["shut", name]:
                if (server := self._open.pop(name, None)) is not None:
                    server.close()
                    shutil.rmtree(os.path.join(FOLDER, name))
            case ["reach"]:
                _, writer = await self._dial()
                writer.close()
            case ["alive"]:
                pass
            case _:
                raise ValueError(f"what is {line!r}?")

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            outer_reader, outer_writer = await self._dial()
        except OSError:  # whoever connected learns it by the end
            writer.close()
            return
        try:
            pumps = {
                asyncio.create_task(_pump(reader, outer_writer), name="out"),
                asyncio.create_task(_pump(outer_reader, writer), name="in"),
            }
            _, slow = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in slow:
                pump.cancel()
        finally:
            outer_writer.close()
            writer.close()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The listener. Raises OSError."""
        try:
            async with asyncio.timeout(DIAL_S):
                reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        except TimeoutError:
            raise OSError(f"no answer within {DIAL_S:g} s") from None
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        return reader, writer


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one side has ended; then the other one's connection ends too."""
    try:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
    except OSError:
        return


async def main() -> None:
    """Obey the owner for as long as it lives."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    config = json.loads(await lines.readline())
    doors = Doors(config)
    while True:
        try:
            async with asyncio.timeout(config["lease_s"]):
                line = (await lines.readline()).decode()
        except TimeoutError:
            raise SystemExit(f"the owner has not been heard of for {config['lease_s']} s") from None
        if not line:
            return
        line = line.strip()
        try:
            await doors.obey(line)
        except OSError as error:
            said = f"failed {line}: {str(error).replace(chr(10), ' ')}"
        else:
            said = f"done {line}"
        sys.stdout.write(f"{said}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
