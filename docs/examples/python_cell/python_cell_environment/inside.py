"""A Python cell: the agent runs code and leaves the result in `answer`. An example of an environment that runs code.

The code of a message (a block ```python ... ```) runs in the session's own process, in one namespace; a message without
a block ends the episode. The answers lie in `truth/`, which that process cannot read: it exports the value of `answer`,
and another process, where no code of the agent's ever ran, compares.
"""

from __future__ import annotations

import json
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from traceback import format_exception_only
from typing import TYPE_CHECKING, Any, ClassVar, Final

import orjson

from backends.server.environment import Grade, Reply, Tasks, observation, unknown_split, unknown_task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TRUTH: Final = Path(__file__).parent / "truth"
ASKED: Final = {
    "primes": "a list of the first 25 prime numbers, in order",
    "collatz": "the number below 1000 whose Collatz sequence takes the most steps to reach 1",
    "anagrams": "how many distinct words can be written with the letters of 'banana', all six used",
    "fridays": "the number of Fridays the 13th in the years 2001 to 2100",
    "squares": "a dict from each integer 0 to 9 (as a text) to the list of the last digits of its first four powers",
}
SHOWN: Final = 4000
"""Characters of output that are shown."""
_BLOCK: Final = re.compile(r"```python\n(.*?)(?:```|\Z)", re.DOTALL)


def environment() -> PythonCell:
    """The entry point that the server calls, once."""
    return PythonCell()


class PythonCell:
    """All tasks."""

    name: ClassVar[str] = "python_cell"
    isolation: ClassVar[str] = "process"
    deterministic: ClassVar[bool] = True
    runs_code: ClassVar[bool] = True
    max_turns: ClassVar[int] = 20

    def tasks(self, split: str) -> Tasks:
        """`python_cell`: all of them."""
        if (split or self.name) != self.name:
            raise unknown_split(split, [self.name])
        return Tasks(list(ASKED))

    def secrets(self) -> Sequence[Path]:
        """What no session's process can read."""
        return [TRUTH]

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[Cell, Reply]:
        """An empty cell and what is asked for; the seed changes nothing."""
        text = (
            f"Leave {checked(task)} in the variable `answer`. Each block ```python ...``` that you write is run, and "
            "you see what it prints. Write a message without a block when you are done."
        )
        return Cell(), Reply(observation([{"role": "user", "content": text}]))

    def grade(self, task: str, seed: int, options: Mapping[str, Any], state: bytes, params: Mapping[str, Any]) -> Grade:
        """1.0 where the exported answer is the right one, else 0.0."""
        try:
            found = orjson.loads(state)
        except orjson.JSONDecodeError:
            return Grade(0.0, {"why": "what was exported is not JSON"})
        return Grade(float(found == known(task)["answer"]))

    def solution(self, task: str) -> Sequence[bytes]:
        """The known code, then the end."""
        contents = (f"```python\n{known(task)['code']}\n```", "Done.")
        return [orjson.dumps({"role": "assistant", "content": content}) for content in contents]


def checked(task: str) -> str:
    """What a task asks for. Raises EnvironmentFault."""
    if task not in ASKED:
        raise unknown_task(task, f"there are {', '.join(ASKED)}")
    return ASKED[task]


def known(task: str) -> dict[str, Any]:
    """A task's `answer` and `code`. Raises EnvironmentFault; OSError in a session's process."""
    checked(task)
    found: dict[str, Any] = orjson.loads((TRUTH / "answers.json").read_bytes())[task]
    return found


class Cell:
    """One episode, in a process of its own: the code may do there what it likes."""

    def __init__(self) -> None:
        self._names: dict[str, Any] = {"__name__": "__main__"}

    def step(self, action: bytes) -> Reply:
        """Run a message's block; a message without one ends the episode."""
        try:
            content = orjson.loads(action)["content"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            content = None
        if not isinstance(content, str) or not content.strip():
            return Reply(observation([{"role": "user", "content": "Write a block of code, or that you are done."}]))
        if (block := _BLOCK.search(content)) is None:
            return Reply(observation([]), done=True)
        return Reply(observation([{"role": "user", "content": self._run(block[1])}]))

    def _run(self, code: str) -> str:
        output = StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            try:
                exec(compile(code, "<cell>", "exec"), self._names)
            except BaseException as error:  # noqa: BLE001  # whatever the agent's code raises is the agent's to see
                output.write("".join(format_exception_only(error)))
        return output.getvalue()[:SHOWN].encode("utf-8", "backslashreplace").decode() or "(no output)"

    def export(self) -> bytes:
        """The answer as JSON; null where there is none that can be written so."""
        try:
            return json.dumps(self._names.get("answer")).encode()
        except (TypeError, ValueError, RecursionError):
            return b"null"

    def close(self) -> None:
        """Nothing is held."""
