"""What a client of the wire has been answered and has not read yet, and the frames that carry it.

Owns the replies between an answered call and the socket. Always true: a frame holds at most MAX_CALLS replies and, but
for a single large one, FLUSH_BYTES of bodies; while more than MAX_UNSENT bytes wait, `full` says that no call should
begin; a client that takes no frame for SEND_S seconds is cut off.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import orjson

from backends.server.wire import MAX_CALLS, MAX_FRAME, Status, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

FLUSH_BYTES: Final = MAX_FRAME // 2
"""Bodies of one frame together; its header fits into the rest."""
MAX_UNSENT: Final = 2 * MAX_FRAME
"""Bytes of replies that may wait to be sent before nothing more is begun."""
SEND_S: Final = 120.0
"""A client that takes no frame for this long has gone."""


class Replies:
    """See the module's docstring. `hang_up` ends the connection at once; `eased` is told when some have been sent."""

    def __init__(
        self, socket: web.WebSocketResponse, *, hang_up: Callable[[], None], eased: Callable[[], None]
    ) -> None:
        self._socket = socket
        self._hang_up = hang_up
        self._told = eased
        self._header: list[tuple[int, int, float, bool, int]] = []
        self._bodies: list[bytes] = []
        self.unsent = 0
        """Bytes of bodies that the client has not been sent."""
        self._added = asyncio.Event()
        self._eased = asyncio.Event()

    @property
    def full(self) -> bool:
        """Whether the client has more to read than it should be given."""
        return self.unsent > MAX_UNSENT

    async def room(self) -> None:
        """Until it is not full."""
        while self.full:
            self._eased.clear()
            await self._eased.wait()

    def add(self, call: int, status: int, reward: float, done: bool, body: bytes) -> None:
        """One more; sent with what else comes in this turn of the loop."""
        self._header.append((call, status, reward, done, len(body)))
        self._bodies.append(body)
        self.unsent += len(body)
        self._added.set()

    def error(self, call: int, code: str, message: str, *, retryable: bool = False) -> None:
        """The answer to a call that failed."""
        body = orjson.dumps({"code": code, "message": message, "retryable": retryable})
        self.add(call, Status.ERROR, 0.0, False, body)

    async def send(self) -> None:
        """Send them as they come, until cancelled or the client has gone."""
        try:
            while True:
                await self._added.wait()
                self._added.clear()
                while self._header:
                    async with asyncio.timeout(SEND_S):
                        await self._send_frame()
                    self._eased.set()
                    self._told()
        except ConnectionError:
            pass  # the reader sees the same end
        except TimeoutError:
            self._hang_up()

    async def _send_frame(self) -> None:
        count = _fitting(self._bodies)
        bodies = self._bodies[:count]
        frame = encode(self._header[:count], bodies)
        del self._header[:count], self._bodies[:count]
        await self._socket.send_bytes(frame)
        self.unsent -= sum(map(len, bodies))


def _fitting(bodies: list[bytes]) -> int:
    """How many of the bodies one frame takes: at least one."""
    size = 0
    for count, body in enumerate(bodies[:MAX_CALLS], 1):
        size += len(body)
        if size >= FLUSH_BYTES:
            return max(count - 1, 1)
    return min(len(bodies), MAX_CALLS)
