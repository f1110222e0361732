"""What an environment declares to be run for it: its set-up in the venv, the download of its data."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from backends.environments.catalog import EnvironmentSpec, find
from backends.environments.data import digest_of, registered
from backends.environments.download import download
from backends.environments.install import install
from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SET_UP = """\
import os, pathlib, sys
home = pathlib.Path(os.environ["HOME"])
home.mkdir()
(home / "cache").write_text("of no use")
pathlib.Path(sys.prefix, "unpacked").write_text(" ".join(sorted(os.environ)))
"""
BRING = """\
import os, pathlib
folder = pathlib.Path(os.environ.get("DATA_ROOT", "."), "data")
(folder / "more").mkdir(parents=True)
(folder / "more" / "a.txt").write_text("a")
(folder / "b.txt").write_text("b")
pathlib.Path("left.log").write_text("beside")
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("ROLLOUT_HOME", str(folder))
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "the user's own"))
    return folder


def toy(command: Sequence[str]) -> EnvironmentSpec:
    """The toy, as if its data could be downloaded."""
    files = ("data/b.txt", "data/more/**")
    return replace(find("toy"), data="letters", data_files=files, download=tuple(command))


async def test_a_set_up_fills_the_venv_and_no_home() -> None:
    spec = replace(find("toy"), setup=("-c", SET_UP))
    assert spec.requirements_digest != find("toy").requirements_digest
    lines: list[str] = []
    python = await install(spec, progress=lines.append)
    venv = python.parents[1]
    assert "DATA_ROOT" not in (venv / "unpacked").read_text(encoding="utf-8").split()
    assert "toy: setting up" in lines
    assert not list(venv.rglob("cache"))


async def test_a_set_up_that_fails_leaves_no_venv(home: Path) -> None:
    spec = replace(find("toy"), setup=("-c", "raise SystemExit('nothing to unpack')"))
    with pytest.raises(Unavailable, match=r"(?s)setting up ended with status 1.*nothing to unpack"):
        await install(spec, progress=lambda line: None)
    assert not spec.installed
    assert not [path for path in (home / "envs").iterdir() if path.is_dir()]


def test_what_a_command_brings_is_registered(home: Path, tmp_path: Path) -> None:
    spec = toy(["-c", BRING])
    before = spec.digest
    target = asyncio.run(download(spec, home / "data", lambda line: None))
    assert registered(home / "data", "toy") == target
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*.txt")) == [
        "data/b.txt",
        "data/more/a.txt",
    ]
    assert not list(target.rglob("*.log"))
    assert not (tmp_path / "the user's own").exists(), "a variable of the user's decides where a command writes"
    assert spec.digest != before
    assert digest_of(target)
    assert sorted(path.name for path in (home / "data").iterdir()) == sorted(["toy", target.name])


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["-c", "print('no route to the files'); raise SystemExit(3)"], "ended with status 3"),
        (["-c", "print('no route to the files')"], "brought nothing that could be the data"),
    ],
)
async def test_a_download_that_fails_says_what_to_do(home: Path, command: list[str], why: str) -> None:
    spec = toy(command)
    with pytest.raises(Unavailable, match=why) as caught:
        await download(spec, home / "data", lambda line: None)
    told = str(caught.value)
    assert "On a machine with internet access" in told
    assert "pip install toy; python -c print" in told
    assert "rollout env data toy --from FOLDER" in told
    assert told.endswith("\n    no route to the files")
    assert not list((home / "data").iterdir())


async def test_a_download_that_hangs_is_given_up(home: Path) -> None:
    spec = toy(["-c", "import signal; print('waiting', flush=True); signal.pause()"])
    with pytest.raises(Unavailable, match=r"it took more than 0\.5 s"):
        await download(spec, home / "data", lambda line: None, deadline_s=0.5)
    assert not list((home / "data").iterdir())
