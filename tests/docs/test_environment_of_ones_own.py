"""`rollout env new`: what it writes is found, passes its own test, and is played; what cannot be is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from backends.environments.catalog import read
from backends.environments.scaffold import scaffold
from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Outside


def test_a_new_environment_works_as_it_is(outside: Outside, tmp_path: Path) -> None:
    written = outside.rollout("env", "new", "night_chess", folder=tmp_path).splitlines()
    assert "night_chess/night_chess_environment/inside.py" in written
    assert all((tmp_path / name).is_file() for name in written)
    outside.pip("-e", str(tmp_path / "night_chess"))
    assert "night-chess-environment" in outside.rollout("env", "list", COLUMNS="200")
    outside.run(outside.python, "-m", "pytest", "-q", folder=tmp_path / "night_chess")
    options = ["--policy", "replay", "--out", str(tmp_path / "run"), "--json"]
    summary = json.loads(outside.rollout("collect", "--env", "night_chess", *options))
    assert (summary["episodes"], summary["reward_one"], summary["outcomes"]["completed"]) == (100, 100, 100)


def test_every_word_of_the_template_is_renamed(tmp_path: Path) -> None:
    for path in scaffold("ab_c2", tmp_path / "new"):
        assert "mygame" not in path.read_text(encoding="utf-8").lower()
        assert "mygame" not in path.name
    package = tmp_path / "new" / "ab_c2_environment"
    assert "class AbC2Environment:" in (package / "inside.py").read_text(encoding="utf-8")
    spec = read(package, name="ab_c2")
    assert (spec.isolation, spec.deterministic, spec.runs_code, spec.requirements) == ("shared", True, False, ())


@pytest.mark.parametrize("name", ["", "Chess", "my-game", "2048", "_x", "a/b", "..", "x" * 49, "é"])
def test_a_name_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be called"):
        scaffold(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'toy' already \(built in\)"):
        scaffold("toy", tmp_path / "new")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="not an empty folder"):
            scaffold("chess", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
