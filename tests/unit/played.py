"""Episodes on a backend in memory: a pool, a policy of fixed messages, and the settings around them."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import orjson

from orchestrator.episode import Episode, EpisodeServices, EpisodeSettings
from orchestrator.pool import Pool
from orchestrator.records import EpisodeBuffer, header
from orchestrator.testing import MemoryBackend
from orchestrator.types import Decision, EpisodeKey, OnAgentKill, RunId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from orchestrator.events import Event
    from orchestrator.protocols import EpisodeContext, SandboxLimits
    from orchestrator.records import ConversationView
    from orchestrator.testing.script import Script
    from orchestrator.types import Failure, Trajectory

CALL_LIMIT_S = 5.0
HEAD = header("memory", "0" * 16)
KEY = EpisodeKey("memory_0", 0, 0)


def say(content: str) -> bytes:
    return orjson.dumps({"role": "assistant", "content": content})


class Says:
    """Says fixed messages, one a turn; `think` is awaited before each. `asked` is every turn that was asked for."""

    name = "says"
    needs_solutions = False
    calls_model = True

    def __init__(
        self, *contents: str, think_s: float = 0.0, act: Callable[[ConversationView], Any] | None = None
    ) -> None:
        self.contents = contents
        self.asked: list[tuple[EpisodeKey, int]] = []
        self.contexts: list[EpisodeContext] = []
        self._think_s = think_s
        self._act = act

    def start(self, ctx: EpisodeContext) -> _Agent:
        self.contexts.append(ctx)
        return _Agent(self, ctx)

    async def answer(self, ctx: EpisodeContext, view: ConversationView) -> Decision:
        self.asked.append((ctx.key, view.turn))
        if self._think_s:
            await asyncio.sleep(self._think_s)
        if self._act is not None:
            made = self._act(view)
            return await made if asyncio.iscoroutine(made) else made  # type: ignore[no-any-return]  # junk, too
        return Decision(say(self.contents[view.turn]))


class _Agent:
    def __init__(self, policy: Says, ctx: EpisodeContext) -> None:
        self._policy = policy
        self._ctx = ctx

    async def act(self, view: ConversationView) -> Decision:
        return await self._policy.answer(self._ctx, view)


@dataclass
class Stage:
    """A pool on a backend in memory, and what episodes need besides."""

    backend: MemoryBackend
    pool: Pool
    policy: Says
    settings: EpisodeSettings
    events: list[Event]
    touched: list[tuple[EpisodeKey, int, int]] = field(default_factory=list)
    poisoned: dict[str, Failure] = field(default_factory=dict)

    def episode(self, key: EpisodeKey = KEY, buffer: EpisodeBuffer | None = None, attempt: int = 0) -> Episode:
        services = EpisodeServices(
            pool=self.pool,
            policy=self.policy,
            emit=self.events.append,
            touch=lambda key, attempt, buffer: self.touched.append((key, attempt, buffer.turn)),
            poisoned=self.poisoned.get,
            toolsets={},
            absorb=lambda sandbox: None,
        )
        return Episode(key, attempt, buffer or EpisodeBuffer(HEAD), self.settings, services)

    async def play(self, key: EpisodeKey = KEY, buffer: EpisodeBuffer | None = None) -> Trajectory:
        return await self.episode(key, buffer).run()

    async def play_all(self, keys: Sequence[EpisodeKey]) -> dict[EpisodeKey, Trajectory]:
        async with asyncio.TaskGroup() as tasks:
            plays = {key: tasks.create_task(self.play(key)) for key in keys}
        return {key: play.result() for key, play in plays.items()}

    def idle(self) -> bool:
        """Whether no session is open and no lease is held."""
        return self.backend.statistics().sessions == 0 and self.pool.statistics().leases == 0


@asynccontextmanager
async def stage(
    policy: Says,
    script: Script | None = None,
    *,
    sandboxes: int = 1,
    deterministic: bool = True,
    limits: SandboxLimits | None = None,
    room: int = sys.maxsize,
    **changes: Any,
) -> AsyncIterator[Stage]:
    """Enter a backend and a pool. `changes` are settings of the episodes."""
    settings = EpisodeSettings(
        run_seed=7,
        header=HEAD,
        deterministic=deterministic,
        max_turns=64,
        step_timeout_s=CALL_LIMIT_S,
        time_budget_s=None,
        on_agent_kill=OnAgentKill.ZERO,
    )
    events: list[Event] = []
    backend = MemoryBackend(script, deterministic=deterministic, limits=limits, room=room)
    backend.configure(run=RunId("test"), with_solutions=policy.needs_solutions, logs=None, call_limit_s=CALL_LIMIT_S)
    async with backend, Pool(backend, sandboxes, events.append) as pool:
        yield Stage(backend, pool, policy, replace(settings, **changes), events)
    assert backend.statistics().sandboxes == 0, "the pool leaves no sandbox behind"
