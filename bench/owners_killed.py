"""kill -9 of orchestrators that run on containers, again and again, beside a run of another owner that goes on.

A killed one is not restarted. Within 30 s nothing of it may be left: containers and networks that carry its label,
processes that inherited its temporary directory (its reaper is one), and what lies in that directory. The other run
must keep every container that it has, and end well.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from backends.sandboxes.docker.owners import OWNER
from bench.faults_run import judged
from bench.strikes import docker
from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from random import Random

    from bench.values import Row, Say

ALLOWED_S: Final = 30.0
AFTER_S: Final = (0.2, 5.0)
"""When it is killed, in seconds from its start: while it starts, or in the middle of its run."""
EPISODES: Final = 6
"""Of the other run."""
READY_S: Final = 60.0
FINISH_S: Final = 60.0
_POLL_S: Final = 0.2
_COMMAND: Final = ("-P", "-c", "from orchestrator.cli.main import main; main()")
_SCRIPT: Final = """
import asyncio, pathlib, re

async def act(view, ctx):
    target = int(re.search(r"Count to (\\d+)", str(view.messages()[0]["content"]))[1])
    await asyncio.sleep(0.2)
    if view.turn < target:
        return "add 1"
    return "stop" if pathlib.Path({gate!r}).exists() else "add 0"
"""


@dataclass(slots=True)
class Orchestration:
    """One process of `rollout collect`, and where it leaves its traces."""

    process: asyncio.subprocess.Process
    out: Path
    temporary: Path

    def containers(self) -> set[str]:
        """Names of its containers, ended ones too."""
        return _labelled("ps", "-a", name="Names", pid=self.process.pid)

    def left(self) -> list[str]:
        """What there is of it. Blocks."""
        networks = _labelled("network", "ls", name="Name", pid=self.process.pid)
        folders = {str(path) for path in self.temporary.iterdir()}
        processes = {f"process {pid}" for pid in heirs(self.temporary, self.process.pid)}
        return sorted(self.containers() | networks | folders | processes)


async def kill_owners(work: Path, kills: int, rng: Random, say: Say) -> Row:
    """Kill so many, one after the other; the row. Raises RunFailed where there is nothing to measure."""
    gate = work / "gate"
    script = work / "slow.py"
    await asyncio.to_thread(script.write_text, _SCRIPT.format(gate=str(gate)), encoding="utf-8")
    rounds: list[Row] = []
    async with _started(work / "other", script) as other:
        before = await _up(other)
        for number in range(kills):
            rounds.append({**await _kill_one(work / f"killed-{number}", script, rng), **await _hurt(other, before)})
            say(f"kill {number + 1} of {kills}: gone after {rounds[-1]['gone_s']:.1f} s")
        await asyncio.to_thread(gate.touch)
        ended_well = await _ends_well(other)
    hurt = sum(row["other_hurt"] for row in rounds) + (not ended_well)
    return {
        "fault": "owner",
        "kills": len(rounds),
        "left": sum(len(row["left"]) for row in rounds),
        "other_owner_hurt": hurt,
        "gone_max_s": max(row["gone_s"] for row in rounds),
        "with_containers": sum(row["containers"] > 0 for row in rounds),
        "rounds": rounds,
    }


async def _kill_one(out: Path, script: Path, rng: Random) -> Row:
    after = rng.uniform(*AFTER_S)
    async with _started(out, script) as victim:
        await asyncio.sleep(after)
        if victim.process.returncode is not None:
            raise RunFailed(f"a run that was left alone ended with status {victim.process.returncode}")
        containers = len(await asyncio.to_thread(victim.containers))
        victim.process.kill()
        killed = time.monotonic()
        await victim.process.wait()
        left = await _gone(victim, killed + ALLOWED_S)
        gone = time.monotonic() - killed
    return {"after_s": after, "containers": containers, "gone_s": gone, "left": left}


async def _gone(victim: Orchestration, ends: float) -> list[str]:
    """What is left when nothing is, or when time is up."""
    while True:
        left = await asyncio.to_thread(victim.left)
        if not left or time.monotonic() > ends:
            return left
        await asyncio.sleep(_POLL_S)


async def _hurt(other: Orchestration, before: set[str]) -> Row:
    kept = await asyncio.to_thread(other.containers)
    return {"other_hurt": len(before - kept) + (other.process.returncode is not None)}


async def _up(run: Orchestration) -> set[str]:
    """Its containers, once there are enough and none is still to come."""
    ends = time.monotonic() + READY_S
    while True:
        found = await asyncio.to_thread(run.containers)
        if len(found) >= 2:
            return found
        if time.monotonic() > ends or run.process.returncode is not None:
            raise RunFailed(f"the other run does not start; see {run.out}.log")
        await asyncio.sleep(_POLL_S)


async def _ends_well(run: Orchestration) -> bool:
    """Whether it ends by itself with every episode right and none recovered."""
    try:
        async with asyncio.timeout(FINISH_S):
            code = await run.process.wait()
    except TimeoutError:
        return False
    verdict = await asyncio.to_thread(judged, run.out, EPISODES)
    return code == 0 and verdict["right"] == EPISODES


@asynccontextmanager
async def _started(out: Path, script: Path) -> AsyncIterator[Orchestration]:
    """A run that goes on until it is killed, or the gate opens; killed at the end."""
    temporary = out.with_name(f"{out.name}-tmp")
    await asyncio.to_thread(temporary.mkdir, mode=0o700)
    arguments = ["collect", "--env", "toy", "--backend", "docker", "--policy", "scripted", "--script", f"{script}:act"]
    arguments += ["--out", str(out), "--sandboxes", "2", "--episodes", str(EPISODES), "--max-turns", "100000"]
    with out.with_name(f"{out.name}.log").open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *_COMMAND,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"TMPDIR": str(temporary), "XDG_RUNTIME_DIR": str(temporary)},
            start_new_session=True,
        )
    try:
        yield Orchestration(process, out, temporary)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _labelled(*command: str, name: str, pid: int) -> set[str]:
    """Names of what carries the label of an owner with this process number."""
    shown = docker(*command, "--filter", f"label={OWNER}", "--format", f'{{{{.{name}}}}}\t{{{{.Label "{OWNER}"}}}}')
    pairs = (line.split("\t") for line in shown.splitlines())
    return {found for found, owner in pairs if owner.split(":")[1:2] == [str(pid)]}


def heirs(temporary: Path, owner: int) -> set[int]:
    """Numbers of the processes that inherited a temporary directory, but for the owner itself."""
    needle = f"TMPDIR={temporary}\0".encode()
    found = set()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            inherited = needle in entry.read_bytes() + b"\0"
        except OSError:
            continue  # it has ended, or is not ours
        if inherited and entry.parent.name != str(owner):
            found.add(int(entry.parent.name))
    return found
