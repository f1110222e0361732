"""Synthetic tasks, made once a session with the environment's own interpreter, and a home that knows them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import appworld_tasks
import pytest

from backends.environments.catalog import find
from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def python() -> Path:
    """The environment's interpreter; without one the tests skip, visibly, or fail where all is to be tested."""
    try:
        return find("appworld").interpreter()
    except Unavailable as missing:
        if os.environ.get("CI") == "true":
            pytest.fail(str(missing))
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def made(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with synthetic data, as the package lays it out."""
    return appworld_tasks.write(python, tmp_path_factory.mktemp("appworld"))


@pytest.fixture(scope="session")
def known(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of the project's in which that data is registered."""
    return appworld_tasks.settle(tmp_path_factory.mktemp("home") / "rollout", made)


@pytest.fixture
def home(known: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in effect."""
    monkeypatch.setenv("ROLLOUT_HOME", str(known))
    return known
