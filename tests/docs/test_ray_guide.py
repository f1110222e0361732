"""The page on clusters says what is so: commands parse, programs run beside each other, the job is submitted."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer.main
from ray_head import RAY, free_port, ray_head

from backends.environments.catalog import find
from backends.trainers.ray import RayQueue, RayWorker
from backends.trainers.ray.keeper import INLINE
from orchestrator import Run
from orchestrator.cli.main import app

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parents[2] / "docs" / "ray.md"
TEXT = PAGE.read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^(?:\$ (?:ray job submit .*-- )?| {4})(rollout (?:[^\n]*\\\n)*[^\n]*)", TEXT, re.MULTILINE)
JOB = re.search(r"^\$ (ray job submit [^\n]*\\\n[^\n]*)", TEXT, re.MULTILINE)
TRAINER = """
async def step(group):
    print(group.seq, group.task, len(group.trajectories), flush=True)

asyncio.run(train(step))
"""
LIMIT_S = 160.0

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str) -> None:
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    group = typer.main.get_command(app)
    found = group.commands[words[1]]  # type: ignore[attr-defined]
    assert found.make_context(words[1], words[2:]).params


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 6


@pytest.fixture(scope="module")
def head(private_folder: Path) -> Iterator[dict[str, str]]:
    """The environment of processes that know a cluster; with the dashboard, where Ray has it, for jobs."""
    if not find("bfcl").installed:
        pytest.fail("environment bfcl is not installed: run `rollout env install bfcl`")
    port = free_port()
    options = [f"--include-dashboard={str(can_submit()).lower()}", f"--dashboard-port={port}", "--num-cpus=2"]
    with ray_head(private_folder / "ray", *options, RAY_AUTH_MODE="disabled") as address:
        known = {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
        yield {**os.environ, **known, "RAY_AUTH_MODE": "disabled"}


def can_submit() -> bool:
    return find_spec("opencensus") is not None


async def program(text: str, folder: Path, variables: dict[str, str]) -> str:
    """Run it; what it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", text),
        cwd=folder,
        env=variables,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def test_the_programs_run_beside_each_other(head: dict[str, str], tmp_path: Path) -> None:
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        trainer = tasks.create_task(program(PROGRAMS[1] + TRAINER, tmp_path, head))
        driver = tasks.create_task(program(PROGRAMS[0], tmp_path, head))
    assert driver.result().split() == ["1600", "0"]
    taken = [line.split() for line in trainer.result().splitlines()]
    assert [int(seq) for seq, _, _ in taken] == list(range(1, 201))
    assert {size for _, _, size in taken} == {"8"}


def submitted(words: list[str], folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As soon as the head has an agent for jobs, which begins later than the head itself."""
    ends = time.monotonic() + LIMIT_S
    while True:
        done = subprocess.run(
            words, cwd=folder, env=variables, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        if "No available agent" not in done.stderr or time.monotonic() > ends:
            return done
        time.sleep(0.5)


def test_the_job_is_submitted(head: dict[str, str], tmp_path: Path) -> None:
    if not can_submit():
        pytest.skip("jobs need Ray's own extra: pip install 'ray[default]'")
    assert JOB is not None
    words = shlex.split(JOB[1].replace("\\\n", " "))
    words = [word.replace("/shared/runs", str(tmp_path)) for word in words]
    words[0] = str(RAY)
    words[words.index("rollout")] = str(RAY.with_name("rollout"))
    words[words.index("multi_turn")] = "multi_turn_base"
    done = submitted(words, tmp_path, head)
    assert done.returncode == 0, done.stdout + done.stderr
    with Run.open(tmp_path / "mine") as run:
        assert (run.state, run.totals().episodes) == ("finished", 200)


def test_its_numbers_are_those_of_the_code() -> None:
    assert f"above {INLINE >> 10} KiB" in TEXT
    assert "lease_s" in inspect.signature(RayWorker).parameters
    assert "capacity" in inspect.signature(RayQueue).parameters
