"""The policy that knows the answers: it plays each task's solution, or a version with seeded mistakes.

An agent's n-th action is the solution's n-th, so its state follows from the view alone and it resumes anywhere. Which
calls go wrong follows from (seed, turn). Solutions are fetched once a task, shared by all its samples, and bounded in
number; at skill 1 so are the decisions, and an act is an index into a list.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from orchestrator.errors import PolicyError, UsageError
from orchestrator.seeds import derive
from orchestrator.types import Decision, Failure, FailureKind
from policies.agents.mistakes import spoil

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView

_SEEDS: Final = 1 << 63
"""`derive` is uniform below this."""
_USED_UP: Final = Decision(b'{"role":"assistant","content":"I have nothing more to do."}')


class ReplayStatistics(NamedTuple):
    """Solutions fetched from sandboxes, and those held now."""

    fetched: int
    held: int


class ReplayPolicy:
    """Plays `await ctx.solution()` action by action; an episode that goes on after it gets a short plain text.

    `skill` in [0, 1]: each tool call is right with this probability. `solutions` bounds how many are held.
    """

    name = "replay"
    needs_solutions = True
    calls_model = False

    def __init__(self, skill: float = 1.0, *, solutions: int = 2048) -> None:
        if not 0.0 <= skill <= 1.0:
            raise UsageError(f"skill is the share of right calls, from 0 to 1; it is {skill}")
        if solutions < 1:
            raise UsageError(f"solutions is how many solutions to hold, at least 1; it is {solutions}")
        self.skill = skill
        self._bound = solutions
        self._solutions: OrderedDict[str, _Solution] = OrderedDict()
        self._fetched = 0

    def __repr__(self) -> str:
        return f"ReplayPolicy(skill={self.skill:g})"

    def start(self, ctx: EpisodeContext) -> ReplayAgent:
        """An agent; the solution is fetched at its first act."""
        return ReplayAgent(self, ctx)

    def statistics(self) -> ReplayStatistics:
        """Counts so far."""
        return ReplayStatistics(self._fetched, len(self._solutions))

    async def solution(self, ctx: EpisodeContext) -> _Solution:
        """The task's solution, fetched by the first who asks while the others wait for it.

        Raises PolicyError where the episode offers none. Cancelled: the next in line fetches it.
        """
        if ctx.solution is None:
            message = "no solution is offered here: replay needs sandboxes that were started with --with-solutions"
            raise PolicyError(Failure(FailureKind.POLICY, "act", message))
        found = self._entry(ctx.key.task)
        if not found.ready:
            async with found.lock:
                if not found.ready:
                    found.fill(await ctx.solution())
                    self._fetched += 1
        return found

    def _entry(self, task: str) -> _Solution:
        found = self._solutions.get(task)
        if found is None:
            found = self._solutions[task] = _Solution()
            if len(self._solutions) > self._bound:
                self._solutions.popitem(last=False)
        else:
            self._solutions.move_to_end(task)
        return found


class ReplayAgent:
    """Plays one episode's solution."""

    __slots__ = ("_ctx", "_decisions", "_policy", "_solution")

    def __init__(self, policy: ReplayPolicy, ctx: EpisodeContext) -> None:
        self._policy = policy
        self._ctx = ctx
        self._decisions: Sequence[Decision] | None = None
        self._solution: _Solution | None = None

    async def act(self, view: ConversationView) -> Decision:
        """The solution's action of this turn. Raises PolicyError, or what fetching the solution raises."""
        decisions = self._decisions
        if decisions is None:
            self._solution = await self._policy.solution(self._ctx)
            decisions = self._decisions = self._solution.decisions
        turn = view.turn
        if turn >= len(decisions):
            return _USED_UP
        if self._policy.skill == 1.0:
            return decisions[turn]
        return self._imperfect(turn, decisions[turn])

    def _imperfect(self, turn: int, right: Decision) -> Decision:
        assert self._solution is not None
        seed = self._ctx.seed
        wrong = [
            place
            for place in range(self._solution.calls(turn))
            if derive("skill", seed, turn, place) / _SEEDS >= self._policy.skill
        ]
        if not wrong:
            return right
        message = orjson.loads(right.action)
        rng = random.Random(derive("mistake", seed, turn))
        for place in wrong:
            message["tool_calls"][place] = spoil(message["tool_calls"][place], self._solution.functions(), rng)
        return Decision(orjson.dumps(message))


class _Solution:
    """A task's solution. What only mistakes need is parsed when the first of them is asked for."""

    __slots__ = ("_calls", "_functions", "decisions", "lock", "ready")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.ready = False
        self.decisions: list[Decision] = []
        self._calls: list[int] | None = None
        self._functions: list[str] = []

    def fill(self, actions: Sequence[bytes]) -> None:
        self.decisions = [Decision(action) for action in actions]
        self.ready = True

    def calls(self, turn: int) -> int:
        """How many tool calls the action of a turn makes."""
        return self._parsed()[turn]

    def functions(self) -> list[str]:
        """The functions that the solution calls, sorted."""
        self._parsed()
        return self._functions

    def _parsed(self) -> list[int]:
        if self._calls is None:
            messages: list[dict[str, Any]] = [orjson.loads(decision.action) for decision in self.decisions]
            made = [message.get("tool_calls") or [] for message in messages]
            self._functions = sorted({call["function"]["name"] for calls in made for call in calls})
            self._calls = [len(calls) for calls in made]
        return self._calls
