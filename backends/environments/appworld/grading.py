"""Grades an exported state against a task's ground truth, in a process where no action ever ran.

The state is data of the agent's making. Always true: only statements that add, change or remove rows are carried out,
behind those of the task itself; whether a table has changed is found by comparing it, never by what the state says of
itself; what makes no sense of a state is worth 0.0, and what is wrong with the truth is a fault.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Final

import orjson
from appworld.apps.api_lib import set_local_date_and_time
from appworld.collections.models import ModelCollection, ModelCollectionPair
from appworld.evaluator import TestTracker
from appworld.task import Task

from backends.environments.appworld import package
from backends.server.environment import EnvironmentFault, Grade
from backends.server.wire import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Change = list[Any]

_VERBS: Final = ("INSERT ", "UPDATE ", "DELETE ")
_HASHES: Final = "model_hashes.json"


class Senseless(Exception):
    """A state that no session of the task can have."""


def grade(folder: Path, state: bytes, *, sparse: bool) -> Grade:
    """The grade of a state of the task in `folder`: the share of its tests that pass, or 1.0 for all of them.

    Raises EnvironmentFault where the truth cannot be read, or nothing can be written: then perhaps the session has
    filled the disk, perhaps not, and only another try elsewhere can tell.
    """
    task, module = _truth(folder.name)
    number = len(task.ground_truth.test_data)
    try:
        outputs = package.take_outputs()
    except OSError as error:
        raise _no_room(error) from error
    end = package.databases(outputs, task.id)
    try:
        _write(folder / "dbs", end, read(folder / "dbs", state))
        passes, failures = _tested(task, module, end)
    except OSError as error:
        raise _no_room(error) from error
    except Exception as error:  # noqa: BLE001  # a state may break any part of the package, and the tests' own code
        details = {"success": False, "passed": 0, "tests": number, "error": f"{type(error).__name__}: {error}"[:500]}
        return Grade(0.0, details)
    finally:
        package.forget()
        shutil.rmtree(outputs, ignore_errors=True)
    total = max(number, len(passes) + len(failures))
    success = len(passes) == total > 0
    reward = float(success) if sparse else len(passes) / max(total, 1)
    return Grade(reward, {"success": success, "passed": len(passes), "tests": total, "failures": failures})


def _no_room(error: OSError) -> EnvironmentFault:
    return EnvironmentFault(ErrorCode.SESSION_LOST, f"the state could not be laid out to be graded: {error}")


def read(original: Path, state: bytes) -> dict[str, list[Change]]:
    """The changes of a state by app, checked against the task's own. Raises Senseless."""
    try:
        found = orjson.loads(state)
    except orjson.JSONDecodeError as error:
        raise Senseless(f"the state is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Senseless("the state is no object")
    begins = {path.stem: _changes(path) for path in original.glob("*.jsonl")}
    if found.keys() != begins.keys():
        raise Senseless("the state has other apps than the task")
    for app, own in begins.items():
        changes = found[app]
        if not isinstance(changes, list) or changes[: len(own)] != own:
            raise Senseless(f"the state of {app} does not begin as the task does")
        for change in changes[len(own) :]:
            _check(app, change)
    return found


def _check(app: str, change: object) -> None:
    match change:
        case [str(statement), list() | dict(), bool()] if statement.lstrip()[:7].upper() in _VERBS:
            return
        case _:
            raise Senseless(f"a change of {app} is no insertion, update or deletion")


def _changes(path: Path) -> list[Change]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def _write(original: Path, target: Path, found: Mapping[str, Sequence[Change]]) -> None:
    """Lay a state out as the package reads it; in apps that differ from the task every table counts as touched."""
    target.mkdir(parents=True)
    hashes = orjson.loads((original / _HASHES).read_bytes()) if (original / _HASHES).is_file() else {}
    for app, changes in found.items():
        lines = [orjson.dumps(change) + b"\n" for change in changes]
        (target / f"{app}.jsonl").write_bytes(b"".join(lines))
        if len(changes) > len(_changes(original / f"{app}.jsonl")):
            tables = ModelCollection.load(":memory:names", ":memory:names", load_apps=[app], skip_mandatory_apps=True)
            hashes[app] = {name: hashes.get(app, {}).get(name, 0) + 1 for name in tables[app]}
    (target / _HASHES).write_bytes(orjson.dumps(hashes))


def _truth(task: str) -> tuple[Any, Any]:
    try:
        loaded = Task.load(task_id=task, load_ground_truth=True)
        return loaded, loaded.ground_truth.evaluation_module()
    except Exception as error:  # the package raises plain Exception
        raise EnvironmentFault(ErrorCode.UNAVAILABLE, f"the ground truth of {task} cannot be read: {error}") from error


def _tested(task: Any, module: Any, databases: Path) -> tuple[list[str], list[str]]:
    """The requirements that hold and those that do not."""
    freezer = set_local_date_and_time(task.datetime)
    try:
        end = f":memory:task_output-{task.id}"
        models = ModelCollectionPair(
            start_db_home_path=task.model_collection.from_db_home_path,
            start_model_collection=task.model_collection,
            end_db_home_path=end,
            end_model_collection=ModelCollection.load(
                to_db_home_path=end,
                from_db_home_path=str(databases),
                load_apps=task.allowed_apps,
            ),
        )
        truth = task.ground_truth
        tracker = TestTracker(test_data=truth.test_data, difficulty=truth.metadata["difficulty"], suppress_errors=True)
        module.evaluate(
            test=tracker,
            public_data=truth.public_data,
            private_data=truth.private_data,
            main_user=models.start.admin.MainUser.find_one(**task.supervisor),
            models=models,
            ground_truth_answer=truth.answer,
        )
    finally:
        freezer.stop()
    return [test["requirement"] for test in tracker.passes], [test["requirement"] for test in tracker.failures]
