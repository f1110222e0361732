"""Whole runs of the toy environment, and what they came to: for the integration tests."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from backends.sandboxes.local import LocalBackend
from orchestrator import Orchestrator, Run
from orchestrator.events import EpisodeRecovering, SandboxEnded
from orchestrator.retry import RetryPolicy
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from orchestrator.events import Event
    from orchestrator.protocols import Backend, EpisodeContext
    from orchestrator.records import ConversationView
    from orchestrator.summary import Summary
    from orchestrator.types import EpisodeKey, Group, Trajectory

QUICK = RetryPolicy(first_delay_s=0.05)


def counting(view: ConversationView, ctx: EpisodeContext) -> str:
    """Solve a toy task by reading it: one `add 1` at a time, then `stop`."""
    return counting_from(0, view)


def counting_from(turn: int, view: ConversationView) -> str:
    """The same, begun at a later turn."""
    target = re.search(r"Count to (\d+)", str(view.messages()[0]["content"]))
    assert target is not None
    return "add 1" if view.turn - turn < int(target[1]) else "stop"


def then(*contents: str) -> Callable[[ConversationView, EpisodeContext], str]:
    """Say these one after the other, then solve what is left of the task."""

    def act(view: ConversationView, ctx: EpisodeContext) -> str:
        return contents[view.turn] if view.turn < len(contents) else "stop"

    return act


class Counted:
    """A policy of one function; every decision is written down when it has been made, as a model would bill it."""

    name = "counted"
    needs_solutions = False
    calls_model = True

    def __init__(self, act: Callable[[ConversationView, EpisodeContext], Any], think_s: float = 0.0) -> None:
        self.made: list[tuple[EpisodeKey, int, int]] = []
        self._act = act
        self._think_s = think_s

    def start(self, ctx: EpisodeContext) -> Any:
        return ScriptedPolicy(self._noted).start(ctx)

    async def _noted(self, view: ConversationView, ctx: EpisodeContext) -> Any:
        if self._think_s:
            await asyncio.sleep(self._think_s)
        decided = self._act(view, ctx)
        self.made.append((ctx.key, ctx.attempt, view.turn))
        return decided

    def repeated(self) -> int:
        """How many decisions were made again."""
        return len(self.made) - len(set(self.made))


@dataclass
class Played:
    """A run's summary, its trajectories by key, and what happened."""

    summary: Summary
    episodes: Mapping[EpisodeKey, Trajectory]
    events: list[Event]
    orchestrator: Orchestrator
    groups: list[Group] = field(default_factory=list)

    def losses(self) -> list[SandboxEnded]:
        return [event for event in self.events if isinstance(event, SandboxEnded)]

    def recoveries(self) -> list[EpisodeRecovering]:
        return [event for event in self.events if isinstance(event, EpisodeRecovering)]


async def play(
    out: Path,
    policy: Any,
    *,
    backend: Backend | None = None,
    tasks: list[str] | None = None,
    split: str = "",
    episodes: int | None = None,
    group_size: int = 1,
    chaos: AbstractAsyncContextManager[object] | None = None,
    all_up: bool = False,
    **options: Any,
) -> Played:
    """A whole run of the toy environment (or of `backend`'s), read back.

    `chaos` is entered before the first episode; with `all_up` that waits until every sandbox has started.
    """
    events: list[Event] = []
    options = {"concurrency": 64, "sandboxes": 2, "step_timeout_s": 5.0, "retry": QUICK, **options}
    orchestrator = Orchestrator(
        backend=backend or LocalBackend("toy"), policy=policy, out=out, listener=events.append, **options
    )

    async def up() -> bool:
        progress = orchestrator.progress()
        return not all_up or progress.sandboxes_live == progress.sandboxes_target

    async with orchestrator, chaos or nullcontext():
        await until(up, "all sandboxes to start")
        summary = await orchestrator.run(split=split, tasks=tasks, episodes=episodes, group_size=group_size)
    return Played(summary, await read(out), events, orchestrator)


async def until(holds: Callable[[], Awaitable[bool]], what: str, within_s: float = 30.0) -> None:
    """Look again and again until it holds."""
    ends = time.monotonic() + within_s
    while not await holds():
        assert time.monotonic() < ends, f"waited {within_s:g} s in vain for {what}"
        await asyncio.sleep(0.02)


async def read(out: Path) -> dict[EpisodeKey, Trajectory]:
    """All stored trajectories of a run by key; a key stored twice would be an error."""

    def load() -> dict[EpisodeKey, Trajectory]:
        with Run.open(out) as run:
            stored = list(run.episodes())
            found = {trajectory.key: trajectory for trajectory in stored}
            assert len(found) == len(stored)
            assert run.totals().duplicates == 0
            return found

    return await asyncio.to_thread(load)


def equal(one: Mapping[EpisodeKey, Trajectory], other: Mapping[EpisodeKey, Trajectory]) -> bool:
    """Whether two runs are the same: bodies, rewards, outcomes; ids and times excluded."""

    def essence(played: Mapping[EpisodeKey, Trajectory]) -> dict[EpisodeKey, tuple[object, ...]]:
        return {key: (t.outcome, t.stop_reason, t.reward, t.steps, t.buffer, t.details) for key, t in played.items()}

    return essence(one) == essence(other)
