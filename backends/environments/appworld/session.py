"""An episode: what the agent says is read, run in its world, and answered.

Rewards are 0.0 in every step: the truth is not here. The grade is made from `export` by another process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from backends.environments.appworld import prompts
from backends.environments.appworld.actions import TOOLSET, Call, Malformed, read
from backends.environments.appworld.world import World, now
from backends.server.environment import Reply, observation, unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from backends.environments.appworld.inside import Options
    from backends.server.environment import Grade

_OVER = "not run: the task has been called complete"


class AppWorldSession:
    """One try at one task."""

    __slots__ = ("_options", "_world")

    def __init__(self, world: World, options: Options) -> None:
        self._world = world
        self._options = options

    @classmethod
    def begin(cls, task: str, options: Options) -> tuple[Self, Reply]:
        """Open the world of a task; its first observation is the manual and the task."""
        world = World(task)
        manual = prompts.system(world.person, simple=options.simple, manual=options.prompt)
        messages = [{"role": "system", "content": manual}, {"role": "user", "content": world.instruction}]
        toolset = TOOLSET if options.tools else None
        return cls(world, options), Reply(observation(messages, toolset=toolset), toolset=toolset)

    def step(self, action: bytes) -> Reply:
        """Run the code of one assistant message, and say what came of it."""
        message = read(action, bare=self._options.simple)
        if isinstance(message, Malformed):
            return Reply(observation([{"role": "user", "content": message.problem}]))
        ends, done = now() + self._options.action_s, False
        answers: list[dict[str, Any]] = []
        for call in message.calls:
            content = _OVER if done else self._ran(call, ends - now())
            done = done or self._world.completed()
            answers.append(self._answer(call, content, as_text=message.as_text))
        return Reply(observation(answers), done=done)

    def export(self) -> bytes:
        """What the world's databases hold; see `World.export`."""
        return self._world.export()

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        """Not here: raises EnvironmentFault."""
        raise unavailable("grading", "a process that may see the truth: the environment's own `grade`")

    def close(self) -> None:
        """Close the world."""
        self._world.close()

    def _ran(self, call: Call | Malformed, within_s: float) -> str:
        if isinstance(call, Malformed):
            return f"Error: {call.problem}"
        if within_s <= 0:
            return f"not run: the calls before it took the {self._options.action_s} seconds of a message"
        return self._world.run(call.code, within_s)

    def _answer(self, call: Call | Malformed, content: str, *, as_text: bool) -> dict[str, Any]:
        if not as_text:
            return {"role": "tool", "tool_call_id": call.id, "content": content}
        if self._options.simple:
            return {"role": "user", "content": content}
        return {"role": "user", "content": f"Output:\n```\n{content.rstrip()}\n```\n\n"}
