"""The owner's side of the reaper: starts it, keeps it alive, and tells it when there is nothing left to do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

BYE_S: Final = 5.0
"""A reaper that was told to go is gone after a few milliseconds."""
_POLL_S: Final = 0.01

log = logging.getLogger(__name__)


class Reaper:
    """A reaper of this process's own. Make it with `start`; end with `bye`, or leave it to its work with `let_go`."""

    def __init__(self, task: bytes, log: Path) -> None:
        self._task = task
        self._log = log
        self._pid, self._pipe = self._spawn()

    @classmethod
    async def start(cls, *, url: str, labels: Mapping[str, str], private: Path, log: Path) -> Reaper:
        """Start one that will look for `labels` at the daemon of `url`, and remove `private`."""
        task = orjson.dumps({"url": url, "labels": labels, "private": str(private)}) + b"\n"
        return await asyncio.to_thread(cls, task, log)

    def keep(self) -> None:
        """Start another where it has ended. Cheap: called about once a second. Raises OSError where none can be
        started now; the next call tries again."""
        if self._ended():
            pid, pipe = self._spawn()
            log.warning("the reaper has ended: started another (%s may say why)", self._log)
            os.close(self._pipe)
            self._pid, self._pipe = pid, pipe

    async def leave(self, left: Sequence[str]) -> None:
        """The owner goes: `bye`, or `let_go` where something is `left`, whose names the log is told."""
        if left:
            log.error("left to the reaper, for the daemon does not remove them: %s", ", ".join(left))
            self.let_go()
        else:
            await self.bye()

    async def bye(self) -> None:
        """All is gone: let it end, and wait for that; for one that is held up, not for ever."""
        await asyncio.to_thread(self._say_bye)
        loop = asyncio.get_running_loop()
        ends = loop.time() + BYE_S
        while not self._ended():
            if loop.time() >= ends:
                log.warning(
                    "the reaper (process %d) has not ended within %g s, though nothing is left", self._pid, BYE_S
                )
                return self._leave()
            await asyncio.sleep(_POLL_S)

    def let_go(self) -> None:
        """Something is left: let it begin, and outlive this process if it must."""
        os.close(self._pipe)
        self._leave()

    def _leave(self) -> None:
        """Where this process lives on, somebody must take note of its end."""
        threading.Thread(target=self._wait, name="reaper", daemon=True).start()

    def _wait(self) -> None:
        with contextlib.suppress(ChildProcessError):  # its end has been noted already
            os.waitpid(self._pid, 0)

    def _say_bye(self) -> None:
        try:
            os.write(self._pipe, b"bye\n")
        except BrokenPipeError:
            pass  # it was killed: there is nothing left for it to do
        os.close(self._pipe)

    def _ended(self) -> bool:
        try:
            return os.waitpid(self._pid, os.WNOHANG)[0] != 0
        except ChildProcessError:
            return True  # somebody else has waited for it

    def _spawn(self) -> tuple[int, int]:
        """Its number, and the writing end of its standard input, which no other child inherits."""
        read, write = os.pipe2(os.O_CLOEXEC)
        output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(write, self._task)
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-P", "-m", "backends.sandboxes.docker.reaper"],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, read, 0),
                    (os.POSIX_SPAWN_DUP2, output, 1),
                    (os.POSIX_SPAWN_DUP2, output, 2),
                ],
                setsid=True,  # a terminal's Ctrl-C, or a kill of the owner's group, is not for it
            )
        except OSError:
            os.close(write)
            raise
        finally:
            os.close(read)
            os.close(output)
        return pid, write
