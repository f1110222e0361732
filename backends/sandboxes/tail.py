"""A pipe that a server and all that it has started hold open: when it ends, nothing of them is left.

A server of isolation `process` has a process below it that outlives it on purpose, to end its sessions' processes.
"""

from __future__ import annotations

import asyncio
import os


class Tail:
    """Give `end` to the server as it starts, then call `given`; wait until it is `gone`, and `close` it."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._ours, self.end = os.pipe()
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watched = False

    def given(self) -> None:
        """The server has its own copy of `end`, or will never have one."""
        os.close(self.end)

    async def gone(self) -> None:
        """Wait until nobody holds it, or it is closed. Any number of callers may wait; cancelled: ask again."""
        if not self._watched:
            self._watched = True
            asyncio.get_running_loop().add_reader(self._ours, self.close)  # nobody writes: it can only end
        await asyncio.shield(self._gone)

    def close(self) -> None:
        """Give this side up. Idempotent."""
        if not self._gone.done():
            asyncio.get_running_loop().remove_reader(self._ours)
            os.close(self._ours)
            self._gone.set_result(None)
