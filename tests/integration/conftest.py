"""The Docker daemon that container tests need: without one they skip visibly, or fail where it is required."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from containers import PrivateDaemon, mine

from backends.environments.catalog import find
from backends.sandboxes.docker.images import ensure
from backends.sandboxes.docker.port import Engine, EngineError
from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def daemon() -> None:
    """A daemon with the images of the environments that tests use."""

    async def prepare() -> None:
        async with await Engine.connect() as engine:
            for name in ("toy", "bfcl"):
                await ensure(engine, find(name), None, lambda step: None)

    try:
        asyncio.run(prepare())
    except (Unavailable, EngineError) as error:
        if os.environ.get("ROLLOUT_REQUIRE_DOCKER") == "1":
            pytest.fail(f"Docker is required here: {error}")
        pytest.skip(f"no Docker: {error}")


@pytest.fixture
def containers(daemon: None) -> Iterator[None]:
    """The daemon; no container of this process's, or of its children's, outlives the test."""
    before = set(mine())
    yield
    left = set(mine()) - before
    for name in left:
        subprocess.run(["docker", "rm", "-f", name], capture_output=True, check=False)  # not the next test's fault
    assert not left, f"containers left behind: {sorted(left)}"


@pytest.fixture(scope="module")
def private_daemon(daemon: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateDaemon]:
    """A daemon of the tests' own, which they may stop and kill, with the toy's image."""
    folder = Path(tmp_path_factory.mktemp("dockerd"))
    private = PrivateDaemon(folder)
    private.start()
    try:
        private.copy_image("toy")
        yield private
    finally:
        private.end()
