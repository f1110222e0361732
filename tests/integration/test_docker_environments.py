"""An environment from outside in containers: brought by an entry point, built into an image, given registered data."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from runs import equal, play

from backends.environments import toy
from backends.environments.catalog import find
from backends.environments.catalog import home as users_home
from backends.environments.data import register
from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.docker.images import DIGEST
from backends.sandboxes.local import LocalBackend
from bench.strikes import docker, inside
from orchestrator.testing.harness import entered
from policies.agents.replay import ReplayPolicy

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("containers")
FIRST = "What has keys and opens no door?|a piano\nWhat gets wetter the more it dries?|a towel\n"
SECOND = "What has a neck and no head?|a bottle\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own; the wheels of images are those that the user has."""
    wheels = users_home() / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "wheels").symlink_to(wheels)
    monkeypatch.setenv("ROLLOUT_HOME", str(folder))
    return folder


@pytest.fixture
def riddles(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The distribution that brings them; its images are gone afterwards."""
    site = tmp_path / "site"
    package = site / "riddles_package"
    shutil.copytree(Path(__file__).with_name("riddles_environment"), package)
    dockerfile = Path(next(iter(toy.__path__)), "Dockerfile").read_text(encoding="utf-8")
    (package / "Dockerfile").write_text(dockerfile.replace('"toy"', '"riddles"'), encoding="utf-8")
    info = site / "riddles-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: riddles\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[rollout.environments]\nriddles = riddles_package\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(site))
    yield
    for image in docker("images", "--quiet", "rollout-riddles").split():
        docker("rmi", "--force", image, check=False)


def give(home: Path, tmp_path: Path, lines: str) -> tuple[Path, str]:
    """Register them as the environment's data; the folder, and the digest of the environment with them."""
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "riddles.txt").write_text(lines, encoding="utf-8")
    folder = register(find("riddles"), source, home / "data", lambda line: None)
    return folder, find("riddles").digest


def digest_of(image: str) -> str:
    """The digest in its label."""
    label: str = json.loads(docker("image", "inspect", image))[0]["Config"]["Labels"][DIGEST]
    return label


@pytest.mark.usefixtures("riddles")
async def test_registered_data_decides_what_is_played_and_which_image_serves_it(home: Path, tmp_path: Path) -> None:
    digests = []
    for number, lines in enumerate((FIRST, SECOND)):
        _, digest = await asyncio.to_thread(give, home, tmp_path, lines)
        outs = [tmp_path / f"{kind}{number}" for kind in ("local", "docker")]
        local = await play(outs[0], ReplayPolicy(), backend=LocalBackend("riddles"), sandboxes=1)
        played = await play(outs[1], ReplayPolicy(), backend=DockerBackend("riddles"), sandboxes=1)
        assert (played.summary.episodes, played.summary.reward_one) == (lines.count("\n"),) * 2
        assert equal(local.episodes, played.episodes)
        asked = b"".join(one.buffer for one in played.episodes.values()).decode(errors="replace")
        assert all(line.partition("|")[0] in asked for line in lines.splitlines())
        assert await asyncio.to_thread(digest_of, f"rollout-riddles:{digest}") == digest
        digests.append(digest)
    assert digests[0] != digests[1], "other data are another environment"


@pytest.mark.usefixtures("riddles")
async def test_the_data_are_the_registered_folder_and_cannot_be_written(home: Path, tmp_path: Path) -> None:
    folder, _ = await asyncio.to_thread(give, home, tmp_path, FIRST)
    async with entered(lambda: DockerBackend("riddles")) as backend:
        sandbox = await backend.create()
        [shown] = json.loads(await asyncio.to_thread(docker, "inspect", sandbox.id))
        [mount] = [mount for mount in shown["Mounts"] if mount["Destination"] == "/data"]
        assert (mount["Source"], mount["RW"]) == (str(folder), False)
        read = "import os; print(open(os.environ['ROLLOUT_DATA'] + '/riddles.txt').read())"
        assert await asyncio.to_thread(inside, sandbox.id, read) == FIRST.strip()
        for write in (
            "open('/data/riddles.txt', 'a')",
            "open('/data/new', 'w')",
            "__import__('os').unlink('/data/riddles.txt')",
        ):
            assert "written" not in await asyncio.to_thread(
                inside, sandbox.id, f"{write}; print('written')", check=False
            )
