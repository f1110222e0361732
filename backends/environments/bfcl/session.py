"""Episodes. A session owns its world and the record of the calls made; all else it shares, and never changes.

Multi-turn, as upstream plays it: a message with calls is answered by their results and the user's turn goes on; a
message without a call ends the turn, and the user's next one follows, with the functions that were held out until then.
A turn takes at most upstream's limit of steps with calls: the one beyond it ends the episode, which then lacks turns
(in the last turn none is lacking, and upstream grades it as it stands). Rewards are 0.0 up to the end, then the grade.

A call that cannot be read gets an answer that says why, beside the results of the others; a message that cannot be
read gets one from the user. Both count as a step, and neither ends the turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backends.environments.bfcl import dialect, grading, upstream
from backends.environments.bfcl.actions import Call, Malformed, Message, read
from backends.environments.bfcl.world import Commons, Recorded, World
from backends.server.environment import EnvironmentFault, Grade, Reply, observation
from backends.server.wire import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from backends.environments.bfcl.tasks import MultiTurnTask, SingleTurnTask


def check_params(params: Mapping[str, Any]) -> None:
    """Refuse what evaluate does not know. `sparse` is accepted and changes nothing: rewards here are sparse."""
    if unknown := params.keys() - {"sparse"}:
        raise EnvironmentFault(ErrorCode.BAD_REQUEST, f"unknown parameter {min(unknown)!r}; evaluate takes: sparse")


class MultiTurnSession:
    """An episode of a multi-turn task."""

    __slots__ = ("_grade", "_steps", "_task", "_text", "_turns", "_world")

    def __init__(self, task: MultiTurnTask, *, text: bool) -> None:
        self._task = task
        self._text = text
        self._world = World(task.simulators, task.configuration, long_context=task.long_context, commons=Commons())
        self._turns: list[list[tuple[Recorded, ...]]] = [[]]
        self._steps = 0
        self._grade: Grade | None = None

    def step(self, action: bytes) -> Reply:
        """Answer one assistant message: results of its calls, or the user's next turn."""
        message = read(action)
        self._grade = None
        if isinstance(message, Message) and not message.calls:
            return self._next_turn()
        answers = [dialect.unreadable(message)] if isinstance(message, Malformed) else self._run(message)
        self._steps += 1
        if self._steps > upstream.step_limit():
            return Reply(observation(answers), self._graded().reward, done=True)
        return Reply(observation(answers))

    def _run(self, message: Message) -> list[dict[str, Any]]:
        results: list[tuple[str, str]] = []
        recorded: list[Recorded] = []
        for call in message.calls:
            if isinstance(call, Call):
                recorded.append(Recorded(call.name, call.source))
                results.append((call.id, self._world.call(call.name, call.arguments)))
            else:
                results.append((call.id, f"Error: {call.problem}"))
        if recorded:
            self._turns[-1].append(tuple(recorded))
        return dialect.results(results, as_text=message.as_text)

    def _next_turn(self) -> Reply:
        turn = len(self._turns)
        if turn == len(self._task.turns):
            return Reply(observation(()), self._graded().reward, done=True)
        self._turns.append([])
        self._steps = 0
        messages, added = self._task.turns[turn], self._task.added.get(turn, ())
        if self._text and added:
            return Reply(observation(dialect.with_functions(messages, added)))
        return Reply(observation(messages, tools_added=added))

    def _graded(self) -> Grade:
        if self._grade is None:
            self._grade = grading.multi_turn(self._task, self._turns)
        return self._grade

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        """Grade the turns begun so far; changes nothing. Raises EnvironmentFault for an unknown parameter."""
        check_params(params)
        return self._graded()

    def close(self) -> None:
        """Nothing to free: all that a session holds goes with it."""


class SingleTurnSession:
    """An episode of a single-turn task: the first message ends it."""

    __slots__ = ("_answer", "_task")

    def __init__(self, task: SingleTurnTask) -> None:
        self._task = task
        self._answer: list[Recorded] | None = None

    def step(self, action: bytes) -> Reply:
        """Take the answer and grade it."""
        answers: list[dict[str, Any]] = []
        match read(action):
            case Malformed() as message:
                answers = [dialect.unreadable(message)]
            case Message(calls, as_text) if problems := [call for call in calls if isinstance(call, Malformed)]:
                answers = dialect.results([(call.id, f"Error: {call.problem}") for call in problems], as_text=as_text)
            case Message(calls):
                self._answer = [Recorded(call.name, call.source) for call in calls if isinstance(call, Call)]
        return Reply(observation(answers), grading.single_turn(self._task, self._answer).reward, done=True)

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        """Grade the answer; before there is one it is wrong. Raises EnvironmentFault for an unknown parameter."""
        check_params(params)
        return grading.single_turn(self._task, self._answer)

    def close(self) -> None:
        """Nothing to free: all that a session holds goes with it."""
