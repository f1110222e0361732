"""An owner of one sandbox of the environment `forked`, in a process of its own: `python forked_life.py SITE`.

Opens a session that leaves a hidden process behind, and one that hangs; prints the numbers of all processes below it
on one line, and then does nothing until it is killed.
"""

from __future__ import annotations

import asyncio
import sys

from forked import number

from backends.sandboxes.local import LocalBackend
from orchestrator.testing.harness import say, spec
from orchestrator.testing.leaks import children


async def live() -> None:
    async with LocalBackend("forked") as backend:
        sandbox = await backend.create()
        session, _ = await sandbox.open(spec("toy_3"))
        left = [await number(session, words) for words in ("daemon", "children", "me")]
        hanging, _ = await sandbox.open(spec("toy_3"))
        left.append(await number(hanging, "me"))
        stepping = asyncio.create_task(hanging.step(say("hang")), name="hanging")
        left += [sandbox.pid, *(child.pid for child in children(sandbox.pid))]
        print(*left, flush=True)  # noqa: T201  # read by the test
        await stepping


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    asyncio.run(live())
