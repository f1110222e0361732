"""The guide for those who come from AgentScope says what is so: its programs run, its names exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import backends.agentscope

GUIDE = Path(__file__).parents[2] / "docs" / "agentscope.md"


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def _run(program: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "DATASET_SUB_TYPE"}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs() -> None:
    assert _run(_blocks()[0] + "print(result['is_terminated'], score)") == "False 0.0\n"


def test_a_box_of_ones_own_can_be_made() -> None:
    assert _run(_blocks()[1] + "print(MySandbox().sandbox_type)") == "my_env\n"


def test_every_class_is_in_the_guide_and_every_class_of_the_guide_exists() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:Async)?[A-Z]\w*Sandbox`", text))
    assert {name.strip("`") for name in named} == {
        name
        for name in backends.agentscope.__all__
        if name.endswith("Sandbox") and name not in ("Sandbox", "AsyncSandbox")
    }
