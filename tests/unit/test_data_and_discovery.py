"""Registered data and environments from outside the package: what is found, what is refused, what decides a digest."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from backends.environments.catalog import find, names, stage
from backends.environments.data import digest_of, register, registered
from backends.environments.discovery import BUILT_IN
from orchestrator.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OUTSIDE = """\
name = "echo_game"
description = "says it again"
licence = "MIT"
isolation = "shared"
deterministic = true
runs_code = false
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("ROLLOUT_HOME", str(folder))
    return folder


def _files(folder: Path, **content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def _silent(line: str) -> None:
    """Nobody listens."""


def test_registered_data_changes_the_digest_and_is_found(home: Path, tmp_path: Path) -> None:
    spec = replace(find("toy"), data="numbers", data_files=("a.txt",))
    bare = spec.digest
    first = register(spec, _files(tmp_path / "1", a="one", b="not asked for"), home / "data", _silent)
    assert spec.data_folder == first
    assert [path.name for path in first.iterdir()] == ["a.txt"]
    with_first = spec.digest
    second = register(spec, _files(tmp_path / "2", a="two"), home / "data", _silent)
    assert spec.data_folder == second
    assert (first / "a.txt").read_text(encoding="utf-8") == "one"  # a run that goes on keeps its own
    assert len({bare, with_first, spec.digest}) == 3
    assert stage(spec).name == spec.digest
    assert register(spec, tmp_path / "1", home / "data", _silent) == first
    assert spec.digest == with_first


def test_names_and_sizes_are_part_of_a_datas_digest(home: Path, tmp_path: Path) -> None:
    spec = replace(find("toy"), data="any files")
    base = home / "data"
    folders = [
        register(spec, _files(tmp_path / "x", a="12", b="3"), base, _silent),
        register(spec, _files(tmp_path / "y", a="1", b="23"), base, _silent),
        register(spec, _files(tmp_path / "z", a="12", c="3"), base, _silent),
    ]
    assert len({digest_of(folder) for folder in folders}) == 3
    assert registered(base, "toy") == folders[-1]
    assert registered(base, "other") is None


def test_data_that_cannot_be_is_refused_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    base = home / "data"
    with pytest.raises(UsageError, match="takes no data"):
        register(find("toy"), tmp_path, base, _silent)
    spec = replace(find("toy"), data="two files", data_files=("a.txt", "b.txt"))
    with pytest.raises(UsageError, match=r"lacks b\.txt; toy needs: two files"):
        register(spec, _files(tmp_path / "1", a="x"), base, _silent)
    with pytest.raises(UsageError, match=r"no folder; toy needs one that holds a\.txt, b\.txt"):
        register(spec, tmp_path / "nowhere", base, _silent)
    with pytest.raises(UsageError, match="is empty"):
        register(replace(spec, data_files=()), _files(tmp_path / "2"), base, _silent)
    assert not base.exists()


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution that brings an environment, as pip would lay it out."""
    site = tmp_path / "site"
    package = site / "echo_package" / "game"
    package.mkdir(parents=True)
    (site / "echo_package" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "environment.toml").write_text(OUTSIDE, encoding="utf-8")
    (package / "inside.py").write_text("MARK = 1\n", encoding="utf-8")
    info = site / "echo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: echo\nVersion: 1.0\n", encoding="utf-8")
    _point(info, "echo_game = echo_package.game")
    monkeypatch.syspath_prepend(str(site))
    yield info
    for name in [name for name in sys.modules if name.split(".")[0] == "echo_package"]:
        del sys.modules[name]


def _point(info: Path, line: str) -> None:
    (info / "entry_points.txt").write_text(f"[rollout.environments]\n{line}\n", encoding="utf-8")


def test_an_entry_point_brings_an_environment(home: Path, outside: Path) -> None:
    assert "echo_game" in names()
    spec = find("echo_game")
    assert (spec.source, find("toy").source) == ("echo", BUILT_IN)
    staged = stage(spec)
    assert (staged / "backends/environments/echo_game/inside.py").read_text(encoding="utf-8") == "MARK = 1\n"
    assert "echo_package.game" not in sys.modules  # located, not imported


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("toy = echo_package.game", "'toy' is brought by built in and by echo"),
        ("Echo-Game = echo_package.game", "names an environment 'Echo-Game'"),
    ],
)
def test_a_name_that_cannot_be_is_refused(line: str, says: str, outside: Path) -> None:
    _point(outside, line)
    with pytest.raises(UsageError, match=says):
        names()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("other = echo_package.game", "'name' must be its entry point's name, 'other'"),
        ("echo_game = echo_package.nothing", "no package 'echo_package.nothing'"),
        ("echo_game = nowhere.at_all", "No module named 'nowhere'"),
    ],
)
def test_an_entry_point_that_leads_nowhere_says_so(line: str, says: str, outside: Path) -> None:
    _point(outside, line)
    with pytest.raises(UsageError, match=says):
        find(line.split()[0])
    with pytest.raises(UnknownName):
        find("no_such_game")
