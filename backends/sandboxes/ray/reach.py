"""Whether anything listens at a cluster's address; else Ray itself tries for long, and ends its process."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Final

from orchestrator.errors import Unavailable

PORT_S: Final = 3.0


async def reachable(address: str) -> None:
    """Raises Unavailable where nothing listens at HOST:PORT; other kinds of address are Ray's to resolve."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        return
    try:
        async with asyncio.timeout(PORT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except socket.gaierror:
        raise Unavailable(f"{host} is no name of a machine here: give the address of the cluster's head") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else f"no answer within {PORT_S:g} s"
        raise Unavailable(
            f"nothing answers at {address} ({why}): is its head up (`ray start --head --port={port}`), "
            "and the port open from here?"
        ) from None
    writer.close()
    try:
        await writer.wait_closed()
    except OSError:
        return  # it was there
