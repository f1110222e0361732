"""Containers as the docker command sees them, and a run's containers struck one after the other."""

from __future__ import annotations

import asyncio
import os
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from backends.sandboxes.docker.owners import OWNER
from bench.strikes import docker
from orchestrator.rundir import Owner

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends.sandboxes.docker.container import Container


def mine(*others: int) -> list[str]:
    """Containers of the project, but for those of living processes other than this one and `others`.

    The daemon is the machine's: somebody else may be at work on it.
    """
    shown = docker("ps", "-a", "--filter", f"label={OWNER}", "--format", f'{{{{.Names}}}}\t{{{{.Label "{OWNER}"}}}}')
    found = []
    for line in shown.splitlines():
        name, owner = line.split("\t")
        boot, pid, start = owner.split(":")
        if int(pid) in {os.getpid(), *others} or not Owner(boot, int(pid), int(start)).alive():
            found.append(name)
    return found


@dataclass
class Faults:
    """Hits random sandboxes of a backend for as long as it is entered: one fault after another.

    `strike(container)` is the fault; it runs in a thread. `hits` counts those that found their mark.
    """

    backend: Any
    strike: Callable[[Container], float]
    times: int
    every_s: float
    seed: int = 0
    hits: list[tuple[str, float]] = field(default_factory=list)
    _task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._go(), name="faults")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.result()

    async def _go(self) -> None:
        rng = random.Random(self.seed)
        while len(self.hits) < self.times:
            await asyncio.sleep(self.every_s)
            alive = {c.id: c for c in self.backend.containers() if c.sandbox is not None and not c.sandbox.lost.done()}
            if alive:
                name = rng.choice(sorted(alive))
                self.hits.append((name, time.monotonic()))
                await asyncio.to_thread(self.strike, alive[name])
