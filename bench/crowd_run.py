"""Worker: the shards of a crowd (`bench.crowd`), all in this process. `python -m bench.crowd_run JSON`"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

import aiohttp
import orjson

from backends.sandboxes.ray.shard import SocketChannel
from backends.server.trust import trusted
from backends.server.wire import PROTOCOL, Hello
from bench.workers import serve
from orchestrator.shards import ShardRunner
from orchestrator.shards.messages import MAX_FRAME
from orchestrator.types import Decision, Evaluation, Observation, Outcome, StopReason, Trajectory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.values import Row
    from orchestrator.records import EpisodeBuffer
    from orchestrator.types import EpisodeKey


class Instant:
    """Satisfies `Player`: an episode is over when it begins, and has the bytes of a real one."""

    def __init__(self, steps: int, row_bytes: int) -> None:
        self._steps = steps
        self._filling = os.urandom(max(row_bytes // 2, 1)).hex()

    async def play(self, key: EpisodeKey, attempt: int, buffer: EpisodeBuffer) -> Trajectory:
        """See `Player.play`."""
        now = time.time()
        buffer.observe(Observation(b'{"messages":[]}'))
        buffer.decide(Decision(orjson.dumps({"role": "assistant", "content": self._filling})))
        buffer.observe(Observation(b'{"messages":[]}', 1.0, done=True))
        buffer.grade(Evaluation(1.0))
        data = bytes(buffer.data)
        done = (Outcome.COMPLETED, StopReason.DONE, 1.0, self._steps, data)
        return Trajectory(key, attempt, *done, started=now, finished=now)

    def stored(self, keys: Sequence[EpisodeKey]) -> None:
        """See `Player.stored`: nothing was kept."""

    def cpu_seconds(self) -> float:
        """See `Player.cpu_seconds`."""
        return 0.0

    def own_cpu_seconds(self) -> float:
        """See `Player.own_cpu_seconds`."""
        return 0.0


async def measure(
    *, url: str, certificate: str | None, tokens: list[str], environment: str, steps: int, row_bytes: int
) -> Row:
    """Be all of them until the driver ends them; the CPU that it took, in seconds."""
    player = Instant(steps, row_bytes)
    connector = aiohttp.TCPConnector(ssl=trusted(certificate), limit=0)
    async with aiohttp.ClientSession(connector=connector) as http, asyncio.TaskGroup() as tasks:
        for number, token in enumerate(tokens):
            hello = Hello(PROTOCOL, token, environment, "", "shared", True, False, steps, os.getpid())
            tasks.create_task(_shard(http, url, hello, ShardRunner(player, f"node-{number}", {})), name=f"s{number}")
    return {"cpu_s": time.process_time()}


async def _shard(http: aiohttp.ClientSession, url: str, hello: Hello, runner: ShardRunner) -> None:
    async with http.ws_connect(url, max_msg_size=MAX_FRAME, compress=0) as socket:
        await socket.send_str(orjson.dumps(hello._asdict()).decode())
        await runner.run(SocketChannel(socket))


if __name__ == "__main__":
    serve(measure)
