"""The policy that a user writes: one function, or a fixed list of messages.

The function is called as `function(view, ctx)` once a turn, may be async, and returns a `Decision`, an OpenAI assistant
message (a dict, or its JSON as bytes), or a str (its content). A plain function runs in the event loop: it must be
quick, and one that waits must be async. To be resumable, it decides by (view, ctx) alone.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import orjson

from orchestrator.errors import PolicyError, UsageError
from orchestrator.types import Decision, Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import ModuleType

    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView

    Answer: TypeAlias = Decision | bytes | str | Mapping[str, object]
    Script: TypeAlias = Callable[[ConversationView, EpisodeContext], Answer | Awaitable[Answer]]


class ScriptedPolicy:
    """Acts by the user's function. `calls_model=True` says that its decisions are costly and worth a step journal."""

    name = "scripted"
    needs_solutions = False

    def __init__(self, function: Script, *, calls_model: bool = False) -> None:
        if not callable(function):
            raise UsageError(f"a script is a function of (view, ctx); {function!r:.80} cannot be called")
        self._function = function
        self.calls_model = calls_model

    @classmethod
    def from_messages(cls, messages: Sequence[Answer]) -> ScriptedPolicy:
        """Play a fixed list, the n-th at turn n; an episode that asks for more fails with kind `policy`.

        Raises UsageError where a message is none.
        """
        try:
            decisions = [decision(message, f"message {place}") for place, message in enumerate(messages)]
        except PolicyError as error:
            raise UsageError(error.failure.message) from error

        def play(view: ConversationView, ctx: EpisodeContext) -> Decision:
            if view.turn < len(decisions):
                return decisions[view.turn]
            raise _wrong(f"the list of {len(decisions)} messages is used up; {ctx.key} asks for another")

        return cls(play)

    @classmethod
    def from_file(cls, place: str) -> ScriptedPolicy:
        """Load `FILE.py:NAME`, where NAME is a function or a list of messages. Raises UsageError."""
        file, colon, name = place.rpartition(":")
        if not colon or not file or not name:
            raise UsageError(f"a script is named FILE.py:FUNCTION; {place!r} is not")
        found = getattr(_load(Path(file)), name, None)
        if found is None:
            raise UsageError(f"{file} has no {name!r}; define it as `def {name}(view, ctx)`")
        if isinstance(found, list | tuple):
            return cls.from_messages(found)
        return cls(found)

    def __repr__(self) -> str:
        return f"ScriptedPolicy({getattr(self._function, '__qualname__', self._function)})"

    def start(self, ctx: EpisodeContext) -> ScriptedAgent:
        """An agent that calls the function with this context."""
        return ScriptedAgent(self._function, ctx)


class ScriptedAgent:
    """Calls the user's function for one episode."""

    __slots__ = ("_ctx", "_function")

    def __init__(self, function: Script, ctx: EpisodeContext) -> None:
        self._function = function
        self._ctx = ctx

    async def act(self, view: ConversationView) -> Decision:
        """What the function answers. Raises whatever it raises, and PolicyError where that is no decision."""
        answer = self._function(view, self._ctx)
        if inspect.isawaitable(answer):
            answer = await answer
        return decision(answer, f"the answer at turn {view.turn}")


def decision(answer: Answer, what: str) -> Decision:
    """Make a Decision of anything that a script may return. Raises PolicyError that calls it `what`."""
    match answer:
        case Decision(action=bytes()):
            _check(answer.action, what)
            return answer
        case str():
            return Decision(orjson.dumps({"role": "assistant", "content": answer}))
        case bytes():
            _check(answer, what)
            return Decision(answer)
        case Mapping():
            return Decision(_dump({"role": "assistant", **answer}, what))
    raise _wrong(
        f"{what} is a {type(answer).__name__}; return a Decision, an OpenAI assistant message "
        "(dict, or its JSON as bytes) or a str"
    )


def _dump(message: dict[str, object], what: str) -> bytes:
    try:
        action = orjson.dumps(message)
    except TypeError as error:
        raise _wrong(f"{what} is not JSON: {error}") from error
    _check(action, what)
    return action


def _check(action: bytes, what: str) -> None:
    try:
        message = orjson.loads(action)
    except orjson.JSONDecodeError as error:
        raise _wrong(f"{what} is not JSON: {error}; return the JSON of an OpenAI assistant message") from error
    if not isinstance(message, dict) or message.get("role") != "assistant":
        raise _wrong(f'{what} is not an OpenAI message with "role": "assistant"')


def _wrong(message: str) -> PolicyError:
    return PolicyError(Failure(FailureKind.POLICY, "act", message))


def _load(file: Path) -> ModuleType:
    if not file.is_file():
        raise UsageError(f"there is no script {file}; give the path of a Python file")
    name = f"rollout_script_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own module may raise anything
        raise UsageError(f"{file} cannot be loaded: {type(error).__name__}: {error}") from error
    return module
