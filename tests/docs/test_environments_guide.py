"""The guide on environments says what is so: its commands and its environment run, its tables are whole."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import backends.server.environment as contract
from backends.environments.catalog import Resources, read
from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from conftest import Outside

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "environments.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The only block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    return str(found)


def rows(heading: str) -> list[list[str]]:
    """A table's cells, by the heading of its first column."""
    lines = GUIDE.partition(f"| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [line.strip("| ").split(" | ") for line in lines]


def test_the_commands_and_the_environment_run(outside: Outside, tmp_path: Path) -> None:
    """As written: the game of the template first, then the guide's own in its place."""
    begin, install, collect, test = [line.removeprefix("$ ") for line in block("console").splitlines()]
    outside.rollout(*shlex.split(begin)[1:], folder=tmp_path)
    project = tmp_path / "echo_game"
    assert {name.strip("`") for name, _ in rows("file")} == {
        str(path.relative_to(project)) for path in project.rglob("*") if path.is_file() and path.name != "__init__.py"
    }
    assert install == f"pip install -e {project.name}"
    outside.pip("-e", str(project))
    outside.rollout(*shlex.split(collect)[1:], folder=tmp_path)
    assert test == "cd echo_game && pip install -e '.[test]' && pytest"
    (project / "echo_game_environment" / "inside.py").write_text(block("python"), encoding="utf-8")
    outside.run(outside.python, "-m", "pytest", "-q", folder=project)
    summary = outside.rollout(*shlex.split(collect.replace("runs/echo", "runs/own"))[1:], "--json", folder=tmp_path)
    assert '"reward_one":3' in summary


def test_every_key_of_a_declaration_is_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "environment.toml").write_text("colour = 1", encoding="utf-8")
    with pytest.raises(UsageError) as refused:
        read(tmp_path)
    known = set(str(refused.value).partition("known: ")[2].split(", "))
    assert known == {key.strip("[]") for cells in rows("key") for key in re.findall(r"`(.+?)`", cells[0])}
    (bounds,) = [cells[1] for cells in rows("key") if "resources" in cells[0]]
    assert re.findall(r"`(\w+)`", bounds) == [field.name for field in fields(Resources)]


def test_what_may_be_defined_is_named() -> None:
    for protocol in ("Environment", "Session", "Preloads", "KeepsSecrets", "Exports", "GradesElsewhere"):
        methods = [name for name in vars(getattr(contract, protocol)) if not name.startswith("_")]
        for name in methods:
            assert re.search(rf"`{name}\b", GUIDE) or f"def {name}(" in block("python") or f"    {name} = " in GUIDE


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", GUIDE)
    assert len(links) == 3
    assert all((DOCS / link).is_dir() for link in links)
