"""Faults from outside, at random and repeatable: signals to sandboxes, and kills of a whole orchestrator.

The seed decides which process is hit, how and after how long; what is running at that moment is the machine's affair.
Linux alone (processes are found in /proc). `SandboxKiller` is for a run in this process, `killed` for one in a child.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from orchestrator.testing.leaks import servers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

_LOOK_S: Final = 0.02


class Hit(NamedTuple):
    """A signal that was sent: to which sandbox server, which signal."""

    pid: int
    signal: signal.Signals


class SandboxKiller:
    """Sends signals to random sandboxes of this process for as long as it is entered. An async context manager.

    `every_s` is the mean pause between two signals (exponential, so that they also come in bursts); `signals` are drawn
    evenly; `hits` is what was sent. At most `most` signals are sent.
    """

    def __init__(
        self,
        *,
        seed: int,
        every_s: float,
        signals: Sequence[signal.Signals] = (signal.SIGKILL, signal.SIGSTOP),
        most: int = 1_000_000,
    ) -> None:
        self.hits: list[Hit] = []
        self._random = random.Random(seed)
        self._every_s = every_s
        self._signals = tuple(signals)
        self._most = most
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._strike(), name="sandbox-killer")
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def __repr__(self) -> str:
        return f"<SandboxKiller hits={len(self.hits)}>"

    async def _strike(self) -> None:
        while len(self.hits) < self._most:
            await asyncio.sleep(self._random.expovariate(1 / self._every_s))
            alive = [server.pid for server in await asyncio.to_thread(servers) if server.state != "T"]
            if alive:
                self._send(self._random.choice(sorted(alive)), self._random.choice(self._signals))

    def _send(self, pid: int, number: signal.Signals) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return  # it ended by itself
        self.hits.append(Hit(pid, number))


async def killed(
    command: Sequence[str],
    *,
    after_s: float,
    log: Path,
    begun: Callable[[], Awaitable[bool]] | None = None,
    number: signal.Signals = signal.SIGKILL,
) -> int:
    """Run a command, send it a signal after `after_s` seconds unless it ends before, and wait for its end.

    The seconds count from the start, or from when `begun` first holds. The command's output is appended to `log`.
    Returns its exit code, negative for the signal it died of. Cancelled: the command is killed and waited for.
    """
    output = await asyncio.to_thread(log.open, "ab")
    with output:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output
        )
    ending = asyncio.create_task(process.wait(), name="end-of-command")
    try:
        while begun is not None and not ending.done() and not await begun():
            await asyncio.wait({ending}, timeout=_LOOK_S)
        await asyncio.wait({ending}, timeout=after_s)
        if not ending.done():
            process.send_signal(number)
        return await asyncio.shield(ending)
    finally:
        if process.returncode is None:
            process.kill()
        await asyncio.wait({ending})
