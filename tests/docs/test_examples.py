"""The examples of environments, each as its user would have it: installed by pip, checked by its own test, played."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Outside

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
TASKS = {"text_games": 100, "sql_desk": 15, "python_cell": 5}


@pytest.fixture(scope="module")
def installed(outside: Outside) -> Outside:
    outside.pip(*(part for name in TASKS for part in ("-e", str(EXAMPLES / name))))
    outside.rollout("env", "install", *TASKS)
    return outside


def test_every_example_is_here() -> None:
    assert sorted(TASKS) == sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", TASKS)
def test_it_keeps_its_promises(name: str, installed: Outside) -> None:
    installed.run(installed.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder=EXAMPLES / name)


@pytest.mark.parametrize("name", TASKS)
def test_its_known_solutions_earn_everything(name: str, installed: Outside, tmp_path: Path) -> None:
    options = ["--policy", "replay", "--out", str(tmp_path / "run"), "--unsafe-local", "--json"]
    summary = json.loads(installed.rollout("collect", "--env", name, *options))
    assert (summary["episodes"], summary["reward_one"]) == (TASKS[name], TASKS[name])
    assert summary["outcomes"]["completed"] == TASKS[name]
