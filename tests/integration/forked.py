"""The environment `forked`, brought by a distribution that is laid out for the tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from backends.environments import toy

if TYPE_CHECKING:
    import pytest

SOURCES = Path(__file__).with_name("forked_environment")


def lay_out(site: Path) -> Path:
    """Make a folder for `sys.path` that holds the distribution."""
    package = site / "forked_package" / "forked"
    shutil.copytree(SOURCES, package, ignore=shutil.ignore_patterns("__pycache__"))
    folder = Path(next(iter(toy.__path__)))
    shutil.copy(folder / "inside.py", package / "counting.py")
    dockerfile = (folder / "Dockerfile").read_text(encoding="utf-8")
    (package / "Dockerfile").write_text(dockerfile.replace('"toy"', '"forked"'), encoding="utf-8")
    info = site / "forked-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: forked\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[rollout.environments]\nforked = forked_package.forked\n", encoding="utf-8")
    return site


def bring(site: Path, patch: pytest.MonkeyPatch) -> None:
    """Let this process find it."""
    patch.syspath_prepend(str(site))
