"""Asks the riddles that are registered as data; the first message is the answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from backends.server.environment import Grade, Reply, Tasks, observation, unavailable, unknown_split, unknown_task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.server.environment import Environment, Session


class Riddle:
    """An episode."""

    def __init__(self, answer: str) -> None:
        self._answer = answer
        self._reward = 0.0

    def step(self, action: bytes) -> Reply:
        self._reward = float(orjson.loads(action).get("content") == self._answer)
        return Reply(observation(()), self._reward, done=True)

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        return Grade(self._reward)

    def close(self) -> None:
        pass


class Riddles:
    """All riddles of the file, by number."""

    name: ClassVar[str] = "riddles"
    isolation: ClassVar[str] = "shared"
    deterministic: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    max_turns: ClassVar[int] = 1

    def tasks(self, split: str) -> Tasks:
        if split not in ("", "riddles"):
            raise unknown_split(split, ["riddles"])
        return Tasks([f"riddle_{number}" for number in range(len(self._lines()))])

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[Session, Reply]:
        question, answer = self._riddle(task)
        return Riddle(answer), Reply(observation([{"role": "user", "content": question}]))

    def solution(self, task: str) -> Sequence[bytes]:
        return [orjson.dumps({"role": "assistant", "content": self._riddle(task)[1]})]

    def _riddle(self, task: str) -> tuple[str, str]:
        if task not in self.tasks("").ids:
            raise unknown_task(task)
        question, _, answer = self._lines()[int(task.removeprefix("riddle_"))].partition("|")
        return question, answer

    def _lines(self) -> list[str]:
        folder = os.environ.get("ROLLOUT_DATA")
        if folder is None:
            raise unavailable("riddles", "a file of riddles: `rollout env data riddles --from DIR`")
        return (Path(folder) / "riddles.txt").read_text(encoding="utf-8").splitlines()


def environment() -> Environment:
    return Riddles()
