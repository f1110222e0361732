"""A run of the toy environment over a Ray cluster, for tests: its policy notes every decision in a file.

As a program it is the driver, in a process of its own: `python sharded.py OUT LOG ADDRESS HOW EPISODES`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from runs import QUICK, counting

from backends.sandboxes.local import LocalBackend
from backends.sandboxes.ray import RayBackend, RayOptions, RayShards
from orchestrator import Orchestrator
from orchestrator.rundir import RunDirectory
from orchestrator.store import holds_run
from orchestrator.testing.leaks import processes
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView

LIGHT = RayOptions(cpus=0.1)
EXCUSED_S = 0.3
"""A decision made so shortly before its process ended may not have reached the journal."""


class Noting:
    """The counting policy, slow; every decision becomes a line of a file that outlives its process."""

    name = "noting"
    needs_solutions = False
    calls_model = True

    def __init__(self, log: Path, think_s: float = 0.05) -> None:
        self._log = str(log)
        self._think_s = think_s

    def start(self, ctx: EpisodeContext) -> Any:
        return ScriptedPolicy(self._act).start(ctx)

    async def _act(self, view: ConversationView, ctx: EpisodeContext) -> str:
        await asyncio.sleep(self._think_s)
        decided = counting(view, ctx)
        line = {"key": str(ctx.key), "attempt": ctx.attempt, "turn": view.turn, "t": time.time(), "pid": os.getpid()}
        await asyncio.to_thread(self._write, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        return decided

    def _write(self, line: bytes) -> None:
        file = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)


def repeated(log: Path) -> tuple[int, int]:
    """Decisions of the same attempt that were made again, and how many of them are not excused: by another process, the
    first one's last sign of life having come just after. (A node's processes outlive its SIGKILL for a second or two.)
    """
    lines = [orjson.loads(line) for line in log.read_bytes().splitlines()]
    last = {line["pid"]: line["t"] for line in lines}
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    again = guilty = 0
    for line in lines:
        before = first.setdefault((line["key"], line["attempt"], line["turn"]), line)
        if before is not line:
            again += 1
            guilty += line["pid"] == before["pid"] or last[before["pid"]] - before["t"] > EXCUSED_S
    return again, guilty


def orchestrator(
    out: Path, log: Path, address: str, how: str, think_s: float = 0.05, place: RayOptions = LIGHT, **options: Any
) -> Orchestrator:
    """`how`: `shards` (two of them), or `sandboxes` (four, on actors), each in a `place`."""
    shards = RayShards(2, address=address, options=place) if how == "shards" else None
    backend = LocalBackend("toy") if shards else RayBackend("toy", address=address, options=place)
    return Orchestrator(
        backend=backend,
        policy=Noting(log, think_s),
        out=out,
        concurrency=64,
        sandboxes=1 if shards else 4,
        seed=11,
        retry=QUICK,
        shards=shards,
        resume=holds_run(RunDirectory(out).store),
        **options,
    )


def actors(kind: str) -> list[int]:
    """The process ids of living actors: `ShardHost` or `SandboxHost`."""
    return [one.pid for one in processes() if one.command.startswith(f"ray::{kind}") and one.state != "Z"]


async def drive(out: Path, log: Path, address: str, how: str, episodes: int) -> None:
    async with orchestrator(out, log, address, how) as run:
        await run.run(episodes=episodes, group_size=2)


if __name__ == "__main__":
    given = sys.argv[1:]
    asyncio.run(drive(Path(given[0]), Path(given[1]), given[2], given[3], int(given[4])))
