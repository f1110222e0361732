"""Isolation `process` against the conformance kits, in subprocesses and in containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import forked
import pytest

from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.local import LocalBackend
from orchestrator.testing import BACKEND_CHECKS, FAULT_CHECKS, check_backend, check_environment, run_check

if TYPE_CHECKING:
    from pathlib import Path

ALIKE = ("own_order", "kill", "idle_kill", "stop", "oversized", "memory", "broken")
"""What is promised of a fault wherever sessions live. The others are about one that takes its whole sandbox along."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forked.lay_out(tmp_path_factory.mktemp("forked"))


@pytest.fixture(autouse=True)
def _brought(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked.bring(site, monkeypatch)


def local() -> LocalBackend:
    return LocalBackend("forked")


@pytest.mark.parametrize("name", BACKEND_CHECKS)
async def test_backend(name: str) -> None:
    await run_check(BACKEND_CHECKS[name], local)


@pytest.mark.parametrize("name", ALIKE)
async def test_backend_under_faults(name: str) -> None:
    await run_check(FAULT_CHECKS[name], local)


@pytest.mark.parametrize("split", ["", "forked:train"])
async def test_environment(split: str) -> None:
    await check_environment(local, split, tasks=2)


@pytest.mark.usefixtures("containers")
async def test_backend_of_containers() -> None:
    await check_backend(lambda: DockerBackend("forked"))


@pytest.mark.usefixtures("containers")
async def test_environment_in_containers() -> None:
    await check_environment(lambda: DockerBackend("forked"), "forked", tasks=2)
