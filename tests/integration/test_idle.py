"""A sandbox that nobody asks anything is found out when it hangs, and left alone while it lives."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from backends.sandboxes import link
from backends.sandboxes.local import LocalBackend
from orchestrator.testing.harness import CALL_LIMIT_S, entered, play, until_lost
from orchestrator.types import FailureKind


async def test_an_idle_one_that_hangs_is_lost_at_the_deadline_of_a_call() -> None:
    async with entered(lambda: LocalBackend("toy")) as backend:
        sandbox = await backend.create()
        os.kill(sandbox.statistics().pid, signal.SIGSTOP)
        began = time.monotonic()
        failure = await until_lost(sandbox)
        assert CALL_LIMIT_S - 0.1 < time.monotonic() - began < CALL_LIMIT_S + 1.0
        assert failure.kind is FailureKind.SANDBOX_HUNG


async def test_an_idle_one_that_lives_is_asked_one_question_at_a_time() -> None:
    async with entered(lambda: LocalBackend("toy")) as backend:
        sandbox = await backend.create()
        await asyncio.sleep(link.PING_S * 3.5)
        found = sandbox.statistics()
        assert 1 <= found.calls <= 3
        assert found.pending == 0
        assert sandbox.overdue(asyncio.get_running_loop().time() + CALL_LIMIT_S * 2) is None
        await play(sandbox, "toy_1", seed=1)
        assert not sandbox.lost.done()
