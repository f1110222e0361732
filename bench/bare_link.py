"""The least that can speak to a sandbox server: futures by call number, one frame a turn of the loop.

It connects as every sandbox does (the local backend's processes, its listener, one WebSocket each) and shares the
encoding of frames. It checks nothing, knows no deadlines, sessions or tool sets, and keeps nothing: the floor that the
orchestrator's own connection is measured against.
"""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
import orjson

from backends.sandboxes.link import LinkedSandbox
from backends.sandboxes.local import LocalBackend
from backends.server.wire import Status, encode
from orchestrator.batching import MAX_CALLS
from orchestrator.errors import RunFailed
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from aiohttp import web

    from backends.server.wire import Hello
    from orchestrator.types import SandboxId

_LENGTH = struct.Struct("<I")


class Answered(NamedTuple):
    """A reply as it came."""

    body: bytes
    reward: float
    done: bool


class BareLink(LinkedSandbox):
    """One connection. `call` gives a future for the answer, `post` expects none."""

    def __init__(self, sandbox: SandboxId, hello: Hello, *, limit_s: float) -> None:
        super().__init__(sandbox, hello, limit_s=limit_s)
        self._loop = asyncio.get_running_loop()
        self._wanted = asyncio.Event()
        self._header: list[tuple[int, int, int, int, int]] = []
        self._bodies: list[bytes] = []
        self._waiting: dict[int, asyncio.Future[Answered]] = {}
        self._calls = 0
        self._numbers = 0

    def session(self) -> int:
        """A number for a new session."""
        self._numbers += 1
        return self._numbers

    def call(self, op: int, session: int, seq: int, body: bytes) -> asyncio.Future[Answered]:
        """Ask; the future raises RunFailed where the server refuses or ends."""
        future: asyncio.Future[Answered] = self._loop.create_future()
        self._waiting[self._calls + 1] = future
        self.post(op, session, seq, body)
        return future

    def post(self, op: int, session: int, seq: int, body: bytes = b"") -> None:
        """Say something that is not answered."""
        self._calls += 1
        self._header.append((self._calls, op, session, seq, len(body)))
        self._bodies.append(body)
        if not self._wanted.is_set():
            self._wanted.set()

    def condemn(self, failure: Failure) -> None:
        """See `Sandbox.condemn`."""
        super().condemn(failure)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(RunFailed(f"{self.id} ended in the middle of the bare loop: {failure.message}"))

    async def run(self, socket: web.WebSocketResponse) -> Failure:
        """Carry calls and answers until the connection ends."""
        sender = asyncio.create_task(self._carry(socket), name=f"send-{self.id}")
        try:
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    self._settle(message.data)
        finally:
            sender.cancel()
        return Failure(FailureKind.SANDBOX_LOST, "call", "the connection ended")

    async def _carry(self, socket: web.WebSocketResponse) -> None:
        while True:
            await self._wanted.wait()
            header, bodies = self._header, self._bodies
            self._header, self._bodies = header[MAX_CALLS:], bodies[MAX_CALLS:]
            if not self._header:
                self._wanted.clear()
            await socket.send_bytes(encode(header[:MAX_CALLS], bodies[:MAX_CALLS]))

    def _settle(self, frame: bytes) -> None:
        waiting = self._waiting
        (size,) = _LENGTH.unpack_from(frame)
        start = _LENGTH.size + size
        for number, status, reward, done, length in orjson.loads(frame[_LENGTH.size : start]):
            end = start + length
            if status == Status.OK:
                waiting.pop(number).set_result(Answered(frame[start:end], reward, done))
            elif status == Status.ERROR:
                waiting.pop(number).set_exception(RunFailed(f"the server refused: {frame[start:end]!r}"))
            start = end


class BareBackend(LocalBackend):
    """The local backend, with bare connections."""

    async def create(self) -> BareLink:
        """See `Backend.create`."""
        link = await super().create()
        assert isinstance(link, BareLink)
        return link

    def _linked(self, name: SandboxId, hello: Hello) -> BareLink:
        return BareLink(name, hello, limit_s=self._limit_s)
