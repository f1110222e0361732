"""Runs scripts of `inside/` on the environment's own interpreter: upstream is installed there, not beside the tests."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from backends.environments.catalog import find
from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
DEADLINE_S = 280
"""Only a hang takes this long; the tests that play thousands of episodes may take minutes on a busy machine."""


class Inside(Protocol):
    """`inside(script, *arguments, stdin=..., hash_seed=...) -> what the script prints, parsed`."""

    def __call__(self, script: str, *arguments: str, stdin: str = "", hash_seed: int = 0) -> Any: ...


@pytest.fixture(scope="session")
def python() -> Path:
    """The environment's interpreter; the tests are skipped, visibly, where it is not installed."""
    try:
        return find("bfcl").interpreter()
    except Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def inside(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    """Run a script of `inside/` in an empty folder, with nothing of the project but `backends` in reach."""
    folder = tmp_path_factory.mktemp("inside")

    def run(script: str, *arguments: str, stdin: str = "", hash_seed: int = 0) -> Any:
        variables: Mapping[str, str] = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": str(ROOT),
            "PYTHONHASHSEED": str(hash_seed),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [str(python), str(HERE / "inside" / f"{script}.py"), *arguments]
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            cwd=folder,
            env=variables,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert not list(folder.iterdir()), "the environment wrote into its working folder"
        return json.loads(done.stdout)

    return run
