"""As many shards as a large cluster has, in one process that plays nothing: what is left is the coordinator's own work.

Satisfies `Shards`. The connections are real, each over TLS with a token of its own, and so are the messages; a shard of
the crowd answers every launch at once with a trajectory of the size that was asked for.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from backends.sandboxes.listener import Listener, Tcp
from backends.sandboxes.ray.shard import SocketChannel
from bench.workers import work
from orchestrator.shards import Crew
from orchestrator.shards.messages import MAX_FRAME

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from aiohttp import web

    from backends.server.wire import Hello
    from orchestrator.events import Listener as Hears
    from orchestrator.protocols import Backend, Policy
    from orchestrator.shards import ShardJob, ShardLink
    from orchestrator.types import Failure

START_S: Final = 60.0


class _Arrival:
    """The driver's end of one of them, as a listener wants it."""

    def __init__(self, link: ShardLink) -> None:
        self.link = link
        self.ended: asyncio.Future[Failure] = link.ended

    async def run(self, socket: web.WebSocketResponse) -> Failure:
        """See `Arrival.run`."""
        return await self.link.run(SocketChannel(socket))


def _arrive(crew: Crew, slot: int, hello: Hello) -> _Arrival:
    return _Arrival(crew.join(slot))


class Crowd:
    """`count` shards; their trajectories have `steps` steps and about `row_bytes` bytes."""

    def __init__(self, count: int, *, steps: int, row_bytes: int) -> None:
        self._count = count
        self._steps = steps
        self._row_bytes = row_bytes

    @asynccontextmanager
    async def opened(self, backend: Backend, policy: Policy) -> AsyncIterator[None]:
        """See `Shards.opened`: there is nothing to be copied."""
        yield

    @asynccontextmanager
    async def crew(
        self, job: ShardJob, absorb: Callable[[Mapping[str, bytes]], None], emit: Hears
    ) -> AsyncIterator[Crew]:
        """See `Shards.crew`. Entered once all of them are there."""
        crew = Crew(self._count, job.settings.header, absorb, journalled=False, emit=emit)
        async with Listener(Tcp("127.0.0.1", max_frame=MAX_FRAME)) as listener, asyncio.TaskGroup() as tasks:
            tokens = [secrets.token_urlsafe(24) for _ in range(self._count)]
            for slot, token in enumerate(tokens):
                listener.expect(token, partial(_arrive, crew, slot))
            playing = tasks.create_task(
                work(
                    "bench.crowd_run",
                    url=listener.url,
                    certificate=listener.certificate,
                    tokens=tokens,
                    environment=job.info.name,
                    steps=self._steps,
                    row_bytes=self._row_bytes,
                ),
                name="crowd",
            )
            await crew.gathered(everyone=True, within_s=START_S)
            try:
                yield crew
            finally:
                crew.end(complete=True)
                await asyncio.wait({playing}, timeout=START_S)
                playing.cancel()
