"""AppWorld inside the sandbox: lists tasks, opens worlds in children of their own, grades what they export.

Options of `open`: `simple` (false): a short manual, text without a block of code is code, output comes as it is;
`prompt` (true): whether the manual is given at all; `tools` (false): whether the tool `appworld` is announced (calls of
it are understood in any case); `sparse` (false): whether grades are sparse where `evaluate` does not say; `action_s`
(20): how many seconds the code of one message may take. The episode's seed changes nothing: AppWorld's own random
numbers follow from the task.

Deterministic as far as AppWorld is: what its apps answer follows from the task and the actions, the clock stands still,
addresses of objects are masked. Code that asks the machine itself (`uuid.uuid4()`, a process id) sees what it sees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from backends.environments.appworld import package
from backends.environments.appworld.tasks import NAME, Data
from backends.server.environment import EnvironmentFault
from backends.server.wire import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from backends.environments.appworld.session import AppWorldSession
    from backends.server.environment import Environment, Grade, Reply, Tasks

ACTION_S: Final = 20
"""Below the step's own limit, so that endless code is answered by an observation."""


class Options(NamedTuple):
    """The options of `open`, checked."""

    simple: bool = False
    prompt: bool = True
    tools: bool = False
    sparse: bool = False
    action_s: int = ACTION_S


class AppWorld:
    """All tasks of the registered data."""

    name: ClassVar[str] = NAME
    isolation: ClassVar[str] = "process"
    deterministic: ClassVar[bool] = True
    runs_code: ClassVar[bool] = True
    max_turns: ClassVar[int] = 100

    def __init__(self, data: Data) -> None:
        self._data = data

    def tasks(self, split: str) -> Tasks:
        """The tasks of a split; see `tasks`. Raises EnvironmentFault."""
        return self._data.split(split)

    def solution(self, task: str) -> Sequence[bytes]:
        """The data's own solution. Raises EnvironmentFault where it has none."""
        return self._data.solution(task)

    def secrets(self) -> Sequence[Path]:
        """The folders with the tasks' ground truth."""
        return self._data.truths()

    def preload(self) -> None:
        """Load the package and its apps, and play with one world, so that children find everything warm."""
        package.load(self._data.root)
        for task in self._data.split("train").ids[:1]:
            package.warm_up(task)

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[AppWorldSession, Reply]:
        """The world of a task, this process's only one, and its first observation. Raises EnvironmentFault."""
        chosen = read_options(options)
        self._data.folder(task)
        from backends.environments.appworld.session import AppWorldSession  # needs the package

        return AppWorldSession.begin(task, chosen)

    def grade(self, task: str, seed: int, options: Mapping[str, Any], state: bytes, params: Mapping[str, Any]) -> Grade:
        """Grade what a session's `export` gave; dense, or sparse as `params` or else the options say."""
        sparse = read_sparse(params, read_options(options).sparse)
        from backends.environments.appworld.grading import grade  # needs the package

        return grade(self._data.folder(task), state, sparse=sparse)


def read_options(options: Mapping[str, Any]) -> Options:
    """Check the options of `open`. Raises EnvironmentFault."""
    if unknown := options.keys() - set(Options._fields):
        raise _refused(f"unknown option {min(unknown)!r}; appworld takes: {', '.join(Options._fields)}")
    for name, value in options.items():
        if name == "action_s":
            if type(value) is not int or not 0 < value <= 3600:
                raise _refused("the option 'action_s' must be a whole number of seconds from 1 to 3600")
        elif not isinstance(value, bool):
            raise _refused(f"the option {name!r} must be true or false")
    return Options(**options)


def read_sparse(params: Mapping[str, Any], default: bool) -> bool:
    """Check the parameters of `evaluate`. Raises EnvironmentFault."""
    if unknown := params.keys() - {"sparse"}:
        raise _refused(f"unknown parameter {min(unknown)!r}; evaluate takes: sparse")
    sparse = params.get("sparse", default)
    if not isinstance(sparse, bool):
        raise _refused("the parameter 'sparse' must be true or false")
    return sparse


def _refused(why: str) -> EnvironmentFault:
    return EnvironmentFault(ErrorCode.BAD_REQUEST, why)


def environment() -> Environment:
    """What the server serves."""
    return AppWorld(Data.registered())
