"""Worker: one run on containers that are struck again and again by one fault. `python -m bench.faults_run JSON`

The run has so many episodes and is struck so many times, evenly: an episode ends only when its share of the faults has
happened, and goes on with steps of no effect until then. Each strike hits a random living container; the next comes
when it has been noticed, or has proved harmless.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from backends.sandboxes.docker import DockerBackend
from bench.strikes import FAULTS, rows_of
from bench.workers import serve
from orchestrator import Orchestrator, Run
from orchestrator.errors import RunFailed
from orchestrator.events import SandboxEnded
from orchestrator.types import Outcome
from policies.agents.scripted import ScriptedPolicy

if TYPE_CHECKING:
    from backends.sandboxes.docker.container import Container
    from bench.strikes import Fault
    from bench.values import Row
    from orchestrator.events import Event
    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView
    from orchestrator.types import EpisodeKey, Trajectory

ENVIRONMENT: Final = "toy"
SANDBOXES: Final = 3
CONCURRENCY: Final = 40
STEP_S: Final = 1.0
GRACE_S: Final = 0.5
"""What the orchestrator adds to a step's own limit before it counts as overdue."""
THINK_S: Final = 0.1
MAX_TURNS: Final = 100_000
PAUSE_S: Final = (0.05, 0.4)
"""Between a noticed fault and the next."""
HARMLESS_S: Final = 0.3
"""What survives for so long has survived."""
UNNOTICED_S: Final = 15.0
"""A fault that nobody has noticed by then counts as one that took so long."""
_POLL_S: Final = 0.005


@dataclass(slots=True)
class Player:
    """A costly policy: solves the toy's tasks one step at a time, and writes down every decision that it makes.

    `decided` is what a model would bill: the same decision twice is a repeated call.
    """

    episodes: int
    strikes: int
    happened: int = 0
    decided: list[tuple[EpisodeKey, int, int]] = field(default_factory=list)
    released: int = 0

    async def act(self, view: ConversationView, ctx: EpisodeContext) -> str:
        """One decision: add, wait inside the sandbox, or stop when it is time."""
        await asyncio.sleep(THINK_S)
        self.decided.append((ctx.key, ctx.attempt, view.turn))
        target = re.search(r"Count to (\d+)", str(view.messages()[0]["content"]))
        if target is None:
            raise RunFailed("the toy does not say its target")
        if view.turn < int(target[1]):
            return "add 1"
        if self.released * self.strikes < self.episodes * self.happened or self.happened >= self.strikes:
            self.released += 1
            return "stop"
        return "sleep 0.05" if view.turn % 2 else "add 0"


@dataclass(slots=True)
class Striker:
    """Strikes living containers of a backend, one after the other."""

    backend: Any
    fault: Fault
    player: Player
    rng: random.Random
    noticed_s: list[float] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)

    async def go(self) -> None:
        """All strikes."""
        while self.player.happened < self.player.strikes:
            await asyncio.sleep(self.rng.uniform(*PAUSE_S))
            if (container := self._one()) is not None:
                await self._strike(container)
                self.player.happened += 1

    def _one(self) -> Container | None:
        living = [one for one in self.backend.containers() if one.sandbox is not None and not one.sandbox.lost.done()]
        return self.rng.choice(sorted(living, key=_name)) if living else None

    async def _strike(self, container: Container) -> None:
        sandbox = container.sandbox
        if sandbox is None:
            return
        lost_at: list[float] = []
        sandbox.lost.add_done_callback(lambda _: lost_at.append(time.monotonic()))
        self.struck.append(container.id)
        fell = await asyncio.to_thread(self.fault.strike, container)
        within = UNNOTICED_S if self.fault.kind is not None else HARMLESS_S
        await asyncio.wait({sandbox.lost}, timeout=max(fell + within - time.monotonic(), 0))
        await asyncio.sleep(0)
        if self.fault.kind is not None:
            self.noticed_s.append(max(lost_at[0] - fell, 0.0) if lost_at else UNNOTICED_S)


async def measure(*, out: str, fault: str, episodes: int, strikes: int, seed: int) -> Row:
    """Run it and return its row."""
    hit = FAULTS[fault]
    player = Player(episodes, strikes)
    backend = DockerBackend(ENVIRONMENT, hardening=hit.hardening)
    striker = Striker(backend, hit, player, random.Random(f"{seed} {fault}"))
    events: list[Event] = []
    async with Orchestrator(
        backend=backend,
        policy=ScriptedPolicy(player.act, calls_model=True),
        out=Path(out),
        concurrency=CONCURRENCY,
        sandboxes=SANDBOXES,
        seed=seed,
        max_turns=MAX_TURNS,
        step_timeout_s=STEP_S,
        listener=events.append,
    ) as orch:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(striker.go(), name="strikes")
            summary = await orch.run(episodes=episodes)
        oom_kills = backend.statistics().oom_kills
    losses = [event for event in events if isinstance(event, SandboxEnded)]
    return {
        "fault": fault,
        **rows_of(hit),
        "strikes": player.happened,
        "deadline_s": STEP_S + GRACE_S if hit.silent else 0.0,
        "noticed_s": striker.noticed_s,
        "losses": len(losses),
        "untrue": [str(loss.failure) for loss in losses if not _true(loss, hit)],
        "oom_kills": oom_kills,
        "recovered": summary.recovered_episodes,
        "duplicates": summary.duplicates,
        "repeated_calls": len(player.decided) - len(set(player.decided)),
        "calls": len(player.decided),
        "wall_s": summary.wall_s,
        **await asyncio.to_thread(judged, Path(out), episodes),
    }


def judged(out: Path, episodes: int) -> Row:
    """What the stored run came to: how many episodes ended right, and rewards that none should have been given."""
    with Run.open(out) as run:
        stored = list(run.episodes())
    wrong = [
        f"{one.key}: {one.outcome} {one.stop_reason} {one.reward} {one.failure}" for one in stored if not right(one)
    ]
    infra = [one for one in stored if one.outcome is Outcome.INFRA_FAILED and one.reward is not None]
    return {
        "episodes": episodes,
        "right": len({one.key for one in stored if right(one)}),
        "wrong": wrong,
        "infra_rewards": len(infra),
    }


def right(episode: Trajectory) -> bool:
    """Played to its end in its first attempt, with the reward that its decisions earn."""
    return (
        episode.outcome is Outcome.COMPLETED
        and episode.reward == 1.0
        and episode.failure is None
        and episode.attempt == 0
    )


def _true(loss: SandboxEnded, fault: Fault) -> bool:
    """Whether a loss is called what it was."""
    return fault.kind is not None and loss.failure.kind is fault.kind and fault.says in loss.failure.message


def _name(container: Container) -> str:
    return container.id


if __name__ == "__main__":
    serve(measure)
