"""The server's end of one child: a stream of questions and answers, and how the child ended.

Always true: one question at a time; a child whose answer is not waited for any more, or makes no sense, is killed, so
that no later answer is taken for it. `buried` is called when the zygote has buried the child, once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import TYPE_CHECKING, Final

from backends.server.environment import EnvironmentFault
from backends.server.pipe import Answer, ask
from backends.server.wire import ErrorCode
from backends.server.zygote import NOT_FORKED

if TYPE_CHECKING:
    from collections.abc import Callable

_NEWS_S: Final = 0.2
"""The end of a stream is seen before the death behind it is told."""


class Tether:
    """The server's end of one child. `ended` is done with its wait status when the zygote has buried it."""

    def __init__(self, number: int, channel: socket.socket, order_end: Callable[[int, float], None]) -> None:
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._number = number
        self._channel = channel
        self._order_end = order_end
        self._asking = False

    async def ask(self, op: int, *parts: bytes, max_body: int) -> Answer:
        """Ask, and wait for the answer. Raises EnvironmentFault (`session_lost`, `busy`), Garbled."""
        if self.ended.done():
            raise _loss(self.ended.result())
        self._asking = True
        try:
            answer = await ask(self._channel, op, *parts, max_body=max_body)
            if answer is None:
                raise await self._cause()
        except BaseException:  # cancellation included: nobody waits for the answer any more
            self.end(0.0)
            raise
        finally:
            self._asking = False
            if self.ended.done():
                self._channel.close()
        return answer

    def end(self, grace_s: float) -> None:
        """End it: at once, or after the time it may take to end by itself. Again is allowed, and sooner."""
        if self.ended.done():
            return
        if grace_s and not self._asking:
            self._channel.shutdown(socket.SHUT_WR)  # the end of its questions
        self._order_end(self._number, 0.0 if self._asking else grace_s)

    def buried(self, status: int) -> None:
        """The zygote has seen its end."""
        self.ended.set_result(status)
        if self._asking:
            self._channel.shutdown(socket.SHUT_RDWR)  # what it had started may hold its end open
        else:
            self._channel.close()

    async def _cause(self) -> EnvironmentFault:
        """What to say of a stream that has ended."""
        await asyncio.wait({self.ended}, timeout=_NEWS_S)
        if self.ended.done():
            return _loss(self.ended.result())
        return EnvironmentFault(ErrorCode.SESSION_LOST, "the session's process closed its stream")


def _loss(status: int) -> EnvironmentFault:
    """What a child's wait status means for its session."""
    if status == NOT_FORKED:
        message = "the session's process could not be forked: too many processes, too little memory, or no disk"
        return EnvironmentFault(ErrorCode.BUSY, message, retryable=True)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        how = "died of SIGKILL: out of memory, or killed from outside"
    elif code < 0:
        how = f"died of {_NAMES.get(-code, f'signal {-code}')}"
    else:
        how = f"exited with code {code}"
    return EnvironmentFault(ErrorCode.SESSION_LOST, f"the session's process {how}")


_NAMES: Final = {int(number): number.name for number in signal.Signals}
"""Real-time signals have none."""
