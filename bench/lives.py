"""The processes of a run that is killed: each life of the command, its end, and what it left behind.

Always true: a life is over before the next begins, and ends with its owner's await; the processes of a life that die
without their parent come to this process (`adopt_orphans`), so that what is left can be counted, and is then ended.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench import processes
from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

LIFE_S: Final = 180.0
"""A life that goes on for longer counts as hung."""
GRACE_S: Final = 2.0
"""What a dead orchestrator's processes get to end by themselves."""
_COMMAND: Final = ("-P", "-c", "from orchestrator.cli.main import main; main()")
_POLL_S: Final = 0.02
_TAIL: Final = 2000


@dataclass(slots=True)
class Ward:
    """Where the lives of one benchmark leave traces. `temporary` is the folder that they use as the system's."""

    temporary: Path
    log: Path
    left: list[str] = field(default_factory=list)
    """Commands of processes that outlived their orchestrator."""

    @asynccontextmanager
    async def life(self, arguments: Sequence[str], output: Path | None = None) -> AsyncIterator[Life]:
        """Start `rollout ARGUMENTS`; what it prints goes to `output`. Whatever is left of it afterwards is ended."""
        with self.log.open("ab") as errors, (output or Path(os.devnull)).open("ab") as printed:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *_COMMAND,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=printed,
                stderr=errors,
                env=os.environ | {"TMPDIR": str(self.temporary), "XDG_RUNTIME_DIR": str(self.temporary)},
                start_new_session=True,  # Ctrl-C is for the benchmark alone
            )
        known = set(processes.children(os.getpid())) - {process.pid}
        life = Life(process, self.log)
        try:
            yield life
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            self.left += await _end_orphans(known)


class Life:
    """One process of `rollout`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.pid = process.pid
        self._process = process
        self._log = log

    async def last(self, seconds: float) -> bool:
        """Wait for its end, or until the time is over; whether it has ended well. Raises RunFailed if badly."""
        try:
            async with asyncio.timeout(seconds):
                code = await self._process.wait()
        except TimeoutError:
            return False
        if code != 0:
            said = self._log.read_bytes()[-_TAIL:].decode(errors="replace").strip()
            raise RunFailed(f"a life that was left alone ended with status {code}:\n{said}")
        return True

    async def finish(self) -> None:
        """Wait for its good end. Raises RunFailed."""
        if not await self.last(LIFE_S):
            raise RunFailed(f"a life did not end within {LIFE_S:g} s; its log is {self._log}")

    async def kill(self) -> float | None:
        """kill -9; the wall clock just before, or None where it had ended already."""
        now = time.time()
        try:
            self._process.kill()
        except ProcessLookupError:
            return None
        await self._process.wait()
        return now


async def _end_orphans(known: set[int]) -> list[str]:
    """Wait for adopted processes to end by themselves, end those that do not; the commands of these."""
    deadline = time.monotonic() + GRACE_S
    while (orphans := _orphans(known)) and time.monotonic() < deadline:  # noqa: ASYNC110  # the kernel sets no event
        await asyncio.sleep(_POLL_S)
    left = [processes.command(pid) or str(pid) for pid in orphans]
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    while _orphans(known):  # noqa: ASYNC110  # the kernel sets no event
        await asyncio.sleep(_POLL_S)
    return left


def _orphans(known: set[int]) -> list[int]:
    """Living processes that came to us: the servers of dead orchestrators. Dead ones are reaped."""
    own = os.getpid()
    for pid in set(processes.zombies(own)) - known:
        os.waitpid(pid, os.WNOHANG)
    return [pid for pid in processes.children(own) if pid not in known]
