"""The README is right: its Python runs, its commands and options exist, its links lead somewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from backends.environments.catalog import find

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROLLOUT = Path(sys.executable).with_name("rollout")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The first Python block, run as it stands."""
    if not find("bfcl").installed:
        pytest.fail("environment bfcl is not installed: run `rollout env install bfcl`")
    folder = tmp_path_factory.mktemp("readme")
    (folder / "example.py").write_text(blocks("python")[0], encoding="utf-8")
    return folder, run([sys.executable, "example.py"], folder)


def test_the_python_example_collects_every_group(played: tuple[Path, str]) -> None:
    *groups, best = played[1].splitlines()
    assert len(groups) == 200
    assert all(re.fullmatch(r"multi_turn_base_\d+ \[((0|1)\.0(, )?){8}\]", line) for line in groups)
    assert {reward for line in groups for reward in re.findall(r"\d\.\d", line)} == {"0.0", "1.0"}
    assert best.endswith(" 1.0")


def test_the_policy_example_earns_every_reward(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(blocks("python")[1], encoding="utf-8")
    command = next(line for line in README.splitlines() if "--script mine.py:act" in line)
    stdout = run([str(ROLLOUT), *command.split()[2:], "--json"], tmp_path)
    assert json.loads(stdout)["reward_one"] == 64


def test_the_trainers_example_takes_every_group(played: tuple[Path, str]) -> None:
    folder, _ = played
    program = "import asyncio\n" + blocks("python")[2]
    program += "\nasync def step(group):\n    print(group.seq)\n\nasyncio.run(train(step))\n"
    (folder / "trainer.py").write_text(program, encoding="utf-8")
    assert run([sys.executable, "trainer.py"], folder).split() == [str(number) for number in range(1, 201)]


def test_the_reading_commands_read(played: tuple[Path, str]) -> None:
    folder, _ = played
    assert "1,600" in run([str(ROLLOUT), "status", "runs/x"], folder)
    assert "multi_turn_base_0" in run([str(ROLLOUT), "show", "runs/x", "multi_turn_base_0"], folder)
    run([str(ROLLOUT), "export", "runs/x", "--format", "openai", "--out", "episodes.jsonl"], folder)
    assert len((folder / "episodes.jsonl").read_text(encoding="utf-8").splitlines()) == 1600


def test_every_command_and_option_that_is_shown_exists(tmp_path: Path) -> None:
    shown = "\n".join(blocks("console")).replace("\\\n", " ")
    commands = re.findall(r"^\$ rollout (\w+)(.*)$", shown, re.MULTILINE)
    assert len(commands) >= 6
    for name, rest in commands:
        text = run([str(ROLLOUT), name, "--help"], tmp_path)
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in text, f"rollout {name} has no {option}"


def test_every_link_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).is_file()]


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"make (\w+)", README)) - {"a"} <= targets
