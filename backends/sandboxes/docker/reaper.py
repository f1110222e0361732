"""The reaper: a small process, `python -m` this module, that outlives its owner and removes what it left.

Runs in a session of its own and waits for the end of the pipe that is its standard input, or for its parent's death:
both come however the owner dies. The pipe's first line says whose containers to look for; the line `bye` says that all
is gone already. Then it removes the owner's containers, again and again until none is left or its time is up, and the
owner's private directory. Nothing of anyone else is touched: it goes by the label of this one owner.

While it waits it has loaded nothing but parts of the standard library, and ignores signals that are meant for all.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import time
from typing import Any, Final

DEADLINE_S: Final = 900.0
"""After this long what still cannot be removed is given up; `rollout reap` tries again."""
WATCH_S: Final = 1.0
RETRY_S: Final = 1.0
SETTLED_S: Final = 2.0
"""A container that was being made when its owner died appears a moment later."""
_LINE_CAP: Final = 65536

log = logging.getLogger(__name__)


def main() -> None:
    """Wait for the owner's end, then reap."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    owner = os.getppid()
    lines = _read_until_end(owner)
    if not lines or b"bye" in lines[1:]:
        return
    import asyncio

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(_reap(json.loads(lines[0])))


def _read_until_end(owner: int) -> list[bytes]:
    """The lines on standard input, once it has ended or the owner has died."""
    data = bytearray()
    while len(data) < _LINE_CAP:
        ready, _, _ = select.select([0], [], [], WATCH_S)
        if ready:
            piece = os.read(0, _LINE_CAP)
            data += piece
            if not piece:
                break
        elif os.getppid() != owner:
            break
    return bytes(data).splitlines()


async def _reap(task: dict[str, Any]) -> None:
    """Remove the owner's containers and directory until a look finds none, twice."""
    import asyncio
    import shutil

    from backends.sandboxes.docker.owners import remove_all
    from backends.sandboxes.docker.port import EngineError
    from orchestrator.errors import Unavailable

    ends = time.monotonic() + DEADLINE_S
    quiet = False
    while time.monotonic() < ends:
        await asyncio.to_thread(shutil.rmtree, task["private"], ignore_errors=True)
        try:
            found = await remove_all(task["url"], task["labels"])
        except (EngineError, Unavailable) as error:
            log.warning("the daemon cannot be asked: %s", error)
            found = 1
        if not found and quiet:
            return
        quiet = not found
        await asyncio.sleep(SETTLED_S if quiet else RETRY_S)
    log.error("given up after %g s: `rollout reap` tries again", DEADLINE_S)


if __name__ == "__main__":
    main()
