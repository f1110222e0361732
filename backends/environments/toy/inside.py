"""Count to a target; every way in which a sandbox can fail, on request.

A task `toy_N` asks for the target 1 + N % 7. The agent says `add K`, then `stop`; the reward is 1.0 when the total is
the target, else 0.5 ** distance. The first word of a message's content is the command; faults for tests:

    sleep S    wait S seconds without blocking the others        block S    hold the process for S seconds
    crash      end the process (exit code 9)                     abort      SIGABRT
    hang       never return from C code                          spin       never return from Python code
    big N      an observation of N bytes                         memory N   allocate and touch N MiB
    error      raise in step                                     nan        a reward that is not a number
    random     an observation that differs at every run          badgrade   raise at the next evaluate

Tasks of the split `faults` fail when they open: `open_crash`, `open_hang`, `open_error`, `open_sleep`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from backends.server.environment import Grade, Reply, Tasks, observation, unknown_split, unknown_task

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

TASKS = 64
FAULTS = ("open_crash", "open_hang", "open_error", "open_sleep")


def environment() -> Toy:
    """The entry point that the server calls."""
    return Toy()


class Toy:
    """Deterministic unless an action asks for the opposite."""

    name: ClassVar[str] = "toy"
    isolation: ClassVar[str] = "shared"
    deterministic: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    max_turns: ClassVar[int] = 64

    def tasks(self, split: str) -> Tasks:
        """`toy` (64 tasks, the default; `:train` has the even ones, `:val` the odd ones), or `faults`."""
        name, _, part = (split or "toy").partition(":")
        if name == "faults" and not part:
            return Tasks(FAULTS)
        if name != "toy" or part not in {"", "train", "val"}:
            raise unknown_split(split, ["toy", "toy:train", "toy:val", "faults"])
        start, stride = {"": (0, 1), "train": (0, 2), "val": (1, 2)}[part]
        return Tasks([f"toy_{n}" for n in range(start, TASKS, stride)])

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[ToySession, Reply]:
        """Ask for the target; the seed is part of the question, so that tests can see it arrive."""
        session = ToySession(_target(task))
        if task == "open_crash":
            os._exit(9)
        if task == "open_hang":
            _hang()
        if task == "open_error":
            raise RuntimeError("this task cannot be opened")
        if task == "open_sleep":
            time.sleep(0.2)
        text = f"Count to {session.target} with `add K`, then say `stop`. (seed {seed})"
        return session, Reply(observation([{"role": "user", "content": text}]))

    def solution(self, task: str) -> Sequence[bytes]:
        """One `add 1` for each unit of the target, then `stop`."""
        words = ["add 1"] * _target(task) + ["stop"]
        return [orjson.dumps({"role": "assistant", "content": word}) for word in words]


class ToySession:
    """A running total."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.total = 0
        self.ballast: list[bytearray] = []
        self.grade_fails = False

    def step(self, action: bytes) -> Reply | Awaitable[Reply]:
        """Run the command in the message's content."""
        try:
            content = orjson.loads(action).get("content") or ""
        except (orjson.JSONDecodeError, AttributeError):
            return self._say("that was not an assistant message")
        command, _, argument = str(content).partition(" ")
        handler = _COMMANDS.get(command)
        return self._say(f"unknown command {command[:40]!r}") if handler is None else handler(self, argument.strip())

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        """1.0 at the target, half for each unit of distance."""
        if self.grade_fails:
            raise RuntimeError("this session cannot be graded")
        distance = abs(self.target - self.total)
        return Grade(0.5**distance, {"total": self.total, "target": self.target})

    def close(self) -> None:
        """Free the ballast."""
        self.ballast.clear()

    def _say(self, text: str, *, reward: float = 0.0, done: bool = False) -> Reply:
        return Reply(observation([{"role": "user", "content": text}]), reward, done)

    def add(self, argument: str) -> Reply:
        """Add to the total."""
        if not argument.lstrip("-").isdigit():
            return self._say("add needs an integer")
        self.total += int(argument)
        return self._say(f"total {self.total}")

    def stop(self, argument: str) -> Reply:
        """End the episode."""
        return self._say("stopped", done=True)

    async def sleep(self, argument: str) -> Reply:
        """Wait without blocking the other sessions."""
        await asyncio.sleep(float(argument))
        return self._say("slept")

    def block(self, argument: str) -> Reply:
        """Hold the whole process."""
        time.sleep(float(argument))
        return self._say("blocked")

    def crash(self, argument: str) -> Reply:
        """End the process."""
        os._exit(9)

    def abort(self, argument: str) -> Reply:
        """End the process by SIGABRT."""
        os.abort()

    def hang(self, argument: str) -> Reply:
        """Never return from C code."""
        _hang()
        return self._say("unreachable")

    def spin(self, argument: str) -> Reply:
        """Never return from Python code."""
        while True:
            pass

    def big(self, argument: str) -> Reply:
        """A large observation."""
        return self._say("x" * int(argument))

    def memory(self, argument: str) -> Reply:
        """Allocate and touch memory."""
        self.ballast.append(bytearray(b"\x01") * (int(argument) << 20))
        return self._say("allocated")

    def error(self, argument: str) -> Reply:
        """Raise, as a broken environment does."""
        raise RuntimeError("the environment is broken on request")

    def nan(self, argument: str) -> Reply:
        """A reward that is not a number."""
        return self._say("nan", reward=float("nan"))

    def random(self, argument: str) -> Reply:
        """An observation that no replay can repeat."""
        return self._say(os.urandom(8).hex())

    def badgrade(self, argument: str) -> Reply:
        """Make the next evaluate raise."""
        self.grade_fails = True
        return self._say("grading will fail")


def _target(task: str) -> int:
    if task in FAULTS:
        return 1
    prefix, _, number = task.rpartition("_")
    if prefix != "toy" or not number.isdigit() or int(number) >= TASKS:
        raise unknown_task(task, f"toy_0 to toy_{TASKS - 1}, {', '.join(FAULTS)}")
    return 1 + int(number) % 7


def _hang() -> None:
    """A loop inside C that holds the interpreter lock and never looks at signals."""
    sum(itertools.repeat(0, 2**62))


_COMMANDS: dict[str, Callable[[ToySession, str], Reply | Awaitable[Reply]]] = {
    name: getattr(ToySession, name)
    for name in (
        "add",
        "stop",
        "sleep",
        "block",
        "crash",
        "abort",
        "hang",
        "spin",
        "big",
        "memory",
        "error",
        "nan",
        "random",
        "badgrade",
    )
}
