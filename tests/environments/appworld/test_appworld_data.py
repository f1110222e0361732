"""The registered data as the environment reads it: splits, ids, known solutions, and what it takes to be there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from backends.environments.appworld.inside import Options, environment, read_options, read_sparse
from backends.environments.appworld.tasks import Data
from backends.environments.catalog import find
from backends.environments.data import register
from backends.server.environment import EnvironmentFault
from orchestrator.errors import UsageError

IDS = {"train": "a1_1\na1_2:tagged\n", "dev": "b2_1\n\n", "test_normal": "c3_1\n", "test_challenge": "d4_1\nd4_2"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "source" / "data"
    for split, text in IDS.items():
        (data / "datasets").mkdir(parents=True, exist_ok=True)
        (data / "datasets" / f"{split}.txt").write_text(text, encoding="utf-8")
    for task in ("a1_1", "a1_2", "c3_1"):
        (data / "tasks" / task / "ground_truth").mkdir(parents=True)
        (data / "tasks" / task / "specs.json").write_text("{}", encoding="utf-8")
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        ("", ["a1_1", "a1_2"]),
        ("train", ["a1_1", "a1_2"]),
        ("appworld:train", ["a1_1", "a1_2"]),
        ("appworld:val", ["b2_1"]),
        ("dev", ["b2_1"]),
        ("appworld", ["a1_1", "a1_2", "b2_1"]),
        ("test_normal", ["c3_1"]),
        ("appworld:test_challenge", ["d4_1", "d4_2"]),
    ],
)
def test_splits(folder: Path, split: str, ids: list[str]) -> None:
    assert Data(folder).split(split).ids == ids


def test_what_is_not_there_is_said(folder: Path) -> None:
    data = Data(folder)
    with pytest.raises(EnvironmentFault, match="did you mean 'appworld:train'") as caught:
        data.split("appworld:trian")
    assert caught.value.code == "unknown_split"
    for task in ("b2_1", "../tasks/a1_1", "a1_1/../a1_1", "", "a1", "a1_1\n"):
        with pytest.raises(EnvironmentFault) as caught:
            data.folder(task)
        assert caught.value.code == "unknown_task"
    with pytest.raises(EnvironmentFault, match="rollout env data appworld"):
        Data(None).split("")


def test_a_solution_is_the_data_s_code_and_a_call_that_ends(folder: Path) -> None:
    data = Data(folder)
    truth = folder / "data" / "tasks" / "a1_1" / "ground_truth" / "compiled_solution.py"
    truth.write_text("def solution(apis, requester):\n    apis.supervisor.complete_task()\n", encoding="utf-8")
    [action] = data.solution("a1_1")
    assert json.loads(action)["content"].endswith("complete_task()\n\nsolution(apis, requester)\n```")
    truth.write_text("def solution(apis, requester):\n    pass\n", encoding="utf-8")
    assert "complete_task" in json.loads(data.solution("a1_1")[1])["content"]
    with pytest.raises(EnvironmentFault, match="the solution of c3_1") as caught:
        data.solution("c3_1")
    assert caught.value.code == "unavailable"


def test_ground_truth_is_what_sessions_must_not_see(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_DATA", str(folder))
    named = {path.relative_to(folder / "data" / "tasks").as_posix() for path in environment().secrets()}
    assert named == {"a1_1/ground_truth", "a1_2/ground_truth", "c3_1/ground_truth"}


def test_options_and_parameters_are_checked() -> None:
    assert read_options({"simple": True, "action_s": 5})._asdict() == {
        "simple": True, "prompt": True, "tools": False, "sparse": False, "action_s": 5
    }  # fmt: skip
    wrong = [{"simpel": True}, {"simple": 1}, {"prompt": "no"}, {"action_s": 0}, {"action_s": True}, {"action_s": 1.5}]
    for options in wrong:
        with pytest.raises(EnvironmentFault) as caught:
            read_options(options)
        assert caught.value.code == "bad_request"
    assert read_sparse({}, True) is True
    assert read_sparse({"sparse": False}, True) is False
    for params in ({"sparse": 1}, {"dense": True}):
        with pytest.raises(EnvironmentFault):
            read_sparse(params, False)


def test_data_of_another_layout_is_not_registered(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"lacks data/version\.txt, data/base_dbs/\*\.db, data/api_docs/\*\*; appworld"
    ):
        register(find("appworld"), folder, tmp_path / "data", lambda line: None)


def test_what_the_package_left_beside_its_data_is_not_registered(folder: Path, tmp_path: Path) -> None:
    for name in ("data/version.txt", "data/base_dbs/a.db", "data/api_docs/standard/a.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    (folder / "experiments" / "outputs").mkdir(parents=True)
    (folder / "experiments" / "outputs" / "log.txt").write_text("mine", encoding="utf-8")
    target = register(find("appworld"), folder, tmp_path / "data", lambda line: None)
    assert [path.name for path in target.iterdir()] == ["data"]
    assert (target / "data" / "tasks" / "a1_1" / "specs.json").read_text(encoding="utf-8") == "{}"
    assert (target / "data" / "api_docs" / "standard" / "a.json").is_file()


def test_the_guide_names_every_option() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "appworld.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", guide, re.MULTILINE))
    assert set(rows) == set(Options._fields)
    for name, value in Options()._asdict().items():
        shown = f"default {value}" if name == "action_s" else f"`{str(value).lower()}` (default)"
        assert shown in rows[name], name
