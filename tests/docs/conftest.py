"""A machine of a user's: a virtual environment with the project in it, where packages can be installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

import pytest

from backends.environments.catalog import home

ROLLOUT: Final = Path(sys.executable).with_name("rollout")
LIMIT_S: Final = 110.0


class Outside:
    """The user's virtual environment. What is installed into it sees all that the suite's own holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        self._data = folder / "home"
        self._data.mkdir()
        (home() / "envs").mkdir(parents=True, exist_ok=True)
        (self._data / "envs").symlink_to(home() / "envs")  # what is installed already serves here too
        self.run(sys.executable, "-m", "venv", "--without-pip", str(folder / "venv"))
        site = Path(self.run(self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
        line = f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n"
        (site / "project.pth").write_text(line, encoding="utf-8")
        self.pip("hatchling>=1.27", "editables")  # the second for `-e`

    def pip(self, *arguments: str) -> None:
        """`pip install`, with the build tools that are there."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check", "install"]
        self.run(*command, "-q", "--no-build-isolation", *arguments)

    def rollout(self, *arguments: str, folder: Path | None = None, **variables: str) -> str:
        """The command `rollout`; what it prints."""
        return self.run(self.python, ROLLOUT, *arguments, folder=folder, **variables)

    def run(self, *command: str | Path, folder: Path | None = None, **variables: str) -> str:
        """Run a command that must succeed; what it prints."""
        environment = {**os.environ, "ROLLOUT_HOME": str(self._data), **variables}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [str(part) for part in command],
            cwd=folder or self.folder,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Outside:
    """One for the whole session: what a test installs stays."""
    return Outside(tmp_path_factory.mktemp("outside"))
