"""The owner's side of the reaper: starts it, keeps it alive, and tells it when there is nothing left to do."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from typing import TYPE_CHECKING, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BYE_S: Final = 5.0
"""A reaper that was told to go is gone after a few milliseconds."""
_POLL_S: Final = 0.01


class Reaper:
    """A reaper of this process's own. Make it with `start`; end with `bye`, or leave it to its work with `let_go`."""

    def __init__(self, task: bytes, log: Path) -> None:
        self._task = task
        self._log = log
        self._pid, self._pipe = self._spawn()

    @classmethod
    async def start(cls, *, socket: str, labels: Mapping[str, str], private: Path, log: Path) -> Reaper:
        """Start one that will look for `labels` at the daemon of `socket`, and remove `private`."""
        task = orjson.dumps({"socket": socket, "labels": labels, "private": str(private)}) + b"\n"
        return await asyncio.to_thread(cls, task, log)

    def keep(self) -> None:
        """Start another where somebody has killed it. Cheap: called about once a second."""
        if self._ended():
            os.close(self._pipe)
            self._pid, self._pipe = self._spawn()

    async def bye(self) -> None:
        """All is gone: let it end, and wait for that."""
        await asyncio.to_thread(self._say_bye)
        async with asyncio.timeout(BYE_S):
            while True:
                if self._ended():
                    return
                await asyncio.sleep(_POLL_S)

    def let_go(self) -> None:
        """Something is left: let it begin, and outlive this process if it must."""
        os.close(self._pipe)
        # Where this process lives on, somebody must take note of its end.
        threading.Thread(target=os.waitpid, args=(self._pid, 0), name="reaper", daemon=True).start()

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
