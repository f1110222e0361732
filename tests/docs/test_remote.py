"""The page on other people's servers says what is so: commands parse, programs run, numbers are the code's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from backends.sandboxes.docker.service_image import PORT
from backends.sandboxes.remote.backend import SERVICE_BACK_S
from backends.sandboxes.remote.instances import CREATE_S, CREATIONS
from orchestrator.cli.main import app
from orchestrator.service import ServiceLimits

PAGE = Path(__file__).parents[2] / "docs" / "remote.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(rollout (?:[^\n]*\\\n)*[^\n]*)", TEXT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str) -> None:
    words = shlex.split(command.replace("\\\n", " "))
    group = typer.main.get_command(app)
    found = group.commands[words[1]]  # type: ignore[attr-defined]
    assert found.make_context(words[1], words[2:]).params["backend"] in {"remote", "docker"}


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 2


@pytest.mark.parametrize("program", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_every_program_runs(program: str) -> None:
    names: dict[str, object] = {}
    exec(program, names)
    assert repr(names["backend"]).startswith("<")


def test_its_numbers_are_those_of_the_code() -> None:
    assert (SERVICE_BACK_S, CREATIONS, PORT) == (60.0, 4, 80)
    assert f"a creation: {CREATE_S:g} s" in TEXT
    assert f"{ServiceLimits().idle_s / 60:g} minutes without a call" in TEXT
