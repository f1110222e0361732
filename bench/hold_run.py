"""Worker: N live BFCL episodes at once, and the memory of all processes with and without them.

`python -m bench.hold_run JSON`. The policy waits: first every episode is held right after its opening, then before its
last action, then all are let go and must end with reward 1.0, each. So the sessions were really there, on both sides.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from backends.sandboxes.local import LocalBackend
from bench.processes import family, pss_kib
from bench.workers import serve
from orchestrator import Orchestrator
from orchestrator.errors import RunFailed
from orchestrator.types import Decision

if TYPE_CHECKING:
    from backends.sandboxes.link import LinkedSandbox
    from bench.values import Row
    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView

HELD_S = 600.0
"""All episodes must have come to a gate within this time."""


class Memory(NamedTuple):
    """Proportional set size in KiB."""

    orchestrator: int
    servers: int


class Gate:
    """Holds all who come until it is opened; `full` is set once `size` have come."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = 0
        self.full = asyncio.Event()
        self._open = asyncio.Event()

    async def hold(self) -> None:
        """Wait until the gate is opened."""
        self.held += 1
        if self.held == self.size:
            self.full.set()
        await self._open.wait()

    def open(self) -> None:
        """Let all go on."""
        self._open.set()


class HoldingPolicy:
    """Plays each task's solution, and waits at one gate before its first action and at another before its last."""

    name = "holding"
    needs_solutions = True
    calls_model = False

    def __init__(self, episodes: int) -> None:
        self.opened = Gate(episodes)
        self.played = Gate(episodes)
        self._solutions: dict[str, list[Decision]] = {}

    def start(self, ctx: EpisodeContext) -> HoldingAgent:
        """An agent."""
        return HoldingAgent(self, ctx)

    async def solution(self, ctx: EpisodeContext) -> list[Decision]:
        """The task's solution, shared by its episodes."""
        known = self._solutions.get(ctx.key.task)
        if known is None:
            assert ctx.solution is not None
            known = [Decision(action) for action in await ctx.solution()]
            self._solutions[ctx.key.task] = known
        return known


class HoldingAgent:
    """Plays one episode."""

    __slots__ = ("_ctx", "_policy")

    def __init__(self, policy: HoldingPolicy, ctx: EpisodeContext) -> None:
        self._policy = policy
        self._ctx = ctx

    async def act(self, view: ConversationView) -> Decision:
        """The solution's next action, when it is time."""
        if view.turn == 0:
            await self._policy.opened.hold()
        decisions = await self._policy.solution(self._ctx)
        if view.turn == len(decisions) - 1:
            await self._policy.played.hold()
        return decisions[view.turn]


class CountedBackend(LocalBackend):
    """The local backend, whose sandboxes can be asked how many sessions they have."""

    def __init__(self, environment: str, size: int) -> None:
        super().__init__(environment)
        self.complete = asyncio.Event()
        """Set once `size` sandboxes have answered."""
        self._size = size
        self._created: list[LinkedSandbox] = []

    async def create(self) -> LinkedSandbox:
        """See `Backend.create`."""
        sandbox = await super().create()
        self._created.append(sandbox)
        if len(self._created) >= self._size:
            self.complete.set()
        return sandbox

    def sessions(self) -> int:
        """Sessions open now, on all sandboxes."""
        return sum(sandbox.statistics().sessions for sandbox in self._created)


async def measure(*, out: str, split: str, episodes: int, sandboxes: int, seed: int) -> Row:
    """Hold them and return the row."""
    if episodes < 1:
        raise RunFailed("the memory of no episode is no figure: hold at least one")
    backend, policy = CountedBackend("bfcl", sandboxes), HoldingPolicy(episodes)
    async with Orchestrator(
        backend=backend, policy=policy, out=Path(out), concurrency=episodes, sandboxes=sandboxes, seed=seed
    ) as orch:
        await backend.complete.wait()
        empty = _memory()
        running = asyncio.create_task(orch.run(split=split, episodes=episodes), name="run")
        opened = await _held(policy.opened, orch, backend, running)
        policy.opened.open()
        played = await _held(policy.played, orch, backend, running)
        policy.played.open()
        summary = await running
    if summary.reward_one != episodes:
        raise RunFailed(f"{summary.reward_one} of {episodes} held episodes ended with reward 1.0 ({summary.failures})")
    return {
        "split": split,
        "episodes": episodes,
        "steps": summary.steps,
        "sandboxes": sandboxes,
        "pss_kib": {"empty": empty._asdict(), "opened": opened._asdict(), "played": played._asdict()},
    }


async def _held(gate: Gate, orch: Orchestrator, backend: CountedBackend, running: asyncio.Task[object]) -> Memory:
    """The memory while every episode waits at the gate, with its session open."""
    full = asyncio.create_task(gate.full.wait(), name="gate")
    async with asyncio.timeout(HELD_S):
        await asyncio.wait({full, running}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        full.cancel()
        await running
        raise RunFailed(f"the run ended although only {gate.held} of {gate.size} episodes were held")
    live, sessions = orch.progress().running, backend.sessions()
    if not live == sessions == gate.size:
        raise RunFailed(f"{gate.size} episodes are held, but {live} run and {sessions} sessions are open")
    return _memory()


def _memory() -> Memory:
    own, *others = family(os.getpid())
    return Memory(pss_kib(own), sum(map(pss_kib, others)))


if __name__ == "__main__":
    serve(measure)
