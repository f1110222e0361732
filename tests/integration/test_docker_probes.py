"""Hostile programs inside a sandbox's container get nothing; without the walls the same programs do."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.docker.hardening import Hardening
from orchestrator.testing.harness import entered, play

PROGRAM = Path(__file__).with_name("probes.py").read_bytes()
OPEN = Hardening(
    user="0:0",
    drop_capabilities=False,
    no_new_privileges=False,
    read_only=False,
    network="bridge",
    open_files=10_000,
    memory_mb=0,
    pids=0,
    tmp_mb=600,
    shm_mb=600,
)

pytestmark = pytest.mark.usefixtures("containers")


def probed(container: str) -> dict[str, Any]:
    """What every probe got."""
    command = ["docker", "exec", "-i", container, "/opt/rollout/venv/bin/python", "-"]
    done = subprocess.run(command, input=PROGRAM, capture_output=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    got: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return got


async def test_none_succeeds_and_the_sandbox_still_answers() -> None:
    async with entered(lambda: DockerBackend("toy")) as backend:
        sandbox = await backend.create()
        neighbour = await backend.create()
        got = await asyncio.to_thread(probed, sandbox.id)
        assert len(got) >= 30
        assert {name: what for name, what in got.items() if what} == {}
        await play(sandbox, "toy_3", seed=1)
        await play(neighbour, "toy_3", seed=1)
        assert not sandbox.lost.done()


async def test_without_the_filter_of_system_calls_they_succeed() -> None:
    async with entered(lambda: DockerBackend("toy", hardening=Hardening(seccomp=False))) as backend:
        sandbox = await backend.create()
        got = await asyncio.to_thread(probed, sandbox.id)
        assert {"new_user_namespace", "keyctl"} <= {name for name, what in got.items() if what}


async def test_without_the_walls_they_succeed() -> None:
    """A probe that cannot succeed anywhere proves nothing."""
    async with entered(lambda: DockerBackend("toy", hardening=OPEN)) as backend:
        sandbox = await backend.create()
        got = await asyncio.to_thread(probed, sandbox.id)
        expected = {
            "become_root", "capabilities", "new_privileges", "interfaces", "raw_socket", "change_the_grader",
            "change_the_bytecode", "plant_a_module", "fill_the_disk", "fork_bomb", "thread_bomb", "open_files",
            "memory_beyond_the_bound",
        }  # fmt: skip
        assert expected <= {name for name, what in got.items() if what}
