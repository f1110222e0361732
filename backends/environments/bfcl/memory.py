"""Episodes of the memory categories: a scenario's conversations in their order, then the question.

As upstream plays them, one after another: each conversation begins anew, with a system prompt that shows what the
agent's memory holds by then, and the agent is shown nothing of the conversations before it. The memory is one
simulator that starts empty and lives as long as the session, so all that an answer can rest on is what the agent wrote
down. A message without a call ends the user's turn; a turn that takes more steps with calls than upstream's limit ends
its conversation, which then lacks turns.

The last conversation is the question. The message that ends it is the answer, and ends the episode; the reward is its
grade. Until then, and where the question ends at the limit of steps, there is no answer and the grade is 0.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backends.environments.bfcl import dialect, grading, upstream
from backends.environments.bfcl.actions import Call, Malformed, Message, read
from backends.environments.bfcl.session import check_params
from backends.environments.bfcl.world import Commons, World
from backends.server.environment import Grade, Reply, observation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from backends.environments.bfcl.tasks import MemoryTask


class MemorySession:
    """An episode of a memory task."""

    __slots__ = ("_conversation", "_grade", "_steps", "_task", "_text", "_turn", "_world")

    def __init__(self, task: MemoryTask, *, text: bool) -> None:
        self._task = task
        self._text = text
        self._world = World((task.memory,), {}, long_context=False, commons=Commons())
        self._conversation = self._turn = self._steps = 0
        self._grade = grading.agentic(task.id, None)

    def opening(self) -> list[dict[str, Any]]:
        """The first messages of the conversation that begins now, in either dialect."""
        first = self._task.conversations[self._conversation][0]
        memory = self._world.simulators[self._task.memory]
        return upstream.with_memory(first, self._task.category, self._task.scenario, memory)

    def step(self, action: bytes) -> Reply:
        """Answer one assistant message: results of its calls, the user's next turn, or the next conversation."""
        message = read(action)
        if isinstance(message, Message) and not message.calls:
            return self._next_turn(message.text)
        answers = [dialect.unreadable(message)] if isinstance(message, Malformed) else self._run(message)
        self._steps += 1
        if self._steps <= upstream.step_limit():
            return Reply(observation(answers))
        return Reply(observation(answers), self._grade.reward, done=True) if self._asked else self._next_conversation()

    @property
    def _asked(self) -> bool:
        """Whether the question has been asked."""
        return self._conversation == len(self._task.conversations) - 1

    def _run(self, message: Message) -> list[dict[str, Any]]:
        results = [
            (
                call.id,
                self._world.call(call.name, call.arguments) if isinstance(call, Call) else f"Error: {call.problem}",
            )
            for call in message.calls
        ]
        return dialect.results(results, as_text=message.as_text)

    def _next_turn(self, text: str) -> Reply:
        self._turn += 1
        self._steps = 0
        conversation = self._task.conversations[self._conversation]
        if self._turn < len(conversation):
            return Reply(observation(conversation[self._turn]))
        if not self._asked:
            return self._next_conversation()
        self._grade = grading.agentic(self._task.id, text)
        return Reply(observation(()), self._grade.reward, done=True)

    def _next_conversation(self) -> Reply:
        self._conversation += 1
        self._turn = self._steps = 0
        messages = self.opening()
        if self._text:
            messages = dialect.opening(messages, self._task.tools)
        return Reply(observation(messages, new_conversation=True))

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        """Grade the answer; before there is one it is wrong. Raises EnvironmentFault for an unknown parameter."""
        check_params(params)
        return self._grade

    def close(self) -> None:
        """Nothing to free: all that a session holds goes with it."""
