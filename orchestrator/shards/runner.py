"""A shard's side: plays what the driver launches, and tells it what came of it.

Owns the tasks of its episodes and what waits to be sent. Always true: what the journal held is reported before anything
is taken; a trajectory is kept in the journal until the driver says that it is settled; when the connection ends the
episodes are cancelled, and nothing more is sent.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, Protocol

from orchestrator.errors import RolloutError, RunFailed, StoreError
from orchestrator.playing import Unplayed
from orchestrator.records import EpisodeBuffer
from orchestrator.shards.messages import (
    FRAME,
    End,
    Fatal,
    FrameError,
    Held,
    Launch,
    Message,
    NotPlayed,
    Played,
    Ready,
    Settled,
    Standing,
    Tools,
    decode,
    encode,
    weight,
)
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from orchestrator.playing import Player
    from orchestrator.types import EpisodeKey

STANDING_S: Final = 1.0
"""How often a shard says how it stands; a driver that hears nothing for long believes it dead."""


class Channel(Protocol):
    """A connection that carries frames."""

    async def send(self, frame: bytes) -> None:
        """Raises ConnectionError once the other side has gone."""
        ...

    def frames(self) -> AsyncIterator[bytes]:
        """Until the connection ends."""
        ...


class Outbox:
    """Messages that wait to be sent: what is said in one turn of the loop leaves together."""

    __slots__ = ("_messages", "_ready")

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._ready = asyncio.Event()

    def put(self, message: Message) -> None:
        """Queue one; sent in this order."""
        self._messages.append(message)
        self._ready.set()

    async def carry(self, channel: Channel) -> None:
        """Send until cancelled, or until the other side has gone."""
        try:
            while True:
                await self._ready.wait()
                await asyncio.sleep(0)
                self._ready.clear()
                while self._messages:
                    count = _fitting(self._messages)
                    frame = encode(self._messages[:count])
                    del self._messages[:count]
                    await channel.send(frame)
        except ConnectionError:
            return  # the reader sees the same end


class ShardRunner:
    """See the module's docstring. `held` is what the journal holds: key -> (attempt, buffer)."""

    def __init__(self, player: Player, node: str, held: Mapping[EpisodeKey, tuple[int, bytes]]) -> None:
        self._player = player
        self._node = node
        self._held = held
        self._episodes: dict[EpisodeKey, asyncio.Task[None]] = {}
        self._outbox = Outbox()
        self._tasks: asyncio.TaskGroup | None = None
        self._leaving: str | None = None
        """Why, once it has begun to."""
        self.complete = False
        """Whether the driver has said that the whole run is durable."""

    def tools(self, toolsets: Mapping[str, bytes]) -> None:
        """Tell the driver of tool sets, before any trajectory that names them."""
        for digest, body in toolsets.items():
            self._outbox.put(Tools(digest, body))

    def standing(self, sandboxes: int, sandbox_cpu_s: float) -> None:
        """Tell the driver how the shard stands."""
        self._outbox.put(Standing(sandboxes, sandbox_cpu_s, time.process_time()))

    def fail(self, error: RolloutError) -> None:
        """Tell the driver that this shard cannot go on; only what is this shard's own can be mended by another one."""
        self._outbox.put(Fatal(str(error), hopeless=not isinstance(error, RunFailed | StoreError)))

    async def leave(self, why: str) -> None:
        """Stop, and give back what is under way as it stands: another shard goes on with it, and repeats nothing."""
        self._leaving = why
        for episode in self._episodes.values():
            episode.cancel()
        if self._episodes:
            await asyncio.wait(self._episodes.values())
        self._outbox.put(Fatal(why, hopeless=False))

    async def run(self, channel: Channel) -> None:
        """Serve until the driver ends it or the connection does. Raises FrameError. Cancelled: episodes are too."""
        for key, (attempt, buffer) in self._held.items():
            self._outbox.put(Held(key, attempt, buffer))
        self._outbox.put(Ready(self._node))
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            sender = tasks.create_task(self._outbox.carry(channel), name="shard-sender")
            try:
                await self._obey(channel)
            finally:
                sender.cancel()
                for episode in self._episodes.values():
                    episode.cancel()

    async def _obey(self, channel: Channel) -> None:
        async for frame in channel.frames():
            for message in decode(frame):
                match message:
                    case Launch():
                        self._launch(message)
                    case Settled(keys):
                        self._settle(keys)
                    case End(complete):
                        self.complete = complete
                        return
                    case _:
                        raise FrameError(f"a driver does not say {type(message).__name__}")

    def _launch(self, launch: Launch) -> None:
        assert self._tasks is not None, "only a running shard is told anything"
        self._episodes[launch.key] = self._tasks.create_task(self._play(launch), name=f"episode-{launch.key}")

    async def _play(self, launch: Launch) -> None:
        key, attempt, data = launch
        buffer = EpisodeBuffer.restore(data)
        try:
            if self._leaving is not None:
                raise asyncio.CancelledError
            trajectory = await self._player.play(key, attempt, buffer)
        except Unplayed as unplayed:
            self._outbox.put(NotPlayed(key, attempt, unplayed.failure, bytes(unplayed.buffer.data)))
        except asyncio.CancelledError:
            if self._leaving is not None:
                failure = Failure(FailureKind.SHARD_LOST, "shard", self._leaving, retryable=True)
                self._outbox.put(NotPlayed(key, attempt, failure, bytes(buffer.data)))
            raise
        except RolloutError as error:
            self.fail(error)
        else:
            self._outbox.put(Played(trajectory))
        del self._episodes[key]

    def _settle(self, keys: Sequence[EpisodeKey]) -> None:
        self._player.stored(keys)


def _fitting(messages: Sequence[Message]) -> int:
    """How many of the messages one frame takes: at least one."""
    size = 0
    for count, message in enumerate(messages, 1):
        size += weight(message)
        if size >= FRAME:
            return max(count - 1, 1)
    return len(messages)
