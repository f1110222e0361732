"""Who of a process's family has used what CPU: the process itself, shards, sandbox servers, and all others (Ray's own).

Reads /proc, whose clock ticks a hundred times a second: compare counts that lie seconds apart. What ended in between
is counted with its parent, once that has waited for it.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Final, NamedTuple

from backends.sandboxes.process import cpu_of
from bench import processes
from orchestrator.errors import RunFailed

REST_S: Final = 60.0
LOOK_S: Final = 0.5
QUIET: Final = 0.2
"""Of a core: what a cluster at rest uses at most."""


class Census(NamedTuple):
    """CPU seconds, user + system, since each process began."""

    driver: float
    shards: float
    sandboxes: float
    others: float

    def since(self, earlier: Census) -> Census:
        """What was used in between."""
        return Census(*(max(now - then, 0.0) for now, then in zip(self, earlier, strict=True)))


def take() -> Census:
    """Count this process and all its descendants."""
    shards = sandboxes = others = 0.0
    for pid in processes.family(os.getpid())[1:]:
        match _kind(processes.command(pid)):
            case "shard":
                shards += cpu_of(pid)
            case "sandbox":
                sandboxes += cpu_of(pid)
            case _:
                others += cpu_of(pid)
    return Census(time.process_time(), shards, sandboxes, others)


async def at_rest() -> Census:
    """The census as soon as a cluster has started all its spare workers, whose start would disturb a measurement.

    Raises RunFailed where it does not come to rest.
    """
    ends, before = time.monotonic() + REST_S, await asyncio.to_thread(take)
    while time.monotonic() < ends:
        await asyncio.sleep(LOOK_S)
        now = await asyncio.to_thread(take)
        if now.since(before).others < QUIET * LOOK_S:
            return now
        before = now
    raise RunFailed(f"the cluster has not come to rest within {REST_S:g} s: try again on a quieter machine")


def _kind(command: str) -> str:
    if command.startswith("ray::ShardHost"):
        return "shard"
    return "sandbox" if "backends.server" in command else "other"
