"""The local backend and servers of other processes: those of the living are left alone, those of the dead are not."""

from __future__ import annotations

import asyncio
import signal
import sys
from dataclasses import astuple
from uuid import uuid4

import pytest

from backends.sandboxes.local import LocalBackend
from orchestrator.rundir import Owner
from orchestrator.testing.harness import say, spec
from orchestrator.types import RunId


async def a_server_of(owner: str, run: str) -> asyncio.subprocess.Process:
    """What looks like one that this owner has started."""
    code = "import time; print(flush=True); time.sleep(60)"
    words = ["-c", code, "backends.server", "--run", run, *(["--owner", owner] if owner else [])]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    await process.stdout.readline()
    return process


def named(owner: Owner) -> str:
    return ":".join(map(str, astuple(owner)))


async def test_a_living_owner_s_servers_are_left_alone() -> None:
    run = RunId(f"shared-{uuid4().hex}")
    first, second = LocalBackend("toy"), LocalBackend("toy")
    for backend in (first, second):
        backend.configure(run=run, with_solutions=False, logs=None, call_limit_s=5.0)
    async with first:
        sandbox = await first.create()
        session, _ = await sandbox.open(spec("toy_1"))
        async with second:
            assert list(await second.owned_by(run)) == [f"pid-{sandbox.pid}"]
            await (await second.create()).open(spec("toy_1"))
            assert b"total 1" in (await session.step(say("add 1"))).body
        assert b"total 2" in (await session.step(say("add 1"))).body


@pytest.mark.parametrize("what", ["dead", "another start", "another boot", "none", "nonsense"])
async def test_a_dead_owner_s_servers_are_killed(what: str) -> None:
    gone = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await gone.wait()
    here = await asyncio.to_thread(Owner.current)
    owners = {
        "dead": named(Owner(here.boot, gone.pid, here.start)),
        "another start": named(Owner(here.boot, here.pid, here.start + 1)),
        "another boot": named(Owner("another", here.pid, here.start)),
        "none": "",
        "nonsense": "a:b:c",
    }
    run = f"left-{uuid4().hex}"
    left, other = await a_server_of(owners[what], run), await a_server_of(owners[what], f"{run}-other")
    backend = LocalBackend("toy")
    backend.configure(run=RunId(run), with_solutions=False, logs=None, call_limit_s=5.0)
    async with asyncio.timeout(5), backend:
        assert await left.wait() == -signal.SIGKILL
    assert other.returncode is None
    other.kill()
    await other.wait()
