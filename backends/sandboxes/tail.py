"""A pipe that a server and all that it has started hold open: when it ends, nothing of them is left.

A server of isolation `process` has a process below it that outlives it on purpose, to end its sessions' processes.
"""

from __future__ import annotations

import asyncio
import os


class Tail:
    """Give `end` to the server as it starts, then call `given`; `gone` in the end, or `close`."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._ours, self.end = os.pipe()

    def given(self) -> None:
        """The server has its own copy of `end`, or will never have one."""
        os.close(self.end)

    async def gone(self) -> None:
        """Wait until nobody holds it. Cancelled: ask again later."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._ours, _settle, ended)
        try:
            await ended
        finally:
            loop.remove_reader(self._ours)

    def close(self) -> None:
        """Give this side up."""
        os.close(self._ours)


def _settle(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)
