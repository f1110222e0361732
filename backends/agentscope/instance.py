"""One instance of the training sandbox: an episode, spoken to in the training sandbox's shapes.

Owns the episode. Always true: `turns` counts the user's turns that were followed by another one; the last step's reward
is the grade. Where the instance is kept, and who may call it, is for its keeper to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import orjson

from backends.agentscope import dialect, shapes
from orchestrator.driven import DrivenEpisode
from orchestrator.errors import RunFailed, UsageError
from orchestrator.types import EpisodeSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.driven import Leases


class Instance:
    """See the module's docstring. Make one with `open`; `close` it in the end."""

    __slots__ = ("_questions", "_tools", "_turns", "environment", "episode")

    def __init__(self, environment: str, episode: DrivenEpisode, tools: bytes, questions: int) -> None:
        self.environment = environment
        self.episode = episode
        self._tools = tools
        """The opening's, as JSON: parsed they take many times the memory."""
        self._questions = questions
        self._turns = 0

    @classmethod
    async def open(
        cls, sandboxes: Leases, environment: str, task: str, params: Mapping[str, Any] | None, *, timeout: float
    ) -> Self:
        """Open an episode of `task`; `params` are those of `create`, `timeout` bounds one step in seconds.

        Raises UsageError, SandboxError (SandboxRefused: no such task), RunFailed. Cancelled: nothing is held.
        """
        options = shapes.options(params)
        seed = options.pop("seed", 0)
        if type(seed) is not int:
            raise UsageError("the parameter seed must be an integer")
        episode = await DrivenEpisode.open(sandboxes, EpisodeSpec(task, seed, timeout, options))
        try:
            reports = environment == shapes.REPORTING
            questions = shapes.questions(await episode.evaluate()) if reports else 1
            return cls(environment, episode, _toolset(episode), questions)
        except BaseException:
            episode.close()
            raise

    def opening(self, name: str) -> dict[str, Any]:
        """What creating it says; `name` is its id."""
        if self.episode.first is None:
            raise RunFailed("an opened episode has no observation")
        tools = orjson.loads(self._tools)
        said = shapes.info(self.environment, name, self.episode.spec.task, len(tools), self._questions)
        return {"state": dialect.opening(self.episode.first.body, tools), "info": said}

    async def step(self, action: object, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """The result of a step. Raises and is cancelled as `DrivenEpisode.step`."""
        message, as_text = shapes.action(action)
        observation = await self.episode.step(message)
        if not observation.done:
            self._turns += shapes.is_plain(action)
            return shapes.answer(observation, as_text=as_text)
        grade = await self.episode.evaluate(params or None)  # the last reward is the grade, with its parameters
        return shapes.answer(observation, grade.reward, as_text=as_text)

    async def evaluate(self, params: Mapping[str, Any] | None) -> float | dict[str, Any]:
        """Its grade as it stands. Raises as `DrivenEpisode.evaluate`."""
        evaluation = await self.episode.evaluate(params or None)
        sparse, done = bool((params or {}).get("sparse")), self.episode.done
        return shapes.score(
            self.environment, self.episode.spec.task, evaluation, sparse=sparse, turns=self._turns, done=done
        )

    def tools(self) -> str:
        """Its tools for people, one a line."""
        return shapes.tools_text(orjson.loads(self._tools))

    def close(self) -> None:
        """Forget it; a call under way fails. Idempotent."""
        self.episode.close()


def _toolset(episode: DrivenEpisode) -> bytes:
    if episode.first is None:
        raise RunFailed("an opened episode has no observation")
    digest = shapes.tools_of(episode.first.body)
    return episode.toolset(digest) if digest is not None else b"[]"
