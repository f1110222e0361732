"""The other end of a shard's connection, played by a test; and what both ends' tests speak of."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from orchestrator.records import header
from orchestrator.shards.messages import Message, decode, encode
from orchestrator.types import EpisodeKey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HEAD = header("toy", "0" * 16)
KEY = EpisodeKey("toy_0", 0, 0)
OTHER = EpisodeKey("toy_1", 0, 0)


class Peer:
    """A connection: what the code under test says is in `told`, what `say` says it hears."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Message] = asyncio.Queue()
        self._said: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def send(self, frame: bytes) -> None:
        for message in decode(frame):
            self.told.put_nowait(message)

    async def frames(self) -> AsyncIterator[bytes]:
        while (frame := await self._said.get()) is not None:
            yield frame

    async def say(self, *messages: Message) -> None:
        """Say it, and let it be heard."""
        self._said.put_nowait(encode(messages))
        for _ in range(5):
            await asyncio.sleep(0)

    def leave(self) -> None:
        self._said.put_nowait(None)
