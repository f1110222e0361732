"""Teardown that finishes although its owner is cancelled, and that has a deadline."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine

log = logging.getLogger(__name__)


async def shielded(work: Coroutine[object, object, None], *, deadline_s: float, what: str) -> bool:
    """Run `work` to its end or its deadline, through any number of cancellations; those are raised afterwards.

    Returns whether it finished in time. What does not is cancelled, logged, and left to the reaper.
    """
    task = asyncio.create_task(work, name=f"teardown-{what}")
    ends = asyncio.get_running_loop().time() + deadline_s
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        left = ends - asyncio.get_running_loop().time()
        if left <= 0:
            break
        try:
            await asyncio.wait({task}, timeout=left)
        except asyncio.CancelledError as error:
            cancelled = error
    finished = task.done()
    if not finished:
        task.cancel()
        log.error("%s did not end within %g s; it is left behind for the reaper", what, deadline_s)
    elif (failure := task.exception()) is not None:
        log.error("%s failed: %s", what, failure)
        finished = False
    if cancelled is not None:
        raise cancelled
    return finished


async def ended_within(tasks: Collection[asyncio.Task[None]], deadline_s: float) -> None:
    """Wait for all tasks; those that go on at the deadline are cancelled, and waited for. Raises none of their errors.

    Cancelled: the tasks go on.
    """
    if not tasks:
        return
    _, slow = await asyncio.wait(tasks, timeout=deadline_s)
    for task in slow:
        task.cancel()
    if slow:
        await asyncio.wait(slow)
