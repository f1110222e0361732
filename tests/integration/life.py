"""One life of a run of the toy environment, in a process of its own: `python life.py DIR LOG ...`, begun or resumed.

Every decision of the counting policy is written to LOG when it has been made, as a model endpoint would have answered
it: key, attempt, turn, time. A line is one write to a file opened for appending, so no kill tears it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from runs import QUICK, Counted, counting

from backends.sandboxes.local import LocalBackend
from orchestrator import Orchestrator
from orchestrator.rundir import RunDirectory
from orchestrator.store import holds_run
from policies.agents.chat import ChatPolicy

if TYPE_CHECKING:
    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView


class Logged(Counted):
    """The counting policy, slow, with a log that outlives it."""

    def __init__(self, log: Path, think_s: float) -> None:
        super().__init__(counting, think_s)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    async def _noted(self, view: ConversationView, ctx: EpisodeContext) -> Any:
        decided = await super()._noted(view, ctx)
        line = {"key": str(ctx.key), "attempt": ctx.attempt, "turn": view.turn, "t": time.time()}
        os.write(self._log, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        return decided


async def live(given: argparse.Namespace) -> None:
    if given.endpoint:
        policy: Any = ChatPolicy("fake", given.endpoint, api_key_env=None)
    else:
        policy = Logged(given.log, given.think)
    async with Orchestrator(
        backend=LocalBackend("toy"),
        policy=policy,
        out=given.out,
        concurrency=given.concurrency,
        sandboxes=given.sandboxes,
        seed=11,
        step_timeout_s=given.step_timeout,
        max_turns=given.max_turns,
        retry=QUICK,
        resume=holds_run(RunDirectory(given.out).store),
    ) as orchestrator:
        await orchestrator.run(group_size=2, episodes=given.episodes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--sandboxes", type=int, default=2)
    parser.add_argument("--think", type=float, default=0.0)
    parser.add_argument("--step-timeout", type=float, default=30.0)
    parser.add_argument("--max-turns", type=int, default=64)
    parser.add_argument("--endpoint", default="")
    asyncio.run(live(parser.parse_args()))


if __name__ == "__main__":
    main()
