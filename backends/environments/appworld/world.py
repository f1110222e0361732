"""One world of the package, this process's only one: runs code, says whether the task is done, exports its changes.

Owns the package's state in this process from construction to `close`. Always true: code that the agent wrote never
raises out of `run`, whatever it raises or breaks; the export is what the databases held when the last code ended. The
package freezes this process's clocks: only CLOCK_MONOTONIC_RAW goes on.
"""

from __future__ import annotations

import re
import shutil
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import orjson
from appworld import environment
from appworld.environment import AppWorld
from appworld.task import Task

from backends.environments.appworld import package

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_OUTPUT: Final = 100_000
"""Characters of what one call printed that the agent sees."""
_ADDRESS: Final = re.compile(r"\b0x[0-9a-f]{6,16}\b")
_INTERACTIONS: Final = 100_000
"""The package counts calls too; the engine's budget is the one that ends an episode."""


class _Posed(Task):  # type: ignore[misc]
    """A task whose databases of the beginning stay on the disk: the package would load them a second time, as large as
    the world's own, only to ask where they lie."""

    @classmethod
    def load(cls, **arguments: Any) -> Task:
        task = Task.load(**arguments)
        task.__class__ = cls
        return task

    @property
    def model_collection(self) -> SimpleNamespace:
        return SimpleNamespace(from_db_home_path=self.models_from_db_home_path)


environment.Task = _Posed


def now() -> float:
    """Seconds on a clock that nothing freezes."""
    return time.clock_gettime(time.CLOCK_MONOTONIC_RAW)


class World:
    """The world of `task`. Takes 0.1 s in a warm process."""

    def __init__(self, task: str) -> None:
        self._outputs = package.take_outputs()
        self._databases = package.databases(self._outputs, task)
        self._world = AppWorld(
            task,
            experiment_name=str(self._outputs),
            load_ground_truth=False,
            max_interactions=_INTERACTIONS,
            random_seed=package.SEED,
        )

    @property
    def instruction(self) -> str:
        """What the task is."""
        return str(self._world.task.instruction)

    @property
    def person(self) -> Mapping[str, str]:
        """Who it is for: first_name, last_name, email, phone_number."""
        return dict(self._world.task.supervisor)

    def run(self, code: str, within_s: float) -> str:
        """Run code and give what it printed, or how it failed; it is interrupted after about `within_s` seconds."""
        self._world.timeout_seconds = max(1, round(within_s))
        try:
            output = self._world.execute(code)
        except BaseException as error:  # noqa: BLE001  # the agent's code may raise, and break, anything
            self._recover()
            output = f"Execution failed. Traceback:\n{type(error).__name__}: {error}"
        return _shown(package.without_names(output, self._outputs))

    def completed(self) -> bool:
        """Whether the task has been called complete. A world that code has broken beyond an answer counts as over."""
        try:
            return bool(self._world.task_completed())
        except Exception:  # noqa: BLE001  # see `run`
            return True

    def export(self) -> bytes:
        """Each app's changes since the data's base, as JSON `{app: [[statement, values, many], ...]}`."""
        files = sorted(self._databases.glob("*.jsonl"))
        return orjson.dumps({path.stem: [orjson.loads(line) for line in path.open("rb")] for path in files})

    def close(self) -> None:
        """Let go of the package's state and remove what it wrote."""
        package.forget()
        shutil.rmtree(self._outputs, ignore_errors=True)

    def _recover(self) -> None:
        """What the package itself does after code that fails in the ways that it knows."""
        world: Any = self._world
        try:
            world.safety_guard.disable()
            world._save_state(world.output_db_home_path_on_disk)  # noqa: SLF001  # it has no public form
        except Exception:  # noqa: BLE001  # see `run`; then the export is what was written before
            return


def _shown(output: str) -> str:
    text = _ADDRESS.sub("0x0", output)
    if len(text) > MAX_OUTPUT:
        left_out = len(text) - MAX_OUTPUT
        text = f"{text[:MAX_OUTPUT]}\n[{left_out:,} characters more, left out: print less at a time]"
    return text
