"""The Docker daemon that container tests need: without one they skip visibly, or fail where it is required."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from containers import mine

from backends.environments.catalog import find
from backends.sandboxes.docker.images import ensure
from backends.sandboxes.docker.port import Engine, EngineError
from bench.daemon import PrivateDaemon
from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from elsewhere import Elsewhere
    from ray_cluster import TwoNodes


REAPED_S = 5.0
"""What a dead process has left is removed by its reaper: of the suite's own, or of somebody else's on this machine."""


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
    ends = time.monotonic() + REAPED_S
    while (left := set(mine()) - before) and time.monotonic() < ends:
        time.sleep(0.1)
    for name in left:
        subprocess.run(["docker", "rm", "-f", name], capture_output=True, check=False)  # not the next test's fault
    assert not left, f"containers left behind: {sorted(left)}"


@pytest.fixture
def empty_daemon(daemon: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateDaemon]:
    """A daemon of the test's own, without any image."""
    private = PrivateDaemon(Path(tmp_path_factory.mktemp("empty")))
    private.start()
    try:
        yield private
    finally:
        private.end()


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


@pytest.fixture(scope="session")
def far_daemon(daemon: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """A daemon as on another machine, reached over TCP with TLS."""
    from elsewhere import elsewhere

    try:
        with elsewhere(Path(tmp_path_factory.mktemp("far"))) as made:
            yield made
    except Unavailable as error:
        pytest.fail(str(error)) if os.environ.get("ROLLOUT_REQUIRE_DOCKER") == "1" else pytest.skip(str(error))


@pytest.fixture
def far(far_daemon: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    """The same, named by the environment; no container is left on it by the test."""
    for name, value in far_daemon.environ().items():
        monkeypatch.setenv(name, value)
    yield far_daemon
    ends = time.monotonic() + REAPED_S
    while (left := far_daemon.containers()) and time.monotonic() < ends:
        time.sleep(0.1)
    for name in left:
        subprocess.run(["docker", "--host", far_daemon.daemon.url, "rm", "-f", name], capture_output=True, check=False)
    assert not left, f"containers left behind: {sorted(left)}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    """A Ray cluster of two nodes on this machine, and this process connected to it."""
    try:
        import ray  # noqa: F401
    except ImportError:
        message = "Ray is not installed: pip install 'rollout-orchestrator[ray]'"
        pytest.fail(message) if os.environ.get("ROLLOUT_REQUIRE_RAY") == "1" else pytest.skip(message)
    from ray_cluster import two_nodes

    with two_nodes() as made:
        yield made
