"""The page on serving says what is so: its program runs against a service, its options and routes exist."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from typer.testing import CliRunner

from backends.sandboxes.local import LocalBackend
from orchestrator.cli.main import app
from orchestrator.service import Service

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


async def test_the_example_runs() -> None:
    program = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    async with Service({"bfcl": partial(LocalBackend, "bfcl")}, port=0) as service:
        command = [sys.executable, "-W", "error", "-c", f"{program}\nasyncio.run(main({service.url!r}))"]
        done = await _finished(command)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "False 0.0\n"


async def _finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    run = partial(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    return await asyncio.to_thread(run)


def test_every_option_on_the_page_is_the_command_s() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    named = set(re.findall(r"`(--[a-z-]+)", PAGE))
    assert named >= {"--idle", "--drain", "--max-instances", "--token-env"}
    for option in named:
        assert option in shown, option
