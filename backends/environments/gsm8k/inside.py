"""GSM8K inside the sandbox: poses a problem, grades the number that the agent ends with.

Tasks are `test_N` and `train_N`, N counted from 0 in the order of the data's lines. Splits: `gsm8k` (all, train first),
`gsm8k:train`, `gsm8k:test`, `gsm8k:val` (the same as test); the default is `gsm8k:test`. The first message without a
tool call is the answer and ends the episode. Options of `open`: `style`, how the answer is found (`strict`, which is
the default, `flexible` or `boxed`: see `answers`); `calculator` (false), whether the agent has one.

The problems are those registered as data, else a few of our own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import orjson

from backends.environments.gsm8k.answers import STYLES, extract
from backends.environments.gsm8k.calculator import calculate
from backends.server.environment import (
    EnvironmentFault,
    Grade,
    Reply,
    Tasks,
    Toolset,
    observation,
    unknown_split,
    unknown_task,
)
from backends.server.messages import read_message
from backends.server.wire import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from fractions import Fraction

PARTS: Final = ("train", "test")
MAX_CALLS: Final = 16
"""Tool calls of one message that are carried out."""
_SHIPPED: Final = Path(__file__).parent / "shipped"
_ASKED: Final = {
    "strict": "End your answer with a line `#### N`, where N is the final number.",
    "flexible": "End your answer with the final number.",
    "boxed": "Put the final number into \\boxed{}.",
}
_CALCULATOR: Final = Toolset(
    [
        {
            "type": "function",
            "function": {
                "name": "calculator",
                "description": "Work out an expression of numbers, + - * / and brackets, exactly.",
                "parameters": {
                    "type": "object",
                    "properties": {"expression": {"type": "string", "description": "Such as (12 + 4) * 3 / 2."}},
                    "required": ["expression"],
                },
            },
        }
    ]
)


class Problem(NamedTuple):
    """One line of the data."""

    question: str
    answer: str
    gold: Fraction


def environment() -> Gsm8k:
    """The entry point that the server calls. Raises EnvironmentFault for data that cannot be read."""
    given = os.environ.get("ROLLOUT_DATA")
    folder = Path(given) if given else _SHIPPED
    return Gsm8k({part: load(folder / f"{part}.jsonl") for part in PARTS})


def load(path: Path) -> list[Problem]:
    """The problems of a JSONL file with `question` and `answer`. Raises EnvironmentFault that names the line."""
    problems: list[Problem] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise EnvironmentFault(ErrorCode.UNAVAILABLE, f"{path.name} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if (problem := _problem(line)) is None:
            why = f"{path.name}, line {number}: not an object with `question` and an `answer` that ends in `#### N`"
            raise EnvironmentFault(ErrorCode.UNAVAILABLE, why)
        problems.append(problem)
    return problems


def _problem(line: bytes) -> Problem | None:
    try:
        entry = orjson.loads(line)
        gold = extract(entry["answer"], "strict")
        return None if gold is None else Problem(str(entry["question"]), entry["answer"], gold)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


class Gsm8k:
    """All problems. One object serves all sessions of its process."""

    name: ClassVar[str] = "gsm8k"
    isolation: ClassVar[str] = "shared"
    deterministic: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    max_turns: ClassVar[int] = 32

    def __init__(self, parts: Mapping[str, Sequence[Problem]]) -> None:
        self._parts = parts

    def tasks(self, split: str) -> Tasks:
        """The tasks of a split. Raises EnvironmentFault."""
        known = {"gsm8k": PARTS, "gsm8k:train": ("train",), "gsm8k:test": ("test",), "gsm8k:val": ("test",)}
        if (split or "gsm8k:test") not in known:
            raise unknown_split(split, list(known))
        return Tasks([f"{part}_{n}" for part in known[split or "gsm8k:test"] for n in range(len(self._parts[part]))])

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[Attempt, Reply]:
        """Pose the problem; the seed changes nothing. Raises EnvironmentFault."""
        style, calculator = _read(options)
        problem = self._find(task)
        toolset = _CALCULATOR if calculator else None
        messages = [{"role": "user", "content": f"{problem.question}\n\n{_ASKED[style]}"}]
        return Attempt(problem.gold, style, calculator), Reply(observation(messages, toolset=toolset), toolset=toolset)

    def solution(self, task: str) -> Sequence[bytes]:
        """The data's own solution, whose end is right in every style. Raises EnvironmentFault."""
        text, mark, final = self._find(task).answer.rpartition("####")
        content = f"{text}The answer is \\boxed{{{final.strip()}}}.\n{mark}{final}"
        return [orjson.dumps({"role": "assistant", "content": content})]

    def _find(self, task: str) -> Problem:
        part, _, number = task.partition("_")
        problems = self._parts.get(part, ())
        if not (number.isdecimal() and number.isascii() and len(number) < 9 and int(number) < len(problems)):
            has = ", ".join(f"{name}_0 to {name}_{len(many) - 1}" for name, many in self._parts.items())
            raise unknown_task(task, f"there are {has}")
        return problems[int(number)]


class Attempt:
    """One try at one problem."""

    __slots__ = ("_answer", "_calculator", "_gold", "_style")

    def __init__(self, gold: Fraction, style: str, calculator: bool) -> None:
        self._gold = gold
        self._style = style
        self._calculator = calculator
        self._answer: str | None = None

    def step(self, action: bytes) -> Reply:
        """Work out the calls of a message, or take it as the answer."""
        said = read_message(action)
        if isinstance(said, str):
            return _said(said)
        if said.calls:
            return Reply(observation([self._called(call) for call in said.calls[:MAX_CALLS]]))
        if not said.text.strip():
            return _said("your message is empty; answer the problem")
        self._answer = said.text
        return Reply(observation([]), self.evaluate({}).reward, done=True)

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        """1.0 for the right number, else 0.0."""
        found = None if self._answer is None else extract(self._answer, self._style)
        details = {
            "answered": self._answer is not None,
            "style": self._style,
            "found": None if found is None else str(found),
        }
        return Grade(float(found == self._gold), details)

    def close(self) -> None:
        """Nothing is held."""

    def _called(self, call: object) -> dict[str, Any]:
        call = call if isinstance(call, dict) else {}
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        number = call.get("id")
        return {
            "role": "tool",
            "tool_call_id": number if isinstance(number, str) and len(number) <= 128 else "",
            "content": self._worked_out(function.get("name"), function.get("arguments")),
        }

    def _worked_out(self, name: object, arguments: object) -> str:
        if not self._calculator or name != "calculator":
            return "error: there is no such tool" + ("; the only one is calculator" if self._calculator else "")
        try:
            given = orjson.loads(arguments) if isinstance(arguments, str) else arguments
        except orjson.JSONDecodeError:
            given = None
        expression = given.get("expression") if isinstance(given, dict) else None
        return calculate(expression) if isinstance(expression, str) else "error: `expression` must be a string"


def _read(options: Mapping[str, Any]) -> tuple[str, bool]:
    if unknown := options.keys() - {"style", "calculator"}:
        raise _refused(f"unknown option {min(unknown)!r}; gsm8k takes: style, calculator")
    style, calculator = options.get("style", STYLES[0]), options.get("calculator", False)
    if style not in STYLES:
        raise _refused(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    if not isinstance(calculator, bool):
        raise _refused("the option 'calculator' must be true or false")
    return style, calculator


def _refused(why: str) -> EnvironmentFault:
    return EnvironmentFault(ErrorCode.BAD_REQUEST, why)


def _said(text: str) -> Reply:
    return Reply(observation([{"role": "user", "content": text}]))
