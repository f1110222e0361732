"""The registered data: which tasks there are, where each one's files lie, and its known solution.

Splits are the data's own, named with or without the environment: `train`, `dev`, `test_normal`, `test_challenge`, also
as `appworld:train` and so on. `appworld` is train and dev, `appworld:val` is dev, and the default is `appworld:train`.
Ids are in the data's order. Reads files alone: the package is never imported here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from backends.server.environment import EnvironmentFault, Tasks, unavailable, unknown_split, unknown_task
from backends.server.wire import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAME: Final = "appworld"
_FILES: Final = {"train": "train", "dev": "dev", "val": "dev", "test_normal": "test_normal"} | {
    "test_challenge": "test_challenge"
}
_WHOLE: Final = ("train", "dev")
_ID: Final = re.compile(r"[0-9a-z]+_[0-9]+")


class Data:
    """A folder that holds `data` as the package lays it out; None where none is registered."""

    def __init__(self, root: Path | None) -> None:
        self._root = root

    @classmethod
    def registered(cls) -> Data:
        """What the sandbox was started with."""
        given = os.environ.get("ROLLOUT_DATA")
        return cls(Path(given) if given else None)

    @property
    def root(self) -> Path:
        """The folder. Raises EnvironmentFault where there is none."""
        if self._root is None:
            raise unavailable("AppWorld", "its data, which nobody has registered: run `rollout env data appworld`")
        return self._root

    def split(self, name: str) -> Tasks:
        """The tasks of a split. Raises EnvironmentFault."""
        side = name.removeprefix(f"{NAME}:") if name else "train"
        if side == NAME:
            return Tasks([task for part in _WHOLE for task in self._listed(part)])
        if side not in _FILES:
            raise unknown_split(name, [NAME, *(f"{NAME}:{known}" for known in _FILES)])
        return Tasks(list(self._listed(_FILES[side])))

    def folder(self, task: str) -> Path:
        """A task's folder. Raises EnvironmentFault."""
        if _ID.fullmatch(task) is not None:
            folder = self.root / "data" / "tasks" / task
            if (folder / "specs.json").is_file():
                return folder
        raise unknown_task(task, "the splits name those that there are")

    def truths(self) -> list[Path]:
        """The folders with what grades a task, which its sessions must not see."""
        if self._root is None:
            return []
        return sorted(self._root.glob("data/tasks/*/ground_truth"))

    def solution(self, task: str) -> Sequence[bytes]:
        """The data's own code for a task, and the call that completes it. Raises EnvironmentFault where it has none."""
        path = self.folder(task) / "ground_truth" / "compiled_solution.py"
        try:
            code = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise unavailable(f"the solution of {task}", "one in the data, which has them for train and dev") from None
        codes = [f"{code.rstrip()}\n\nsolution(apis, requester)"]
        if "complete_task" not in code:
            codes.append("apis.supervisor.complete_task()")
        return [orjson.dumps({"role": "assistant", "content": f"```python\n{code}\n```"}) for code in codes]

    def _listed(self, part: str) -> Iterator[str]:
        """The ids of one file, without the tags that some carry. Raises EnvironmentFault where it cannot be read."""
        path = self.root / "data" / "datasets" / f"{part}.txt"
        try:
            lines = path.read_text(encoding="utf-8").split()
        except OSError as error:
            raise EnvironmentFault(ErrorCode.UNAVAILABLE, f"{path.name} cannot be read: {error}") from None
        for line in lines:
            yield line.partition(":")[0]
